"""Ask sites and check what they say; a site without a usable reply is absent, and the run goes on without it.

A site that did not answer and one whose reply breaks the rules are the same to an algorithm: both are left out, both
count as absences in the engine's traffic, and both are told in a warning that says what follows. They differ in what
waiting is worth: a site that is gone or late may come back, one that fails or breaks the rules would do so again.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeAlias, TypeVar

import msgspec

from accord.errors import CheckpointError, DataWarning, QuorumError, ReplyError
from accord.federation.engine import Engine, kind_of
from accord.federation.messages import (
    MAX_SCORE,
    Absence,
    AnswerReply,
    Reply,
    Request,
    ScoreReply,
    ScoreRequest,
    check_scores,
)

Asked = TypeVar("Asked", bound=Request)
Checked = TypeVar("Checked")
Replies: TypeAlias = Mapping[str, Reply | Absence]
Scores: TypeAlias = list[list[float] | None]
"""Of every item of a request; None for an item that was refused, or with a score that is not finite."""

MAY_RETURN: Final = ("gone", "late")
"""Reasons of an absence that waiting may end."""

PAUSES: Final = (1.0, 60.0)
"""Seconds before the second try, and at most before any; they double."""

TELL_EVERY: Final = 10
"""Tries between two words about a wait: some four minutes at first, then ten."""


@dataclass(frozen=True)
class Patience:
    """Whether and how to wait for sites that may come back; Ctrl-C ends the wait.

    Attributes:
        whom: gets the scores so far and the absent sites that may come back; returns the sites to wait for, if any.
        tell: called with what a person should know.
        pause: waits for some seconds.
    """

    whom: Callable[[Mapping[str, Scores], Collection[str]], Collection[str]]
    tell: Callable[[str], object]
    pause: Callable[[float], object] = time.sleep


def ask_checked(
    engine: Engine,
    requests: Mapping[str, Asked],
    check: Callable[[Asked, Reply], Checked],
    *,
    what: str,
    consequence: str,
    deadline: float | None = None,
    pause: Callable[[float], object] = time.sleep,
    failed: set[str] | None = None,
) -> dict[str, Checked]:
    """Return what `check` made of each site's reply, by site; a site without a usable one is not in it.

    Where no site answered and all may come back, as when the way to them broke, they are asked again, for ever; Ctrl-C
    ends it.

    Args:
        engine: carries the requests.
        requests: one for each site.
        check: returns the value of a reply to a request, or raises `ReplyError` or `CheckpointError`.
        what: what a site sends, "an update", for the warning.
        consequence: what follows from an absence, "the router was averaged without it", for the warning.
        deadline: seconds to wait for the sites.
        pause: waits for some seconds.
        failed: gets the sites that were there and gave nothing usable. One that is gone or late is not among them, nor
            one that does not do what is asked.
    """
    replies, seconds = engine.ask(requests, deadline=deadline), PAUSES[0]
    while replies and all(isinstance(reply, Absence) and reply.reason in MAY_RETURN for reply in replies.values()):
        _warn_absent(_absences(replies), "all are asked again")
        pause(seconds)
        replies, seconds = engine.ask(requests, deadline=deadline), min(2 * seconds, PAUSES[1])
    _warn_absent(_absences(replies), consequence)
    checked = _check(engine, requests, replies, check, what, consequence)
    if failed is not None:
        failed |= {
            site
            for site, reply in replies.items()
            if (reply.reason in ("error", "invalid") if isinstance(reply, Absence) else site not in checked)
        }
    for site in checked:
        engine.traffic.counts[site, kind_of(requests[site])].absences += bool(
            _refused(engine, site, replies[site], consequence)
        )
    return checked


def ask_meanwhile(
    engine: Engine, requests: Mapping[str, ScoreRequest], *, deadline: float | None = None
) -> Future[Replies]:
    """Ask in a thread of its own; the future has the replies, or what the engine raised.

    The process does not end before the question does: a thread that is killed inside torch takes the exit status along.
    """
    answered: Future[Replies] = Future()

    def run() -> None:
        try:
            answered.set_result(engine.ask(requests, deadline=deadline))
        except BaseException as error:  # whoever waits is to have it, whatever it is
            answered.set_exception(error)

    threading.Thread(target=run, name="accord-asking").start()
    return answered


def ask_scores(
    engine: Engine,
    requests: Mapping[str, ScoreRequest],
    *,
    consequence: str,
    deadline: float | None = None,
    replies: Replies | None = None,
    patience: Patience | None = None,
    limits: tuple[float, float] = (-MAX_SCORE, MAX_SCORE),
) -> dict[str, Scores]:
    """Return each site's scores of every item of its request.

    Args:
        engine: carries the requests.
        requests: one for each site.
        consequence: as in `ask_checked`.
        deadline: seconds to wait for the sites.
        replies: what the sites have said, if they have been asked already.
        patience: for sites that may come back, which are then asked again; without it every site is asked once.
        limits: the range of scores that was agreed; a reply with one outside it is not used.

    Raises:
        QuorumError: `patience` does without no more sites, and none may come back.
    """
    low, high = limits
    check = partial(check_scores, low=low, high=high)
    if replies is None:
        replies = engine.ask(requests, deadline=deadline)
    scores: dict[str, Scores] = {}
    absent: dict[str, Absence] = {}
    tries, pause, asked = 1, PAUSES[0], requests
    while True:
        absent = {site: absence for site, absence in absent.items() if site not in replies} | _absences(replies)
        given = _check(engine, asked, replies, check, "scores", consequence)
        for site, of_site in given.items():
            engine.traffic.counts[site, "score"].absences += None in of_site
            refused = _refused(engine, site, replies[site], consequence)
            if of_site.count(None) > refused:
                _warn(site, "sent a score that is not finite", consequence)
        scores |= given
        may_return = [site for site, absence in absent.items() if absence.reason in MAY_RETURN]
        try:
            waited_for = patience.whom(scores, may_return) if patience is not None else ()
        except QuorumError:
            _warn_absent(absent, consequence)
            raise
        if patience is None or not waited_for:
            break
        if tries == 1:
            patience.tell(f"too few sites answered: waiting for {', '.join(waited_for)}; Ctrl-C ends the run")
        elif tries % TELL_EVERY == 0:
            patience.tell(f"still waiting for {', '.join(waited_for)}, after {tries} tries")
        patience.pause(pause)
        tries, pause = tries + 1, min(2 * pause, PAUSES[1])
        asked = {
            site: msgspec.structs.replace(requests[site], id=f"{requests[site].id}-{tries}") for site in may_return
        }
        replies = engine.ask(asked, deadline=deadline)
    if patience is not None and tries > 1:
        patience.tell("the wait for sites is over")
    _warn_absent(absent, consequence)
    return scores


def _check(
    engine: Engine,
    requests: Mapping[str, Asked],
    replies: Replies,
    check: Callable[[Asked, Reply], Checked],
    what: str,
    consequence: str,
) -> dict[str, Checked]:
    checked: dict[str, Checked] = {}
    for site, reply in replies.items():
        if isinstance(reply, Absence):
            continue
        try:
            checked[site] = check(requests[site], reply)
        except (ReplyError, CheckpointError) as error:
            engine.traffic.counts[site, kind_of(requests[site])].absences += 1
            _warn(site, f"sent {what} that cannot be used ({error})", consequence)
    return checked


def _refused(engine: Engine, site: str, reply: Reply | Absence, consequence: str) -> int:
    """Count and tell the questions that a usable reply refuses; return their number."""
    if not isinstance(reply, ScoreReply | AnswerReply) or not reply.refused:
        return 0
    kind, size = ("score", len(reply.scores)) if isinstance(reply, ScoreReply) else ("answer", len(reply.answers))
    engine.traffic.counts[site, kind].refused += len(reply.refused)
    reasons = Counter(why.value for why in reply.refused.values())
    told = ", ".join(f"{count} for its {reason}" for reason, count in sorted(reasons.items()))
    _warn(site, f"refused {len(reply.refused)} of {size} questions ({told})", consequence)
    return len(reply.refused)


def _absences(replies: Replies) -> dict[str, Absence]:
    return {site: reply for site, reply in replies.items() if isinstance(reply, Absence)}


def _warn_absent(absences: Mapping[str, Absence], consequence: str) -> None:
    for site, absence in absences.items():
        _warn(site, f"gave no answer ({absence.reason})", consequence)


def _warn(site: str, what: str, consequence: str) -> None:
    warnings.warn(f"site {site} {what}; {consequence}", DataWarning, stacklevel=4)
