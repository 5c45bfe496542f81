"""Jobs over HTTP: submit, look, control, change; who may do what."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from typing import cast

import httpx
from sqlalchemy import text

from jobs.database import Sessions
from jobs.settings import Settings
from jobs.tables import User
from tests.service.api_server import Api, api, seed_prompts, serve, spec
from tests.service.api_worker import claim, score, whole_job

__all__ = ["api"]


def problem(response: httpx.Response, status: int) -> dict[str, object]:
    """The response's problem document, checked for form."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, object] = response.json()
    assert body["status"] == status
    assert {"type", "title", "detail", "instance"} <= set(body)
    return body


def field(body: dict[str, object]) -> tuple[str, str]:
    """(field, mend) of the only error."""
    errors = cast("list[dict[str, str]]", body["errors"])
    assert len(errors) == 1, errors
    return errors[0]["field"], errors[0].get("mend", "")


def test_submit_show_and_list(api: Api, member: User) -> None:
    with api.as_user(member) as client:
        made = client.post("/jobs", json=spec(name="first"))
        assert made.status_code == 201, made.text
        job = made.json()
        assert made.headers["location"] == f"/api/v1/jobs/{job['id']}"
        assert job["state"] == "queued" and job["trials"]["budget"] == 4
        assert job["owner"] == "member@example.org"
        assert "no worker is running" in job["waiting"]
        assert client.get(f"/jobs/{job['id']}").json()["id"] == job["id"]
        for number in range(3):
            assert client.post("/jobs", json=spec(name=f"more {number}")).status_code == 201
        first = client.get("/jobs", params={"limit": 3}).json()
        second = client.get("/jobs", params={"limit": 3, "cursor": first["next"]}).json()
        names = [job["name"] for job in first["items"] + second["items"]]
        assert names == ["more 2", "more 1", "more 0", "first"] and second["next"] is None
        assert len(client.get("/jobs", params={"q": "MORE"}).json()["items"]) == 3
        assert client.get("/jobs", params={"state": "paused"}).json()["items"] == []
        assert field(problem(client.get("/jobs", params={"cursor": "x"}), 422))[0] == "cursor"


def test_submit_is_idempotent(api: Api, member: User, admin: User) -> None:
    key = {"Idempotency-Key": str(uuid.uuid4())}
    with api.as_user(member) as client, api.as_user(admin) as other:
        first = client.post("/jobs", json=spec(), headers=key)
        again = client.post("/jobs", json=spec(), headers=key)
        assert (first.status_code, again.status_code) == (201, 200)
        assert first.json()["id"] == again.json()["id"]
        assert again.headers["location"] == first.headers["location"]
        different = problem(client.post("/jobs", json=spec(trials=5), headers=key), 409)
        assert "different job" in str(different["detail"])
        # a key belongs to its user
        assert other.post("/jobs", json=spec(), headers=key).status_code == 201
        assert len(client.get("/jobs", params={"mine": True}).json()["items"]) == 1


def test_another_members_job(
    api: Api, member: User, admin: User, make_user: Callable[..., User]
) -> None:
    stranger, viewer = make_user(), make_user(role="viewer")
    with (
        api.as_user(member) as mine,
        api.as_user(stranger) as theirs,
        api.as_user(admin) as operator,
        api.as_user(viewer) as looking,
    ):
        public = mine.post("/jobs", json=spec()).json()["id"]
        private = mine.post("/jobs", json=spec(private=True)).json()["id"]
        assert theirs.get(f"/jobs/{public}").status_code == 200
        problem(theirs.post(f"/jobs/{public}/pause"), 403)
        problem(theirs.patch(f"/jobs/{public}", json={"priority": 3}), 403)
        problem(theirs.post(f"/jobs/{public}/chat", json={"prompt": "hello"}), 403)
        for path in (
            "",
            "/trials",
            "/front",
            "/methods",
            "/events",
            "/log",
            "/artifacts",
            "/trials/0",
        ):
            problem(theirs.get(f"/jobs/{private}{path}"), 404)
        problem(theirs.post(f"/jobs/{private}/cancel"), 404)
        problem(theirs.post(f"/jobs/{private}/trials/0/artifacts", json={}), 404)
        assert {job["id"] for job in theirs.get("/jobs").json()["items"]} == {public}
        assert operator.get(f"/jobs/{private}").status_code == 200
        assert "viewer" in str(problem(looking.post("/jobs", json=spec()), 403)["detail"])
        assert looking.get(f"/jobs/{public}").status_code == 200


