"""Every method by its name, on the sites and the router of one finished run; those that remember, interrupted too."""

import json
import shutil
from dataclasses import replace

import pytest

from accord.evaluation.summary import read_summary
from accord.flare.view import look
from accord.methods import METHODS, find_method
from accord.pipeline import compare, execute
from accord.pipeline.comparison import arm_file
from accord.plan import describe
from accord.recipe_file import load_recipe
from accord.runs import read_lines, stages_done, stages_planned
from accord.stages import alignment

pytestmark = [
    pytest.mark.filterwarnings("default::accord.errors.DataWarning"),
    pytest.mark.filterwarnings("default::UserWarning"),
]

REMEMBERING = [
    *("random", "plural-alpha", "mor", "mor-quantile", "mor-random-feedback", "fedgrpo", "fedgrpo-random", "canary"),
    "routed-disco",
]


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    """The finished run's sites and router, copied once for all methods."""
    return trained(tmp_path_factory.mktemp("methods") / "run")


@pytest.fixture
def measured(opened):
    """Return a function that compares by a method, in a folder, and returns what was measured."""

    def measure(folder, arm):
        with opened(folder) as job:
            compare(job, arm)
        return json.loads(arm_file(folder, arm).read_text())

    return measure


VARIANTS = {
    *("routed-soft", "routed-prompt", "routed-raw", "routed-kl-0", "routed-kl-0.005", "routed-kl-0.08"),
    *("mor-raw", "mor-opposite", "mor-quantile", "mor-random-feedback", "trimmed-mean", "minimum", "pessimistic"),
    *("fedgrpo-all", "fedgrpo-reward-random", "fedgrpo-reward-all", "fedgrpo-literal", "fedgrpo-halves"),
    *("fedgrpo-reward-1-expert", "fedgrpo-reward-3-experts", "fedgrpo-reward-5-nearest", "fedgrpo-reward-50-nearest"),
    *("fedgrpo-reward", "fedit-fedprox", "rank-median", "rank-trimmed", "canary-mean"),
    *("canary-average", "canary-routed-soft"),
    *("routed-disco-labels", "routed-dr-grpo", "routed-dapo", "routed-bnpo", "routed-ratio", "routed-late-plain"),
    *("density-abstain", "density-average", "routed-average", "shared-head"),
}
"""Methods that differ from another by a setting alone: with `make test-long`. A new method is not among them."""


@pytest.mark.parametrize(
    "arm",
    [
        *(pytest.param(arm, marks=pytest.mark.long) if arm in VARIANTS else arm for arm in METHODS),
        *("site shape", "local colour"),
    ],
)
def test_a_method_gives_a_policy_and_counts_its_bytes(folder, measured, arm):
    """Every question is answered; what is asked of sites is counted both ways, and what asks none sends nothing.

    Who uses the router pays for its training, and nobody else.
    """
    result = measured(folder, arm)
    assert sum(n for _, n in result["test"].values()) == 60
    sent = {site: (down, up) for site, _, _, down, up, _ in result["traffic"]}
    if arm in ("ground-truth", "pooled", "local colour", "server-alone"):
        assert sent == {}
    else:
        assert sent and all(down > 0 and up > 0 for down, up in sent.values())
    paid = {kind for _, kind, *_ in result["traffic"]}
    own = arm.startswith("routed-late")  # which trains one of its own
    assert ("router" in paid) is (own or "router" in find_method(arm, ("colour", "shape")).needs)


@pytest.mark.parametrize("arm", REMEMBERING)
def test_what_a_method_has_learnt_outlives_an_interruption(folder, measured, arm, tmp_path, monkeypatch):
    """Stopped once step 2 of 4 is saved, and resumed: accuracy, answers' bytes and curve of a run in one piece."""
    for name in ("whole", "stopped"):
        shutil.copytree(folder, tmp_path / name)
    expected = measured(tmp_path / "whole", arm)

    saved = alignment._Seal.on_save

    def stop(self, args, state, control, **rest):
        saved(self, args, state, control, **rest)
        if state.global_step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(alignment._Seal, "on_save", stop)
        with pytest.raises(KeyboardInterrupt):
            measured(tmp_path / "stopped", arm)
    assert (tmp_path / "stopped" / "checkpoints" / f"compare {arm}" / "checkpoint-2" / alignment.MEMORY).is_file()
    resumed = measured(tmp_path / "stopped", arm)
    down, expected_down = ([row.pop(3) for row in result["traffic"]] for result in (resumed, expected))
    assert all(more >= once for more, once in zip(down, expected_down, strict=True))  # images are sent again
    assert {**resumed, "seconds": 0} == {**expected, "seconds": 0}
    lines = [
        [line for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines() if f'"compare {arm}"' in line]
        for name in ("whole", "stopped")
    ]
    assert lines[0] == lines[1] and len(lines[0]) >= 4


