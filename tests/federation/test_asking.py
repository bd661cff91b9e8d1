import math

import pytest

from accord.errors import CheckpointError, DataWarning, ReplyError
from accord.federation.asking import ask_checked, ask_scores
from accord.federation.engine import InProcessEngine
from accord.federation.messages import (
    Absence,
    AnswerItem,
    AnswerReply,
    AnswerRequest,
    CardRequest,
    Declined,
    ScoreItem,
    ScoreReply,
    ScoreRequest,
    UpdateReply,
    UpdateRequest,
    check_answers,
    image_name,
)


def silent(request):
    raise OSError("no power")


def router(loss):
    return lambda request: UpdateReply(request.id, b"w", 1, loss)


def absences(engine, kind):
    return [engine.traffic.counts[site, kind].absences for site in engine.sites]


def test_who_says_nothing_that_can_be_used_is_absent():
    """Of four sites one answers well, one not at all, and two break a rule, each its own."""
    engine = InProcessEngine({"a": router(0.5), "b": silent, "c": router(-1.0), "d": router(-2.0)})
    requests = {site: UpdateRequest(f"r-{site}", "router", 0, b"", 0) for site in engine.sites}

    def check(request, reply):
        if reply.loss == -1:
            raise ReplyError(f"{request.id} is wrong")
        if reply.loss == -2:
            raise CheckpointError("no weights")
        return request.id, reply.loss

    with pytest.warns(DataWarning) as told:
        found = ask_checked(engine, requests, check, what="an update", consequence="so be it")
    assert found == {"a": ("r-a", 0.5)}
    assert [str(warning.message) for warning in told] == [
        "site b gave no answer (error); so be it",
        "site c sent an update that cannot be used (r-c is wrong); so be it",
        "site d sent an update that cannot be used (no weights); so be it",
    ]
    assert absences(engine, "router") == [0, 1, 1, 1]


def test_an_error_of_ones_own_is_not_the_sites():
    def check(request, reply):
        raise KeyError("a slip")

    engine = InProcessEngine({"a": router(0.5)})
    with pytest.raises(KeyError, match="a slip"):
        ask_checked(engine, {"a": CardRequest("r")}, check, what="a card", consequence="so be it")


def test_a_score_that_is_not_finite_is_an_absence_there():
    """Two items; site b's second has a NaN, site c says one item only."""
    scores = {"a": [[1.0], [2.0]], "b": [[1.0], [math.nan]], "c": [[1.0]]}
    engine = InProcessEngine({site: lambda r, s=site: ScoreReply(r.id, scores[s]) for site in scores})
    image = image_name(b"png")
    items = [ScoreItem([image], [], ["red"]), ScoreItem([image], [], ["blue"])]
    with pytest.warns(DataWarning) as told:
        found = ask_scores(
            engine, {site: ScoreRequest(f"s-{site}", {image: b"png"}, items) for site in scores}, consequence="so be it"
        )
    assert found == {"a": [[1.0], [2.0]], "b": [[1.0], None]}
    assert sorted(str(warning.message) for warning in told) == [
        "site b sent a score that is not finite; so be it",
        "site c sent scores that cannot be used (scores for 1 questions, expected 2); so be it",
    ]
    assert absences(engine, "score") == [0, 1, 1]


def test_where_nobody_can_be_reached_all_are_asked_again():
    """The way breaks twice: pauses of 1 and 2 seconds, then both answer."""

    class Broken(InProcessEngine):
        tries = 0

        def ask(self, requests, *, deadline=None):
            self.tries += 1
            if self.tries <= 2:
                return {site: Absence(site, "gone") for site in requests}
            return super().ask(requests, deadline=deadline)

    pauses = []
    engine = Broken({"a": router(0.5), "b": router(0.5)})
    requests = {site: UpdateRequest(f"r-{site}", "router", 0, b"w", 1) for site in ("a", "b")}
    with pytest.warns(DataWarning, match="all are asked again"):
        found = ask_checked(
            engine, requests, lambda request, reply: reply.loss, what="an update", consequence="", pause=pauses.append
        )
    assert found == {"a": 0.5, "b": 0.5} and pauses == [1.0, 2.0]


def test_questions_that_a_site_refuses_are_absences_there_and_are_counted():
    """Of three questions a site answers one; the warning says how many it refused, and for what."""
    refused = {0: Declined.IMAGE, 2: Declined.BUDGET}
    engine = InProcessEngine({"a": lambda r: ScoreReply(r.id, [[], [2.0], []], refused)})
    items = [ScoreItem([], [], ["red"])] * 3
    with pytest.warns(DataWarning) as told:
        found = ask_scores(engine, {"a": ScoreRequest("s", {}, items)}, consequence="so be it")
    assert found == {"a": [None, [2.0], None]}
    assert [str(warning.message) for warning in told] == [
        "site a refused 2 of 3 questions (1 for its budget, 1 for its image); so be it"
    ]
    count = engine.traffic.counts["a", "score"]
    assert (count.messages, count.absences, count.refused) == (1, 1, 2)


def test_answers_that_a_site_refuses_are_none():
    engine = InProcessEngine({"a": lambda r: AnswerReply(r.id, ["left", ""], {1: Declined.LIMIT})})
    asked = {"a": AnswerRequest("q", {}, [AnswerItem([], [])] * 2)}
    with pytest.warns(DataWarning, match=r"refused 1 of 2 questions \(1 for its limit\); so be it"):
        found = ask_checked(engine, asked, check_answers, what="answers", consequence="so be it")
    assert found == {"a": ["left", None]}
    assert (engine.traffic.counts["a", "answer"].absences, engine.traffic.counts["a", "answer"].refused) == (1, 1)
