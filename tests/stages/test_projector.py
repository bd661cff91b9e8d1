"""The stage that trains the policy's projector with all sites, before all others."""

import json
import math
from contextlib import contextmanager
from dataclasses import replace
from statistics import fmean

import msgspec
import pytest
import torch

from accord.attacks.updates import hostile, huge
from accord.errors import DataError, DataWarning, RecipeError, RunError
from accord.evaluation.captions import cider_d
from accord.evaluation.summary import ProjectorMeasure, ProjectorSummary, accuracy
from accord.federation import rounds
from accord.federation.aggregation import Aggregation
from accord.federation.engine import InProcessEngine
from accord.federation.messages import UpdateReply
from accord.federation.projector import OnePass, ProjectorConfig
from accord.federation.weights import trainable_weights
from accord.models.generate import answer
from accord.models.load import load_model
from accord.models.projector import train_projector_alone
from accord.recipe import Policy, Recipe, SiteConfig, Source
from accord.recipe_file import dump_recipe, recipe_of
from accord.runs import Run
from accord.stages.job import on_own_projector, open_job
from accord.stages.projector import (
    MEASURED,
    _measure,
    _round,
    check_projector,
    measured_projector,
    pretrain_projector,
    projector_training,
)
from accord.toml import load_toml

COLOURS = ("red", "blue", "green", "yellow")


@pytest.fixture
def recipe(llava, vqa):
    """Two sites, `a` with 6 captions and `b` with 4, in two rounds of one batch each."""
    rows = [("private", kind, COLOURS[n % 4]) for kind, count in (("colour", 6), ("number", 4)) for n in range(count)]
    rows += [(split, "colour", colour) for split in ("public", "dev", "test") for colour in COLOURS]
    sites = (
        SiteConfig("a", "accord/idefics3", question_types=("colour",)),
        SiteConfig("b", "accord/idefics3", question_types=("number",)),
    )
    averaging = OnePass(rounds=2, batch_size=4, learning_rate=0.01)
    return Recipe(
        "x",
        sites,
        questions=(Source("folder", path=vqa("shapes", rows)),),
        policy=Policy(llava),
        projector=ProjectorConfig(averaging=averaging),
    )


@contextmanager
def opened(recipe, path):
    text = dump_recipe(recipe)
    run = Run.resume(path, text) if path.exists() else Run.create(path, text, seed=recipe.seed)
    with open_job(recipe, run, quiet=True) as job:
        yield job


def train(recipe, path):
    with opened(recipe, path) as job:
        return pretrain_projector(job)


def records(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def files(path):
    return (path / "metrics.jsonl").read_bytes(), (path / "projector/checkpoint/model.safetensors").read_bytes()


def with_projector(recipe, **changes):
    return replace(recipe, projector=replace(recipe.projector, **changes))


def test_the_checkpoint_has_another_projector_and_is_the_base_of_the_run(recipe, llava, tmp_path):
    summary = train(recipe, tmp_path / "run")
    base, new = (
        load_model(llava)[0].state_dict(),
        load_model(str(tmp_path / "run/projector/checkpoint"))[0].state_dict(),
    )
    assert {name for name in base if not torch.equal(base[name], new[name])} == {
        f"model.multi_modal_projector.linear_{n}.{part}" for n in (1, 2) for part in ("weight", "bias")
    }
    with opened(recipe, tmp_path / "run") as job:
        assert job.recipe.policy.checkpoint == str(tmp_path / "run/projector/checkpoint")
        assert job.recipe.encoder_checkpoint == llava
        policy = job.policy[0].state_dict()
    assert all(torch.equal(policy[name], new[name]) for name in new)
    assert summary == measured_projector(tmp_path / "run")
    assert [{name: site.examples for name, site in each.sites.items()} for each in summary.rounds] == [
        {"a": 3, "b": 2}
    ] * 2
    assert {name: site.weight for name, site in summary.rounds[0].sites.items()} == {"a": 0.6, "b": 0.4}
    assert all(site.distance > 0 for each in summary.rounds for site in each.sites.values())
    assert summary.after.nll < summary.before.nll and summary.after.accuracy.n == 4
    rows = records(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 2, 2] and [row.get("of") for row in rows] == [
        None,
        None,
        "before",
        "after",
    ]
    assert rows[0]["sites"]["a"]["distance"] == summary.rounds[0].sites["a"].distance
    sent = json.loads((tmp_path / "run/traffic/projector.json").read_text())
    assert [row[:3] for row in sent] == [["a", "projector", 2], ["b", "projector", 2]]
    weights = 4 * summary.parameters  # float32
    assert all(
        2 * weights < down < 2 * weights + 2000 and 2 * weights < up < 2 * weights + 2000 for *_, down, up, _ in sent
    )


def test_one_seed_gives_one_result(recipe, tmp_path):
    for name in "ab":
        train(recipe, tmp_path / name)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    train(replace(recipe, seed=1), tmp_path / "c")
    assert files(tmp_path / "a")[1] != files(tmp_path / "c")[1]


def test_a_stage_that_was_stopped_starts_over_and_gives_the_same(recipe, tmp_path, monkeypatch):
    """Stopped in round 2: nothing is done, no checkpoint is there, and no other stage begins."""
    train(recipe, tmp_path / "whole")
    combine, seen = rounds.shares, []

    def stopped(examples):
        seen.append(examples)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return combine(examples)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rounds, "shares", stopped)
        train(recipe, tmp_path / "run")
    assert [row["step"] for row in records(tmp_path / "run")] == [1]
    assert not (tmp_path / "run/projector").exists() and not (tmp_path / "run/traffic").exists()
    with opened(recipe, tmp_path / "run") as job:
        assert not job.run.done("projector")
        with pytest.raises(RunError, match="projector/checkpoint is missing; make it with `accord pretrain-projector"):
            job.doing("align").__enter__()
        pretrain_projector(job)
        assert job.run.done("projector")
    assert files(tmp_path / "run") == files(tmp_path / "whole")
    sent = "traffic/projector.json"
    assert (tmp_path / "run" / sent).read_bytes() == (tmp_path / "whole" / sent).read_bytes()


