"""Candidates side by side on one CPU: a thread each, all reading the same weights.

A small batch keeps one core busy and two hardly more; two candidates keep two. What a forward does
besides the weights (edits, kept states, the head) is each thread's own. What one candidate teaches
the next is learned after both, so that nothing depends on who was faster.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TypeVar

import torch

from engine.errors import EngineError
from engine.report import Report
from jobs.spec.memory import LANES
from jobs.spec.protocol import Scored

MOST = LANES["cpu"]

Item = TypeVar("Item")
Found = TypeVar("Found")


def side_by_side(
    work: Callable[[Item, Report], Found],
    items: Sequence[Item],
    report: Report,
    done: Callable[[Found], None],
    lanes: int = MOST,
) -> list[Found]:
    """`work` on each of `items`, on `lanes` threads, which share torch's threads.

    done(found)   called in this thread, in the order in which they end
    The first error ends the others at their next report, and is raised.
    """
    lanes = min(lanes, len(items))
    if len(items) == 1:
        found = work(items[0], report)
        done(found)
        return [found]
    threads = max(1, torch.get_num_threads() // lanes)
    shared = _Shared(report)

    def run(item: Item, part: Report) -> Found:
        torch.set_num_threads(threads)  # of this thread alone
        with shared.watching():
            return work(item, part)

    with ThreadPoolExecutor(lanes, thread_name_prefix="lane") as pool, shared.watching():
        futures: list[Future[Found]] = [
            pool.submit(run, item, _Part(shared, place)) for place, item in enumerate(items)
        ]
        for future in as_completed(futures):
            if shared.failed:
                raise shared.failed[0]
            done(future.result())
    return [future.result() for future in futures]


class _Shared:
    """One report for several threads: their counts added up."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.lock = threading.Lock()
        self.failed: list[BaseException] = []
        self.counts: dict[int, tuple[float, float]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Let the others know of an error within the block."""
        try:
            yield
        except BaseException as error:
            self.failed.append(error)
            raise


class _Part:
    """A thread's `Report`."""

    def __init__(self, shared: _Shared, place: int) -> None:
        self._shared, self._place = shared, place

    def progress(self, phase: str, done: float = 0, total: float = 0, text: str = "") -> None:
        """What all threads have done of what is in their hands."""
        shared = self._shared
        if shared.failed:
            raise EngineError("stopped", "the candidate beside this one failed")
        with shared.lock:
            shared.counts[self._place] = done, total
            done, total = (sum(each) for each in zip(*shared.counts.values(), strict=True))
            shared.report.progress(phase, done, total, text)

    def log(self, text: str, level: str = "info") -> None:
        """A line for the task's log."""
        with self._shared.lock:
            self._shared.report.log(text, level)

    def partial(self, index: int, text: str = "", scored: Scored | None = None) -> None:
        """A piece of an answer, or one candidate's finished score."""
        with self._shared.lock:
            self._shared.report.partial(index, text=text, scored=scored)
