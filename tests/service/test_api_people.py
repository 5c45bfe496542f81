"""Tokens, scopes, roles, accounts, prompt sets and webhooks over HTTP."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import text

from jobs import people
from jobs.database import Sessions
from jobs.settings import Settings
from jobs.tables import User
from tests.service.api_server import Api, api, serve, spec
from tests.service.test_api_jobs import field, problem

__all__ = ["api"]


def test_tokens_are_made_used_and_revoked(api: Api, member: User) -> None:
    with api.as_user(member) as client:
        assert client.get("/me").json()["scopes"] == ["read", "write"]
        made = client.post("/tokens", json={"name": "laptop", "scopes": ["read"], "days": 7})
        assert made.status_code == 201
        new = made.json()
        assert new["token"].startswith("ns_") and new["expires_at"]
        listed = client.get("/tokens").json()
        assert new["id"] in {each["id"] for each in listed}
        assert not any("token" in each or "digest" in each for each in listed)
        with api.with_token(new["token"]) as weak:
            assert weak.get("/me").json()["scopes"] == ["read"]
            assert "scope `write`" in str(problem(weak.post("/jobs", json=spec()), 403)["detail"])
            problem(weak.post("/tokens", json={}), 403)  # must not make itself stronger
            assert client.delete(f"/tokens/{new['id']}").status_code == 204
            assert "revoked" in str(problem(weak.get("/me"), 401)["detail"])
        problem(client.post("/tokens", json={"scopes": ["admin"]}), 403)
        problem(client.post("/tokens", json={"scopes": ["all"]}), 422)


def test_unknown_expired_and_disabled(
    api: Api, member: User, admin: User, sessions: Sessions
) -> None:
    with api.with_token(None) as nobody:
        answer = nobody.get("/jobs")
        assert "Bearer" in str(problem(answer, 401)["detail"])
        assert answer.headers["www-authenticate"] == "Bearer"
    with api.with_token("ns_" + "x" * 43) as unknown:
        assert "not known" in str(problem(unknown.get("/jobs"), 401)["detail"])
    with api.as_user(member, days=1) as client, api.as_user(admin) as operator:
        with sessions.begin() as session:
            session.execute(text("UPDATE tokens SET expires_at = now() WHERE expires_at > now()"))
        assert "expired" in str(problem(client.get("/jobs"), 401)["detail"])
        with api.as_user(member) as fresh:
            changed = operator.patch(f"/users/{member.id}", json={"disabled": True})
            assert changed.json()["disabled"] is True
            assert "disabled" in str(problem(fresh.get("/jobs"), 401)["detail"])


def test_accounts(api: Api, member: User, admin: User) -> None:
    with api.as_user(admin) as operator, api.as_user(member) as client:
        for answer in (client.get("/users"), client.post("/users", json={"email": "a@b.example"})):
            assert "admin" in str(problem(answer, 403)["detail"])
        new = {"email": "new@example.org", "role": "viewer", "password": "long enough words"}
        made = operator.post("/users", json=new)
        assert made.status_code == 201 and "password" not in made.text
        assert "new@example.org" in {each["email"] for each in operator.get("/users").json()}
        problem(operator.post("/users", json=new), 409)
        assert field(problem(operator.post("/users", json={"email": "no"}), 422))[0] == "email"
        short = operator.post("/users", json={"email": "x@example.org", "password": "short"})
        assert field(problem(short, 422))[0] == "password"
        assert "short" not in short.text.replace("at least", "")
        path = f"/users/{made.json()['id']}"
        assert operator.patch(path, json={"role": "member"}).json()["role"] == "member"
        problem(operator.patch(path, json={"email": "other@example.org"}), 422)
        problem(operator.patch(f"/users/{admin.id}", json={"role": "member"}), 409)
        problem(operator.patch(f"/users/{api_id()}", json={"name": "x"}), 404)


def api_id() -> str:
    """An id that nothing has."""
    return "00000000-0000-4000-8000-000000000000"


def test_cookie_and_weaker_admin_token(api: Api, admin: User, sessions: Sessions) -> None:
    secret = api.settings.secret_key.get_secret_value()
    with sessions.begin() as session:
        session.add(admin)
        value = people.open_session(session, admin, hours=1, secret=secret)
    with api.with_token(None) as browser:
        browser.cookies.set("nullspace_session", value)
        assert browser.get("/me").json()["scopes"] == ["read", "write", "admin"]
        assert browser.post("/tokens", json={"name": "from the browser"}).status_code == 201
        browser.cookies.set("nullspace_session", value + "x")
        problem(browser.get("/me"), 401)
    with api.as_user(admin, scopes=["read", "write"]) as weak:
        assert "scope `admin`" in str(problem(weak.get("/users"), 403)["detail"])


def test_prompt_sets(api: Api, member: User, make_user: Callable[..., User]) -> None:
    lines = "\n".join(f"question {n}" for n in range(20))
    with api.as_user(member) as client, api.as_user(make_user()) as other:
        files = {"file": ("mine.txt", lines.encode())}
        made = client.post("/prompt-sets", data={"name": "mine", "note": "n"}, files=files)
        assert made.status_code == 201, made.text
        assert made.json()["count"] == 20 and made.json()["mine"] is True
        assert made.headers["location"] == "/api/v1/prompt-sets/mine"
        problem(client.post("/prompt-sets", data={"name": "mine"}, files=files), 409)
        body = {"name": "json", "prompts": [*lines.split("\n"), {"prompt": "x", "split": "search"}]}
        assert client.post("/prompt-sets", json=body).json()["count"] == 21
        shown = other.get("/prompt-sets/mine").json()
        assert shown["prompts"][0]["prompt"] == "question 0" and shown["mine"] is False
        names = {each["name"] for each in client.get("/prompt-sets").json()}
        assert {"mine", "json", "asked"} <= names
        problem(other.delete("/prompt-sets/mine"), 403)
        assert client.delete("/prompt-sets/mine").status_code == 204
        problem(client.get("/prompt-sets/mine"), 404)


BAD_FILES = [
    (b"", "empty"),
    (b"one line", "only one prompt"),
    (b"good\n\xff\xfe\n" * 10, "byte 5"),
    (b"a\x00b\n" * 10, "NUL"),
    (("x" * 20_001 + "\n").encode() * 10, "20001 characters"),
]


def test_bad_prompt_files(api: Api, member: User) -> None:
    with api.as_user(member) as client:
        for data, words in BAD_FILES:
            files = {"file": ("a.txt", data)}
            body = problem(client.post("/prompt-sets", data={"name": "bad"}, files=files), 422)
            assert words in str(body["detail"]) and field(body)[0] == "file"


def test_prompt_sets_sent_wrongly(api: Api, member: User) -> None:
    lines = [f"p {n}" for n in range(8)]
    with api.as_user(member) as client:
        cases = [
            (client.post("/prompt-sets", json={"prompts": lines}), "name"),
            (client.post("/prompt-sets", json={"name": "x", "prompts": lines, "y": 1}), "y"),
            (client.post("/prompt-sets", json={"name": "Bad Name", "prompts": lines}), "name"),
            (client.post("/prompt-sets", content=b"x"), "Content-Type"),
            (client.post("/prompt-sets", files={"file": ("a.txt", b"x")}), "name"),
            (client.post("/prompt-sets", files={"name": (None, "x")}), "file"),
        ]
        for answer, name in cases:
            assert field(problem(answer, 422))[0] == name


def test_uploads_are_limited_while_they_stream(
    make_settings: Callable[..., Settings], sessions: Sessions, member: User
) -> None:
    with serve(make_settings(upload_bytes=100_000), sessions) as api, api.as_user(member) as client:
        files = {"file": ("a.txt", b"a prompt\n" * 40_000)}
        declared = client.post("/prompt-sets", data={"name": "big"}, files=files)
        assert "165,536 bytes" in str(problem(declared, 413)["detail"])
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\n'
        chunks = (head if n == 0 else b"y" * 50_000 for n in range(10))
        problem(client.post("/prompt-sets", content=chunks, headers=headers), 413)
        json = {"Content-Type": "application/json"}
        problem(client.post("/jobs", content=(b" " * 90_000 for _ in range(20)), headers=json), 413)


def test_webhooks(api: Api, member: User, make_user: Callable[..., User]) -> None:
    with api.as_user(member) as client, api.as_user(make_user()) as other:
        new = {"url": "https://example.org/hook", "kinds": ["job.completed"]}
        made = client.post("/webhooks", json=new)
        assert made.status_code == 201 and made.json()["secret"].startswith("whsec_")
        (listed,) = client.get("/webhooks").json()
        assert "secret" not in listed and other.get("/webhooks").json() == []
        problem(other.delete(f"/webhooks/{listed['id']}"), 404)
        assert client.delete(f"/webhooks/{listed['id']}").status_code == 204
        assert field(problem(client.post("/webhooks", json={"url": "http://x"}), 422))[0] == "url"
        bad = client.post("/webhooks", json={"url": "https://example.org", "kinds": ["x"]})
        assert field(problem(bad, 422))[0] == "kinds"
