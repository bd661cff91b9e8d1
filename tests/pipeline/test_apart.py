"""Sites trained in processes of their own: the same bytes, no process left over, and errors that name their cause."""

import os
import subprocess
import sys
from dataclasses import replace

import msgspec
import psutil
import pytest
import tomli_w

from accord.errors import CheckpointError, RecipeError, RunError
from accord.federation.site import SiteRecord
from accord.models.features import FEATURES, PIXELS, FeatureConfig, remember
from accord.pipeline import apart as module
from accord.pipeline import child as in_child
from accord.pipeline.apart import apart, at_once, train_sites
from accord.recipe import Recipe, SiteConfig
from accord.recipe_file import dump_recipe, load_recipe
from accord.rewards.private import Privacy
from accord.rewards.spending import read_entries
from accord.runs import Run, read_lines, stages_done
from accord.stages import private, routing
from accord.stages.job import open_job


@pytest.fixture
def two(tiny_recipe, tmp_path, monkeypatch):
    """The tiny recipe with two of its sites at once, whatever the number of cores."""
    monkeypatch.setattr(module.os, "cpu_count", lambda: 2)
    file = tmp_path / "two.toml"
    file.write_text(tomli_w.dumps({**tiny_recipe, "sites": tiny_recipe["sites"][1:], "processes": 2}))
    return load_recipe(file)


def train(recipe, folder, resume=False):
    text = dump_recipe(recipe)
    run = Run.resume(folder, text) if resume else Run.create(folder, text, seed=recipe.seed)
    with open_job(recipe, run, quiet=True) as job:
        train_sites(job)
    return folder


def left_by(folder):
    """What must be equal: the records and every file of the sites."""
    files = [folder / "metrics.jsonl", *sorted(p for p in (folder / "sites").rglob("*") if p.is_file())]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def children():
    return psutil.Process().children(recursive=True)


def test_two_processes_leave_what_one_leaves_also_after_ctrl_c(two, tmp_path, monkeypatch, capfd):
    """Ctrl-C comes once the first of the sites is whole: the next process trains only the other one, itself."""
    one = train(replace(two, processes=1), tmp_path / "one")
    assert not (one / "apart").exists()

    def interrupt(_seconds, sleep=module.time.sleep):
        sleep(0.1)
        if any(module._whole(job_of, name) for name in ("shape", "yes-no")):
            raise KeyboardInterrupt

    started = []
    begin = module._start
    monkeypatch.setattr(module, "_start", lambda job, name: started.append(name) or begin(job, name))
    text = dump_recipe(two)
    with open_job(two, Run.create(tmp_path / "two", text, seed=0), quiet=False) as job_of:
        with monkeypatch.context() as patch:
            patch.setattr(module.time, "sleep", interrupt)
            with pytest.raises(KeyboardInterrupt):
                train_sites(job_of)
        whole = [name for name in ("shape", "yes-no") if module._whole(job_of, name)]
    assert children() == [] and sorted(started) == ["shape", "yes-no"]
    assert stages_done(tmp_path / "two") == [] and whole
    said = capfd.readouterr().err
    assert all(f"{name}: fine-tuning  2/2" in said for name in whole) and " left" in said  # a line for each site
    started.clear()
    here = routing.train_site
    monkeypatch.setattr(routing, "train_site", lambda job, name: started.append(name) or here(job, name))
    train(two, tmp_path / "two", resume=True)
    assert set(started) | set(whole) == {"shape", "yes-no"} and len(started) + len(whole) == 2
    assert left_by(tmp_path / "two") == left_by(one)
    assert stages_done(tmp_path / "two") == ["site shape", "site yes-no"]
    assert not (tmp_path / "two" / "apart").exists()
    timed = read_lines(tmp_path / "two" / "timings.jsonl")
    twice = [2 if name in whole else 1 for name in ("shape", "yes-no")]  # in its own process, and its taking over
    assert [row["stage"] for row in timed] == ["site shape"] * twice[0] + ["site yes-no"] * twice[1]
    assert all(row["done"] for row in timed) and timed[0]["seconds"] > 0.1 and timed[twice[0]]["seconds"] > 0.1


class Killed(BaseException):
    pass