def test_pause_resume_cancel_and_change(api: Api, member: User) -> None:
    with api.as_user(member) as client:
        job = client.post("/jobs", json=spec()).json()["id"]
        assert client.post(f"/jobs/{job}/pause").json()["state"] == "paused"
        assert client.post(f"/jobs/{job}/resume").json()["state"] == "queued"
        wanted = {"trials": 9, "priority": 2, "parallelism": 2, "name": "renamed"}
        changed = client.patch(f"/jobs/{job}", json=wanted).json()
        assert changed["trials"]["budget"] == 9 and changed["name"] == "renamed"
        assert (changed["priority"], changed["parallelism"]) == (2, 2)
        problem(client.patch(f"/jobs/{job}", json={}), 422)
        unknown = problem(client.patch(f"/jobs/{job}", json={"trails": 5}), 422)
        assert field(unknown) == ("trails", "Did you mean `trials`? Otherwise remove it.")
        assert client.post(f"/jobs/{job}/cancel").json()["state"] == "cancelled"
        problem(client.post(f"/jobs/{job}/resume"), 409)
        problem(client.patch(f"/jobs/{job}", json={"trials": 20}), 409)


WRONG: list[tuple[dict[str, object], str, str]] = [
    ({"trials": 0}, "trials", "Send 1 or more."),
    ({"trials": 10**9}, "trials", "Send 10000 or less."),
    ({"trials": 10**40}, "trials", "Send 10000 or less."),
    ({"trials": "many"}, "trials", "Send a whole number."),
    ({"trials": 1.5}, "trials", "Send a whole number."),
    ({"trails": 4}, "trails", "Did you mean `trials`? Otherwise remove it."),
    ({"prompts": {"harmfull": "x"}}, "prompts.harmfull", "Did you mean `harmful`?"),
    ({"prompts": {"harmful": "none"}}, "prompts.harmful", ""),
    ({"model": "../etc/passwd"}, "model", ""),
    ({"model": "file:///etc/passwd"}, "model", ""),
    ({"model": "nowhere"}, "model", ""),
    ({"model": None}, "model", "Send text in quotes."),
    ({"methods": []}, "methods", "Send at least 1 entries."),
    ({"methods": ["mpoa", "magic"]}, "methods.1", "Use one of 'mpoa', 'mpoa_columns',"),
    ({"methods": "mpoa"}, "methods", "Send a list."),
    ({"method": "search"}, "method", "Did you mean `methods`? Otherwise remove it."),
    ({"objectives": ["refusals"]}, "objectives", "Send at least 2 entries."),
    ({"objectives": ["refusals", "refusals"]}, "objectives", ""),
    ({"objectives": ["refusals", "judge"]}, "objectives", ""),
    ({"objectives": ["refusals", "kl"]}, "objectives.1", "Use one of 'refusals', 'log_odds',"),
    ({"scorers": ["harness"]}, "tasks", ""),
    ({"scorers": ["speed"]}, "scorers.0", "Use one of"),
    ({"device_map": "balanced"}, "device_map", "Use one of 'single', 'auto' or 'offload'."),
    ({"startup_trials": 9}, "startup_trials", ""),
    ({"sampler": "dice"}, "sampler", "Use one of 'tpe', 'nsga3', 'cmaes' or 'qnehvi'."),
    ({"screening": "perhaps"}, "screening", "Send true or false."),
    ({"warm_start": 2}, "warm_start", "Send true or false."),
    ({"private": "perhaps"}, "private", "Send true or false."),
    ({"name": "\x00"}, "name", ""),
]


def test_wrong_fields_are_named(api: Api, member: User) -> None:
    with api.as_user(member) as client:
        for changes, name, mend in WRONG:
            found = field(problem(client.post("/jobs", json=spec(**changes)), 422))
            assert found[0] == name, changes
            assert found[1].startswith(mend), changes
        assert client.get("/jobs").json()["items"] == []


def test_what_is_no_job_at_all(api: Api, member: User) -> None:
    headers = {"Content-Type": "application/json"}
    with api.as_user(member) as client:
        for body in (b"", b"{", b"[]", b"null", b'{"model":', b"\xff\xfe"):
            problem(client.post("/jobs", content=body, headers=headers), 422)
        problem(client.post("/jobs", content=b"[" * 100_000, headers=headers), 400)


def test_text_that_postgresql_cannot_hold(api: Api, member: User) -> None:
    headers = {"Content-Type": "application/json"}
    with api.as_user(member) as client:
        for hidden in ("\x00", "\ud800"):
            body = json.dumps(spec(markers=[f"a{hidden}b"])).encode()
            made = client.post("/jobs", content=body, headers=headers)
            assert made.status_code in (201, 422), made.text
            assert r"\u0000" not in made.text and r"\ud800" not in made.text
            assert client.get("/jobs", params={"q": hidden.encode("utf-8", "replace")}).is_success


def test_quota_and_disk_reserve(
    make_settings: Callable[..., Settings], sessions: Sessions, member: User
) -> None:
    seed_prompts(sessions)
    with serve(make_settings(max_running=1), sessions) as api, api.as_user(member) as client:
        assert client.post("/jobs", json=spec()).status_code == 201
        full = client.post("/jobs", json=spec())
        problem(full, 429)
        assert full.headers["retry-after"]
    with (
        serve(make_settings(disk_reserve_bytes=2**60), sessions) as api,
        api.as_user(member) as client,
    ):
        assert "reserve" in str(problem(client.post("/jobs", json=spec()), 507)["detail"])


