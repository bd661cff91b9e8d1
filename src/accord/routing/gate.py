"""Learn from a few public anchor pairs (`accord.routing.anchors`) which site to believe; `accord.routing.gated` routes.

    preference    α = softmax(g(f(x))),       L = -log σ(Σ_k α_k (R̄_k(x, y⁺) - R̄_k(x, y⁻)))          ArmoRM's gate
    correctness   α = softmax(h(x, y) · E_k), L = BCE(σ(h · E_k), 1[R̄_k(x, y⁺) > R̄_k(x, y⁻)])        BayesianRouter
    anchored      α = softmax_k(a z_k(x) + b_k + w_k · f(x)),
                  L = -log σ(Σ_k α_k (R̄_k(x, y⁺) - R̄_k(x, y⁻))) + λ ((a - 1)² + |b|² + |w|²)          ours, beside MoR

f and h are the frozen encoder's last states at the ends of (image, prompt) and of (image, prompt, answer), z the log
weights of the client-id router, averaged over the answers to a prompt so that one scale judges them all. The first is
Wang et al. 2024, arXiv 2406.12845; the second the offline stage of BayesianRouter, arXiv 2510.02850. The anchored
router is a method of this library and of no paper. The client-id router knows domains: it does not tell a good site
from a careless one of the same domain, and outside all domains its answer is arbitrary. There the anchors decide; the
quadratic pull, whose strength λ the anchors choose by cross-validation, leaves it as it is where they say nothing.

Bradley-Terry looks at margins and not at ranks alone: of two sites that are right alike it prefers the one with the
larger gaps, and where all are noise it averages them. Scores that a site clipped to one value have no gap and teach
nothing.

Every head starts symmetric in the sites and trains on all anchors at once in float64: sites in another order get the
same weights. A site that no anchor was scored by gets weight 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, gelu, logsigmoid

from accord.errors import DataError, RecipeError, check_least
from accord.routing.anchors import Anchors

Kind: TypeAlias = Literal["preference", "correctness", "anchored"]

FLOOR = 0.01
"""Share of uniform weights under the client-id router's: from a weight of exactly 0 no anchor could raise a site."""


@dataclass(frozen=True)
class GateConfig:
    """How the preference gate and the correctness router are trained."""

    hidden: int = 64  # of the preference gate; the correctness router is linear
    steps: int = 300  # of AdamW, each on all anchors
    learning_rate: float = 1e-2
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        """Refuse counts that leave nothing to train."""
        check_least(self, hidden=1, steps=1, learning_rate=0, weight_decay=0)


@dataclass(frozen=True)
class AnchoredConfig:
    """How the anchored router is trained."""

    strengths: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 10.0)  # λ to choose from
    folds: int = 5

    def __post_init__(self) -> None:
        """Refuse an empty choice, a pull that is none, and a single fold."""
        if not self.strengths or not all(0 < strength < float("inf") for strength in self.strengths):
            raise RecipeError(f"strengths must be numbers above 0, got {self.strengths}; correct them")
        check_least(self, folds=2)


@dataclass(frozen=True)
class GateShape:
    """Which head it is, and its sizes."""

    kind: Kind
    features: int  # D
    sites: int  # K
    hidden: int = 0  # 0 for a linear head

    def __post_init__(self) -> None:
        """Refuse sizes that no head has."""
        check_least(self, features=1, sites=1, hidden=0)


