"""Compare sites by noisy sketches of the answers that they prefer: who is near whom, and who is far from what is asked.

    the server sends      a projection on the P whitened principal axes of its own public answers, and M centres there
    site k sends          counts and sums of its chosen answers at each centre, with Gaussian noise
    D_ij                  earth mover's distance between the sketches of sites i and j
    D_i                   mean distance of site i's sketch from the nearest of the server's own centres

A site counts each question once, with one pair, which is drawn by what the question is and by no other question.
Offsets from a centre are clipped to length C, so that one question moves a sketch by √(1 + C²) at most; the noise is
(ε, δ)-differentially private by the analytic Gaussian mechanism (Balle and Wang 2018, arXiv 1805.06530, theorem 8), a
question added or removed with all its pairs:

    Φ(Δ/2σ − εσ/Δ) − e^ε Φ(−Δ/2σ − εσ/Δ) ≤ δ

A sketch tells domains apart, and not careful sites from careless ones: right and wrong answers alike are among what is
chosen. (Measured on easy-VQA, 400 questions a site: the distance between a site's chosen and rejected answers was 0.2
at ε = 40 whether 0, 40 or 100 % of its questions had a wrong answer preferred.)

Source: after PQFed, 2025, arXiv 2509.21704, of which the abstract is known to us, and that it uses noisy PCA features,
the earth mover's distance, clusters and a threshold. The mechanism, the projection on public axes, the sketch of
preferred answers in place of inputs, and D_i are ours: this is not that paper's method.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from accord.data.images import load_images
from accord.data.preferences import digest_of
from accord.data.questions import image_identity
from accord.errors import DataError, RecipeError, ReplyError, RunError, check_least, check_positive
from accord.federation.asking import ask_checked
from accord.federation.engine import Engine
from accord.federation.messages import Reply, UpdateReply, UpdateRequest
from accord.federation.rounds import check_update
from accord.federation.weights import read_weights, to_bytes
from accord.models.encoder import Encoder
from accord.rewards.noise import SecretNoise
from accord.routing.anchors import last_states
from accord.routing.density import centres_of
from accord.routing.stored import load_arrays, save_arrays
from accord.types import PreferencePair

FLOOR: Final = 2.0
"""Deviations of the noise that a noisy count must be above for its centre to hold anything."""


MOST: Final = 50.0
"""Greatest ε."""


@dataclass(frozen=True)
class SketchConfig:
    """What a sketch tells, and what is made of the distances, which are in public standard deviations.

    Measured on easy-VQA by the defaults, 400 questions a site: D_ij is 0.4 to 0.6 between two sites of one type and 1.1
    to 2.3 between others; D_i is 0.4 to 0.8 where a site's type is asked or looks like it, and 1.6 where it does not.
    """

    dimensions: int = 8  # P
    components: int = 8  # M
    clip: float = 4.0  # C
    epsilon: float = 3.0
    delta: float = 1e-5
    near: float = 1.0  # D_ij up to which two sites average together
    far: float = 1.2  # D_i above which a site is set aside

    def __post_init__(self) -> None:
        """Refuse what leaves nothing to tell, and a guarantee that is none."""
        check_least(self, dimensions=1, components=1, near=0, far=0)
        check_positive(self, "clip", "epsilon", "delta")
        if self.epsilon > MOST:
            raise RecipeError(f"epsilon = {self.epsilon} protects nothing; at most {MOST:g} is taken, lower it")

    @property
    def sigma(self) -> float:
        """Deviation of the noise on every number of a sketch."""
        return math.sqrt(1 + self.clip**2) * noise_multiplier(self.epsilon, self.delta)


def noise_multiplier(epsilon: float, delta: float) -> float:
    """Return the least σ / Δ by which the Gaussian mechanism is (ε, δ)-differentially private."""

    def spent(sigma: float) -> float:
        below = math.erfc(-(1 / (2 * sigma) - epsilon * sigma) / math.sqrt(2)) / 2
        above = math.erfc((1 / (2 * sigma) + epsilon * sigma) / math.sqrt(2)) / 2
        return below - math.exp(epsilon) * above

    low, high = 1e-3, 1e6
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if spent(middle) <= delta else (middle, high)
    return high


@dataclass(frozen=True)
class Space:
    """Where sketches are made, from public answers alone; in float64."""

    mean: Tensor  # [D]
    axes: Tensor  # [P, D], whitening
    centre: Tensor  # [M, P]

    def project(self, x: Tensor) -> Tensor:
        """Return features `[n, D]` on the axes, `[n, P]`, in public standard deviations."""
        return (x.double() - self.mean) @ self.axes.T


def space_of(x: Tensor, config: SketchConfig, *, seed: int) -> Space:
    """Return the principal axes of public features `[n, D]`, and k-means' centres on them.

    Raises:
        DataError: there are fewer features than axes or centres.
    """
    most = min(x.shape[1], len(x) - 1)
    if config.dimensions > most:
        raise DataError(
            f"{config.dimensions} axes need as many features and more answers, got {tuple(x.shape)}; lower "
            "sketch.dimensions"
        )
    x = x.double()
    mean = x.mean(dim=0)
    _, spread, axes = torch.linalg.svd(x - mean, full_matrices=False)
    deviation = (spread / math.sqrt(len(x)))[: config.dimensions].clamp(min=1e-6)
    axes = axes[: config.dimensions] / deviation[:, None]
    centre = centres_of((x - mean) @ axes.T, seed=seed, components=config.components).centre
    return Space(mean, axes, centre)


def sketch_of(x: Tensor, space: Space, config: SketchConfig, noise: SecretNoise) -> Tensor:
    """Return the noisy counts and sums `[M, 1 + P]` of features `[n, D]`; sums are of clipped offsets from a centre."""
    z = space.project(x)
    member = torch.cdist(z, space.centre).argmin(dim=1)
    offset = z - space.centre[member]
    offset = offset * (config.clip / offset.norm(dim=1, keepdim=True).clamp(min=config.clip))
    told = torch.cat([torch.ones(len(z), 1, dtype=torch.float64), offset], dim=1)
    exact = torch.zeros(len(space.centre), told.shape[1], dtype=torch.float64).index_add(0, member, told)
    return exact + config.sigma * noise.normal(*exact.shape)


def points_of(sketch: Tensor, space: Space, config: SketchConfig) -> tuple[Tensor, Tensor]:
    """Return weights `[m]`, summing to 1, and centroids `[m, P]` of the centres that hold more than noise.

    Where none does, the largest stands for all.
    """
    count = sketch[:, 0]
    there = count > FLOOR * config.sigma
    there[count.argmax()] = True
    held = count[there].clamp(min=1)
    offset = sketch[there, 1:] / held[:, None]
    offset = offset * (config.clip / offset.norm(dim=1, keepdim=True).clamp(min=config.clip))
    return held / held.sum(), space.centre[there] + offset


def earth_movers_distance(a: Tensor, b: Tensor, cost: Tensor) -> float:
    """Return the least cost of moving weights `[m]` to weights `[n]`, which sum alike, at `cost` `[m, n]` a unit.

    Successive shortest paths: exact, for sketches of some ten points.
    """
    supply, demand, cost = a.double().clone(), b.double().clone(), cost.double()
    flow, tiny = torch.zeros_like(cost), 1e-12 * float(a.sum())
    while supply.max() > tiny and demand.max() > tiny:
        reach = torch.where(supply > tiny, 0.0, torch.inf).double()
        back = torch.full((len(a),), -1)  # of each source, the sink from which it is reached
        arrive, source = torch.full((len(b),), torch.inf).double(), torch.full((len(b),), -1)
        while True:
            via, chosen = (reach[:, None] + cost).min(dim=0)
            shorter = via < arrive - 1e-12  # of equal ways the first found stays: two might lead to each other
            arrive, source = torch.where(shorter, via, arrive), torch.where(shorter, chosen, source)
            returned = torch.where(flow > tiny, arrive - cost, torch.inf)
            nearer, sink = returned.min(dim=1)
            better = nearer < reach - 1e-12
            if not better.any():
                break
            reach, back = torch.where(better, nearer, reach), torch.where(better, sink, back)
        end = int(torch.where(demand > tiny, arrive, torch.inf).argmin())
        path, j = list[tuple[int, int]](), end
        moved = float(demand[end])
        while True:
            i = int(source[j])
            path.append((i, j))
            if (before := int(back[i])) < 0:
                moved = min(moved, float(supply[i]))
                break
            moved = min(moved, float(flow[i, before]))
            j = before
        for n, (i, j) in enumerate(path):
            flow[i, j] += moved
            if n + 1 < len(path):
                flow[i, path[n + 1][1]] -= moved
        supply[path[-1][0]] -= moved
        demand[end] -= moved
    return float((flow * cost).sum())


def distance(one: Tensor, other: Tensor, space: Space, config: SketchConfig) -> float:
    """Return the earth mover's distance between two sketches, in public standard deviations."""
    (a, here), (b, there) = (points_of(each, space, config) for each in (one, other))
    return earth_movers_distance(a, b, torch.cdist(here, there))


