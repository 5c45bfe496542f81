"""How much faster are several workers on one study, and do they find as much?

    python -m bench.workers [--workers 1 2] [--seeds 0 1 2 3 4] [--trials 100] [--prompts 100]
        [--model demo|FOLDER] [--dtype auto] [--device auto|cpu|cuda] [--rows FILE] [--quiet]

A real PostgreSQL with ordinary durability, a real Redis, and N real worker processes with their
engines on one job with `parallelism` N; on a CPU each with one thread, so that two cores stand for
two devices, on GPUs each with a GPU of its own. The same job for every N and seed.

Time counts from the first slot that is reserved to the last trial that is complete, by the
database's clock; loading and measuring the original come before. "Scoring" is the share of the
workers' time in which their engines scored; what is missing to 100 % are sampling, the database and
waiting. Ends with an error where the trials are not exactly the budget. Finished runs are appended
to `--rows` as JSON, and what stands there is not run again. Prints Markdown: runs, then means.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import psutil
import torch
from sqlalchemy import select

import migrations
from bench import machine
from bench.scaling import Row, read, table
from demo import MODEL
from jobs import people, prompts, submit, trials
from jobs.database import Sessions, connect, session_factory
from jobs.fronts import hypervolume
from jobs.settings import Settings
from jobs.spec.job import JobSpec
from jobs.tables import Job, Trial, User
from nullspace.embedded import Servers, servers
from tests.service.processes import WorkerProcess, ring_for, wait_until, worker

LONGEST = 24 * 3600.0  # seconds after which a search counts as hung
READY = " ready."  # what Celery says once it listens


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.workers", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=100, help="of each role")
    parser.add_argument("--model", type=Path, default=MODEL, help="a folder; the demo model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--rows", type=Path, help="finished runs")
    parser.add_argument("--quiet", action="store_true", help="only on a machine without a load")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # and what it started, with it
    given.device = machine.device_here(given.device)
    devices = torch.cuda.device_count() if given.device == "cuda" else psutil.cpu_count()
    if max(given.workers) > devices:
        print(f"{max(given.workers)} workers share {devices} devices", file=sys.stderr)
    if given.quiet:
        machine.demand_quiet()
    head = f"{machine.machine(given.device, 1)}; {machine.quiet(machine.load())}.\n"
    rows = read(given.rows)
    for place, seed in enumerate(given.seeds):
        # the order is turned round each time: a machine that slows down favours nobody
        for count in given.workers if place % 2 == 0 else given.workers[::-1]:
            if any((row.workers, row.seed) == (count, seed) for row in rows):
                continue
            row = measured(count, seed, given)
            rows.append(row)
            print(f"{count} workers, seed {seed}: {row.seconds:.1f} s", file=sys.stderr, flush=True)
            if given.rows is not None:
                with given.rows.open("a", encoding="utf-8") as file:
                    file.write(row.model_dump_json() + "\n")
    print(head)
    print("\n".join(table(rows)))


def measured(count: int, seed: int, given: argparse.Namespace) -> Row:
    """One search by `count` workers, with servers of its own."""
    with tempfile.TemporaryDirectory() as name, stack(Path(name), given.model) as (
        settings, running, sessions,
    ), ExitStack() as workers:  # fmt: skip
        own = [
            workers.enter_context(worker(settings, Path(name), None, **_own(given.device, place)))
            for place in range(count)
        ]
        for one in own:
            wait_until(partial(_listens, one), 120, "a worker listens")
        job = _submit(sessions, settings, spec_of(given, count, seed))
        wait_until(lambda: _counted(sessions, job)[0], LONGEST, "the first slot")
        before = _used(own, running)
        wait_until(lambda: _done(sessions, job, given.trials, own), LONGEST, "all trials")
        after = _used(own, running)
        used = [end - start for start, end in zip(before, after, strict=True)]
        return _row(sessions, job, count, seed, used)


@contextmanager
def stack(folder: Path, model: Path) -> Iterator[tuple[Settings, Servers, Sessions]]:
    """Servers and settings for workers that search and do nothing else."""
    with servers(folder / "servers") as running:
        migrations.upgrade(running.database_url)
        settings = Settings.model_validate(
            {
                "DATABASE_URL": running.database_url,
                "REDIS_URL": running.redis_url,
                "secret_key": uuid.uuid4().hex,
                "data": folder / "data",
                "models": model.resolve().parent,
                "hub_check": False,
                "disk_reserve_bytes": 0,
                "accepts": "search",
            }
        )
        engine = connect(running.database_url)
        try:
            yield settings, running, session_factory(engine)
        finally:
            engine.dispose()


def spec_of(given: argparse.Namespace, count: int, seed: int) -> JobSpec:
    """The job: the same but for `parallelism` and seed."""
    few = {"direction": max(8, given.prompts), "search": given.prompts, "heldout": 4}
    return JobSpec.model_validate(
        {
            "model": "demo" if given.model == MODEL else given.model.resolve().name,
            "device": given.device,
            "dtype": given.dtype,
            "trials": given.trials,
            "parallelism": count,
            "seed": seed,
            "max_new_tokens": 48,
            "prompts": {"harmful": "demo-refused", "harmless": "demo-answered", **few},
        }
    )


def _listens(one: WorkerProcess) -> bool:
    return READY in one.said()


def _own(device: str, place: int) -> dict[str, str]:
    """The environment of one worker: a thread, or a GPU; its engine outlives the search, so that
    its processor seconds can be read."""
    gpu = str(place % max(1, torch.cuda.device_count())) if device == "cuda" else ""
    return {
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": gpu, "NULLSPACE_LINGER_SECONDS": "3600",
    }  # fmt: skip


def _submit(sessions: Sessions, settings: Settings, spec: JobSpec) -> uuid.UUID:
    with sessions.begin() as session:
        prompts.ensure_builtin(session)
        user: User = people.create_user(session, "bench@example.org")
        job, _ = submit.submit(session, user, spec, settings)
    ring_for(sessions, settings, job.id)
    return job.id


def _counted(sessions: Sessions, job: uuid.UUID) -> tuple[int, int]:
    """Slots that were given out, and trials that are complete."""
    with sessions() as session:
        found = trials.counts(session, job)
        return sum(found.values()), found["complete"]


def _done(sessions: Sessions, job: uuid.UUID, budget: int, own: Sequence[WorkerProcess]) -> bool:
    """Whether all trials are complete. RuntimeError where the search has ended otherwise."""
    if _counted(sessions, job)[1] >= budget:
        return True
    with sessions() as session:
        state, error = session.get_one(Job, job).state, session.get_one(Job, job).error
    if state in ("failed", "paused") or any(one.process.poll() is not None for one in own):
        raise RuntimeError(f"the job is {state}: {error}\n{own[0].said()[-2000:]}")
    return False


def _used(own: Sequence[WorkerProcess], running: Servers) -> tuple[float, float, float]:
    """Processor seconds so far: engines, what else the workers run, both servers."""
    engines = supervisors = 0.0
    for process in (process for one in own for process in one.tree()):
        if "engine" in process.cmdline():
            engines += _seconds(process)
        else:
            supervisors += _seconds(process)
    pids = [server.pid for server in (running.postgres, running.redis) if server is not None]
    trees = [[psutil.Process(pid), *psutil.Process(pid).children(True)] for pid in pids]
    return engines, supervisors, sum(_seconds(process) for tree in trees for process in tree)


def _seconds(process: psutil.Process) -> float:
    used = process.cpu_times()
    return float(used.user + used.system)


def _row(sessions: Sessions, job: uuid.UUID, count: int, seed: int, used: Sequence[float]) -> Row:
    """What the tables say. SystemExit where the trials are not the budget, each once."""
    with sessions() as session:
        budget = session.get_one(Job, job).trials
        rows = list(session.scalars(select(Trial).where(Trial.job_id == job)))
    complete = sorted(row.number for row in rows if row.state == "complete")
    if complete != list(range(budget)) or len(rows) != budget:
        sys.exit(f"{count} workers, seed {seed}: trials {complete}, not {budget}, each once")
    first = min(row.created_at for row in rows)
    last = max(row.finished_at for row in rows if row.finished_at is not None)
    # what was not answered as a whole is dominated by something that was
    whole = max(row.total or 0 for row in rows)
    points = [
        (row.refusals / whole, row.kl_first)
        for row in rows
        if row.total == whole and row.refusals is not None and row.kl_first is not None
    ]
    return Row(
        workers=count, seed=seed, trials=budget, seconds=(last - first).total_seconds(),
        scored=sum(row.seconds or 0.0 for row in rows), engines=used[0], supervisors=used[1],
        servers=used[2], hypervolume=hypervolume(points),
    )  # fmt: skip


if __name__ == "__main__":
    main()
