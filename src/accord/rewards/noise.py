"""Random numbers that nobody can predict without the key: what a mechanism of differential privacy draws.

    block(c) = SHAKE-256(key ‖ c),  c = 0, 1, 2, …        64-bit words u; uniform (u mod 2⁵³ + ½) / 2⁵³
    normal   = (n₁ + n₂ + n₃ + n₄) / 2                     nᵢ standard normal by Box–Muller, in double precision

A recipe's seed is known to the server, and noise that can be computed again protects nothing; nor does a Poisson
sample that can be. So the key is 256 bits of the operating system's randomness, and it never leaves the site. The sum
of four hides the gaps that floating-point numbers leave in one Box–Muller draw, by which Mironov (2012,
https://doi.org/10.1145/2382196.2382264) told two data sets apart. Source: Holohan and Braghin 2021, arXiv 2107.10138,
whose method Opacus' secure mode uses, too.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

KEY_BYTES = 32
GENERATOR: Final = "SHAKE-256"

_AT_ONCE = 2**18
"""Normal numbers that are computed at once: of a block, which is 64 bytes a number, no second copy is made."""


def new_key() -> bytes:
    """Return 256 bits from the operating system."""
    return secrets.token_bytes(KEY_BYTES)


class SecretNoise:
    """A stream of numbers from a key; the same key gives the same stream.

    Args:
        key: secret, 32 bytes, used for one training and no other.
    """

    def __init__(self, key: bytes) -> None:
        self._key, self._block = key, 0

    def uniform(self, count: int) -> Tensor:
        """Return `[count]` numbers from the open interval (0, 1), in double precision."""
        return _uniform(self._words(count))

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal numbers of a shape, in double precision."""
        count = math.prod(shape)
        words = self._words(8 * count).reshape(2, 4, count)
        found = torch.empty(count, dtype=torch.float64)
        for start in range(0, count, _AT_ONCE):
            radius, angle = _uniform(words[:, :, start : start + _AT_ONCE])
            drawn = torch.sqrt(-2 * torch.log(radius)) * torch.cos(2 * math.pi * angle)
            found[start : start + _AT_ONCE] = drawn.sum(dim=0) / 2
        return found.view(shape)

    def _words(self, count: int) -> NDArray[np.int64]:
        """Return the next block, as `[count]` words of 64 bits."""
        seed = self._key + self._block.to_bytes(8)
        self._block += 1
        return np.frombuffer(hashlib.shake_256(seed).digest(8 * count), dtype=np.int64)


def _uniform(words: NDArray[np.int64]) -> Tensor:
    return (torch.from_numpy(words & (2**53 - 1)).double() + 0.5) / 2**53
