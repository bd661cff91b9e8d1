"""Train a site's reward model with a guarantee: pay first, then read the pairs, then certify.

Under `privacy` in a site's table the backbone stays as it came, and one of these is trained:

    a linear head by DP-SGD                      `accord.rewards.private`
    with `lora`, an adapter and the head         `accord.rewards.private_adapter`
    with the unit "label", a head on noisy labels     `accord.rewards.private_labels`

Nothing is kept back or ranked, and no loss is logged: each would read the pairs once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from accord.federation.site import SiteRecord
from accord.progress import stage_bar
from accord.recipe import SiteConfig
from accord.rewards.certificate import Certificate, Uncovered, Way
from accord.rewards.model import RewardModel, checkpoint_fingerprint
from accord.rewards.noise import SecretNoise
from accord.rewards.private import Privacy, pair_features, private_head, private_standardisation, unit_index
from accord.rewards.private_adapter import fresh_model, private_adapter
from accord.rewards.private_labels import draw_flips, label_head, randomise, standardisation_of
from accord.rewards.spending import certify, fingerprint_of, settle, spend
from accord.runs import read_record
from accord.stages.job import Job
from accord.types import PreferencePair
from accord.version import VERSION


def ledger_of(job: Job, name: str) -> Path:
    """Return the file of what a site's data have paid."""
    privacy = job.site(name).privacy
    if privacy and privacy.ledger:
        return Path(privacy.ledger).expanduser()
    return job.path / "sites" / name / "privacy.json"


def train_private_reward_model(job: Job, name: str, pairs: Sequence[PreferencePair]) -> Certificate:
    """Pay for a reward model, train it, write it to the site's folder, and return its certificate.

    `settle_site` follows, once the certificate is on the site's card. Where a kill came between the two, the model is
    there already.

    Raises:
        RecipeError: nothing is left of the budget.
        DataError: a pair does not say whose it is where the unit is a person.
    """
    site, path, folder = job.site(name), ledger_of(job, name), job.path / "sites" / name
    privacy = site.privacy
    assert privacy is not None
    unit = unit_index(pairs, privacy.unit)
    way: Way = "labels" if privacy.unit == "label" else "adapter" if site.lora else "head"
    if way == "adapter":
        privacy = replace(privacy, dimensions=0)  # there is no projection to pay for
    entry = spend(path, privacy, _fingerprint(job, site, privacy, pairs))
    card = read_record(folder / "card.json", SiteRecord, remedy="remove it, and train the site again")
    if card and card.privacy and card.privacy.id == entry.id:
        return card.privacy
    noise = SecretNoise(bytes.fromhex(entry.key))
    flip, sigmas = entry.mechanisms[0].flip, entry.sigmas
    if way == "labels":  # before anything reads them
        pairs = randomise(pairs, draw_flips(len(pairs), flip, noise))
    model = (
        fresh_model(site.checkpoint, site.lora, noise) if site.lora else RewardModel.from_checkpoint(site.checkpoint)
    )
    model.rows_at_once = site.reward_model.rows_at_once
    if way == "adapter":
        with stage_bar(f"{name}: private adapter", privacy.steps, quiet=job.quiet) as advance:
            private_adapter(model, pairs, unit, privacy, sigmas.gradient, noise, on_step=lambda: advance(1))
    with stage_bar(f"{name}: features", len(pairs), quiet=job.quiet) as advance:
        found = pair_features(model, pairs, on_batch=lambda n: advance(n)).double()
    if way == "adapter":
        weights = model.head.state_dict()["weight"][0].cpu().double()
    else:
        with stage_bar(f"{name}: private head", privacy.steps * privacy.stages, quiet=job.quiet) as advance:
            weights = (
                label_head(found, flip, privacy, noise, on_step=lambda: advance(1))
                if way == "labels"
                else private_head(found, unit, privacy, sigmas, noise, on_step=lambda: advance(1))
            )
        model.head.load_state_dict({"weight": weights[None], "bias": torch.zeros(1)})
    scores = found @ weights
    model.standardisation = (
        standardisation_of(scores)
        if way == "labels"
        else private_standardisation(scores, unit, sigmas.standardisation, noise)
    )
    model.save(folder / "reward")
    return certify(path, privacy, entry, way=way, uncovered=_uncovered(site, pairs))


def settle_site(job: Job, name: str, certificate: Certificate) -> None:
    """End a training whose certificate is on the site's card: it cannot be done again at no price."""
    settle(ledger_of(job, name), certificate.id)


def _fingerprint(job: Job, site: SiteConfig, privacy: Privacy, pairs: Sequence[PreferencePair]) -> str:
    """Return a hash of all that the trained weights depend on, but for the key."""
    rows = [
        (p.prompt, p.chosen, p.rejected, [job.identify(s) for s in p.images], p.question_id, p.person) for p in pairs
    ]
    settings = [asdict(replace(privacy, ledger="")), asdict(site.lora) if site.lora else None]
    return fingerprint_of(rows, checkpoint_fingerprint(site.checkpoint), settings, VERSION, str(torch.__version__))


def _uncovered(site: SiteConfig, pairs: Sequence[PreferencePair]) -> list[Uncovered]:
    found: list[Uncovered] = ["counts", "shared training", "gates", "settings"]
    if any(pair.constructed for pair in pairs):
        found.append("making")
    if site.answers or site.owns:
        found.append("answers")
    if site.privacy and site.privacy.unit == "label":
        found.append("inputs")
    if site.privacy and not site.privacy.ledger:
        found.append("other runs")
    return found
