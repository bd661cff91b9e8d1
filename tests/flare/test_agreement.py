"""Sites that were trained with another recipe than the server's are told before anything is asked of them."""

import dataclasses
import shutil
import time
import warnings

import msgspec
import pytest
import tomli_w

import accord.stages.agreement
from accord.errors import CheckpointError, DataWarning, RunError
from accord.federation.agreement import Agreeing, differences
from accord.federation.engine import InProcessEngine
from accord.federation.messages import MESSAGES, Absence, Agreement, Card, CardRequest, ScoreRange
from accord.federation.projector import ProjectorConfig
from accord.flare.engine import FlareEngine
from accord.flare.frames import socket_folder
from accord.flare.launch import Production
from accord.flare.service import open_site_folder
from accord.recipe_file import dump_recipe, load_recipe
from accord.routing.router import RouterConfig
from accord.runs import Run
from accord.stages.agreement import agreement_of, weights_digest
from accord.toml import load_toml

OURS = Agreement(MESSAGES, "1.2.3", "s", "r", "c", "p")


def site(agreement):
    return lambda request: Card(request.id, "Llava", 1, 2, 3, True, {}, agreement=agreement)


def asked(engine, *sites):
    return engine.ask({name: CardRequest(f"card-{name}") for name in sites})


@pytest.fixture(scope="module")
def four(recipe, tmp_path_factory):
    """The recipe of the sites with one site more."""
    table = load_toml(recipe)
    table["sites"].append({**table["sites"][0], "name": "texture"})
    path = tmp_path_factory.mktemp("four") / "recipe.toml"
    path.write_text(tomli_w.dumps(table))
    return load_recipe(path)


def test_every_difference_is_named():
    changes = {"sites": "x", "router": "x", "scores": "x", "policy": "x"}
    assert differences(OURS, OURS) == []
    for part, value in changes.items():
        assert differences(OURS, msgspec.structs.replace(OURS, **{part: value})) == [part]
    assert differences(OURS, msgspec.structs.replace(OURS, messages=1)) == [
        f"messages of version 1, and the server's are of {MESSAGES}"
    ]
    assert "older" in differences(OURS, None)[0]


def test_the_first_question_is_refused_and_says_who_differs():
    other = msgspec.structs.replace(OURS, sites="x", scores="y")
    engine = Agreeing(InProcessEngine({"a": site(OURS), "b": site(other), "c": site(None)}), OURS)
    with pytest.raises(RunError, match="site b: sites, scores; site c: its Accord") as caught:
        asked(engine, "a", "b", "c")
    assert "site a" not in str(caught.value) and engine.traffic.counts == {}


def test_who_comes_later_and_differs_is_left_out_and_told_once():
    other = msgspec.structs.replace(OURS, router="x")
    engine = Agreeing(InProcessEngine({"a": site(OURS), "b": site(other)}), OURS)
    assert isinstance(asked(engine, "a")["a"], Card)
    with pytest.warns(DataWarning, match=r"site b came and does not agree with the server \(router\)"):
        replies = asked(engine, "a", "b")
    assert isinstance(replies["a"], Card) and replies["b"] == Absence("b", "refused")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert asked(engine, "b") == {"b": Absence("b", "refused")}


def test_what_can_be_seen_of_a_run_while_sites_are_compared():
    """Who was left out, until it agrees; and the run's traffic, although what the comparison takes is not in it."""
    works, seen = {"b": msgspec.structs.replace(OURS, router="x")}, []

    def look(request):
        seen.append(dict(engine.traffic.counts))
        return site(works["b"])(request)

    engine = Agreeing(InProcessEngine({"a": site(OURS), "b": look}), OURS)
    asked(engine, "a")
    before = dict(engine.traffic.counts)
    assert before and engine.left_out == set()
    with pytest.warns(DataWarning):
        asked(engine, "b")
    assert seen == [before] and engine.left_out == {"b"}
    asked(engine, "a")
    assert engine.left_out == {"b"}
    works["b"] = OURS
    asked(engine, "b")
    assert engine.left_out == set() and engine.traffic is engine.engine.traffic


def test_who_was_away_is_compared_again():
    """A site that failed once may come back as another."""
    works = {"a": OURS}

    def answer(request):
        if works["a"] is None:
            raise RuntimeError
        return site(works["a"])(request)

    engine = Agreeing(InProcessEngine({"a": answer}), OURS)
    assert isinstance(asked(engine, "a")["a"], Card)
    works["a"] = None
    assert asked(engine, "a") == {"a": Absence("a", "error")}
    works["a"] = msgspec.structs.replace(OURS, policy="x")
    with pytest.warns(DataWarning, match=r"\(policy\)"):
        assert asked(engine, "a") == {"a": Absence("a", "refused")}


def test_a_site_that_hangs_holds_nobody_up_for_longer_than_a_question():
    """Its card had all the time at first; once the run has begun it has as much as the question."""

    given = []

    class Noting(InProcessEngine):
        def ask(self, requests, *, deadline=None):
            given.append(deadline)
            return super().ask(requests, deadline=deadline)

    works = [True]

    def answer(request):
        if not works[0]:
            raise RuntimeError
        return site(OURS)(request)

    engine = Agreeing(Noting({"a": answer}), OURS)
    for there in (True, False, False):
        works[0] = there
        engine.ask({"a": CardRequest("card-a")}, deadline=5.0)
    assert given == [600.0, 5.0, 5.0, 5.0]