def test_what_stands_on_the_projector_is_undone_with_it(recipe, tmp_path):
    with opened(recipe, tmp_path / "run") as job:
        pretrain_projector(job)
        for stage, needs in (("site a", None), ("align", ("sites",)), ("compare base", ())):
            with job.doing(stage, needs=needs):
                pass
        pretrain_projector(job)
        assert not any(job.run.done(stage) for stage in ("site a", "align", "compare base"))


def test_a_projector_may_be_kept_to_begin_with(recipe, tmp_path):
    kept = train(with_projector(recipe, initial="keep"), tmp_path / "kept")
    drawn = train(recipe, tmp_path / "drawn")
    assert kept.initial == "keep" and kept.before != drawn.before


def test_the_bounds_send_nothing(recipe, tmp_path):
    """Central: one round is over 5 of 10 captions. Local: each site has all the weight, and a checkpoint of its own."""
    central = train(with_projector(recipe, training="central"), tmp_path / "central")
    assert [{name: site.examples for name, site in each.sites.items()} for each in central.rounds] == [
        {"all sites": 5}
    ] * 2
    local = train(with_projector(recipe, training="local"), tmp_path / "local")
    assert [{name: site.weight for name, site in each.sites.items()} for each in local.rounds] == [
        {"a": 1.0, "b": 1.0}
    ] * 2
    assert local.after.accuracy.n == 2 * 4
    places = [tmp_path / "local/projector/sites" / name for name in "ab"]
    one, other = (load_model(str(place))[0].state_dict() for place in places)
    assert {name.split(".")[1] for name in one if not torch.equal(one[name], other[name])} == {"multi_modal_projector"}
    assert not (tmp_path / "local/projector/checkpoint").exists()
    for name in ("central", "local"):
        assert json.loads((tmp_path / name / "traffic/projector.json").read_text()) == []


def test_a_local_projector_is_what_the_site_trains_without_others(recipe, tmp_path):
    """Site a's rounds in `local` are those of a federation of a alone: the seed depends on no other site.

    The server's momentum is none of a site's that trains for itself.
    """
    averaging = replace(recipe.projector.averaging, aggregation=Aggregation("fedavgm"))
    assert train(with_projector(recipe, training="local", averaging=averaging), tmp_path / "local").rule == "fedavg"
    train(replace(recipe, sites=recipe.sites[:1]), tmp_path / "alone")
    place = "model.safetensors"
    local = (tmp_path / "local/projector/sites/a" / place).read_bytes()
    assert local == (tmp_path / "alone/projector/checkpoint" / place).read_bytes()


def test_every_rule_of_the_server_is_told_as_far_as_it_says_something(recipe, tmp_path):
    averaging = replace(recipe.projector.averaging, aggregation=Aggregation("fedavgm", bits=16))
    summary = train(with_projector(recipe, averaging=averaging), tmp_path / "run")
    assert summary.rule == "fedavgm" and summary.rounds[0].lag is None
    replies = {name: UpdateReply("r", b"", 1, 2.0, distance=1.0) for name in "ab"}
    told = _round(replies, 0, [{"weights": [0.7, 0.3], "beta": {"x": 0.5, "y": 0.7}, "cosine": {}, "lag": 0.25}])
    assert (told.beta, told.cosine, told.lag) == (pytest.approx(0.6), None, 0.25)
    assert [site.weight for site in told.sites.values()] == [0.7, 0.3]


def test_captions_with_several_references_are_measured_by_cider(recipe, tmp_path):
    with opened(recipe, tmp_path / "run") as job:
        model, processor = load_model(recipe.policy.checkpoint, trainable=True)
        train_projector_alone(model)
        asked, weights = job.questions["dev"], [trainable_weights(model)]
        assert _measure(job, asked, model, processor, weights).cider is None
        limit = job.recipe.alignment.max_completion_length
        said = [texts[0] for texts in answer(model, processor, asked, max_new_tokens=limit)]
        several = [replace(q, answer=said[0], references=("a red square", said[0])) for q in asked]
        expected = fmean(cider_d(said, [(q.answer, *q.references) for q in several]))
        assert _measure(job, several, model, processor, weights).cider == pytest.approx(expected)


