"""Which function works on which kind of task."""

from __future__ import annotations

from collections.abc import Callable

from jobs.states import TaskKind
from worker.benchmark import benchmark
from worker.chat import chat
from worker.evaluate import evaluate
from worker.export import export
from worker.run import Run
from worker.search import search

TASKS: dict[TaskKind, Callable[[Run], None]] = {
    "search": search,
    "evaluate": evaluate,
    "export": export,
    "chat": chat,
    "benchmark": benchmark,
}
