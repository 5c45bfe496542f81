"""The command line as people run it: `nullspace up` in the background, commands beside it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.service.processes import fake_engine, make_model

PROGRAM = [sys.executable, "-m", "nullspace"]


@dataclass
class Lab:
    """A folder of its own, an environment without a trace of this machine's, a fake engine."""

    folder: Path
    env: dict[str, str]

    @classmethod
    def make(cls, folder: Path) -> Lab:
        """With the model `fake` and the prompt files asked.txt and plain.txt."""
        make_model(folder / "models")
        for name in ("asked", "plain"):
            (folder / f"{name}.txt").write_text("\n".join(f"{name} {n}" for n in range(60)))
        kept = ("PATH", "LANG", "TMPDIR", "VIRTUAL_ENV", "OMP_NUM_THREADS")
        env = {name: os.environ[name] for name in kept if name in os.environ}
        env |= {
            "HOME": str(folder / "home"),
            "NULLSPACE_MODELS": str(folder / "models"),
            "NULLSPACE_HUB_CHECK": "false",
            "NULLSPACE_DISK_RESERVE_BYTES": "0",
            "NULLSPACE_ENGINE_COMMAND": json.dumps(fake_engine(folder / "orders", 0.05)),
            "NULLSPACE_RECONCILE_SECONDS": "1",
            "NULLSPACE_POLL_SECONDS": "0.2",
            # the sooner a worker without its database gives up, the sooner it is gone
            "NULLSPACE_LEASE_SECONDS": "10",
            "NULLSPACE_BEAT_SECONDS": "1",
        }
        return cls(folder, env)

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def nullspace(
        self, *arguments: str, code: int = 0, text: str = "", seconds: float = 120, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run one command to its end and check its exit code."""
        done = subprocess.run(
            [*PROGRAM, *arguments],
            env={**self.env, **env},
            cwd=self.folder,
            input=text,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        assert done.returncode == code, (
            f"{arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
        )
        return done

    def json(self, *arguments: str, **options: Any) -> Any:
        """What a command prints with --json."""
        return json.loads(self.nullspace(*arguments, "--json", **options).stdout)

    @contextlib.contextmanager
    def up(self, *arguments: str) -> Iterator[Up]:
        """`nullspace up` until the end of the block, then Ctrl-C."""
        output = self.folder / f"up-{time.monotonic_ns()}.txt"
        with output.open("wb") as file:
            process = subprocess.Popen(
                [*PROGRAM, "up", "--data", str(self.data), "--port", "0", *arguments],
                env=self.env, cwd=self.folder, stdout=file, stderr=file, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        running = Up(process, output)
        try:
            running.until("Ctrl-C ends it")
            yield running
        finally:
            running.end(signal.SIGINT)


@dataclass
class Up:
    """A running `nullspace up`."""

    process: subprocess.Popen[bytes]
    output: Path

    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def until(self, words: str, seconds: float = 120) -> None:
        """Wait until it said `words`."""
        end = time.monotonic() + seconds
        while words not in self.said():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.05)

    @property
    def url(self) -> str:
        return self.said().partition("Nullspace runs at ")[2].split()[0]

    def tree(self) -> list[psutil.Process]:
        """All processes of the service, servers and workers among them."""
        with contextlib.suppress(psutil.NoSuchProcess):
            found: list[psutil.Process] = psutil.Process(self.process.pid).children(recursive=True)
            return found
        return []

    def child(self, *words: str) -> psutil.Process:
        """The service's process whose command line ends with `words`."""
        for process in self.tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                command = process.cmdline()
                if "guardian.py" not in " ".join(command) and set(words) <= set(command):
                    return process
        raise AssertionError(f"no process {words}")

    def end(self, how: signal.Signals, seconds: float = 90) -> int:
        """Send the signal and wait for the end."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(seconds)
