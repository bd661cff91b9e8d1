"""Fed-CMP: weigh sites by how reliable their updates are, and smooth the directions of the weights over the rounds.

    d_k   = mean_i ‖x̄_img,i − x̄_txt,i‖₂                              measured at the site, `Update.distance`
    w_k   = ‖W_k − W_{r−1}‖₂ exp(−α d_k) / Σ_j (the same of j)       reliability of site k
    CRA   [W_1 … W_K] = U S [V_1; …; V_K]ᵀ,  V_f = Σ_k w_k V_k       one basis for all sites, thin SVD
    OPM   M = β U_{r−1} + (1 − β) Û = P Λ Qᵀ,  U_r = P Qᵀ,  S_r = β S_{r−1} + (1 − β) Ŝ
          Û and Ŝ: this round's U and S, aligned with U_{r−1};  round 1: U_1 = Û, S_1 = Ŝ
          β = β_min + (β_max − β_min) (1 − λ CosDis),  CosDis = 1 − mean_i ⟨u_i, û_i⟩       Eq. 8 as printed
    W_r   = U_r S_r V_fᵀ

Source: Xiong et al. 2026, arXiv 2603.26786, Algorithm 1. W is I × O in the paper and O × I in an `nn.Linear`, so each
matrix is transposed. Merging by TIES in the common basis: KnOTS, Stoica et al. 2024, arXiv 2410.19735.

What follows from the equations, and holds here:

- CRA without OPM is the weighted average: U S (Σ_k w_k V_k)ᵀ = Σ_k w_k W_k. Only `rank` and `density` change that.
- OPM does not reconstruct: U_r and S_r are smoothed and V_f is this round's, so W_r lags behind the average. Every
  round's `Diagnosis` has the lag.
- A site gains weight by moving far. `cap` limits a w_k, `Aggregation.bound` the length of an update. An opposite of
  weight c that is b times as long as the others' updates turns their average round unless c (1 + b) < 1: of five sites
  a cap needs a bound below the default of 5. "cra-capped" caps at ¼, above what an honest site of five has got; take it
  with bound = 2.

Differs, or is open in the paper:

- When a column of U flips, that of V must, or U S Vᵀ is another matrix; Algorithm 1 flips U alone.
- Eq. 8 smooths less under a sudden change and the text says more: `formula`. Where λ stands cannot be read; it
  multiplies CosDis here.
- Columns are matched by index in the paper. `matching` can also assign them one to one (Hungarian), or rotate the whole
  basis (Procrustes); S is then no longer diagonal, so it is kept as a matrix.
- ‖·‖₂ is spectral or Frobenius. It and d_k are of the whole projector; its spectral norm is the largest of its
  parameters', as of a block diagonal matrix. Each matrix has its own SVD. Biases take the average with w_k.
- The SVD is of weights in the text, and called ΔW: `stacked` offers updates, too.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, TypedDict

import torch
from torch import Tensor

from accord.errors import DataWarning, RecipeError, RunError, check_least

if TYPE_CHECKING:
    from accord.federation.aggregation import Update, Weights

Norm: TypeAlias = Literal["spectral", "frobenius"]
Matching: TypeAlias = Literal["index", "hungarian", "procrustes"]
Variant: TypeAlias = Literal[
    "cra",
    "cra-relative",
    "cra-capped",
    "fed-cmp",
    "fed-cmp-relative",
    "fed-cmp-updates",
    "fed-cmp-frobenius",
    "fed-cmp-prose",
    "fed-cmp-fixed",
    "fed-cmp-late",
    "fed-cmp-hungarian",
    "fed-cmp-procrustes",
    "fed-cmp-rank",
    "fed-cmp-ties",
    "magnitude",
    "quality",
]


@dataclass(frozen=True)
class Reliability:
    """The switches of Fed-CMP; the defaults are the paper as printed."""

    weights: Literal["reliability", "magnitude", "quality", "standard"] = "reliability"  # w_k: both, ‖·‖, exp, n_k / n
    alpha: float = 1.0  # α
    distances: Literal["raw", "relative"] = "raw"  # relative: d_k divided by its mean over the sites
    norm: Norm = "spectral"
    cap: float = 0.0  # the largest w_k; 0 for no limit
    stacked: Literal["weights", "updates"] = "weights"  # what the SVD is of: W_k, or W_k − W_{r−1}
    rank: int = 0  # singular values kept; 0 for all
    density: float = 0.0  # share of the entries of S V_kᵀ that TIES keeps; 0 for the sum Σ_k w_k V_k
    momentum: Literal["adaptive", "fixed", "none"] = "adaptive"  # β by Eq. 8, `beta`, or no OPM
    momentum_from: int = 2  # the first round with OPM, from 1
    formula: Literal["printed", "prose"] = "printed"  # Eq. 8 with 1 − λ CosDis, or with λ CosDis
    beta: float = 0.5  # β of fixed momentum
    beta_min: float = 0.5
    beta_max: float = 0.9
    sensitivity: float = 1.0  # λ
    matching: Matching = "index"

    def __post_init__(self) -> None:
        """Refuse shares outside their range."""
        check_least(self, alpha=0, cap=0, rank=0, density=0, momentum_from=2, sensitivity=0)
        check_least(self, beta=0, beta_min=0, beta_max=self.beta_min)
        for name in ("cap", "density", "beta", "beta_max"):
            if getattr(self, name) > 1:
                raise RecipeError(f"{name} must be at most 1, got {getattr(self, name)}; lower it")

    @property
    def averages(self) -> bool:
        """Whether W_r is Σ_k w_k W_k, and needs no SVD: CRA without OPM, truncation and TIES."""
        return self.momentum == "none" and not self.rank and not self.density


VARIANTS: Final[Mapping[str, Reliability]] = MappingProxyType(
    {
        "cra": Reliability(momentum="none"),
        "cra-relative": Reliability(momentum="none", distances="relative"),
        "cra-capped": Reliability(momentum="none", distances="relative", cap=0.25),
        "magnitude": Reliability(momentum="none", weights="magnitude"),
        "quality": Reliability(momentum="none", weights="quality"),
        "fed-cmp": Reliability(),
        "fed-cmp-relative": Reliability(distances="relative"),
        "fed-cmp-updates": Reliability(stacked="updates"),
        "fed-cmp-frobenius": Reliability(norm="frobenius"),
        "fed-cmp-prose": Reliability(formula="prose"),
        "fed-cmp-fixed": Reliability(momentum="fixed"),
        "fed-cmp-late": Reliability(momentum_from=6),
        "fed-cmp-hungarian": Reliability(matching="hungarian"),
        "fed-cmp-procrustes": Reliability(matching="procrustes"),
        # On updates: of the weights themselves these would cut away what the projector began from.
        "fed-cmp-rank": Reliability(stacked="updates", rank=16),
        "fed-cmp-ties": Reliability(stacked="updates", density=0.2),
    }
)


class Diagnosis(TypedDict):
    """What a round was like: of the whole projector, and by parameter where OPM was applied."""

    weights: list[float]  # w_k, in the order of the updates; 0 of one that was left out
    beta: dict[str, float]
    cosine: dict[str, float]  # mean of ⟨u_i, û_i⟩ after alignment
    lag: float  # ‖W_r − Σ_k w_k W_k‖ / ‖Σ_k w_k W_k‖, Frobenius


def magnitude(change: Weights, norm: Norm) -> float:
    """Return ‖W_k − W_{r−1}‖ of a whole update: Frobenius, or the largest spectral norm of its parameters."""
    parts = [part.double().flatten(1) if part.ndim > 1 else part.double().flatten() for part in change.values()]
    if norm == "frobenius":
        return math.sqrt(sum(part.square().sum().item() for part in parts))
    return max(float(torch.linalg.norm(part, 2)) for part in parts)  # of a vector its length


def site_weights(magnitudes: Tensor, distances: Tensor, alpha: float = 1.0, *, relative: bool = False) -> Tensor:
    """Return w_k ∝ ‖W_k − W_{r−1}‖ exp(−α d_k), `[K]`, float64; equal where no site moved.

    Args:
        magnitudes: ‖W_k − W_{r−1}‖ `[K]`; ones for quality alone.
        distances: d_k `[K]`, at least 0.
        alpha: 0 for magnitude alone.
        relative: divide d_k by its mean over the sites first, which makes α independent of the model's scale.
    """
    d = distances.double().clamp(1e-100, 1e100)  # a site may send any number: no sum or product may overflow
    if relative:
        d = d / d.mean()
    # exp(−α d_k) of distances such as 1000 would be 0 for all.
    return (magnitudes.double().log() - alpha * d).softmax(0) if magnitudes.any() else torch.ones_like(d) / len(d)


def capped(weights: Tensor, cap: float) -> Tensor:
    """Return w `[K]` with no entry above `cap`, or 1/K if that is more; the others share the rest in proportion."""
    cap, full = max(cap, 1 / len(weights)), torch.zeros_like(weights, dtype=torch.bool)
    while (weights > cap + 1e-12).any():
        full |= weights >= cap
        others = weights[~full] if weights[~full].any() else torch.ones_like(weights[~full])
        weights = torch.full_like(weights, cap).masked_scatter(~full, (1 - cap * full.sum()) * others / others.sum())
    return weights


def stacked_svd(matrices: Sequence[Tensor], rank: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return U `[I, p]`, S `[p]` and V `[K, O, p]` of [W_1 … W_K] = U S [V_1; …; V_K]ᵀ, each W_k `[I, O]`.

    p = min(I, K O), or `rank` if that is above 0 and less. (Fed-CMP, CRA.)
    """
    u, s, vt = torch.linalg.svd(torch.cat(list(matrices), dim=1), full_matrices=False)
    kept = min(rank or len(s), len(s))
    return u[:, :kept], s[:kept], vt[:kept].view(kept, len(matrices), -1).permute(1, 2, 0)


