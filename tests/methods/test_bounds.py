"""Pooled pairs of two sites stay apart; the oracle looks a prompt's true type up."""

from dataclasses import replace

import pytest
import torch

from accord.data.images import load_image
from accord.errors import RecipeError
from accord.methods import bounds
from accord.methods.bounds import oracle_router
from accord.rewards.train import group_pairs
from accord.types import prompt_of


def test_pooled_pairs_of_two_sites_stay_apart(job, prefer, monkeypatch):
    """Both sites number from 0 and choose red: as one group, one's rejected answers would be held against the other."""
    own = {"a": [prefer(0, "red", "blue")], "b": [prefer(0, "red", "green")]}
    monkeypatch.setattr(bounds, "site_pairs", lambda job, name: own[name])
    job.private, job.questions, seen = {"a": [], "b": []}, {"dev": []}, []

    def caught(*_, pairs, **__):
        seen.extend(group_pairs(pairs))
        raise KeyboardInterrupt

    monkeypatch.setattr(bounds, "fit_reward_model", caught)
    with pytest.raises(KeyboardInterrupt):
        bounds._pooled_engine(job, "compare pooled")
    assert [group.rejected for group in seen] == [("blue",), ("green",)]


def test_pooled_needs_questions_to_fine_tune_on(job):
    sites = tuple(replace(site, preferences="pairs.jsonl", finetune=None) for site in job.recipe.sites)
    job.recipe = replace(job.recipe, sites=sites)
    with pytest.raises(RecipeError, match=r"no site holds any; add finetune = false to \[pooled\]"):
        bounds.pooled(job, "compare pooled")


def test_the_oracle_sends_a_prompt_to_the_first_site_of_its_type(job, ask):
    """Colour is a's, number b's; a type that nobody holds is everybody's. Words and picture tell prompts apart."""
    kinds = ("colour", "number", "size")
    asked = [ask(n, "red", text=f"question {n}?", question_type=kinds[n]) for n in range(3)]
    job.questions = {"public": [*asked, replace(asked[0], id="q9", image=ask(9, "blue").image, question_type="number")]}
    route = oracle_router(job)
    images = [load_image(q.image) for q in job.questions["public"]]
    prompts = [prompt_of(q) for q in job.questions["public"]]
    weights = route(prompts, images, [["x", "y"], ["x"], ["x"], ["x"]])
    assert torch.equal(weights, torch.tensor([[1, 0], [1, 0], [0, 1], [0.5, 0.5], [0, 1]]))
