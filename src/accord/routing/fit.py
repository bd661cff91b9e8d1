"""Train the router federatedly: sites take local steps on their own pairs, the server averages (MoR, stage 2).

    L_k = ½ [BCE(σ(z⁺), e_k) + BCE(σ(z⁻), e_k)]         both answers of site k's pairs get the one-hot target e_k
    φ^{t+1} = Σ_k (n_k / Σ_j n_j) φ_k^{t+1}              FedAvg (McMahan et al. 2017) over the sites that answered

Every client sees one class only, so its local optimum is "always me", and with many local steps, or with one site's
n_k far above the others', the average never gets past the sites' shares (measured: 0.77 right at 8 rounds of 10 steps
with sizes 1 : 2 : 9). Few local steps, many rounds and equal n_k get there (0.98 to 1.00 at 60 rounds of 2).

Only router weights and n_k travel. Source: Lu et al. 2026, arXiv 2605.03426, section 3.3. The router so learned tells
whose *domain* an answer belongs to; it does not predict which reward model is right.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.utils.rnn import pad_sequence

from accord.data.images import load_if_any
from accord.errors import ReplyError, RunError
from accord.federation.asking import ask_checked
from accord.federation.engine import Engine
from accord.federation.messages import Reply, RouterReply, RouterRequest, check_kind
from accord.models.inputs import chunks
from accord.routing.router import Encoder, RouterConfig, RouterNetwork, read_weights
from accord.types import PreferencePair


class LocalRouterTraining:
    """A site's half: a few optimiser steps of the router on the site's pairs, whose images and text stay here.

    The encoder is frozen, so that the features of the drawn pairs are computed once, at the first round.

    Args:
        encoder: the frozen encoder, the same public checkpoint at every site.
        pairs: the site's private pairs.
        sites: K.
        config: settings.
    """

    def __init__(self, encoder: Encoder, pairs: Sequence[PreferencePair], sites: int, config: RouterConfig) -> None:
        self.encoder = encoder
        self.pairs = random.Random(0).sample(list(pairs), min(config.pairs_per_site, len(pairs)))
        self.network = RouterNetwork(encoder.features, sites, config).to(encoder.model.device)
        self.config = config

    @cached_property
    def features(self) -> tuple[Tensor, Tensor]:
        """Hidden states `[2N, T, D]` and masks `[2N, T]` of the pairs: chosen, rejected, chosen, …; on the CPU."""
        hidden, masks = [], []
        rows = min(128, self.config.rows_at_once)  # all are padded to the longest of them: more cost more padding
        for span in chunks([2] * len(self.pairs), rows):
            chunk = self.pairs[span]
            states, mask = self.encoder(
                [pair.prompt for pair in chunk],
                [load_if_any(pair.image) for pair in chunk],
                [[pair.chosen, pair.rejected] for pair in chunk],
            )
            hidden += list(states.cpu())
            masks += list(mask.cpu())
        return pad_sequence(hidden, batch_first=True), pad_sequence(masks, batch_first=True)

    def __call__(self, weights: bytes, site: int, seed: int) -> tuple[bytes, float]:
        """Start from `weights`, take `config.local_steps` steps; return the new weights and the mean loss."""
        hidden, mask = self.features
        device = self.encoder.model.device
        self.network.from_bytes(weights)
        self.network.train()
        optimiser = torch.optim.AdamW(self.network.parameters(), lr=self.config.learning_rate)
        generator = random.Random(seed)
        losses = []
        for _ in range(self.config.local_steps):
            drawn = generator.sample(range(len(self.pairs)), min(self.config.pairs_per_batch, len(self.pairs)))
            rows = torch.tensor([row for n in drawn for row in (2 * n, 2 * n + 1)])
            loss = client_id_loss(self.network(hidden[rows].to(device), mask[rows].to(device)), site)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        return self.network.to_bytes(), sum(losses) / len(losses)


def client_id_loss(logits: Tensor, site: int) -> Tensor:
    """Return the mean over rows and outputs of BCE between `logits` `[N, K]` and the one-hot target of `site`.

    The rows hold chosen and rejected answers in equal number, so the mean is the paper's half sum.
    """
    target = torch.zeros_like(logits)
    target[:, site] = 1.0
    return binary_cross_entropy_with_logits(logits, target)


def federated_average(weights: Sequence[Mapping[str, Tensor]], examples: Sequence[int]) -> dict[str, Tensor]:
    """Return `Σ_k (n_k / Σ_j n_j) φ_k`, tensor by tensor."""
    total = sum(examples)
    return {
        name: torch.stack([w[name].double() * (n / total) for w, n in zip(weights, examples, strict=True)])
        .sum(0)
        .to(tensor.dtype)
        for name, tensor in weights[0].items()
    }


def fit_router(
    engine: Engine,
    features: int,
    config: RouterConfig,
    *,
    seed: int,
    on_round: Callable[[int, float], None] = lambda _round, _loss: None,
) -> RouterNetwork:
    """Train a router with all sites of `engine`; one that is absent or sends unusable weights sits out that round.

    Args:
        engine: carries the requests.
        features: D of the encoder.
        config: settings.
        seed: of the initial weights and of the sites' draws.
        on_round: told the round (from 1) and the mean loss of the sites that answered.

    Raises:
        RunError: no site answered in a round.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        network = RouterNetwork(features, len(engine.sites), config)
    for t in range(config.rounds):
        weights = network.to_bytes()
        requests = {
            site: RouterRequest(f"router-{t}-{site}", t, k, weights, seed * 100_003 + t * 101 + k)
            for k, site in enumerate(engine.sites)
        }
        updates = ask_checked(
            engine,
            requests,
            partial(_check_update, expected=network.state_dict()),
            what="an update",
            consequence="the router was averaged without it",
        ).values()
        if not updates:
            raise RunError(
                f"no site answered in router round {t + 1}; check the sites' logs and start again with --resume"
            )
        examples = [min(reply.examples, config.pairs_per_site) for reply, _ in updates]  # no site may claim more weight
        network.load_state_dict(federated_average([received for _, received in updates], examples))
        on_round(t + 1, sum(reply.loss for reply, _ in updates) / len(updates))
    return network.eval()


def _check_update(
    request: RouterRequest, reply: Reply, expected: dict[str, Tensor]
) -> tuple[RouterReply, dict[str, Tensor]]:
    """Validate a site's update before use; return it and its weights."""
    reply = check_kind(request, reply, RouterReply, "a router update")
    if reply.examples < 1 or not math.isfinite(reply.loss):
        raise ReplyError(f"{reply.examples} examples with a loss of {reply.loss}")
    return reply, read_weights(reply.weights, expected)