def fused(singular: Tensor, v: Tensor, weights: Tensor, density: float = 0.0) -> Tensor:
    """Return V_f = Σ_k w_k V_k, `[O, p]`, from S `[p]`, V `[K, O, p]` and w `[K]`.

    With `density` above 0, V_f S is what TIES merges of the V_k S (KnOTS), of which it keeps that share.
    """
    if not density:
        return torch.einsum("k,kop->op", weights, v)
    from accord.federation.aggregation import ties  # which imports this module for its settings

    merged = ties([{"": each * singular} for each in v], weights.tolist(), density)[""]
    return torch.where(singular > 0, merged / singular.clamp(min=torch.finfo(singular.dtype).tiny), 0.0)


def rotation(previous: Tensor, basis: Tensor, matching: Matching = "index") -> Tensor:
    """Return the orthogonal R `[p, p]` that aligns a basis with the previous one, both `[I, p]`: U R against U_{r−1}.

        index       diag(sign⟨u_i, û_i⟩)
        hungarian   the permutation with the largest Σ_i |⟨u_i, û_π(i)⟩|, and the signs
        procrustes  argmin_R ‖U R − U_{r−1}‖, the polar factor of Uᵀ U_{r−1}

    U S Vᵀ = (U R) (Rᵀ S R) (V R)ᵀ: S and V must turn with U. V_f turns as the V_k do, and may be formed before.
    """
    overlap = basis.T @ previous
    if matching == "procrustes":
        return polar(overlap)
    order = torch.arange(len(overlap))
    if matching == "hungarian":
        from scipy.optimize import linear_sum_assignment

        order = torch.from_numpy(linear_sum_assignment(overlap.abs().T.numpy(), maximize=True)[1])
    turn = torch.zeros_like(overlap)
    columns = torch.arange(len(order))
    turn[order, columns] = torch.where(overlap[order, columns] < 0, -1.0, 1.0).to(turn.dtype)
    return turn