def test_trials_front_and_picks(api: Api, member: User, sessions: Sessions) -> None:
    with api.as_user(member) as client:
        job = client.post("/jobs", json=spec(trials=3)).json()["id"]
        held = claim(sessions, api.settings)
        for refusals, kl in ((5, 0.01), (6, 0.02), (1, 0.5)):
            score(sessions, held, refusals, kl)
        page = client.get(f"/jobs/{job}/trials", params={"limit": 2}).json()
        assert [trial["number"] for trial in page["items"]] == [0, 1]
        rest = client.get(f"/jobs/{job}/trials", params={"after": page["next"]}).json()
        assert [trial["number"] for trial in rest["items"]] == [2] and rest["next"] is None
        front = client.get(f"/jobs/{job}/front").json()["items"]
        assert [trial["number"] for trial in front] == [2, 0]
        assert [trial["on_front"] for trial in page["items"]] == [True, False]
        trial = client.get(f"/jobs/{job}/trials/0").json()
        assert trial["search"]["refusals"] == 5 and trial["search"]["interval"][0] > 0.3
        answers = trial["responses"]["search"]
        assert [answer["refused"] for answer in answers] == [True] * 5 + [False] * 3
        assert answers[0]["prompt"].startswith("asked ") and answers[7]["text"] == "answer 7"
        assert client.post(f"/jobs/{job}/trials/0/pick").json()["picked"] is True
        unpicked = client.post(f"/jobs/{job}/trials/0/pick", json={"picked": False})
        assert unpicked.json()["picked"] is False
        problem(client.get(f"/jobs/{job}/trials/77"), 404)
        problem(client.post(f"/jobs/{job}/trials/77/pick"), 404)
        shown = client.get(f"/jobs/{job}").json()
        assert shown["best"]["number"] == 2 and shown["front_size"] == 2


def test_methods_side_by_side(api: Api, member: User, sessions: Sessions) -> None:
    wanted = spec(trials=5, methods=["mpoa", "ara", "deccp"], scorers=["length"])
    with api.as_user(member) as client:
        job = client.post("/jobs", json=wanted).json()
        assert job["spec"]["methods"] == ["mpoa", "ara", "deccp"]
        path = f"/jobs/{job['id']}"
        before = client.get(f"{path}/methods").json()["items"]
        assert [each["method"] for each in before] == ["mpoa", "ara", "deccp"]
        assert [each["budget"] for each in before] == [2, 2, 1]
        assert all(each["best"] is None and each["hypervolume"] is None for each in before)
        held = claim(sessions, api.settings)
        for refusals, kl in ((8, 0.01), (4, 0.02), (2, 0.05), (0, 0.05)):
            score(sessions, held, refusals, kl)
        found = {each["method"]: each for each in client.get(f"{path}/methods").json()["items"]}
        assert [found[name]["complete"] for name in ("deccp", "mpoa", "ara")] == [1, 2, 1]
        best = found["mpoa"]["best"]
        assert best["number"] == 3 and best["search"]["interval"][0] == 0.0
        assert best["search"]["kl_multi"] == 0.05 and best["heldout"] is None
        assert found["ara"]["title"] == "ARA" and found["ara"]["seconds"] == 1.0
        shown = client.get(f"{path}/trials/2").json()
        assert (shown["method"], shown["search"]["values"]) == ("ara", {})
        problem(client.get(f"/jobs/{uuid.uuid4()}/methods"), 404)
        few = client.patch(path, json={"trials": 2})
        assert field(problem(few, 422))[0] == "trials"


def test_chat_makes_a_task(api: Api, member: User, sessions: Sessions) -> None:
    with api.as_user(member) as client:
        job = client.post("/jobs", json=spec(trials=1)).json()["id"]
        whole_job(sessions, api.settings, [0])
        answer = client.post(f"/jobs/{job}/chat", json={"prompt": "Hello?", "trial": 0})
        assert answer.status_code == 202
        held = claim(sessions, api.settings)
        assert str(held.task.id) == answer.json()["task"] and held.task.kind == "chat"
        assert held.task.payload["prompts"] == ["Hello?"] and held.task.payload["number"] == 0
        problem(client.post(f"/jobs/{job}/chat", json={"prompt": "Hello?", "trial": 9}), 404)
        problem(client.post(f"/jobs/{job}/chat", json={"prompt": ""}), 422)


def test_estimate_names_the_model(api: Api, member: User) -> None:
    with api.as_user(member) as client:
        assert (
            field(problem(client.post("/estimate", json={"model": "nowhere"}), 422))[0] == "model"
        )


def test_workers(api: Api, member: User, sessions: Sessions) -> None:
    with api.as_user(member) as client:
        assert client.get("/workers").json() == []
        client.post("/jobs", json=spec())
        claim(sessions, api.settings)
        (worker,) = client.get("/workers").json()
        assert worker["live"] is True and worker["device"]["kind"] == "cpu"
        with sessions.begin() as session:
            session.execute(text("UPDATE workers SET last_seen_at = now() - interval '2 minutes'"))
        assert client.get("/workers").json()[0]["live"] is False
