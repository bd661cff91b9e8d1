"""FedBiscuit: sites train binary selectors in groups; their majority labels the server's own pairs for DPO.

    s_u(x, y_A, y_B) = softmax over the letters A and B of the base under adapter u, asked which answer is better
    L_k(u) = − E log s_u(the letter of y⁺ | x, y⁺, y⁻ in random order)                   over site k's own pairs

    warm-up   every selector u = 1 … U in turn, by all sites:    w_u ← Σ_k (n_k / Σ_j n_j) w_{u,k}
    regroup   site k goes to argmin_u L_k(u), where there is room; then FedAvg within each group, and again
    label     the base answers public prompts twice; chosen is what most selectors take for better
    align     DPO of the base on these pairs, at the server

Only selectors travel, LoRA adapters of the public base, and for regrouping one loss per site and selector comes back.

Source: Wu et al. 2024, arXiv 2407.03038, and its code: regrouping is its balanced greedy assignment. Differs: all sites
take part in every round (theirs are 5 to 10 of 53 to 200), updates count by n_k (theirs equally), and question types
come equally often. What a selector is, and how several vote, is in `accord.alignment.selector`.
"""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from accord.alignment.dpo import AdapterDpo
from accord.alignment.selector import Comparison, Selector, Weights, label_pairs, selector_loss
from accord.data.images import load_images
from accord.data.sampling import draw_balanced
from accord.errors import DataError, ReplyError, RunError, check_least, check_positive
from accord.federation.asking import ask_checked
from accord.federation.engine import Engine
from accord.federation.local import Averaging, begin, finish, take_steps
from accord.federation.messages import Reply, UpdateReply, UpdateRequest, check_kind
from accord.federation.rounds import Probe, federated_rounds
from accord.federation.weights import probe_of, to_bytes, trainable_weights
from accord.methods.method import Method, Table
from accord.models.finetune import SYMMETRIES, transform
from accord.models.generate import answer
from accord.models.load import LoraSettings, Processor, load_model, seeded_adapter
from accord.models.made_up import made_up_loss
from accord.progress import ProgressBarCallback
from accord.stages.alignment import Aligned
from accord.stages.job import Job
from accord.stages.sites import site_pairs
from accord.stages.training import open_training, rounds_told
from accord.types import PreferencePair, Question

ONLY_LOSS = save({"local_steps": torch.tensor(0)})
"""What a request carries beside a selector's weights to learn its loss at a site, and nothing else."""


@dataclass(frozen=True)
class FedBisConfig:
    """How one selector is trained, and what is done with it."""

    averaging: Averaging = field(default_factory=lambda: Averaging(rounds=35, local_steps=5, learning_rate=3e-3))
    prompts: int = 1500  # public ones that the base policy answers
    answers: int = 2  # per prompt, of which all pairs are labelled
    temperature: float = 1.0  # of the answers
    dpo_steps: int = 150
    dpo_learning_rate: float = 1e-3
    beta: float = 0.1  # β of DPO
    sft: float = 0.0  # α, how much the likelihood of the chosen answers counts beside
    lora: LoraSettings = field(default_factory=LoraSettings)  # of every selector, and of the policy

    def __post_init__(self) -> None:
        """Refuse counts that leave nothing to label or to train."""
        check_least(self, prompts=1, answers=2, dpo_steps=1, beta=0, sft=0)
        check_positive(self, "temperature", "dpo_learning_rate")


@dataclass(frozen=True)
class FedBiscuitConfig(FedBisConfig):
    """How several selectors are trained besides: in groups of sites, in fewer rounds of each."""

    averaging: Averaging = field(default_factory=lambda: Averaging(rounds=20, local_steps=5, learning_rate=3e-3))
    selectors: int = 3  # U
    warmup_rounds: int = 5  # of every selector, by all sites
    regroup_every: int = 5  # rounds
    compare_on: int = 128  # a site's pairs on which it compares the selectors

    def __post_init__(self) -> None:
        """Refuse counts that leave nothing to train, to compare or to label."""
        super().__post_init__()
        check_least(self, selectors=1, warmup_rounds=0, regroup_every=1, compare_on=1)

    @property
    def rounds(self) -> int:
        """All rounds, the warm-up included."""
        return self.selectors * self.warmup_rounds + self.averaging.rounds


