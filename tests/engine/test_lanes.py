"""Candidates side by side: the same scores as one after the other, errors, progress, ends."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from multiprocessing import Barrier, Event, Value
from pathlib import Path
from queue import SimpleQueue
from threading import Timer
from typing import Any, TypeVar

import psutil
import pytest
import torch

from engine.decode import Decoder
from engine.errors import EngineError
from engine.lanes import MOST, Lanes
from engine.report import Report, Silent
from engine.session import Session
from jobs.spec.candidate import Ablation, constant
from jobs.spec.protocol import More, Respond, Score, Scored, ScoredBatch
from tests.engine.fixtures_run import CANDIDATES, prepare_request, tiny_folder

__all__ = ["tiny_folder"]

LIMIT = 30  # seconds to wait for the other process

Found = TypeVar("Found")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def others() -> set[psutil.Process]:
    """Processes that other modules have started."""
    return set(psutil.Process().children())


class Counted(Silent):
    def __init__(self) -> None:
        self.seen: list[tuple[str, float, float]] = []

    def progress(self, phase: str, done: float = 0, total: float = 0, text: str = "") -> None:
        self.seen.append((phase, done, total))


def run(
    work: Callable[[int, Report], Found],
    count: int,
    report: Report | None = None,
    learn: Callable[[Found], None] = lambda found: None,
    study: Callable[[Report], Iterable[Any]] = lambda report: (),
    keep: Callable[[Any], None] = lambda studied: None,
) -> tuple[list[Found], list[int]]:
    """What two lanes find, and in which order this process heard of it; they are gone then."""
    lanes, items = Lanes(2, work, learn, study, keep), iter(range(count))
    found: dict[int, Found] = {}
    try:
        lanes.run(lambda: next(items, None), report or Silent(), found.__setitem__)
    finally:
        lanes.close()
    return [found[number] for number in range(count)], list(found)


def test_both_run_at_once_and_share_the_threads() -> None:
    meeting = Barrier(2)

    def work(item: int, report: Report) -> tuple[int, int, int]:
        meeting.wait(LIMIT)  # nobody passes alone
        return item, os.getpid(), torch.get_num_threads()

    found, _ = run(work, 2)
    assert [one[::2] for one in found] == [(0, 1), (1, 1)]
    assert len({os.getpid(), *(pid for _, pid, _ in found)}) == 3
    assert torch.get_num_threads() == 2  # of this process still


def test_one_lane_has_all_threads() -> None:
    """And they work: OpenMP's own do not outlive a fork."""
    x = torch.ones(512, 512)
    truth = float((x @ x).sum())  # starts them in this process

    def work(item: int, report: Report) -> tuple[int, float]:
        return torch.get_num_threads(), float((x @ x).sum())

    lanes, items, found = Lanes(1, work), iter([0]), dict[int, tuple[int, float]]()
    lanes.run(lambda: next(items, None), Silent(), found.__setitem__)
    lanes.close()
    assert found == {0: (2, truth)}


def test_a_lane_knows_what_was_found_some_items_before() -> None:
    """Neither less nor more, whoever is faster, and in the items' order, run after run: at first
    all but what the other lane is at, later up to six items before."""
    known: list[int] = []
    first, rest = Event(), 14

    def work(item: int, report: Report) -> list[int]:
        if item == 8:
            assert first.wait(LIMIT)
        if item == 12:
            first.set()  # the other lane had items 9 to 12 in the meantime
        return list(known)

    def learn(found: list[int]) -> None:
        known.append(len(found))

    expected = [0, 0, 1, 2, 3, 4, 5, 5, 5, 5, 5, 6, 7, 8]
    found, order = run(work, rest, learn=learn)
    assert order.index(8) > order.index(11)
    assert [len(one) for one in found] == expected
    assert found[-1] == expected[:8]

    first.set()
    lanes, again = Lanes(2, work, learn), list[tuple[int, int]]()
    for run_of in (range(3), range(3, 4), range(4, rest)):  # it does not matter where a run ends
        items, ended = iter(run_of), dict[int, list[int]]()
        lanes.run(partial(next, items, None), Silent(), ended.__setitem__)
        again += [(run_of.start + number, len(one)) for number, one in ended.items()]
    lanes.close()
    assert sorted(again) == list(enumerate(expected))


