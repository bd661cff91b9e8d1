"""Stage 4: accuracy with its controls, the gallery, and the summary; or any checkpoint on any questions."""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec
import torch
from torch import Tensor

from accord.data.questions import image_identity
from accord.data.sampling import sample_questions
from accord.errors import DataError, DataWarning, ReplyError
from accord.evaluation.accuracy import (
    ANSWERED_BY,
    answered_by_several,
    images_by_type,
    outcomes_by_type,
    question_only,
    shuffle_images,
    vqa_by_type,
)
from accord.evaluation.gallery import write_gallery
from accord.evaluation.markdown import escaped, markdown_table
from accord.evaluation.summary import (
    Accuracy,
    AuditedSite,
    EvaluationSummary,
    PolicySummary,
    Ranking,
    RouterSummary,
    SiteSummary,
    Summary,
    TrafficRow,
    VqaAccuracy,
    accuracy_by_image,
    headline,
    vqa_summary,
    write_summary,
)
from accord.federation.engine import Traffic
from accord.federation.messages import Absence, Card, CardRequest, check_card
from accord.methods import find_method, needed
from accord.methods.method import Method
from accord.models.generate import answer
from accord.models.load import load_model, parameter_count, tokenizer_of
from accord.pipeline.captions import right_by_type
from accord.pipeline.comparison import arm_accuracy
from accord.progress import stage_bar
from accord.recipe import Source
from accord.stages.job import Job, read_source
from accord.stages.projector import measured_projector
from accord.stages.routing import RouterMeasured, route, trained_router
from accord.stages.sites import open_federation
from accord.stages.traffic import load_all_traffic
from accord.types import Question, Subject
from accord.version import VERSION

CARD_SECONDS: Final = 60.0

ABSENT: Final = Card("", "unknown, the site was away", 0, 0, 0, False, {})

NO_MODEL: Final = Card("", "none, the method needs no reward model", 0, 0, 0, False, {})


def evaluate(job: Job) -> None:
    """Measure base and aligned policy with their controls, and write `summary.json` and the gallery."""
    recipe = job.recipe
    with job.doing("evaluation"):
        compared = {arm: arm_accuracy(job, arm) for arm in recipe.compare}
        questions = job.evaluated
        base, processor = load_model(recipe.policy.checkpoint)
        aligned, _ = load_model(str(job.need("policy", "accord align RECIPE", "align")))
        rounds = [("base", base, questions), ("aligned", aligned, questions)]
        if any(q.image is not None for q in questions):  # without images there is nothing to shuffle
            rounds.append(("shuffled_image", aligned, shuffle_images(questions, seed=recipe.seed)))
        answers: dict[str, list[str]] = {}
        with stage_bar("evaluation", len(rounds) * len(questions), quiet=job.quiet) as advance:
            for name, model, asked in rounds:
                given = answer(
                    model,
                    processor,
                    asked,
                    max_new_tokens=recipe.alignment.max_completion_length,
                    batch_size=recipe.alignment.questions_at_once,
                    on_batch=lambda n: advance(n),
                )
                answers[name] = [texts[0] for texts in given]
        known = [*job.questions.get("base", []), *job.questions["dev"]]
        answers["question_only"] = question_only(known, questions)
        images = images_by_type(questions, job.identify)  # those that shared an image share the one of the control
        measured = {
            name: accuracy_by_image(right_by_type(job, questions, given), images) for name, given in answers.items()
        }
        for name, result in measured.items():
            by_type = {kind: value.accuracy for kind, value in result.by_type.items()}
            job.log({"stage": "evaluation", "of": name, "accuracy_macro": result.macro, "accuracy": by_type})

        vqa = _vqa(questions, answers, job.identify) if recipe.evaluation.vqa_accuracy else {}
        for name, found in vqa.items():
            job.log({"stage": "evaluation", "of": name, "vqa_accuracy": found.macro})

        names = [site.name for site in recipe.sites]
        method = find_method(recipe.method, names)
        judge, weights = method.reward(job) if method.reward else None, None
        if judge is not None:
            weights = route(judge.router, questions, [[text] for text in answers["aligned"]])
            judge.engine.traffic = Traffic()  # the gallery's questions are for the page, not part of the run
        write_gallery(job.path, questions, answers["base"], answers["aligned"], judge, recipe.evaluation.gallery)
        write_summary(job.path / "summary.json", _summary(job, method, measured, compared, vqa, weights))