class LocalSelector:
    """A site's half: local steps of a selector on the site's pairs, which stay here, or its loss on some of them.

    Args:
        selector: the public base with an adapter; sites in one process may share it, as every visit brings all weights.
        pairs: the site's private pairs, each with one image.
        config: settings.
    """

    def __init__(self, selector: Selector, pairs: Sequence[PreferencePair], config: FedBiscuitConfig) -> None:
        if not pairs:
            raise DataError("cannot train a selector on 0 preference pairs; give the site pairs, or leave it out")
        self.selector, self.pairs, self.config = selector, pairs, config
        self.known = random.Random(0).sample(list(pairs), min(config.compare_on, len(pairs)))

    def __call__(self, request: UpdateRequest, /) -> UpdateReply:
        """Return what local steps change in the selector of `request`; or only its loss, if that is all that is asked.

        Raises:
            CheckpointError: the weights are not those of this site's selector.
        """
        model, config = self.selector.model, self.config.averaging
        start = begin(model, request)
        if request.state == ONLY_LOSS:
            return UpdateReply(request.id, b"", len(self.pairs), self.loss())
        loss = take_steps(
            model,
            self._draw(request.seed),
            self._loss,
            torch.optim.AdamW(
                [p for p in model.parameters() if p.requires_grad],
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
            ),
            seed=request.seed,
            accumulate=config.gradient_accumulation,
        )
        return finish(model, request, start, examples=len(self.pairs), loss=loss, steps=config.local_steps)

    @torch.no_grad()
    def loss(self) -> float:
        """Return the selector's mean loss on the pairs that are kept for it; A is the better one in every other."""
        size = self.config.averaging.batch_size
        items = [(pair, n % 2, 0) for n, pair in enumerate(self.known)]
        batches = [items[n : n + size] for n in range(0, len(items), size)]
        self.selector.model.eval()
        return sum(float(self._loss(batch)) * len(batch) for batch in batches) / len(items)

    def _draw(self, seed: int) -> list[list[tuple[PreferencePair, int, int]]]:
        """Return the batches of a round: pairs, each with which letter is better and its symmetry."""
        generator, config = random.Random(seed), self.config.averaging
        choices = len(SYMMETRIES) if config.symmetries else 1
        order = draw_balanced([pair.question_type for pair in self.pairs], config.drawn, generator)
        items = [(self.pairs[i], generator.randrange(2), generator.randrange(choices)) for i in order]
        return [items[n : n + config.batch_size] for n in range(0, len(items), config.batch_size)]

    def _loss(self, items: Sequence[tuple[PreferencePair, int, int]]) -> Tensor:
        comparisons = []
        for pair, better, symmetry in items:
            first, second = (pair.rejected, pair.chosen) if better else (pair.chosen, pair.rejected)
            comparisons.append(Comparison(pair.prompt, transform(load_images(pair.images), symmetry), first, second))
        log_odds = self.selector(comparisons)
        return selector_loss(log_odds, torch.tensor([better for _, better, _ in items], device=log_odds.device))


def assign_sites(losses: Mapping[str, Sequence[float]], generator: random.Random) -> list[list[str]]:
    """Return the sites of each selector, `[U]`: every site where its loss is least, as far as there is room.

    Until all are placed: every site without a place stands by the open selector with its least loss; the selector with
    most sites, the first of them, keeps ⌈sites left / selectors open⌉ and is closed.

    Args:
        losses: L_k(u) of every site, `[U]`.
        generator: of the order in which sites take their places.
    """
    waiting = sorted(losses)
    generator.shuffle(waiting)
    left, count = len(waiting), len(losses[waiting[0]])
    standing: dict[int, list[str]] = {u: [] for u in range(count)}  # by the selectors that are open
    groups: list[list[str]] = [[] for _ in range(count)]
    while left:
        room = math.ceil(left / len(standing))
        for site in waiting:
            standing[min(standing, key=losses[site].__getitem__)].append(site)
        fullest = max(standing, key=lambda u: len(standing[u]))
        candidates = standing.pop(fullest)
        groups[fullest], waiting = candidates[:room], candidates[room:]
        left -= len(groups[fullest])
    return groups