def test_one_lane_studies_what_all_keep() -> None:
    """What one makes of all it has learned is there, in both, when the next item begins."""
    learned, kept, studies = list[int](), list[int | None](), Value("i", 0)

    def study(report: Report) -> Iterator[int]:
        with studies:
            studies.value += 1
        yield from learned[-1:] * learned[-1]  # several pieces, one, or none

    def work(item: int, report: Report) -> tuple[int, list[int | None]]:
        return item, list(kept)

    def learn(found: tuple[int, list[int | None]]) -> None:
        learned.append(found[0])

    found, _ = run(work, 6, None, learn, study, kept.append)
    everything = [None, 1, None, 2, 2, None, 3, 3, 3, None]
    assert [one for _, one in found] == [everything[:count] for count in (0, 0, 1, 3, 6, 10)]
    assert studies.value == 4  # after items 0, 1, 2 and 3, each by one lane


def test_items_that_come_while_it_runs() -> None:
    """A lane that has nothing to do looks again, as long as the other one works."""
    waiting = SimpleQueue[int]()
    late = Event()

    def work(item: int, report: Report) -> int:
        if item == 0:
            report.log("begun")
            assert late.wait(LIMIT)
        if item == 1:
            late.set()  # which item 0 waits for: so it was begun beside it
        return item

    class Adding(Silent):
        def log(self, text: str, level: str = "info") -> None:
            Timer(0.05, list, [map(waiting.put, (1, 2))]).start()

    def following() -> int | None:
        return None if waiting.empty() else waiting.get()

    waiting.put(0)
    lanes, found = Lanes(2, work), dict[int, int]()
    lanes.run(following, Adding(), found.__setitem__)
    lanes.close()
    assert found == {0: 0, 1: 1, 2: 2}


def test_an_error_ends_the_others(others: set[psutil.Process]) -> None:
    failing = Event()

    def work(item: int, report: Report) -> int:
        if item == 1:
            failing.set()
            raise EngineError("disk_full", "the disk is full", "Make room.", "df")
        failing.wait(LIMIT)
        while True:  # it never reports
            pass

    with pytest.raises(EngineError) as caught:
        run(work, 2)
    error = caught.value
    assert (error.reason, error.message) == ("disk_full", "the disk is full")
    assert (error.mend, error.detail) == ("Make room.", "df")
    assert set(psutil.Process().children()) == others


