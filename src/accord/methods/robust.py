"""All sites judge, and a lie is bounded: by ranks alone, or with canaries that tell whom to trust.

    rank-mean, rank-median, rank-trimmed    all sites alike, by the rule on their ranks in a group
    canary                                  all sites, the median of their ranks weighted by trust
    canary-mean                             the mean in its place: more pull for a liar that has not been found yet
    canary-routed                           the median weighted by the client-id router's weights times trust
    canary-average, canary-routed-soft      the mean of scores, not ranks: average and routed-soft, weighted by trust

The rules and the cap on one site's influence are `accord.routing.robust`, canaries and trust `accord.routing.canaries`.
Their pool is the server's labelled questions of the types that the alignment asks, but for the anchors and FedGRPO's
auxiliary ones: what sites have been asked before is no canary. Of fewer than 400 all are in the pool, and a run should
have either anchors or canaries. A right answer is a canary's whether the policy has ever given it or not.
The record of other runs' canaries is `accord.routing.asked`.
What these are measured against is in `accord.attacks.scores`.
"""

from __future__ import annotations

import random
import secrets
import warnings
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final, Literal

from accord.alignment.difficulty import type_shares
from accord.alignment.reward import FederatedReward, PerGroup
from accord.data.negatives import NegativeMix
from accord.data.sampling import draw_kinds, sample_questions
from accord.errors import DataError, DataWarning
from accord.evaluation.summary import TrustSummary
from accord.federation.answering import question_key
from accord.methods.fedgrpo import auxiliary_questions
from accord.methods.gates import ANCHOR_QUESTIONS
from accord.methods.method import Method, Need, Table
from accord.recipe import Recipe
from accord.routing.asked import reserve
from accord.routing.canaries import Canaries, Canary, CanaryConfig, Trust, is_current, kinds_of, words_in
from accord.routing.robust import UNCLIPPED, Deviations, Ranks, RobustConfig, Rule
from accord.routing.router import LearnedRouter, Router
from accord.routing.triggers import watched
from accord.runs import write_atomic
from accord.stages.alignment import Aligned, federated_reward, remembered, run_grpo
from accord.stages.job import Job
from accord.stages.routing import constant_router, trained_router
from accord.stages.sites import construct_pairs
from accord.types import Question, prompt_of

ROBUST: Final = Table("robust", RobustConfig)
CANARIES: Final = Table("canaries", CanaryConfig)

PLAUSIBLE: Final = NegativeMix(same_type=0.5, policy=0.5, other_type=0.0, malformed=0.0)
"""Wrong answers of a canary: such as a policy gives, for a malformed one would give it away."""


@dataclass(frozen=True)
class Defence:
    """How sites are heard.

    Attributes:
        rule: what becomes of their ranks; "deviations" takes scores in their place.
        canaries: whether hidden questions tell whom to trust.
        routed: whether the client-id router's weights count besides; else all sites count alike.
    """

    rule: Rule | Literal["deviations"] = "mean"
    canaries: bool = False
    routed: bool = False


def robust(job: Job, stage: str, *, defence: Defence) -> Aligned:
    """Align by the fused ranks or scores; what is fused is divided by a step's deviation (`accord.routing.robust`)."""
    known = canaries_of(job, stage) if defence.canaries else None
    if known is not None and job.engine is not None and not CANARIES.of(job.recipe).record:
        warnings.warn(
            "canaries.record names no file, and the sites are other organisations': a later run may ask the same "
            'hidden questions, which a site that kept them recognises; add record = "/absolute/path" to [canaries]',
            DataWarning,
            stacklevel=2,
        )
    settings = replace(job.recipe.alignment, scale_rewards="batch")
    return run_grpo(
        job,
        stage,
        _reward(job, defence, known),
        settings=settings,
        memory=known,
        encoder=job.encoder if defence.routed else None,
    )


