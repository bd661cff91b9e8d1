"""A site's ledger of what its private data have paid for reward models.

    spend     under a lock: read the ledger, calibrate the noise to what is left, write the entry, give out its key
    train     by `accord.rewards.private`, with the noise of that key
    settle    once model and card are written: the key is erased
    pay       before a site takes steps on the router: note that they are taken

The entry is on disk before the first private number is kept, so a training that is killed stays paid for. While its
key is there, the same training of the same data may be done again at no price: from one key it draws the same samples
and the same noise, so that of all attempts one result leaves the site, and it is the one that was paid for. An entry
fits only where pairs, backbone, settings and version are the same, since one noise on two data sets would show their
difference. Once the key is erased, by `settle` or by the entry of another training, nothing can be done again, and
nobody who takes the ledger can take the noise away.

With `privacy.router` the same entry sets aside steps of the router, and the server asks for them round by round. Each
answer has a key of its own that is written nowhere. The site keeps its answers and gives them again to the same
requests (`accord.routing.private_fit.Answers`), so that a ledger that has fewer steps than they took is an old copy.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from accord.errors import RecipeError, RunError
from accord.rewards.accounting import (
    Mechanism,
    calibrate,
    epsilon_of,
    label_mechanism,
    mechanisms_of,
    router_mechanism,
)
from accord.rewards.certificate import Certificate, Uncovered, Unit, Way
from accord.rewards.noise import GENERATOR, new_key
from accord.rewards.private import Privacy, Sigmas
from accord.runs import write_atomic
from accord.runs.lock import in_turn_at
from accord.version import VERSION


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One training in the ledger."""

    id: str
    fingerprint: str  # of pairs, backbone, settings and version; stays at the site
    unit: Unit
    delta: float
    sigmas: Sigmas
    mechanisms: tuple[Mechanism, ...]
    key: str  # hexadecimal; empty once settled
    router_taken: int | None = None  # steps of those that the last mechanism sets aside; None where none are

    @property
    def settled(self) -> bool:
        """Whether the training is over, and cannot be done again."""
        return not self.key

    @property
    def router(self) -> Mechanism | None:
        """The steps of a router that were paid for, if any were."""
        return None if self.router_taken is None else self.mechanisms[-1]