class GateNetwork(nn.Module):
    """A head on frozen features `[N, D]` → logits `[N, K]`: standardise, a hidden layer if any, a linear layer.

    Its last layer starts at zero and the trust `a` in a prior's logits at 1: untrained, it is the prior, or uniform.
    """

    mean: Tensor  # [D]
    scale: Tensor  # [D]
    seen: Tensor  # [K], sites that scored an anchor

    def __init__(self, shape: GateShape) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("mean", torch.zeros(shape.features))
        self.register_buffer("scale", torch.ones(shape.features))
        self.register_buffer("seen", torch.ones(shape.sites, dtype=torch.bool))
        self.enter = nn.Linear(shape.features, shape.hidden) if shape.hidden else None
        self.out = nn.Linear(shape.hidden or shape.features, shape.sites)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.trust = nn.Parameter(torch.ones(()), requires_grad=shape.kind == "anchored")

    def forward(self, features: Tensor, prior: Tensor | None = None) -> Tensor:
        """Return logits `[N, K]` for features `[N, D]` and, for the anchored router, the prior's `[N, K]`."""
        x = (features - self.mean) / self.scale
        logits: Tensor = self.out(x if self.enter is None else gelu(self.enter(x)))
        if prior is not None:
            logits = self.trust * prior + logits
        return logits.masked_fill(~self.seen, -torch.inf)

    def standardise(self, features: Tensor) -> None:
        """Let each of the D features have mean 0 and deviation 1 over `features` `[N, D]`; a constant one is centred.

        Under the anchored router's quadratic pull a feature vector has length 1 instead: λ then means the same for
        every encoder.
        """
        deviation = features.std(dim=0, correction=0)
        norm = self.shape.features**0.5 if self.shape.kind == "anchored" else 1.0
        self.mean.copy_(features.mean(dim=0))
        self.scale.copy_(torch.where(deviation > 1e-6, deviation, 1.0) * norm)


def preference_loss(logits: Tensor, gaps: Tensor) -> Tensor:
    """Return the mean over pairs of `-log σ(Σ_k α_k gap_k)`, α = softmax(logits) over the sites that scored the pair.

    Args:
        logits: `[N, K]`.
        gaps: `R̄_k(x, y⁺) - R̄_k(x, y⁻)`, `[N, K]`; NaN where a site is absent, for no pair at all sites.
    """
    there = ~gaps.isnan()
    weights = logits.masked_fill(~there, -torch.inf).softmax(dim=-1)
    return -logsigmoid((weights * gaps.nan_to_num(0.0)).sum(dim=-1)).mean()


def fit_preference_gate(anchors: Anchors, config: GateConfig, *, seed: int) -> GateNetwork:
    """Train a gate on prompts by the preferences themselves: L = -log σ(Σ_k α_k(x) (R̄_k(x, y⁺) - R̄_k(x, y⁻))).

    Source: Wang et al. 2024, arXiv 2406.12845. Differs: one hidden layer and no temperature for its three layers and
    T = 10, since a federation has hundreds of public pairs and not a million; sites stand where its objectives stood.

    Raises:
        DataError: no site scored both answers of an anchor.
    """
    anchors = _scored(anchors)
    features = anchors.prompts.double()
    network = _start("preference", features, _seen(anchors), config.hidden, seed)
    gaps = _gaps(anchors)
    return _descend(network, config, lambda: preference_loss(network(features), gaps))


def fit_correctness(anchors: Anchors, config: GateConfig) -> GateNetwork:
    """Learn per site whether its reward model ranks a pair right: BCE of σ(h · E_k) and 1[R̄_k(y⁺) > R̄_k(y⁻)].

    Source: BayesianRouter, arXiv 2510.02850, offline stage. Differs: it embeds the pair, and a completion stands alone
    when it is routed; here both answers of a pair get its label, as in MoR's loss. The encoder stays frozen.

    Raises:
        DataError: no site scored both answers of an anchor.
    """
    anchors = _scored(anchors)
    features = anchors.answers.double().flatten(0, 1)  # [2N, D]
    network = _start("correctness", features, _seen(anchors))
    gaps = _gaps(anchors).repeat_interleave(2, dim=0)
    known = ~gaps.isnan()
    right = (gaps[known] > 0).double()
    return _descend(network, config, lambda: binary_cross_entropy_with_logits(network(features)[known], right))


def fit_anchored(anchors: Anchors, config: AnchoredConfig) -> GateNetwork:
    """Correct the client-id router by anchors, as far as these agree with each other on held-out questions.

    λ is the strength with the lowest held-out loss over `config.folds` folds of the anchors' questions, the strongest
    of equal ones. The loss is the module's, minimised by L-BFGS.

    Raises:
        DataError: no site scored both answers of an anchor, or there are no logits of a client-id router.
    """
    anchors = _scored(anchors)
    seen = _seen(anchors)
    _, question = anchors.questions.unique(return_inverse=True)
    dealt = torch.randperm(int(question.max()) + 1, generator=torch.Generator().manual_seed(0)) % config.folds
    fold = dealt[question]  # drawn, since types often follow each other in turn
    folds = [fold == held for held in fold.unique().tolist() if (fold != held).any()]

    def held_out(strength: float) -> float:
        losses = [_anchored_loss(_pulled(anchors.take(~fold), seen, strength), anchors.take(fold)) for fold in folds]
        return sum(loss.item() * int(fold.sum()) for loss, fold in zip(losses, folds, strict=True))

    return _pulled(anchors, seen, min(sorted(config.strengths, reverse=True), key=held_out)).float()


