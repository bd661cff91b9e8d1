"""The long forms of attacks, for `make audit`; a short form of each is among the quick tests."""

import logging
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from accord.federation.engine import InProcessEngine
from accord.federation.messages import Absence, ScoreItem, ScoreReply, ScoreRequest, Turn

SECONDS = float(os.environ.get("ACCORD_FUZZ_SECONDS", "600"))


def fuzz(seconds):
    script = Path(__file__).with_name("fuzz_messages.py")
    ended = subprocess.run(
        [sys.executable, script, str(seconds)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert not ended.returncode, ended.stdout[-2000:] + ended.stderr[-4000:]
    return int(re.findall(r"Done (\d+) runs", ended.stdout + ended.stderr)[-1])


def test_a_second_of_fuzzing():
    assert fuzz(1) > 100


@pytest.mark.audit
@pytest.mark.timeout(SECONDS + 300)
def test_ten_minutes_of_fuzzing():
    """T12, by coverage where atheris is installed: any bytes are a message or a typed error."""
    assert fuzz(SECONDS) > 10_000


def soak(groups):
    """Ask five sites of which two misbehave; return what came back, and by how many bytes the peak memory grew."""
    told = {"honest": 0, "absent": 0}

    def honest(request):
        return ScoreReply(request.id, [[0.5] * len(item.candidates) for item in request.items])

    def breaks(request):
        raise RuntimeError("x" * 1000)

    def lies(request):
        return ScoreReply(request.id + "?", [[0.5]])

    engine = InProcessEngine({"a": honest, "b": honest, "c": honest, "d": breaks, "e": lies})
    peak = 0
    for group in range(groups):
        item = ScoreItem([], [Turn("user", f"question {group}")], [f"{n}" * 50 for n in range(8)])
        replies = engine.ask(dict.fromkeys("abcde", ScoreRequest(f"s{group}", {}, [item])))
        for reply in replies.values():
            told["absent" if isinstance(reply, Absence) else "honest"] += 1
        if group == groups // 5:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return told, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)


@pytest.mark.audit
def test_a_soak_of_fifty_thousand_groups(caplog):
    """T29 in a short form, in one process: every group ends, and memory grows by less than 1 MB for 1,000 groups."""
    caplog.set_level(logging.CRITICAL, "accord.federation.endpoint")  # pytest would keep every record of site d's
    told, grown = soak(50_000)
    assert told["honest"] >= 3 * 50_000 and sum(told.values()) == 5 * 50_000
    assert grown < 40 * 2**20