def test_a_private_site_that_is_killed_in_its_process_is_paid_for_once(two, tmp_path, monkeypatch):
    """A retry begins in an empty folder, and finds the entry of the first; whoever takes the site over settles it."""
    privacy = Privacy(epsilon=1.0, unit="label", steps=2, dimensions=4)
    site = replace(two.sites[0], finetune=None, answers=False, owns=0.0, privacy=privacy)
    recipe, run, ledger = replace(two, sites=(site,)), tmp_path / "run", tmp_path / "run" / "privacy" / "shape.json"

    def killed(*_, **__):
        raise Killed

    try:
        with open_job(recipe, Run.create(run, dump_recipe(recipe), seed=0), quiet=True) as job:
            with monkeypatch.context() as patch, pytest.raises(Killed):
                patch.setattr(private, "label_head", killed)
                in_child.train(run, "shape", quiet=True)
            (paid,) = read_entries(ledger)
            with monkeypatch.context() as patch, pytest.raises(Killed):
                patch.setattr(module.subprocess, "Popen", killed)
                module._start(job, "shape")
            assert not apart(run, "shape").exists() and not paid.settled
            in_child.train(run, "shape", quiet=True)
            assert read_entries(ledger) == (paid,)  # until its model is where it stays
            monkeypatch.setattr(routing, "train_site", lambda job, name: pytest.fail(name))
            train_sites(job)
    finally:
        remember(FeatureConfig())
    assert read_entries(ledger) == (msgspec.structs.replace(paid, key=""),)
    card = msgspec.json.decode((run / "sites" / "shape" / "card.json").read_bytes(), type=SiteRecord)
    assert card.privacy.id == paid.id and card.privacy.total == pytest.approx(1.0)


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_between_two_sites_that_are_taken_over(two, tmp_path, monkeypatch, processes):
    """The second is taken over by the next process too, and trained by none, whatever the number of processes."""
    text = dump_recipe(two)
    with open_job(two, Run.create(tmp_path / "run", text, seed=0), quiet=True) as job:
        for name in ("shape", "yes-no"):
            with (
                open_job(two, Run.create(apart(job.path, name), text, seed=0), quiet=True) as child,
                child.doing(f"site {name}"),
            ):
                child.log({"stage": "site", "site": name, "step": 1})
                (child.path / "sites" / name).mkdir(parents=True)
        assert module._take_over(job, "shape") and not module._take_over(job, "shape")
    monkeypatch.setattr(routing, "train_site", lambda job, name: pytest.fail(name))
    monkeypatch.setattr(module, "_start", lambda job, name: pytest.fail(name))
    with open_job(replace(two, processes=processes), Run.resume(tmp_path / "run", text), quiet=True) as job:
        train_sites(job)
    assert stages_done(tmp_path / "run") == ["site shape", "site yes-no"] and not (tmp_path / "run" / "apart").exists()
    assert [row["site"] for row in read_lines(tmp_path / "run" / "metrics.jsonl")] == ["shape", "yes-no"]


def test_a_site_that_fails_says_why_and_stops_the_others(two, tmp_path):
    """The error of the site is the one that training here would raise."""
    broken = replace(two.sites[1], checkpoint=str(tmp_path / "nowhere"))
    recipe = replace(two, sites=(two.sites[0], broken))
    with pytest.raises(CheckpointError) as here:
        train(replace(recipe, processes=1, sites=(broken,)), tmp_path / "here")
    with pytest.raises(CheckpointError) as there:
        train(recipe, tmp_path / "there")
    assert str(there.value) == str(here.value) and "nowhere" in str(here.value)
    assert children() == [] and "site yes-no" not in stages_done(tmp_path / "there")


def test_a_process_that_dies_is_told_with_its_last_words(two, tmp_path, monkeypatch):
    dying = tmp_path / "dying"
    dying.write_text("#!/bin/sh\necho no more memory >&2\nexit 3\n")
    dying.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(dying))
    with pytest.raises(RunError, match=r"trains site \S+ ended with status 3: no more memory; .*or lower processes"):
        train(two, tmp_path / "run")
    assert children() == []


def test_a_child_ends_with_its_parent(two, tmp_path):
    """Its standard input ends when the parent dies: it ends before its site is trained."""
    with Run.create(tmp_path / "run", dump_recipe(two), seed=0):
        command = [sys.executable, "-m", "accord.pipeline.child", str(tmp_path / "run"), "shape", "--quiet"]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        child.communicate(timeout=120)
        assert child.returncode == 1 and stages_done(apart(tmp_path / "run", "shape")) == []


def test_a_child_keeps_as_many_features_as_the_recipe_says(two, tmp_path, monkeypatch):
    """The limits are those of each process; the child's are told when it comes to train its site."""
    seen = []
    monkeypatch.setattr(in_child, "train_site", lambda job, name: seen.append((name, FEATURES.limit, PIXELS.limit)))
    with Run.create(tmp_path / "run", dump_recipe(replace(two, features=FeatureConfig(memory=7, pixels=0))), seed=0):
        try:
            in_child.train(tmp_path / "run", "shape", quiet=True)
        finally:
            remember(FeatureConfig())
    assert seen == [("shape", 7, 0)] and (apart(tmp_path / "run", "shape") / "recipe.toml").is_file()


@pytest.mark.parametrize(
    ("processes", "threads", "cores", "expected"),
    [(1, 0, 8, 1), (3, 1, 2, 2), (3, 1, 8, 3), (3, 2, 4, 2), (2, 4, 2, 1), (2, 1, None, 1)],
)
def test_processes_share_the_cores(processes, threads, cores, expected, monkeypatch):
    """Each takes as many cores as it has threads; there is one process at least."""
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    recipe = Recipe("x", (SiteConfig("a", "accord/idefics3"),), processes=processes, threads=threads)
    assert at_once(recipe) == expected


def test_processes_need_their_threads_said():
    sites = (SiteConfig("a", "accord/idefics3"),)
    with pytest.raises(RecipeError, match="processes = 2 shares the cores out, and threads = 0 takes all"):
        Recipe("x", sites, processes=2)
    with pytest.raises(RecipeError, match="processes must be at least 1, got 0"):
        Recipe("x", sites, processes=0)