def robust_reward(job: Job, *, defence: Defence) -> FederatedReward:
    """Return the reward with the trust that sites had when the policy was last aligned by it."""
    known = canaries_of(job) if defence.canaries else None
    if known is not None and (state := remembered(job.path, "align")):
        known.load_state_dict(state)
    return _reward(job, defence, known)


def _reward(job: Job, defence: Defence, known: Canaries | None) -> FederatedReward:
    count = len(job.recipe.sites)
    router: Router = constant_router([1 / count] * count)
    if defence.routed:
        router = LearnedRouter(job.encoder, trained_router(job))
    spread = _spread(job.recipe)
    fuse = Deviations(spread) if defence.rule == "deviations" else Ranks(defence.rule, spread)
    per_group = PerGroup(fuse, size=job.recipe.alignment.group_size, cap=ROBUST.of(job.recipe).cap)
    return federated_reward(job, router, mode="soft", scope="prompt", per_group=per_group, canaries=known)


def _spread(recipe: Recipe) -> float:
    """Return `robust.spread` in units of a score."""
    scores = recipe.scores
    return ROBUST.of(recipe).spread * (scores.high - scores.low if scores else UNCLIPPED)


def canaries_of(job: Job, stage: str = "align") -> Canaries:
    """Return an alignment's canaries: as many labelled questions as its steps take, drawn by the key.

    Where `canaries.record` names a file, none that another alignment has noted there is among them. Types of the
    prompts that no canary is of are told.

    Args:
        job: the server's questions count that are neither anchors nor auxiliary.
        stage: of the alignment.

    Raises:
        DataError: the server has no labelled question left for one.
        RunError: the record cannot be read or written.

    Warns:
        DataWarning: there are too few, or of too few types.
    """
    config, recipe = CANARIES.of(job.recipe), job.recipe
    unseen, wanted = _unseen(job), _wanted(recipe)
    key = _key(job)
    asked = _on_record(job, stage, unseen, wanted, key) if config.record else _drawn(job, unseen, wanted, key)
    pool = _with_wrong_answers(job, asked) if asked else []
    _tell_what_is_missing(job, [canary.kind for canary in pool])
    names = [site.name for site in recipe.sites]
    shares = type_shares(job.prompts, balanced=recipe.alignment.balanced)
    words = watched(job.prompts, shares, recipe.alignment.steps * recipe.alignment.prompts_per_step)
    return Canaries(pool, names, config, key=key, spread=_spread(recipe), shares=_shares(job), words=words)


def check_canaries(job: Job) -> str:
    """Tell before a run what its canaries lack; a record and questions without a wrong answer may leave fewer.

    Returns:
        How many labelled questions become canaries, by type, in a line.

    Raises:
        DataError: the server has no labelled question for one.

    Warns:
        DataWarning: there are too few, or none of a type that the alignment asks, or several domains share a type.
    """
    drawn = _drawn(job, _unseen(job), _wanted(job.recipe), key=0)
    _tell_what_is_missing(job, [q.question_type for q in drawn])
    kinds = Counter({q.question_type: 0 for q in job.prompts})
    kinds.update(q.question_type for q in drawn)
    named = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
    return f"{'hidden questions':<20} {len(drawn)} at most, of {_wanted(job.recipe)} that the steps ask: {named}"


def _unseen(job: Job) -> list[Question]:
    """Return what may become canaries: labelled questions that the alignment could ask, and that no site has seen."""
    recipe, base = job.recipe, job.questions.get("base", [])
    types = {q.question_type for q in job.prompts}  # another one would give itself away, and tell nothing of these
    alike = [q for q in base if q.question_type in types and recipe.prompts.wants(q)]
    shown = set[str]()
    if len(alike) >= 2 * ANCHOR_QUESTIONS:  # of fewer, a run should use either for anchors or for canaries
        shown = {q.id for q in sample_questions(base, ANCHOR_QUESTIONS, seed=recipe.seed)}
        if any(site.answers for site in recipe.sites):
            shown |= {q.id for q in auxiliary_questions(job)}
    unseen = [q for q in alike if q.id not in shown]
    _warn_of_shared_types([*unseen, *job.prompts])
    return unseen


