"""Say in plain words what a run did, and say it honestly: a fall, a tie and a hacked reward are named as such.

Two macro accuracies a and b are told apart when |b - a| exceeds 1.96 √(variance_a + variance_b), with the variances of
`accord.evaluation.summary.macro_variance`. Both were measured on the same questions, where answers usually agree, so
the true interval of the difference is narrower: the test is cautious.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from accord.evaluation.figures import human_bytes
from accord.evaluation.summary import Z_95, Accuracy, CompetenceSummary, Summary, TypeAccuracy, macro_variance
from accord.evaluation.trace import MetricsRow

_MANY_ABSENCES = 0.05
"""Share of unanswered messages above which the report warns."""

_CENTRED = 1e-6
"""What rounding makes of a reward whose mean over every group is 0, as that of `canary-average`: it cannot rise."""


@dataclass(frozen=True, slots=True)
class Account:
    """What happened in plain words.

    Attributes:
        verdict: the shortest true statement.
        setting: who took part and with what.
        outcome: what came of it, sentence by sentence.
        warnings: what must not be overlooked.
    """

    verdict: str
    setting: str
    outcome: tuple[str, ...]
    warnings: tuple[str, ...]


def tell(summary: Summary, metrics: Sequence[MetricsRow]) -> Account:
    """Return the account of a finished run."""
    outcome = (_accuracy(summary), *_types(summary), *_traffic(summary))
    return Account(_verdict(summary), _who(summary), outcome, tuple(_warnings(summary, metrics)))


def macro_direction(before: Accuracy, after: Accuracy) -> int:
    """Return 1 where the macro mean rose beyond what the draw of questions explains, -1 where it fell, else 0."""
    margin = Z_95 * math.sqrt(macro_variance(before) + macro_variance(after))
    return _sign(after.macro - before.macro, margin)


def type_direction(before: TypeAccuracy, after: TypeAccuracy) -> int:
    """Return 1, -1 or 0 as `macro_direction` does, for one type; its variance is p(1-p)/(n+2) with p = (k+1)/(n+2).

    n is the effective number of questions where their images are known, and k the right ones among as many. The two
    answers added to each sample (Agresti and Caffo 2000, https://doi.org/10.1080/00031305.2000.10474560) keep the
    variance above zero when all answers are right or all are wrong.
    """
    variance = 0.0
    for result in (before, after):
        n = result.n if result.effective_n is None else result.effective_n
        p = (result.accuracy * n + 1) / (n + 2)
        variance += p * (1 - p) / (n + 2)
    return _sign(after.accuracy - before.accuracy, Z_95 * math.sqrt(variance))


def reward_change(metrics: Sequence[MetricsRow]) -> float | None:
    """Return the mean reward of the last tenth of the alignment's steps minus that of the first; None below 2 steps."""
    steps = [row for row in metrics if row.stage == "align" and row.reward is not None and math.isfinite(row.reward)]
    rewards = [row.reward for row in sorted(steps, key=lambda row: row.step) if row.reward is not None]
    if len(rewards) < 2:
        return None
    tenth = max(1, len(rewards) // 10)
    return (math.fsum(rewards[-tenth:]) - math.fsum(rewards[:tenth])) / tenth


def tell_competence(competence: CompetenceSummary) -> str:
    """Say who is good at what, and what followed from it."""
    asked = sum(competence.items.values())
    told = [
        f"The server put {_many(asked, 'labelled question')} of its own to every site and graded the answers itself."
    ]
    best = []
    for kind in competence.items:
        shares = {site: of[kind].correct / of[kind].n for site, of in competence.sites.items() if kind in of}
        if shares:
            most = max(shares.values())
            names = [site for site, share in shares.items() if share == most]
            who = _listed(names) if len(names) <= 3 else f"{_number(len(names)).lower()} sites alike"
            best.append(f"at {kind}: {who} ({_whole(most)})")
    if best:
        told.append(f"Best {'; '.join(best)}.")
    if silent := [site for site, by_type in competence.sites.items() if not by_type]:
        whom = "it" if len(silent) == 1 else "them"
        told.append(f"No answers came from {_listed(silent)}, so nothing is known of {whom}.")
    nearest = min(competence.neighbours, asked)
    judges = "site" if competence.experts == 1 else f"{_number(competence.experts).lower()} sites"
    told.append(
        f"FedGRPO has a prompt's answers judged by the {judges} that did best on the {_number(nearest).lower()} of "
        "these questions nearest to it."
    )
    return " ".join(told)


def percent(share: float) -> str:
    """Return a share of 0..1 as per cent with one decimal; the space does not break."""
    return f"{100 * share:.1f}\u00a0%"


def points(change: float) -> str:
    """Return a difference of shares as signed percentage points with one decimal."""
    return f"{100 * change:+.1f}".replace("-", "−")


def _sign(change: float, margin: float) -> int:
    return 0 if abs(change) <= margin else int(math.copysign(1, change))


def _verdict(summary: Summary) -> str:
    before, after = summary.evaluation.base, summary.evaluation.aligned
    if before is None:
        return f"Accuracy after alignment is {percent(after.macro)}; before alignment it was not measured."
    ends = f"from {percent(before.macro)} to {percent(after.macro)}"
    return {
        1: f"Accuracy rose {ends}.",
        0: f"Accuracy did not measurably change: it went {ends}.",
        -1: f"Accuracy fell {ends}.",
    }[macro_direction(before, after)]


def _who(summary: Summary) -> str:
    sites = summary.sites
    names = _listed([site.name for site in sites])
    questions, pairs = sum(site.questions for site in sites), sum(site.pairs for site in sites)
    origin = (
        "The pairs were constructed from reference answers: no person judged them."
        if summary.constructed_preferences
        else "By the sites' account the pairs are people's judgements."
    )
    if not any(site.parameters for site in sites):
        who = f"{_number(len(sites))} sites ({names}) took part; the method, {summary.method}, needs no reward model."
        return f"{who} {origin}" if pairs else who
    if len(sites) == 1:
        who = f"One site, {names}, trained a reward model on its own data and scored a policy's answers with it."
        hold = "It holds"
    else:
        who = (
            f"{_number(len(sites))} sites ({names}) each trained a reward model on their own data, and together scored "
            "the answers of one shared policy; their data and reward models stayed where they were."
        )
        hold = "Together they hold"
    return f"{who} {hold} {questions:,} questions and {pairs:,} preference pairs. {origin}"


def _accuracy(summary: Summary) -> str:
    before, after = summary.evaluation.base, summary.evaluation.aligned
    interval = f"95\u00a0% interval {percent(after.macro_low)} to {percent(after.macro_high)}"
    head = f"On {after.n:,} test questions, accuracy averaged over question types"
    if before is None:
        return f"{head} is {percent(after.macro)} after alignment ({interval}); before alignment it was not measured."
    went = f"{head} went from {percent(before.macro)} to {percent(after.macro)} ({interval})"
    change = f"{points(after.macro - before.macro)} points"
    return {
        1: f"{went}: {change}.",
        0: f"{went}: {change}, which is within what the draw of questions explains, so no gain is shown.",
        -1: f"{went}: {change}. The run made the policy worse.",
    }[macro_direction(before, after)]


def _types(summary: Summary) -> list[str]:
    before, after = summary.evaluation.base, summary.evaluation.aligned
    if before is None:
        return []
    shared = [name for name in after.by_type if name in before.by_type]
    moved = {name: type_direction(before.by_type[name], after.by_type[name]) for name in shared}

    def told(direction: int) -> str:
        return _listed(
            [
                f"{name} ({_whole(before.by_type[name].accuracy)}\u00a0→\u00a0{_whole(after.by_type[name].accuracy)})"
                for name in shared
                if moved[name] == direction
            ]
        )

    rose, same, fell = told(1), told(0), told(-1)
    parts = [
        *([f"accuracy rose on {rose}"] if rose else []),
        *([f"did not measurably change on {same}"] if same else []),
        *([f"fell on {fell}"] if fell else []),
    ]
    if not parts:
        return []
    if not rose:
        parts[0] = f"accuracy {parts[0]}"
    return [f"By question type, {_listed(parts)}." + ("" if fell else " No question type measurably fell.")]


def _traffic(summary: Summary) -> list[str]:
    to_site = sum(row.bytes_to_site for row in summary.traffic)
    from_site = sum(row.bytes_from_site for row in summary.traffic)
    total = to_site + from_site
    if not total:
        return []
    by_kind: dict[str, int] = {}
    for row in summary.traffic:
        by_kind[row.kind] = by_kind.get(row.kind, 0) + row.bytes_to_site + row.bytes_from_site
    absences, messages = _absences(summary)
    kind, most = max(by_kind.items(), key=lambda item: item[1])
    return [
        f"{human_bytes(total)} crossed the border, {_rounded(to_site / total)} of it from the server to the sites and "
        f"{_rounded(from_site / total)} back; messages of kind “{kind}” were {_rounded(most / total)} of it."
        + (f" Of {messages:,} messages {absences:,} went unanswered." if absences else "")
    ]


def _absences(summary: Summary) -> tuple[int, int]:
    return sum(row.absences for row in summary.traffic), sum(row.messages for row in summary.traffic)


def _warnings(summary: Summary, metrics: Sequence[MetricsRow]) -> list[str]:
    evaluation = summary.evaluation
    before, after = evaluation.base, evaluation.aligned
    found = []
    gain = reward_change(metrics)
    if before is not None and gain is not None and gain > _CENTRED and after.macro < before.macro:
        clear = macro_direction(before, after) < 0
        found.append(
            f"The reward rose by {gain:.2f} while accuracy went from {percent(before.macro)} "
            f"to {percent(after.macro)}: "
            f"the policy {'learnt' if clear else 'may have learnt'} to please the reward models instead of to answer "
            "(reward hacking). Train the reward models on answers the policy gives, raise the KL weight, "
            "or stop earlier."
        )
    if before is not None:
        fallen = [
            name
            for name, result in after.by_type.items()
            if name in before.by_type and type_direction(before.by_type[name], result) < 0
        ]
        if fallen and macro_direction(before, after) >= 0:
            found.append(f"The mean hides a fall: accuracy on {_listed(fallen)} is lower than before alignment.")
    for control, meaning in (
        (evaluation.question_only, "without looking at the image"),
        (evaluation.shuffled_image, "with another question's image"),
    ):
        if control is not None and macro_direction(control, after) <= 0:
            found.append(
                f"The aligned policy ({percent(after.macro)}) is not measurably better than answering {meaning} "
                f"({percent(control.macro)}): this accuracy is no evidence that it uses what it sees."
            )
    alone = evaluation.question_only
    if alone is not None and before is not None and macro_direction(alone, after) > 0:  # else it was said of the whole
        blind = alone.by_type
        guessed = [
            f"{name} ({_whole(result.accuracy)}, the question alone {_whole(blind[name].accuracy)})"
            for name, result in after.by_type.items()
            if name in blind
            and name in before.by_type
            and type_direction(before.by_type[name], result) > 0
            and type_direction(blind[name], result) <= 0
        ]
        if guessed:
            found.append(
                f"The rise on {_listed(guessed)} is no sign of looking at the image: the commonest "
                "answer to each question does as well."
            )
    absences, messages = _absences(summary)
    if absences > _MANY_ABSENCES * messages:
        found.append(
            f"Sites left {_rounded(absences / messages)} of the messages unanswered, so their scores counted less "
            "than the routing says; see the absences by site below."
        )
    return found


def _whole(share: float) -> str:
    return f"{100 * share:.0f}\u00a0%"


def _number(count: int) -> str:
    words = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")
    return words[count] if count < len(words) else f"{count:,}"


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def _rounded(share: float) -> str:
    if 0 < share < 0.005:
        return "under 1\u00a0%"
    return "over 99\u00a0%" if 0.995 <= share < 1 else _whole(share)


def _listed(items: Sequence[str]) -> str:
    return " and ".join([", ".join(items[:-1]), items[-1]]) if len(items) > 1 else "".join(items)
