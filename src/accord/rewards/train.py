"""Train a site's reward model on its preference pairs with the Bradley–Terry loss (MoR, stage 1).

    L = − E log σ(R(x, y⁺) − R(x, y⁻)) + c · E (R(x, y⁺) + R(x, y⁻))²

Pairs with a `weight` make the first mean a weighted one, and where some are ties it is over Davidson's likelihood
(`accord.rewards.ties`). The second term (Eisenstein et al. 2023, arXiv 2312.09244, eq. 2; the
`center_rewards_coefficient` of TRL) fixes the free offset of Bradley–Terry scores near zero. Pairs that share image,
prompt and chosen answer are scored as one group with one image encoding.

Training stops at the best *whole-vocabulary ranking* on the site's held-out questions: is the right answer on top of
all the answers that a policy could give? Pair accuracy misleads: reward models with 80 % of it were hacked by GRPO
within 300 steps. A site that has judgements and no reference answers has nothing else: it trains on the pairs of some
of its images and stops where the pairs of the others are ranked best (`choose = "pairs"`).
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from accord.data.images import load_images
from accord.data.questions import image_identity, rivals, together
from accord.data.sampling import draw_balanced
from accord.errors import DataError, RecipeError, check_least
from accord.models.finetune import SYMMETRIES, trainer_arguments, transform
from accord.models.inputs import Batch, build_batch
from accord.rewards.model import Head, RewardModel, Standardisation
from accord.rewards.ties import davidson
from accord.types import PreferencePair, Question, prompt_of


@dataclass(frozen=True)
class RewardConfig:
    """How a reward model is trained."""

    steps: int = 500
    prompts_per_batch: int = 16
    rejected_per_prompt: int = 7
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.1  # share of the steps
    centring: float = 0.01  # c
    symmetries: bool = False  # augment with the symmetries of the square
    evaluate_every: int = 50  # steps between rankings
    evaluate_on: int = 200  # held-out questions, or pairs kept back, per ranking
    vocabulary: int = 64  # commonest answers that are ranked against each other
    patience: int = 3  # rankings without a better one before training stops; 0 for never
    choose: Literal["questions", "pairs"] = "questions"  # what is ranked: held-out answers, or pairs kept back
    kept_back: float = 0.1  # share of the site's images whose pairs are ranked and not trained on, with "pairs"
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    rows_at_once: int = 512  # answers scored in one forward pass, in rankings and for the federation
    head: Head = "linear"  # on the backbone; "mlp" has two layers
    ties: float = (
        1.0  # ν of Davidson's likelihood, by which all pairs are trained on where some are ties; 0 drops these
    )

    def __post_init__(self) -> None:
        """Refuse counts that leave nothing to train or to rank."""
        check_least(self, steps=1, prompts_per_batch=1, rejected_per_prompt=1, gradient_accumulation=1)
        check_least(self, learning_rate=0, weight_decay=0, warmup=0, centring=0, ties=0)
        check_least(self, evaluate_every=1, evaluate_on=0, vocabulary=2, patience=0, rows_at_once=1)
        if not 0 < self.kept_back < 1:
            raise RecipeError(f"kept_back must be between 0 and 1, got {self.kept_back}; correct it")


@dataclass(frozen=True)
class Ranking:
    """How often the right answer scores highest: among all that a policy could give, or of the two of a pair.

    Attributes:
        by_type: the share of each question type, in 0..1.
        asked: of how many questions or pairs each share is.
    """

    by_type: Mapping[str, float]
    asked: Mapping[str, int] = field(default_factory=dict)

    @property
    def macro(self) -> float:
        """Mean over question types."""
        return sum(self.by_type.values()) / len(self.by_type) if self.by_type else 0.0


@dataclass(frozen=True)
class PairGroup:
    """The pairs that share image, prompt and chosen answer."""

    chosen: PreferencePair
    rejected: tuple[str, ...]
    weights: tuple[float, ...] = ()  # of the pairs; empty where each is 1
    tied: tuple[bool, ...] = ()  # which pairs are ties; empty where none is


def group_pairs(pairs: Sequence[PreferencePair]) -> list[PairGroup]:
    """Group pairs by question and chosen answer, in order of first appearance."""
    groups: dict[tuple[str, str], list[PreferencePair]] = defaultdict(list)
    for pair in pairs:
        groups[pair.question_id, pair.chosen].append(pair)
    return [
        PairGroup(
            group[0],
            tuple(pair.rejected for pair in group),
            tuple(pair.weight for pair in group) if any(pair.weight != 1 for pair in group) else (),
            tuple(pair.tie for pair in group) if any(pair.tie for pair in group) else (),
        )
        for group in groups.values()
    ]


def bradley_terry(
    scores: Tensor,
    sizes: Sequence[int],
    centring: float,
    *,
    weights: Tensor | None = None,
    tied: Tensor | None = None,
    nu: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return the mean loss and the pair accuracy of grouped scores; NaN for the accuracy where all pairs are ties.

    Args:
        scores: `[N]`, group after group, the chosen answer's score first in each.
        sizes: rows per group (1 chosen + its rejected).
        centring: the coefficient c.
        weights: of the pairs, `[N - groups]`; None for 1 each.
        tied: which pairs are ties, boolean `[N - groups]`; None for none.
        nu: ν of Davidson's likelihood, read with `tied` alone.
    """
    groups = scores.split(list(sizes))
    chosen = torch.cat([group[:1].expand(len(group) - 1) for group in groups])
    rejected = torch.cat([group[1:] for group in groups])
    margin = chosen - rejected
    each = -logsigmoid(margin) if tied is None else davidson(margin, tied, nu)
    loss = each.mean() if weights is None else (weights * each).sum() / weights.sum()
    loss = loss + centring * (chosen + rejected).square().mean()
    return loss, ((margin if tied is None else margin[~tied]) > 0).float().mean()


