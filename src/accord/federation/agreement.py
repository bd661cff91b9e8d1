"""What server and sites must agree on, compared before anything is trained.

    sites, router, scores, policy    16 hexadecimal digits each, of what the recipe says of them
    messages                         the version of `accord.federation.messages`
    accord                           the version of Accord

A site that was trained with another recipe answers every question, and ruins the run: its place among the router's
outputs is another's. So a site says in its card by what it works, and `Agreeing` asks for that before the first
question to it. Digests hide nothing that could be guessed; they hold nothing of a site's own either.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Final

from accord.errors import DataWarning, ReplyError, RunError
from accord.federation.engine import Engine, Traffic
from accord.federation.messages import Absence, Agreement, CardRequest, Reply, Request, check_card

SECONDS: Final = 600.0
"""For the first cards: a site reads its whole policy for one. Later a card has as long as the question after it."""

PARTS: Final = ("sites", "router", "scores", "policy")


def differences(ours: Agreement, theirs: Agreement | None) -> list[str]:
    """Return what a site works by that is not the server's, in words; empty where the two can work together."""
    if theirs is None:
        return ["its Accord, which is older than the comparison itself"]
    found = [part for part in PARTS if getattr(ours, part) != getattr(theirs, part)]
    if ours.messages != theirs.messages:
        found.append(f"messages of version {theirs.messages}, and the server's are of {ours.messages}")
    return found


class Agreeing:
    """An engine that asks a site nothing before it is known to work by what the server does.

    A site that comes later, or comes back, is compared when it is first asked; one that differs then counts as absent.

    Args:
        engine: carries the requests.
        ours: what the server works by.
        run: what the sites' ledgers call this run, letters, digits, `-` and `_`.
    """

    def __init__(self, engine: Engine, ours: Agreement, *, run: str = "") -> None:
        self.engine, self.ours, self.run = engine, ours, run
        self.left_out: frozenset[str] = frozenset()
        """The sites that could not be asked when they last should have been."""
        self._traffic = engine.traffic
        self._agreed: set[str] = set()
        self._refused: set[str] = set()
        self._begun = False

    @property
    def sites(self) -> Sequence[str]:
        """The sites' names, `[K]`."""
        return self.engine.sites

    @property
    def processes(self) -> int:
        """As the engine's."""
        return self.engine.processes

    @property
    def traffic(self) -> Traffic:
        """The engine's, without what the comparison takes, also while one is going on."""
        return self._traffic

    @traffic.setter
    def traffic(self, traffic: Traffic) -> None:
        self._traffic = self.engine.traffic = traffic

    def total(self, values: Sequence[float]) -> Sequence[float]:
        """As the engine's."""
        return self.engine.total(values)

    def ask(self, requests: Mapping[str, Request], *, deadline: float | None = None) -> dict[str, Reply | Absence]:
        """Ask as the engine does, those sites that agree.

        Raises:
            RunError: before any site agrees, one that is there works by something else.
        """
        seconds = SECONDS if deadline is None or not self._begun else min(SECONDS, deadline)
        absent = self._compare([site for site in requests if site not in self._agreed], seconds)
        self.left_out = self.left_out - requests.keys() | absent.keys()
        asked = {site: request for site, request in requests.items() if site not in absent}
        replies = self.engine.ask(asked, deadline=deadline) if asked else {}
        # Whoever was away may come back as another: it is compared again.
        self._agreed -= {site for site, reply in replies.items() if isinstance(reply, Absence)}
        return {site: absent.get(site) or replies[site] for site in requests}

    def _compare(self, sites: Sequence[str], seconds: float) -> dict[str, Absence]:
        """Ask sites for their cards; return those that cannot be asked further."""
        if not sites:
            return {}
        requests = {site: CardRequest(f"agreement-{self.run}") for site in sites}
        self.engine.traffic = Traffic()  # not part of the run
        try:
            replies = self.engine.ask(requests, deadline=seconds)
        finally:
            self.engine.traffic = self._traffic
        absent, differ = dict[str, Absence](), dict[str, list[str]]()
        for site, reply in replies.items():
            if isinstance(reply, Absence):
                absent[site] = reply
                continue
            try:
                theirs = check_card(requests[site], reply).agreement
            except ReplyError:
                absent[site] = Absence(site, "invalid")
                continue
            if found := differences(self.ours, theirs):
                differ[site] = found
                absent[site] = Absence(site, "refused")
                continue
            self._agreed.add(site)
            assert theirs is not None  # it is a difference
            if theirs.accord != self.ours.accord:
                warnings.warn(
                    f"site {site} runs Accord {theirs.accord}, the server {self.ours.accord}; they understand each "
                    "other: upgrade the older one when it is convenient",
                    DataWarning,
                    stacklevel=4,
                )
        self._tell(differ)
        self._begun = self._begun or bool(self._agreed)
        return absent

    def _tell(self, differ: Mapping[str, Sequence[str]]) -> None:
        if not differ:
            return
        which = "; ".join(f"site {site}: {', '.join(found)}" for site, found in sorted(differ.items()))
        if not self._begun:
            raise RunError(
                f"what must agree with the server does not ({which}); give these sites the server's recipe and Accord, "
                "let them train again with it in a new folder, and start the run again"
            )
        for site in differ.keys() - self._refused:
            warnings.warn(
                f"site {site} came and does not agree with the server ({', '.join(differ[site])}); it is not asked: "
                "give it the server's recipe and Accord",
                DataWarning,
                stacklevel=5,
            )
        self._refused |= differ.keys()
