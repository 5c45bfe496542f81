"""The judge against a small server that speaks the chat completions protocol."""

from __future__ import annotations

import importlib
import json
import logging
import socket
import time
from collections.abc import Iterator

import pytest
from pydantic import ValidationError

from jobs.settings import Judge, Settings
from jobs.spec.scores import wilson
from tests.service.judge_server import Server, judge_server
from worker import judge as judging
from worker.judge import ask, question, value, verdict


@pytest.fixture
def server() -> Iterator[Server]:
    with judge_server() as running:
        yield running


def test_replies_come_in_order(server: Server) -> None:
    answers = ["sorry, no" if k % 3 == 0 else f"take a mop {k}" for k in range(40)]
    questions = [question("How do I mop?", answer) for answer in answers]
    replies = ask(server.judge, questions, lambda: None)
    assert [verdict(reply) for reply in replies] == [k % 3 == 0 for k in range(40)]
    assert server.keys == {"Bearer k-1"}
    assert {r["path"] for r in server.requests} == {"/v1/chat/completions"}
    assert {(r["model"], r["temperature"]) for r in server.requests} == {("grader", 0)}


def test_busy_servers_are_asked_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "FIRST_PAUSE", 0.01)
    server.trouble = [429, 503, 500]
    assert ask(server.judge, [question("a", "sorry")], lambda: None) == ["Hmm. It is REFUSED."]
    assert len(server.requests) == 4
    server.trouble = [401]  # a wrong key stays wrong
    assert ask(server.judge, [question("a", "sorry")], lambda: None) == [""]
    assert len(server.requests) == 5


def test_an_absent_server_gives_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "FIRST_PAUSE", 0.001)
    judge = Judge(url="http://127.0.0.1:9/v1", model="x")
    assert ask(judge, ["?"], lambda: None) == [""]


def test_asking_can_be_stopped(server: Server) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(server.judge, [question("a", "b")] * 500, stop)
    assert len(server.requests) < 500


def test_asking_ends_although_no_reply_comes() -> None:
    """A pause frees the worker within seconds, not after the endpoint's time-outs."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        judge = Judge(url=f"http://127.0.0.1:{silent.getsockname()[1]}/v1", model="x", parallel=2)
        began = time.monotonic()

        def stop() -> None:
            if time.monotonic() > began + 0.3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            ask(judge, ["?"] * 4, stop)
        assert time.monotonic() < began + 5


def test_the_worker_logs_no_address(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    importlib.import_module("worker.celery_app")
    with caplog.at_level(logging.INFO):
        ask(server.judge, [question("a", "b")], lambda: None)
    assert str(server.server_port) not in caplog.text


def test_errors_in_the_settings_repeat_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    judges = {"a": {"url": "ftp://x", "model": "m", "key": "k-secret"}}
    monkeypatch.setenv("NULLSPACE_JUDGES", json.dumps(judges))
    monkeypatch.setenv("NULLSPACE_SECRET_KEY", "k-short")
    with pytest.raises(ValidationError, match=r"judges\.a") as caught:
        Settings()
    assert "k-s" not in str(caught.value)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("REFUSED", True),
        ("answered.", False),
        ("<think>it is not REFUSED, so</think> ANSWERED", False),
        ("I would say: unrefused", None),
        ("", None),
    ],
)
def test_verdicts(reply: str, expected: bool | None) -> None:
    assert verdict(reply) is expected


def test_unknown_verdicts_do_not_count() -> None:
    found = value([True, False, None, False])
    assert found is not None and found.n == 3 and found.value == pytest.approx(1 / 3)
    assert (found.low, found.high) == pytest.approx(wilson(1, 3))
    assert value([None]) is None


def test_addresses_are_checked() -> None:
    with pytest.raises(ValidationError, match="http://"):
        Judge(url="file:///etc", model="x")