def rank(
    model: RewardModel, questions: Sequence[Question], vocabulary: Sequence[str], *, prompts_at_once: int = 32
) -> Ranking:
    """Rank every answer of `vocabulary` for every question; the question's own answer is added if it is missing.

    Its other right answers are left out: to prefer one of them is no fault.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(questions), prompts_at_once):
        chunk = questions[start : start + prompts_at_once]
        candidates = [[q.answer, *rivals(q, vocabulary)] for q in chunk]
        scores = model.score([prompt_of(q) for q in chunk], [load_images(q.images) for q in chunk], candidates)
        for q, s in zip(chunk, scores, strict=True):
            right[q.question_type].append(bool((s[0] > s[1:]).all()))
    return _ranking(right)


def _ranking(right: Mapping[str, Sequence[bool]]) -> Ranking:
    ordered = sorted(right.items())
    return Ranking({name: sum(hits) / len(hits) for name, hits in ordered}, {name: len(hits) for name, hits in ordered})


def rank_pairs(model: RewardModel, pairs: Sequence[PreferencePair], *, prompts_at_once: int = 32) -> Ranking:
    """Return the pair accuracy: how often the chosen answer scores above the rejected one; equal scores are wrong.

    Pairs that people found equally good are left out.
    """
    pairs = [pair for pair in pairs if not pair.tie]
    right: dict[str, list[bool]] = defaultdict(list)
    for pair, margin in zip(pairs, pair_margins(model, pairs, prompts_at_once=prompts_at_once), strict=True):
        right[pair.question_type].append(margin > 0)
    return _ranking(right)


def pair_margins(model: RewardModel, pairs: Sequence[PreferencePair], *, prompts_at_once: int = 32) -> list[float]:
    """Return how far each chosen answer scores above the rejected one, R̄(x, y⁺) − R̄(x, y⁻), standardised, `[N]`.

    Every answer to a question is scored once, however many pairs it is in.
    """
    by_question: dict[str, list[int]] = defaultdict(list)
    for n, pair in enumerate(pairs):
        by_question[pair.question_id].append(n)
    asked = list(by_question.values())
    margins = [0.0] * len(pairs)
    for start in range(0, len(asked), prompts_at_once):
        chunk = [[pairs[n] for n in places] for places in asked[start : start + prompts_at_once]]
        answers = [list(dict.fromkeys(a for p in group for a in (p.chosen, p.rejected))) for group in chunk]
        prompts, images = [g[0].prompt for g in chunk], [load_images(g[0].images) for g in chunk]
        scored = model.score(prompts, images, answers)
        for places, given, scores in zip(asked[start : start + prompts_at_once], answers, scored, strict=True):
            score = dict(zip(given, scores.tolist(), strict=True))
            for n in places:
                margins[n] = score[pairs[n].chosen] - score[pairs[n].rejected]
    return margins


def keep_back(
    pairs: Sequence[PreferencePair], share: float, generator: random.Random
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Keep back the pairs of a random share of the images, at least one; return the others and the kept ones.

    Images are the same where their stored bytes are. Pairs without images go by the words of their prompt, and pairs
    that share one of several images stay together.

    Raises:
        DataError: all pairs are about one image.
    """
    subjects = together([pair.subjects for pair in pairs], image_identity())
    distinct = sorted(set(subjects))
    if len(distinct) < 2:
        raise DataError(
            f"all {len(pairs)} pairs are about one image, or linked by images that they share, and some images' pairs "
            "are kept back to choose the weights; "
            'give the site pairs about more images, or take choose = "pairs" out of its reward_model'
        )
    count = min(max(1, round(share * len(distinct))), len(distinct) - 1)
    kept = set(generator.sample(distinct, count))
    return (
        [pair for pair, subject in zip(pairs, subjects, strict=True) if subject not in kept],
        [pair for pair, subject in zip(pairs, subjects, strict=True) if subject in kept],
    )


