"""One server's folder: its lock, its password, its port and what a crash left behind."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import secrets
import signal
import socket
import subprocess
import time
from pathlib import Path

from nullspace.guarded import Guarded, StartFailed


class Server:
    """What both servers share: a folder with a lock and a child process."""

    name = "server"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._child: Guarded | None = None
        self._lock = -1

    @property
    def pid(self) -> int:
        """Process id of the server itself."""
        if self._child is None:
            raise StartFailed(f"{self.name} is not running")
        return self._child.pid

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self._child is not None and self._child.poll() is None

    def stop(self) -> None:
        """End the server in good order and wait for it."""
        self._end_child()
        self._unlock()

    def _end_child(self) -> None:
        if self._child is not None:
            self._child.stop()
            self._child = None

    def _take_lock(self, wait: float = 20.0) -> None:
        """One server per folder. Waits for a predecessor that is just ending."""
        self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    self._unlock()
                    raise StartFailed(
                        f"another Nullspace uses the folder {self.folder}: stop it, or choose "
                        "another folder with --data"
                    ) from None
                time.sleep(0.1)

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _log_tail(self) -> str:
        with contextlib.suppress(OSError):
            lines = (self.folder / "log").read_text(errors="replace").splitlines()
            return "\n".join(lines[-8:])
        return ""


def package_folder(package: str) -> Path | None:
    """Where a package lies, without importing it."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def own_folder(folder: Path) -> Path:
    """The folder, made where missing, closed to others. Raises StartFailed."""
    folder = folder.expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise StartFailed(
            f"the folder {folder} cannot be written ({error.strerror}): choose another with --data"
        ) from error
    return folder


def write_private(path: Path, text: str) -> None:
    """Write a file of mode 0600."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)


def secret(path: Path) -> str:
    """The folder's password, made once."""
    with contextlib.suppress(OSError):
        if kept := path.read_text().strip():
            return kept
    write_private(path, secrets.token_hex(24))
    return path.read_text()


def quoted(path: Path) -> str:
    """A path as Redis' settings file wants it."""
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'


def is_free(port: int) -> bool:
    """Whether `port` can be bound on loopback."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A port on loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def remembered_port(path: Path) -> int:
    """The port of the last start, so that addresses stay; a free one at the first."""
    with contextlib.suppress(OSError, ValueError):
        port = int(path.read_text())
        if 1024 <= port < 65536:
            return port
    return free_port()


def plain_environment() -> dict[str, str]:
    """What a database server needs of our environment: no settings, no secrets."""
    kept = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")
    return {name: os.environ[name] for name in kept if name in os.environ} | {"LC_ALL": "C"}


def _command_of(pid: int) -> str:
    """The command line of a live process, or ''."""
    with contextlib.suppress(OSError):
        return (
            Path(f"/proc/{pid}/cmdline")
            .read_bytes()
            .replace(b"\0", b" ")
            .decode("utf-8", "replace")
        )
    if not Path("/proc/self").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["ps", "-o", "command=", "-p", str(pid)]
            return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    return ""


def end_leftover(pid_file: Path, *names: str) -> None:
    """End a server that outlived its guardian.

    A file that names no process, or one that is another program's by now, is removed where it
    would keep the server from starting.
    """
    try:
        pid = int(pid_file.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return
    folder = str(pid_file.parent)
    deadline = time.monotonic() + 30
    asked = False
    while True:
        command = _command_of(pid)
        if folder not in command or not any(name in command for name in names):
            if command:
                pid_file.unlink(missing_ok=True)
            return
        with contextlib.suppress(ProcessLookupError):
            if not asked:
                os.kill(pid, signal.SIGINT)
                asked = True
            elif time.monotonic() > deadline - 15:
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise StartFailed(f"process {pid} still serves {folder}: end it and start again")
        time.sleep(0.1)
