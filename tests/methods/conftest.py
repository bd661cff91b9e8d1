"""What the server makes of a site's end of a round: the change travels, and not the weights."""

import pytest


@pytest.fixture(scope="session")
def arrived():
    """Return a function (start, end) -> w^t + Δ_k, where Δ_k = w_k − w^t was rounded to the weights' type on its way.

    That is w_k to within a rounding, and what federated rounds of one site give bit by bit.
    """

    def add(start, end):
        return {name: (w.double() + (end[name] - w).double()).to(w.dtype) for name, w in start.items()}

    return add
