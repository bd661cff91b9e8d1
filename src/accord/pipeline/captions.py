"""Measure a policy that describes photographs, where a comparison counts right answers elsewhere.

columns of a table   CIDEr-D, matching, preferred to base (`accord.evaluation.captions`), each a sum and a number
sentences            mean number of words, distinct captions and captions that are the base's, on dev and on test
outcomes             matching of every test photograph by topic: what stands for a right answer
shuffled             CIDEr-D and matching, on the asked photograph, of what is said to another one
<arm>-captions.md    what the base and the policy say of the first photographs, for people to read
"""

from __future__ import annotations

import random
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Final

from transformers import set_seed

from accord.data.captions import Judgements, judged_pairs, read_captions, read_judgements
from accord.data.images import name_of
from accord.data.negatives import NegativeMix
from accord.data.preferences import build_preferences
from accord.errors import RecipeError
from accord.evaluation.accuracy import outcomes_by_type
from accord.evaluation.captions import cider_d, matching, preferred
from accord.evaluation.markdown import escaped, markdown_table
from accord.evaluation.table import CIDER, MATCHING, PREFERRED
from accord.models.load import load_model
from accord.progress import ProgressBarCallback
from accord.recipe import Recipe
from accord.rewards.model import RewardModel
from accord.rewards.train import Ranking, train_reward_model
from accord.runs import write_atomic
from accord.stages.alignment import greedy
from accord.stages.job import Job
from accord.types import Question

COLUMNS = (CIDER, MATCHING, PREFERRED)
RIGHT: Final = "matching by topic"

JUDGE_REJECTED: Final = 7
JUDGE_MIX: Final = NegativeMix(same_type=0.6, policy=0.0, other_type=0.2, malformed=0.2)

SHOWN: Final = 50
"""Photographs whose captions are written down."""


def measure_captions(job: Job, said: Mapping[str, Sequence[str]]) -> dict[str, object]:
    """Return the columns on dev and test of what a policy said, and what else a comparison notes.

    Args:
        job: the run; its recipe names the judge.
        said: by split, "dev" and "test", one caption of every photograph.
    """
    measured: dict[str, object] = {}
    sentences = {}
    for split, questions in (("dev", job.questions["dev"]), ("test", job.evaluated)):
        captions, base = said[split], base_captions(job, split)
        found = columns(job.judge, questions, captions)
        found[PREFERRED] = preferred(job.judge, questions, captions, base)
        measured[split] = {name: (sum(values), len(values)) for name, values in found.items()}
        sentences[split] = {
            "words": fmean(len(text.split()) for text in captions),
            "distinct": len(set(captions)),
            "unchanged": sum(new == old for new, old in zip(captions, base, strict=True)),
        }
        if split == "test":
            measured["outcomes"] = found
            measured[RIGHT] = by_topic(questions, found[MATCHING])
    return {**measured, "sentences": sentences}


def columns(judge: RewardModel, questions: Sequence[Question], captions: Sequence[str]) -> dict[str, Sequence[float]]:
    """Return CIDEr-D and matching of every caption, `[N]` each."""
    references = [(q.answer, *q.references) for q in questions]
    return {CIDER: cider_d(captions, references), MATCHING: matching(judge, questions, captions)}


def measure_shuffled(job: Job, captions: Sequence[str]) -> dict[str, tuple[float, int]]:
    """Return the columns of what was said to other photographs, judged on those that were asked about."""
    return {name: (sum(v), len(v)) for name, v in columns(job.judge, job.evaluated, captions).items()}


def make_judge(recipe: Recipe, out: Path, *, quiet: bool = False) -> Ranking:
    """Train what judges captions in the end, on photographs that no site and no server holds; return its pair accuracy.

    It learns that a photograph's own captions are better than those of others and than malformed ones, and people's
    judgements. It starts from the policy's checkpoint.

    Args:
        recipe: its captions, policy and `evaluation.judge_model`.
        out: the judge's folder.
        quiet: without a progress bar.

    Raises:
        RecipeError: the recipe's questions are no captions.
    """
    if not recipe.captions:
        raise RecipeError('only captions are measured by a judge; name a recipe with [[questions]] kind = "captions"')
    generator = random.Random(recipe.seed)
    own = read_captions(recipe.captions, splits=("judge",))
    answers = {topic: [q.answer for q in own if q.question_type == topic] for topic in {q.question_type for q in own}}
    matched = build_preferences(
        own, rejected_per_question=JUDGE_REJECTED, generator=generator, answers_by_type=answers, mix=JUDGE_MIX
    )
    judged = judged_pairs(read_judgements(recipe.captions, split="judge"), Judgements(), generator)
    pairs = [
        *matched,
        *(replace(pair, question_type="judged") for pair in judged),
    ]  # a type, so that they come as often
    set_seed(recipe.seed)
    model = RewardModel.from_checkpoint(recipe.policy.checkpoint)
    with tempfile.TemporaryDirectory() as scratch, ProgressBarCallback("judge", quiet=quiet) as bar:
        ranking = train_reward_model(
            model, pairs, [], [], recipe.evaluation.judge_model, seed=recipe.seed, out=Path(scratch), callbacks=[bar]
        )
    model.save(out)
    return ranking


def right_by_type(job: Job, questions: Sequence[Question], answers: Sequence[str]) -> dict[str, list[int]]:
    """Return 1 for what is right and 0 for what is not, by type: exact match, or matching where captions are asked."""
    if job.recipe.captions:
        return by_topic(questions, matching(job.judge, questions, answers))
    return outcomes_by_type(questions, answers)


def by_topic(questions: Sequence[Question], values: Sequence[float]) -> dict[str, list[int]]:
    """Return `{topic: 1 or 0 for each of its photographs, in their order}`."""
    found: dict[str, list[int]] = defaultdict(list)
    for question, value in zip(questions, values, strict=True):
        found[question.question_type].append(int(value))
    return dict(sorted(found.items()))


def base_captions(job: Job, split: str) -> list[str]:
    """Return what the base policy says of the photographs of "dev" or "test"; it is asked once."""
    if split not in job.base_captions:
        questions = job.questions["dev"] if split == "dev" else job.evaluated
        job.base_captions[split] = greedy(*load_model(job.recipe.policy.checkpoint), questions, job.recipe)
    return job.base_captions[split]


def write_captions(job: Job, file: Path, captions: Sequence[str]) -> None:
    """Write what base and policy say of the first test photographs, beside a reference, as Markdown."""
    shown = [*zip(job.evaluated, base_captions(job, "test"), captions, strict=True)][:SHOWN]
    rows = [
        [escaped(name_of(q.image).rpartition("/")[2] if q.image else q.id), *map(escaped, (q.answer, before, after))]
        for q, before, after in shown
    ]
    write_atomic(file, markdown_table(["photograph", "a reference", "base", "aligned"], rows) + "\n")
