import json
import os
import signal
import stat
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from accord.errors import RecipeError, RunError
from accord.rewards import spending
from accord.rewards.accounting import Mechanism, epsilon_of
from accord.rewards.certificate import UNCOVERED, Certificate, Uncovered
from accord.rewards.private import Privacy, Sigmas
from accord.rewards.spending import certify, fingerprint_of, pay, read_entries, settle, spend
from accord.routing import asked

pytest.importorskip("dp_accounting")

PRIVACY = Privacy(epsilon=2.0, steps=10, dimensions=0)
TIGHT = Sigmas(gradient=2.0, projection=5.0, standardisation=40.0)


@pytest.fixture
def ledger(tmp_path):
    return tmp_path / "site" / "privacy.json"


@pytest.fixture
def quick(monkeypatch):
    """Noise that was calibrated before: what is tested here is the book-keeping."""
    monkeypatch.setattr(spending, "calibrate", lambda *_: TIGHT)


def test_it_is_written_before_anything_is_trained(ledger, quick):
    entry = spend(ledger, PRIVACY, "pairs")
    (found,) = read_entries(ledger)
    assert found == entry and not entry.settled and len(bytes.fromhex(entry.key)) == 32
    assert stat.S_IMODE(ledger.stat().st_mode) == 0o600


def test_the_same_training_goes_on_at_no_price_until_it_is_settled(ledger, quick):
    entry = spend(ledger, PRIVACY, "pairs")
    assert spend(ledger, PRIVACY, "pairs") == entry and len(read_entries(ledger)) == 1
    settle(ledger, entry.id)
    (settled,) = read_entries(ledger)
    assert settled.settled and settled.mechanisms == entry.mechanisms
    assert entry.key not in ledger.read_text()
    again = spend(ledger, PRIVACY, "pairs")
    assert again.id != entry.id and again.key != entry.key and len(read_entries(ledger)) == 2


def test_a_budget_that_is_spent_is_told_with_its_ledger(ledger):
    """Which file has which training, so that its owner can look."""
    first = spend(ledger, PRIVACY, "pairs")
    with pytest.raises(RecipeError, match=rf"is spent, too little .* \(paid in {ledger}: {first.id}\)"):
        spend(ledger, PRIVACY, "others")
    assert read_entries(ledger) == (first,)


def test_other_data_are_another_training(ledger, quick):
    """One noise on two data sets would show their difference."""
    one, other = spend(ledger, PRIVACY, "pairs"), spend(ledger, PRIVACY, "others")
    assert one.key != other.key and len(read_entries(ledger)) == 2
    assert [entry.settled for entry in read_entries(ledger)] == [True, False] and one.key not in ledger.read_text()
    assert fingerprint_of(["a"], {"b": 1}) != fingerprint_of(["a"], {"b": 2})


def test_what_is_over_the_budget_is_refused_and_costs_nothing(ledger):
    """T18: the first training takes all of it; no second one does, of any data, until the site raises the budget."""
    entry = spend(ledger, PRIVACY, "pairs")
    assert 1.9 < epsilon_of(entry.mechanisms, PRIVACY.delta) <= 2
    settle(ledger, entry.id)
    before = ledger.read_bytes()
    for data in ("pairs", "others"):
        with pytest.raises(RecipeError, match=r"of the budget ε = 2 at δ = 1e-06, ε = 2 is spent"):
            spend(ledger, PRIVACY, data)
    assert ledger.read_bytes() == before
    larger = replace(PRIVACY, epsilon=4.0)
    second = spend(ledger, larger, "pairs")
    found = certify(ledger, larger, second, uncovered=["counts"])
    assert 3.9 < found.total <= 4 and found.epsilon < found.total and found.uncovered == ("counts",)
    assert certify(ledger, larger, entry, uncovered=[]).total == pytest.approx(2, rel=0.01)


