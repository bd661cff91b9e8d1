from dataclasses import replace

import pytest
import torch

from accord.data.images import load_image
from accord.errors import DataError
from accord.models.finetune import FineTuneConfig
from accord.models.load import LoraSettings
from accord.pipeline import sites
from accord.pipeline.sites import open_site, site_pairs, train_site
from accord.rewards.train import RewardConfig
from accord.types import vqa_prompt

COLOURS = ("red", "blue", "green", "yellow")
REWARD = RewardConfig(steps=1, prompts_per_batch=2, rejected_per_prompt=2, vocabulary=4)


@pytest.fixture
def hold(job, ask, monkeypatch):
    """Return a function that gives each of the two sites `n` questions; the policy always says "what"."""
    monkeypatch.setattr(sites, "answer", lambda model, processor, questions, **_: [["what"] for _ in questions])

    def give(n):
        kinds = ("colour", "number")
        private = [
            ask(10 * k + i, COLOURS[i % 4], question_type=kinds[k], text=f"what colour is it, {kinds[k]} {i}?")
            for k in range(2)
            for i in range(n)
        ]
        job.questions = {"private": private, "dev": [ask(90, "red"), ask(91, "blue")], "public": [], "test": []}
        vars(job)["private"] = {"a": private[:n], "b": private[n:]}

    return give


def test_too_few_pairs_are_too_few_each_time(job, hold):
    """One question with three wrong answers makes three pairs."""
    hold(1)
    job.recipe = replace(job.recipe, preferences=replace(job.recipe.preferences, rejected_per_question=3))
    for _ in range(2):
        with pytest.raises(DataError, match="site a has 3 preference pairs from 1 questions, at least 8 are needed"):
            site_pairs(job, "a")
    hold(4)
    assert site_pairs(job, "a") is site_pairs(job, "a") is job.pairs["a"]


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2, alpha=4)], ids=["full", "lora"])
def test_a_sites_folder_is_all_it_needs(job, hold, tmp_path, lora):
    """It is moved, and the site is trained anew where it was: what was moved scores as before."""
    hold(4)
    settings = {"finetune": FineTuneConfig(steps=1, batch_size=2), "reward_model": REWARD, "lora": lora}
    job.recipe = replace(job.recipe, sites=tuple(replace(site, **settings) for site in job.recipe.sites))
    train_site(job, "a")
    folder = job.path / "sites" / "a"
    assert sorted(path.name for path in folder.iterdir()) == ["card.json", "reward"]
    assert list((job.path / "checkpoints").iterdir()) == []

    def score(run):
        (given,) = open_site(job.recipe, run, "a").reward_model.score(
            [vqa_prompt("what colour is it?")], [load_image(job.questions["dev"][0].image)], [COLOURS]
        )
        return given

    here = score(job.path)
    (tmp_path / "elsewhere" / "sites").mkdir(parents=True)
    folder.rename(tmp_path / "elsewhere" / "sites" / "a")
    job.recipe = replace(job.recipe, seed=1)
    train_site(job, "a")
    assert torch.equal(score(tmp_path / "elsewhere"), here) and not torch.equal(score(job.path), here)
