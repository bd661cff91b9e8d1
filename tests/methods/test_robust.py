"""Which labelled questions become canaries: drawn by a key, none twice over the runs of one record."""

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from pytest import approx
from safetensors.torch import save

from accord.alignment.grpo import AlignmentConfig
from accord.errors import DataError, DataWarning, RecipeError, RunError
from accord.evaluation.summary import TrustSummary
from accord.federation.messages import ScoreRange
from accord.methods.robust import CANARIES, METHODS, ROBUST, canaries_of, check_canaries, who_is_trusted
from accord.recipe import Preferences, Recipe, SiteConfig
from accord.routing.canaries import CanaryConfig
from accord.routing.robust import RobustConfig
from accord.runs import Run, write_atomic
from accord.stages.alignment import memory_file
from accord.stages.job import Job

COLOURS = ("red", "blue", "green", "yellow")
STEPS = 4  # of three canaries: a run takes 12


@pytest.fixture
def open_run(ask, tmp_path):
    """Return a function that opens a run folder, with as many labelled questions as it is told, of two types."""
    recipe = Recipe(
        "x",
        (SiteConfig("a", "accord/idefics3"),),
        preferences=Preferences(policy_samples=0),
        alignment=AlignmentConfig(steps=STEPS),
    )

    @contextmanager
    def opened(
        name="run",
        count=60,
        *,
        record="",
        seed=0,
        domain=lambda n: "",
        resumed=False,
        kinds=("colour", "number"),
        prompts=("colour", "number"),
        preferences=recipe.preferences,
        steps=STEPS,
        balanced=True,
    ):
        tables = {CANARIES.name: CanaryConfig(record=str(record))}
        alignment = replace(recipe.alignment, steps=steps, balanced=balanced)
        asked = replace(recipe, seed=seed, tables=tables, preferences=preferences, alignment=alignment)
        run = Run.resume(tmp_path / name, 'name = "x"\n') if resumed else None
        with run or Run.create(tmp_path / name, 'name = "x"\n', seed=0) as folder:
            work = Job(asked, folder, quiet=True)
            base = [
                ask(
                    n,
                    COLOURS[n // len(kinds) % 4],
                    text=f"what colour is number {n}?",
                    question_type=kinds[n % len(kinds)],
                    domain=domain(n),
                )
                for n in range(count)
            ]
            work.questions = {
                "base": base,
                "public": [ask(999, domain=domain(n), question_type=kind) for n, kind in enumerate(prompts)],
            }
            yield work

    return opened


def texts(canaries):
    return [str(canary.prompt) for canary in canaries.pool]


def test_a_pool_is_drawn_by_the_seed_types_in_turn(open_run):
    """12 of 60, six of either type, the same each time; of another seed others, and not the first of the file."""
    with open_run() as work:
        first, again = canaries_of(work), canaries_of(work)
    with open_run("other", seed=1) as work:
        other = canaries_of(work)
    assert texts(first) == texts(again) and len(set(texts(first))) == 12
    assert [canary.kind for canary in first.pool] == ["colour", "number"] * 6
    assert set(texts(first)) != set(texts(other)) and not all(
        any(f"number {n}?" in text for n in range(12)) for text in texts(first)
    )


def test_a_rare_type_is_as_rare_among_canaries(open_run):
    """Three of four prompts ask about colours. Canaries that do so less often would be known by their type."""
    asked = ("colour", "number", "colour", "colour")
    with open_run(prompts=asked, balanced=False) as work:
        assert [canary.kind for canary in canaries_of(work).pool] == ["colour", "colour", "number", "colour"] * 3
    with open_run("other", prompts=asked) as work:
        assert [canary.kind for canary in canaries_of(work).pool] == ["colour", "number"] * 6


@pytest.mark.filterwarnings("error")
def test_the_rarest_type_has_a_canary(open_run):
    """One of forty prompts, where twelve canaries are taken: a site that lies about it alone is asked once."""
    with open_run(prompts=("number", *["colour"] * 39), balanced=False) as work:
        check_canaries(work)
        assert [canary.kind for canary in canaries_of(work).pool].count("number") == 1


def test_only_types_that_the_alignment_asks_become_canaries(open_run):
    """A number among prompts about colours would be seen at once; of shapes the server knows nothing, and is told."""
    with open_run(prompts=("colour",)) as work:
        assert {canary.kind for canary in canaries_of(work).pool} == {"colour"}
    told = "no hidden question is of the types 'shape', 'size', which the alignment asks"
    with open_run("other", prompts=("colour", "shape", "size")) as work, pytest.warns(DataWarning, match=told):
        assert {canary.kind for canary in canaries_of(work).pool} == {"colour"}
    with open_run("third", prompts=("shape",)) as work, pytest.raises(DataError, match="none of a type that the"):
        canaries_of(work)


def test_a_type_whose_questions_other_runs_have_asked_is_told(open_run, tmp_path):
    """A first run takes all six about numbers among its twelve; the second has colours alone."""
    record = tmp_path / "asked.jsonl"
    few = {"prompts": ("colour", "number"), "record": record, "kinds": ("colour", "colour", "colour", "number")}
    with open_run("first", 24, **few) as work:
        assert {canary.kind for canary in canaries_of(work).pool} == {"colour", "number"}
    with open_run("second", 24, **few) as work, pytest.warns(DataWarning) as told:
        assert {canary.kind for canary in canaries_of(work).pool} == {"colour"}
    assert any("no hidden question is of the types 'number', which" in str(each.message) for each in told)


def test_anchors_are_left_out_of_enough_questions_of_these_types(open_run):
    """Of 405 about colours 200 may be anchors; of 404 of which 303 are about what nobody asks none is left out."""
    with open_run(count=405, kinds=("colour",), prompts=("colour",), steps=100) as work, pytest.warns(DataWarning):
        assert len(canaries_of(work).pool) == 205
    many = ("colour", "number", "number", "number")
    with open_run("other", 404, kinds=many, prompts=("colour",), steps=100) as work, pytest.warns(DataWarning):
        assert len(canaries_of(work).pool) == 101


def test_a_right_answer_that_the_policy_never_gives_makes_a_canary(open_run, monkeypatch):
    """Where sites judge what the policy says, the server still knows better; no sample of the policy is right here."""
    monkeypatch.setattr(
        "accord.stages.sites.answer", lambda *_, **settings: [["grey", "white"]] * STEPS * CanaryConfig().per_step
    )
    with open_run(preferences=Preferences(judged=True, policy_samples=2)) as work:
        work.policy = None, None
        pool = canaries_of(work).pool
    assert len(pool) == 12 and all(canary.right in COLOURS for canary in pool)
    assert any({"grey", "white"} & set(canary.wrong) for canary in pool)


def test_two_runs_of_one_record_share_no_canary_and_a_resumed_one_goes_on_with_its_own(open_run, tmp_path):
    """Of one seed: without a record the two have the same. Two alignments of one run share none either."""
    with open_run("plain") as one, open_run("plain-2") as two:
        assert texts(canaries_of(one)) == texts(canaries_of(two))
    record = tmp_path / "server" / "asked.jsonl"
    with open_run("first", record=record) as work:
        first = texts(canaries_of(work))
    with open_run("second", record=record) as work:
        second, compared = texts(canaries_of(work)), texts(canaries_of(work, "compare canary-mean"))
    with open_run("first", record=record, resumed=True) as work:
        assert texts(canaries_of(work)) == first
    assert len({*first, *second, *compared}) == 36
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [len(line["keys"]) for line in lines] == [12, 12, 12] and record.stat().st_mode & 0o077 == 0


@pytest.mark.filterwarnings("error")
def test_without_a_record_other_organisations_may_see_a_canary_again(open_run, tmp_path, monkeypatch):
    monkeypatch.setattr("accord.methods.robust.run_grpo", lambda *_, **__: None)
    monkeypatch.setattr("accord.methods.robust.federated_reward", lambda *_, **__: None)
    with open_run() as work, pytest.warns(DataWarning, match=r"a later run may ask the same .* add record = \"/absol"):
        work.engine = object()
        METHODS["canary"].align(work, "align")
    with open_run("other", record=tmp_path / "asked.jsonl") as work:
        work.engine = object()
        METHODS["canary"].align(work, "align")


def test_few_that_are_left_are_told_and_none_is_an_error(open_run, tmp_path):
    """Of 20 a first run takes 12, a second the 8 that are left, and a third has none."""
    record = tmp_path / "asked.jsonl"
    with (
        open_run("first", 20, record=record) as work,
        pytest.warns(DataWarning, match=r"asked\.jsonl leaves 8 labelled questions .* takes 12"),
    ):
        first = texts(canaries_of(work))
    with open_run("second", 20, record=record) as work, pytest.warns(DataWarning) as told:
        second = texts(canaries_of(work))
    assert len(second) == 8 and not set(first) & set(second)
    assert any("from step 3 on no site is watched" in str(each.message) for each in told)
    with open_run("third", 20, record=record) as work, pytest.warns(DataWarning), pytest.raises(DataError):
        canaries_of(work)
    with open_run("third", 40, record=record, resumed=True) as work, pytest.warns(DataWarning, match="leaves 8"):
        assert len(texts(canaries_of(work))) == 12  # with more questions it goes on


def test_a_record_that_cannot_be_read_asks_nothing(open_run, tmp_path):
    record = tmp_path / "asked.jsonl"
    record.write_text('{"run": "a", "keys": ["x"]}\n{"run": "b", "ke')
    with open_run(record=record) as work, pytest.raises(RunError, match="nobody knows what was asked; put a copy back"):
        canaries_of(work)
    with pytest.raises(RecipeError, match=r"record must be an absolute path, got 'asked\.jsonl'"):
        CanaryConfig(record="asked.jsonl")


def test_a_type_of_two_domains_is_told(open_run):
    """Trust is of a type; of two domains with one name for it the sites have one trust."""
    told = r"several domains share the question types 'colour', 'number', .* add type_prefix = true"
    with open_run(domain=lambda n: ("rooms", "shapes")[n < 30]) as work, pytest.warns(DataWarning, match=told):
        canaries_of(work)
    with open_run("other", domain=lambda n: ("rooms", "shapes")[n % 2]) as work:
        canaries_of(work)  # a type of its own for each: warnings are errors


@pytest.mark.parametrize("name", ["rank-mean", "canary-average"])
def test_a_recipes_cap_and_spread_are_those_of_its_reward(open_run, monkeypatch, name):
    """By 4 % of a range of 1 a site that differs by 0.02 has no opinion, and by the default of 1 % it has one."""
    made = []
    monkeypatch.setattr("accord.methods.robust.federated_reward", lambda *_, per_group, **__: made.append(per_group))
    for table in ({}, {ROBUST.name: RobustConfig(spread=0.04, cap=0.25)}):
        with open_run(str(len(made))) as work:
            work.recipe = replace(work.recipe, scores=ScoreRange(0.0, 1.0), tables={**work.recipe.tables, **table})
            METHODS[name].reward(work)
    scores, weights = torch.tensor([[0.5], [0.52], [0.52], [0.5]]), torch.ones(4, 1)
    default, given = (each.fusion(scores, weights) for each in made)
    assert default.isfinite().all() and not given.nan_to_num().any()
    assert [each.cap for each in made] == [0.5, 0.25]


def test_sites_are_compared_by_the_opinions_that_ranks_have(open_run):
    """1 % of the agreed range, in both."""
    with open_run() as work:
        scores = work.recipe.scores
        assert canaries_of(work).trust.between.spread == approx(0.01 * (scores.high - scores.low))


def test_whom_an_alignment_trusted_is_read_from_what_it_kept(open_run):
    """No question is needed for it, and the policy is not asked again; before the alignment nobody was trusted."""
    with open_run() as work:
        known = canaries_of(work)
        for _ in range(20):
            known.trust.learn("a", "colour", 1.0)
        known.used = 7
        known.trust.aside[0, 1] = known.trust.two_faced[0, 2] = known.trust.triggered[0, 0] = True
        assert who_is_trusted(work, "align", ["a"]) == {}
        write_atomic(memory_file(work.path, "align"), save(known.state_dict()))
        work.questions = {}
        trust = who_is_trusted(work, "align", ["a"])["trust"]
    assert trust == TrustSummary(
        7,
        known.trust.by_kind(known.trust.estimate()),
        aside={"a": ("colour",)},
        two_faced={"a": ("number",)},
        triggered={"a": (next(iter(known.trust.words)),)},
        asked={"a": {"colour": 20, "number": 0}},
    )
    assert trust.sites["a"]["colour"] > 0.8 and trust.sites["a"]["number"] == 0.6
