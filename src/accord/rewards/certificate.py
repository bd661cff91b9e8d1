"""The guarantee that a reward model carries, as a site's card and the report state it."""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeAlias

import msgspec

Unit: TypeAlias = Literal["pair", "question", "person", "label"]
"""What the guarantee protects as a whole; of a label, which of two answers was preferred, all else is unprotected."""

Way: TypeAlias = Literal["head", "adapter", "labels"]
"""DP-SGD on a linear head over frozen features, DP-SGD on an adapter and the head, or randomised response on labels."""

Uncovered: TypeAlias = Literal[
    "counts",
    "making",
    "shared training",
    "other training",
    "gates",
    "answers",
    "other runs",
    "settings",
    "inputs",
    "backbone",
]

UNCOVERED: Final[dict[Uncovered, str]] = {
    "counts": "the numbers of its questions, pairs and units",
    "making": "how its pairs were made of its questions: a wrong answer may be the right one to another question, and "
    "two answers may show by themselves which is the right one",
    "shared training": "what it sends where it trains a router, a projector, an adapter, a selector or a shared reward "
    "model, and what the methods pooled and local train on its data as they are",
    "other training": "what it sends where it trains a projector, an adapter, a selector or a shared reward model, and "
    "what the methods pooled and local train on its data as they are; the router's updates are covered",
    "gates": "exact counts, sums and quantiles of its prompts, which the methods means, means-abstain, routed-abstain, "
    "density, density-abstain, density-average and routed-average ask for",
    "answers": "answers of its own model, and reference answers that it owns",
    "other runs": "other runs on the same data: the ledger is of this run alone; name one in privacy.ledger",
    "settings": "a choice of the settings, or of the seed, by what the model did",
    "inputs": "its images, prompts and answers: nothing is protected but which of two answers was preferred",
    "backbone": "what its backbone, a folder of the site's, was trained on before: it may have been the same data",
}
"""What may touch a site's private data, and its certificate says nothing about."""


NonNegative: TypeAlias = Annotated[float, msgspec.Meta(ge=0)]
Positive: TypeAlias = Annotated[float, msgspec.Meta(gt=0)]


class Certificate(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The guarantee that a reward model carries: (ε, δ)-differential privacy of its unit, by zeroing out.

    Of labels, ε without δ where one of them is exchanged. It covers the weights, the standardisation, and hence every
    score. With `router_steps` it covers that many steps of a router, too, with the same sampling and clip.
    """

    id: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]  # of the ledger's entry: random
    epsilon: Positive  # of this training
    total: Positive  # ε of everything in the ledger up to it
    delta: NonNegative
    unit: Unit
    sampling: Positive  # Poisson: each unit in a step with this probability; 1 for labels
    steps: Annotated[int, msgspec.Meta(gt=0)]
    clip: NonNegative  # 0 for labels, as the noise is
    sigma: NonNegative  # of the noise of each step, over the clip
    projection: NonNegative  # noise of the release that the features are projected by; 0 for no projection
    standardisation: NonNegative  # noise of each of the four releases that scores are standardised by
    noise: Literal["SHAKE-256"]  # what it is drawn from
    version: Annotated[str, msgspec.Meta(pattern="^[0-9A-Za-z.+-]{1,40}$")]  # of Accord
    uncovered: tuple[Uncovered, ...]
    way: Way = "head"
    flip: Annotated[float, msgspec.Meta(ge=0, lt=0.5)] = 0.0  # probability that a label was flipped; 0 for DP-SGD
    router: NonNegative = 0.0  # σ of the noise of each of a router's steps, over the clip; 0: not covered
    router_steps: Annotated[int, msgspec.Meta(ge=0)] = 0  # the most that are ever taken

    def __post_init__(self) -> None:
        """Refuse a certificate of a mechanism without noise, or of labels that says it covers more."""
        labels = self.way == "labels"
        if labels != (self.unit == "label") or (labels and "inputs" not in self.uncovered):
            raise ValueError(f"randomised response protects labels alone, got the unit {self.unit!r}")
        noises = [self.flip] if labels else [self.delta, self.clip, self.sigma, self.standardisation]
        if not all(noises):
            raise ValueError(f"a mechanism without noise, {noises}")
        if bool(self.router) != bool(self.router_steps) or (self.router_steps and "shared training" in self.uncovered):
            raise ValueError(f"{self.router_steps} steps of a router with σ = {self.router:g}, or not covered")
