"""What FedGRPO refuses before anything is asked, whom it grades on what, and which graph the report shows."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save

from accord.errors import DataError, RecipeError
from accord.federation.engine import InProcessEngine
from accord.federation.messages import ScoreRange
from accord.methods import fedgrpo as module
from accord.methods.fedgrpo import (
    SETTINGS,
    FedGrpoConfig,
    Variant,
    auxiliary_questions,
    expert_router,
    who_is_good_at_what,
)
from accord.routing.competence import ConfidenceGraph, save_graph
from accord.routing.fusion import group_relative
from accord.routing.robust import VarianceGate
from accord.runs import write_atomic
from accord.stages.alignment import memory_file


@pytest.fixture
def asked(job, ask):
    """The job, with sites that answer, four base questions about colour and two about number, and one dev question."""
    base = [ask(n, "red") for n in range(4)] + [ask(n, answer="two", question_type="number") for n in (4, 5)]
    job.questions = {"base": base, "dev": [ask(6, "blue")], "public": []}
    sites = tuple(replace(site, answers=True) for site in job.recipe.sites)
    tables = {"fedgrpo": FedGrpoConfig(auxiliary=4, neighbours=1)}
    job.recipe = replace(job.recipe, sites=sites, tables=tables)
    return job


def engine():
    """Sites that must not be asked."""
    return InProcessEngine(dict.fromkeys("ab", lambda request: pytest.fail("asked")))


def set_fedgrpo(job, **settings):
    job.recipe = replace(job.recipe, tables={"fedgrpo": replace(SETTINGS.of(job.recipe), **settings)})


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
            expert_router(asked, engine(), variant)


@pytest.mark.parametrize(("low", "high"), [(-2.0, 0.0), (1.0, 3.0), (0.5, 2.0)])
def test_a_range_that_clips_the_truth_is_refused(low, high, asked):
    asked.recipe = replace(asked.recipe, scores=ScoreRange(low, high))
    for variant in (Variant(), Variant(truth=False, judge="answer")):
        with pytest.raises(RecipeError, match=rf"scores between {low} and {high} cannot say 0"):
            expert_router(asked, engine(), variant)


def test_the_graph_that_is_told_is_the_one_of_the_aligned_policy(asked):
    """Nothing before anything is measured; then the first; once a stage is done, the last of its refreshes."""
    one = torch.ones(1, 1, dtype=torch.double)
    graph = ConfidenceGraph(("colour",), one, torch.zeros(1, dtype=torch.double), torch.zeros(2, 1).double())
    assert who_is_good_at_what(asked, "align", "ab") == {}
    save_graph(asked.path / "kept" / "site" / "competence" / "graph", graph)
    assert who_is_good_at_what(asked, "align", "ab")["competence"].answers == {"a": "0", "b": "0"}
    learnt = {"correct": torch.ones(2, 1).double()}
    write_atomic(memory_file(asked.path, "align"), save(learnt))
    told = who_is_good_at_what(asked, "align", "ab")["competence"]
    assert told.answers == {"a": "1", "b": "1"} and (told.experts, told.neighbours) == (2, 1)
    assert who_is_good_at_what(asked, "compare fedgrpo", "ab")["competence"].answers == {"a": "0", "b": "0"}


@pytest.mark.parametrize(
    ("variant", "asks"), [(Variant(), 1), (Variant(experts=3), 2), (Variant(choice="all"), 2), (Variant("reward"), 1)]
)
def test_how_many_sites_judge_an_answer(asked, variant, asks):
    """M = 1 of the recipe or the variant's own, never more than there are: two."""
    set_fedgrpo(asked, experts=1)
    assert variant.asks(asked.recipe) == asks


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"auxiliary": 5, "neighbours": 6},
            "neighbours must be at most auxiliary = 5, got 6; lower fedgrpo.neighbours",
        ),
        ({"experts": 0}, "experts must be at least 1, got 0"),
        ({"form": -1.0}, "form must be at least 0"),
        ({"spread": 1.1}, "spread must be at most 1, got 1.1; lower fedgrpo.spread"),
        ({"refresh_every": -1}, "refresh_every must be at least 0"),
    ],
)
def test_settings_that_leave_nobody_to_ask_are_refused(settings, said):
    with pytest.raises(RecipeError, match=said):
        FedGrpoConfig(**settings)


@pytest.mark.parametrize(("spread", "scores", "units"), [(0.0, None, 0.0), (0.01, None, 0.04), (0.01, (-1, 1), 0.02)])
def test_the_variance_gate_is_the_recipes_and_off_by_default(asked, monkeypatch, spread, scores, units):
    """A share of the agreed range, or of 4 where none is agreed; without one the fusion is the paper's own."""
    assert FedGrpoConfig().spread == 0
    given = []
    monkeypatch.setattr(module, "federated_reward", lambda job, experts, per_group, **_: given.append(per_group.fusion))
    asked.recipe = replace(asked.recipe, scores=None if scores is None else ScoreRange(*scores))
    set_fedgrpo(asked, spread=spread)
    module._reward(asked, None, Variant())
    assert given == [VarianceGate(group_relative, units) if units else group_relative]
