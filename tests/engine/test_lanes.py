"""Candidates side by side: the same scores as one after the other, errors, progress, threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.decode import Decoder
from engine.errors import EngineError
from engine.lanes import MOST, side_by_side
from engine.report import Report, Silent
from engine.session import Session
from jobs.spec.candidate import Ablation, constant
from jobs.spec.protocol import Score, Scored
from tests.engine.fixtures_run import CANDIDATES, prepare_request, tiny_folder

__all__ = ["tiny_folder"]

LIMIT = 30  # seconds to wait for the other thread


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Counted(Silent):
    def __init__(self) -> None:
        self.seen: list[tuple[str, float, float]] = []

    def progress(self, phase: str, done: float = 0, total: float = 0, text: str = "") -> None:
        self.seen.append((phase, done, total))


def test_both_run_at_once_and_share_the_threads() -> None:
    meeting, ended = threading.Barrier(2), threading.Event()
    order: list[str] = []

    def work(item: str, report: Report) -> str:
        meeting.wait(LIMIT)  # nobody passes alone
        if item == "first":
            assert ended.wait(LIMIT)
        return f"{item} with {torch.get_num_threads()}"

    def done(found: str) -> None:
        order.append(found)
        ended.set()

    found = side_by_side(work, ["first", "second"], Silent(), done)
    assert found == ["first with 1", "second with 1"]
    assert order == ["second with 1", "first with 1"]
    assert torch.get_num_threads() == 2  # of this thread still


def test_an_error_ends_the_others_at_their_next_report() -> None:
    failing, reports = threading.Event(), 0

    def work(item: str, report: Report) -> None:
        nonlocal reports
        if item == "bad":
            failing.set()
            raise ValueError("this one")
        assert failing.wait(LIMIT)
        while reports < 10_000_000:
            report.progress("answers", reports, 10_000_000)
            reports += 1

    with pytest.raises(ValueError, match="this one"):
        side_by_side(work, ["good", "bad"], Silent(), lambda found: None)
    assert reports < 10_000_000


def test_a_stop_ends_all() -> None:
    class Stopping(Silent):
        def progress(self, *_: object) -> None:
            raise EngineError("stopped", "the request was stopped")

    def work(item: int, report: Report) -> None:
        while True:
            report.progress("answers", 1, 2)

    with pytest.raises(EngineError, match="the request was stopped"):
        side_by_side(work, [0, 1], Stopping(), lambda found: None)


def test_progress_is_that_of_all() -> None:
    meeting, report = threading.Barrier(2), Counted()

    def work(item: int, part: Report) -> None:
        part.progress("answers", item, 10)
        meeting.wait(LIMIT)

    side_by_side(work, [3, 4], report, lambda found: None)
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


def test_lanes_give_the_scores_of_one_after_the_other(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many rounds, so that drafts and kept states are in use and the threads meet everywhere."""
    candidates = [
        *CANDIDATES,
        *(Ablation(attention=constant(w), mlp=constant(w / 2)) for w in (0.2, 0.5, 0.9, 1.3)),
    ]
    alone = scored(session, candidates, 1)
    assert len({one.outcomes[0].text for one in alone}) > 2
    threads: set[str] = set()
    forward = Decoder.forward

    def spied(self: Decoder, *args: object) -> object:
        threads.add(threading.current_thread().name)
        return forward(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Decoder, "forward", spied)
    for _ in range(6):
        for one, truth in zip(scored(session, candidates, 2), alone, strict=True):
            assert one.outcomes == truth.outcomes
            assert one.scores.refusals == truth.scores.refusals
            assert one.scores.kl_first == pytest.approx(truth.scores.kl_first, abs=1e-6)
            assert one.scores.kl_multi == pytest.approx(truth.scores.kl_multi, abs=1e-6)
    assert {"lane_0", "lane_1"} <= threads


def test_two_fresh_sessions_give_the_same_bits(tiny_folder: Path) -> None:
    """Whoever is faster: nothing is learned before both have ended."""
    runs = []
    for _ in range(2):
        session = Session()
        session.prepare(prepare_request(tiny_folder), Silent())
        rounds = [scored(session, CANDIDATES[:2], 2) for _ in range(4)]
        runs.append([[one.model_dump(exclude={"seconds"}) for one in each] for each in rounds])
    assert runs[0] == runs[1]


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
    found = scored(session, CANDIDATES[:2], 2)
    assert [one.outcomes for one in found] == [one.outcomes for one in truth]
    assert session.ready.decoder.limit is not None and session.ready.decoder.limit <= 6
