"""How a site's local steps depart from plain ones: what a federated algorithm does at the sites.

plain      step along g                          FedAvg, McMahan et al. 2017, arXiv 1602.05629
fedprox    step along g + μ (w − w^t)            Li et al. 2020, arXiv 1812.06127, eq. 2
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class LocalRule(Protocol):
    """A site's half of an algorithm: how its local steps depart from plain ones."""

    def begin(self, start: Mapping[str, Tensor], state: bytes, /) -> None:
        """Take w^t, on the model's device, and what the server sent beside it."""
        ...

    def correct(self, name: str, gradient: Tensor, weight: Tensor, /) -> Tensor:
        """Return the gradient of parameter `name` to step along."""
        ...

    def end(self, weights: Mapping[str, Tensor], distance: float, /) -> bytes:
        """Take w_k and S η; return what goes to the server beside it."""
        ...


class Plain:
    """Step along the gradient (FedAvg)."""

    def begin(self, start: Mapping[str, Tensor], state: bytes, /) -> None:
        """Take nothing."""

    def correct(self, name: str, gradient: Tensor, weight: Tensor, /) -> Tensor:
        """Return g."""
        return gradient

    def end(self, weights: Mapping[str, Tensor], distance: float, /) -> bytes:
        """Return nothing."""
        return b""


class Proximal(Plain):
    """Step along g + μ (w − w^t) (FedProx)."""

    def __init__(self, mu: float) -> None:
        self.mu = mu
        self.start: Mapping[str, Tensor] = {}

    def begin(self, start: Mapping[str, Tensor], state: bytes, /) -> None:
        """Take w^t."""
        self.start = start

    def correct(self, name: str, gradient: Tensor, weight: Tensor, /) -> Tensor:
        """Return g + μ (w − w^t)."""
        return gradient + self.mu * (weight - self.start[name])
