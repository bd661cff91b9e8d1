"""The same recipe in FLARE's simulator, all sites on one machine, as in one process."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from accord.attacks.scores import Attack
from accord.errors import DataWarning
from accord.flare.engine import FlareEngine
from accord.flare.frames import site_socket, socket_folder
from accord.flare.service import SiteService, open_site_folder
from accord.methods import robust
from accord.pipeline import execute
from accord.recipe_file import dump_recipe, load_recipe
from accord.runs import Run
from accord.stages.job import open_job
from simulator import Simulator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def at_the_server(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [line for line in lines if json.loads(line)["stage"] != "site"]


def simulate(settings, site_folders, run, folder):
    """Do a whole run, the sites answering through FLARE's simulator."""
    threads = torch.get_num_threads()
    services = [SiteService(open_site_folder(site_folders[name], name), site_folders[name], site_socket(folder, name))
                for name in site_folders]  # fmt: skip
    torch.set_num_threads(settings.threads)
    try:
        for service in services:
            service.__enter__()
        with (
            FlareEngine(
                tuple(site_folders), Simulator(tuple(site_folders), folder, run.with_name("flare")), folder
            ) as engine,
            open_job(settings, Run.create(run, dump_recipe(settings), seed=0), quiet=True, engine=engine) as job,
        ):
            execute(job)
    finally:
        for service in services:
            service.__exit__()
        torch.set_num_threads(threads)


@pytest.fixture
def sockets(tmp_path):
    folder = socket_folder(tmp_path)
    yield folder
    shutil.rmtree(folder)


def test_the_simulator_gives_the_bits_of_one_process(recipe, in_process, site_folders, tmp_path, sockets):
    run = tmp_path / "run"
    simulate(load_recipe(recipe), site_folders, run, sockets)
    assert at_the_server(run) == at_the_server(in_process) and len(at_the_server(run)) > 8
    weights = "policy/model.safetensors"
    assert (run / weights).read_bytes() == (in_process / weights).read_bytes()


def align_here(settings, in_process, here):
    """Do a whole run in this process, with the sites of `in_process`."""
    with open_job(settings, Run.create(here, dump_recipe(settings), seed=0), quiet=True) as job:
        shutil.copytree(in_process / "sites", here / "sites")
        for site in settings.sites:
            with job.run.doing(f"site {site.name}"):
                pass
        execute(job)


@pytest.mark.long
def test_abstention_is_the_same_on_every_engine(recipe, in_process, site_folders, tmp_path, sockets):
    """Sums of prompts come over FLARE, from sites whose own recipes say so."""
    settings = replace(load_recipe(recipe), method="routed-abstain")
    settings = replace(settings, sites=tuple(replace(site, sums=True) for site in settings.sites))
    here, there = tmp_path / "here", tmp_path / "there"
    align_here(settings, in_process, here)
    folders = {name: shutil.copytree(folder, tmp_path / "own" / name) for name, folder in site_folders.items()}
    for folder in folders.values():
        (folder / "recipe.toml").write_text(dump_recipe(settings))
    simulate(settings, folders, there, sockets)
    assert at_the_server(there) == at_the_server(here) and len(at_the_server(there)) > 8
    for file in ("policy/model.safetensors", "kept/site/means/class-means.safetensors"):
        assert (there / file).read_bytes() == (here / file).read_bytes()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:the server has:accord.errors.DataWarning")
def test_hidden_questions_find_the_same_over_flare(recipe, in_process, site_folders, tmp_path, sockets, monkeypatch):
    """One of three sites flips, and its trust over FLARE is what it is in one process by the run's secret key."""
    settings = replace(load_recipe(recipe), method="canary-average")
    lies = (replace(site, attack=Attack("flip") if site.name == "shape" else None) for site in settings.sites)
    settings = replace(settings, sites=tuple(lies))
    here, there = tmp_path / "here", tmp_path / "there"
    folders = {name: shutil.copytree(folder, tmp_path / "own" / name) for name, folder in site_folders.items()}
    for folder in folders.values():
        (folder / "recipe.toml").write_text(dump_recipe(settings))
    with pytest.warns(DataWarning, match="canaries.record names no file, and the sites are other organisations'"):
        simulate(settings, folders, there, sockets)
    secret = (there / "canaries.key").read_text()
    monkeypatch.setattr(robust, "_key", lambda job: secret)
    align_here(settings, in_process, here)
    assert at_the_server(there) == at_the_server(here) and len(at_the_server(there)) > 8
    assert (there / "policy/model.safetensors").read_bytes() == (here / "policy/model.safetensors").read_bytes()
    found = json.loads((there / "summary.json").read_text())
    assert found["trust"] == json.loads((here / "summary.json").read_text())["trust"]
    assert found["trust"]["canaries"] == 18 and set(found["trust"]["sites"]) == {site.name for site in settings.sites}
    assert secret not in "".join(file.read_text() for folder in folders.values() for file in folder.rglob("*.jsonl"))


def test_fedgrpo_is_the_same_on_every_engine(recipe, in_process, site_folders, tmp_path, sockets):
    """Experts chosen by answers that came over FLARE; no router is trained. Its sites are those of `in_process`."""
    settings = replace(load_recipe(recipe), method="fedgrpo")
    here, there = tmp_path / "here", tmp_path / "there"
    align_here(settings, in_process, here)
    simulate(settings, site_folders, there, sockets)
    assert at_the_server(there) == at_the_server(here) and len(at_the_server(there)) > 8
    for file in ("policy/model.safetensors", "kept/site/competence/graph/graph.safetensors"):
        assert (there / file).read_bytes() == (here / file).read_bytes()
    sent = {(site, kind) for site, kind, *_ in json.loads((there / "traffic" / "align.json").read_text())}
    assert sent == {(site.name, kind) for site in settings.sites for kind in ("answer", "score")}
    assert not (there / "router").exists()
    summary = json.loads((there / "summary.json").read_text())
    assert summary["router"] is None and summary["competence"]["items"] == {"colour": 8, "shape": 8, "yes/no": 8}
    assert "Who is good at what" in (there / "report.html").read_text()