@dataclass(frozen=True)
class Distances:
    """What the sites' sketches say; NaN for a site that sent none."""

    between: Tensor  # D_ij [K, K]
    outside: Tensor  # D_i [K]

    def groups(self, near: float) -> list[list[int]]:
        """Return who averages with whom: chains of sites of which each is `near` the next; the absent are in none."""
        left = [k for k in range(len(self.outside)) if not self.outside[k].isnan()]
        found = []
        while left:
            group = [left.pop(0)]
            for i in group:
                joined = [j for j in left if self.between[i, j] <= near]
                group += joined
                left = [j for j in left if j not in joined]
            found.append(sorted(group))
        return found

    def kept(self, far: float) -> Tensor:
        """Return which sites are asked, `[K]`: those within `far` of what is asked, and those that sent no sketch.

        Where that would leave none, all are kept.
        """
        kept = ~(self.outside > far)
        return kept if kept.any() else torch.ones_like(kept)


class LocalSketch:
    """A site's half.

    Args:
        encoder: the frozen encoder, the same public checkpoint at every site.
        pairs: the site's private pairs. Those about the same images and prompt are of one question, whatever their
            `question_id`s say.
        config: settings, the same as the server's.
        key: of the noise, `accord.rewards.noise.new_key()`: no two sketches may share one.
    """

    def __init__(self, encoder: Encoder, pairs: Sequence[PreferencePair], config: SketchConfig, key: bytes) -> None:
        self.encoder, self.config, self.noise = encoder, config, SecretNoise(key)
        identify = image_identity()
        by_question: dict[str, list[PreferencePair]] = {}
        for pair in pairs:
            by_question.setdefault(digest_of(pair, identify), []).append(pair)
        self.pairs = [random.Random(digest).choice(own) for digest, own in by_question.items()]
        self.told: UpdateReply | None = None

    def __call__(self, request: UpdateRequest, /) -> UpdateReply:
        """Return the sketch as the change; asked again, the same: new noise would spend more privacy.

        The number of examples, which would tell n without noise, is 1.

        Raises:
            CheckpointError: the request has no such space.
        """
        if self.told is None:
            d, m, p = self.encoder.features, self.config.components, self.config.dimensions
            sizes = {"mean": (d,), "axes": (p, d), "centre": (m, p)}
            shapes = {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}
            sent = read_weights(request.weights, shapes, what="a request for sketches")
            space = Space(**sent)
            told = {"chosen": sketch_of(answer_states(self.encoder, self.pairs), space, self.config, self.noise)}
            self.told = UpdateReply(request.id, to_bytes(told), 1, 0.0)
        return self.told


