"""The protocol's pipe: order, refusals of bad lines, throttling, stop and end of file."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from engine.channel import Channel, ChannelReport
from engine.errors import EngineError
from jobs.spec.protocol import Envelope, Error, Log, More, Partial, Progress, Respond, Stop, answers


@dataclass
class Ends:
    """A channel and the supervisor's ends of its pipes."""

    channel: Channel
    requests: int
    answers: int

    def lines(self) -> list[Progress | Log | Partial | object]:
        """Every message that has been sent."""
        found = b""
        while select.select([self.answers], [], [], 0)[0]:
            found += os.read(self.answers, 1 << 16)
        return [answers.validate_json(line) for line in found.splitlines()]


@pytest.fixture
def ends() -> Iterator[Ends]:
    read, requests = os.pipe()
    replies, write = os.pipe()
    never = 1e6  # the guard would end the test run
    made = Ends(Channel(read, write, never, never), requests, replies)
    yield made
    for descriptor in (read, requests, replies, write):
        try:
            os.close(descriptor)
        except OSError:
            continue


def test_requests_come_in_order_and_end_with_the_pipe(ends: Ends) -> None:
    ends.channel.start()
    line = b'{"id":1,"request":{"op":"respond","prompts":["a"]}}\n{"id":2,"request":'
    os.write(ends.requests, line)
    os.write(ends.requests, b'{"op":"stop"}}\n\n')
    os.close(ends.requests)
    found = list(ends.channel.requests())
    assert [(e.id, type(e.request)) for e in found] == [(1, Respond), (2, Stop)]
    assert ends.channel.stopping.is_set()


@pytest.mark.parametrize(
    ("line", "id", "field"),
    [
        (b"not json", 0, "request"),
        (b'{"id":7,"request":{"op":"fly"}}', 7, "op"),
        (b'{"id":8,"request":{"op":"respond","prompts":"a"}}', 8, "prompts"),
        (b"\xff\xfe", 0, "request"),
        (b"[1]", 0, "request"),
    ],
)
def test_a_bad_line_is_answered_and_skipped(ends: Ends, line: bytes, id: int, field: str) -> None:
    ends.channel.start()
    os.write(ends.requests, line + b'\n{"id":9,"request":{"op":"stop"}}\n')
    assert next(ends.channel.requests()).id == 9
    (answer,) = ends.lines()
    assert isinstance(answer, Error) and answer.reason == "bad_request" and answer.id == id
    assert field in answer.message and answer.mend


def test_what_is_added_reaches_its_request_at_once(ends: Ends) -> None:
    """While that is being computed; what comes for another one is dropped."""
    ends.channel.start()
    found = ends.channel.requests()
    os.write(ends.requests, b'{"id":7,"request":{"op":"score","candidates":[]}}\n')
    assert next(found).id == 7
    for of, refusals in ((6, 0.1), (7, 0.2), (7, 0.3)):
        more = More(of=of, candidates=[], finished=[{"refusals": refusals}])
        line = Envelope(id=9, request=more).model_dump_json()
        os.write(ends.requests, line.encode() + b"\n")
    os.write(ends.requests, b'{"id":10,"request":{"op":"stop"}}\n')
    assert next(found).id == 10, "they are no requests of their own"
    assert [more.finished for more in ends.channel.added(7)] == [
        [{"refusals": 0.2}],
        [{"refusals": 0.3}],
    ]
    assert ends.channel.added(7) == []


def test_progress_is_throttled_but_never_its_ends(ends: Ends) -> None:
    report = ChannelReport(ends.channel, 4)
    for done in range(1001):
        report.progress("load", done, 1000)
    report.progress("score", 0, 10)
    report.log("a line", "warning")
    report.log("another", "of no known level")
    report.partial(3, "piece")
    sent = ends.lines()
    progress = [m for m in sent if isinstance(m, Progress)]
    assert (progress[0].phase, progress[0].done) == ("load", 0)
    assert [(m.phase, m.done) for m in progress][-2:] == [("load", 1000), ("score", 0)]
    assert len(progress) <= 5
    assert [m.level for m in sent if isinstance(m, Log)] == ["warning", "info"]
    assert isinstance(sent[-1], Partial) and sent[-1].id == 4


def test_every_report_raises_after_a_stop(ends: Ends) -> None:
    ends.channel.start()
    report = ChannelReport(ends.channel, 1)
    os.write(ends.requests, b'{"id":2,"request":{"op":"stop"}}\n')
    assert ends.channel.stopping.wait(10)
    calls: list[Callable[[], None]] = [
        lambda: report.progress("load"),
        lambda: report.log("x"),
        lambda: report.partial(0),
    ]
    for call in calls:
        with pytest.raises(EngineError) as caught:
            call()
        assert caught.value.reason == "stopped"


def test_a_supervisor_that_does_not_listen_stops_the_engine(ends: Ends) -> None:
    os.close(ends.answers)
    with pytest.raises(EngineError) as caught:
        ChannelReport(ends.channel, 1).log("to nobody")
    assert caught.value.reason == "stopped"


@pytest.mark.parametrize(
    "arguments",
    [[], ["--read", "0"], ["--read", "x", "--write", "1"], ["--read", "97", "--write", "1"]],
)
def test_wrong_arguments_fail_at_once_without_torch(arguments: list[str]) -> None:
    code = (
        "import runpy, sys; sys.argv[1:] = " + repr(arguments) + "\n"
        "try: runpy.run_module('engine', run_name='__main__')\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["2", "False"]
    assert "error:" in done.stderr
