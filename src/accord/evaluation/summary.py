"""State a run's result as one small record, `summary.json`, with an interval beside every accuracy.

Per question type, with p = correct / n and z = 1.96, the Wilson score interval (Wilson 1927, "Probable inference, the
law of succession, and statistical inference", JASA 22:209, https://doi.org/10.1080/01621459.1927.10502953; recommended
for small n by Brown, Cai and DasGupta 2001, https://doi.org/10.1214/ss/1009213286):

    (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)

The macro mean over T types is a mean of independent strata with equal weights, so its variance is
Σ_t p_t(1-p_t)/n_t / T² (Cochran 1977, *Sampling Techniques*, ch. 5, without the finite-population term), and its
interval mean ± z √variance.

Both take every question for one of its own. Where several are about one image they are clustered by image instead
(`accuracy_by_image`): Wilson's with the effective number of questions, the macro mean's with the cluster-robust
standard error (`accord.evaluation.clusters`, Miller 2024, https://arxiv.org/abs/2411.00640).

All cover the draw of the test questions alone. They say nothing of another training seed: run several seeds and compare
them with `accord.evaluation.report.compare_runs`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from accord.errors import DataError, RunError
from accord.evaluation.clusters import clustered_error, effective_number
from accord.rewards.certificate import Certificate
from accord.runs import write_atomic

Z_95 = 1.959963984540054
"""The 97.5 % point of the standard normal distribution: a two-sided 95 % interval."""

Share: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]
Positive: TypeAlias = Annotated[int, msgspec.Meta(ge=1)]
# A weight summed in float32 may exceed 1 by rounding, so it has no upper bound.
NonNegative: TypeAlias = Annotated[float, msgspec.Meta(ge=0)]


@dataclass(frozen=True, slots=True)
class TypeAccuracy:
    """Accuracy on one question type with its 95 % Wilson interval, in 0..1, and its numbers of questions."""

    accuracy: Share
    n: Positive
    correct: Count
    low: Share
    high: Share
    effective_n: NonNegative | None = None  # questions in effect, by image; None where the images are not known


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Accuracy by question type, their unweighted mean (`macro`) with its interval, and over all questions."""

    n: Positive
    macro: Share
    macro_low: Share
    macro_high: Share
    overall: Share
    by_type: Annotated[Mapping[str, TypeAccuracy], msgspec.Meta(min_length=1)]
    images: Positive | None = None  # that the questions are about; None where they are not known
    macro_error: NonNegative | None = None  # standard error of `macro`, clustered by image; None likewise


@dataclass(frozen=True, slots=True)
class PolicySummary:
    """The model that was aligned: where it started from, its transformers class, its number of parameters."""

    checkpoint: str
    architecture: str
    parameters: Count


@dataclass(frozen=True, slots=True)
class Ranking:
    """Share of a site's dev questions whose right answer its reward model scores above all other common answers."""

    macro: Share | None  # None, and by_type empty, where no dev question is of the site's kind
    by_type: Mapping[str, Share]


@dataclass(frozen=True, slots=True)
class SiteSummary:
    """One site: what it holds, and its reward model."""

    name: str
    architecture: str
    checkpoint: str
    parameters: Count
    questions: Count
    pairs: Count
    ranking: Ranking
    privacy: Certificate | None = None  # the guarantee that its reward model carries, if any
    attack: str = ""  # the kind of lie that the recipe had it tell, in a trial; empty for none


@dataclass(frozen=True, slots=True)
class AuditedSite:
    """What a site's updates did to the server's labelled questions, in nats of mean loss, added up over the rounds."""

    taught: float  # of its own kinds
    spoilt: float  # over all kinds
    named: Count  # the round after which it was named as one that may poison the router; 0 for never


@dataclass(frozen=True, slots=True)
class RouterSummary:
    """The router after its federated rounds; `accuracy`: share of dev answers sent to a fitting site."""

    rounds: Count
    accuracy: Share
    parameters: Count
    audit: Mapping[str, AuditedSite] = field(default_factory=dict)  # by site that was judged


@dataclass(frozen=True, slots=True)
class VqaAccuracy:
    """VQAv2's accuracy by question type, and their unweighted mean with its interval, clustered by image."""

    n: Positive  # questions that at least four people answered
    macro: Share
    macro_low: Share
    macro_high: Share
    by_type: Annotated[Mapping[str, Share], msgspec.Meta(min_length=1)]


