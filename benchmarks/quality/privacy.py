"""Measure what the sites of a finished run leak: membership by reward margin, images by the router's updates.

    python benchmarks/quality/privacy.py runs/quality/easy-vqa-0 [--site colour] [--pairs 500] [--steps 200]

Nothing in the run folder is changed. The attacks, and what they do not show, are in `privacy_attacks`.

**Who are members and who not.** Members are pairs that the site trained on. Others are made by the same function, from
public questions of the site's types: the same shares of wrong answers, answers of the same policy, which saw neither
side. One pair is drawn per image, since pairs about one image are not independent. Where the two sides differ in
anything but membership, an attack on a model that saw neither tells them apart, too: the columns "control" attack an
untrained head, and another site's reward model. They must be at 50 %. Members are all pairs of the site, whether or
not a step drew them.

**What the server sees of an image.** *One pair*: the worst case, the gradient of one pair, as one step of SGD on one
pair would send. *Protocol*: a first round as the recipe has it, several steps of SGD on many pairs; the server searches
for all images of the first step, whose gradient is a part of the update. "Another's" is what the reconstruction
from another pair's update has in common with the image: a leak is what is above it. "Features" is the cosine between
what the encoder makes of the reconstruction and of the image, both less what it makes of the mean of public images.
*Rounds*: an update tells its round's pairs from the site's other pairs by their gradients; 50 % would be no leak.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar, cast

import torch
from privacy_attacks import (
    RELEASES,
    Inversion,
    Membership,
    feature_likeness,
    hidden_states,
    invert,
    membership,
    pair_scores,
    psnr,
    raw,
    seen_update,
    ssim,
    true_images,
    update_cosines,
    update_gradients,
)
from torch import Tensor
from transformers.utils import logging

from accord.data.images import load_image
from accord.federation.messages import UpdateRequest
from accord.federation.weights import to_bytes, trainable_weights
from accord.models.inputs import Batch, build_batch
from accord.recipe_file import load_recipe
from accord.rewards.model import RewardModel
from accord.routing.fit import LocalRouterTraining
from accord.routing.router import RouterNetwork
from accord.runs import Run
from accord.stages.job import Job
from accord.stages.sites import site_pairs
from accord.types import PreferencePair

IMAGES = 4  # attacked per site with the update of one pair
ROUNDS = 4  # whose updates are compared with gradients of pairs
T = TypeVar("T")


@dataclass(frozen=True)
class Likeness:
    """Means over images, of what the search found, of what it found for other images, and of where it began."""

    distance: float  # 1 − cos that the search arrived at
    psnr: tuple[float, float, float]
    ssim: tuple[float, float, float]
    features: tuple[float, float]


def main() -> None:
    parser = argparse.ArgumentParser(description="what the sites of a finished run leak")
    parser.add_argument("run", type=Path)
    parser.add_argument("--site", help="this one only")
    parser.add_argument("--pairs", type=int, default=500, help="members, and others, at most one per image")
    parser.add_argument("--steps", type=int, default=Inversion.steps, help="of the search; a fifth for the protocol")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:5.0f} s  {text}", file=sys.stderr, flush=True)

    recipe = load_recipe(arguments.run / "recipe.toml")
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    job = Job(recipe, cast(Run, None), quiet=True)  # attacks read a run, and neither lock nor change it
    names = [site.name for site in recipe.sites]
    attacked = [job.site(arguments.site).name] if arguments.site else names
    margin: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    images: dict[str, dict[str, Likeness]] = {}
    rounds: dict[str, Membership] = {}
    for name in attacked:
        say(f"{name}: its pairs")
        members = one_each(site_pairs(job, name), lambda pair: pair.images[0], arguments.pairs)
        if others := outsiders(job, name, arguments.pairs):
            say(f"{name}: margins of {len(members)} members and {len(others)} others")
            margin[name] = attack_margins(job, arguments.run, name, members, others)
        else:
            say(f"{name}: has pairs of its own, and nobody knows others of their distribution; margins left out")
        say(f"{name}: images from the router's updates")
        images[name], rounds[name] = attack_updates(job, name, members, Inversion(arguments.steps), say)
    say("done")
    if margin:
        print("\n".join(margin_tables(margin)), end="\n\n")
    print("\n".join(image_table(images)), end="\n\n")
    print("\n".join(round_table(rounds)), end="\n\n")
    print(origin(arguments))


def one_each(items: Iterable[T], of: Callable[[T], Hashable], count: int) -> list[T]:
    """Draw at most `count` items, of each image one."""
    drawn = list(items)
    random.Random(0).shuffle(drawn)
    return list({of(item): item for item in drawn}.values())[:count]


def outsiders(job: Job, name: str, count: int) -> list[PreferencePair]:
    """Construct pairs as the site's were, from public questions of its types; none where its pairs are its own."""
    site = job.site(name)
    if site.preferences:
        return []
    public = [question for question in job.questions["public"] if site.share.wants(question)]
    stranger = Job(job.recipe, job.run, quiet=True)
    stranger.questions = job.questions
    stranger.private = {name: one_each(public, lambda question: question.image, count)}
    return one_each(site_pairs(stranger, name), lambda pair: pair.images[0], count)