def test_a_ledger_has_one_unit(ledger, quick):
    spend(ledger, PRIVACY, "pairs")
    with pytest.raises(RecipeError, match=r"accounts for every pair, and privacy\.unit is 'person'"):
        spend(ledger, replace(PRIVACY, unit="person"), "others")


@pytest.mark.parametrize("damage", [b"", b"{", b'{"format": "x"}', b'{"format": "accord-privacy-ledger-1", "x": 1}'])
def test_with_a_damaged_ledger_nothing_is_spent(ledger, quick, damage):
    spend(ledger, PRIVACY, "pairs")
    ledger.write_bytes(damage)
    with pytest.raises(RunError, match="nobody knows what is spent"):
        spend(ledger, PRIVACY, "others")
    assert ledger.read_bytes() == damage


@pytest.mark.parametrize("place", ["/dev/zero", "/dev/full", "/", "{tmp_path}", "{tmp_path}/pipe"])
def test_what_is_no_ordinary_file_is_no_ledger_and_no_record(quick, tmp_path, place):
    """A device has no end, and a pipe waits for a writer; no lock is left beside them."""
    os.mkfifo(tmp_path / "pipe")
    path = Path(place.format(tmp_path=tmp_path))
    with pytest.raises(RunError, match=r"the privacy ledger is no ordinary file; check privacy\.ledger"):
        spend(path, PRIVACY, "pairs")
    with pytest.raises(RunError, match=r"the record of canaries is no ordinary file; check canaries\.record"):
        asked.reserve(path, "run align", lambda others: ["key"])
    assert not Path(f"{path}.lock").exists()
    assert [each.name for each in tmp_path.iterdir()] == ["pipe"]


def test_two_that_spend_at_once_take_turns(ledger, quick):
    threads = [threading.Thread(target=spend, args=(ledger, PRIVACY, f"data {n}")) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = read_entries(ledger)
    assert len({entry.id for entry in entries}) == 8 and [entry.settled for entry in entries] == [True] * 7 + [False]


CHILD = """
import sys, time
from pathlib import Path
from accord.rewards import spending
from accord.rewards.private import Privacy, Sigmas
spending.calibrate = lambda *_: Sigmas(2.0, 5.0, 40.0)
entry = spending.spend(Path(sys.argv[1]), Privacy(epsilon=2.0, steps=10, dimensions=0), "pairs")
print(entry.id, flush=True)
time.sleep(60)
"""


def test_a_training_that_is_killed_stays_paid_for(ledger, quick):
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(ledger)], stdout=subprocess.PIPE, text=True)
    try:
        spent = child.stdout.readline().strip()
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
    (entry,) = read_entries(ledger)
    assert entry.id == spent and not entry.settled
    assert spend(ledger, PRIVACY, "pairs").id == spent  # and the lock went with the process
    assert len(read_entries(ledger)) == 1


def test_a_certificate_says_what_it_is(ledger, quick):
    entry = spend(ledger, PRIVACY, "pairs")
    found = certify(ledger, PRIVACY, entry, uncovered=list(UNCOVERED))
    assert (found.sigma, found.projection, found.standardisation) == (2.0, 0.0, 40.0)
    assert (found.unit, found.sampling, found.steps, found.clip) == ("pair", 0.2, 10, 0.5)
    assert msgspec.json.decode(msgspec.json.encode(found), type=Certificate) == found
    assert set(UNCOVERED) == set(Uncovered.__args__)
    assert "pairs" not in json.loads(msgspec.json.encode(found)).values()  # the fingerprint stays at the site


ROUTED = replace(PRIVACY, router=0.3)


@pytest.fixture
def reserve(ledger, quick, monkeypatch):
    """The id of a training that has set six steps of a router aside."""
    monkeypatch.setattr(spending, "router_mechanism", lambda privacy, steps, _: Mechanism(3.0, 0.2, steps))
    return spend(ledger, ROUTED, "pairs", router_steps=6).id