def test_an_error_that_cannot_be_sent_is_told_in_words() -> None:
    class Odd(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__("it is odd")

    def work(item: int, report: Report) -> int:
        raise Odd(1, 2)

    with pytest.raises(EngineError, match="Odd: it is odd") as caught:
        run(work, 1)
    assert caught.value.reason == "engine_failed"
    assert "in work" in caught.value.detail


def test_a_lane_that_is_killed_is_told() -> None:
    def work(item: int, report: Report) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return item

    with pytest.raises(EngineError, match="ended from outside") as caught:
        run(work, 2)
    assert caught.value.reason == "engine_died"


def test_a_stop_ends_all_although_they_do_not_report(others: set[psutil.Process]) -> None:
    class Stopping(Silent):
        def progress(self, *_: object) -> None:
            raise EngineError("stopped", "the request was stopped")

    def work(item: int, report: Report) -> int:
        report.progress("answers", 1, 2)
        while True:
            pass

    with pytest.raises(EngineError, match="the request was stopped"):
        run(work, 2, Stopping())
    assert set(psutil.Process().children()) == others


def test_a_stop_ends_a_study(others: set[psutil.Process]) -> None:
    """Also when no item is in work, and the study has told all it had to tell."""

    class Stopping(Silent):
        def __init__(self) -> None:
            self.studied = 0

        def progress(self, phase: str, *_: object) -> None:
            self.studied += phase == "study"
            if self.studied > 2:
                raise EngineError("stopped", "the request was stopped")

    def study(report: Report) -> Iterator[None]:
        report.progress("study", 0, 1)
        while os.getpid():  # it never ends
            pass
        yield

    with pytest.raises(EngineError, match="the request was stopped"):
        run(lambda item, report: item, 3, Stopping(), study=study)
    assert set(psutil.Process().children()) == others


def test_lanes_end_with_their_process() -> None:
    """Also in the middle of something, when it is killed; and nobody waits for its pipes."""
    code = (
        "import os, sys\n"
        "from engine.lanes import Lanes\n"
        "from engine.report import Silent\n"
        "class Telling(Silent):\n"
        "    def log(self, text, level='info'):\n"
        "        print(text, flush=True)\n"
        "def work(item, report):\n"
        "    report.log(str(os.getpid()))\n"
        "    while True: pass\n"
        "Lanes(2, work).run(iter((1, 2)).__next__, Telling(), print)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        lanes = [psutil.Process(int(parent.stdout.readline())) for _ in range(2)]
        parent.kill()
        parent.wait(LIMIT)
        gone, alive = psutil.wait_procs(lanes, LIMIT)
        assert len(gone) == 2 and not alive


def test_progress_is_that_of_all() -> None:
    both = Event()

    def work(item: int, part: Report) -> int:
        part.progress("answers", 3 + item, 10)
        if item == 0:
            assert both.wait(LIMIT)
        return item

    class Waiting(Counted):
        def progress(self, phase: str, done: float = 0, total: float = 0, text: str = "") -> None:
            super().progress(phase, done, total, text)
            if total == 20:
                both.set()

    report = Waiting()
    run(work, 2, report)
    assert ("answers", 7, 20) in report.seen
    rest = [(3, 10), (4, 10), (7, 20)]  # whoever is the last, or both at once
    assert report.seen[-1] in [("answers", *each) for each in rest]


@pytest.mark.skipif(MOST < 2, reason="no lanes here")
def test_a_lane_does_not_copy_what_it_only_collects() -> None:
    """Python's collector writes into each object that it looks at, hence a page of its own."""
    many = [[number] for number in range(1_000_000)]
    size = sum(map(sys.getsizeof, many))

    def work(item: int, report: Report) -> int:
        own = psutil.Process()
        before: int = own.memory_full_info().uss
        gc.collect()
        after: int = own.memory_full_info().uss
        return after - before

    lanes, grown = Lanes(1, work), dict[int, int]()
    items = iter([0])
    lanes.run(lambda: next(items, None), Silent(), grown.__setitem__)
    lanes.close()
    assert size > 60e6 and grown[0] < size / 10
    assert not gc.get_freeze_count(), "here they are collected as before"


@pytest.fixture(scope="module")
def session(tiny_folder: Path) -> Session:
    made = Session()
    made.prepare(prepare_request(tiny_folder), Silent())
    return made


def scored(session: Session, candidates: list[Ablation], threads: int) -> list[Scored]:
    torch.set_num_threads(threads)
    assert session.ready.decoder.lanes == min(MOST, threads)
    return session.score(Score(candidates=candidates), Silent()).scored


def test_lanes_keep_what_comes_again(session: Session) -> None:
    """The search prompts with the original's answers from the start, others after their second
    time, whichever lane had them."""
    session.close_lanes()
    torch.set_num_threads(2)
    ready, lower = session.ready, session.ready.decoder.lower
    assert lower is not None
    outcomes = ready.prepared.baseline_outcomes["search"]
    own = ready.decoder.drafts
    assert own is not None and len(outcomes) == len(ready.roles["search"].harmful)
    for ids in ready.roles["search"].harmful:
        (answer,) = own.known(ids)
        assert lower.states([*ids, *answer], lower.stations[0]) is not None
    report = Counted()
    strong = Ablation(attention=constant(1.0), mlp=constant(1.0))
    session.handle(Score(candidates=[strong] * 4), report)
    assert "kept states" in {phase for phase, _, _ in report.seen}


def test_lanes_give_the_scores_of_one_after_the_other(session: Session) -> None:
    """Many rounds, so that drafts and kept states are in use."""
    session.close_lanes()
    others = set(psutil.Process().children())
    candidates = [
        *CANDIDATES,
        *(Ablation(attention=constant(w), mlp=constant(w / 2)) for w in (0.2, 0.5, 0.9, 1.3)),
    ]
    alone = scored(session, candidates, 1)
    assert len({one.outcomes[0].text for one in alone}) > 2
    assert set(psutil.Process().children()) == others, "one thread has no lanes"
    descriptors = list[int]()
    for _ in range(6):
        descriptors.append(psutil.Process().num_fds())
        for one, truth in zip(scored(session, candidates, 2), alone, strict=True):
            assert one.outcomes == truth.outcomes
            assert one.scores.refusals == truth.scores.refusals
            assert one.scores.kl_first == pytest.approx(truth.scores.kl_first, abs=1e-6)
            assert one.scores.kl_multi == pytest.approx(truth.scores.kl_multi, abs=1e-6)
    lanes = set(psutil.Process().children()) - others
    assert len(lanes) == 2, "the same ones, round after round"
    assert descriptors[-1] == descriptors[1] <= descriptors[0] + 2, "a pipe each"
    session.handle(Respond(prompts=["How?"], max_new_tokens=2), Silent())
    assert set(psutil.Process().children()) == others, "they end when something else is asked for"


@pytest.mark.parametrize("threads", [1, 2])
def test_candidates_that_join_a_request(session: Session, threads: int) -> None:
    """They are scored as alone, and screened by the trials that came with them."""
    session.close_lanes()
    torch.set_num_threads(threads)
    gentle, strong = (Ablation(attention=constant(w), mlp=constant(w)) for w in (0.1, 1.0))
    alone = [session.score(Score(candidates=[one]), Silent()).scored[0] for one in (gentle, strong)]
    best = {"refusals": 0.0, "kl_first": 0.0}  # dominates all
    joining = [
        More(of=1, candidates=[strong, gentle]),
        More(of=1, candidates=[strong], finished=[best]),
        More(of=1, candidates=[gentle]),
    ]
    seen: dict[int, Scored] = {}

    class Telling(Silent):
        def partial(self, index: int, text: str = "", scored: Scored | None = None) -> None:
            assert scored is not None
            seen[index] = scored

    def added() -> list[More]:
        return [joining.pop(0)] if joining and len(seen) else []

    found = session.handle(Score(candidates=[gentle, strong]), Telling(), added)
    assert isinstance(found, ScoredBatch)
    assert found.scored == [seen[0], seen[1]], "its own ones alone"
    assert sorted(seen) == list(range(6)) and not joining
    truths = [alone[0], alone[1], alone[1], alone[0], None, alone[0]]
    for place, truth in enumerate(truths):
        assert seen[place].screened == (truth is None)
        if truth is not None:
            assert seen[place].outcomes == truth.outcomes
            assert seen[place].scores.kl_first == pytest.approx(truth.scores.kl_first, abs=1e-6)


@pytest.mark.parametrize(("threads", "rows", "ahead"), [(2, 128, 6), (1, 128, 0), (1, 23, 3)])
def test_candidates_in_hand(tiny_folder: Path, threads: int, rows: int, ahead: int) -> None:
    """Some for each lane; without lanes only where one candidate's 12 prompts fill a batch."""
    torch.set_num_threads(threads)
    session, request = Session(), prepare_request(tiny_folder)
    found = session.prepare(request.model_copy(update={"batch_size": rows}), Silent())
    assert len(request.prompts.search_harmful) == 12
    assert found.ahead == (ahead if threads == 1 or MOST > 1 else 0)


def test_nothing_joins_what_does_not_run(session: Session) -> None:
    with pytest.raises(EngineError, match="of: no request 3 runs"):
        session.handle(More(of=3, candidates=CANDIDATES[:1]), Silent())


def test_two_fresh_sessions_give_the_same_bits(tiny_folder: Path) -> None:
    """Whoever is faster: what is known of earlier candidates is a matter of their places."""
    runs = []
    for _ in range(2):
        session = Session()
        session.prepare(prepare_request(tiny_folder), Silent())
        rounds = [scored(session, CANDIDATES * 2, 2) for _ in range(4)]
        runs.append([[one.model_dump(exclude={"seconds"}) for one in each] for each in rounds])
        session.close_lanes()
    assert runs[0] == runs[1]


def test_lanes_do_not_outlive_their_model(tiny_folder: Path, others: set[psutil.Process]) -> None:
    """Also where another one is prepared without `handle`."""
    session, request = Session(), prepare_request(tiny_folder)
    session.prepare(request, Silent())
    scored(session, CANDIDATES[:2], 2)
    assert set(psutil.Process().children()) > others
    session.prepare(request.model_copy(update={"seed": 1}), Silent())
    assert set(psutil.Process().children()) == others


def test_memory_that_runs_out_in_a_lane_makes_all_batches_smaller(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session()
    session.prepare(prepare_request(tiny_folder), Silent())
    truth = scored(session, CANDIDATES[:2], 2)
    forward = Decoder.forward

    def scarce(self: Decoder, ids: torch.Tensor, *args: object) -> object:
        if len(ids) > 6:
            raise MemoryError
        return forward(self, ids, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Decoder, "forward", scarce)
    session.close_lanes()  # the next ones know of it
    found = scored(session, CANDIDATES[:2], 2)
    assert [one.outcomes for one in found] == [one.outcomes for one in truth]
    assert session.ready.decoder.limit is not None and session.ready.decoder.limit <= 6
