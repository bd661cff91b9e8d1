import random
from collections import Counter
from math import log

import pytest
import torch
from pytest import approx

from accord.alignment.difficulty import EPSILON, DomainScaling, scaled, type_shares
from accord.alignment.grpo import prompt_dataset
from accord.alignment.reward import FederatedReward, Group
from accord.federation.engine import InProcessEngine
from accord.federation.messages import ScoreRange, ScoreReply

RANGE = ScoreRange(-1.0, 1.0)


def group(kind=""):
    return Group([], None, None, ("x", "y"), (0, 1), kind)


def by(site, sites=2):
    """The weights of two completions that one site is asked about."""
    weights = torch.zeros(2, sites)
    if site is not None:
        weights[:, site] = 1.0
    return weights


def test_the_papers_own_numbers(monkeypatch):
    """One right answer of eight, p_d = 1/12 and ε → 0: w = ln(1 + 12) = 2.565; A = 7 w for it, and −w for each other.

    Their code's other constant: p_d = .75 gives ln(1 + 4/3) = .847.
    """
    monkeypatch.setattr("accord.alignment.difficulty.EPSILON", 1e-9)
    found = scaled(torch.tensor([1.0] + [0.0] * 7), 1 / 12)
    assert (found - found.mean()).tolist() == approx([7 * 2.5649] + [-2.5649] * 7, abs=1e-3)
    assert scaled(torch.tensor([1.0, 1.0]), 0.75).tolist() == approx([0.8473] * 2, abs=1e-4)


def test_shares_of_the_sites_run():
    """Step 1: site 0 judges two prompts, site 1 one: p = 3/5, 2/5. Step 2: one more of site 0: p_0 = 4/6.

    Scores 1 and −1 in [−1, 1] are r = 1 and 0, so SC = 1/2.
    """
    scaling, scores = DomainScaling(2, RANGE), torch.tensor([1.0, -1.0])
    first = scaling([group()] * 3, [by(0), by(1), by(0)], [scores] * 3)
    weights = [log(1 + 5 / 3), log(1 + 5 / 2), log(1 + 5 / 3)]
    assert [rewards.tolist() for rewards in first] == [approx([w / (0.5 + EPSILON), 0]) for w in weights]
    (second,) = scaling([group()], [by(0)], [scores])
    assert second.tolist() == approx([log(1 + 6 / 4) / 0.55, 0])
    resumed = DomainScaling(2, RANGE)
    resumed.load_state_dict(scaling.state_dict())
    assert resumed.judged.tolist() == [3, 1]


def test_a_prompt_that_nobody_judged_counts_for_no_site():
    nothing = torch.full((2,), torch.nan)
    scaling = DomainScaling(2, RANGE)
    (found,) = scaling([group()], [by(None)], [nothing])
    assert found.isnan().all() and scaling.judged.tolist() == [0, 0]


def test_absent_scores_are_in_no_mean():
    """r = 1, absent, 0: SC = 1/2."""
    found = scaled(torch.tensor([1.0, torch.nan, 0.0]), 1.0)
    assert found[[0, 2]].tolist() == approx([log(2) / 0.55, 0]) and found[1].isnan()


@pytest.mark.parametrize(("balanced", "shares"), [(False, [0.75, 0.25]), (True, [0.5, 0.5])])
def test_types_are_as_frequent_as_they_are_drawn(ask, balanced, shares):
    """Three questions about colour and one about number; of 400 prompts as many as the share says, give or take one."""
    questions = [ask(0), ask(1), ask(2), ask(3, question_type="number")]
    known = type_shares(questions, balanced=balanced)
    assert [known["colour"], known["number"]] == shares
    drawn = Counter(prompt_dataset(questions, 400, random.Random(0), balanced=balanced)["question_type"])
    assert [drawn["colour"] / 400, drawn["number"] / 400] == approx(shares, abs=1 / 400)
    scaling = DomainScaling(2, RANGE, known)
    found = scaling([group("colour"), group("number")], [by(0), by(0)], [torch.tensor([1.0, -1.0])] * 2)
    assert [rewards[0].item() for rewards in found] == approx([log(1 + 1 / share) / 0.55 for share in shares])


def test_as_they_come_every_question_comes_equally_often(ask):
    questions = [ask(0), ask(1), ask(2), ask(3, question_type="number")]
    drawn = Counter(prompt_dataset(questions, 8, random.Random(1), balanced=False)["question_id"])
    assert set(drawn.values()) == {2} and len(drawn) == 4


def test_in_a_federated_reward(square):
    """Two prompts, each judged by another site; the second's second answer is by none, and stays without a reward."""
    table = {"a": 1.0, "b": -1.0}

    def judge(request):
        return ScoreReply(request.id, [[table[c] for c in item.candidates] for item in request.items])

    def route(prompts, images, completions):
        return torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])

    engine = InProcessEngine({"here": judge, "there": judge})
    reward = FederatedReward(engine, route, scores=RANGE, scaling=DomainScaling(2, RANGE))
    prompts = [[{"role": "user", "content": text}] for text in ("p", "p", "q", "q")]
    found = reward(prompts, ["a", "b", "a", "b"])
    assert found[:3] == approx([log(3) / 0.55, 0.0, log(3) / 1.05]) and found[3] is None