def attack_margins(
    job: Job, run: Path, name: str, members: Sequence[PreferencePair], others: Sequence[PreferencePair]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the margins of members and others: by form of release, and of models that trained on neither."""
    model = RewardModel.load(run / "sites" / name / "reward")
    scores = pair_scores(model, members), pair_scores(model, others)
    found = {"raw": tuple(raw(each, model.standardisation) for each in scores)}
    found |= {words: tuple(map(release, scores)) for words, release in RELEASES.items()}
    torch.manual_seed(0)
    strangers = {"control: untrained": RewardModel.from_checkpoint(job.site(name).checkpoint, lora=job.site(name).lora)}
    names = [site.name for site in job.recipe.sites]
    if len(names) > 1:
        another = names[names.index(name) - 1]
        strangers["control: another site's"] = RewardModel.load(run / "sites" / another / "reward")
    for words, stranger in strangers.items():
        found[words] = pair_scores(stranger, members), pair_scores(stranger, others)
    return {words: (both[0][:, 0] - both[0][:, 1], both[1][:, 0] - both[1][:, 1]) for words, both in found.items()}


def attack_updates(
    job: Job, name: str, members: Sequence[PreferencePair], config: Inversion, say: Callable[[str], None]
) -> tuple[dict[str, Likeness], Membership]:
    """Reconstruct images from updates of the first round, and tell by an update which pairs were in its round."""
    encoder, settings = job.encoder, job.recipe.router
    k = [site.name for site in job.recipe.sites].index(name)
    torch.manual_seed(job.recipe.seed)
    network = RouterNetwork(encoder.features, len(job.recipe.sites), settings).to(encoder.model.device)
    public = one_each(job.questions["public"], lambda question: question.image, 100)
    mean = true_images(encoder, ask(job, [replace(members[0], images=(q.image,)) for q in public])).mean(dim=0)
    found: dict[str, Likeness] = {}

    def search(starts: dict[str, Tensor], updates: Tensor, pairs: Sequence[PreferencePair], steps: int) -> None:
        log: list[float] = []
        every = torch.cat(list(starts.values()))
        reached = invert(
            encoder,
            network,
            updates.repeat(len(starts), 1),
            ask(job, list(pairs) * len(starts)),
            k,
            replace(config, steps=steps),
            start=every,
            on_step=log.append,
        )
        batch = ask(job, pairs)
        for (words, start), images in zip(starts.items(), reached.split(len(pairs)), strict=True):
            found[words] = likeness(job, batch, images, start, mean, log[-1])
            say(
                f"{name}: {words}, {steps} steps: PSNR {found[words].psnr[0]:.1f}, another's {found[words].psnr[1]:.1f}"
            )

    batch = ask(job, members[:IMAGES])
    true = true_images(encoder, batch)
    mask = batch.attention_mask.bool().unflatten(0, (len(true), -1))
    with torch.no_grad():
        hidden = hidden_states(encoder, batch, true).unflatten(0, (len(true), -1))
        updates = update_gradients(network, hidden, mask, k)
    noise = torch.rand(true.shape, generator=torch.Generator().manual_seed(0)).to(true.device)
    starts = {"one pair, from noise": noise, "one pair, from the public mean": mean.expand_as(true)}
    search(starts, updates, members[:IMAGES], config.steps)

    training = LocalRouterTraining(encoder, site_pairs(job, name), k, len(job.recipe.sites), settings)
    inside, outside = [], []
    for number in range(ROUNDS):
        bits = settings.aggregation.bits
        sent = to_bytes(trainable_weights(network), bits=bits)
        reply = training(UpdateRequest(f"router-0-0-{name}", "router", 0, sent, number, bits=bits))
        update = seen_update(reply.change).to(encoder.model.device)
        steps = drawn(training, number)
        check_drawn(network, training, update, steps[0], k)
        if number == 0:
            pairs = [training.pairs[n] for n in steps[0]]
            starts = {"protocol, from the public mean": mean.expand(len(pairs), -1, -1, -1)}
            search(starts, update[None], pairs, max(1, config.steps // 5))
        images = [pair.images[0] for pair in training.pairs]
        order = random.Random(number).sample(range(len(images)), len(images))
        seen = {images[n] for step in steps for n in step}
        # One pair an image, and none left out that shares its image with one taken, so that pairs are independent.
        taken = list({images[n]: n for step in steps for n in step}.values())
        left = list({images[n]: n for n in order if images[n] not in seen}.values())[: len(taken)]
        for indices, cosines in ((taken, inside), (left, outside)):
            cosines.append(update_cosines(network, update, *states(training, indices), k))
    return found, membership(torch.cat(inside), torch.cat(outside))


def ask(job: Job, pairs: Sequence[PreferencePair]) -> Batch:
    """Return both answers of every pair behind its prompt and image."""
    texts = [[pair.chosen, pair.rejected] for pair in pairs]
    loaded = [load_image(pair.images[0]) for pair in pairs]
    batch = build_batch(job.encoder.processor, [pair.prompt for pair in pairs], loaded, texts)
    return batch.to(job.encoder.model.device)


def drawn(training: LocalRouterTraining, seed: int) -> list[list[int]]:
    """Return which pairs each local step takes; the server names the seed, so that it knows."""
    generator, count = random.Random(seed), len(training.pairs)
    size = min(training.config.pairs_per_batch, count)
    return [generator.sample(range(count), size) for _ in range(training.config.local_steps)]


def states(training: LocalRouterTraining, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return hidden states `[B, 2, T, D]` of pairs, and masks."""
    rows = torch.tensor([[2 * n, 2 * n + 1] for n in indices])
    hidden, mask = training.features
    return hidden[rows].to(training.encoder.model.device), mask[rows].to(training.encoder.model.device)


def check_drawn(
    network: RouterNetwork, training: LocalRouterTraining, update: Tensor, first: Sequence[int], site: int
) -> None:
    """Make sure that `drawn` draws as the site did: the first steps have the signs of the first gradient."""
    hidden, mask = states(training, first)
    with torch.no_grad():
        gradient = update_gradients(network, hidden.flatten(0, 1)[None], mask.flatten(0, 1)[None], site)[0]
    large = gradient.abs() >= gradient.abs().mean()
    agree = float((gradient.sign() == update.sign())[large].double().mean())
    if agree < 0.9:
        raise SystemExit(f"the update agrees with the gradient of its pairs in {agree:.0%} of the signs, expected all")


def likeness(job: Job, batch: Batch, found: Tensor, start: Tensor, mean: Tensor, distance: float) -> Likeness:
    """Compare reconstructions `[N, 3, H, W]` with the true images, and so the N - 1 reconstructions of others."""
    true = true_images(job.encoder, batch)
    base = mean.expand_as(true)

    def features(images: Tensor) -> float:
        return float(feature_likeness(job.encoder, batch, images, true, base).mean())

    measures: list[Callable[[Tensor], float]] = [
        lambda images: float(psnr(images, true).mean()),
        lambda images: float(ssim(images, true).mean()),
        features,
    ]
    own = [measure(found) for measure in measures]
    shifts = range(1, min(len(true), 9))  # of 32 images, eight others each are enough
    others = [statistics.mean(measure(found.roll(shift, 0)) for shift in shifts) for measure in measures]
    begun = [measure(start) for measure in measures[:2]]
    return Likeness(distance, (own[0], others[0], begun[0]), (own[1], others[1], begun[1]), (own[2], others[2]))


def margin_tables(margin: dict[str, dict[str, tuple[Tensor, Tensor]]]) -> list[str]:
    """Return AUC and true positive rates: a row per site, the mean of sites, and all pairs under one threshold."""
    columns = list(dict.fromkeys(words for found in margin.values() for words in found))
    found = {name: {words: membership(*both) for words, both in of.items()} for name, of in margin.items()}
    together = {
        words: membership(*(torch.cat([of[words][side] for of in margin.values()]) for side in (0, 1)))
        for words in columns
        if all(words in of for of in margin.values())
    }
    sizes = {name: tuple(map(len, of["raw"])) for name, of in margin.items()}
    lines = ["### Membership by reward margin", ""]
    show: dict[str, Callable[[Membership], float]] = {
        "AUC ± half the 95 % interval, percent": lambda m: m.auc,
        "true positive rate at 1 % false positives, percent": lambda m: m.at_1,
        "true positive rate at 10 % false positives, percent": lambda m: m.at_10,
    }
    for title, value in show.items():
        lines += [f"{title}:", "", f"| site | members, others | {' | '.join(columns)} |", rule(2 + len(columns))]
        half = (lambda m: (m.interval[1] - m.interval[0]) / 2) if title.startswith("AUC") else None
        for name, of in found.items():
            cells = [cell([value(of[words])], half and [half(of[words])]) for words in columns]
            lines.append(f"| {name} | {sizes[name][0]}, {sizes[name][1]} | {' | '.join(cells)} |")
        if len(found) > 1:
            every = list(found.values())
            cells = [cell([value(of[w]) for of in every], half and [half(of[w]) for of in every]) for w in columns]
            lines.append(f"| **mean of sites** | | {' | '.join(cells)} |")
            cells = [cell([value(together[words])], half and [half(together[words])]) for words in columns]
            total = [sum(size[side] for size in sizes.values()) for side in (0, 1)]
            lines.append(f"| all under one threshold | {total[0]}, {total[1]} | {' | '.join(cells)} |")
        lines.append("")
    return lines[:-1]


def image_table(images: dict[str, dict[str, Likeness]]) -> list[str]:
    """Return the likeness of reconstructions, a row per attack and site."""
    measures = ["PSNR, dB", "another's", "start's", "SSIM", "another's", "start's", "features", "another's"]
    head = f"| attack | site | distance reached | {' | '.join(measures)} |"
    lines = ["### Images from the router's updates", "", head, rule(3 + len(measures))]
    for words in next(iter(images.values())):
        rows = {name: [found[words]] for name, found in images.items()}
        if len(rows) > 1:
            rows["**mean of sites**"] = [found[words] for found in images.values()]
        for name, found in rows.items():
            every = [[each.distance, *each.psnr, *each.ssim, *each.features] for each in found]
            means = [statistics.mean(values) for values in zip(*every, strict=True)]
            cells = [f"{value:.{2 if 0 < column < 4 else 3}f}" for column, value in enumerate(means)]
            lines.append(f"| {words} | {name} | {' | '.join(cells)} |")
    return lines


def round_table(rounds: dict[str, Membership]) -> list[str]:
    """Return how well an update tells the pairs of its round from the site's other pairs."""
    lines = [
        "### Which pairs were in a router round, by the cosine of their gradients with the update",
        "",
        "| site | AUC ± half the 95 % interval, percent | TPR at 1 % FPR | TPR at 10 % FPR |",
        rule(4),
    ]
    for name, m in rounds.items():
        half = (m.interval[1] - m.interval[0]) / 2
        lines.append(f"| {name} | {cell([m.auc], [half])} | {cell([m.at_1])} | {cell([m.at_10])} |")
    return lines


def cell(values: Sequence[float], halves: Sequence[float] | None = None) -> str:
    """Return a mean in percent; with half the interval of a mean of independent values, if those of each are given."""
    spread = f" ± {100 * math.hypot(*halves) / len(halves):.1f}" if halves else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def rule(columns: int) -> str:
    return "|" + "---|" * columns


def origin(arguments: argparse.Namespace) -> str:
    """Return the line that says what was measured with what."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--exclude", "*"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    made = json.loads((arguments.run / "manifest.json").read_text())["commit"]
    site = f" --site {arguments.site}" if arguments.site else ""
    return (
        f"`python benchmarks/quality/privacy.py {arguments.run}{site} --pairs {arguments.pairs} --steps "
        f"{arguments.steps}`, commit {commit}, of a run made at {made or 'unknown'!s:.7}, {versions}, "
        f"{torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
