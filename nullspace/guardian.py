"""Keeps one child process, and ends it when the process that asked for it is gone.

Run as a file (`python -I -S guardian.py ...`), so it imports nothing of the project:

    guardian.py --alive FD --report FD --signal N --grace SECONDS [--drop UID:GID] -- COMMAND...

`alive` is the read end of a pipe that only the parent writes to: end of file means that the parent
stopped us or died, even by `kill -9`. Then the child gets `signal`, `grace` seconds, and SIGKILL.
The child's process id, or the reason why it did not start, is one line on `report`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys

PR_SET_PDEATHSIG = 1
PR_SET_KEEPCAPS = 8
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
CAP_DAC_OVERRIDE = 1
CAPABILITY_VERSION_3 = 0x20080522


def _drop(uid: int, gid: int) -> None:
    """Become `uid`, keeping only the right to pass folders that root alone may enter.

    PostgreSQL refuses to run as root, while root's own folders (/root) are closed to all others.
    Where the capability cannot be kept (not Linux, not allowed), the folders must be reachable.
    """
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    if libc is not None:
        libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
    if libc is not None:
        # struct __user_cap_header, then two of __user_cap_data: effective, permitted, inheritable
        header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
        bit = 1 << CAP_DAC_OVERRIDE
        data = (ctypes.c_uint32 * 6)(bit, bit, bit, 0, 0, 0)
        if libc.capset(ctypes.byref(header), ctypes.byref(data)) == 0:
            libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_DAC_OVERRIDE, 0, 0)


def _prepare(guardian: int, stop: int, drop: str | None) -> None:
    """In the child, before the program: own group, lesser rights, death with the guardian."""
    os.setpgid(0, 0)
    if drop:
        uid, gid = drop.split(":")
        _drop(int(uid), int(gid))
    if sys.platform == "linux":
        # after the change of user, which clears it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, stop, 0, 0, 0)
        if os.getppid() != guardian:
            os._exit(1)


def _end(child: subprocess.Popen[bytes], stop: int, grace: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.send_signal(stop)
        child.wait(grace)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        # whatever the child left behind in its group goes too
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def main() -> int:
    """Keep the child until it or the parent ends. Exit status: the child's, or 128 + signal."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--alive", type=int, required=True)
    parser.add_argument("--report", type=int, required=True)
    parser.add_argument("--signal", type=int, default=signal.SIGTERM)
    parser.add_argument("--grace", type=float, default=10.0)
    parser.add_argument("--drop")
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()

    wake, woken = os.pipe()
    for end in (wake, woken):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

    me = os.getpid()
    try:
        child = subprocess.Popen(
            args.command,
            stdin=subprocess.DEVNULL,
            restore_signals=True,
            preexec_fn=lambda: _prepare(me, args.signal, args.drop),
        )
    except (OSError, subprocess.SubprocessError) as error:
        os.write(args.report, f"error {error}\n".encode())
        return 127
    os.write(args.report, f"pid {child.pid}\n".encode())
    os.close(args.report)

    while child.poll() is None:
        ready, _, _ = select.select([args.alive, wake], [], [], 60.0)
        asked = wake in ready and signal.SIGTERM in os.read(wake, 4096)
        if args.alive in ready or asked:
            _end(child, args.signal, args.grace)
            break
    code = child.returncode
    return code if code is not None and code >= 0 else 128 - (code or 0)


if __name__ == "__main__":
    sys.exit(main())