def test_another_accord_of_the_same_messages_is_told():
    engine = Agreeing(InProcessEngine({"a": site(msgspec.structs.replace(OURS, accord="1.2.2"))}), OURS)
    with pytest.warns(DataWarning, match=r"site a runs Accord 1\.2\.2, the server 1\.2\.3"):
        assert isinstance(asked(engine, "a")["a"], Card)


def test_each_part_of_a_recipe_has_its_digest(recipe):
    """What is a participant's own alone changes none."""
    ours = load_recipe(recipe)
    made = agreement_of(ours)
    coarser = dataclasses.replace(ours.router.aggregation, bits=8)
    changed = [
        ("sites", dataclasses.replace(ours, sites=ours.sites[::-1])),
        ("router", dataclasses.replace(ours, router=dataclasses.replace(ours.router, local_steps=99))),
        ("router", dataclasses.replace(ours, router=dataclasses.replace(ours.router, aggregation=coarser))),
        ("scores", dataclasses.replace(ours, scores=None)),
        ("scores", dataclasses.replace(ours, scores=ScoreRange(-1.0, 1.0))),
        ("policy", dataclasses.replace(ours, max_pixels=1000)),
        ("policy", dataclasses.replace(ours, projector=ProjectorConfig())),
    ]
    for part, other in changed:
        assert differences(made, agreement_of(other)) == [part]
    own = dataclasses.replace(ours, sites=tuple(dataclasses.replace(s, answers=not s.answers) for s in ours.sites))
    assert agreement_of(own) == made
    router = dataclasses.replace(ours.router, rows_at_once=7, audit=0, leave_out=True)
    assert agreement_of(dataclasses.replace(ours, router=router)) == made


def test_a_setting_that_only_one_version_knows_is_no_difference_at_its_default(recipe, monkeypatch):
    """The newer version's digests are the older's until somebody uses what is new."""

    @dataclasses.dataclass(frozen=True)
    class Newer(RouterConfig):
        of_tomorrow: int = 0

    ours = load_recipe(recipe)
    made = agreement_of(ours)
    monkeypatch.setattr(accord.stages.agreement, "RouterConfig", Newer)
    values = {field.name: getattr(ours.router, field.name) for field in dataclasses.fields(ours.router)}
    assert agreement_of(dataclasses.replace(ours, router=Newer(**values))) == made
    used = agreement_of(dataclasses.replace(ours, router=Newer(**values, of_tomorrow=1)))
    assert differences(made, used) == ["router"]


def test_an_absent_policy_is_named(recipe, monkeypatch):
    ours = load_recipe(recipe)
    with pytest.raises(CheckpointError, match="nobody/knows-it: cannot load the checkpoint"):
        agreement_of(dataclasses.replace(ours, policy=dataclasses.replace(ours.policy, checkpoint="nobody/knows-it")))


def test_a_policy_is_known_by_its_weights_and_not_by_its_place(checkpoints, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(checkpoints["llava-clip-llama"], copy)
    shutil.copy(copy / "model.safetensors", copy / "consolidated.safetensors")  # as some hold their weights twice
    assert weights_digest(str(copy)) == weights_digest(checkpoints["llava-clip-llama"])
    weights = next(tmp_path.glob("elsewhere/model*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    other = tmp_path / "other"
    shutil.copytree(copy, other)
    (other / weights.name).write_bytes(data)
    assert weights_digest(str(other)) != weights_digest(str(copy))


@pytest.mark.slow
def test_a_site_keeps_its_model_where_another_is_added(site_folders, four, tmp_path):
    """It takes the other's table into the recipe of its own folder; what it has trained and its ledger stay."""
    folder = tmp_path / "colour"
    shutil.copytree(site_folders["colour"], folder)
    (folder / "recipe.toml").write_text(dump_recipe(four))
    with Run.resume(folder, (folder / "recipe.toml").read_text()):  # as `accord site join` takes it
        site = open_site_folder(folder, "colour")
    engine = Agreeing(InProcessEngine({"colour": site.answer}), agreement_of(four))
    assert isinstance(asked(engine, "colour")["colour"], Card)


@pytest.mark.slow
def test_four_sites_in_the_recipe_and_three_folders_of_another_in_process(site_folders, four):
    handlers = {name: open_site_folder(folder, name).answer for name, folder in site_folders.items()}
    engine = Agreeing(InProcessEngine(handlers), agreement_of(four))
    with pytest.raises(RunError, match="site colour: sites; site shape: sites; site yes-no: sites"):
        asked(engine, *(each.name for each in four.sites))
    same = Agreeing(InProcessEngine(handlers), agreement_of(load_recipe(site_folders["shape"] / "recipe.toml")))
    assert all(isinstance(reply, Card) for reply in asked(same, *handlers).values())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_sites_in_the_recipe_and_three_folders_of_another_on_flare(consortium, four):
    names = [each.name for each in four.sites]
    launcher, sockets = Production(consortium.kits / "operator"), socket_folder(consortium.kits / "server")
    until = time.monotonic() + 300
    while launcher.connected().keys() != set(consortium.names):
        assert time.monotonic() < until, "the sites never came"
        time.sleep(1.0)
    with (
        FlareEngine(names, launcher, sockets, wait=60.0) as flare,
        pytest.raises(RunError, match="site colour: sites; site shape: sites; site yes-no: sites"),
    ):
        asked(Agreeing(flare, agreement_of(four)), *names)
