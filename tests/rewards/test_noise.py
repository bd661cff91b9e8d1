import hashlib
import math

import pytest
import torch

from accord.rewards import noise
from accord.rewards.noise import SecretNoise, new_key

KEY = bytes(range(32))


def test_uniform_numbers_are_those_of_shake_256():
    """The first word of block 0 is the first eight bytes, little end first, of which the lower 53 bits count."""
    word = int.from_bytes(hashlib.shake_256(KEY + bytes(8)).digest(8), "little") % 2**53
    drawn = SecretNoise(KEY).uniform(3)
    assert drawn.dtype == torch.float64 and drawn[0].item() == (word + 0.5) / 2**53
    assert len(SecretNoise(KEY).uniform(0)) == 0


def test_a_stream_is_its_keys_and_does_not_repeat():
    one, again, other = SecretNoise(KEY), SecretNoise(KEY), SecretNoise(new_key())
    first, second = one.normal(4), one.normal(4)
    assert torch.equal(first, again.normal(4)) and torch.equal(second, again.normal(4))
    assert not torch.equal(first, second) and not torch.equal(first, other.normal(4))
    assert len(new_key()) == 32


@pytest.mark.parametrize("at_once", [1, 7, 64, 2**18])
def test_normal_numbers_are_computed_in_parts_and_are_the_same(at_once, monkeypatch):
    """(n₁ + n₂ + n₃ + n₄) / 2 by Box–Muller, of the radii in the first half of a block and the angles in the other."""
    radius, angle = SecretNoise(KEY).uniform(2 * 4 * 7 * 13).view(2, 4, 7, 13)
    expected = (torch.sqrt(-2 * torch.log(radius)) * torch.cos(2 * math.pi * angle)).sum(dim=0) / 2
    sizes = []
    compute = noise._uniform
    monkeypatch.setattr(noise, "_AT_ONCE", at_once)
    monkeypatch.setattr(noise, "_uniform", lambda words: sizes.append(words.size) or compute(words))
    assert torch.equal(SecretNoise(KEY).normal(7, 13), expected)
    assert max(sizes) == 8 * min(at_once, 91)


def test_the_law_of_the_numbers():
    """Of 200,000: mean 0, variance 1, kurtosis 3, and 2.275 % above 2, each within five standard errors."""
    count = 200_000
    drawn = SecretNoise(KEY).normal(count // 4, 4)
    assert drawn.shape == (count // 4, 4)
    drawn = drawn.flatten()
    assert abs(drawn.mean()) < 5 / count**0.5
    assert abs(drawn.var() - 1) < 5 * (2 / count) ** 0.5
    assert abs((drawn**4).mean() - 3) < 5 * (96 / count) ** 0.5
    assert abs((drawn > 2).double().mean() - 0.02275) < 5 * (0.02275 * 0.97725 / count) ** 0.5
    share = SecretNoise(KEY).uniform(count)
    assert share.min() > 0 and share.max() < 1
    assert abs((share < 0.2).double().mean() - 0.2) < 5 * (0.16 / count) ** 0.5
