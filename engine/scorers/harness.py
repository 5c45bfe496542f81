"""Tasks of lm-evaluation-harness on the model with an edit: the figures of its own command.

The harness is an optional library (extra `harness`). A task comes from its own collection or from
a folder of task files; data sets are fetched by it, or lie beside the task files.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError
from engine.memory import FLOAT32, Shape, fitting_rows, forward_row, free_bytes
from engine.report import Report
from engine.texts import context_of
from jobs.spec.protocol import Benchmarked
from jobs.spec.scores import Value, Z

if TYPE_CHECKING:
    from engine.decode import Decoder

EXTRA = "nullspace[harness]"
MOST_ROWS = 64  # of one forward
LONGEST = 2048  # tokens of a row for which memory must do


def benchmark(
    decoder: Decoder,
    tasks: Sequence[str],
    limit: int | None,
    folder: str | None,
    report: Report,
    planned: Sequence[str] = (),
) -> Benchmarked:
    """Run `tasks` on the model with the edit that `decoder` has selected for every row.

    limit    samples per task; None: all
    folder   where further task files lie
    planned  tasks that will be asked for later, and must be known too
    Values are `<task>.<metric>`, or `<task>.<metric>.<filter>` for other filters than none, with
    value ± 1.96 standard errors as the harness gives them.

    Raises missing_library; bad_request for a task that is not known; engine_failed where its data
    cannot be had.
    """
    began = time.monotonic()
    lm_eval = _library()
    report.progress("benchmark", 0, 0, "loading the tasks")
    manager = _manager(lm_eval, [*tasks, *planned], folder)
    model = _observed(decoder, report)
    try:
        found = lm_eval.simple_evaluate(
            model=model, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise EngineError(
            "engine_failed",
            f"tasks: the harness could not run {', '.join(tasks)}: {error}",
            "Check that this worker may fetch the tasks' data sets, or give task files with local "
            "data.",
            repr(error),
        ) from error
    assert found is not None
    values = {
        key: value
        for task in sorted(found["results"])
        for key, value in _values(task, found["results"][task], found["n-samples"].get(task))
    }
    return Benchmarked(
        values=values,
        versions={"lm_eval": lm_eval.__version__},
        seconds=time.monotonic() - began,
    )


def _library() -> Any:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise EngineError(
            "missing_library",
            "tasks: benchmarks need the library lm_eval",
            f"Install it on the worker: pip install '{EXTRA}'.",
        ) from error
    return lm_eval


def _manager(lm_eval: Any, tasks: Sequence[str], folder: str | None) -> Any:
    """The index of known tasks; the harness's own thousands are read only where they are needed."""

    def missing(manager: Any) -> list[str]:
        return [task for task in tasks if not manager.match_tasks([task])]

    if folder is not None:
        own = lm_eval.tasks.TaskManager(include_path=folder, include_defaults=False)
        if not missing(own):
            return own
    manager = lm_eval.tasks.TaskManager(include_path=folder)
    if unknown := missing(manager):
        raise EngineError(
            "bad_request",
            f"tasks: the harness knows no task {', '.join(unknown)}",
            "Choose from `lm_eval ls tasks`, or put the task file into the operator's task folder.",
        )
    return manager


def _observed(decoder: Decoder, report: Report) -> Any:
    """The harness's model around ours; it reports, and so can be stopped, at every forward."""
    from lm_eval.models.huggingface import HFLM

    class Observed(HFLM):  # type: ignore[misc]
        forwards = 0

        def _seen(self) -> None:
            self.forwards += 1
            report.progress("benchmark", self.forwards, 0, f"{self.forwards} forwards")

        def _model_call(self, *arguments: Any, **named: Any) -> Any:
            self._seen()
            return super()._model_call(*arguments, **named)

        def _model_generate(self, *arguments: Any, **named: Any) -> Any:
            self._seen()
            return super()._model_generate(*arguments, **named)

    rows = _rows(decoder)
    return Observed(pretrained=decoder.model, tokenizer=decoder.tokenizer, batch_size=rows)


def _rows(decoder: Decoder) -> int:
    """Rows of one forward: the harness holds all logits of a batch, and once more in float32."""
    shape = Shape.of(decoder.model.config, decoder.model.dtype.itemsize)
    tokens = min(context_of(decoder.model) or LONGEST, LONGEST)
    row = forward_row(shape, tokens, tokens) + FLOAT32 * tokens * shape.vocabulary
    fit = fitting_rows(free_bytes(decoder.device), row, decoder.device)
    return max(1, min(MOST_ROWS, fit)) if decoder.pads else 1


def _values(
    task: str, result: dict[str, Any], samples: dict[str, int] | None
) -> list[tuple[str, Value]]:
    """The metrics of one task: keys are "metric,filter", errors "metric_stderr,filter"."""
    found = []
    for key, value in result.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = result.get(f"{metric}_stderr,{kind}")
        margin = Z * float(error) if isinstance(error, (int, float)) else None
        name = f"{task}.{metric}" + ("" if kind == "none" else f".{kind}")
        number = float(value)
        found.append(
            (
                name,
                Value(
                    value=number,
                    low=None if margin is None else number - margin,
                    high=None if margin is None else number + margin,
                    n=(samples or {}).get("effective"),
                ),
            )
        )
    return found
