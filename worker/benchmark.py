"""Harness tasks, one at a time, each kept as soon as it is measured; what is kept is left out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from jobs import benchmarks, trials
from jobs.spec.candidate import Candidate, parse
from jobs.spec.protocol import Benchmark, Benchmarked
from worker.rescoring import rescore
from worker.run import Run

NAMES = {trials.ORIGINAL: "the original", trials.MODEL: "the model"}


def benchmark(run: Run) -> None:
    """Payload {"number", "tasks", "limit"}: the trial's figures, and the original's beside them."""
    payload = run.task.payload
    number, tasks, limit = int(payload["number"]), list(payload["tasks"]), payload["limit"]
    row = run.lease.write(lambda session: trials.get(session, run.job.id, number))
    if not any(unmeasured(run, each, tasks, limit) for each in (trials.ORIGINAL, number)):
        return
    prepared = run.prepare()
    # figures are kept beside held-out scores, which trials off the front do not have yet
    rescore(run, prepared, [row], f"scoring trial {number}")
    measure(run, trials.ORIGINAL, None, tasks, limit)
    measure(run, number, parse(row.candidate), tasks, limit)


def unmeasured(run: Run, number: int, tasks: Sequence[str], limit: int | None) -> list[str]:
    """The tasks that this trial (or side) has no figures of."""
    known = run.lease.write(lambda session: benchmarks.measured(session, run.job.id))
    return [name for name in tasks if (number, name, limit) not in known]


def measure(
    run: Run, number: int, candidate: Candidate | None, tasks: Sequence[str], limit: int | None
) -> None:
    """Run what is missing on the engine's model, with the edit where there is one."""
    todo = unmeasured(run, number, tasks, limit)
    folder = run.station.settings.tasks
    who = NAMES.get(number, f"trial {number}")
    for done, name in enumerate(todo):
        run.lease.check()
        about = f"{who}, {name}"
        run.progress("benchmarks", done, len(todo), about)
        request = Benchmark(
            tasks=[name],
            planned=todo[done + 1 :],
            candidate=candidate,
            limit=limit,
            task_folder=None if folder is None else str(folder),
        )
        result = run.ask(
            request,
            on_progress=lambda answer, done=done, about=about: run.progress(  # type: ignore[misc]
                "benchmarks", done, len(todo), f"{about}: {answer.text}"
            ),
        )
        found = Benchmarked.model_validate(result.value)
        what = (number, name, limit)
        run.write(
            partial(
                lambda what, values, session: benchmarks.store(
                    session, run.task, run.token, what, values
                ),
                what,
                found.values,
            )
        )
        run.log.line("info", f"{about}: {_said(found)}")


def _said(found: Benchmarked) -> str:
    figures = ", ".join(f"{name} {value.value:.4g}" for name, value in found.values.items())
    return f"{figures or 'no figures'}, {found.seconds:.0f} s"