def test_anchors_go_when_a_site_is_trained_again(trained, opened, tmp_path):
    """Those of the gate stand on the sites, those of the anchored router on the router too."""
    run = trained(tmp_path / "run")
    with opened(run) as job:
        for arm, after in (("preference-gate", "site"), ("anchored", "router")):
            compare(job, arm)
            assert job.kept("anchors", after=after).joinpath("public-pairs.safetensors").is_file()
        with replace(job).doing("router"):
            pass
        assert job.kept("anchors", after="site").exists() and not job.kept("anchors", after="router").exists()
        with replace(job).doing("site colour"):
            pass
        assert not job.kept("anchors", after="site").exists()
        assert not job.run.done("compare anchored") and not job.run.done("compare preference-gate")


SITES = ("colour", "shape", "yes-no")
ROUTED = ("mor",)
ASKING = ("mor", "preference-gate", "fedgrpo")


@pytest.mark.parametrize(
    "method", ["mor", "preference-gate", "fedit-fedavg", "fedbis", "server-alone", "ground-truth", "fedgrpo"]
)
def test_a_method_as_the_runs_own(trained, opened, tmp_path, method):
    """It leaves a policy, a report and a summary, which tells of a router, weights and scores where there are any.

    Nothing is trained that the method does not need.
    """
    run = trained(tmp_path / "run", router=method in ROUTED, method=method)
    with opened(run) as job:
        assert execute(job) == run / "report.html"
    assert (run / "report.html").is_file() and (run / "policy" / "model.safetensors").is_file()
    summary = read_summary(run / "summary.json")
    assert (summary.method, [site.name for site in summary.sites]) == (method, list(SITES))
    assert (summary.router is not None) is (method in ROUTED) is (run / "router").exists()
    assert (summary.competence is not None) is (method == "fedgrpo")
    assert summary.evaluation.aligned.n == 60 and summary.evaluation.compare == {}
    assert bool(summary.routing) is (method in ASKING)
    assert all(bool(site.parameters) is (method in ASKING) for site in summary.sites)
    kinds = {row.kind for row in summary.traffic}
    assert kinds == {
        "mor": {"router", "score"},
        "preference-gate": {"score"},
        "fedgrpo": {"score", "answer"},
        "fedit-fedavg": {"supervised"},
        "fedbis": {"selector"},
    }.get(method, set())
    gallery = read_lines(run / "gallery.jsonl")
    assert len(gallery) == 4 and all(bool(row["scores"]) is (method in ASKING) for row in gallery)
    stages = [f"site {site}" for site in SITES] + ["router"] * (method in ROUTED) + ["align", "evaluation"]
    assert stages_done(run) == stages
    sites = stages[:3] if method in ASKING else []
    assert list(stages_planned(run)) == sites + stages[3:]
    assert stages_planned(run)["align"] == (2 if method in ("fedit-fedavg", "fedbis", "server-alone") else 4)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert ("Who is good at what" in page) is (method == "fedgrpo")
    recipe = load_recipe(run / "recipe.toml")
    plan = describe(recipe)
    assert f"by {method}: {METHODS[method].about}" in plan
    assert ("\nrouter " in plan) is (method in ROUTED) and ("\nsite colour " in plan) is (method in ASKING)


def test_a_watched_run_of_fedgrpo_has_no_router(trained, opened, tmp_path, monkeypatch):
    """Broken off after step 2 of 4: three sites are done, the alignment is under way, the evaluation is to come."""
    run = trained(tmp_path / "run", router=False, method="fedgrpo")
    saved = alignment._Seal.on_save

    def stop(self, args, state, control, **rest):
        saved(self, args, state, control, **rest)
        if state.global_step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(alignment._Seal, "on_save", stop)
    with pytest.raises(KeyboardInterrupt), opened(run) as job:
        execute(job)
    seen = look(run)
    assert list(seen.done) == [f"site {site}" for site in SITES]
    assert (seen.stage, seen.step, seen.steps, seen.finished) == ("align", 2, 4, False)
    assert list(stages_planned(run)) == [*seen.done, "align", "evaluation"]


@pytest.mark.parametrize("method", ["fedit-fedavg", "fedgrpo"])
def test_no_router_is_planned_or_trained_for_what_needs_none(trained, opened, tmp_path, method, monkeypatch):
    run = trained(tmp_path / "run", router=False, method=method)
    monkeypatch.setattr("accord.pipeline.train_router", lambda job: pytest.fail("trained a router"))
    monkeypatch.setattr("accord.pipeline.train_sites", lambda job: None)
    monkeypatch.setattr("accord.pipeline.align_policy", lambda job: None)
    monkeypatch.setattr("accord.pipeline.evaluate", lambda job: None)
    monkeypatch.setattr("accord.pipeline.write_report", lambda path: path)
    with opened(run) as job:
        execute(job)
    assert "router" not in stages_planned(run) and "router" not in look(run).done
    assert "router" not in describe(load_recipe(run / "recipe.toml")).replace(METHODS[method].about, "")