def polar(matrix: Tensor) -> Tensor:
    """Return P Qᵀ of M = P Λ Qᵀ `[I, p]`, I ≥ p: the matrix with orthonormal columns that is nearest to M."""
    p, _, qt = torch.linalg.svd(matrix, full_matrices=False)
    return torch.matmul(p, qt)


def smoothing(cosine: float, settings: Reliability) -> float:
    """Return β by Eq. 8, from the mean cosine of aligned columns, or the fixed one; λ CosDis counts as 1 at most."""
    if settings.momentum == "fixed":
        return settings.beta
    drift = min(1.0, settings.sensitivity * max(0.0, 1 - cosine))
    share = drift if settings.formula == "prose" else 1 - drift
    return settings.beta_min + (settings.beta_max - settings.beta_min) * share


class FedCmp:
    """The rule of one training: CRA and OPM with any `Reliability`, and the previous basis of every matrix.

    A basis starts anew when it changes its size, as it may when a site is absent and K O < I.

    Attributes:
        diagnostics: what every round so far was like.
    """

    def __init__(self, settings: Reliability, eta: float = 1.0) -> None:
        if settings.matching == "hungarian" and find_spec("scipy") is None:
            raise RecipeError(
                'matching = "hungarian" needs SciPy; install it with `pip install scipy`, or take "procrustes"'
            )
        self.settings, self.eta = settings, eta
        self.bases: dict[str, tuple[Tensor, Tensor]] = {}  # U_{r−1} [I, p] and S_{r−1} [p, p]
        self.diagnostics: list[Diagnosis] = []

    def __call__(self, previous: Weights, updates: Sequence[Update], weights: Sequence[float], /) -> dict[str, Tensor]:
        """Return W_{r−1} + η (W_r − W_{r−1}); an update without a distance is left out where the weights need one.

        Raises:
            RunError: they need distances, and no update has one.
        """
        used, w = self._weigh(updates, torch.tensor(weights, dtype=torch.float64))
        given = dict(zip(used, w.tolist(), strict=True))
        told = Diagnosis(weights=[given.get(k, 0.0) for k in range(len(updates))], beta={}, cosine={}, lag=0.0)
        updates = [updates[k] for k in used]
        merged, squared, size = {}, 0.0, 0.0
        for name, tensor in previous.items():
            before, changes = tensor.double(), torch.stack([update.change[name].double() for update in updates])
            average = before + torch.einsum("k,k...->...", w, changes)
            plain = before.ndim < 2 or self.settings.averages
            result = average if plain else self._merged(name, before, changes, w, told)
            merged[name] = (before + self.eta * (result - before)).to(tensor.dtype)
            squared += (result - average).square().sum().item()
            size += average.square().sum().item()
        told["lag"] = (squared / size) ** 0.5 if size else 0.0
        self.diagnostics.append(told)
        return merged

    def _weigh(self, updates: Sequence[Update], shares: Tensor) -> tuple[Sequence[int], Tensor]:
        """Return which updates can be used, by their places, and their w_k."""
        kind, kept = self.settings.weights, list(range(len(updates)))
        if kind in ("reliability", "quality"):
            kept = [k for k, update in enumerate(updates) if update.distance is not None]
            if not kept:
                raise RunError(
                    f'no update came with a distance, which weights = "{kind}" needs; train a task whose sites measure '
                    'it, or choose the rule "magnitude", or weights = "standard"'
                )
            if len(kept) < len(updates):
                missing = f"{len(updates) - len(kept)} of {len(updates)} updates came without a distance"
                warnings.warn(f"{missing} and are left out of the round", DataWarning, stacklevel=3)
            updates = [updates[k] for k in kept]
        if kind == "standard":
            w = shares
        else:
            lengths = [1.0 if kind == "quality" else magnitude(u.change, self.settings.norm) for u in updates]
            distances = [0.0 if kind == "magnitude" else u.distance or 0.0 for u in updates]
            w = site_weights(
                torch.tensor(lengths, dtype=torch.float64),
                torch.tensor(distances, dtype=torch.float64),
                self.settings.alpha,
                relative=self.settings.distances == "relative",
            )
        return kept, capped(w, self.settings.cap) if self.settings.cap else w

    def _merged(self, name: str, before: Tensor, changes: Tensor, w: Tensor, told: Diagnosis) -> Tensor:
        """Return W_r of one parameter, `[O, …]`, from W_{r−1} and all W_k − W_{r−1} `[K, O, …]`."""
        settings = self.settings
        origin = before if settings.stacked == "updates" else torch.zeros_like(before)
        matrices = [(before - origin + change).flatten(1).T for change in changes]  # [I, O]
        u, s, v = stacked_svd(matrices, settings.rank)
        v_f, core = fused(s, v, w, settings.density), s.diag()
        if settings.momentum != "none":
            past = self.bases.get(name)
            if past is not None and past[0].shape == u.shape and len(self.diagnostics) + 1 >= settings.momentum_from:
                turn = rotation(past[0], u, settings.matching)
                u, core, v_f = u @ turn, turn.T @ core @ turn, v_f @ turn
                told["cosine"][name] = cosine = (past[0] * u).sum(0).mean().item()
                told["beta"][name] = beta = smoothing(cosine, settings)
                u, core = polar(beta * past[0] + (1 - beta) * u), beta * past[1] + (1 - beta) * core
            self.bases[name] = u, core
        return origin + (u @ core @ v_f.T).T.reshape(before.shape)