@dataclass(frozen=True, slots=True)
class EvaluationSummary:
    """Accuracy on test questions; None where it was not measured, `compare` empty where no other method was run."""

    base: Accuracy | None
    aligned: Accuracy
    question_only: Accuracy | None
    shuffled_image: Accuracy | None
    compare: Mapping[str, Accuracy]
    vqa: Mapping[str, VqaAccuracy] = field(default_factory=dict)  # of base, aligned and the controls, by their names


@dataclass(frozen=True, slots=True)
class TrafficRow:
    """Bytes that crossed the border between the server and one site in messages of one kind."""

    site: str
    kind: str
    messages: Count
    bytes_to_site: Count
    bytes_from_site: Count
    absences: Count
    refused: Count = 0


@dataclass(frozen=True, slots=True)
class Graded:
    """How many of its questions of one type a site answered right."""

    correct: Count
    n: Positive


@dataclass(frozen=True, slots=True)
class CompetenceSummary:
    """Who is good at what: how the sites answered the server's auxiliary questions, by which experts are chosen."""

    neighbours: Positive
    experts: Positive
    items: Annotated[Mapping[str, Positive], msgspec.Meta(min_length=1)]  # questions of each type
    sites: Mapping[str, Mapping[str, Graded]]  # by type; none for a site that did not answer
    answers: Mapping[str, str]  # a letter for each question, type after type: 1 right, 0 wrong, - not answered


@dataclass(frozen=True, slots=True)
class ProjectorSite:
    """What a site did in a round of the projector's training, and what weight the server gave it."""

    examples: Positive
    loss: float  # mean, nats per token, as the site says
    distance: NonNegative | None  # d_k between what images and text become; None where it was not sent
    weight: float


@dataclass(frozen=True, slots=True)
class ProjectorRound:
    """One round of the projector's training: the sites that answered, and what the server's rule says of itself."""

    loss: float  # mean of the sites'
    sites: Mapping[str, ProjectorSite]
    beta: float | None = None  # how much of the last round's basis is kept, mean over the matrices
    cosine: float | None = None  # of the basis with the last round's, likewise
    lag: float | None = None  # distance of the new weights to the plain weighted average, over that one's norm


@dataclass(frozen=True, slots=True)
class ProjectorMeasure:
    """How well a projector lets the frozen language model answer held-out questions."""

    nll: NonNegative  # nats per token of the reference answers
    shuffled_nll: NonNegative  # the same with every image replaced by another one
    accuracy: Accuracy
    cider: NonNegative | None = None  # mean CIDEr-D, 0 to 10, where an image has several reference answers


@dataclass(frozen=True, slots=True)
class ProjectorSummary:
    """How the policy's projector was trained before all else."""

    checkpoint: str  # where its policy started from
    training: Literal["federated", "local", "central"]
    rule: str  # the server's
    client: str  # the sites'
    initial: Literal["random", "keep"]
    parameters: Count
    before: ProjectorMeasure
    after: ProjectorMeasure
    rounds: tuple[ProjectorRound, ...]
    silos: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)  # pictures of clusters, by site


@dataclass(frozen=True, slots=True)
class TrustSummary:
    """What hidden questions told of the sites: how many there were, and by site and question type what came of them."""

    canaries: Count
    sites: Mapping[str, Mapping[str, Share]]  # share of wrong answers ranked below the right one, as it was in the end
    aside: Mapping[str, tuple[str, ...]]  # question types in which a site ranked them worse than chance
    two_faced: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # in which others contradict it elsewhere
    triggered: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # words with which others contradict it
    asked: Mapping[str, Mapping[str, Count]] = field(default_factory=dict)  # hidden questions that told of it


@dataclass(frozen=True, slots=True)
class Summary:
    """What a finished run states about itself; `docs/summary.md` explains each field."""

    schema_version: Literal[1]
    name: str
    seed: int
    accord_version: str
    created: str
    constructed_preferences: bool
    policy: PolicySummary
    sites: tuple[SiteSummary, ...]
    router: RouterSummary | None
    evaluation: EvaluationSummary
    routing: Mapping[str, Mapping[str, NonNegative]]
    traffic: tuple[TrafficRow, ...]
    seconds: Mapping[str, NonNegative]
    peak_memory_bytes: Count | None
    macro_accuracy: Mapping[str, Share]
    accuracy_by_type: Mapping[str, Mapping[str, Share]]
    bytes: Mapping[str, Mapping[str, Count]]
    checkpoint: str
    versions: Mapping[str, str | None]
    competence: CompetenceSummary | None = None
    method: str = "routed"  # what the policy was aligned by
    projector: ProjectorSummary | None = None  # None where the policy's own was kept
    trust: TrustSummary | None = None  # None where no hidden questions were asked


