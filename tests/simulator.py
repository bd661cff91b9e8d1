"""FLARE's simulator, as what starts relay jobs: all sites on this machine, each job in a process of its own."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from accord.flare.engine import SERVER_CLASSES, SITE_CLASSES
from accord.flare.frames import SOCKETS_VARIABLE
from accord.runs import write_atomic


class Simulator:
    """Run jobs in FLARE's simulator, all sites on this machine; each job in a process of its own.

    Args:
        sites: their names; services listen for all of them.
        folder: of the sockets.
        workspace: a scratch folder.
    """

    def __init__(self, sites: Sequence[str], folder: Path, workspace: Path) -> None:
        self._sites, self._folder, self._workspace = sites, folder, workspace
        self._process: subprocess.Popen[bytes] | None = None

    def submit(self, job: Path) -> None:
        """Run the job, instead of an earlier one."""
        self.close()
        shutil.rmtree(self._workspace, ignore_errors=True)
        shutil.copytree(job, self._workspace / "job")  # beside FLARE's own folder, which it clears
        allowed = json.dumps({"format_version": 2, "class_allow_list": [*SERVER_CLASSES, *SITE_CLASSES]})
        write_atomic(self._workspace / "flare" / "local" / "resources.json", allowed)
        command = [sys.executable, "-m", "nvflare.cli", "simulator", str(self._workspace / "job")]
        command += ["-w", str(self._workspace / "flare"), "-c", ",".join(self._sites), "-t", str(len(self._sites))]
        with (self._workspace / "simulator.log").open("wb") as log:
            environment = {**os.environ, SOCKETS_VARIABLE: str(self._folder)}
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def connected(self) -> dict[str, float]:
        """Return all sites."""
        return dict.fromkeys(self._sites, time.time())

    def close(self) -> None:
        """End the job's process."""
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5.0)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, 15)
            self._process.wait()
        self._process = None