def _pulled(anchors: Anchors, seen: Tensor, strength: float) -> GateNetwork:
    network = _start("anchored", anchors.prompts.double(), seen)
    optimiser = torch.optim.LBFGS(network.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        pull = (network.trust - 1).square() + network.out.weight.square().sum() + network.out.bias.square().sum()
        loss = _anchored_loss(network, anchors) + strength * pull
        loss.backward()
        return loss

    optimiser.step(closure)
    return network.eval()


def _anchored_loss(network: GateNetwork, anchors: Anchors) -> Tensor:
    logits = network(anchors.prompts.double(), anchored_prior(anchors).double())
    return preference_loss(logits, _gaps(anchors))


def _scored(anchors: Anchors) -> Anchors:
    """Return the pairs of which a site scored both answers."""
    some = ~_gaps(anchors).isnan().all(dim=-1)
    if not some.any():
        raise DataError(f"no site scored both answers of one of the {len(some)} anchors; check the sites' logs")
    return anchors.take(some)


def _seen(anchors: Anchors) -> Tensor:
    return ~_gaps(anchors).isnan().all(dim=0)


def _gaps(anchors: Anchors) -> Tensor:
    """Return `R̄_k(x, y⁺) - R̄_k(x, y⁻)`, `[N, K]` in float64, NaN where the site lacks either."""
    scores = anchors.scores.double()
    return scores[:, 0] - scores[:, 1]


def _start(kind: Kind, features: Tensor, seen: Tensor, hidden: int = 0, seed: int = 0) -> GateNetwork:
    """Return an untrained head in float64 that standardises by `features` `[N, D]`; only a hidden layer is drawn."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        network = GateNetwork(GateShape(kind, features.shape[-1], len(seen), hidden)).double()
    network.standardise(features)
    network.seen.copy_(seen)
    return network


def _descend(network: GateNetwork, config: GateConfig, loss: Callable[[], Tensor]) -> GateNetwork:
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
    for _ in range(config.steps):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
    return network.float().eval()


@torch.no_grad()
def preference_weights(network: GateNetwork, anchors: Anchors) -> Tensor:
    """Return the preference gate's weights for the two answers of every pair, `[N, 2, K]`."""
    return cast(Tensor, network(anchors.prompts)).softmax(dim=-1)[:, None].repeat(1, 2, 1)


@torch.no_grad()
def correctness_weights(network: GateNetwork, anchors: Anchors) -> Tensor:
    """Return the correctness router's weights for the two answers of every pair, `[N, 2, K]`."""
    return cast(Tensor, network(anchors.answers)).softmax(dim=-1)


@torch.no_grad()
def anchored_weights(network: GateNetwork, anchors: Anchors) -> Tensor:
    """Return the anchored router's weights for the two answers of every pair, `[N, 2, K]`."""
    logits: Tensor = network(anchors.prompts, anchored_prior(anchors))
    return logits.softmax(dim=-1)[:, None].repeat(1, 2, 1)


def anchored_prior(anchors: Anchors) -> Tensor:
    """Return z(x) of every pair, `[N, K]`.

    Raises:
        DataError: the anchors hold no logits.
    """
    if anchors.logits is None:
        raise DataError("the anchors hold no logits of a client-id router; collect them with its network")
    return log_weights(anchors.logits).mean(dim=1)


def log_weights(logits: Tensor) -> Tensor:
    """Return `log((1 - ε) softmax(z) + ε / K)` of the client-id router's logits z `[…, K]`, ε = `FLOOR`."""
    return ((1 - FLOOR) * logits.softmax(dim=-1) + FLOOR / logits.shape[-1]).log()
