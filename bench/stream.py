"""Candidates in a stream, as a worker has them scored: so many in hand that the engine never waits.

The asking is done in a thread of its own, as a worker is a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

from engine.report import Silent
from engine.session import Session
from jobs.spec.candidate import Candidate
from jobs.spec.memory import CANDIDATES
from jobs.spec.protocol import More, Score, Scored
from worker.window import Window

Asked = tuple[Candidate, list[dict[str, float]]]  # and the trials that may screen it


def stream(
    session: Session,
    trials: int,
    ask: Callable[[int], Asked],
    tell: Callable[[int, Scored], None],
    seen: Callable[[Scored], None] = lambda scored: None,
    **fields: Any,
) -> None:
    """Score `trials` candidates.

    ask(number)           a candidate and the trials that may screen it; in order
    tell(number, scored)  its score; in order, up to the window before the next that is asked for
    seen(scored)          as soon as the score is known
    fields                further ones of each `Score`
    """
    ahead = session.ready.prepared.ahead
    window: Window[int, Scored] = Window(ahead or CANDIDATES)
    begun = 0

    def take() -> Asked:
        nonlocal begun
        window.take(begun, begun)
        begun += 1
        return ask(begun - 1)

    def settle(number: int, scored: Scored, joining: SimpleQueue[More]) -> None:
        window.finish(number, scored)
        while (done := window.next_told()) is not None:
            tell(*done)
            if ahead and begun < trials:
                candidate, finished = take()
                joining.put(More(of=0, candidates=[candidate], finished=finished))

    def request(waiting: list[Asked], start: int) -> list[Asked]:
        """Score what waits, and what joins it; what joined too late."""
        joining: SimpleQueue[More] = SimpleQueue()
        settled: list[Future[None]] = []

        class Telling(Silent):
            def partial(self, index: int, text: str = "", scored: Scored | None = None) -> None:
                if scored is not None:
                    seen(scored)
                    settled.append(asking.submit(settle, start + index, scored, joining))

        def added() -> list[More]:
            return [joining.get() for _ in range(joining.qsize())]

        if ahead:  # each is screened by what was finished when it was asked for
            for candidate, finished in waiting[1:]:
                joining.put(More(of=0, candidates=[candidate], finished=finished))
        own = [candidate for candidate, _ in (waiting[:1] if ahead else waiting)]
        asked = Score(candidates=own, finished=waiting[0][1], joined=ahead > 0, **fields)
        session.handle(asked, Telling(), added)
        for each in settled:
            each.result()
        return [(more.candidates[0], more.finished) for more in added()]

    with ThreadPoolExecutor(1) as asking:
        waiting: list[Asked] = []
        while waiting or begun < trials:
            start = begun - len(waiting)
            waiting += [take() for _ in range(min(window.room, trials - begun))]
            waiting = request(waiting, start)
