"""Route by heads that public anchor pairs trained: encoder and head together, as `Router`s.

    preference    α = softmax(g(f(x)))                              ArmoRM's gate, Wang et al. 2024, arXiv 2406.12845
    correctness   α = softmax(h(x, y) · E_k)                        BayesianRouter, arXiv 2510.02850, offline
    anchored      α = softmax_k(a z_k(x) + b_k + w_k · f(x))        ours, beside MoR's client-id router z

How the heads are learned, and what the letters mean, is in `accord.routing.gate`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from accord.data.images import Pictures
from accord.errors import CheckpointError
from accord.models.encoder import Encoder
from accord.models.inputs import chunks
from accord.routing.anchors import last_states
from accord.routing.gate import GateNetwork, Kind, log_weights
from accord.routing.router import RouterNetwork
from accord.types import Prompt


class PreferenceGate:
    """Encoder and preference gate together: a `Router` that judges all completions of a prompt alike."""

    def __init__(self, encoder: Encoder, network: GateNetwork, *, prompts_at_once: int = 64) -> None:
        self.encoder = encoder
        self.network = _of_kind(network, "preference")
        self.prompts_at_once = prompts_at_once

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Prompt], images: Sequence[Pictures], completions: Sequence[Sequence[str]], /
    ) -> Tensor:
        """Return `softmax(g(f(x)))`, `[N, K]`: one forward pass per prompt."""
        weights = []
        for span in chunks([1] * len(prompts), self.prompts_at_once):
            those = completions[span]
            features = self.encoder.before_answers(prompts[span], images[span])
            sizes = torch.tensor([len(c) for c in those])
            weights.append(self.network(features).softmax(dim=-1).repeat_interleave(sizes, dim=0))
        return torch.cat(weights)


class CorrectnessRouter:
    """Encoder and correctness head together: a `Router` that judges every completion by itself."""

    def __init__(self, encoder: Encoder, network: GateNetwork, *, rows_at_once: int = 512) -> None:
        self.encoder = encoder
        self.network = _of_kind(network, "correctness")
        self.rows_at_once = rows_at_once

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Prompt], images: Sequence[Pictures], completions: Sequence[Sequence[str]], /
    ) -> Tensor:
        """Return `softmax(h(x, y) · E)`, `[N, K]`: the likelier a site is right, the more it counts."""
        weights = []
        for span in chunks([len(c) for c in completions], self.rows_at_once):
            features = last_states(*self.encoder(prompts[span], images[span], completions[span]))
            weights.append(self.network(features).softmax(dim=-1))
        return torch.cat(weights)


class AnchoredRouter:
    """Encoder, client-id router and its correction together: a `Router` that judges a prompt's completions alike."""

    def __init__(self, encoder: Encoder, router: RouterNetwork, network: GateNetwork) -> None:
        self.encoder = encoder
        self.router = router.eval().to(encoder.model.device)
        self.network = _of_kind(network, "anchored")

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Prompt], images: Sequence[Pictures], completions: Sequence[Sequence[str]], /
    ) -> Tensor:
        """Return `softmax(a z(x) + b + W f(x))`, `[N, K]`, z averaged over the completions of a prompt."""
        weights = []
        for span in chunks([len(c) for c in completions], self.router.config.rows_at_once):
            sizes = [len(c) for c in completions[span]]
            logits = self.router(*self.encoder(prompts[span], images[span], completions[span])).cpu()
            z = torch.stack([own.mean(dim=0) for own in log_weights(logits).split(sizes)])
            alike = self.network(self.encoder.before_answers(prompts[span], images[span]), z).softmax(dim=-1)
            weights.append(alike.repeat_interleave(torch.tensor(sizes), dim=0))
        return torch.cat(weights)


def _of_kind(network: GateNetwork, kind: Kind) -> GateNetwork:
    if network.shape.kind != kind:
        raise CheckpointError(f"a head of kind {network.shape.kind!r} was given, and {kind!r} is needed; fit that one")
    return network.eval()
