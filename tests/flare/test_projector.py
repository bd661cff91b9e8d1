"""Sites of other organisations train the projector as those of one process do: the same bits in FLARE's simulator."""

import json
import shutil

import pytest
import torch

from accord.federation.projector import OnePass, ProjectorConfig
from accord.flare.check import what_crosses
from accord.flare.engine import FlareEngine
from accord.flare.frames import site_socket, socket_folder
from accord.flare.service import SiteService, open_site_folder
from accord.recipe import Policy, Preferences, Recipe, SiteConfig, Source
from accord.recipe_file import dump_recipe
from accord.rewards.train import RewardConfig
from accord.runs import Run
from accord.stages.job import open_job
from accord.stages.projector import pretrain_projector
from accord.stages.sites import train_site
from simulator import Simulator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

COLOURS = ("red", "blue", "green", "yellow")


@pytest.fixture
def recipe(llava, vqa):
    """Two sites of eight captions each, two rounds, and reward models of one step."""
    rows = [("private", kind, COLOURS[n % 4]) for kind in ("colour", "paint") for n in range(8)]
    rows += [(split, "colour", colour) for split in ("public", "dev", "test") for colour in COLOURS]
    reward = RewardConfig(steps=1, prompts_per_batch=2, rejected_per_prompt=1, evaluate_every=1, vocabulary=4)
    sites = tuple(
        SiteConfig(name, llava, question_types=(kind,), finetune=None, reward_model=reward)
        for name, kind in (("a", "colour"), ("b", "paint"))
    )
    return Recipe(
        "x",
        sites,
        threads=1,
        questions=(Source("folder", path=vqa("shapes", rows)),),
        policy=Policy(llava),
        preferences=Preferences(policy_samples=0),
        projector=ProjectorConfig(averaging=OnePass(rounds=2, batch_size=2, learning_rate=0.01)),
    )


def test_the_projector_has_the_bits_of_one_process(recipe, tmp_path):
    threads, text = torch.get_num_threads(), dump_recipe(recipe)
    torch.set_num_threads(1)
    sockets = socket_folder(tmp_path)
    services = []
    try:
        with open_job(recipe, Run.create(tmp_path / "here", text, seed=0), quiet=True) as job:
            pretrain_projector(job)
        for site in recipe.sites:
            folder = tmp_path / "sites" / site.name
            with open_job(recipe, Run.create(folder, text, seed=0), quiet=True, alone=site.name) as job:
                train_site(job, site.name)
            opened = open_site_folder(folder, site.name)
            services.append(SiteService(opened, folder, site_socket(sockets, site.name)).__enter__())
        with (
            FlareEngine(("a", "b"), Simulator(("a", "b"), sockets, tmp_path / "flare"), sockets) as engine,
            open_job(recipe, Run.create(tmp_path / "there", text, seed=0), quiet=True, engine=engine) as job,
        ):
            pretrain_projector(job)
    finally:
        for service in services:
            service.__exit__()
        torch.set_num_threads(threads)
        shutil.rmtree(sockets)
    for file in ("metrics.jsonl", "projector/checkpoint/model.safetensors", "projector/measured.json"):
        assert (tmp_path / "there" / file).read_bytes() == (tmp_path / "here" / file).read_bytes()
    sent = json.loads((tmp_path / "there" / "traffic/projector.json").read_text())
    assert [(site, kind, messages, absences) for site, kind, messages, *_, absences in sent] == [
        ("a", "projector", 2, 0),
        ("b", "projector", 2, 0),
    ]
    ledger = [json.loads(line) for line in (tmp_path / "sites/a/ledger.jsonl").read_text().splitlines()]
    assert [(entry["kind"], entry["outcome"]) for entry in ledger] == [("projector", "answered")] * 2
    told = [crossing.what for crossing in what_crosses(recipe, tmp_path / "sites/a", "a") if crossing.way == "leaves"]
    assert "what its captions change in the policy's projector" in told
