"""Every training that averages what the sites send: one site of three sends ±3e38 for everything, in every round.

    bound 5     w + (Δ_a + Δ_b + 5 m Δ_c / ‖Δ_c‖) / 3,  m = max(‖Δ_a‖, ‖Δ_b‖): the median of all three
    bound 0     w + (Δ_a + Δ_b) / 2: with c's the outputs are not finite, and the round is done without it

Each training is run as its stage or its method runs it, from a recipe, so that what is missing between the two shows.
"""

import re
from collections import defaultdict
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

import accord
from accord.alignment.grpo import AlignmentConfig
from accord.attacks.updates import huge, lying
from accord.errors import DataWarning
from accord.federation.aggregation import BOUND, Aggregation, length_of, mean
from accord.federation.engine import InProcessEngine
from accord.federation.local import Averaging
from accord.federation.projector import OnePass, ProjectorConfig
from accord.methods import METHODS
from accord.methods.fedavg_reward import SharedRewardConfig
from accord.methods.fedbiscuit import FedBisConfig, FedBiscuitConfig
from accord.methods.feddpo import FedDpoConfig
from accord.methods.fedit import FedITConfig
from accord.methods.late import LateConfig, late_router
from accord.methods.shared_head import SharedHeadConfig, train_heads
from accord.models.load import LoraSettings
from accord.recipe import Policy, Recipe, SiteConfig
from accord.routing.router import RouterConfig, load_router
from accord.runs import Run
from accord.stages import training
from accord.stages.job import open_job
from accord.stages.projector import pretrain_projector
from accord.stages.routing import train_router
from accord.stages.sites import router_training

COLOURS = {"a": "red", "b": "blue", "c": "green"}
LORA = LoraSettings(rank=2, alpha=4)


def recipe_of(llava, rule):
    """Two rounds of one local step of whatever is trained, combined by `rule`."""
    averaging = Averaging(rounds=2, local_steps=1, batch_size=2, learning_rate=1e-2, aggregation=rule)
    selectors = {"prompts": 4, "temperature": 2.0, "dpo_steps": 1, "lora": LORA}
    return Recipe(
        "x",
        tuple(SiteConfig(name, llava) for name in COLOURS),
        policy=Policy(llava),
        router=RouterConfig(layers=1, width=8, heads=2, rounds=2, local_steps=1, audit=0, aggregation=rule),
        alignment=AlignmentConfig(max_completion_length=2),
        tables={
            "fedit": FedITConfig(averaging, LORA),
            "feddpo": FedDpoConfig(averaging, lora=LORA),
            "fedbis": FedBisConfig(averaging, **selectors),
            "fedbiscuit": FedBiscuitConfig(replace(averaging, rounds=1), selectors=1, warmup_rounds=1, **selectors),
            "shared_reward": SharedRewardConfig(llava, averaging, averaging, lora=LORA),
            "shared_head": SharedHeadConfig(llava, averaging),
        },
    )


@pytest.fixture
def attacked(llava, ask, prefer, tmp_path, monkeypatch):
    """Return a function that runs a training under attack; it gives what was said of it, and what each site was sent.

    Of each task and site the weights that it got and the change that it sent, by round.
    """
    seen = defaultdict(dict)

    def watched(name, answer):
        def sent(request):
            reply = answer(request)
            seen[request.task, name][request.round] = load(request.weights), load(reply.change)
            return reply

        return sent

    def engine(handlers):
        answers = {name: lying(answer, huge) if name == "c" else answer for name, answer in handlers.items()}
        return InProcessEngine({name: watched(name, answer) for name, answer in answers.items()})

    def run(train, rule):
        folder = Run.create(tmp_path / "run", 'name = "x"\n', seed=0)
        with open_job(recipe_of(llava, rule), folder, quiet=True) as job, pytest.warns(DataWarning) as told:
            job.private = {name: [ask(n, colour) for n in range(2)] for name, colour in COLOURS.items()}
            job.pairs = {name: [prefer(n, colour, "yellow") for n in range(2)] for name, colour in COLOURS.items()}
            job.questions = {"dev": [ask(6), ask(7, "blue")], "public": [ask(8), ask(9, "blue")]}
            train(job)
        return [str(each.message) for each in told if each.category is DataWarning], seen

    monkeypatch.setattr(training, "InProcessEngine", engine)
    monkeypatch.setattr("accord.methods.fedavg_reward.run_grpo", lambda *_: None)
    return run


def router(job):
    job.engine = training.open_training(job, lambda name: {"router": router_training(job, name)})
    train_router(job)


def projector(job):
    averaging = OnePass(rounds=2, batch_size=1, aggregation=job.recipe.router.aggregation)
    job.recipe = replace(job.recipe, projector=ProjectorConfig(averaging=averaging))
    pretrain_projector(job)


def method(name):
    def align(job):
        with job.doing(f"compare {name}", needs=()):
            METHODS[name].align(job, f"compare {name}")

    return align


def shared_head(job):
    with job.doing("compare x", needs=()):
        train_heads(job, "compare x", rotated=False)


def late(*, plain):
    """a and b are heard in rounds 2 and 4, c alone in round 3; the rule that does not count is of the other kind."""

    def train(job):
        rule = job.recipe.router.aggregation
        other = Aggregation(bound=0 if rule.bound else BOUND)
        settings = LateConfig(rounds=(2, 2, 3), work=(1,), aggregation=other if plain else rule)
        config = replace(job.recipe.router, rounds=4, aggregation=rule if plain else other)
        job.recipe = replace(job.recipe, router=config, tables={"late": settings})
        late_router(job, plain=plain)

    return train


