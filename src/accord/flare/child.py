"""Become FLARE's process, and end when the process that started it does, however that happens.

A FLARE client whose service was killed would go on telling the server that the site is there; a FLARE server would keep
its port. On Linux the kernel sends SIGTERM to a child whose parent dies (prctl PR_SET_PDEATHSIG); elsewhere such a
process stays, and is ended at the next start. FLARE's audit log, which would be about looks alone, is told to leave
those out.

    python -m accord.flare.child PARENT MODULE ARGUMENTS…
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
from typing import Final

PR_SET_PDEATHSIG: Final = 1


def main() -> None:
    """Tie this process to its parent, then run the module as FLARE's own scripts do."""
    parent, module = int(sys.argv[1]), sys.argv[2]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before the kernel was told
            raise SystemExit(1)
    _do_not_audit_looks()
    sys.argv = [module, *sys.argv[3:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _do_not_audit_looks() -> None:
    """Keep out of the audit log that the operator looked who is there, as a run does every two seconds."""
    from nvflare.fuel.sec import audit

    audit.EXCLUDED_ACTIONS.add("check_status server")


if __name__ == "__main__":
    main()
