"""The router goes on learning while the policy is aligned: Thompson sampling on its linear head (MoR, stage 3).

    f ∈ R^{D+1}     what the head reads of a completion, and a 1 for the bias; φ ∈ R^{K×(D+1)} is the head
    r̂_k             = σ(φ_k · f)                            or φ_k · f on the raw scale
    g_k             = ∂r̂_k/∂φ_k = r̂_k (1 − r̂_k) f           or f
    σ_k²            = λ g_kᵀ U_k⁻¹ g_k,   U_k = λ I + Σ g gᵀ over the completions for which k was chosen
    k*              = argmax_k r̃_k,   r̃_k ~ N(r̂_k, ν² σ_k²)
    L               = ½ mean (r̂_k* − r)² + (λ/2) ‖φ − φ_0‖² + κ mean KL(softmax z_0 ‖ softmax z)

Source: Lu et al. 2026, arXiv 2605.03426, "Online router update", after neural Thompson sampling (Zhang et al. 2021,
arXiv 2010.00827). Only the head learns, so that U is block-diagonal and both U and, on the raw scale, the minimiser
are exact.

Differs: the paper regresses what was trained as a logit on 0 and 1; σ of it, the default here, keeps its meaning. On
the raw scale the data and the KL term are sums, the data over all rounds, and φ is the minimiser: the ridge estimate
`φ_0,k + U_k⁻¹ Σ f (r − φ_0,k · f)`. On the sigmoid scale, where there is no closed form, each feedback takes one
gradient step on L over the completions that it is about: φ_0 is never outvoted by a long history. κ is ours, and 0 by
default. The variance is not divided by the width.

Each scale has its price. Simulated with 64 features, 3 sites, an offline router that is sure of itself, 150 completions
a round and ν = 0.1 on the raw scale: the share of right choices in rounds 181 to 200, mean of three seeds.

    the offline router was   and every round was told                             sigmoid   raw
    right everywhere         a coin                                               0.99      0.43
    wrong everywhere         of every completion, whether the choice was right    0.62      1.00
    wrong everywhere         one bit: more were right than in the round before    0.00      0.41

One bit a round is what the paper's feedback is, and 0.33 would be chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from accord.data.images import Pictures
from accord.errors import DataError, check_least, check_positive
from accord.models.encoder import Encoder
from accord.models.inputs import chunks
from accord.routing.router import RouterNetwork
from accord.types import Prompt

CURVATURE = 0.08
"""At least the second derivative of ½ (σ(z) − r)² for r in [0, 1]: s² (1 − s) (2 − 3 s) at r = 0 is at most 0.077."""


@dataclass(frozen=True)
class OnlineConfig:
    """How the router goes on learning. The paper gives no value of any of these."""

    scale: Literal["sigmoid", "raw"] = "sigmoid"
    regularisation: float = 0.1  # λ
    exploration: float = 1.0  # ν; 0 always takes the largest r̂. On the raw scale, whose g is larger, rather 0.1
    kl_to_offline: float = 0.0  # κ
    # r is one bit a step for all completions of it: counted as that many observations, it would soon end exploration
    observations: int = 64  # completions drawn to learn from one feedback, at most; U costs (D + 1)² for each
    learning_rate: float = 1.0  # on the sigmoid scale, as a share of a step that cannot overshoot

    def __post_init__(self) -> None:
        """Refuse a prior without weight, and what would never learn."""
        check_positive(self, "regularisation", "learning_rate")
        check_least(self, exploration=0, kl_to_offline=0, observations=1)


class OnlineRouter:
    """Choose one site for every completion, and learn from what became of it: a `Router`.

    Every completion that it has chosen a site for waits for the next `learn`, those of evaluations too. Beside it,
    `FederatedReward` should route by completion: with `scope="prompt"` the site that is asked is the one most chosen.

    Args:
        encoder: the frozen encoder.
        network: the offline router; it stays as it is, and its head is φ_0.
        config: settings.
        seed: of the sampling.
    """

    def __init__(
        self, encoder: Encoder, network: RouterNetwork, config: OnlineConfig | None = None, *, seed: int
    ) -> None:
        self.encoder = encoder
        self.network = network.eval().to(encoder.model.device)
        self.config = config or OnlineConfig()
        weight, bias = network.head.weight.detach(), network.head.bias.detach()
        self.offline = torch.cat([weight, bias[:, None]], dim=1).double().cpu()  # φ_0, [K, D + 1]
        self.head = self.offline.clone()  # φ
        sites, size = self.head.shape
        self.inverse = (torch.eye(size, dtype=torch.double) / self.config.regularisation).repeat(sites, 1, 1)  # U⁻¹
        self.moment = torch.zeros_like(self.head)  # Σ f (r − φ_0 · f), on the raw scale
        self.generator = torch.Generator().manual_seed(seed)
        self.picking = torch.Generator().manual_seed(seed + 1)
        self.features = self.head.new_zeros(0, size)  # of the completions that wait for feedback, [n, D + 1]
        self.arms = torch.zeros(0, dtype=torch.long)  # and the sites chosen for them, [n]

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Prompt], images: Sequence[Pictures], completions: Sequence[Sequence[str]], /
    ) -> Tensor:
        """Return one-hot weights `[N, K]`, and keep in mind what was chosen."""
        read = [
            self.network.penultimate(*self.encoder(prompts[span], images[span], completions[span])).cpu()
            for span in chunks([len(c) for c in completions], self.network.config.rows_at_once)
        ]
        features = pad(torch.cat(read).double(), (0, 1), value=1.0)
        return one_hot(self.choose(features), len(self.head)).float()

    def choose(self, features: Tensor) -> Tensor:
        """Return the sites `[N]` drawn for `features` `[N, D + 1]`, and keep both in mind."""
        means, _ = self.predict(features)
        noise = torch.randn(means.shape, generator=self.generator, dtype=means.dtype)
        arms = (means + self.config.exploration * self.deviation(features) * noise).argmax(dim=-1)
        self.features, self.arms = torch.cat([self.features, features]), torch.cat([self.arms, arms])
        return arms

    def predict(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return r̂ and its derivative by the logit, both `[N, K]`, for `features` `[N, D + 1]`."""
        logits = features @ self.head.T
        if self.config.scale == "raw":
            return logits, torch.ones_like(logits)
        means = logits.sigmoid()
        return means, means * (1 - means)

    def deviation(self, features: Tensor) -> Tensor:
        """Return σ `[N, K]` for `features` `[N, D + 1]`."""
        spread = torch.einsum("ni,kij,nj->nk", features, self.inverse, features)
        return self.predict(features)[1] * (self.config.regularisation * spread.clamp(min=0)).sqrt()

    @torch.no_grad()
    def learn(self, feedback: float | Tensor) -> None:
        """Learn from `feedback` on what was routed since the last; without any such completion, from nothing.

        Args:
            feedback: r in [0, 1], one for all n completions, or one for each `[n]` in the order of routing.

        Raises:
            DataError: it is neither, or not finite.
        """
        n = len(self.arms)
        given = torch.as_tensor(feedback, dtype=torch.double)
        if given.shape not in ((), (n,)) or not given.isfinite().all():
            raise DataError(
                f"feedback must be one finite number, or one for each of the {n} completions routed since the last, "
                f"got {given.tolist()!r:.60}; correct the signal"
            )
        if n == 0:
            return
        rows = torch.arange(n)
        if n > self.config.observations:
            # From a generator of its own: what is drawn in routing must not depend on whether there was feedback.
            rows = torch.randperm(n, generator=self.picking)[: self.config.observations].sort().values
        features, arms, rewards = self.features[rows], self.arms[rows], given.expand(n)[rows]
        _, slopes = self.predict(features)
        for gradient, k in zip(slopes.gather(1, arms[:, None]) * features, arms.tolist(), strict=True):
            self.inverse[k] = sherman_morrison(self.inverse[k], gradient)
        if self.config.scale == "raw":
            surprise = rewards - (features * self.offline[arms]).sum(dim=1)
            self.moment.index_add_(0, arms, features * surprise[:, None])
            self.head = self._ridge(features)
        else:
            self.head = self._descend(features, arms, rewards)
        self.features, self.arms = self.features.new_zeros(0, features.shape[1]), self.arms.new_zeros(0)

    def _ridge(self, features: Tensor) -> Tensor:
        """Return the minimiser of L over all rounds, the KL term over `features`."""
        exact = self.offline + torch.einsum("kij,kj->ki", self.inverse, self.moment)
        if self.config.kl_to_offline == 0:
            return exact
        precision = torch.linalg.inv(self.inverse)
        told = (features @ self.offline.T).softmax(dim=-1)
        head = exact.clone().requires_grad_()
        search = torch.optim.LBFGS(
            [head], max_iter=100, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            search.zero_grad()
            apart = head - exact
            entropy = -(told * (features @ head.T).log_softmax(dim=-1)).sum()  # the KL but for a constant
            value = 0.5 * torch.einsum("ki,kij,kj->", apart, precision, apart) + self.config.kl_to_offline * entropy
            value.backward()
            return value

        with torch.enable_grad():
            search.step(loss)
        return head.detach()

    def _descend(self, features: Tensor, arms: Tensor, rewards: Tensor) -> Tensor:
        """Return the head after a gradient step on L over `features`, by a share of 1 / (bound of its curvature)."""
        weight, kl = self.config.regularisation, self.config.kl_to_offline
        means, slopes = self.predict(features)
        chosen = one_hot(arms, len(self.head))
        by_logit = chosen * (means - rewards[:, None]) * slopes
        if kl:
            by_logit += kl * ((features @ self.head.T).softmax(dim=-1) - (features @ self.offline.T).softmax(dim=-1))
        gradient = by_logit.T @ features / len(features) + weight * (self.head - self.offline)
        steepest = (CURVATURE + kl / 2) * features.square().sum(dim=1).mean() + weight
        return self.head - self.config.learning_rate / steepest * gradient

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything a resumed run must know, copied; the loss before is the signal's to keep."""
        return {
            "head": self.head.clone(),
            "offline": self.offline.clone(),
            "inverse": self.inverse.clone(),
            "moment": self.moment.clone(),
            "generator": self.generator.get_state(),
            "picking": self.picking.get_state(),
            "features": self.features.clone(),
            "arms": self.arms.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`."""
        self.head, self.offline = state["head"].clone(), state["offline"].clone()
        self.inverse, self.moment = state["inverse"].clone(), state["moment"].clone()
        self.features, self.arms = state["features"].clone(), state["arms"].clone()
        self.generator.set_state(state["generator"])
        self.picking.set_state(state["picking"])


def sherman_morrison(inverse: Tensor, vector: Tensor) -> Tensor:
    """Return `(U + g gᵀ)⁻¹ = U⁻¹ − U⁻¹ g gᵀ U⁻¹ / (1 + gᵀ U⁻¹ g)` from symmetric U⁻¹ `[D, D]` and g `[D]`."""
    moved = inverse @ vector
    return inverse - torch.outer(moved, moved) / (1 + vector @ moved)
