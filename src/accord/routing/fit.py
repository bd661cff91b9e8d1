"""Train the router federatedly: sites take local steps on their own pairs, the server averages (MoR, stage 2).

    L_k = ½ [BCE(σ(z⁺), e_k) + BCE(σ(z⁻), e_k)]         both answers of site k's pairs get the one-hot target e_k
    φ_k     = φ^t after S steps of SGD, η_t = η/2 (1 + cos(π t / T)) max(1, K/3) in round t of T
    φ^{t+1} = φ^t + FedAdam(Σ_k p_k (φ_k − φ^t))         over the sites that answered (`accord.federation.aggregation`)

Every client sees one class only, so its local optimum is "always me". With adaptive local steps, or with one site's n_k
far above the others', the average hardly gets past the sites' shares (measured: 0.77 right at 8 rounds of 10 AdamW
steps, sizes 1 : 2 : 9). Plain steps add up to the gradient of all sites' loss, and one adaptive step at the server
does what each site's would have done alone. 23 such rounds in 16 bits are right as often as 60 rounds of local AdamW
and FedAvg in 32 bits, for a fifth of the bytes (`benchmarks/quality/README.md`).

With K sites an output is pulled up by one of them and pushed down by K − 1. Beyond three sites it starts lower, by
log((K − 1) / 2), and the rate grows with K: 16 sites that overlap are then told apart as well as they can be (99.4 %
right, before 64.6), 64 less well (`benchmarks/quality/router_sites.py`). Up to three sites nothing differs.

The server adds up n_k over the rounds, so that the choice can forget it (`prior_correction`).

Only changes of router weights and n_k travel. Where the site's ledger has paid for it, they carry noise
(`accord.routing.private_fit`). Source: Lu et al. 2026, arXiv 2605.03426, section 3.3; Reddi et al.
2021, arXiv 2003.00295. Differs: the paper averages (FedAvg) and says neither optimiser nor rounds. The router so
learned tells whose *domain* an answer belongs to; it does not predict which reward model is right.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property

import msgspec
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from accord.data.images import load_images
from accord.federation.audit import Audit
from accord.federation.engine import Engine
from accord.federation.local import begin, finish, round_rate
from accord.federation.messages import UpdateReply, UpdateRequest
from accord.federation.rounds import federated_rounds
from accord.federation.weights import probe_of, set_trainable_weights, trainable_weights
from accord.models.encoder import Encoder
from accord.models.inputs import chunks
from accord.rewards.noise import SecretNoise
from accord.rewards.private import unit_index
from accord.routing.private_fit import Guarantee, digest_of, private_steps
from accord.routing.router import RouterConfig, RouterNetwork, client_id_loss
from accord.types import PreferencePair


class LocalRouterTraining:
    """A site's half: a few optimiser steps of the router on the site's pairs, whose images and text stay here.

    The encoder is frozen, so that the features of the drawn pairs are computed once, at the first round.

    Args:
        encoder: the frozen encoder, the same public checkpoint at every site.
        pairs: the site's private pairs.
        site: which of the router's K outputs is this site's.
        sites: K.
        config: settings.
        guarantee: what the steps are taken by where they have noise; None for plain ones.
    """

    def __init__(
        self,
        encoder: Encoder,
        pairs: Sequence[PreferencePair],
        site: int,
        sites: int,
        config: RouterConfig,
        guarantee: Guarantee | None = None,
    ) -> None:
        self.encoder = encoder
        self.site = site
        self.pairs = random.Random(0).sample(list(pairs), min(config.pairs_per_site, len(pairs)))
        self.network = RouterNetwork(encoder.features, sites, config).to(encoder.model.device)
        self.config = config
        self.guarantee = guarantee

    @cached_property
    def features(self) -> tuple[Tensor, Tensor]:
        """Hidden states `[2N, T, D]` and masks `[2N, T]` of the pairs: chosen, rejected, chosen, …; on the CPU."""
        hidden, masks = [], []
        rows = min(128, self.config.rows_at_once)  # all are padded to the longest of them: more cost more padding
        for span in chunks([2] * len(self.pairs), rows):
            chunk = self.pairs[span]
            states, mask = self.encoder(
                [pair.prompt for pair in chunk],
                [load_images(pair.images) for pair in chunk],
                [[pair.chosen, pair.rejected] for pair in chunk],
            )
            hidden += list(states.cpu())
            masks += list(mask.cpu())
        return pad_sequence(hidden, batch_first=True), pad_sequence(masks, batch_first=True)

    @cached_property
    def unit(self) -> Tensor:
        """Which unit of privacy each of the drawn pairs belongs to, `[N]`."""
        assert self.guarantee is not None
        return unit_index(self.pairs, self.guarantee.unit)

    def __call__(self, request: UpdateRequest, /) -> UpdateReply:
        """Return what `config.local_steps` steps change in the router of `request`, and the mean loss.

        With a guarantee the loss is told as 0.

        Raises:
            CheckpointError: the weights are not those of this router.
            RecipeError: there is a guarantee, and fewer steps are left than it has paid for.
            RunError: its ledger cannot be read or written, or has no steps.
        """
        start = begin(self.network, request)
        hidden, mask = self.features
        device = self.encoder.model.device
        self.network.train()
        rate = round_rate(self.config.learning_rate, request.round, self.config.rounds)
        steps, examples = self.config.local_steps, len(self.pairs)
        if self.guarantee is not None:
            unit = self.unit  # whatever can fail fails before it is paid for
            given = self.network, hidden, mask, unit, self.site, self.guarantee
            rate *= pace(self.network.shape[1])

            def make(noise: SecretNoise) -> UpdateReply:
                private_steps(*given, noise, steps=steps, rate=rate)
                return finish(self.network, request, start, examples=examples, loss=0.0, steps=steps)

            reply = self.guarantee.answers(digest_of(request, self.guarantee, self.config, self.site), steps, make)
            return msgspec.structs.replace(reply, id=request.id)
        optimiser = torch.optim.SGD(self.network.parameters(), lr=rate)
        generator = random.Random(request.seed)
        losses = []
        for _ in range(steps):
            drawn = generator.sample(range(len(self.pairs)), min(self.config.pairs_per_batch, len(self.pairs)))
            rows = torch.tensor([row for n in drawn for row in (2 * n, 2 * n + 1)])
            loss = client_id_loss(self.network(hidden[rows].to(device), mask[rows].to(device)), self.site)
            optimiser.zero_grad()
            (loss * pace(self.network.shape[1])).backward()
            optimiser.step()
            losses.append(loss.item())
        return finish(self.network, request, start, examples=examples, loss=sum(losses) / len(losses), steps=steps)


def pace(sites: int) -> float:
    """Return by what the learning rate is raised where K is above 3: K / 3.

    The loss is a mean over K outputs, so that the gradient of each of them is 1/K of its own loss's.
    """
    return max(1.0, sites / 3)


class _Counted:
    """Count what each site trained on, and which were heard: a `Server` that sends nothing beside the weights."""

    def __init__(self, sites: Sequence[str]) -> None:
        self.examples = dict.fromkeys(sites, 0)
        self.heard = set[str]()

    def send(self) -> bytes:
        return b""

    def receive(self, site: str, examples: int, state: bytes, /) -> None:
        self.examples[site] += examples

    def keep(self, sites: Collection[str], where: str) -> None:
        self.heard.update(sites)


def fit_router(
    engine: Engine,
    features: int,
    config: RouterConfig,
    *,
    seed: int,
    audit: Audit | None = None,
    run: Callable[..., dict[str, Tensor]] = federated_rounds,
    on_round: Callable[[int, float], None] = lambda _round, _loss: None,
) -> RouterNetwork:
    """Train a router with all sites of `engine`; one that is absent or sends unusable weights sits out that round.

    Args:
        engine: carries the requests.
        features: D of the encoder.
        config: settings.
        seed: of the initial weights and of the sites' draws.
        audit: `router_audit`, to name a site that poisons the router.
        run: the rounds: `federated_rounds`, or another that takes what this gives it.
        on_round: told the round (from 1) and the mean loss of the sites that answered.

    Raises:
        RunError: no site answered in a round, or most failed in one (`accord.federation.rounds`).
    """
    network = _drawn(features, len(engine.sites), config, seed)
    # Whatever the hidden states, the router's first layer makes them of this size.
    hidden = torch.randn(8, 4, features, generator=torch.Generator().manual_seed(0))
    counted = _Counted(engine.sites)
    weights = run(
        engine,
        "router",
        trainable_weights(network),
        config.rounds,
        seed=seed,
        aggregate=config.aggregation.start(seed),
        bits=config.aggregation.bits,
        most=config.pairs_per_site,  # no site may claim more weight
        server=counted,
        probe=probe_of(network, lambda: network(hidden, torch.ones(hidden.shape[:2], dtype=torch.bool))),
        audit=audit,
        on_round=on_round,
    )
    set_trainable_weights(network, weights)
    # A site that is left out has no prior: one of its few rounds, divided out, would send it more than others get.
    heard = counted.heard - (audit.left_out if audit is not None else set())
    network.examples = tuple(n if site in heard else 0 for site, n in counted.examples.items())
    return network.eval()


def router_audit(
    hidden: Tensor, mask: Tensor, kinds: Sequence[str], own: Mapping[str, Sequence[bool]], config: RouterConfig
) -> Audit:
    """Return what names a site that poisons the router, by labelled questions of the server.

    ℓ = −log Σ_k α_k over the sites k whose own kind the question is of: the router is right that picks any of them.

    Args:
        hidden: states `[N, T, D]` of the questions with their right answers.
        mask: `[N, T]`.
        kinds: of each question, `[N]`.
        own: by site, in the order of the router's outputs: whether each question is of its own kinds, `[N]`; every
            question is of some site's.
        config: of the router.
    """
    network = _drawn(hidden.shape[-1], len(own), config, seed=0).eval()
    right = torch.tensor([*own.values()], dtype=torch.bool).T  # [N, K]

    @torch.no_grad()
    def losses(weights: Mapping[str, Tensor]) -> Tensor:
        set_trainable_weights(network, weights)
        weighed: Tensor = network(hidden, mask).log_softmax(dim=-1)
        return -weighed.masked_fill(~right, -torch.inf).logsumexp(dim=-1)

    return Audit(losses, kinds, own, leaves_out=config.leave_out)


def _drawn(features: int, sites: int, config: RouterConfig, seed: int) -> RouterNetwork:
    """Return a network of random weights, and leave torch's own generators as they are."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return RouterNetwork(features, sites, config)
