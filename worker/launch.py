"""Exec wrapper: `python launch.py PARENT COMMAND...` becomes COMMAND, and dies with PARENT.

PDEATHSIG survives exec. It is set here rather than in a `preexec_fn`, because running Python
between fork and exec of a process with threads can deadlock. Where the system has no PDEATHSIG the
engine's own watch for end of file on its pipe does the same a little later.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent(signum: signal.Signals = signal.SIGKILL) -> None:
    """Ask the kernel to send `signum` when the thread that started this process ends."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signum), 0, 0, 0)


def main(argv: list[str]) -> None:
    """Become `argv[1:]`; `argv[0]` is the pid of the process that must be alive."""
    die_with_parent()
    if os.getppid() != int(argv[0]):
        os._exit(1)  # it died before the call above took effect
    os.execvp(argv[1], argv[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