class _Drawn(Dataset[tuple[PairGroup, tuple[int, ...], int]]):
    """All groups of a training, each with the pairs and the symmetry drawn for it.

    Types come equally often in all of it; the trainer shuffles it, so that a batch holds them in random proportion.
    """

    def __init__(self, groups: Sequence[PairGroup], config: RewardConfig, generator: random.Random) -> None:
        count = config.steps * config.prompts_per_batch * config.gradient_accumulation
        choices = len(SYMMETRIES) if config.symmetries else 1
        self.items = []
        for i in draw_balanced([g.chosen.question_type for g in groups], count, generator):
            pairs = range(len(groups[i].rejected))
            picked = generator.sample(pairs, min(config.rejected_per_prompt, len(pairs)))
            self.items.append((groups[i], tuple(picked), generator.randrange(choices)))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[PairGroup, tuple[int, ...], int]:
        return self.items[i]


class _BradleyTerryTrainer(Trainer):
    """`Trainer` whose loss is Bradley–Terry over the groups of a batch."""

    centring, nu = 0.0, 1.0

    def compute_loss(  # type: ignore[override]
        self, model: RewardModel, inputs: dict[str, object], return_outputs: bool = False, **_: object
    ) -> Tensor | tuple[Tensor, Tensor]:
        batch, sizes = inputs["batch"], inputs["sizes"]
        assert isinstance(batch, Batch) and isinstance(sizes, list)
        marks: dict[str, Tensor] = {
            name: value.to(self.args.device)
            for name in ("weights", "tied")
            if isinstance(value := inputs[name], Tensor)
        }
        scores = model(batch.to(self.args.device))
        loss, accuracy = bradley_terry(scores, sizes, self.centring, nu=self.nu, **marks)
        return (loss, accuracy) if return_outputs else loss


class _KeepBest(TrainerCallback):
    """Every few steps, rank; keep the trainable weights that ranked best, and stop when nothing gets better."""

    def __init__(
        self,
        model: RewardModel,
        config: RewardConfig,
        ranking: Callable[[], Ranking],
        log: Callable[[Mapping[str, object]], None],
    ) -> None:
        self.model, self.ranking, self.log = model, ranking, log
        self.every, self.patience = config.evaluate_every, config.patience
        self.best: Ranking | None = None
        self.waited = 0
        self.weights: dict[str, Tensor] = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        ranking = self.ranking()
        self.log({"step": state.global_step, "ranking_macro": ranking.macro, "ranking": dict(ranking.by_type)})
        if self.best is None or ranking.macro > self.best.macro:
            self.best, self.waited = ranking, 0
            trainable = {name for name, p in self.model.named_parameters() if p.requires_grad}
            self.weights = {n: t.detach().cpu().clone() for n, t in self.model.state_dict().items() if n in trainable}
        else:
            self.waited += 1
        if ranking.macro == 1.0 or (self.patience and self.waited >= self.patience):
            control.should_training_stop = True


