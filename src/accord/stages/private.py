"""Train a site's reward model with a guarantee: try it on one batch, pay, then train on the pairs, then certify.

Under `privacy` in a site's table the backbone stays as it came, and one of these is trained:

    a linear head by DP-SGD                      `accord.rewards.private`
    with `lora`, an adapter and the head         `accord.rewards.private_adapter`
    with the unit "label", a head on noisy labels     `accord.rewards.private_labels`

Nothing is kept back or ranked, and no loss is logged: each would read the pairs once more.

With `privacy.router` the same entry of the ledger pays for the site's steps on the router, and its certificate says so
(`accord.routing.private_fit`). What a site then does is what its certificate says, whatever its recipe says by now.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from accord.data.images import load_images
from accord.errors import RunError
from accord.federation.site import SiteRecord
from accord.models.load import PREFIX, locate
from accord.progress import stage_bar
from accord.recipe import SiteConfig
from accord.rewards.accounting import epsilon_of
from accord.rewards.certificate import Certificate, Uncovered, Unit, Way
from accord.rewards.model import RewardModel, checkpoint_fingerprint
from accord.rewards.noise import SecretNoise, new_key
from accord.rewards.private import (
    Privacy,
    check_delta,
    pair_features,
    private_head,
    private_standardisation,
    unit_index,
)
from accord.rewards.private_adapter import fresh_model, pair_gradients, private_adapter
from accord.rewards.private_labels import draw_flips, label_head, randomise, standardisation_of
from accord.rewards.spending import Entry, certify, fingerprint_of, pay, read_entries, settle, spend
from accord.routing.private_fit import Answers, Guarantee
from accord.runs import read_record
from accord.stages.agreement import weights_digest
from accord.stages.job import Job
from accord.types import PreferencePair
from accord.version import VERSION

_VERSIONS = (VERSION, str(torch.__version__))

_TRIED = 16
"""Pairs of the batch on which a model is tried before it is paid for."""


@dataclass(frozen=True)
class Spending:
    """What a site's data have paid, and for what: as `accord site status` says it."""

    certificate: Certificate | None  # of the model that answers; None where it has none
    budget: float  # ε that the recipe allows; 0 where it has no `privacy` any more
    ledger: Path
    epsilon: float  # of all that the ledger has, at `delta`
    delta: float  # the recipe's, or where it has none that of the last training
    unit: Unit
    router_taken: int  # of the certificate's steps on the router


def ledger_of(job: Job, name: str) -> Path:
    """Return the file of what a site's data have paid."""
    return _ledger(job.site(name), job.main or job.path)


def _ledger(site: SiteConfig, folder: Path) -> Path:
    if site.privacy and site.privacy.ledger:
        return Path(site.privacy.ledger).expanduser().resolve()  # a link is another name of the same ledger
    return folder.resolve() / "privacy" / f"{site.name}.json"


def spending_of(site: SiteConfig, folder: Path) -> Spending | None:
    """Return what a site has paid; None where its model has no certificate, and its ledger no training.

    Args:
        site: as its recipe has it.
        folder: of the site, or of the run in which it was trained.

    Raises:
        RunError: its card or its ledger cannot be read, or the ledger lacks what was paid for its model.
    """
    card, ledger = _card(folder, site.name), _ledger(site, folder)
    entries, proof = read_entries(ledger), card.privacy if card else None
    paid = _check_paid(ledger, entries, proof, folder / "sites" / site.name) if proof else None
    if not entries:
        return None
    unit, delta = entries[-1].unit, (site.privacy or entries[-1]).delta
    delta = 0.0 if unit == "label" else delta
    taken = (paid.router_taken or 0) if paid else 0
    whole = epsilon_of([each for entry in entries for each in entry.mechanisms], delta)
    return Spending(proof, site.privacy.epsilon if site.privacy else 0.0, ledger, whole, delta, unit, taken)


def train_private_reward_model(job: Job, name: str, pairs: Sequence[PreferencePair]) -> Certificate:
    """Pay for a reward model, train it, write it to the site's folder, and return its certificate.

    `settle_site` follows, once the certificate is on the site's card. A model that this training has left already is
    kept as it is, whether it was settled or a kill came first: it can never be made again.

    Raises:
        RecipeError: nothing is left of the budget, or δ is too large for so many units.
        RunError: the ledger cannot be read, or lacks what was paid for the model in the site's folder.
        DataError: a pair does not say whose it is where the unit is a person.
    """
    site, path, folder = job.site(name), ledger_of(job, name), job.path / "sites" / name
    privacy = site.privacy
    assert privacy is not None
    unit = unit_index(pairs, privacy.unit)
    check_delta(privacy, int(unit.max()) + 1)
    way: Way = "labels" if privacy.unit == "label" else "adapter" if site.lora else "head"
    if way == "adapter":
        privacy = replace(privacy, dimensions=0)  # there is no projection to pay for
    fingerprint = _fingerprint(job, site, privacy, pairs)
    if there := _paid_model(job, name, fingerprint):
        return there
    model = _untrained(site, SecretNoise(new_key()))
    _try(model, pairs)
    router = job.recipe.router
    entry = spend(path, privacy, fingerprint, router_steps=router.rounds * router.local_steps)
    noise = SecretNoise(bytes.fromhex(entry.key))
    flip, sigmas = entry.mechanisms[0].flip, entry.sigmas
    if way == "labels":  # before anything reads them
        pairs = randomise(pairs, draw_flips(len(pairs), flip, noise))
    if way == "adapter":
        del model  # before there is another
        model = _untrained(site, noise)
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
    (folder / "card.json").unlink(missing_ok=True)  # of an earlier model, whose certificate is not this one's
    model.save(folder / "reward")
    return certify(path, privacy, entry, way=way, uncovered=_uncovered(site, pairs))