def test_steps_of_a_router_are_paid_for_with_the_training(ledger, reserve):
    """T18: they are among the mechanisms before anything is trained."""
    (entry,) = read_entries(ledger)
    assert entry.mechanisms[-1] == entry.router == Mechanism(3.0, 0.2, 6) and entry.router_taken == 0
    settle(ledger, reserve)
    (settled,) = read_entries(ledger)
    assert settled.settled and settled.router == entry.router
    found = certify(ledger, ROUTED, settled, uncovered=["other training"])
    assert (found.router, found.router_steps) == (3.0, 6)
    assert found.epsilon == epsilon_of([*entry.mechanisms[:-1], Mechanism(3.0, 0.2, 6)], 1e-6)


def test_what_was_not_set_aside_is_refused_and_costs_nothing(ledger, reserve):
    """T18: whatever is asked for, of six steps no seventh is taken."""
    pay(ledger, reserve, 4, 0)
    before = ledger.read_bytes()
    with pytest.raises(RecipeError, match=r"2 of 6 paid steps of the router left, .* asks for 3; raise privacy"):
        pay(ledger, reserve, 3, 4)
    assert ledger.read_bytes() == before
    pay(ledger, reserve, 2, 4)
    assert read_entries(ledger)[0].router_taken == 6 and stat.S_IMODE(ledger.stat().st_mode) == 0o600


def test_an_old_copy_of_the_ledger_is_found_out(ledger, reserve):
    """T18: it would let the same steps be taken twice. A crash before an answer leaves more steps than answers."""
    copy = ledger.read_bytes()
    pay(ledger, reserve, 2, 0)
    pay(ledger, reserve, 2, 0)
    ledger.write_bytes(copy)
    with pytest.raises(RunError, match=r"0 steps of the router as taken, .* answers of 4: it is an old"):
        pay(ledger, reserve, 2, 4)


def test_another_training_leaves_the_steps_of_the_one_before(ledger, reserve):
    """They are paid for, and two sites may have one ledger."""
    other = spend(ledger, ROUTED, "others", router_steps=6)
    pay(ledger, reserve, 2, 0)
    pay(ledger, other.id, 4, 0)
    assert [entry.router_taken for entry in read_entries(ledger)] == [2, 4]
    with pytest.raises(RunError, match="no steps of a router that were paid for with the training 0000"):
        pay(ledger, "0" * 16, 2, 0)


def test_a_ledger_without_a_router_is_as_it_was(ledger, quick):
    """So that an older Accord reads it, and a certificate, too."""
    entry = spend(ledger, PRIVACY, "pairs", router_steps=6)
    assert b"router" not in ledger.read_bytes()
    assert b"router" not in msgspec.json.encode(certify(ledger, PRIVACY, entry, uncovered=["counts"]))
    assert entry.mechanisms == tuple(spending.mechanisms_of(PRIVACY, TIGHT))


@pytest.mark.parametrize(
    "fields",
    [{"router": 3.0}, {"router_steps": 6}, {"router": 3.0, "router_steps": 6, "uncovered": ("shared training",)}],
)
def test_a_certificate_of_a_router_contradicts_itself_nowhere(ledger, quick, fields):
    found = certify(ledger, PRIVACY, spend(ledger, PRIVACY, "pairs"), uncovered=["counts"])
    with pytest.raises(msgspec.ValidationError, match="steps of a router"):
        msgspec.convert({**msgspec.to_builtins(found), **fields}, Certificate)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"router": 0.6}, "router must be at most 0.5, got 0.6: .*lower privacy.router"),
        ({"router": -0.1}, "router must be at least 0, got -0.1"),
        ({"router": float("nan")}, "router must be at least 0, got nan"),
        ({"router": 0.3, "unit": "label"}, "router must be 0 with the unit 'label', got 0.3: .*privacy.router out"),
    ],
)
def test_a_share_that_is_none_is_refused(fields, said):
    with pytest.raises(RecipeError, match=said):
        Privacy(**fields)
