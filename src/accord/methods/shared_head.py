"""Share the head of the reward models on a frozen backbone, and let each site turn the features in its own way.

    R_k(x, y) = w · SiLU(V Q_k h(x, y) + c) + b         h: last state of a public checkpoint, frozen
    Q_k = (I + A)(I − A)⁻¹,  A = (X_k − X_kᵀ) / 2       Cayley; orthogonal, in `blocks` blocks along the diagonal
    V, c, w, b    averaged over the sites (FedAvg);     X_k stays at site k, from 0, where Q_k = I

    shared-head-rotated    as above; a site judges by the shared head behind its own rotation, and the client-id router
                           chooses the site
    shared-head            the same with Q_k = I: what the rotation is worth

Source: after FedOT, arXiv 2505.19888 (version 3), known to us by a summary, and without public code. Differs: that is
a classifier, whose shared rows see one rotation each. A reward has one row, and w Q_k is any vector as long as w: what
would be shared is a length. So the shared head has a hidden layer here; features are not normalised, and only how the
rotation is parametrised and where it stays is that paper's. Against `fedavg-reward`, whose backbone is averaged, too.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Final, cast

import torch
from torch import Tensor, nn
from transformers import set_seed

from accord.data.images import load_images
from accord.data.sampling import draw_balanced
from accord.errors import DataError, RecipeError, check_least
from accord.federation.engine import InProcessEngine, Traffic
from accord.federation.local import Averaging, begin, finish, take_steps
from accord.federation.messages import UpdateReply, UpdateRequest
from accord.federation.rounds import federated_rounds
from accord.federation.site import Site
from accord.federation.weights import probe_of, set_trainable_weights, trainable_weights
from accord.methods.method import Method, Table, refuse_private
from accord.methods.mor import asks
from accord.rewards.model import RewardModel, Standardisation
from accord.rewards.train import bradley_terry, group_pairs
from accord.routing.router import LearnedRouter
from accord.runs import write_atomic
from accord.stages.alignment import Aligned, federated_reward, run_grpo
from accord.stages.job import Job
from accord.stages.routing import trained_router
from accord.stages.sites import site_pairs
from accord.stages.traffic import add_rows, traffic_rows
from accord.stages.training import open_training, rounds_told
from accord.types import PreferencePair


@dataclass(frozen=True)
class SharedHeadConfig:
    """How the shared head is trained."""

    checkpoint: str = "accord/idefics3"
    averaging: Averaging = field(
        default_factory=lambda: Averaging(rounds=30, local_steps=20, batch_size=32, learning_rate=3e-3)
    )
    blocks: int = 1  # of the rotation; more have fewer numbers
    rejected_per_prompt: int = 7
    centring: float = 0.01

    def __post_init__(self) -> None:
        """Refuse counts that leave nothing to compare."""
        check_least(self, blocks=1, rejected_per_prompt=1, centring=0)


class Rotation(nn.Module):
    """Q `[D, D]`, orthogonal, in equal blocks along the diagonal; the identity to begin with.

    Raises:
        RecipeError: D features make no such blocks.
    """

    def __init__(self, features: int, blocks: int) -> None:
        super().__init__()
        if features % blocks:
            raise RecipeError(f"{features} features make no {blocks} equal blocks; correct shared_head.blocks")
        size = features // blocks
        self.x = nn.Parameter(torch.zeros(blocks, size, size))

    def forward(self) -> Tensor:
        """Return Q."""
        skew = (self.x - self.x.mT) / 2
        one = torch.eye(skew.shape[-1], device=skew.device)
        blocks = torch.linalg.solve(one - skew, one + skew)  # the two factors commute
        return cast(Tensor, torch.block_diag(*blocks))


class LocalHead:
    """A site's half: local steps of the Bradley–Terry loss on its own pairs, of the shared head and of its rotation.

    Args:
        model: the frozen backbone, and a head of two layers that sites in one process share.
        pairs: the site's preference pairs.
        config: settings.
        rotated: whether the site has a rotation.

    Raises:
        DataError: there are no pairs.
    """

    def __init__(
        self, model: RewardModel, pairs: Sequence[PreferencePair], config: SharedHeadConfig, *, rotated: bool
    ) -> None:
        if not pairs:
            raise DataError("cannot train a head on 0 preference pairs; give the site pairs, or leave it out")
        self.model, self.config = model, config
        self.groups, self.examples = group_pairs(pairs), len(pairs)
        self.rotation = Rotation(model.features, config.blocks).to(next(model.head.parameters()).device)
        self.rotation.requires_grad_(rotated)

    @cached_property
    def features(self) -> list[Tensor]:
        """What the backbone makes of every group's answers, `[1 + rejected, D]` each; the chosen one first."""
        asked = self.groups
        return self.model.states(
            [group.chosen.prompt for group in asked],
            [load_images(group.chosen.images) for group in asked],
            [[group.chosen.chosen, *group.rejected] for group in asked],
        )

    def scores(self, features: Tensor) -> Tensor:
        """Return raw scores `[N]` of features `[N, D]`, by the shared head as it is and the site's own rotation."""
        turned = features.to(self.rotation.x.device) @ self.rotation().T
        return cast(Tensor, self.model.head(turned)).squeeze(-1)

    def __call__(self, request: UpdateRequest, /) -> UpdateReply:
        """Return what the local steps of one round changed in the head; the rotation goes on from where it was.

        Raises:
            CheckpointError: the weights do not fit the head.
        """
        averaging, head = self.config.averaging, self.model.head
        start = begin(head, request)
        generator = random.Random(request.seed)
        types = [group.chosen.question_type for group in self.groups]
        drawn = []
        for i in draw_balanced(types, averaging.drawn, generator):
            count = len(self.features[i]) - 1
            picked = generator.sample(range(1, count + 1), min(self.config.rejected_per_prompt, count))
            drawn.append(self.features[i][[0, *picked]])
        batches = [drawn[n : n + averaging.batch_size] for n in range(0, len(drawn), averaging.batch_size)]
        trained = [*head.parameters(), *(p for p in self.rotation.parameters() if p.requires_grad)]
        loss = take_steps(
            head,
            batches,
            lambda groups: bradley_terry(
                self.scores(torch.cat(groups)), [len(group) for group in groups], self.config.centring
            )[0],
            torch.optim.AdamW(trained, lr=averaging.learning_rate, weight_decay=averaging.weight_decay),
            seed=request.seed,
            accumulate=averaging.gradient_accumulation,
        )
        return finish(head, request, start, examples=self.examples, loss=loss, steps=averaging.local_steps)

    @torch.no_grad()
    def own_model(self) -> RewardModel:
        """Return the site's reward model: the shared head with the rotation in its first layer, standardised here.

        Raises:
            RecipeError: its scores are not finite, or all the same.
        """
        scores = self.scores(torch.cat(self.features)).double()
        mean, deviation = float(scores.mean()), float(scores.std())
        if not (scores.isfinite().all() and deviation > 0):
            raise RecipeError(
                f"the shared head's scores at a site have mean {mean:g} and deviation {deviation:g}, and cannot be "
                "standardised; lower shared_head.averaging.learning_rate"
            )
        own = copy.copy(self.model)
        own._modules = {**self.model._modules, "head": copy.deepcopy(self.model.head)}
        first = cast(nn.Linear, cast(nn.Sequential, own.head)[0])
        first.weight.copy_(first.weight @ cast(Tensor, self.rotation()))
        own.standardisation = Standardisation(mean, deviation)
        return own