def _tell_what_is_missing(job: Job, kinds: Sequence[str]) -> None:
    """Warn where canaries of these types are too few, or of too few types; where there is none, raise DataError."""
    per_step, wanted = CANARIES.of(job.recipe).per_step, _wanted(job.recipe)
    if not kinds:
        asked = ", ".join(sorted({q.question_type for q in job.prompts}))
        raise DataError(
            f"the server has {len(job.questions.get('base', []))} labelled questions, and none of a type that the "
            f"alignment asks ({asked}) is left for a canary: anchors, and what canaries.record has, are none; "
            "give the source more questions of these types, of the split 'base', or choose a method without canaries"
        )
    if len(kinds) < wanted:
        warnings.warn(
            f"the server has {len(kinds)} questions for canaries, and {job.recipe.alignment.steps} steps ask {wanted}: "
            f"from step {len(kinds) // per_step + 1} on no site is watched, and trust stays as it is; give the source "
            "more questions of the split 'base', or lower canaries.per_step",
            DataWarning,
            stacklevel=3,
        )
    if blind := {q.question_type for q in job.prompts} - {*kinds}:
        warnings.warn(
            f"no hidden question is of the types {', '.join(map(repr, sorted(blind)))}, which the alignment asks: a "
            "site that lies about these alone is not found; give the source labelled questions of these types, of the "
            "split 'base'",
            DataWarning,
            stacklevel=3,
        )


def _with_wrong_answers(job: Job, asked: Sequence[Question]) -> list[Canary]:
    """Return the questions as canaries: those that have a wrong answer beside a right one."""
    recipe, base = job.recipe, job.questions["base"]
    plausible = replace(recipe, preferences=replace(recipe.preferences, mix=PLAUSIBLE, judged=False))
    grouped = defaultdict(list)
    for pair in construct_pairs(plausible, lambda: job.policy, asked, base, seed=recipe.seed):
        grouped[pair.question_id].append(pair)
    return [
        Canary(
            pairs[0].prompt,
            pairs[0].images,
            right=pairs[0].chosen,
            wrong=tuple(dict.fromkeys(pair.rejected for pair in pairs if pair.chosen == pairs[0].chosen)),
            kind=pairs[0].question_type,
        )
        for pairs in grouped.values()
    ]


def _drawn(job: Job, questions: Sequence[Question], wanted: int, key: int | str) -> list[Question]:
    """Draw as many as are wanted, types as often as the alignment asks them."""
    generator = random.Random(f"{key} pool")
    return draw_kinds(questions, [q.question_type for q in questions], wanted, generator, _shares(job))


def _shares(job: Job) -> dict[str, float]:
    """Return how often each type is drawn: as often as it is asked, but one canary of each at least."""
    asked = type_shares(job.prompts, balanced=job.recipe.alignment.balanced)
    return {kind: max(share, 1 / _wanted(job.recipe)) for kind, share in asked.items()}


def _wanted(recipe: Recipe) -> int:
    """Return how many canaries an alignment takes."""
    return CANARIES.of(recipe).per_step * recipe.alignment.steps


