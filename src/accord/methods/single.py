"""One site judges everything: the best one, a named one, one drawn for every completion; or a site by itself.

These say what the choice of sites is worth. `best-site` is chosen by how often a site scores the right answer of a
labelled dev question above the commonest other answers, macro mean over question types; the sites are asked through the
engine, as for any other scores.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Final

import torch

from accord.alignment.reward import FederatedReward, group_about
from accord.data.questions import rivals
from accord.data.sampling import sample_questions
from accord.errors import DataError, RecipeError, RunError
from accord.federation.engine import Engine
from accord.federation.messages import ScoreRange
from accord.methods.method import Method, Need, by_reward
from accord.recipe import Recipe
from accord.runs import write_atomic
from accord.stages.alignment import Aligned, federated_reward, run_grpo
from accord.stages.job import Job
from accord.stages.routing import RandomRouter, constant_router
from accord.stages.sites import common_answers, open_federation
from accord.stages.traffic import asked_once

SITES: Final[frozenset[Need]] = frozenset({"sites"})

QUESTIONS: Final = 300
"""Dev questions that `best-site` is chosen by."""

VOCABULARY: Final = 64
"""Answers that the right one is held against, at most."""

AT_ONCE: Final = 32
"""Questions of one request."""


def one_site(job: Job, k: int) -> FederatedReward:
    """Let one site judge everything."""
    return federated_reward(job, constant_router(_one_hot(job, k)))


def _one_hot(job: Job, k: int) -> list[float]:
    return [float(i == k) for i in range(len(job.recipe.sites))]


def best_site(job: Job, engine: Engine | None = None) -> int:
    """Return the index of the site that most often scores right answers to dev questions above all others.

    Sites that are other organisations' send clipped scores only; there an answer that ties with the right one counts
    by half. A question that a site did not answer counts neither for nor against it, and a type of which one site
    answered none counts for no site.

    Raises:
        RunError: a site answered none, or the sites have no type in common that all answered.
    """
    asked = sample_questions(job.questions["dev"], QUESTIONS, seed=0)
    vocabulary = common_answers(asked, VOCABULARY)
    count = len(job.recipe.sites)
    scores = _scores(job)
    reward = federated_reward(job, constant_router([1 / count] * count), mode="soft", scores=scores, engine=engine)
    hits: dict[str, list[list[float]]] = defaultdict(list)  # by question type, [n][K]
    for start in range(0, len(asked), AT_ONCE):
        questions = asked[start : start + AT_ONCE]
        groups = []
        for q in questions:
            candidates = (q.answer, *rivals(q, vocabulary))
            groups.append(group_about(q, candidates, range(len(candidates))))
        sizes = [len(group.candidates) for group in groups]
        given = reward.ask(groups, torch.ones(sum(sizes), count))
        for q, of_question in zip(questions, given.split(sizes), strict=True):
            right, others = of_question[0], of_question[1:]
            above, level = (others < right).all(dim=0), (others <= right).all(dim=0)
            hit = above.double() if scores is None else 0.5 * above + 0.5 * level
            hits[q.question_type].append(hit.where(~of_question.isnan().any(dim=0), torch.nan).tolist())
    by_type = torch.stack([torch.tensor(rows, dtype=torch.double).nanmean(dim=0) for rows in hits.values()])  # [T, K]
    silent = [site.name for site, row in zip(job.recipe.sites, by_type.T, strict=True) if row.isnan().all()]
    if silent:
        raise RunError(
            f"site {silent[0]!r} answered none of the {len(asked)} dev questions by which 'best-site' is chosen "
            f"({len(silent)} of {count} sites are silent); see that it is there, or leave 'best-site' out"
        )
    common = by_type[~by_type.isnan().any(dim=1)]
    if not len(common):
        raise RunError(
            f"of the {len(hits)} question types none was answered by every site, so that 'best-site' cannot compare "
            "them; see that the sites are there all the time, or leave 'best-site' out"
        )
    return int(common.mean(dim=0).argmax())


def best_site_reward(job: Job) -> FederatedReward:
    """Let the best site judge everything; the sites are asked once a run, and every user counts the bytes."""
    kept = job.kept("best-site", after="site") / "chosen.txt"
    engine = open_federation(job, scores=_scores(job))
    asked_once(job, engine, kept, lambda: write_atomic(kept, f"{best_site(job, engine)}\n"))
    return one_site(job, int(kept.read_text()))


def _scores(job: Job) -> ScoreRange | None:
    """Return the range of the scores that sites are compared by; none, where unclipped ones may be asked for."""
    return job.recipe.scores if job.engine is not None else None


def random_site(job: Job, stage: str) -> Aligned:
    """Send every completion to a site drawn at random."""
    router = RandomRouter(len(job.recipe.sites), job.recipe.seed)
    return run_grpo(job, stage, federated_reward(job, router), memory=router)


def local(job: Job, stage: str, site: str) -> Aligned:
    """Let a site align the base by itself: its own reward model, its own questions, nothing crosses a border."""
    if not job.private[site]:
        raise DataError(f"site {site} has no private questions to align on; give it some, or leave out 'local {site}'")
    reward = one_site(job, _index(job, site))
    model, processor = run_grpo(job, stage, reward, questions=job.private[site])
    job.traffic.counts.clear()
    return model, processor


def _index(job: Job, site: str) -> int:
    return [each.name for each in job.recipe.sites].index(site)


def named_site(site: str) -> Method:
    """Return the method `site <name>`."""

    def make(job: Job) -> FederatedReward:
        return one_site(job, _index(job, site))

    return Method(by_reward(make), f"site {site} alone", needs=SITES, asks=lambda recipe: 1, together=True, reward=make)


def by_itself(site: str) -> Method:
    """Return the method `local <name>`."""

    def check(recipe: Recipe) -> None:
        if not any(each.name == site and each.needs_questions for each in recipe.sites):
            raise RecipeError(
                f"the method 'local {site}' aligns on private questions of site {site}, and it holds none but its own "
                f"pairs; give it some, or leave 'local {site}' out"
            )

    return Method(
        partial(local, site=site),
        f"site {site}'s reward model, on its own questions",
        needs=SITES | {"private"},
        check=check,
        training=lambda recipe: f"at site {site} alone, on its private questions: nothing crosses a border",
    )


METHODS: Final = {
    "random": Method(random_site, "a site drawn for each completion", role="chance", needs=SITES, asks=lambda _: 1),
    "best-site": Method(
        by_reward(best_site_reward),
        "the site that ranks dev answers best",
        needs=SITES,
        asks=lambda _: 1,
        reward=best_site_reward,
    ),
}

PER_SITE: Final[dict[str, Callable[[str], Method]]] = {"site": named_site, "local": by_itself}
"""Methods of one site, named after it: `site <name>`, `local <name>`."""