def headline(evaluation: EvaluationSummary, traffic: Sequence[TrafficRow]) -> dict[str, dict[str, Any]]:
    """Return the short tables of a summary, which say again what its records say in full.

    `macro_accuracy` and `accuracy_by_type` of base, aligned and every comparison; `bytes` by site and direction.
    """
    measured = {"base": evaluation.base, "aligned": evaluation.aligned}
    measured |= evaluation.compare
    known = {name: result for name, result in measured.items() if result is not None}
    total: dict[str, dict[str, int]] = {}
    for row in traffic:
        site = total.setdefault(row.site, {"to_site": 0, "from_site": 0})
        site["to_site"] += row.bytes_to_site
        site["from_site"] += row.bytes_from_site
    return {
        "macro_accuracy": {name: result.macro for name, result in known.items()},
        "accuracy_by_type": {
            name: {kind: of_type.accuracy for kind, of_type in result.by_type.items()} for name, result in known.items()
        },
        "bytes": total,
    }


def competence_summary(
    sites: Sequence[str],
    types: Sequence[str],
    correct: Sequence[Sequence[float]],
    *,
    neighbours: int,
    experts: int,
) -> CompetenceSummary:
    """Count what each site answered right by question type, types in alphabetical order.

    Args:
        sites: names, `[K]`.
        types: question type of each auxiliary question, `[A]`.
        correct: `[K][A]`, 1 or 0, NaN where a site did not answer.
        neighbours: L.
        experts: M.
    """
    order = sorted(range(len(types)), key=lambda a: types[a])  # stable: within a type as they came
    by_site: dict[str, dict[str, Graded]] = {}
    for site, row in zip(sites, correct, strict=True):
        given: dict[str, list[float]] = {}
        for a in order:
            if not math.isnan(row[a]):
                given.setdefault(types[a], []).append(row[a])
        by_site[site] = {kind: Graded(round(sum(marks)), len(marks)) for kind, marks in given.items()}
    return CompetenceSummary(
        neighbours=neighbours,
        experts=experts,
        items={kind: list(types).count(kind) for kind in sorted(set(types))},
        sites=by_site,
        answers={
            site: "".join("-" if math.isnan(row[a]) else str(round(row[a])) for a in order)
            for site, row in zip(sites, correct, strict=True)
        },
    )


