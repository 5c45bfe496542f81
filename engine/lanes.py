"""Candidates side by side on one CPU: a process each, all reading the same weights.

A small batch keeps one core busy and two hardly more, and the threads of one Python wait for one
another; two processes keep two cores. They are forked from the prepared engine, so they have its
model without a copy, and live until something else is asked for. What one candidate teaches is told
to all of them, in the same order and at the same turn, so that nothing depends on who was faster;
what takes time to make of it is made by one for all.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import chain
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import torch

from engine.errors import EngineError
from engine.parcel import packed, unpacked
from engine.report import Report
from jobs.spec.memory import AHEAD, LANES
from jobs.spec.protocol import Scored

MOST = LANES["cpu"] if sys.platform == "linux" else 1  # elsewhere libraries do not bear a fork
POLL = 0.2  # seconds after which a stop is seen at the latest, and between a lane's reports
SOON = 0.01  # seconds after which a lane without work looks whether some has come
STUDY = -1  # the number of what is studied, among those of items
KEPT = 3  # descriptors that a lane keeps: standard input, output and error

Item = TypeVar("Item")
Found = TypeVar("Found")


def _nothing(_: Any) -> None:
    """Nothing is learned, nothing kept."""


def _no_pieces(_: Report) -> tuple[()]:
    """Nothing is studied."""
    return ()


class Lanes(Generic[Item, Found]):
    """Processes that do `work`, as many at once as there are.

    lanes = Lanes(2, work, learn, study, keep)
    lanes.run(following, report, done)
    lanes.close()

    work(item, report)  runs in a lane, a copy of this process as it was when `Lanes` was made: what
                        it changes stays there. It reports through this process.
    learn(found)        runs in every lane, for whatever any of them found
    study(report)       runs in one lane, after all of them learned something, and gives pieces
    keep(piece)         runs in every lane, with each piece that one made; with None after the last
    lag                 items after which what one of them taught is known, at most: enough that no
                        lane waits but for a study, and the same whoever is faster (see `known`)
    Items and what is found go through pipes, by value (`engine.parcel`).
    """

    def __init__(
        self,
        count: int,
        work: Callable[[Item, Report], Found],
        learn: Callable[[Found], None] = _nothing,
        study: Callable[[Report], Iterable[Any]] = _no_pieces,
        keep: Callable[[Any], None] = _nothing,
    ) -> None:
        self._lanes: list[_Lane] = []
        self.lag = AHEAD * count
        self._found: dict[int, Found] = {}  # that has not been taught
        self._begun = self._taught = 0  # items, of all runs
        self.close = weakref.finalize(self, _end, self._lanes, os.getpid())
        gc.freeze()  # a lane's collections touch nothing of ours: a page that is touched is copied
        try:
            for _ in range(count):
                self._lanes.append(_fork(_Tasks(work, learn, study, keep)))
        except OSError:
            self.close()
            raise
        finally:
            gc.unfreeze()

    @property
    def alive(self) -> bool:
        """Whether there is anybody to work: not after an error, nor after `close`."""
        return self.close.alive

    def known(self, number: int) -> int:
        """How many items, the first ones, item `number` is taught, numbered through all runs, so
        that it does not matter where one ends: for the first `lag` items, which teach most, all but
        those that other lanes are at; later so many that it needs no wait."""
        early = min(number, self.lag) - len(self._lanes) + 1
        return max(0, early, number - self.lag + 1)

    def run(
        self,
        following: Callable[[], Item | None],
        report: Report,
        done: Callable[[int, Found], None],
    ) -> None:
        """Work on items until there is none and no lane is at one; they share torch's threads.

        following()           the next item, None where there is none as yet. Called when its turn
                              has come: all that it is taught are done
        done(number, found)   called in the order in which they end; numbered as they came here
        The first error is raised; it and a stop end all lanes, whatever they are at.
        """
        with ExitStack() as failing:
            failing.callback(self.close)
            threads = max(1, torch.get_num_threads() // len(self._lanes))
            idle, busy = list(self._lanes), dict[Any, _Lane]()
            shown, first = _Shown(report), self._begun
            item: Item | None = None  # the next one
            studying = False
            while True:
                while idle and not studying:
                    known = range(self._taught, self.known(self._begun))
                    if item is None and all(number in self._found for number in known):
                        item = following()
                    if item is None:
                        break
                    lane = idle.pop(0)
                    busy[lane.pipe] = lane
                    if known:
                        self._teach(known)
                        lane.send("study", threads)
                        studying = True
                    else:
                        lane.send("work", (self._begun, item, threads))
                        self._begun += 1
                        item = None
                if not busy:
                    break
                for ready in wait(list(busy), SOON if idle else POLL):
                    kind, number, what = busy[ready].receive()
                    if kind == "found":
                        self._found[number] = what
                        idle.append(busy.pop(ready))
                        shown.forget(number)
                        done(number - first, what)
                    elif kind == "studied":  # who studies keeps what it has itself
                        for each in self._lanes:
                            if each is not busy[ready]:
                                each.send("keep", what)
                        if what is not None:
                            continue
                        idle.insert(0, busy.pop(ready))
                        shown.forget(number)
                        studying = False
                    elif kind == "failed":
                        raise what
                    else:
                        shown.take(kind, number, what)
                shown.again()  # which tells of a stop
            failing.pop_all()

    def _teach(self, numbers: range) -> None:
        """Let every lane learn what was found for these items, the next ones."""
        for number in numbers:
            found = self._found.pop(number)
            for lane in self._lanes:
                lane.send("learn", found)
            self._taught = number + 1


@dataclass(frozen=True)
class _Lane:
    """A forked process, and the pipe to it."""

    pid: int
    pipe: Connection

    def send(self, kind: str, what: Any) -> None:
        """A message to it."""
        try:
            _put(self.pipe, kind, what)
        except OSError as error:
            raise _gone() from error

    def receive(self) -> Any:
        """A message from it."""
        try:
            return unpacked(self.pipe.recv_bytes())
        except (EOFError, OSError) as error:
            raise _gone() from error


def _put(pipe: Connection, *message: Any) -> None:
    pipe.send_bytes(packed(message))


def _gone() -> EngineError:
    return EngineError(
        "engine_died",
        "a process that scored candidates was ended from outside",
        "If it was killed for memory choose bnb_4bit or a smaller model. Then resume the job.",
    )


def _end(lanes: list[_Lane], owner: int) -> None:
    """End them whatever they are at; a lane, which has copies of the others, does not."""
    if os.getpid() != owner:
        return
    for lane in lanes:
        with suppress(ProcessLookupError):
            os.kill(lane.pid, signal.SIGKILL)
    for lane in lanes:
        lane.pipe.close()
        with suppress(ChildProcessError):
            os.waitpid(lane.pid, 0)
    lanes.clear()


class _Shown:
    """One report for several lanes: the counts of what they are at, added up."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._counts: dict[int, tuple[float, float]] = {}
        self._phase = ""

    def take(self, kind: str, place: int, what: Any) -> None:
        """A lane's report on the item at `place`."""
        if kind == "progress":
            self._phase, done, total, text = what
            self._counts[place] = done, total
            self.again(text)
        elif kind == "log":
            self._report.log(*what)
        else:
            self._report.partial(*what)

    def forget(self, place: int) -> None:
        """The item at `place` is done."""
        self._counts.pop(place, None)

    def again(self, text: str = "") -> None:
        """How far all lanes are."""
        if self._counts:
            done, total = (sum(each) for each in zip(*self._counts.values(), strict=True))
            self._report.progress(self._phase, done, total, text)


