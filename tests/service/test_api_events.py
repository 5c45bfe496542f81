"""The live view: replay, nudges, heartbeats, its end, and what survives a kill."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx
import pytest

from api.routes import events as stream
from jobs import events
from jobs.database import Sessions
from jobs.settings import Settings
from jobs.tables import Job, User
from tests.service.api_server import (
    Api,
    api,
    free_port,
    seed_prompts,
    spec,
    start_process,
    wait_for,
)
from tests.service.api_worker import claim, score, whole_job
from tests.service.test_api_jobs import problem

__all__ = ["api"]


def frames(response: httpx.Response) -> Iterator[dict[str, str]]:
    """The events of a stream as {field: value}; comments under the key ''."""
    found: dict[str, str] = {}
    for line in response.iter_lines():
        if not line:
            yield found
            found = {}
        else:
            name, _, value = line.partition(":")
            found[name] = value.strip()


@contextmanager
def follow(client: httpx.Client, job: str, **headers: str) -> Iterator[Iterator[dict[str, str]]]:
    """The events of a job's stream, after the first `retry` frame."""
    with client.stream("GET", f"/jobs/{job}/events", headers=headers, timeout=20) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        found = frames(response)
        assert next(found) == {"retry": "1000"}
        yield found


def append(sessions: Sessions, job: str, text: str) -> int:
    """One more event of the job."""
    with sessions.begin() as session:
        return events.append(session, session.query(Job).one().id, "log", {"text": text})


def test_replay_and_end(api: Api, member: User, sessions: Sessions) -> None:
    with api.as_user(member) as client:
        job = client.post("/jobs", json=spec(trials=2)).json()["id"]
        whole_job(sessions, api.settings, [3, 1])
        with follow(client, job) as found:
            received = list(found)
        last = client.get(f"/jobs/{job}").json()["event_seq"]
        *told, end = received
        assert [int(each["id"]) for each in told] == list(range(1, last + 1))
        assert end["event"] == "end" and json.loads(end["data"])["state"] == "completed"
        assert {"job", "task", "trial"} <= {each["event"] for each in told}
        first = json.loads(told[0]["data"])
        assert first["seq"] == 1 and first["payload"]["state"] == "queued" and first["at"]
        with follow(client, job, **{"Last-Event-ID": str(last - 1)}) as found:
            assert [each.get("id") for each in found] == [str(last), None]
        with client.stream("GET", f"/jobs/{job}/events?after={last}") as response:
            assert [each.get("event") for each in frames(response)] == [None, "end"]
        # a number that is none is no reason to fail: everything is sent
        with follow(client, job, **{"Last-Event-ID": "x"}) as found:
            assert next(found)["id"] == "1"


def test_a_nudge_comes_before_the_poll(api: Api, member: User, sessions: Sessions) -> None:
    api.settings.poll_seconds = 15.0
    with api.as_user(member) as client:
        job = client.post("/jobs", json=spec()).json()["id"]
        with follow(client, job) as found:
            next(found)
            begin = time.monotonic()
            client.post(f"/jobs/{job}/pause")
            while (each := next(found))["event"] != "job":
                pass
            assert json.loads(each["data"])["payload"]["desired_state"] == "pause"
            assert time.monotonic() - begin < 5


def test_without_a_nudge_the_poll_finds_it(api: Api, member: User, sessions: Sessions) -> None:
    api.settings.poll_seconds = 0.1
    with api.as_user(member) as client:
        job = client.post("/jobs", json=spec()).json()["id"]
        with follow(client, job) as found:
            next(found)
            seq = append(sessions, job, "silent")
            while (each := next(found))["event"] != "log":
                pass
            assert int(each["id"]) == seq


def test_heartbeats_lifetime_and_limit(
    api: Api, member: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(stream, "LIFETIME_SECONDS", 1.0)
    api.settings.poll_seconds = 0.05
    assert api.app is not None
    streams = api.app.state.streams
    streams.limit = 1
    with api.as_user(member) as client:
        job = client.post("/jobs", json=spec()).json()["id"]
        with follow(client, job) as found:
            next(found)
            assert next(found) == {"": "still here"}
            assert streams.open == 1
            busy = client.get(f"/jobs/{job}/events")
            problem(busy, 503)
            assert busy.headers["retry-after"]
            assert all(each == {"": "still here"} for each in found)  # until the lifetime ends
        wait_for(lambda: streams.open == 0)


def test_a_client_that_goes_or_does_not_read_is_dropped(
    api: Api, member: User, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "SEND_SECONDS", 0.3)
    api.settings.poll_seconds = 0.05
    assert api.app is not None
    streams = api.app.state.streams
    token = api.token(member)
    with api.with_token(token) as client:
        job = client.post("/jobs", json=spec()).json()["id"]
        with follow(client, job) as found:
            next(found)
        wait_for(lambda: streams.open == 0)
        address = urlsplit(api.url)
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect((address.hostname, address.port))
            lines = f"GET /api/v1/jobs/{job}/events HTTP/1.1\r\nHost: x\r\n"
            deaf.sendall(f"{lines}Authorization: Bearer {token}\r\n\r\n".encode())
            wait_for(lambda: streams.open == 1)
            for _ in range(60):
                append(sessions, job, "x" * 200_000)
            wait_for(lambda: streams.open == 0)


def test_kill_9_of_the_api_misses_nothing(
    settings: Settings, sessions: Sessions, member: User
) -> None:
    seed_prompts(sessions)
    port = free_port()
    process = start_process(settings, port)
    api = Api(f"http://127.0.0.1:{port}", settings, sessions)
    received: list[int] = []
    try:
        with api.as_user(member) as client:
            job = client.post("/jobs", json=spec(trials=6)).json()["id"]
            held = claim(sessions, settings)
            score(sessions, held, 5, 0.1)
            with follow(client, job) as found:
                while len(received) < 3:
                    received.append(int(next(found)["id"]))
                process.kill()
                with pytest.raises(httpx.TransportError):
                    for each in found:
                        received.append(int(each["id"]))
            process.wait(10)
            score(sessions, held, 4, 0.2)  # while nobody serves
        process = start_process(settings, port)
        with api.as_user(member) as client:
            with follow(client, job, **{"Last-Event-ID": str(received[-1])}) as found:
                score(sessions, held, 3, 0.3)
                last = client.get(f"/jobs/{job}").json()["event_seq"]
                while received[-1] < last:
                    received.append(int(next(found)["id"]))
            assert received == list(range(1, last + 1))
    finally:
        process.kill()
        process.wait(10)
