"""Stage 0, where a recipe asks for it: the sites train the policy's projector together, on captions that stay there.

    base checkpoint ──► projector drawn anew ──► R rounds, each over other captions ──► projector/checkpoint
                                                                                        the policy of all later stages

Its bounds are trained by the same code: every site for itself, or all captions at one place.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Final, cast

import msgspec
import torch
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from accord.data.sampling import sample_questions
from accord.errors import DataError, RecipeError
from accord.evaluation.accuracy import images_by_type, outcomes_by_type, shuffle_images
from accord.evaluation.captions import cider_d
from accord.evaluation.likelihood import answer_nll
from accord.evaluation.summary import (
    ProjectorMeasure,
    ProjectorRound,
    ProjectorSite,
    ProjectorSummary,
    accuracy_by_image,
)
from accord.federation.aggregation import Aggregation, shares
from accord.federation.engine import Engine, InProcessEngine
from accord.federation.messages import UpdateReply
from accord.federation.projector import LocalProjector, OnePass, ProjectorConfig, SameBase
from accord.federation.rounds import Probe, Server, federated_rounds
from accord.federation.weights import probe_of, set_trainable_weights, trainable_weights
from accord.models.generate import answer
from accord.models.load import Processor, load_config, load_model, save_model
from accord.models.made_up import made_up_loss
from accord.models.projector import train_projector_alone
from accord.progress import stage_bar
from accord.recipe import Recipe
from accord.runs import read_record, write_atomic
from accord.stages.job import NO_POLICY, PROJECTOR, Job
from accord.stages.traffic import save_traffic
from accord.stages.training import open_training
from accord.types import Question

TOGETHER: Final = "all sites"
"""What stands for a site where all captions are in one place."""


def check_projector(recipe: Recipe, *, elsewhere: bool = False, alone: bool = False) -> None:
    """Refuse a [projector] table that cannot be done, before anything is trained.

    Args:
        recipe: as it was written.
        elsewhere: whether the sites are other organisations'.
        alone: whether the stage is run alone, and no policy is aligned afterwards.

    Raises:
        RecipeError: names what cannot be done, and the remedy.
    """
    if recipe.projector is None:
        if alone:
            raise RecipeError("the recipe trains no projector; add a [projector] table")
        return
    training = recipe.projector.training
    if not elsewhere and not any(site.needs_questions for site in recipe.sites):
        raise RecipeError(
            "a projector is trained on the sites' private questions, and no site holds any but its own pairs; give the "
            "sites some, or leave [projector] out"
        )
    if elsewhere and training != "federated":
        raise RecipeError(
            f"projector.training = {training!r} is a bound that one process measures; run it without --engine flare, "
            'or say training = "federated"'
        )
    if training == "local" and not alone:
        raise RecipeError(f'{NO_POLICY}; measure it with `accord pretrain-projector`, or say training = "federated"')


def projector_training(job: Job, name: str, loaded: tuple[PreTrainedModel, Processor] | None = None) -> LocalProjector:
    """Return a site's half of the projector's training, on its private questions.

    Args:
        job: the run, or a site's own.
        name: the site's.
        loaded: a model that sites of this process share; by default the policy's checkpoint is loaded.

    Raises:
        RecipeError: the recipe trains no projector.
        DataError: the site has no captions, or fewer than there are rounds.
    """
    recipe = job.written or job.recipe
    if recipe.projector is None:
        raise RecipeError("the recipe trains no projector; add a [projector] table")
    if loaded is None:
        loaded = load_model(recipe.policy.checkpoint, trainable=True)
        train_projector_alone(loaded[0])
    return LocalProjector(*loaded, job.private[name], recipe.projector, seed=recipe.seed, site=name)


def pretrain_projector(job: Job) -> ProjectorSummary:
    """Train the policy's projector with all sites, keep the checkpoint, and return what was measured.

    An attempt that was broken off starts over: the rules of the server remember more than the weights.

    Raises:
        RecipeError: as `check_projector`.
        CheckpointError: the policy has no projector.
        DataError: a site has no captions, or fewer than there are rounds; or no dev question has an image.
        RunError: no site answered in a round.
    """
    recipe = job.written or job.recipe
    config, seed = recipe.projector, recipe.seed
    if config is None:
        raise RecipeError("the recipe trains no projector; add a [projector] table")
    with job.doing("projector", needs=()):
        shutil.rmtree(job.path / "projector", ignore_errors=True)
        job.traffic.counts.clear()
        set_seed(seed)
        model, processor = load_model(recipe.policy.checkpoint, trainable=True)
        train_projector_alone(model, seed=seed if config.initial == "random" else None)
        start = trainable_weights(model)
        questions = _asked(job, config)
        rounds, ends, averaging = list[ProjectorRound](), [], config.averaging
        if config.training != "federated":  # whoever trains alone keeps what it has trained
            averaging = replace(averaging, aggregation=Aggregation())
        engine, groups = _open(job, config, model, processor)
        probe = probe_of(model, made_up_loss(model, processor))
        base = None if job.engine is None else SameBase(model, processor)  # sites of this process share the model
        with stage_bar("projector", config.averaging.rounds * len(groups), quiet=job.quiet) as advance:
            before = _measure(job, questions, model, processor, [start])
            for sites in groups:

                def on_round(number: int, each: ProjectorRound) -> None:
                    advance(1, text=f"loss {each.loss:.3f}")
                    if len(groups) == 1:
                        _log(job, number, each)

                end, told = _train(
                    engine, sites, start, averaging, seed=seed, server=base, probe=probe, on_round=on_round
                )
                ends.append(end)
                rounds = _beside(rounds, told)
        if len(groups) > 1:
            for number, each in enumerate(rounds, start=1):
                _log(job, number, each)
        after = _measure(job, questions, model, processor, ends)
        summary = ProjectorSummary(
            checkpoint=recipe.policy.checkpoint,
            training=config.training,
            rule=averaging.aggregation.rule,
            client=config.client.rule,
            initial=config.initial,
            parameters=sum(weight.numel() for weight in start.values()),
            before=before,
            after=after,
            rounds=tuple(rounds),
            silos=_silos(job),
        )
        for name, measured in (("before", before), ("after", after)):
            job.log({"stage": "projector", "step": config.averaging.rounds, "of": name, **_numbers(measured)})
        _save(job, recipe, model, processor, ends, groups)
        write_atomic(job.path / MEASURED, msgspec.json.format(msgspec.json.encode(summary)) + b"\n")
        save_traffic(job, "projector")
    return summary


def _train(
    engine: Engine,
    sites: Sequence[str],
    start: Mapping[str, Tensor],
    averaging: OnePass,
    *,
    seed: int,
    server: Server | None,
    probe: Probe,
    on_round: Callable[[int, ProjectorRound], None],
) -> tuple[dict[str, Tensor], list[ProjectorRound]]:
    """Return what `sites` make of the weights `start` together, and what every round was like."""
    aggregate = averaging.aggregation.start(seed)
    told: list[ProjectorRound] = []

    def note(number: int, replies: Mapping[str, UpdateReply]) -> None:
        told.append(_round(replies, averaging.examples_at_most, getattr(aggregate, "diagnostics", [])))
        on_round(number, told[-1])

    end = federated_rounds(
        engine,
        "projector",
        start,
        averaging.rounds,
        seed=seed,
        aggregate=aggregate,
        bits=averaging.aggregation.bits,
        sites=sites,
        most=averaging.examples_at_most,
        server=server,
        probe=probe,
        on_replies=note,
    )
    return end, told


MEASURED: Final = "projector/measured.json"


def measured_projector(run: Path) -> ProjectorSummary | None:
    """Return what a run folder says of its projector; None where it trains none.

    Raises:
        RunError: the file is damaged.
    """
    return read_record(run / MEASURED, ProjectorSummary, remedy="run `accord pretrain-projector` again")


def _open(
    job: Job, config: ProjectorConfig, model: PreTrainedModel, processor: Processor
) -> tuple[Engine, list[list[str]]]:
    """Return what reaches the sites, and the groups of them that train together."""
    names = [site.name for site in job.recipe.sites]
    if job.engine is not None:
        job.engine.traffic = job.traffic
        return job.engine, [names]
    if config.training == "central":
        captions = [q for name in names for q in job.private[name]]
        local = LocalProjector(model, processor, captions, config, seed=job.recipe.seed)
        return InProcessEngine({TOGETHER: cast(Callable[..., UpdateReply], local)}), [[TOGETHER]]
    engine = open_training(job, lambda name: {"projector": projector_training(job, name, (model, processor))})
    if config.training == "local":
        engine.traffic = InProcessEngine({}).traffic  # nothing crosses a border
        return engine, [[name] for name in names]
    return engine, [names]


def _silos(job: Job) -> dict[str, tuple[tuple[float, float], ...]]:
    """Return where each site's pictures lie on two axes, if the recipe deals them by clusters and they are here."""
    if job.engine is not None or job.recipe.dealing is None or job.recipe.dealing.by != "clusters":
        return {}
    return {name: tuple((x, y) for x, y in points.tolist()) for name, points in job.silos.points.items()}


