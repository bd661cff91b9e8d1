"""Train one reward model with all sites by averaging its weights: what MoR replaces by routing.

    L_k = − E log σ(R_w(x, y⁺) − R_w(x, y⁻)) + c · E (R_w(x, y⁺) + R_w(x, y⁻))²        over site k's own pairs
    w^{t+1} = Σ_k (n_k / Σ_j n_j) w_k^{t+1}                                            FedAvg, n_k pairs

The whole reward model travels, or its adapter and head under LoRA, so that every site must have one architecture.
In the end the server holds the model and judges alone. Its backbone is tuned on the sites' answers first, as the sites
tune their own; that is averaged, too (`finetune`).

Source: the baseline "FedAvg" of Lu et al. 2026, arXiv 2605.03426, section 4; McMahan et al. 2017, arXiv 1602.05629.
Differs: the paper says neither how it is trained nor how its scores are standardised. The server has no pairs, and the
sites send nothing but weights; so the scores are standardised over what the base policy itself answers to the server's
public prompts, which needs no label (`standardise`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import torch
from torch import Tensor, nn
from transformers import set_seed

from accord.data.images import load_images
from accord.data.sampling import draw_balanced, sample_questions
from accord.errors import DataError, RecipeError, check_least
from accord.federation.engine import Engine, InProcessEngine, Traffic
from accord.federation.local import Averaging, begin, finish, take_steps
from accord.federation.messages import Task, UpdateReply, UpdateRequest
from accord.federation.rounds import federated_rounds
from accord.federation.site import LocalUpdate, Site
from accord.federation.weights import probe_of, set_trainable_weights, trainable_weights
from accord.methods.fedit import LocalSupervised, fedavg
from accord.methods.method import Method, Table
from accord.models.finetune import SYMMETRIES, transform
from accord.models.generate import answer
from accord.models.inputs import build_batch
from accord.models.load import LoraSettings
from accord.models.made_up import made_up, made_up_loss
from accord.recipe import Recipe
from accord.rewards.model import RewardModel, Standardisation
from accord.rewards.train import PairGroup, bradley_terry, group_pairs
from accord.runs import write_atomic
from accord.stages.alignment import Aligned, federated_reward, run_grpo
from accord.stages.job import Job
from accord.stages.routing import constant_router
from accord.stages.sites import site_pairs
from accord.stages.traffic import add_rows, traffic_rows
from accord.stages.training import open_training, rounds_told
from accord.types import PreferencePair, Question, prompt_of

_Drawn: TypeAlias = tuple[PairGroup, tuple[str, ...], int]


@dataclass(frozen=True)
class SharedRewardConfig:
    """How the shared reward model is trained."""

    checkpoint: str = "accord/idefics3"
    finetune: Averaging | None = field(default_factory=lambda: Averaging(local_steps=5))  # before the head
    averaging: Averaging = field(default_factory=lambda: Averaging(batch_size=16))
    rejected_per_prompt: int = 7
    centring: float = 0.01  # c
    lora: LoraSettings | None = None  # average an adapter and the head instead of everything

    def __post_init__(self) -> None:
        """Refuse counts that leave nothing to compare."""
        check_least(self, rejected_per_prompt=1, centring=0)

    @property
    def rounds(self) -> int:
        """All rounds, those of the backbone included."""
        return self.averaging.rounds + (self.finetune.rounds if self.finetune else 0)


class LocalReward:
    """A site's half: local steps of the Bradley–Terry loss on its own pairs, which stay here.

    Question types are drawn equally often, as in `accord.rewards.train`.

    Args:
        model: of the shared architecture; sites in one process may share it, since each begins by setting whatever is
            trained.
        pairs: the site's preference pairs, each with one image.
        config: settings.
    """

    def __init__(self, model: RewardModel, pairs: Sequence[PreferencePair], config: SharedRewardConfig) -> None:
        if not pairs:
            raise DataError("cannot train a reward model on 0 preference pairs; give the site pairs, or leave it out")
        self.model, self.config = model, config
        self.groups = group_pairs(pairs)
        self.examples = len(pairs)

    def __call__(self, request: UpdateRequest, /) -> UpdateReply:
        """Return what the local steps of one round changed, the number of pairs, and the mean loss.

        Raises:
            CheckpointError: the weights do not fit the model.
        """
        averaging = self.config.averaging
        start = begin(self.model, request)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        loss = take_steps(
            self.model,
            self._draw(request.seed),
            self._loss,
            torch.optim.AdamW(trained, lr=averaging.learning_rate, weight_decay=averaging.weight_decay),
            seed=request.seed,
            accumulate=averaging.gradient_accumulation,
        )
        steps = averaging.local_steps
        return finish(self.model, request, start, examples=self.examples, loss=loss, steps=steps)

    def _draw(self, seed: int) -> list[list[_Drawn]]:
        """Return the batches of a round: groups of pairs, each with its rejected answers and its symmetry."""
        generator, averaging = random.Random(seed), self.config.averaging
        choices = len(SYMMETRIES) if averaging.symmetries else 1
        items = []
        for i in draw_balanced([g.chosen.question_type for g in self.groups], averaging.drawn, generator):
            rejected = self.groups[i].rejected
            picked = generator.sample(rejected, min(self.config.rejected_per_prompt, len(rejected)))
            items.append((self.groups[i], tuple(picked), generator.randrange(choices)))
        return [items[n : n + averaging.batch_size] for n in range(0, len(items), averaging.batch_size)]

    def _loss(self, items: Sequence[_Drawn]) -> Tensor:
        batch = build_batch(
            self.model.processor,
            [group.chosen.prompt for group, _, _ in items],
            [transform(load_images(group.chosen.images), symmetry) for group, _, symmetry in items],
            [[group.chosen.chosen, *rejected] for group, rejected, _ in items],
        )
        scores: Tensor = self.model(batch.to(next(self.model.head.parameters()).device))
        return bradley_terry(scores.float(), [1 + len(rejected) for _, rejected, _ in items], self.config.centring)[0]


def local_updates(
    model: RewardModel, questions: Sequence[Question], pairs: Sequence[PreferencePair], config: SharedRewardConfig
) -> dict[Task, LocalUpdate]:
    """Return what a site answers with: to "supervised" where its backbone is tuned on `questions`, and to "reward"."""
    updates: dict[Task, LocalUpdate] = {"reward": LocalReward(model, pairs, config)}
    if config.finetune and questions:
        updates["supervised"] = LocalSupervised(model.backbone, model.processor, questions, config.finetune, fedavg())
    return updates


def train_shared_reward(
    engine: Engine,
    model: RewardModel,
    config: SharedRewardConfig,
    *,
    seed: int,
    sites: Sequence[str] | None = None,
    on_round: Callable[[int, float], None] = lambda _round, _loss: None,
) -> RewardModel:
    """Train `model` in place with the sites of `engine`; return it, not standardised.

    Args:
        engine: its sites answer with `local_updates`.
        model: the shared architecture, with a fresh head.
        config: settings, the same as the sites'.
        seed: of the sites' draws.
        sites: those that take part; None for all.
        on_round: told the round (from 1, those of the backbone first) and the mean loss of the sites that answered.

    Raises:
        RunError: no site answered in a round.
    """
    stages: list[tuple[Task, nn.Module, Averaging | None]] = [
        ("supervised", model.backbone, config.finetune),
        ("reward", model, config.averaging),
    ]
    done, batch = 0, made_up(model.processor).to(next(model.head.parameters()).device)
    outputs: dict[Task, Callable[[], Tensor]] = {
        "supervised": made_up_loss(model.backbone, model.processor),
        "reward": lambda: model(batch),
    }
    for task, part, settings in stages:
        if settings is None:
            continue
        start, most = trainable_weights(part), settings.examples_at_most
        averaged = federated_rounds(
            engine,
            task,
            start,
            settings.rounds,
            seed=seed,
            aggregate=settings.aggregation.start(seed),
            bits=settings.aggregation.bits,
            first=done,
            sites=sites,
            most=most,
            probe=probe_of(part, outputs[task]),
            on_round=on_round,
        )
        set_trainable_weights(part, averaged)
        done += settings.rounds
    return model.eval()


def standardise(model: RewardModel, questions: Sequence[Question], answers: Sequence[Sequence[str]]) -> None:
    """Standardise `model` over `answers` to `questions`: what the base policy says to the server's public prompts.

    0 is then the mean over what the policy says before it is aligned. A site's own standardisation has it at the mean
    over the right and wrong answers of its pairs.

    Raises:
        RecipeError: the scores are not finite, or all the same.
    """
    model.standardisation = Standardisation()
    scored = model.score([prompt_of(q) for q in questions], [load_images(q.images) for q in questions], answers)
    scores = torch.cat(scored).double()
    mean, deviation = float(scores.mean()), float(scores.std())
    if not (scores.isfinite().all() and deviation > 0):
        raise RecipeError(
            f"the shared reward model's scores of {len(scores)} answers have mean {mean:g} and deviation "
            f"{deviation:g}, and cannot be standardised; lower averaging.learning_rate, or give more answers"
        )
    model.standardisation = Standardisation(mean, deviation)


def said_by_base(job: Job) -> tuple[list[Question], list[list[str]]]:
    """Return 300 of the public prompts, and four answers of the base policy to each."""
    asked = sample_questions(job.prompts, 300, seed=job.recipe.seed)
    said = answer(
        *job.policy,
        asked,
        max_new_tokens=job.recipe.alignment.max_completion_length,
        samples=4,
        seed=job.recipe.seed,
    )
    return asked, said


SETTINGS: Final = Table("shared_reward", SharedRewardConfig)


def shared_reward(job: Job, stage: str) -> Aligned:
    """Average the weights of one reward model over the sites, and align with it at the server."""
    folder = job.kept("shared-reward", after="site")
    if not folder.is_dir():
        config, seed = SETTINGS.of(job.recipe), job.recipe.seed
        set_seed(seed)
        job.run.truncate(stage)
        model = RewardModel.from_checkpoint(config.checkpoint, lora=config.lora)
        with rounds_told(job, stage, config.rounds, about="reward model") as on_round:
            engine = open_training(
                job, lambda site: local_updates(model, job.private[site], site_pairs(job, site), config)
            )
            engine.traffic = Traffic()
            train_shared_reward(engine, model, config, seed=seed, on_round=on_round)
        standardise(model, *said_by_base(job))
        write_atomic(folder.with_suffix(".json"), json.dumps(traffic_rows(engine.traffic)) + "\n")
        model.save(folder)
    add_rows(job.traffic, json.loads(folder.with_suffix(".json").read_text()))
    judge = Site("shared", RewardModel.load(folder), score_range=job.recipe.scores)
    engine = InProcessEngine({"shared": judge.answer})  # at the server itself: what it is asked crosses no border
    return run_grpo(job, stage, federated_reward(job, constant_router([1.0]), engine=engine))


def _told(recipe: Recipe) -> str:
    config = SETTINGS.of(recipe)
    tuning = f"{config.finetune.told} of its backbone, then " if config.finetune else ""
    return f"at the sites: {tuning}{config.averaging.told} of one reward model of {config.checkpoint}"


METHODS: Final = {
    "fedavg-reward": Method(
        shared_reward,
        "one reward model, averaged over the sites",
        needs=frozenset({"private"}),
        tables=(SETTINGS,),
        training=_told,
    )
}
