"""Refuse a run folder whose files are not its own, before any of them is read or written.

A folder may come from somebody else. A link in it would put any file that its reader may read into a report, or the
records of a resumed run at the end of another file; a pipe or a device would never end.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from accord.errors import RunError

MAX_RECORDS = 2**28
"""Bytes of a file of records in a run folder, all of which is read at once."""


def refuse_foreign(folder: Path) -> None:
    """Refuse a run folder with a link out of it, with what is neither file nor folder, or with too long records.

    Nothing is refused where there is no folder.

    Raises:
        RunError: names the first such entry.
    """
    root = folder.resolve()
    for where, folders, names in os.walk(folder):
        for path in sorted(Path(where, name) for name in (*folders, *names)):
            try:
                if path.is_symlink() and not path.resolve().is_relative_to(root):
                    raise RunError(f"{path} is a link to a place outside the run folder; put the file itself there")
                found = path.stat()
            except FileNotFoundError:  # a dangling link within the folder, or what another process has just removed
                continue
            except (OSError, RuntimeError) as error:  # links in a circle are the latter before Python 3.13
                raise RunError(f"{path} cannot be followed ({error}); remove it") from error
            if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
                raise RunError(f"{path} is neither a file nor a folder; remove it")
            if path.suffix in (".json", ".jsonl", ".toml") and found.st_size > MAX_RECORDS:
                raise RunError(f"{path} has {found.st_size:,} bytes, at most {MAX_RECORDS:,} are read; remove it")
