"""Follows a job to its end, with a progress bar on a terminal and with lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from nullspace.client import OVER, Client, ClientError, Event, Json
from nullspace.errors import sentences
from nullspace.terminal import duration, err, number, plain, say


class Unfinished(ClientError):
    """The job is failed, cancelled or paused."""

    exit_code = 10


class Sink(Protocol):
    """What is told of a job's course."""

    def progress(self, phase: str, done: float, total: float, text: str) -> None:
        """How far the current phase is."""

    def line(self, text: str) -> None:
        """Something worth a line of its own."""


class _Lines:
    """For pipes and logs: a line per phase, then at most one every ten seconds."""

    def __init__(self) -> None:
        self._phase, self._last = "", 0.0

    def progress(self, phase: str, done: float, total: float, text: str) -> None:
        now = time.monotonic()
        if phase == self._phase and now - self._last < 10:
            return
        self._phase, self._last = phase, now
        of = f" {done:g}/{total:g}" if total else ""
        say(f"  {plain(phase)}{of} {plain(text)}".rstrip())

    def line(self, text: str) -> None:
        say(f"  {text}")


class _Bar:
    """For terminals: one bar per phase."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._tasks: dict[str, TaskID] = {}

    def progress(self, phase: str, done: float, total: float, text: str) -> None:
        name = plain(phase, 24)
        if name not in self._tasks:
            for earlier in self._tasks.values():
                self._bar.stop_task(earlier)
            self._tasks[name] = self._bar.add_task(name, total=total or None, text="")
        self._bar.update(
            self._tasks[name], completed=done, total=total or None, text=plain(text, 60)
        )

    def line(self, text: str) -> None:
        self._bar.console.print(text, markup=False)


@contextlib.contextmanager
def sink() -> Iterator[Sink]:
    """The view that fits stderr."""
    if not err.is_terminal:
        yield _Lines()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:g}/{task.total:g}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    with Progress(*columns, console=err) as bar:
        yield _Bar(bar)


def tell(event: Event, view: Sink) -> None:
    """Show one event."""
    said = event.payload
    if event.kind == "progress":
        view.progress(
            str(said.get("phase", "")),
            float(said.get("done") or 0),
            float(said.get("total") or 0),
            str(said.get("text", "")),
        )
    elif event.kind == "job" and said.get("error"):
        view.line(explain(said["error"]))
    elif event.kind == "job" and said.get("baseline"):
        search = said["baseline"].get("search") or {}
        if search:
            view.line(f"the original refuses {search.get('refusals')}/{search.get('total')}")
    elif event.kind == "job" and said.get("result"):
        for side in ("original", "model"):
            if scores := said["result"].get(side):
                view.line(f"the {side} refuses {scores.get('refusals')}/{scores.get('total')}")
    elif event.kind == "task" and said.get("error"):
        view.line(f"{said.get('task')}: {explain(said['error'])}")


def explain(error: Json) -> str:
    """A typed error as a sentence: what happened, and the mend."""
    return plain(sentences(error.get("message") or error.get("reason"), error.get("mend")))


def follow(
    client: Client, job: str, view: Sink, notice: Callable[[Event], None] | None = None
) -> Json:
    """Show the job's events until it is over; the job. Raises Unfinished."""
    best: tuple[int, float] | None = None
    for event in client.events(job):
        tell(event, view)
        if notice is not None:
            notice(event)
        said = event.payload
        complete = event.kind == "trial" and said.get("state") == "complete"
        if complete and not said.get("screened"):
            point = (int(said["refusals"]), float(said["kl_first"] or 0))
            if best is None or point < best:
                best = point
                of = f"{point[0]}/{said['total']} refusals"
                view.line(f"trial {said['number']}: {of} at KL {number(point[1])}")
        if event.kind == "job" and event.payload.get("state") in ("paused", *OVER):
            found = client.job(job)
            if found["state"] == "paused" or found["state"] in OVER:
                return finished(found)
    return finished(client.job(job))


def finished(job: Json) -> Json:
    """`job` when it is completed. Raises Unfinished with the reason otherwise."""
    if job["state"] == "completed":
        return job
    reason = f": {explain(job['error'])}" if job.get("error") else ""
    raise Unfinished(f"the job is {job['state']}{reason}")


def course(job: Json) -> str:
    """One line on where a job stands."""
    trials = job["trials"]
    parts = [job["state"]]
    if job["desired_state"] != "run" and job["state"] in ("queued", "running"):
        parts.append(f"{job['desired_state']} requested")
    if trials["budget"]:
        parts.append(f"{trials['complete']}/{trials['budget']} trials")
    if job.get("waiting"):
        parts.append(str(job["waiting"]))
    if job.get("eta_seconds") is not None and job["state"] == "running":
        parts.append(f"about {duration(job['eta_seconds'])} left")
    return ", ".join(parts)
