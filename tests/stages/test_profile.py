"""`accord run --profile`: whose code took a stage's time."""

import hashlib
import json
import sys
import time

import pytest

from accord.errors import RunError
from accord.models.fast_vlm import __file__ as of_accord
from accord.stages.profile import _owner, check_profiler, profiled


def busy(seconds):
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        hashlib.sha256(b"x" * 10_000).digest()


def test_a_table_and_a_page_for_each_stage(tmp_path):
    """A second asleep is none of the processor's; a stage that is done again is there once, as it was last."""
    for stage, body in (("align", lambda: time.sleep(0.3)), ("site yes-no", lambda: busy(0.3)), ("align", busy_once)):
        with profiled(tmp_path, stage):
            body()
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == [
        *("align.html", "site-yes-no.html", "stages.json", "stages.md")
    ]
    page = (tmp_path / "profile" / "site-yes-no.html").read_text()
    assert "test_profile.py" in page and "busy" in page and "Timeline" in page
    known = json.loads((tmp_path / "profile" / "stages.json").read_text())
    assert list(known) == ["align", "site yes-no"]
    site = known["site yes-no"]
    assert site["seconds"] >= 0.3 and abs(sum(site["parts"].values()) - site["seconds"]) < 0.2
    head, _, *rows = (tmp_path / "profile" / "stages.md").read_text().splitlines()
    assert head == "| stage | seconds | of the processor | whose code took them |"
    assert [row.split(" | ")[0] for row in rows] == ["| align", "| site yes-no"] and "Python" in rows[1]


def busy_once():
    busy(0.1)


def test_a_stage_that_fails_leaves_none(tmp_path):
    with pytest.raises(RuntimeError), profiled(tmp_path, "router"):
        busy(0.05)
        raise RuntimeError
    assert not (tmp_path / "profile" / "router.html").exists()


def test_whose_a_file_is():
    """A package, a module of Accord's own, or what is neither; a name that is no file belongs to its caller."""
    assert _owner("/x/site-packages/torch/nn/modules/linear.py") == "torch"
    assert _owner("/x/site-packages/six.py") == "six"
    assert _owner(of_accord) == "accord.models.fast_vlm"
    assert _owner("/usr/lib/python3.11/json/decoder.py") == "Python"
    assert _owner("<built-in>") == _owner(None) == ""


def test_without_pyinstrument_nothing_begins(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyinstrument", None)
    with pytest.raises(RunError, match=r"pip install 'accord\[profile\]'"):
        check_profiler()