def _on_record(job: Job, stage: str, questions: Sequence[Question], wanted: int, key: int | str) -> list[Question]:
    """Return those that the record has for this alignment; draw them where it has none, and tell when few are left."""
    by_key = {question_key([job.identify(image) for image in q.images], prompt_of(q)): q for q in questions}
    keys = {q.id: name for name, q in by_key.items()}

    def draw(others: Collection[str]) -> list[str]:
        free = [q for name, q in by_key.items() if name not in others]
        return [keys[q.id] for q in _drawn(job, free, wanted, key)]

    record = Path(CANARIES.of(job.recipe).record).expanduser()
    own, others = reserve(record, f"{job.run.tag} {stage}", draw)
    left = len(by_key.keys() - others - set(own))
    if left < wanted:
        warnings.warn(
            f"{record} leaves {left} labelled questions that no run has asked, and a run like this one takes {wanted}: "
            "soon no site is watched; give the source more questions of the split 'base' whose labels nobody has seen",
            DataWarning,
            stacklevel=3,
        )
    return [by_key[name] for name in own if name in by_key]


def _warn_of_shared_types(questions: Sequence[Question]) -> None:
    domains = defaultdict(set)
    for q in questions:
        domains[q.question_type].add(q.domain)
    shared = sorted(kind for kind, of_kind in domains.items() if len(of_kind) > 1)
    if shared:
        warnings.warn(
            f"several domains share the question types {', '.join(map(repr, shared))}, and trust is of a type: a site "
            "that is right in one of these domains alone has no trust of its own there; add type_prefix = true to "
            "their [[questions]] tables",
            DataWarning,
            stacklevel=3,
        )


def _key(job: Job) -> int | str:
    """Return what canaries are drawn by: other organisations' sites hold the recipe, and with it its seed."""
    if job.engine is None:
        return job.recipe.seed
    file = job.path / "canaries.key"
    if not file.is_file():
        write_atomic(file, secrets.token_hex(16), mode=0o600)
    return file.read_text(encoding="utf-8")


def who_is_trusted(job: Job, stage: str, sites: Sequence[str]) -> Mapping[str, object]:
    """Return the summary's `trust`: of each site and question type what canaries told, and where it is set aside."""
    if not (state := remembered(job.path, stage)) or not is_current(state):  # older versions kept less
        return {}
    trust = Trust(sites, kinds_of(state), CANARIES.of(job.recipe), words=dict.fromkeys(words_in(state), ()))
    trust.load_state_dict(state)
    aside, two_faced = map(trust.kinds_where, (trust.aside, trust.two_faced))
    told = TrustSummary(
        int(state["used"]),
        trust.by_kind(trust.estimate()),
        aside,
        two_faced,
        trust.words_where(trust.triggered),
        trust.by_kind(trust.asked),
    )
    return {"trust": told}


def _method(defence: Defence, about: str) -> Method:
    needs: set[Need] = {"sites", "router"} if defence.routed else {"sites"}
    return Method(
        partial(robust, defence=defence),
        about,
        needs=frozenset(needs),
        tables=(ROBUST, CANARIES) if defence.canaries else (ROBUST,),
        asks=_everyone,
        check_data=check_canaries if defence.canaries else Method.check_data,
        reward=partial(robust_reward, defence=defence),
        findings=who_is_trusted if defence.canaries else lambda job, stage, sites: {},
    )


def _everyone(recipe: Recipe) -> int:
    return len(recipe.sites)


METHODS: Final = {
    "rank-mean": _method(Defence("mean"), "all sites alike, the mean of their ranks in a group"),
    "rank-median": _method(Defence("median"), "the median of all sites' ranks in a group"),
    "rank-trimmed": _method(Defence("trimmed"), "the mean of the ranks without the best and the worst"),
    "canary": _method(
        Defence("median", canaries=True), "the median of all ranks, weighted by what hidden questions tell of a site"
    ),
    "canary-mean": _method(Defence("mean", canaries=True), "the same with the mean"),
    "canary-routed": _method(
        Defence("median", canaries=True, routed=True), "as canary, times the weights of the client-id router"
    ),
    "canary-average": _method(
        Defence("deviations", canaries=True), "the mean of all scores, weighted by what hidden questions tell of a site"
    ),
    "canary-routed-soft": _method(
        Defence("deviations", canaries=True, routed=True),
        "as canary-average, times the weights of the client-id router",
    ),
}