def _asked(job: Job, config: ProjectorConfig) -> list[Question]:
    """Return the questions by which the projector is measured."""
    split = config.evaluate_split
    pictured = [q for q in job.questions[split] if q.image is not None]
    if not pictured:
        raise DataError(f"no {split} question has an image to measure a projector by; give the questions' source some")
    return sample_questions(pictured, config.evaluate_on, seed=0)


def _measure(
    job: Job,
    questions: Sequence[Question],
    model: PreTrainedModel,
    processor: Processor,
    projectors: Sequence[Mapping[str, Tensor]],
) -> ProjectorMeasure:
    """Measure the model with each of these projectors; of several, their mean."""
    settings = job.recipe.alignment
    other = shuffle_images(questions, seed=job.recipe.seed)
    images = images_by_type(questions, job.identify)
    nll, shuffled, cider = [], [], list[float]()
    outcomes: dict[str, list[int]] = {}
    for weights in projectors:
        set_trainable_weights(model, weights)
        nll.append(answer_nll(model, processor, questions, batch_size=settings.questions_at_once))
        shuffled.append(answer_nll(model, processor, other, batch_size=settings.questions_at_once))
        said = answer(
            model,
            processor,
            questions,
            max_new_tokens=settings.max_completion_length,
            batch_size=settings.questions_at_once,
        )
        texts = [each[0] for each in said]
        for kind, found in outcomes_by_type(questions, texts).items():
            outcomes.setdefault(kind, []).extend(found)
        if any(q.references for q in questions):
            cider += cider_d(texts, [(q.answer, *q.references) for q in questions])
    many = len(projectors)
    right = accuracy_by_image(outcomes, {kind: list(numbers) * many for kind, numbers in images.items()})
    return ProjectorMeasure(sum(nll) / many, sum(shuffled) / many, right, fmean(cider) if cider else None)