TRAININGS = {
    "router": ("routing/fit.py", router, ["router"]),
    "projector": ("stages/projector.py", projector, ["projector"]),
    "fedit": ("methods/fedit.py", method("fedit-fedavg"), ["supervised"]),
    "feddpo": ("methods/feddpo.py", method("feddpo"), ["preference"]),
    "fedbis": ("methods/fedbiscuit.py", method("fedbis"), ["selector"]),
    "fedbiscuit": ("methods/fedbiscuit.py", method("fedbiscuit"), ["selector"]),
    "fedavg-reward": ("methods/fedavg_reward.py", method("fedavg-reward"), ["supervised", "reward"]),
    "shared-head": ("methods/shared_head.py", shared_head, ["reward"]),
}
"""By name: the module that has the average, the training, and what its sites train, in two rounds each."""

SHORTENED = (
    r"site c sent an update \S+ times as long as the median of rounds? (?:1 to )?(\d+) of the (\w+), "
    "and it was shortened; look at that site"
)
BREAKS = (
    r"site c sent an update that breaks the \w+: with it weights or outputs are not finite; round (\d+) of the (\w+) "
    "goes on without it"
)


def named(told, pattern):
    """Return the task and the round of every warning, each of which is of this pattern."""
    found = [re.fullmatch(pattern, each) for each in told]
    assert all(found), told
    return [(task, int(number)) for number, task in (each.groups() for each in found)]


def shortened(changes):
    """Return what Δ_c is multiplied by: 5 m / ‖Δ_c‖."""
    a, b, c = map(length_of, changes)
    return BOUND * max(a, b) / c


def check_moved(start, changes, factors, end):
    step = mean(changes, factors)
    assert length_of(step) > 1e-4
    for name, w in start.items():
        torch.testing.assert_close(end[name], (w + step[name]).float(), rtol=1e-4, atol=1e-6)


def check_rounds(told, pattern, seen, tasks):
    """Yield of each task, all of whose rounds are told, w⁰, the changes of its first round, and w¹."""
    assert named(told, pattern) == [(task, t + 1) for task in tasks for t in seen[task, "c"]]
    for task in tasks:
        first, second = seen[task, "c"]
        start, _ = seen[task, "c"][first]
        yield start, [seen[task, site][first][1] for site in "abc"], seen[task, "c"][second][0]


@pytest.mark.parametrize("name", TRAININGS)
def test_by_default_an_update_is_shortened_and_its_sender_named(attacked, name):
    _, train, tasks = TRAININGS[name]
    told, seen = attacked(train, Aggregation())
    for start, changes, end in check_rounds(told, SHORTENED, seen, tasks):
        check_moved(start, changes, [1 / 3, 1 / 3, shortened(changes) / 3], end)


def test_a_site_whose_updates_were_taken_back_has_taught_the_router_nothing(attacked, tmp_path):
    """The prior that is divided out is that of the pairs that counted: c is never chosen for a router that it broke."""
    attacked(router, Aggregation(bound=0))
    a, b, c = load_router(tmp_path / "run" / "router").examples
    assert a == b > 0 == c


@pytest.mark.parametrize("name", TRAININGS)
def test_without_a_bound_the_round_is_taken_back_and_the_sender_named(attacked, name):
    _, train, tasks = TRAININGS[name]
    told, seen = attacked(train, Aggregation(bound=0))
    for start, changes, end in check_rounds(told, BREAKS, seen, tasks):
        check_moved(start, changes[:2], [1 / 2, 1 / 2], end)


@pytest.mark.parametrize("plain", [False, True])
def test_a_late_update_that_makes_a_step_alone_is_measured_by_those_before(attacked, plain):
    """w³ = w² + 5 m Δ_c / ‖Δ_c‖, where c is told w³, and a and b were told w²."""
    told, seen = attacked(late(plain=plain), Aggregation())
    assert named(told, SHORTENED) == [("router", 3)]
    a, b, c = (seen["router", site] for site in "abc")
    changes = [site[0][1] for site in (a, b, c)]
    check_moved(a[2][0], changes[2:], [shortened(changes)], c[3][0])


@pytest.mark.parametrize("plain", [False, True])
def test_without_a_bound_a_late_update_that_breaks_the_router_makes_no_step(attacked, plain):
    told, seen = attacked(late(plain=plain), Aggregation(bound=0))
    assert told == ["site c sent an update that breaks the router, and it is left out of the step in round 3"]
    before, after = seen["router", "a"][2][0], seen["router", "c"][3][0]
    assert all(torch.equal(w, after[name]) for name, w in before.items())


def test_every_module_that_averages_updates_is_attacked_here():
    source = Path(accord.__file__).parent
    averaging = {
        str(path.relative_to(source))
        for path in source.rglob("*.py")
        if path.parent.name != "federation" and re.search("(federated|late)_rounds", path.read_text(encoding="utf-8"))
    }
    assert averaging == {"methods/late.py", *(module for module, *_ in TRAININGS.values())}


def rules(settings):
    """Yield every `Aggregation` within settings."""
    if isinstance(settings, Aggregation):
        yield settings
    elif is_dataclass(settings):
        for each in fields(settings):
            yield from rules(getattr(settings, each.name))


def test_no_default_is_without_the_bound():
    defaults = [RouterConfig(), ProjectorConfig(), *(t.config() for each in METHODS.values() for t in each.tables)]
    found = [rule.bound for settings in defaults for rule in rules(settings)]
    assert len(found) > 8 and {*found} == {BOUND}