class _Ledger(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: Literal["accord-privacy-ledger-1"] = "accord-privacy-ledger-1"
    entries: tuple[Entry, ...] = ()


def read_entries(path: Path) -> tuple[Entry, ...]:
    """Return the trainings that a ledger holds, the oldest first; none where there is no file.

    Raises:
        RunError: it cannot be read. Nothing may be spent then: what was, is not known.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Ledger).entries
    except FileNotFoundError:
        return ()
    except (OSError, msgspec.MsgspecError) as error:
        raise RunError(
            f"{path}: the privacy ledger cannot be read ({error}), so that nobody knows what is spent; put the newest "
            "copy back: an older one would spend twice"
        ) from error


def spend(path: Path, privacy: Privacy, fingerprint: str, *, router_steps: int = 0) -> Entry:
    """Write down that a training will spend what is left of the budget, and return its entry with its key.

    An entry of the same training that is not settled is returned as it is. A new one erases the keys of all others:
    a training that was given up, as by a change of settings, is over.

    Args:
        path: the ledger, a file that its owner alone may read.
        privacy: the guarantee, for everything in the ledger together.
        fingerprint: of all that the training's result depends on.
        router_steps: of a router, which are set aside where `privacy.router` is above 0.

    Raises:
        RecipeError: the budget is spent, or earlier entries protect another unit.
        RunError: the ledger cannot be read or written; nothing was spent.
    """
    with in_turn_at(path, "the privacy ledger", "check privacy.ledger"):
        entries = read_entries(path)
        for entry in entries:
            if entry.fingerprint == fingerprint and not entry.settled:
                return entry
        if units := {entry.unit for entry in entries} - {privacy.unit}:
            raise RecipeError(
                f"{path} accounts for every {units.pop()}, and privacy.unit is {privacy.unit!r}, which does not add up "
                "with it; keep the unit, or name another ledger for other data"
            )
        before = [each for entry in entries for each in entry.mechanisms]
        reserved: list[Mechanism] = []
        try:
            if privacy.unit == "label":
                sigmas, mechanisms = Sigmas(0.0, 0.0, 0.0), [label_mechanism(privacy, before)]
            else:
                reserved = [router_mechanism(privacy, router_steps, before)] if privacy.router else []
                sigmas = calibrate(privacy, before, reserved)
                mechanisms = [*mechanisms_of(privacy, sigmas), *reserved]
        except RecipeError as error:
            if not entries:
                raise
            raise RecipeError(f"{error} (paid in {path}: {', '.join(entry.id for entry in entries)})") from error
        entry = Entry(
            os.urandom(8).hex(),
            fingerprint,
            privacy.unit,
            privacy.delta,
            sigmas,
            tuple(mechanisms),
            new_key().hex(),
            0 if reserved else None,
        )
        _write(path, (*(msgspec.structs.replace(each, key="") for each in entries), entry))
        return entry


def settle(path: Path, entry: str) -> None:
    """Erase the key of the training with this id, whose result is written."""
    with in_turn_at(path, "the privacy ledger", "check privacy.ledger"):
        found = read_entries(path)
        _write(path, [msgspec.structs.replace(each, key="") if each.id == entry else each for each in found])


def pay(path: Path, entry: str, steps: int, known: int) -> None:
    """Note that a site takes steps on the router.

    Args:
        path: the ledger.
        entry: id of the training with which the steps were paid for.
        steps: how many.
        known: how many the answers took that the site has kept.

    Raises:
        RecipeError: fewer steps are left; nothing was spent.
        RunError: the ledger cannot be read or written, has no such steps, or is older than the answers.
    """
    with in_turn_at(path, "the privacy ledger", "check privacy.ledger"):
        entries = read_entries(path)
        paid = next((each for each in entries if each.id == entry), None)
        if paid is None or paid.router is None or paid.router_taken is None:
            raise RunError(
                f"{path} has no steps of a router that were paid for with the training {entry}; put the newest ledger "
                "back that has them, or train the site again"
            )
        if paid.router_taken < known:
            raise RunError(
                f"{path} has {paid.router_taken} steps of the router as taken, and the site has answers of {known}: it "
                "is an old copy; put the newest one back"
            )
        left = paid.router.releases - paid.router_taken
        if steps > left:
            raise RecipeError(
                f"{path} has {left} of {paid.router.releases} paid steps of the router left, and a new request asks "
                f"for {steps}; raise privacy.epsilon and train the site again"
            )
        taken = msgspec.structs.replace(paid, router_taken=paid.router_taken + steps)
        _write(path, [taken if each.id == entry else each for each in entries])


def certify(
    path: Path, privacy: Privacy, entry: Entry, *, way: Way = "head", uncovered: Sequence[Uncovered]
) -> Certificate:
    """Return the certificate of a training: what it spent, and all entries up to it together."""
    entries = read_entries(path)
    upto = entries[: [each.id for each in entries].index(entry.id) + 1]
    labels = way == "labels"
    found = Certificate(
        id=entry.id,
        epsilon=epsilon_of(entry.mechanisms, privacy.delta),
        total=epsilon_of([each for before in upto for each in before.mechanisms], privacy.delta),
        delta=0.0 if labels else privacy.delta,
        unit=privacy.unit,
        way=way,
        sampling=1.0 if labels else privacy.sampling,
        steps=privacy.steps,
        clip=0.0 if labels else privacy.clip,
        sigma=entry.sigmas.gradient,
        projection=entry.sigmas.projection if privacy.dimensions else 0.0,
        standardisation=entry.sigmas.standardisation,
        flip=entry.mechanisms[0].flip,
        noise=GENERATOR,
        version=VERSION,
        uncovered=tuple(uncovered),
    )
    if entry.router is None:
        return found
    return msgspec.structs.replace(found, router=entry.router.sigma, router_steps=entry.router.releases)


def fingerprint_of(*parts: object) -> str:
    """Return a SHA-256 over parts that JSON can hold."""
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


def _write(path: Path, entries: Sequence[Entry]) -> None:
    write_atomic(path, msgspec.json.format(msgspec.json.encode(_Ledger(entries=tuple(entries)))), mode=0o600)