def router_guarantee(job: Job, name: str, pairs: Sequence[PreferencePair]) -> Guarantee | None:
    """Return what a site's steps on the router are taken by; None where its certificate does not cover them.

    Args:
        job: with the recipe.
        name: of the site.
        pairs: of the site.

    Raises:
        RunError: the recipe asks for noise, and the site's model was trained without paying for it; or the ledger
            cannot be read, or lacks what was paid.
    """
    site, certificate = job.site(name), None
    if card := _card(job.path, name):
        certificate = card.privacy
    if certificate is None or not certificate.router_steps:
        if site.privacy and site.privacy.router:
            raise RunError(
                f"site {name!r} has privacy.router = {site.privacy.router:g}, and its reward model was trained without "
                "paying for a router's steps; train the site again, or set privacy.router = 0"
            )
        return None
    path, clip = ledger_of(job, name), certificate.clip
    entry = next((each for each in read_entries(path) if each.id == certificate.id), None)
    if entry is None or entry.router is None:
        raise RunError(
            f"{path} does not have the training {certificate.id}, with which the steps of site {name!r} on the router "
            "were paid for; put the newest ledger back that has it, or name that one in privacy.ledger"
        )
    step = entry.router
    read = fingerprint_of(_rows(job, pairs), weights_digest(job.recipe.encoder_checkpoint))
    answers = Answers(job.path / "sites" / name / "router-answers" / entry.id, partial(pay, path, entry.id))
    return Guarantee(entry.unit, step.sampling, step.sigma, clip, read, answers)


def _untrained(site: SiteConfig, noise: SecretNoise) -> RewardModel:
    if site.lora:
        model = fresh_model(site.checkpoint, site.lora, noise)
    else:
        model = RewardModel.from_checkpoint(site.checkpoint)
    model.rows_at_once = site.reward_model.rows_at_once
    return model


def _try(model: RewardModel, pairs: Sequence[PreferencePair]) -> None:
    """Compute one batch and forget it: what cannot be loaded, read or held fails before anything is paid for it."""
    first = pairs[:_TRIED]
    if model.lora:
        with pair_gradients(model) as gradients:
            gradients(first)
    else:
        images = [load_images(pair.images) for pair in first]
        model.states([pair.prompt for pair in first], images, [[pair.chosen, pair.rejected] for pair in first])


def settle_site(job: Job, name: str) -> None:
    """End a training whose certificate is on the site's card: it cannot be done again at no price.

    Nothing happens where there is no certificate, or where another run is still to take the site over.
    """
    card = _card(job.path, name)
    if card and card.privacy and job.main is None:
        settle(ledger_of(job, name), card.privacy.id)


def _paid_model(job: Job, name: str, fingerprint: str) -> Certificate | None:
    """Return the certificate of the model in the site's folder, if this very training has made it; None otherwise.

    Raises:
        RunError: the ledger does not have what was paid for the model, so that it is not the whole of what was spent.
    """
    card, path, folder = _card(job.path, name), ledger_of(job, name), job.path / "sites" / name
    if card is None or card.privacy is None:
        return None
    paid = _check_paid(path, read_entries(path), card.privacy, folder)
    return card.privacy if paid.fingerprint == fingerprint and (folder / "reward").is_dir() else None


def _check_paid(path: Path, entries: Sequence[Entry], proof: Certificate, folder: Path) -> Entry:
    """Return the entry of a ledger by which the model in a site's folder was paid for."""
    for entry in entries:
        if entry.id == proof.id:
            return entry
    raise RunError(
        f"{path} does not have the training {proof.id}, by which the model in {folder} was paid for: nobody knows what "
        "is spent; put the ledger back that has it, or name that one in privacy.ledger, and only where the site's data "
        f"are others now, remove {folder}"
    )


def has_certificate(job: Job, name: str) -> bool:
    """Tell whether a model with a certificate stands in the site's folder, which may have been paid for."""
    card = _card(job.path, name)
    return card is not None and card.privacy is not None


def _card(folder: Path, name: str) -> SiteRecord | None:
    file = folder / "sites" / name / "card.json"
    return read_record(file, SiteRecord, remedy="remove it, and train the site again")


def _fingerprint(job: Job, site: SiteConfig, privacy: Privacy, pairs: Sequence[PreferencePair]) -> str:
    """Return a hash of all that the trained weights depend on, but for the key."""
    asked = asdict(replace(privacy, ledger=""))
    if not privacy.router:  # as before there was a share of it
        del asked["router"]
    settings = [asked, asdict(site.lora) if site.lora else None]
    return fingerprint_of(_rows(job, pairs), checkpoint_fingerprint(site.checkpoint), settings, *_VERSIONS)


def _rows(job: Job, pairs: Sequence[PreferencePair]) -> list[object]:
    return [
        (p.prompt, p.chosen, p.rejected, [job.identify(s) for s in p.images], p.question_id, p.person) for p in pairs
    ]


def _uncovered(site: SiteConfig, pairs: Sequence[PreferencePair]) -> list[Uncovered]:
    covered = site.privacy is not None and site.privacy.router > 0
    found: list[Uncovered] = ["counts", "other training" if covered else "shared training", "gates", "settings"]
    if any(pair.constructed for pair in pairs):
        found.append("making")
    if not site.checkpoint.startswith(PREFIX) and Path(locate(site.checkpoint)).is_dir():
        found.append("backbone")
    if site.answers or site.owns:
        found.append("answers")
    if site.privacy and site.privacy.unit == "label":
        found.append("inputs")
    if site.privacy and not site.privacy.ledger:
        found.append("other runs")
    return found