def _summary(
    job: Job,
    method: Method,
    measured: Mapping[str, Accuracy],
    compared: Mapping[str, Accuracy],
    vqa: Mapping[str, VqaAccuracy],
    weights: Tensor | None,
) -> Summary:
    recipe = job.recipe
    names = [site.name for site in recipe.sites]
    by_type: dict[str, list[Tensor]] = defaultdict(list)
    for q, row in zip(job.evaluated, [] if weights is None else weights, strict=weights is not None):
        by_type[q.question_type].append(row)
    trained = "sites" in needed(recipe, [recipe.method, *recipe.compare])
    cards = _cards(job, names) if trained else {}
    sites, constructed = [], False
    for config in recipe.sites:
        card = cards.get(config.name, ABSENT if trained else NO_MODEL)
        constructed = constructed or card.constructed
        macro = sum(card.ranking.values()) / len(card.ranking) if card.ranking else None
        sites.append(
            SiteSummary(
                name=config.name,
                architecture=card.architecture,
                checkpoint=config.checkpoint,
                parameters=card.parameters,
                questions=card.questions,
                pairs=card.pairs,
                ranking=Ranking(macro, card.ranking),
                privacy=card.privacy,
                attack=config.attack.kind if config.attack else "",
            )
        )
    manifest = json.loads((job.path / "manifest.json").read_text())
    policy, _ = job.policy
    # A router that was trained for compared methods alone is in their bytes.
    load_all_traffic(job, but=() if "router" in method.needs else ("router",))
    evaluation = EvaluationSummary(
        base=measured["base"],
        aligned=measured["aligned"],
        question_only=measured["question_only"],
        shuffled_image=measured.get("shuffled_image"),
        compare=compared,
        vqa=vqa,
    )
    traffic = tuple(
        TrafficRow(site, kind, c.messages, c.bytes_to_site, c.bytes_from_site, c.absences, c.refused)
        for (site, kind), c in sorted(job.traffic.counts.items())
    )
    return Summary(
        schema_version=1,
        name=recipe.name,
        seed=recipe.seed,
        accord_version=VERSION,
        created=manifest["started"],
        constructed_preferences=constructed,
        policy=PolicySummary(recipe.policy.checkpoint, type(policy).__name__, parameter_count(policy)),
        sites=tuple(sites),
        method=recipe.method,
        router=_router(job) if "router" in method.needs else None,
        evaluation=evaluation,
        routing={
            name: {site: float(torch.stack(rows).mean(0)[k]) for k, site in enumerate(names)}
            for name, rows in sorted(by_type.items())
        },
        traffic=traffic,
        seconds=job.run.seconds(),
        peak_memory_bytes=job.run.peak_memory_bytes(),
        **{**_findings(job, names), **headline(evaluation, traffic)},
        checkpoint=str(job.path / "policy"),
        versions={**manifest["versions"], "python": manifest["python"]},
        projector=measured_projector(job.path) if job.written else None,
    )


def _vqa(
    questions: Sequence[Question], answers: Mapping[str, Sequence[str]], identify: Callable[[Subject], str]
) -> dict[str, VqaAccuracy]:
    """Return the VQA accuracy of each policy and control over the questions that enough people answered."""
    several = [n for n, question in enumerate(questions) if answered_by_several(question)]
    if not several:
        warnings.warn(
            f"no test question has the answers of at least {ANSWERED_BY} people, so there is no VQA accuracy; give a "
            "list of answers to each, or take vqa_accuracy out of [evaluation]",
            DataWarning,
            stacklevel=2,
        )
        return {}
    asked = [questions[n] for n in several]
    images = images_by_type(asked, identify)
    return {
        name: vqa_summary(vqa_by_type(asked, [given[n] for n in several]), images) for name, given in answers.items()
    }