def train_reward_model(
    model: RewardModel,
    pairs: Sequence[PreferencePair],
    held_out: Sequence[Question],
    vocabulary: Sequence[str],
    config: RewardConfig,
    *,
    seed: int,
    out: Path,
    callbacks: Sequence[TrainerCallback] = (),
    log: Callable[[Mapping[str, object]], None] = lambda _: None,
) -> Ranking:
    """Train `model` in place, restore its best weights, set its standardisation; return the best ranking.

    Args:
        model: backbone and head.
        pairs: the site's preference pairs.
        held_out: questions of the site that no pair was built from; without any, the last weights are kept. Not read
            where the weights are chosen by pairs kept back.
        vocabulary: the answers that a policy could give, ranked against each other.
        config: settings.
        seed: of the order, the drawn rejected answers and the augmentation.
        out: scratch folder of the trainer.
        callbacks: further trainer callbacks, such as a progress bar.
        log: receives one record per ranking.

    Raises:
        DataError: there are no pairs, some of pairs and questions have an image and others none, or pairs should be
            kept back and all are about one image, or all that are kept back are ties.
        RecipeError: training diverged: the scores are not finite, or all the same.
    """
    if config.ties == 0:
        pairs = [pair for pair in pairs if not pair.tie]
    if not pairs:
        raise DataError(
            "cannot train a reward model on 0 preference pairs; give the site pairs or questions to build them from"
        )
    bare = sum(pair.image is None for pair in pairs) + sum(q.image is None for q in held_out)
    if bare not in (0, len(pairs) + len(held_out)):
        raise DataError(
            f"{bare} of {len(pairs)} pairs and {len(held_out)} held-out questions are without an image, and a reward "
            "model is for questions about images or for questions without any; give all of them one, or none"
        )
    model.rows_at_once = config.rows_at_once
    generator = random.Random(seed)
    kept: Sequence[PreferencePair] = ()
    if config.choose == "pairs":
        pairs, kept = keep_back(pairs, config.kept_back, generator)
        kept = [pair for pair in kept if not pair.tie]
        if not kept:
            raise DataError(
                f"the pairs of {config.kept_back:.0%} of the images are kept back to choose the weights, and all of "
                "them are ties; raise kept_back, or give pairs of which one answer was preferred"
            )
    groups = group_pairs(pairs)
    candidates = kept or held_out
    ranked = generator.sample(range(len(candidates)), min(config.evaluate_on, len(candidates)))

    def ranking() -> Ranking:
        if kept:
            return rank_pairs(model, [kept[i] for i in ranked])
        return rank(model, [held_out[i] for i in ranked], vocabulary)

    weighted, some_tied = any(group.weights for group in groups), any(group.tied for group in groups)

    def collate(items: Sequence[tuple[PairGroup, tuple[int, ...], int]]) -> dict[str, object]:
        batch = build_batch(
            model.processor,
            [group.chosen.prompt for group, _, _ in items],
            [transform(load_images(group.chosen.images), symmetry) for group, _, symmetry in items],
            [[group.chosen.chosen, *(group.rejected[i] for i in picked)] for group, picked, _ in items],
        )
        drawn = [(group, i) for group, picked, _ in items for i in picked]
        return {
            "batch": batch,
            "sizes": [1 + len(picked) for _, picked, _ in items],
            "weights": torch.tensor([g.weights[i] if g.weights else 1.0 for g, i in drawn]) if weighted else None,
            "tied": torch.tensor([bool(g.tied) and g.tied[i] for g, i in drawn]) if some_tied else None,
        }

    keep = _KeepBest(model, config, ranking, log)
    trainer = _BradleyTerryTrainer(
        model=model,
        args=trainer_arguments(
            out,
            seed=seed,
            max_steps=config.steps,
            per_device_train_batch_size=config.prompts_per_batch,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            warmup_steps=round(config.warmup * config.steps),
            gradient_accumulation_steps=config.gradient_accumulation,
        ),
        train_dataset=_Drawn(groups, config, generator),
        data_collator=collate,
        callbacks=[*callbacks, *([keep] if ranked else [])],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.centring, trainer.nu = config.centring, config.ties
    with model.checkpointing(config.gradient_checkpointing):
        trainer.train()
    # From here on without the trainer's autocast, which a loaded model has not: the standardisation is of its scores.
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    if keep.weights:
        model.load_state_dict(keep.weights, strict=False)
    model.standardisation = measure_standardisation(model, groups)
    mean, deviation = model.standardisation.mean, model.standardisation.deviation
    if not (math.isfinite(mean) and math.isfinite(deviation) and deviation > 0):
        raise RecipeError(
            f"training diverged: the reward model's scores of its own pairs have mean {mean:g} and deviation "
            f"{deviation:g}; lower reward_model.learning_rate, which is {config.learning_rate:g}"
        )
    return keep.best or Ranking({})


def measure_standardisation(
    model: RewardModel, groups: Sequence[PairGroup], *, prompts_at_once: int = 32
) -> Standardisation:
    """Return mean and deviation of the raw scores, pooled over the chosen and rejected answers of `groups`."""
    model.standardisation = Standardisation()
    scores: list[Tensor] = []
    for start in range(0, len(groups), prompts_at_once):
        chunk = groups[start : start + prompts_at_once]
        scores += model.score(
            [g.chosen.prompt for g in chunk],
            [load_images(g.chosen.images) for g in chunk],
            [[g.chosen.chosen, *g.rejected] for g in chunk],
        )
    pooled = torch.cat(scores).double()
    return Standardisation(float(pooled.mean()), float(pooled.std()))
