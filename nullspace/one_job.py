"""One job from submit to files on disk: what `demo` and `run` do with a service of their own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from jobs import fronts
from nullspace.client import Client, Event, Json
from nullspace.watch import Sink, follow

EVALUATING = ("evaluate", "running")


@dataclass
class Stopwatch:
    """Seconds per phase. The phases of a job are told apart by its events."""

    seconds: dict[str, float] = field(default_factory=dict)
    _phase: str = ""
    _since: float = 0.0

    def enter(self, phase: str) -> None:
        """The current phase ends, `phase` begins ('' for none)."""
        now = time.monotonic()
        if self._phase:
            spent = self.seconds.get(self._phase, 0.0) + now - self._since
            self.seconds[self._phase] = round(spent, 2)
        self._phase, self._since = phase, now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """One phase for the length of the block."""
        self.enter(name)
        try:
            yield
        finally:
            self.enter("")

    def notice(self, event: Event) -> None:
        """prepare (load, directions, baseline), search (trials), evaluate (held-out prompts)."""
        said = event.payload
        if event.kind == "job" and said.get("baseline"):
            self.enter("search")
        elif event.kind == "task" and (said.get("task"), said.get("state")) == EVALUATING:
            self.enter("evaluate")


def search(client: Client, spec: Json, view: Sink, watch: Stopwatch) -> Json:
    """Submit and follow to the end; the finished job. Raises ClientError."""
    watch.enter("prepare")
    try:
        job = client.submit(spec)
        return follow(client, str(job["id"]), view, watch.notice)
    finally:
        watch.enter("")


def best(front: list[Json]) -> Json:
    """The rule of `--pick best` (`jobs.fronts.best`), over all methods of the job.

    Held-out figures, because those of the search were what the search optimised; trials without
    them are compared by their search figures.
    """
    trials = sorted(front, key=lambda trial: int(trial["number"]))
    return trials[fronts.best([_figures(trial) for trial in trials])]


def _figures(trial: Json) -> tuple[float, float]:
    """(refusal rate, first-token KL) on held-out prompts, or on those of the search."""
    scores = trial.get("heldout") or trial["search"]
    return scores["refusals"] / scores["total"], scores["kl_first"] or 0.0


def fetch(
    client: Client, job: str, number: int, kinds: list[str], folder: Path, watch: Stopwatch
) -> list[Json]:
    """Export trial `number` in each kind and download it to `folder`/<kind>.

    [{"kind", "path", "id", "measured"}]. Raises ClientError.
    """
    with watch.phase("export"):
        asked = [client.export(job, number, kind) for kind in kinds]
        made = [client.wait_artifact(str(each["id"])) for each in asked]
    found = []
    with watch.phase("download"):
        for each in made:
            target = folder / str(each["kind"])
            client.download(str(each["id"]), target)
            found.append(
                {
                    "kind": each["kind"],
                    "path": str(target.absolute()),
                    "id": each["id"],
                    "measured": each["measured"],
                }
            )
    return found


def answers(client: Client, job: str, number: int, count: int = 3) -> list[Json]:
    """What original and edited model say to `count` held-out prompts, in whole.

    [{"prompt", "before", "after"}], prompts that the original refused first.
    """
    said = client.trial(job, number)["responses"]
    rows = said.get("heldout") or said.get("search") or []
    rows = sorted(rows, key=lambda row: not row["original_refused"])[:count]
    found = []
    for row in rows:
        texts = [
            client.chat(job, row["prompt"], trial=trial, tokens=100)["answers"][0]["text"]
            for trial in (None, number)
        ]
        found.append({"prompt": row["prompt"], "before": texts[0], "after": texts[1]})
    return found
