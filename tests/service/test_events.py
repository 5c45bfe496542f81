"""A job's events are numbered without gaps, whoever writes at once."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jobs import events
from jobs.database import Sessions
from jobs.doorbell import Doorbell
from jobs.settings import Settings
from jobs.tables import Job, User
from tests.service.builders import add_job


def test_no_gaps_with_threads_and_rollbacks(
    sessions: Sessions, crowd: Sessions, owner: User, farm: Settings
) -> None:
    with sessions.begin() as session:
        job = add_job(session, owner, farm)
        first = job.event_seq

    def write(number: int) -> None:
        for turn in range(5):
            with crowd() as session:
                events.append(session, job.id, "log", {"text": f"{number} {turn} \x00\ud800"})
                if (number + turn) % 3:
                    session.commit()
                else:
                    session.rollback()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    with sessions.begin() as session:
        written = events.since(session, job.id, first)
        kept = sum((n + t) % 3 != 0 for n in range(8) for t in range(5))
        assert [event.seq for event in written] == list(range(first + 1, first + 1 + kept))
        assert session.get_one(Job, job.id).event_seq == first + kept
        assert written[0].payload["text"].endswith(" \ufffd\ufffd")
        assert len(events.since(session, job.id, first, limit=3)) == 3
        assert events.since(session, job.id, first + kept) == []


def test_nudges_are_heard_and_a_dead_redis_is_survived(
    redis_url: str, sessions: Sessions, owner: User, farm: Settings
) -> None:
    with sessions.begin() as session:
        job = add_job(session, owner, farm)
    bell = Doorbell(redis_url)
    with bell.listen(job.id) as listener:
        assert not listener.wait(0.05)
        bell.nudge(job.id)
        assert listener.wait(5)
    bell.close()
    dead = Doorbell("redis://127.0.0.1:1/0")
    began = time.monotonic()
    dead.ring([(job.id, "search")])
    dead.nudge(job.id)
    with dead.listen(job.id) as listener:
        assert not listener.wait(0.05)
    assert time.monotonic() - began < 8
    dead.close()


def test_ringing_sends_the_id_and_nothing_else(
    redis_url: str, sessions: Sessions, owner: User, farm: Settings
) -> None:
    import json

    import redis

    with sessions.begin() as session:
        job = add_job(session, owner, farm)
    bell = Doorbell(redis_url)
    bell.ring([(job.id, "search"), (job.id, "export")])
    bell.close()
    with redis.Redis.from_url(redis_url) as client:
        assert client.llen("search") == 1 and client.llen("export") == 1
        found = client.lpop("search")
        assert isinstance(found, bytes)
        message = json.loads(found)
    assert message["headers"]["task"] == "nullspace.work"
    assert message["headers"]["argsrepr"] == repr([str(job.id)])


@pytest.mark.parametrize("value", ["a\x00b", {"k\x00": ["\ud83d\ude00", "\udead"]}])
def test_any_text_can_be_stored(
    sessions: Sessions, owner: User, farm: Settings, value: object
) -> None:
    with sessions.begin() as session:
        job = add_job(session, owner, farm)
        seq = events.append(session, job.id, "log", {"value": value})
    with sessions.begin() as session:
        stored = events.since(session, job.id, seq - 1)[0].payload["value"]
    assert stored in ("a\ufffdb", {"k\ufffd": ["\U0001f600", "\ufffd"]})
