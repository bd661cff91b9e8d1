"""What FedGRPO refuses before anything is asked, whom it grades on what, and which graph the report shows."""

from dataclasses import replace

import pytest
import torch

from accord.errors import DataError, RecipeError
from accord.federation.engine import InProcessEngine
from accord.federation.site import ScoreRange
from accord.pipeline.fedgrpo import Variant, auxiliary_questions, fedgrpo_reward, last_graph
from accord.routing.competence import ConfidenceGraph, FedGrpoConfig, save_graph


@pytest.fixture
def asked(job, ask):
    """The job, with sites that answer, four base questions about colour and two about number, and one dev question."""
    base = [ask(n, "red") for n in range(4)] + [ask(n, answer="two", question_type="number") for n in (4, 5)]
    job.questions = {"base": base, "dev": [ask(6, "blue")], "public": []}
    sites = tuple(replace(site, answers=True) for site in job.recipe.sites)
    job.recipe = replace(job.recipe, sites=sites, fedgrpo=FedGrpoConfig(auxiliary=4, neighbours=1))
    return job


def engine():
    """Sites that must not be asked."""
    return InProcessEngine(dict.fromkeys("ab", lambda request: pytest.fail("asked")))


def set_fedgrpo(job, **settings):
    job.recipe = replace(job.recipe, fedgrpo=replace(job.recipe.fedgrpo, **settings))


def test_every_type_is_asked_as_often(asked):
    """Of four and two questions, two each; with room for more than there are, all six."""
    assert [q.question_type for q in auxiliary_questions(asked)] == ["colour", "number"] * 2
    set_fedgrpo(asked, auxiliary=100)
    assert {q.id for q in auxiliary_questions(asked)} == {q.id for q in asked.questions["base"]}


def test_the_split_is_the_recipes(asked):
    set_fedgrpo(asked, auxiliary_split="dev")
    assert [q.answer for q in auxiliary_questions(asked)] == ["blue"]
    asked.questions["dev"] = []
    with pytest.raises(DataError, match=r"no question has the split 'dev'.* fedgrpo\.auxiliary_split"):
        auxiliary_questions(asked)


def test_a_site_that_does_not_answer_is_named(asked):
    """Experts at random that judge by their reward models need no answers; the choice and `answer` do."""
    a, b = asked.recipe.sites
    asked.recipe = replace(asked.recipe, sites=(a, replace(b, answers=False)))
    set_fedgrpo(asked, judge="answer")
    for variant in (Variant(judge="reward"), Variant(choice="random")):
        with pytest.raises(RecipeError, match=r"site 'b' does not answer questions.* add answers = true"):
            fedgrpo_reward(asked, engine(), variant)


@pytest.mark.parametrize(("low", "high"), [(-2.0, 0.0), (1.0, 3.0), (0.5, 2.0)])
def test_a_range_that_clips_the_truth_is_refused(low, high, asked):
    asked.recipe = replace(asked.recipe, scores=ScoreRange(low, high))
    for variant in (Variant(), Variant(truth=False, judge="answer")):
        with pytest.raises(RecipeError, match=rf"scores between {low} and {high} cannot say 0"):
            fedgrpo_reward(asked, engine(), variant)


def test_the_last_graph_is_the_one_of_the_aligned_policy(asked):
    """None before anything is measured; then the first; once the policy is aligned, the last of its refreshes."""
    one = torch.ones(1, 1, dtype=torch.double)
    graph = ConfidenceGraph(("colour",), one, torch.zeros(1, dtype=torch.double), torch.zeros(2, 1).double())
    assert last_graph(asked) is None
    save_graph(asked.path / "competence" / "graph", graph)
    assert last_graph(asked).correct.tolist() == [[0], [0]]
    save_graph(asked.path / "competence" / "align", replace(graph, correct=torch.ones(2, 1).double()))
    assert last_graph(asked).correct.tolist() == [[1], [1]]
