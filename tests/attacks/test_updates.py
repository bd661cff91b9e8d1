import math
from functools import partial

import pytest
import torch
from pytest import approx
from safetensors.torch import load, save
from torch import tensor

from accord.attacks.updates import alie, alie_z, hostile, huge, ipm, lying, norm_bounded, scale, sign_flip
from accord.federation.aggregation import Update, bounded
from accord.federation.messages import UpdateReply, UpdateRequest

OWN = {"w": tensor([1.0, -2.0]), "b": tensor([0.0])}
KNOWN = [{"w": tensor([3.0, 0.0]), "b": tensor([4.0])}, {"w": tensor([1.0, 0.0]), "b": tensor([0.0])}]
"""Lengths 5 and 1; their mean is (2, 0 | 2), their deviation (√2, 0 | √8)."""
REQUEST = UpdateRequest("update", "router", 0, b"", 0)


def listed(change):
    return [*change["w"].tolist(), *change["b"].tolist()]


@pytest.mark.parametrize(
    ("attack", "sent"),
    [
        (sign_flip, [-1.0, 2.0, 0.0]),
        (partial(sign_flip, factor=20.0), [-20.0, 40.0, 0.0]),
        (partial(scale, factor=3.0), [3.0, -6.0, 0.0]),
        (partial(huge, value=7.0), [7.0, -7.0, 7.0]),
        (partial(alie, z=1.5), [2 - 1.5 * math.sqrt(2), 0.0, 2 - 1.5 * math.sqrt(8)]),
        (partial(ipm, epsilon=0.5), [-1.0, 0.0, -1.0]),
        (partial(norm_bounded, multiple=4.0), [-4 / math.sqrt(2), 0.0, -4 / math.sqrt(2)]),  # 4 · the lower median, 1
    ],
    ids=["flip", "flip 20", "scale", "huge", "alie", "ipm", "norm-bounded"],
)
def test_attacks_by_hand(attack, sent):
    lied = attack(OWN, KNOWN)
    assert listed(lied) == approx(sent, rel=1e-6) and list(lied) == list(OWN)
    assert all(tensor.dtype == torch.float32 for tensor in lied.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_whatever_is_sent_is_finite(dtype):
    own = {"w": tensor([1.0, -1.0], dtype=dtype)}
    for attack in (huge, partial(huge, value=1e300), partial(scale, factor=1e39), partial(sign_flip, factor=1e39)):
        assert attack(own, [own])["w"].isfinite().all() and attack(own, [own])["w"].dtype == dtype


@pytest.mark.parametrize(
    ("sites", "liars", "z"),
    [
        (50, 24, 1.4261),  # s = 26 − 24 = 2: Φ⁻¹(24/26); the paper's example of 50 workers of which 24 lie
        (5, 2, 0.4307),  # s = 3 − 2 = 1: Φ⁻¹(2/3)
        (5, 1, 0.0),  # s = 2: Φ⁻¹(1/2)
        (10, 1, 0.0),  # s = 5: 4/9 is below a half
        (3, 1, 0.0),
    ],
)
def test_how_far_alie_goes(sites, liars, z):
    assert alie_z(sites, liars) == approx(z, abs=1e-4)


def test_a_majority_needs_no_alie():
    with pytest.raises(ValueError, match="3 of 5 sites are a majority"):
        alie_z(5, 3)


def test_alie_of_one_known_update_is_that_update():
    assert listed(alie(OWN, [OWN], liars=0, z=9.0)) == listed(OWN)


def test_what_is_norm_bounded_passes_the_bound_and_huge_does_not():
    given = [*KNOWN, norm_bounded(OWN, KNOWN, multiple=4.0)]
    updates = [Update(change) for change in given]
    assert bounded(updates, 4.0)[2] is updates[2]
    updates[2] = Update(huge(OWN, KNOWN))
    assert bounded(updates, 4.0)[2].change["w"].abs().max() < 20


def honest(value):
    return lambda request: UpdateReply(request.id, save({"w": tensor([value])}), 5, 0.25, b"state", 3, 1.5)


def test_a_lying_site_changes_nothing_but_its_update():
    reply = lying(honest(2.0), sign_flip)(REQUEST)
    assert load(reply.change)["w"].tolist() == [-2.0]
    rest = (reply.id, reply.examples, reply.loss, reply.state, reply.steps, reply.distance)
    assert rest == ("update", 5, 0.25, b"state", 3, 1.5)
    assert lying(honest(2.0), sign_flip, distance=0.0, examples=99)(REQUEST).examples == 99


def test_hostile_sites_know_what_the_honest_ones_send_in_the_same_round():
    """Round 0: the mean of 1 and 3 is 2, of which −½ is sent; in round 1 another is heard."""
    values = {0: (1.0, 3.0), 1: (5.0, 7.0)}
    sites = {
        name: lambda request, k=k: honest(values[request.round][min(k, 1)])(request) for k, name in enumerate("abc")
    }
    federation = hostile(sites, ["c"], ipm)
    for number, sent in ((0, -1.0), (1, -3.0)):
        request = UpdateRequest("update", "router", number, b"", 0)
        replies = {name: load(site(request).change)["w"].item() for name, site in federation.items()}
        assert replies == {"a": values[number][0], "b": values[number][1], "c": sent}


def test_liars_come_last():
    with pytest.raises(ValueError, match=r"the liars \['a'\] must be the last of the sites \['a', 'b'\]"):
        hostile({"a": honest(1.0), "b": honest(1.0)}, ["a"], huge)