def ask_losses(engine: Engine, selectors: Sequence[Weights], number: int) -> dict[str, list[float]]:
    """Return the loss of every selector at every site, before round `number`; a site that fails once is left out.

    Raises:
        RunError: no site answered.
    """
    losses: dict[str, list[float]] = {site: [] for site in engine.sites}
    for u, weights in enumerate(selectors):
        sent = to_bytes(weights)
        requests = {
            site: UpdateRequest(f"selector-{u}-{number}-{site}-loss", "selector", number, sent, 0, ONLY_LOSS, u)
            for site in losses
        }
        consequence = f"it gave no loss of selector {u} and is in no group until the next regrouping"
        given = ask_checked(engine, requests, _check_loss, what="a loss", consequence=consequence)
        losses = {site: [*losses[site], loss] for site, loss in given.items()}
    if not losses:
        raise RunError(f"no site answered before selector round {number + 1}; check the sites' logs and start again")
    return losses


def _check_loss(request: UpdateRequest, reply: Reply) -> float:
    loss = check_kind(request, reply, UpdateReply, "a loss").loss
    if not math.isfinite(loss):
        raise ReplyError(f"a loss of {loss}, which must be finite")
    return loss


def train_selectors(
    engine: Engine,
    selectors: Sequence[Weights],
    config: FedBiscuitConfig,
    *,
    seed: int,
    probe: Probe | None = None,
    on_round: Callable[[int, float], None] = lambda _round, _loss: None,
) -> list[Weights]:
    """Return `selectors` after their warm-up and the rounds in groups.

    Args:
        engine: its sites answer the task "selector" with `LocalSelector`.
        selectors: U adapters to start from.
        config: settings.
        seed: of the sites' draws and of the order in which they are grouped.
        probe: as in `federated_rounds`.
        on_round: told the round (from 1, the warm-up included) and the mean loss of the sites that answered.

    Raises:
        RunError: no site answered in a round.
    """
    trained, generator, done = list(selectors), random.Random(seed), 0
    rules = [config.averaging.aggregation.start(seed) for _ in trained]  # each selector is a training of its own
    bits = config.averaging.aggregation.bits
    for u in range(len(trained)):
        if config.warmup_rounds:
            trained[u] = federated_rounds(
                engine,
                "selector",
                trained[u],
                config.warmup_rounds,
                seed=seed,
                aggregate=rules[u],
                bits=bits,
                first=done,
                group=u,
                most=config.averaging.examples_at_most,
                probe=probe,
                on_round=on_round,
            )
        done += config.warmup_rounds
    groups: list[list[str]] = []
    for t in range(config.averaging.rounds):
        if len(trained) == 1:
            groups = [list(engine.sites)]
        elif t % config.regroup_every == 0:
            groups = assign_sites(ask_losses(engine, trained, done), generator)
        losses: list[float] = []
        failed: RunError | None = None
        for u, sites in enumerate(groups):
            if not sites:
                continue
            try:
                trained[u] = federated_rounds(
                    engine,
                    "selector",
                    trained[u],
                    1,
                    seed=seed,
                    aggregate=rules[u],
                    bits=bits,
                    first=done,
                    group=u,
                    sites=sites,
                    most=config.averaging.examples_at_most,
                    probe=probe,
                    on_round=lambda _, loss: losses.append(loss),  # noqa: B023
                )
            except RunError as error:  # a group may be one site, which sits out this round
                failed = error
        if failed and not losses:
            raise failed
        done += 1
        on_round(done, sum(losses) / len(losses))
    return trained


