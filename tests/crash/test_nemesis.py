"""Random faults at random moments, from a seed; then the checker reads what is left."""

from __future__ import annotations

import os
import random
import signal
import time
import uuid
from collections import Counter
from collections.abc import Callable

import psutil
import pytest
import redis

from jobs import control
from jobs.tables import Job
from tests.crash.conftest import Stage
from tests.service.processes import WorkerProcess, live_engines, ring_for, wait_until

pytestmark = pytest.mark.crash


class Nemesis:
    """Does one thing after another to the workers of a stage."""

    def __init__(self, stage: Stage, seed: int) -> None:
        self.stage, self.random = stage, random.Random(seed)
        self.did: Counter[str] = Counter()
        self.stopped: list[tuple[float, WorkerProcess]] = []
        self.acts: dict[str, Callable[[], None]] = {
            "kill engine": self.kill_engine,
            "kill worker": self.kill_worker,
            "kill main": self.kill_main,
            "kill child": self.kill_child,
            "stop worker": self.stop_worker,
            "terminate worker": self.terminate_worker,
            "flush redis": self.flush_redis,
        }

    def storm(self, seconds: float, over: Callable[[], bool]) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not over():
            name = self.random.choice(sorted(self.acts))
            self.acts[name]()
            self.did[name] += 1
            gap = time.monotonic() + self.random.uniform(0.5, 2.5)
            wait_until(lambda gap=gap: time.monotonic() > gap, 5)  # type: ignore[misc]
            self.wake(all_of_them=False)
            self.keep_two_alive()
        self.wake(all_of_them=True)
        self.keep_two_alive()

    def victim(self) -> WorkerProcess:
        return self.random.choice([w for w in self.stage.workers if w.process.poll() is None])

    def keep_two_alive(self) -> None:
        alive = [w for w in self.stage.workers if w.process.poll() is None]
        for _ in range(2 - len(alive)):
            self.stage.start_worker()

    def wake(self, all_of_them: bool) -> None:
        for at, worker in list(self.stopped):
            if all_of_them or time.monotonic() > at:
                worker.signal_group(signal.SIGCONT)
                self.stopped.remove((at, worker))

    def kill_engine(self) -> None:
        for pid in live_engines(self.stage.orders)[:1]:
            os.kill(pid, signal.SIGKILL)

    def kill_worker(self) -> None:
        victim = self.victim()
        victim.signal_group(signal.SIGKILL)
        victim.process.wait(10)

    def kill_main(self) -> None:
        victim = self.victim()
        victim.process.kill()
        victim.process.wait(10)

    def kill_child(self) -> None:
        for process in self.victim().tree()[1:2]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                return

    def stop_worker(self) -> None:
        worker = self.victim()
        worker.signal_group(signal.SIGSTOP)
        self.stopped.append((time.monotonic() + self.random.uniform(0.2, 4.0), worker))

    def terminate_worker(self) -> None:
        self.victim().terminate()

    def flush_redis(self) -> None:
        with redis.Redis.from_url(self.stage.settings.redis_url) as client:
            client.flushdb()


def survive(stage: Stage, seed: int, storm: float, calm: float, budgets: list[int]) -> None:
    """A storm over jobs with these budgets, then calm; every job ends with its budget exactly."""
    stage.delay, stage.lanes = 0.1, seed % 3
    stage.start_worker()
    stage.start_worker()
    jobs = {stage.submit(trials=n, parallelism=2, seed=seed): 0 for n in budgets}
    stage.wait_complete(next(iter(jobs)), 1)

    def over() -> bool:
        return all(ended(job_id) for job_id in jobs)

    def ended(job_id: uuid.UUID) -> bool:
        job = stage.job(job_id)
        if job.state == "failed":
            # two engines in a row were killed: what a person does then
            assert job.error is not None and job.error["reason"] == "engine_died", job.error
            jobs[job_id] += 1
            stage.write(lambda s: control.resume(s, stage.owner, s.get_one(Job, job_id)))
            ring_for(stage.sessions, stage.settings, job_id)
        return job.state == "completed"

    nemesis = Nemesis(stage, seed)
    nemesis.storm(storm, over)
    try:
        wait_until(over, calm, f"seed {seed}: every job ends after {dict(nemesis.did)}")
        for job_id, resumed in jobs.items():
            stage.check(job_id, resumed=resumed)
        wait_until(lambda: not live_engines(stage.orders), 10, "no engine is left")
    except AssertionError as broken:
        said = "\n".join(f"{w.output.name}\n{w.said()[-3000:]}" for w in stage.workers)
        states = [(j, stage.job(j).state, stage.complete(j)) for j in jobs]
        raise AssertionError(f"{broken}\n{dict(nemesis.did)}\n{states}\n{said}") from broken


@pytest.mark.parametrize("seed", [20, 21])
def test_a_short_storm(stage: Stage, seed: int) -> None:
    survive(stage, seed=seed, storm=15.0, calm=60.0, budgets=[30, 10])


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("seed", range(6))
def test_a_long_storm(stage: Stage, seed: int) -> None:
    survive(stage, seed=seed, storm=90.0, calm=200.0, budgets=[200, 40, 10])
