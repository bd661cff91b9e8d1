"""Every method by its name, on the sites and the router of one finished run; those that remember, interrupted too."""

import json
import shutil
from dataclasses import replace

import pytest

from accord.errors import RecipeError
from accord.pipeline import Job, alignment, compare
from accord.pipeline.comparison import arm_file
from accord.pipeline.methods import METHODS, find_method
from accord.recipe import ARMS, load_recipe
from accord.runs import Run

pytestmark = [
    pytest.mark.filterwarnings("default::accord.errors.DataWarning"),
    pytest.mark.filterwarnings("default::UserWarning"),
]

REMEMBERING = ["random", "plural-alpha", "mor", "mor-quantile", "mor-random-feedback", "fedgrpo", "fedgrpo-random"]


@pytest.fixture(scope="module")
def folder(finished, tmp_path_factory):
    """The finished run, copied once for all methods."""
    place = tmp_path_factory.mktemp("methods") / "run"
    shutil.copytree(finished[1], place)
    return place


def open_job(folder):
    text = (folder / "recipe.toml").read_text()
    return Job(load_recipe(folder / "recipe.toml"), Run.resume(folder, text), quiet=True)


def measured(folder, arm):
    with (job := open_job(folder)).run:
        compare(job, arm)
    return json.loads(arm_file(folder, arm).read_text())


def test_the_recipe_knows_them_all():
    assert set(ARMS) == set(METHODS) and len(ARMS) == len(set(ARMS))


@pytest.mark.parametrize("arm", [*METHODS, "site shape", "local colour"])
def test_a_method_gives_a_policy_and_counts_its_bytes(folder, arm):
    """Every question is answered; what is asked of sites is counted both ways, and what asks none sends nothing."""
    result = measured(folder, arm)
    assert sum(n for _, n in result["test"].values()) == 60
    sent = {site: (down, up) for site, _, _, down, up, _ in result["traffic"]}
    if arm in ("ground-truth", "pooled", "local colour"):
        assert sent == {}
    else:
        assert sent and all(down > 0 and up > 0 for down, up in sent.values())


@pytest.mark.parametrize("arm", REMEMBERING)
def test_what_a_method_has_learnt_outlives_an_interruption(folder, arm, tmp_path, monkeypatch):
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


def test_a_method_of_ones_own(folder):
    """By module and function; what cannot be imported names itself."""
    with (job := open_job(folder)).run:
        assert find_method(job, "accord.pipeline.methods:random_site") is METHODS["random"]
        for wrong in ("accord.pipeline.methods:no_such", "no_such_module:method", "nonsense"):
            with pytest.raises(RecipeError, match=f"compare names '{wrong}', which cannot be imported"):
                find_method(job, wrong)


def test_anchors_go_when_a_site_is_trained_again(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    with (job := open_job(tmp_path / "run")).run:
        compare(job, "anchored")
        assert (job.path / "anchors" / "public-pairs.safetensors").is_file()
        with replace(job).doing("site colour"):
            pass
        assert not (job.path / "anchors").exists() and not job.run.done("compare anchored")
