"""The same recipe in FLARE's simulator, all sites on one machine, as in one process."""

import json
import shutil

import pytest
import torch

from accord.flare.engine import FlareEngine
from accord.flare.frames import socket_folder
from accord.flare.launch import Simulator
from accord.flare.service import SiteService, open_site_folder
from accord.pipeline import execute
from accord.pipeline.job import open_job
from accord.recipe import load_recipe
from accord.runs import Run
from accord.toml import dump_toml

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def at_the_server(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [line for line in lines if json.loads(line)["stage"] != "site"]


def test_the_simulator_gives_the_bits_of_one_process(recipe, in_process, site_folders, tmp_path):
    settings = load_recipe(recipe)
    threads = torch.get_num_threads()
    folder = socket_folder(tmp_path)
    services = [SiteService(open_site_folder(site_folders[name], name), site_folders[name], folder / f"{name}.sock")
                for name in site_folders]  # fmt: skip
    torch.set_num_threads(settings.threads)
    run = tmp_path / "run"
    try:
        for service in services:
            service.__enter__()
        with (
            FlareEngine(
                tuple(site_folders), Simulator(tuple(site_folders), folder, tmp_path / "flare"), folder
            ) as engine,
            open_job(settings, Run.create(run, dump_toml(settings), seed=0), quiet=True, engine=engine) as job,
        ):
            execute(job)
    finally:
        for service in services:
            service.__exit__()
        torch.set_num_threads(threads)
        shutil.rmtree(folder)
    assert at_the_server(run) == at_the_server(in_process) and len(at_the_server(run)) > 8
    weights = "policy/model.safetensors"
    assert (run / weights).read_bytes() == (in_process / weights).read_bytes()
