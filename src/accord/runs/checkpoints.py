"""Seal a trainer's checkpoints with hashes, and find the newest that is whole.

    checkpoints/<stage>/
      checkpoint-20/
        model.safetensors, optimizer.pt, …    what the trainer and its callbacks wrote
        manifest.json                         written last: the size and the SHA-256 of every other file
      checkpoint-40/                          without a manifest: a crash fell into the writing of it
      damaged-checkpoint-60/                  set aside: its files are not those that were sealed

A manifest appears once everything it names is on disk, so a folder is sealed whole or not at all. An older checkpoint
goes only after a newer one is sealed: at every moment the last `count` sealed ones are there to fall back on.

The hashes show damage, not malice: a process that can write into the folder can write its manifest too. Checkpoints
are read by the process that wrote them, or its successor, from their own run folder; nothing that comes from a site is
one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Final, TypeAlias

from accord.errors import CheckpointError, DataWarning
from accord.runs import sync, write_atomic

MANIFEST: Final = "manifest.json"

Entry: TypeAlias = dict[str, int | str]
"""What a manifest says of a file: `{"size": 12, "sha256": "9f86…"}`."""


def seal(folder: Path) -> None:
    """Write the manifest of a checkpoint into which nothing more is written.

    Every file is read once and flushed to disk first, which takes about as long as writing it did.

    Raises:
        OSError: a file cannot be read or flushed, as where the disk is full; the folder stays unsealed.
        RunError: the manifest cannot be written; the folder stays unsealed, and no temporary file is left.
    """
    files = {}
    for name, path in _files(folder).items():
        sync(path)
        files[name] = _entry(path)
    write_atomic(folder / MANIFEST, json.dumps({"files": files}, indent=1) + "\n")
    sync(folder.parent)


def verify(folder: Path) -> None:
    """Compare every file of a sealed checkpoint with its manifest, sizes before contents.

    Raises:
        CheckpointError: the manifest is missing or unreadable; or a file is missing, cannot be read, was not sealed
            with the others, or differs in size or SHA-256. Names the file and the difference.
    """
    if flaw := _flaw(folder):
        raise CheckpointError(
            f"{folder} is damaged ({flaw}); remove the folder, and --resume goes on from the checkpoint before it"
        )


def newest_good(parent: Path) -> Path | None:
    """Return the newest `checkpoint-N` in `parent` that verifies; None if there is none, or no `parent`.

    Those after it go out of the trainer's sight, each with a `DataWarning`. One without a manifest is removed: a crash
    or a full disk broke off its writing. A damaged one is set aside as `damaged-checkpoint-N`, for a bad disk is
    worth a look.
    """
    bad: list[tuple[Path, str]] = []
    good = None
    for folder in reversed(_checkpoints(parent)):
        flaw = _flaw(folder)
        if flaw is None:
            good = folder
            break
        bad.append((folder, flaw))
    left = f"going on from {good.name}, the steps after it" if good else "no other is left, all steps"
    for folder, flaw in bad:
        if (folder / MANIFEST).exists():
            aside = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            state = f"is damaged ({flaw}) and was set aside as {aside.name}"
        else:
            shutil.rmtree(folder)
            state = f"is incomplete ({flaw}) and was removed"
        warnings.warn(f"{folder} {state}; {left} are done again", DataWarning, stacklevel=2)
    return good


def keep_newest(parent: Path, count: int) -> None:
    """Remove all but the newest `count` checkpoints in `parent`; call it once the newest is sealed."""
    for folder in _checkpoints(parent)[:-count]:
        # First, so that an interrupted removal leaves an unsealed checkpoint and not a damaged one.
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def step_of(checkpoint: Path) -> int:
    """Return N of `checkpoint-N`."""
    return int(checkpoint.name.rpartition("-")[2])


def _checkpoints(parent: Path) -> list[Path]:
    """Return the folders that the trainer takes for checkpoints, by step."""
    found = [path for path in parent.glob("checkpoint-*") if re.fullmatch(r"checkpoint-[0-9]+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=step_of)


def _files(folder: Path) -> dict[str, Path]:
    """Return every file below `folder` except the manifest, under its path from there."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in paths if path != folder / MANIFEST}


def _entry(path: Path) -> Entry:
    with path.open("rb") as file:
        return {"size": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _flaw(folder: Path) -> str | None:
    """Name the first file that is not as it was sealed, and what differs; None for a whole checkpoint."""
    try:
        sealed = json.loads((folder / MANIFEST).read_bytes())["files"]
        expected = {str(name): (entry["size"], entry["sha256"]) for name, entry in sealed.items()}
    except FileNotFoundError:
        return f"{MANIFEST}: missing"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST}: unreadable, {type(error).__name__}"
    found = _files(folder)
    for name, (size, _) in expected.items():
        if name not in found:
            return f"{name}: missing"
        if (seen := found[name].stat().st_size) != size:
            return f"{name}: {seen} bytes, not {size}"
    if extra := sorted(found.keys() - expected.keys()):
        return f"{extra[0]}: not in {MANIFEST}"
    for name, (_, sha256) in expected.items():
        try:
            entry = _entry(found[name])
        except OSError as error:
            return f"{name}: unreadable, {error.strerror}"
        if entry["sha256"] != sha256:
            return f"{name}: SHA-256 differs"
    return None
