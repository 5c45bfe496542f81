"""Candidates side by side: the same scores as one after the other, errors, progress, ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing import Barrier, Event
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
import torch

from engine.decode import Decoder
from engine.errors import EngineError
from engine.lanes import MOST, Lanes
from engine.report import Report, Silent
from engine.session import Session
from jobs.spec.candidate import Ablation, constant
from jobs.spec.protocol import Respond, Score, Scored
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
) -> tuple[list[Found], list[int]]:
    """What two lanes find, and in which order this process heard of it; they are gone then."""
    lanes, order = Lanes(2, work, learn), list[int]()
    try:
        found = lanes.run(
            count, lambda number: number, report or Silent(), lambda number, _: order.append(number)
        )
    finally:
        lanes.close()
    return found, order


def test_both_run_at_once_and_share_the_threads() -> None:
    meeting = Barrier(2)

    def work(item: int, report: Report) -> tuple[int, int, int]:
        meeting.wait(LIMIT)  # nobody passes alone
        return item, os.getpid(), torch.get_num_threads()

    found, _ = run(work, 2)
    assert [one[::2] for one in found] == [(0, 1), (1, 1)]
    assert len({os.getpid(), *(pid for _, pid, _ in found)}) == 3
    assert torch.get_num_threads() == 2  # of this process still


def test_one_item_has_all_threads() -> None:
    """And they work: OpenMP's own do not outlive a fork."""
    x = torch.ones(512, 512)
    truth = float((x @ x).sum())  # starts them in this process

    def work(item: int, report: Report) -> tuple[int, float]:
        return torch.get_num_threads(), float((x @ x).sum())

    assert run(work, 1)[0] == [(2, truth)]


def test_a_lane_knows_what_was_found_up_to_lag_items_before() -> None:
    """Neither less nor more, whoever is faster, and in the items' order."""
    known: list[int] = []
    first, rest = Event(), 12

    def work(item: int, report: Report) -> list[int]:
        if item == 0:
            assert first.wait(LIMIT)
        if item == 3:
            first.set()  # the other lane had items 1 to 3 in the meantime
        return list(known)

    def learn(found: list[int]) -> None:
        known.append(len(found))

    found, order = run(work, rest, learn=learn)
    assert order[:2] == [1, 2]
    assert [len(one) for one in found] == [max(0, item - 3) for item in range(rest)]
    assert found[-1] == [len(one) for one in found[:8]]


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
        "Lanes(2, work).run(2, int, Telling(), print)\n"
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
    meeting, report = Barrier(2), Counted()

    def work(item: int, part: Report) -> int:
        part.progress("answers", 3 + item, 10)
        meeting.wait(LIMIT)
        return item

    run(work, 2, report)
    assert report.seen[-1] == ("answers", 7, 20)


@pytest.fixture(scope="module")
def session(tiny_folder: Path) -> Session:
    made = Session()
    made.prepare(prepare_request(tiny_folder), Silent())
    return made


def scored(session: Session, candidates: list[Ablation], threads: int) -> list[Scored]:
    torch.set_num_threads(threads)
    assert session.ready.decoder.lanes == min(MOST, threads)
    return session.score(Score(candidates=candidates), Silent()).scored


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
    for _ in range(6):
        for one, truth in zip(scored(session, candidates, 2), alone, strict=True):
            assert one.outcomes == truth.outcomes
            assert one.scores.refusals == truth.scores.refusals
            assert one.scores.kl_first == pytest.approx(truth.scores.kl_first, abs=1e-6)
            assert one.scores.kl_multi == pytest.approx(truth.scores.kl_multi, abs=1e-6)
    lanes = set(psutil.Process().children()) - others
    assert len(lanes) == 2, "the same ones, round after round"
    session.handle(Respond(prompts=["How?"], max_new_tokens=2), Silent())
    assert set(psutil.Process().children()) == others, "they end when something else is asked for"


def test_what_a_lane_has_scored_screens_what_comes_lag_items_later(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the next request would."""
    session.close_lanes()
    prompts = len(session.ready.roles["search"].harmful)
    monkeypatch.setattr(session.ready.decoder, "limit", prompts)  # a batch for each candidate
    nothing = {"refusals": 1.0, "kl_first": 0.0}  # dominates only what moves and refuses all
    gentle, strong = (Ablation(attention=constant(w), mlp=constant(w)) for w in (0.1, 1.0))
    torch.set_num_threads(2)
    asked = Score(candidates=[gentle, *[strong] * 8], finished=[nothing])
    found = session.score(asked, Silent()).scored
    first, second = (one.scores for one in found[:2])
    assert first.refusals == 0 and first.kl_first is not None and second.kl_first is not None
    assert first.kl_first < second.kl_first
    assert [one.screened for one in found] == [False] * 4 + [True] * 5


def test_two_fresh_sessions_give_the_same_bits(tiny_folder: Path) -> None:
    """Whoever is faster: nothing is learned before both have ended."""
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