def answer_states(encoder: Encoder, pairs: Sequence[PreferencePair], *, at_once: int = 128) -> Tensor:
    """Return the last states of prompts with chosen answers, `[n, D]`."""
    parts = []
    for start in range(0, len(pairs), at_once):
        chunk = pairs[start : start + at_once]
        images = [load_images(pair.images) for pair in chunk]
        parts.append(last_states(*encoder([pair.prompt for pair in chunk], images, [[p.chosen] for p in chunk])))
    return torch.cat(parts)


def collect_distances(engine: Engine, space: Space, config: SketchConfig) -> Distances:
    """Ask every site for its sketch, once, and compare them.

    Raises:
        RunError: no site answered.
    """
    m, p = space.centre.shape
    blank = torch.zeros(m, 1 + p, dtype=torch.float64)
    start = {"chosen": blank}
    sent = to_bytes(vars(space))
    requests = {site: UpdateRequest(f"sketch-{site}", "means", 0, sent, 0) for site in engine.sites}

    def check(request: UpdateRequest, reply: Reply) -> Tensor:
        _, told = check_update(request, reply, start)
        if told["chosen"][:, 0].max() <= 0:
            raise ReplyError("a sketch that counts nothing: its largest count is not above 0")
        return told["chosen"]

    found = ask_checked(engine, requests, check, what="a sketch", consequence="it averages with nobody")
    if not found:
        raise RunError("no site sent its sketch; check the sites' logs and start again with --resume")
    count = len(engine.sites)
    between, outside = torch.full((count, count), torch.nan), torch.full((count,), torch.nan)
    for i, one in enumerate(engine.sites):
        if one in found:
            weights, points = points_of(found[one], space, config)
            outside[i] = float((weights * torch.cdist(points, space.centre).amin(dim=1)).sum())
            for j, other in enumerate(engine.sites):
                if other in found:
                    between[i, j] = distance(found[one], found[other], space, config)
    return Distances(between, outside)


def save_distances(path: Path, distances: Distances) -> None:
    """Write the arrays to the file `path`, as safetensors."""
    save_arrays(path, vars(distances))


def load_distances(path: Path) -> Distances:
    """Read what `save_distances` wrote.

    Raises:
        CheckpointError: the file is absent, damaged or of another kind.
    """
    return load_arrays(path, Distances, "distances")