def train_biscuit(
    engine: Engine,
    model: PreTrainedModel,
    processor: Processor,
    questions: Sequence[Question],
    config: FedBiscuitConfig,
    *,
    seed: int,
    max_new_tokens: int,
    questions_at_once: int = 128,
    out: Path,
    on_round: Callable[[int, float], None] = lambda _round, _loss: None,
    callbacks: Sequence[TrainerCallback] = (),
) -> PreTrainedModel:
    """Return `model` after DPO on pairs that the selectors of the sites of `engine` have labelled.

    Args:
        engine: its sites answer the task "selector" with `LocalSelector`.
        model: the base policy, changed in place.
        processor: its processor.
        questions: the server's public ones, whose answers are not looked at.
        config: settings, the same as the sites'.
        seed: of all that is drawn.
        max_new_tokens: length limit of an answer.
        questions_at_once: prompts that the policy answers at once.
        out: scratch folder of the DPO trainer.
        on_round: told the round (from 1, of `config.rounds`) and the mean loss of the sites that answered.
        callbacks: trainer callbacks of the DPO, such as a progress bar.

    Raises:
        RunError: no site answered in a round.
        DataError: the policy gives the same answers to every prompt.
        RecipeError: the adapter's `target_modules` fit nothing in the policy.
    """
    fresh = []
    for u in range(config.selectors):
        adapted = seeded_adapter(model, config.lora, seed * 101 + u)
        fresh.append(trainable_weights(adapted))
        adapted.unload()
    adapted = seeded_adapter(model, config.lora, seed)
    probe = probe_of(adapted, made_up_loss(adapted, processor))
    selectors = train_selectors(engine, fresh, config, seed=seed, probe=probe, on_round=on_round)
    adapted.unload()
    order = draw_balanced([q.question_type for q in questions], config.prompts, random.Random(seed))
    asked = [questions[i] for i in order]
    answers = answer(
        model,
        processor,
        asked,
        max_new_tokens=max_new_tokens,
        samples=config.answers,
        temperature=config.temperature,
        seed=seed,
        batch_size=questions_at_once,
    )
    adapted = seeded_adapter(model, config.lora, seed)
    pairs = label_pairs(Selector(adapted, processor), selectors, asked, answers, batch_size=config.averaging.batch_size)
    adapted.unload()
    if not pairs:
        raise DataError(
            f"the policy gives the same {config.answers} answers to each of {len(asked)} prompts, and nothing is to be "
            "labelled; raise fedbiscuit.temperature, fedbiscuit.answers or fedbiscuit.prompts"
        )
    dpo = AdapterDpo(
        model,
        processor,
        config.lora,
        beta=config.beta,
        sft=config.sft,
        batch_size=config.averaging.batch_size,
        accumulate=config.averaging.gradient_accumulation,
        seed=seed,
        out=out,
    )
    dpo.train(pairs, steps=config.dpo_steps, learning_rate=config.dpo_learning_rate, seed=seed, callbacks=callbacks)
    return dpo.merged()


SETTINGS: Final = Table("fedbiscuit", FedBiscuitConfig)


def biscuit(job: Job, stage: str, config: FedBiscuitConfig | None = None) -> Aligned:
    """Let selectors of groups of sites label the server's own pairs, and take DPO steps there."""
    config, checkpoint = config or SETTINGS.of(job.recipe), job.recipe.policy.checkpoint
    job.run.truncate(stage)
    model, processor = load_model(checkpoint)
    selector = Selector(seeded_adapter(load_model(checkpoint)[0], config.lora, job.recipe.seed), processor)
    scratch = job.path / "checkpoints" / stage
    with (
        rounds_told(job, stage, config.rounds, about="selectors") as on_round,
        ProgressBarCallback(f"{stage}: DPO", quiet=job.quiet) as bar,
    ):
        engine = open_training(job, lambda site: {"selector": LocalSelector(selector, site_pairs(job, site), config)})
        trained = train_biscuit(
            engine,
            model,
            processor,
            job.prompts,
            config,
            seed=job.recipe.seed,
            max_new_tokens=job.recipe.alignment.max_completion_length,
            questions_at_once=job.recipe.alignment.questions_at_once,
            out=scratch,
            on_round=on_round,
            callbacks=[bar],
        )
    shutil.rmtree(scratch, ignore_errors=True)
    return trained, processor


METHODS: Final = {
    "fedbiscuit": Method(
        biscuit,
        "nothing: selectors of groups of sites label the server's own pairs, then DPO",
        needs=frozenset({"private"}),
        grpo=lambda recipe: None,
        lora=lambda recipe: SETTINGS.of(recipe).lora,
        tables=(SETTINGS,),
        steps=lambda recipe: SETTINGS.of(recipe).rounds,
        training=lambda recipe: (
            f"at the sites: {SETTINGS.of(recipe).rounds} rounds of {SETTINGS.of(recipe).averaging.local_steps} local "
            f"steps of {SETTINGS.of(recipe).selectors} selectors; "
            f"at the server: {SETTINGS.of(recipe).dpo_steps} steps of DPO"
        ),
    )
}
