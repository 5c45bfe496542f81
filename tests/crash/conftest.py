"""A job on the fake engine, with leases of two seconds."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from jobs import trials
from jobs.database import Sessions
from jobs.settings import Settings
from jobs.tables import Job, Task, User
from tests.crash.checker import check
from tests.service import processes
from tests.service.processes import WorkerProcess, wait_until

QUICK = {"lease_seconds": 2.0, "beat_seconds": 0.4, "reconcile_seconds": 0.5}


@dataclass
class Stage:
    """Servers, a user, and as many workers as a test wants."""

    settings: Settings
    sessions: Sessions
    owner: User
    folder: Path
    stack: contextlib.ExitStack
    delay: float = 0.02
    lanes: int = 0
    workers: list[WorkerProcess] = field(default_factory=list)

    @property
    def orders(self) -> Path:
        return self.folder / "orders"

    def order(self, name: str, text: str = "") -> None:
        self.orders.mkdir(parents=True, exist_ok=True)
        (self.orders / name).write_text(text)

    def start_worker(self, **more: str) -> WorkerProcess:
        command = processes.fake_engine(self.orders, self.delay, self.lanes)
        started = self.stack.enter_context(
            processes.worker(self.settings, self.folder, command, **more)
        )
        self.workers.append(started)
        return started

    def submit(self, ring: bool = True, **fields: object) -> uuid.UUID:
        fields.setdefault("startup_trials", 0 if fields.get("trials") == 1 else None)
        return processes.submit_job(self.sessions, self.settings, self.owner, ring, **fields)

    def job(self, job_id: uuid.UUID) -> Job:
        with self.sessions() as session:
            return session.get_one(Job, job_id)

    def tasks(self, job_id: uuid.UUID) -> list[Task]:
        with self.sessions() as session:
            return list(session.scalars(select(Task).where(Task.job_id == job_id)))

    def complete(self, job_id: uuid.UUID) -> int:
        with self.sessions() as session:
            return trials.counts(session, job_id)["complete"]

    def wait_complete(self, job_id: uuid.UUID, count: int, seconds: float = 30.0) -> None:
        wait_until(lambda: self.complete(job_id) >= count, seconds, f"{count} trials")

    def wait_state(self, job_id: uuid.UUID, state: str, seconds: float = 40.0) -> None:
        try:
            wait_until(lambda: self.job(job_id).state == state, seconds, f"the job is {state}")
        except AssertionError as late:
            said = "\n".join(worker.said()[-3000:] for worker in self.workers)
            job = self.job(job_id)
            raise AssertionError(f"{late}; it is {job.state}: {job.error}\n{said}") from late

    def check(self, job_id: uuid.UUID, state: str = "completed", resumed: int = 0) -> None:
        check(self.sessions, job_id, state, resumed)

    def write(self, act: Callable[[Session], object]) -> None:
        with self.sessions.begin() as session:
            act(session)


@pytest.fixture
def stage(
    make_settings: Callable[..., Settings], sessions: Sessions, tmp_path: Path
) -> Iterator[Stage]:
    """A stage on this test's database and Redis."""
    with make_stage(make_settings(models=tmp_path / "models", **QUICK), sessions, tmp_path) as made:
        yield made


@contextlib.contextmanager
def make_stage(settings: Settings, sessions: Sessions, folder: Path) -> Iterator[Stage]:
    """A stage on given servers."""
    processes.make_model(folder / "models")
    with contextlib.ExitStack() as stack:
        yield Stage(settings, sessions, processes.make_owner(sessions), folder, stack)