def test_a_loss_that_a_hostile_site_made_up_leaves_the_measures_readable(tmp_path):
    """The sum of two of the largest floats would be infinite, which JSON does not hold; their mean is not."""
    right = accuracy({"colour": (1, 2)})
    for loss in (-1.0, 1.7e308):
        told = _round({name: UpdateReply("r", b"", 1, loss, distance=1.7e308) for name in "ab"}, 0, [])
        measure = ProjectorMeasure(1.0, 2.0, right, None)
        summary = ProjectorSummary("x", "federated", "fedavg", "plain", "keep", 1, measure, measure, (told,))
        (tmp_path / "projector").mkdir(exist_ok=True)
        (tmp_path / MEASURED).write_bytes(msgspec.json.encode(summary))
        assert measured_projector(tmp_path) == summary and told.loss == loss


def test_a_projector_that_breaks_the_model_is_left_out(recipe, tmp_path, monkeypatch):
    """Of two sites, b sends 3e38. Without a bound the probe leaves it out; without that a is lost, too."""
    aggregation = Aggregation(bound=0)
    recipe = with_projector(recipe, averaging=replace(recipe.projector.averaging, aggregation=aggregation))

    def attacked(path):
        with opened(recipe, path) as job:
            sites = {name: projector_training(job, name) for name in "ab"}
            job.engine = InProcessEngine(hostile(sites, ["b"], huge, loss=1.0, distance=0.0))
            return pretrain_projector(job)

    with pytest.warns(DataWarning, match=r"site b sent an update that breaks the projector: .*; round . of the"):
        defended = attacked(tmp_path / "defended")
    assert math.isfinite(defended.after.nll) and [set(each.sites) for each in defended.rounds] == [{"a"}] * 2
    monkeypatch.setattr("accord.stages.projector.probe_of", lambda *_: None)
    with (
        pytest.warns(DataWarning, match="site (a sent an update that cannot be used|b sent an update that breaks)"),
        pytest.raises(RunError, match=r"round 2 of the projector: 2 of 2 .* that of site b"),
    ):
        attacked(tmp_path / "open")


def test_a_site_with_too_little_stops_it_before_training(recipe, tmp_path):
    averaging = replace(recipe.projector.averaging, rounds=5)
    with pytest.raises(DataError, match="site b has 4 captions for 5 rounds"):
        train(with_projector(recipe, averaging=averaging), tmp_path / "rounds")
    sites = (*recipe.sites, SiteConfig("c", "accord/idefics3", preferences="pairs.jsonl", finetune=None))
    with pytest.raises(DataError, match="site c has no caption of an image"):
        train(replace(recipe, sites=sites), tmp_path / "none")


def test_a_recipe_that_cannot_be_done_is_refused(recipe, tmp_path):
    check_projector(recipe)
    local = with_projector(recipe, training="local")
    check_projector(local, alone=True)
    with pytest.raises(RecipeError, match=r'training = "local" leaves every site .* `accord pretrain-projector`'):
        check_projector(local)
    with opened(local, tmp_path / "local") as job, pytest.raises(RecipeError, match=r'say training = "federated"'):
        job.doing("align").__enter__()
    with pytest.raises(RecipeError, match=r"training = 'central' is a bound .* without --engine flare"):
        check_projector(with_projector(recipe, training="central"), elsewhere=True)
    with pytest.raises(RecipeError, match=r"trains no projector; add a \[projector\] table"):
        check_projector(replace(recipe, projector=None), alone=True)
    site = SiteConfig("a", "accord/idefics3", preferences="pairs.jsonl", finetune=None)
    with pytest.raises(RecipeError, match="no site holds any but its own pairs"):
        check_projector(replace(recipe, sites=(site,)))


def test_a_table_says_how(tmp_path):
    """Local steps are those of an epoch: there is no such setting."""
    sites = '[[sites]]\nname = "a"\ncheckpoint = "accord/idefics3"\n'
    file = tmp_path / "recipe.toml"
    file.write_text(
        'name = "x"\n[projector.averaging]\nrounds = 3\n[projector.averaging.aggregation]\nrule = "ties"\n' + sites
    )
    made = recipe_of(load_toml(file))
    assert made.projector == ProjectorConfig(averaging=OnePass(rounds=3, aggregation=Aggregation("ties")))
    assert on_own_projector(made, tmp_path).projector is None
    assert recipe_of(load_toml(file)) == made
    file.write_text('name = "x"\n[projector.averaging]\nlocal_steps = 3\n' + sites)
    with pytest.raises(RecipeError, match="local_steps"):
        recipe_of(load_toml(file))
