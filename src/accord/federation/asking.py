"""Ask sites and check what they say; who says nothing that can be used is absent, and the run goes on without it.

A site that did not answer and one whose reply breaks the rules are the same to an algorithm: both are left out, both
count as absences in the engine's traffic, and both are told in a warning that says what follows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TypeVar

from accord.errors import CheckpointError, DataWarning, ReplyError
from accord.federation.engine import KINDS, Engine
from accord.federation.messages import Absence, Reply, Request, ScoreRequest, check_scores

Asked = TypeVar("Asked", bound=Request)
Checked = TypeVar("Checked")


def ask_checked(
    engine: Engine,
    requests: Mapping[str, Asked],
    check: Callable[[Asked, Reply], Checked],
    *,
    what: str,
    consequence: str,
    deadline: float | None = None,
) -> dict[str, Checked]:
    """Return what `check` made of each site's reply, by site; a site without a usable one is not in it.

    Args:
        engine: carries the requests.
        requests: one for each site.
        check: returns the value of a reply to a request, or raises `ReplyError` or `CheckpointError`.
        what: what a site sends, "an update", for the warning.
        consequence: what follows from an absence, "the router was averaged without it", for the warning.
        deadline: seconds to wait for the sites.
    """
    checked: dict[str, Checked] = {}
    for site, reply in engine.ask(requests, deadline=deadline).items():
        if isinstance(reply, Absence):
            _warn(site, f"gave no answer ({reply.reason})", consequence)
            continue
        try:
            checked[site] = check(requests[site], reply)
        except (ReplyError, CheckpointError) as error:
            engine.traffic.counts[site, KINDS[type(requests[site]).__name__]].absences += 1
            _warn(site, f"sent {what} that cannot be used ({error})", consequence)
    return checked


def ask_scores(
    engine: Engine, requests: Mapping[str, ScoreRequest], *, consequence: str, deadline: float | None = None
) -> dict[str, list[list[float] | None]]:
    """Return each site's scores of every item of its request; None for an item with a score that is not finite.

    Args:
        engine: carries the requests.
        requests: one for each site.
        consequence: as in `ask_checked`.
        deadline: seconds to wait for the sites.
    """
    scores = ask_checked(engine, requests, check_scores, what="scores", consequence=consequence, deadline=deadline)
    for site, of_site in scores.items():
        if None in of_site:
            engine.traffic.counts[site, "score"].absences += 1
            _warn(site, "sent a score that is not finite", consequence)
    return scores


def _warn(site: str, what: str, consequence: str) -> None:
    warnings.warn(f"site {site} {what}; {consequence}", DataWarning, stacklevel=4)