@dataclass(frozen=True)
class _Tasks:
    """What a lane does; see `Lanes`."""

    work: Callable[[Any, Report], Any]
    learn: Callable[[Any], None]
    study: Callable[[Report], Iterable[Any]]
    keep: Callable[[Any], None]


def _fork(tasks: _Tasks) -> _Lane:
    """A process that answers messages until its pipe is closed."""
    ours, theirs = Pipe()
    with warnings.catch_warnings():
        # Python warns of the locks of other threads. Ours reads a pipe or waits for work, and
        # what takes locks there (logging, the heap) is put in order after a fork.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        theirs.close()
        return _Lane(pid, ours)
    try:
        _serve(theirs, tasks)
    finally:
        os._exit(0)  # nothing of the parent's is tidied up here


def _serve(pipe: Connection, tasks: _Tasks) -> None:
    """What a lane does: read here, so that it ends with its parent, and work in another thread.

    Another one also because OpenMP's threads do not outlive a fork: a new thread's are made anew.
    """
    os.closerange(KEPT, pipe.fileno())  # who waits for the end of a pipe waits for its last holder
    os.closerange(pipe.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
    messages: SimpleQueue[tuple[str, Any]] = SimpleQueue()
    threading.Thread(target=_work, args=(messages, pipe, tasks), daemon=True).start()
    with suppress(EOFError, OSError):
        while True:
            parcel = pipe.recv_bytes()
            try:
                messages.put(unpacked(parcel))
            except BaseException as error:
                _send_error(pipe, error)
                raise


def _work(messages: SimpleQueue[tuple[str, Any]], pipe: Connection, tasks: _Tasks) -> None:
    try:
        while True:
            kind, what = messages.get()
            if kind == "learn":
                tasks.learn(what)
            elif kind == "keep":
                tasks.keep(what)
            elif kind == "study":
                torch.set_num_threads(what)
                for piece in chain(tasks.study(_Part(pipe, STUDY)), (None,)):
                    tasks.keep(piece)
                    _put(pipe, "studied", STUDY, piece)
            else:
                place, item, threads = what
                torch.set_num_threads(threads)
                _put(pipe, "found", place, tasks.work(item, _Part(pipe, place)))
    except BaseException as error:
        with suppress(OSError):
            _send_error(pipe, error)


def _send_error(pipe: Connection, error: BaseException) -> None:
    """The error itself where it can be sent, else what it says."""
    detail = "".join(traceback.format_exception(error))
    try:
        unpacked(packed(error))
    except Exception:  # what cannot be pickled, we cannot list
        error = EngineError("engine_failed", f"{type(error).__name__}: {error}", "", detail)
    _put(pipe, "failed", 0, error)


class _Part:
    """A lane's `Report` on one item."""

    def __init__(self, pipe: Connection, place: int) -> None:
        self._pipe, self._place = pipe, place
        self._phase, self._sent = "", 0.0

    def progress(self, phase: str, done: float = 0, total: float = 0, text: str = "") -> None:
        """What this lane has done of what is in its hands. A new phase and its end are sent."""
        now = time.monotonic()
        if phase == self._phase and done < total and now - self._sent < POLL:
            return
        self._phase, self._sent = phase, now
        _put(self._pipe, "progress", self._place, (phase, done, total, text))

    def log(self, text: str, level: str = "info") -> None:
        """A line for the task's log."""
        _put(self._pipe, "log", self._place, (text, level))

    def partial(self, index: int, text: str = "", scored: Scored | None = None) -> None:
        """A piece of an answer, or one candidate's finished score."""
        _put(self._pipe, "partial", self._place, (index, text, scored))
