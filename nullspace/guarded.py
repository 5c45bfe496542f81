"""Child processes that end with us, however we end. See `guardian`."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

GUARDIAN = Path(__file__).with_name("guardian.py")


class StartFailed(Exception):
    """A process could not be started; the text says which and why."""


class Guarded:
    """A running child and its guardian. `pid` is the child's."""

    def __init__(
        self, guardian: subprocess.Popen[bytes], alive: int, pid: int, grace: float
    ) -> None:
        self._guardian = guardian
        self._alive = alive
        self._grace = grace
        self.pid = pid

    def poll(self) -> int | None:
        """The exit status (128 + N where signal N ended it), None while it runs."""
        return self._guardian.poll()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end. Raises subprocess.TimeoutExpired."""
        return self._guardian.wait(timeout)

    def ask(self) -> None:
        """Ask the child to end and return at once; `stop` afterwards waits."""
        if self._alive >= 0:
            os.close(self._alive)
            self._alive = -1
        if self._guardian.poll() is None:
            self._guardian.send_signal(signal.SIGTERM)

    def stop(self) -> int:
        """End the child: its stop signal, the grace period, SIGKILL. The exit status."""
        self.ask()
        try:
            return self._guardian.wait(self._grace + 10)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self._guardian.kill()
            return self._guardian.wait()

    def __del__(self) -> None:
        if self._alive >= 0:
            with contextlib.suppress(OSError):
                os.close(self._alive)


def start(
    command: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    log: Path | None = None,
    stop_signal: signal.Signals = signal.SIGTERM,
    grace: float = 10.0,
    user: tuple[int, int] | None = None,
    keep: Sequence[int] = (),
) -> Guarded:
    """Start `command` under a guardian.

    log    file that gets its output (appended); without it the output is ours
    user   (uid, gid) to run as; needs root
    keep   file descriptors that the guardian (not the child) holds open until the child is gone
    Raises StartFailed.
    """
    alive_read, alive_write = os.pipe()
    report_read, report_write = os.pipe()
    output = open(log, "ab") if log is not None else None  # noqa: SIM115
    argv = [
        *(sys.executable, "-I", "-S", str(GUARDIAN)),
        *("--alive", str(alive_read), "--report", str(report_write)),
        *("--signal", str(int(stop_signal)), "--grace", str(grace)),
        *(("--drop", f"{user[0]}:{user[1]}") if user else ()),
        "--",
        *map(str, command),
    ]
    try:
        guardian = subprocess.Popen(
            argv,
            env=None if env is None else dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=(alive_read, report_write, *keep),
            start_new_session=True,  # Ctrl-C in the terminal is for us alone
        )
    except OSError as error:
        for end in (alive_read, alive_write, report_read, report_write):
            os.close(end)
        raise StartFailed(f"{command[0]}: {error}") from error
    finally:
        if output is not None:
            output.close()
    os.close(alive_read)
    os.close(report_write)
    with os.fdopen(report_read, "rb") as report:
        word, _, rest = report.readline().decode(errors="replace").strip().partition(" ")
    if word != "pid":
        os.close(alive_write)
        guardian.wait()
        raise StartFailed(f"{command[0]}: {rest or 'the process could not be started'}")
    return Guarded(guardian, alive_write, int(rest), grace)
