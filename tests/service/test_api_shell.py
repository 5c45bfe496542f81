"""Around the routes: health, metrics, headers, cross-site requests, errors, the document."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from sqlalchemy import text
from starlette.datastructures import Headers

from api import openapi
from api.csrf import allowed
from api.plaintext import clean
from api.problems import EXTRA_HEADERS
from jobs import people
from jobs.database import Sessions
from jobs.settings import Settings
from jobs.tables import User
from tests.service.api_server import Api, api, free_port, serve, spec
from tests.service.api_worker import claim, score
from tests.service.test_api_jobs import problem

__all__ = ["api"]
ROOT = Path(__file__).parent.parent.parent


def test_import_is_light() -> None:
    code = (
        "import sys, api.app; heavy = {'torch', 'transformers', 'optuna', 'worker', 'engine'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.stdout.strip() == "[]", found.stderr


def test_document_is_the_snapshot() -> None:
    assert openapi.SNAPSHOT.read_text(encoding="utf-8") == openapi.text(), (
        "the API changed: run `python -m api.openapi` and look at the difference"
    )


def test_every_operation_is_described() -> None:
    import json

    document = json.loads(openapi.text())
    seen = set()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            seen.add(operation["operationId"])
            assert operation["description"], path
            for status, response in operation["responses"].items():
                assert response["description"], (path, status)
                if int(status) >= 400 and status != "416":
                    assert list(response["content"]) == ["application/problem+json"], path
            if path.startswith("/api/"):
                assert operation["security"], path
                assert {"401", "503"} <= set(operation["responses"])
    assert len(seen) == sum(len(each) for each in document["paths"].values())
    assert {"submit_job", "stream_events", "download_file", "healthz"} <= seen


def test_ready_degraded_and_away(
    api: Api, make_settings: Callable[..., Settings], sessions: Sessions, member: User
) -> None:
    assert httpx.get(f"{api.url}/healthz").json() == {"status": "ok"}
    ready = httpx.get(f"{api.url}/readyz")
    assert ready.json()["status"] == "ready"
    nowhere = f"redis://127.0.0.1:{free_port()}/0"
    with serve(make_settings(REDIS_URL=nowhere), sessions) as lame:
        assert httpx.get(f"{lame.url}/readyz").json()["redis"] == "unreachable"
        with lame.as_user(member) as client:  # the doorbell is out of order: slower, not wrong
            assert client.post("/jobs", json=spec()).status_code == 201
    with sessions.begin() as session:
        session.execute(text("UPDATE alembic_version SET version_num = 'older'"))
    assert "migrate" in str(problem(httpx.get(f"{api.url}/readyz"), 503)["detail"])
    gone = f"postgresql://nobody@127.0.0.1:{free_port()}/none"
    with serve(make_settings(DATABASE_URL=gone), sessions) as broken:
        assert httpx.get(f"{broken.url}/healthz").status_code == 200
        with broken.with_token("ns_x") as client:
            for answer in (httpx.get(f"{broken.url}/readyz"), client.get("/jobs")):
                problem(answer, 503)
                assert answer.headers["retry-after"] == EXTRA_HEADERS[503]["Retry-After"]


def test_postgres_connections_that_break_are_survived(
    api: Api, member: User, sessions: Sessions
) -> None:
    with api.as_user(member) as client:
        assert client.get("/jobs").status_code == 200
        with sessions.begin() as session:
            session.execute(
                text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            )
        assert client.get("/jobs").status_code == 200


def test_metrics(api: Api, member: User, sessions: Sessions) -> None:
    with api.as_user(member) as client:
        client.post("/jobs", json=spec())
        client.post("/jobs", json=spec())
        score(sessions, claim(sessions, api.settings), 1, 0.1)
        found = httpx.get(f"{api.url}/metrics")  # from loopback
        assert found.headers["content-type"].startswith("text/plain")
        lines = found.text.splitlines()
        for line in (
            'nullspace_queue_depth{kind="search"} 1.0',
            'nullspace_jobs{state="running"} 1.0',
            'nullspace_tasks_running{kind="search"} 1.0',
            'nullspace_workers_live{device="cpu",name="test"} 1.0',
            "nullspace_trials_total 1.0",
            "nullspace_lease_expiries_total 0.0",
        ):
            assert line in lines
        assert any(line.startswith("nullspace_queue_oldest_seconds{") for line in lines)
        proxied = {"X-Forwarded-For": "203.0.113.9"}
        problem(httpx.get(f"{api.url}/metrics", headers=proxied), 401)
        signed = {**proxied, "Authorization": f"Bearer {api.token(member)}"}
        assert httpx.get(f"{api.url}/metrics", headers=signed).status_code == 200


def test_headers_are_on_every_answer(api: Api, member: User) -> None:
    with api.as_user(member) as client:
        for answer in (
            client.get("/me"),
            client.get("/none"),
            client.post("/jobs", content=b"x" * 2_000_000),
            client.post(
                "/jobs", json={}, headers={"Sec-Fetch-Site": "cross-site", "Cookie": "a=b"}
            ),
        ):
            assert answer.headers["content-security-policy"].startswith("default-src 'self'")
            assert "unsafe" not in answer.headers["content-security-policy"]
            assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["referrer-policy"] == "same-origin"
            assert answer.headers["cache-control"] == "no-store"


def test_errors_that_nobody_foresaw(api: Api, member: User) -> None:
    assert api.app is not None

    def broken() -> None:
        raise RuntimeError("a secret of the inside")

    api.app.add_api_route("/api/v1/broken", broken)
    with api.as_user(member) as client:
        answer = client.get("/broken")
        body = problem(answer, 500)
        assert body["id"] and str(body["id"]) in str(body["detail"])
        assert "secret" not in answer.text and "Traceback" not in answer.text
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_unknown_addresses_and_methods(api: Api, member: User) -> None:
    with api.as_user(member) as client:
        assert "/api/v1/none" in str(problem(client.get("/none"), 404)["detail"])
        answer = client.delete("/jobs")
        problem(answer, 405)
        assert answer.headers["allow"] == "GET, POST"
        problem(client.get("/jobs/not-an-id"), 422)
        assert client.get("/openapi.json").json()["info"]["title"] == "Nullspace"


CASES = [
    ("GET", {"sec-fetch-site": "cross-site", "origin": "https://evil.example"}, True),
    ("POST", {}, True),
    ("POST", {"sec-fetch-site": "same-origin", "cookie": "a"}, True),
    ("POST", {"sec-fetch-site": "none", "cookie": "a"}, True),
    ("POST", {"sec-fetch-site": "same-site", "cookie": "a"}, False),
    ("POST", {"sec-fetch-site": "cross-site", "cookie": "a"}, False),
    ("POST", {"sec-fetch-site": "", "cookie": "a"}, False),
    ("POST", {"origin": "http://here:1", "host": "here:1", "cookie": "a"}, True),
    ("POST", {"origin": "https://public.example", "host": "inner:1", "cookie": "a"}, True),
    ("POST", {"origin": "https://evil.example", "host": "here:1", "cookie": "a"}, False),
    ("POST", {"origin": "http://here:2", "host": "here:1", "cookie": "a"}, False),
    ("POST", {"origin": "null", "host": "here:1", "cookie": "a"}, False),
    ("POST", {"origin": "https://evil.example", "authorization": "Bearer ns_x"}, True),
    ("POST", {"origin": "https://evil.example", "authorization": "Bearer x", "cookie": "a"}, False),
    ("POST", {"origin": "https://evil.example", "authorization": "Basic x"}, False),
    ("DELETE", {"sec-fetch-site": "cross-site"}, False),
    ("PATCH", {"sec-fetch-site": "cross-site"}, False),
]


@pytest.mark.parametrize(("method", "headers", "passes"), CASES)
def test_cross_site_rules(method: str, headers: dict[str, str], passes: bool) -> None:
    assert allowed(method, Headers(headers), "https://public.example") is passes


def test_another_site_cannot_use_the_cookie(api: Api, member: User, sessions: Sessions) -> None:
    secret = api.settings.secret_key.get_secret_value()
    with sessions.begin() as session:
        session.add(member)
        value = people.open_session(session, member, hours=1, secret=secret)
    with api.with_token(None) as browser:
        browser.cookies.set("nullspace_session", value)
        for headers in (
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site"},
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
        ):
            problem(browser.post("/jobs", json=spec(), headers=headers), 403)
        assert browser.get("/jobs").json()["items"] == []
        own = {"Sec-Fetch-Site": "same-origin", "Origin": api.url}
        assert browser.post("/jobs", json=spec(), headers=own).status_code == 201


@pytest.mark.parametrize(
    ("dirty", "plain"),
    [
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07text", "text"),
        ("\x1b]8;;https://example.org\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("50%\r100%\r\n", "50%\n100%\n"),
        ("a\x00b\x07c\x7f\td", "abc\td"),
        ("\u202eevil\u2066", "\\u202eevil\\u2066"),
        ("\x9b31mred", "red"),
    ],
)
def test_plain_text(dirty: str, plain: str) -> None:
    assert clean(dirty) == plain