def wilson_interval(correct: float, n: float) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of `correct` out of `n`, within [0, 1] (Wilson 1927; equation above).

    Both may be effective numbers, which are no whole ones.
    """
    p, z2 = correct / n, Z_95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At p = 0 and p = 1 an end is exactly 0 or 1; rounding may put it 1e-17 outside.
    return max(0.0, centre - half), min(1.0, centre + half)


def macro_variance(result: Accuracy) -> float:
    """Return the sampling variance of the macro mean: clustered by image where the images are known, else as below.

    Σ_t p_t(1-p_t)/n_t / T² (Cochran 1977, ch. 5).

    Differs: a type answered all right or all wrong adds nothing, so with few questions the interval is too narrow.
    """
    if result.macro_error is not None:
        return result.macro_error**2
    types = result.by_type.values()
    return sum(t.accuracy * (1 - t.accuracy) / t.n for t in types) / len(types) ** 2


def accuracy(correct: Mapping[str, tuple[int, int]]) -> Accuracy:
    """Return accuracies with 95 % intervals from `{question type: (number correct, number asked)}`.

    Raises:
        DataError: there is no type, a type has no question, or more are correct than were asked.
    """
    if not correct:
        raise DataError(
            "an accuracy needs at least one question type, got none; evaluate on a split that has questions"
        )
    for name, (right, n) in correct.items():
        if not 0 <= right <= n or n == 0:
            raise DataError(
                f"question type {name!r} has {right} correct answers out of {n}; "
                "give 0 <= correct <= n with n >= 1, and leave out a type without questions"
            )
    by_type = {name: TypeAccuracy(k / n, n, k, *wilson_interval(k, n)) for name, (k, n) in correct.items()}
    macro = math.fsum(t.accuracy for t in by_type.values()) / len(by_type)
    total = sum(t.n for t in by_type.values())
    overall = sum(t.correct for t in by_type.values()) / total
    half = Z_95 * math.sqrt(macro_variance(Accuracy(total, macro, 0.0, 1.0, overall, by_type)))
    return Accuracy(total, macro, max(0.0, macro - half), min(1.0, macro + half), overall, by_type)


def accuracy_by_image(outcomes: Mapping[str, Sequence[int]], images: Mapping[str, Sequence[int]]) -> Accuracy:
    """Return accuracies with 95 % intervals that know which questions are about one image.

    Args:
        outcomes: by question type, 1 for each right answer and 0 for each wrong one, `[n_t]`.
        images: by question type, which image each question is about, `[n_t]`.

    Raises:
        DataError: as `accuracy`; or a type's outcomes are not as many as its images.
    """
    for name, found in outcomes.items():
        if len(found) != len(images.get(name, ())):
            raise DataError(
                f"question type {name!r} has {len(found)} outcomes and {len(images.get(name, ()))} images; give as many"
            )
    plain = accuracy({name: (sum(found), len(found)) for name, found in outcomes.items()})
    by_type = {}
    for name, of_type in plain.by_type.items():
        number = effective_number(outcomes[name], images[name])
        low, high = wilson_interval(of_type.accuracy * number, number)
        by_type[name] = replace(of_type, low=low, high=high, effective_n=number)
    error = clustered_error(outcomes, images)
    if error is None:
        error = 0.5  # the largest standard deviation of a share: one image says nothing of others
    return replace(
        plain,
        macro_low=max(0.0, plain.macro - Z_95 * error),
        macro_high=min(1.0, plain.macro + Z_95 * error),
        by_type=by_type,
        images=len({image for name in outcomes for image in images[name]}),
        macro_error=error,
    )


def vqa_summary(values: Mapping[str, Sequence[float]], images: Mapping[str, Sequence[int]]) -> VqaAccuracy:
    """Return a VQA accuracy with the 95 % interval of its mean over types.

    Args:
        values: by question type, the VQA accuracy of each question, `[n_t]`, at least one.
        images: by question type, which image each question is about, `[n_t]`.
    """
    by_type = {name: math.fsum(found) / len(found) for name, found in values.items()}
    macro = math.fsum(by_type.values()) / len(by_type)
    error = clustered_error(values, images)
    half = Z_95 * (0.5 if error is None else error)  # one image says nothing of others
    n = sum(map(len, values.values()))
    return VqaAccuracy(n, macro, max(0.0, macro - half), min(1.0, macro + half), by_type)


def write_summary(path: Path, summary: Summary) -> None:
    """Write `summary` as indented JSON, atomically.

    Raises:
        RunError: a value is of the wrong type, out of range, NaN or infinite; nothing is written.
    """
    data = msgspec.json.format(msgspec.json.encode(summary), indent=2) + b"\n"
    _decode(data, path)  # NaN encodes as null and dataclasses check nothing: what is written must be readable
    write_atomic(path, data)


def read_summary(path: Path) -> Summary:
    """Read a `summary.json`; fields this version does not know are ignored.

    Raises:
        RunError: the file is absent, not JSON, of another schema version, or a field is missing or wrong (named).
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunError(
            f"cannot read {path}: {error.strerror}; give the folder of a finished run, which holds a summary.json"
        ) from error
    return _decode(data, path)


def summary_schema() -> str:
    """Return the JSON Schema (draft 2020-12) of `summary.json`; `docs/summary.schema.json` holds a copy.

    Renew that copy with
    `python -c "from accord.evaluation.summary import *; print(summary_schema(), end='')" > docs/summary.schema.json`.
    """
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | msgspec.json.schema(Summary)
    return msgspec.json.format(msgspec.json.encode(schema), indent=2).decode() + "\n"


def _decode(data: bytes, path: Path) -> Summary:
    try:
        return msgspec.json.decode(data, type=Summary)
    except (msgspec.DecodeError, RecursionError) as error:  # ValidationError, which names the field, is one of these
        raise RunError(
            f"{path} is not a summary of schema version 1: {error}; "
            "correct that field, or finish the run with this version of Accord to write the file anew"
        ) from error