def _round(
    replies: Mapping[str, UpdateReply], most: int, diagnostics: Sequence[Mapping[str, object]]
) -> ProjectorRound:
    """Return what the sites of a round replied, and what the server's rule says of it if it says anything."""
    told = diagnostics[-1] if diagnostics else {}
    weights = cast(Sequence[float] | None, told.get("weights"))
    if weights is None:
        weights = shares([min(reply.examples, most or reply.examples) for reply in replies.values()])
    return ProjectorRound(
        loss=sum(reply.loss / len(replies) for reply in replies.values()),  # which cannot overflow
        sites={
            name: ProjectorSite(reply.examples, reply.loss, reply.distance, float(weight))
            for (name, reply), weight in zip(replies.items(), weights, strict=True)
        },
        beta=_mean(told.get("beta")),
        cosine=_mean(told.get("cosine")),
        lag=_mean(told.get("lag")),
    )


def _mean(told: object) -> float | None:
    """Return a number that is told for all of the projector, or the mean of those told by matrix; None of nothing."""
    if isinstance(told, Mapping):
        return sum(told.values()) / len(told) if told else None
    return float(told) if isinstance(told, int | float) else None


def _beside(rounds: Sequence[ProjectorRound], more: Sequence[ProjectorRound]) -> list[ProjectorRound]:
    """Return the rounds of sites that train at the same time, each for itself."""
    if not rounds:
        return list(more)
    merged = []
    for one, other in zip(rounds, more, strict=True):
        sites = {**one.sites, **other.sites}
        merged.append(ProjectorRound(sum(site.loss for site in sites.values()) / len(sites), sites))
    return merged


def _log(job: Job, number: int, each: ProjectorRound) -> None:
    record = {"stage": "projector", "step": number, **cast(dict[str, object], msgspec.to_builtins(each))}
    job.log({key: value for key, value in record.items() if value is not None})


def _numbers(measured: ProjectorMeasure) -> dict[str, object]:
    right = measured.accuracy
    by_type = {kind: value.accuracy for kind, value in right.by_type.items()}
    shuffled = measured.shuffled_nll
    numbers = {"nll": measured.nll, "shuffled_nll": shuffled, "accuracy_macro": right.macro, "accuracy": by_type}
    return numbers if measured.cider is None else {**numbers, "cider": measured.cider}


def _save(
    job: Job,
    recipe: Recipe,
    model: PreTrainedModel,
    processor: Processor,
    ends: Sequence[Mapping[str, Tensor]],
    groups: Sequence[Sequence[str]],
) -> None:
    """Write the model in its checkpoint's own type: one, or one for every site that trained for itself."""
    dtype = load_config(recipe.policy.checkpoint).dtype or torch.float32
    model.to(dtype)  # type: ignore[arg-type]  # the signature of transformers' wrapper has lost `self`
    for weights, sites in zip(ends, groups, strict=True):
        set_trainable_weights(model, weights)
        place = PROJECTOR if len(groups) == 1 else f"projector/sites/{sites[0]}"
        save_model(model, processor, job.path / place)
