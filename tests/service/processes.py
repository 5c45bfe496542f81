"""Real worker processes for the tests, and waiting for conditions."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil

from jobs import people, prompts, submit
from jobs.database import Sessions
from jobs.doorbell import Doorbell
from jobs.queue import claimable_of
from jobs.settings import Settings
from jobs.spec.job import JobSpec
from jobs.tables import User

ROOT = Path(__file__).parents[2]
FAKE_ENGINE = ROOT / "tests" / "crash" / "fake_engine.py"
T = TypeVar("T")


def wait_until(condition: Callable[[], T], seconds: float = 20.0, what: str = "") -> T:
    """The first true value of `condition()`; AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds} s: {what or condition}")
        time.sleep(0.05)


class WorkerProcess:
    """One `python -m worker`: the main process, its pool child, their engine."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path) -> None:
        self.process, self.output = process, output

    @property
    def pid(self) -> int:
        return self.process.pid

    def tree(self) -> list[psutil.Process]:
        """All processes of this worker, the engine among them."""
        with contextlib.suppress(psutil.NoSuchProcess):
            main = psutil.Process(self.pid)
            return [main, *main.children(recursive=True)]
        return []

    def signal_group(self, signum: signal.Signals) -> None:
        """To the main process and its pool child, not to the engine (own session)."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signum)

    def terminate(self) -> None:
        """SIGTERM to the main process alone, as `docker stop` and systemd do."""
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()

    def wait(self, seconds: float = 20.0) -> int:
        return self.process.wait(seconds)

    def end(self) -> None:
        """Whatever state it is in: gone afterwards."""
        self.signal_group(signal.SIGKILL)
        self.process.wait(10)

    def said(self) -> str:
        return self.output.read_text(errors="replace")


def environment(settings: Settings, engine: list[str] | None = None, **more: str) -> dict[str, str]:
    """The environment of a worker with these settings; `engine` replaces the real one."""
    kept = ("PATH", "HOME", "LANG", "TMPDIR", "OMP_NUM_THREADS", "VIRTUAL_ENV")
    env = {name: os.environ[name] for name in kept if name in os.environ}
    env.update(
        DATABASE_URL=settings.database_url,
        REDIS_URL=settings.redis_url,
        NULLSPACE_SECRET_KEY=settings.secret_key.get_secret_value(),
        NULLSPACE_DATA=str(settings.data),
        NULLSPACE_LEASE_SECONDS=str(settings.lease_seconds),
        NULLSPACE_BEAT_SECONDS=str(settings.beat_seconds),
        NULLSPACE_RECONCILE_SECONDS=str(settings.reconcile_seconds),
        NULLSPACE_HUB_CHECK="false",
        NULLSPACE_ACCEPTS=settings.accepts,
        NULLSPACE_LINGER_SECONDS="0",
        PYTHONPATH=str(ROOT),
    )
    if settings.models is not None:
        env["NULLSPACE_MODELS"] = str(settings.models)
    if engine is not None:
        env["NULLSPACE_ENGINE_COMMAND"] = json.dumps(engine)
    return {**env, **more}


@contextlib.contextmanager
def worker(
    settings: Settings, folder: Path, engine: list[str] | None = None, **more: str
) -> Iterator[WorkerProcess]:
    """A running worker; its output goes to `folder`."""
    output = folder / f"worker-{uuid.uuid4().hex[:6]}.txt"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "worker"],
            env=environment(settings, engine, **more),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=ROOT,
        )
    started = WorkerProcess(process, output)
    try:
        yield started
    finally:
        started.end()


def fake_engine(orders: Path, delay: float = 0.01, lanes: int = 0) -> list[str]:
    """The command of the fake engine; `orders` is where its faults are ordered."""
    orders.mkdir(parents=True, exist_ok=True)
    return [
        sys.executable,
        "-S",
        str(FAKE_ENGINE),
        "--orders",
        str(orders),
        "--delay",
        str(delay),
        "--lanes",
        str(lanes),
    ]


def live_engines(orders: Path) -> list[int]:
    """Process ids of fake engines that are alive."""
    marks = (orders / "engines").glob("*")
    return [int(mark.name) for mark in marks if psutil.pid_exists(int(mark.name))]


def make_model(models: Path, name: str = "fake") -> None:
    """A folder that passes for a model where nobody reads the weights."""
    (models / name).mkdir(parents=True, exist_ok=True)
    (models / name / "config.json").write_text("{}")
    (models / name / "model.safetensors").write_bytes(b"")


def make_owner(sessions: Sessions) -> User:
    """A member with prompt sets `harmful`, `harmless` and `touchy`."""
    with sessions.begin() as session:
        user = people.create_user(session, f"{uuid.uuid4().hex[:8]}@example.org")
        for name in ("harmful", "harmless", "touchy"):
            lines = [{"prompt": f"{name} {number}", "split": None} for number in range(40)]
            prompts.create_set(session, user, name, lines)
        return user


def submit_job(
    sessions: Sessions, settings: Settings, user: User, ring: bool = True, **fields: object
) -> uuid.UUID:
    """Submit a job for the fake model and ring for it."""
    sets = {"harmful": "harmful", "harmless": "harmless", "over_refusal": "touchy"}
    small = {**sets, "direction": 8, "search": 12, "heldout": 10}
    spec = JobSpec.model_validate({"model": "fake", "prompts": small, **fields})
    with sessions.begin() as session:
        job, _ = submit.submit(session, user, spec, settings)
    if ring:
        ring_for(sessions, settings, job.id)
    return job.id


def ring_for(sessions: Sessions, settings: Settings, job_id: uuid.UUID) -> None:
    """What api and web do after a commit."""
    doorbell = Doorbell(settings.redis_url)
    with sessions.begin() as session:
        doorbell.ring(claimable_of(session, job_id))
    doorbell.close()