def fresh_model(config: SharedHeadConfig) -> RewardModel:
    """Return the frozen backbone with an untrained head of two layers."""
    model = RewardModel.from_checkpoint(config.checkpoint, head="mlp").eval()
    model.backbone.requires_grad_(False)
    return model


def train_heads(job: Job, stage: str, *, rotated: bool) -> InProcessEngine:
    """Return the sites, each judging by the shared head behind its own rotation; trained once, and kept."""
    folder = job.kept("shared-head" + "-rotated" * rotated, after="site")
    names = [site.name for site in job.recipe.sites]
    if not folder.with_suffix(".json").is_file():
        config, seed = SETTINGS.of(job.recipe), job.recipe.seed
        set_seed(seed)
        model = fresh_model(config)
        local = {name: LocalHead(model, site_pairs(job, name), config, rotated=rotated) for name in names}
        with rounds_told(job, stage, config.averaging.rounds, about="shared head") as on_round:
            engine = open_training(job, lambda name: {"reward": local[name]})
            engine.traffic = Traffic()
            probe = torch.randn(8, model.features, generator=torch.Generator().manual_seed(0))
            weights = federated_rounds(
                engine,
                "reward",
                trainable_weights(model.head),
                config.averaging.rounds,
                seed=seed,
                aggregate=config.averaging.aggregation.start(seed),
                bits=config.averaging.aggregation.bits,
                most=config.averaging.examples_at_most,
                probe=probe_of(
                    model.head, lambda: cast(Tensor, model.head(probe.to(next(model.head.parameters()).device)))
                ),
                on_round=on_round,
            )
        set_trainable_weights(model.head, weights)
        for name in names:
            local[name].own_model().save(folder / name)
        write_atomic(folder.with_suffix(".json"), json.dumps(traffic_rows(engine.traffic)) + "\n")
    add_rows(job.traffic, json.loads(folder.with_suffix(".json").read_text()))
    sites = {name: Site(name, RewardModel.load(folder / name), score_range=job.recipe.scores) for name in names}
    judges = InProcessEngine({name: site.answer for name, site in sites.items()})
    judges.traffic = job.traffic
    return judges


def shared_head(job: Job, stage: str, *, rotated: bool) -> Aligned:
    """Align by the sites' judgement, the client-id router choosing among them."""
    engine = train_heads(job, stage, rotated=rotated)
    router = LearnedRouter(job.encoder, trained_router(job))
    return run_grpo(job, stage, federated_reward(job, router, engine=engine), encoder=job.encoder)


SETTINGS: Final = Table("shared_head", SharedHeadConfig)


def _method(name: str, about: str, *, rotated: bool) -> Method:
    return Method(
        partial(shared_head, rotated=rotated),
        about,
        needs=frozenset({"sites", "router", "private"}),
        check=refuse_private(name, "judges by a head that is trained on its pairs without noise"),
        tables=(SETTINGS,),
        asks=asks,
    )


METHODS: Final = {
    "shared-head-rotated": _method(
        "shared-head-rotated",
        "one head on frozen features, averaged, behind a rotation of each site's own; routed",
        rotated=True,
    ),
    "shared-head": _method(
        "shared-head",
        "one head on frozen features, averaged; routed, each site standardising by its own pairs",
        rotated=False,
    ),
}