def _findings(job: Job, names: Sequence[str]) -> dict[str, Any]:
    """Return what the run's methods have learnt of the sites; its own comes before that of the compared ones."""
    stages = {"align": job.recipe.method} | {f"compare {arm}": arm for arm in job.recipe.compare}
    found: dict[str, Any] = {}
    for stage, name in stages.items():
        found = {**find_method(name, names).findings(job, stage, names), **found}
    return found


def _router(job: Job) -> RouterSummary:
    measured = msgspec.json.decode((job.path / "router" / "measured.json").read_bytes(), type=RouterMeasured)
    audit = {site: AuditedSite(each.taught, each.spoilt, each.named) for site, each in measured.audit.items()}
    return RouterSummary(job.recipe.router.rounds, measured.accuracy, parameter_count(trained_router(job)), audit)


def _cards(job: Job, names: Sequence[str]) -> dict[str, Card]:
    """Ask all sites to describe themselves; one that is away now has done its part, and the report goes without."""
    engine = open_federation(job)
    engine.traffic = Traffic()  # not part of the run
    requests = {name: CardRequest(f"card-{name}") for name in names}
    cards = {}
    for name, reply in engine.ask(requests, deadline=CARD_SECONDS).items():
        try:
            if isinstance(reply, Absence):
                raise ReplyError(reply.reason)
            cards[name] = check_card(requests[name], reply)
        except ReplyError as error:
            warnings.warn(
                f"site {name} did not describe itself ({error}); the report says so", DataWarning, stacklevel=2
            )
    return cards


def evaluate_checkpoint(
    checkpoint: str, data: str, split: str, *, limit: int, quiet: bool, vqa_accuracy: bool = False
) -> str:
    """Measure any checkpoint on any questions, with a shuffled-image control; return a Markdown table.

    With `vqa_accuracy` a line below it says VQAv2's accuracy, too.

    Raises:
        DataError: the data has no question of that split.
    """
    everything = read_source(Source() if data == "easy-vqa" else Source(kind="folder", path=data))
    questions = sample_questions([q for q in everything if q.split == split], limit, seed=0)
    if not questions:
        splits = sorted({q.split for q in everything})
        raise DataError(f"{data} has no question of split {split!r}; it has {', '.join(splits)}")
    model, processor = load_model(checkpoint)
    longest = max(len(tokenizer_of(processor)(q.answer)["input_ids"]) for q in everything) + 1
    images = images_by_type(questions, image_identity())
    columns: dict[str, Accuracy] = {}
    said: dict[str, list[str]] = {}
    with stage_bar("evaluation", 2 * len(questions), quiet=quiet) as advance:
        for name, asked in (("accuracy", questions), ("shuffled image", shuffle_images(questions, seed=0))):
            given = answer(model, processor, asked, max_new_tokens=longest, on_batch=lambda n: advance(n))
            said[name] = [texts[0] for texts in given]
            columns[name] = accuracy_by_image(outcomes_by_type(questions, said[name]), images)
    seen, blind = columns["accuracy"], columns["shuffled image"]
    rows = []
    for name, value in seen.by_type.items():
        interval = f"{value.accuracy:.1%} ({value.low:.1%} to {value.high:.1%})"
        rows.append([escaped(name), f"{value.n}", interval, f"{blind.by_type[name].accuracy:.1%}"])
    macro = f"{seen.macro:.1%} ({seen.macro_low:.1%} to {seen.macro_high:.1%})"
    rows.append(["macro", f"{seen.n}", macro, f"{blind.macro:.1%}"])
    shown = markdown_table(["question type", "n", "accuracy (95 % interval)", "shuffled image"], rows)
    note = (
        "The intervals are over the draw of test questions, clustered by image, or by text where there is no image: "
        f"{seen.n} questions in {seen.images} clusters."
    )
    found = _vqa(questions, said, image_identity()) if vqa_accuracy else {}
    lines = [
        f"VQA accuracy{'' if name == 'accuracy' else f', {name}'}: {each.macro:.1%} ({each.macro_low:.1%} to "
        f"{each.macro_high:.1%}), mean over types, {each.n} questions"
        for name, each in found.items()
    ]
    return "\n\n".join([shown, *lines, note])
