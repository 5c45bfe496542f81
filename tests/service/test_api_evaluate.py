"""Kinds of jobs and benchmarks of trials over HTTP."""

from __future__ import annotations

import uuid

from jobs import benchmarks, trials
from jobs.database import Sessions
from jobs.settings import Settings
from jobs.spec.scores import Value
from jobs.tables import User
from tests.service.api_server import Api, api, spec
from tests.service.api_worker import claim, finish, whole_job
from tests.service.builders import scored
from tests.service.test_api_jobs import field, problem

__all__ = ["api"]


def figures(share: float) -> dict[str, Value]:
    return {"sums.acc": Value(value=share, low=share - 0.1, high=share + 0.1, n=9)}


def test_kinds_at_submit(api: Api, member: User) -> None:
    plain = spec()
    named = {"model": plain["model"], "prompts": plain["prompts"]}
    with api.as_user(member) as client:
        wrong = client.post("/jobs", json={**named, "kind": "evaluate", "trials": 5})
        assert field(problem(wrong, 422)) == ("trials", "Leave it out.")
        wrong = client.post("/jobs", json={**named, "original": plain["model"]})
        assert field(problem(wrong, 422)) == ("original", "Leave it out.")
        wrong = client.post("/jobs", json={"model": plain["model"], "kind": "benchmark"})
        assert field(problem(wrong, 422))[0] == "tasks"
        wrong = client.post("/jobs", json={**named, "kind": "evaluate", "original": "nowhere"})
        assert field(problem(wrong, 422))[0] == "original"
        wrong = client.post("/jobs", json={**named, "kind": "compare"})
        assert field(problem(wrong, 422))[0] == "kind"
        made = client.post("/jobs", json={**named, "kind": "evaluate"}).json()
        assert made["kind"] == "evaluate" and made["trials"]["budget"] == 0
        assert made["result"] is None and made["position"] == 0
        # what the server shows as the specification may be submitted again
        assert client.post("/jobs", json=made["spec"]).status_code == 201
        bench = {"model": plain["model"], "kind": "benchmark", "tasks": ["sums"]}
        assert client.post("/jobs", json=bench).status_code == 201, "no prompt sets are needed"
        assert len(client.get("/jobs", params={"kind": "evaluate"}).json()["items"]) == 2
        assert field(problem(client.get("/jobs", params={"kind": "x"}), 422))[0] == "kind"
        job = f"/jobs/{made['id']}"
        for change in ({"trials": 9}, {"parallelism": 2}):
            assert "searches nothing" in str(problem(client.patch(job, json=change), 409))
        assert client.patch(job, json={"priority": 2}).json()["priority"] == 2
        assert client.get(f"{job}/trials").json()["items"] == []
        assert client.get(f"{job}/methods").json()["items"] == []
        assert client.get(f"{job}/front").json()["items"] == []
        assert client.get(f"{job}/answers").json() == {"responses": {}}
        assert problem(client.get(f"{job}/trials/0"), 404)
        assert client.post(f"{job}/cancel").json()["state"] == "cancelled"
        for kind in ({"kind": "benchmark", "tasks": ["sums"]}, {"kind": "evaluate"}):
            estimated = client.post("/estimate", json={"model": "demo", **kind})
            assert estimated.status_code == 200, estimated.text


def test_benchmarks_of_a_trial(
    api: Api, member: User, admin: User, sessions: Sessions, settings: Settings
) -> None:
    with api.as_user(member) as client:
        job = client.post("/jobs", json=spec(trials=2)).json()["id"]
        trial = f"/jobs/{job}/trials/0/benchmarks"
        assert problem(client.post(trial, json={"tasks": ["sums"]}), 404)
        whole_job(sessions, settings, [2, 1])
        for body, named in (
            ({"tasks": []}, "tasks"), ({"tasks": ["a b"]}, "tasks"),
            ({"tasks": ["a"], "limit": 0}, "limit"), ({}, "tasks"),
        ):  # fmt: skip
            assert field(problem(client.post(trial, json=body), 422))[0] == named
        asked = client.post(trial, json={"tasks": ["sums"], "limit": 9})
        assert asked.status_code == 202 and asked.json()["state"] == "ready"
        other = client.post(trial, json={"tasks": ["words"]}).json()["id"]
        stopped = client.post(f"/jobs/{job}/benchmarks/{other}/stop")
        assert stopped.json()["state"] == "cancelled"
        assert problem(client.post(f"/jobs/{job}/benchmarks/{uuid.uuid4()}/stop"), 404)
        held = claim(sessions, settings)
        with sessions.begin() as session:
            heldout = scored(role="heldout")
            trials.store_rescored(session, held.task, held.token, 0, "heldout", heldout)
        assert str(held.task.id) == asked.json()["id"]
        with sessions.begin() as session:
            benchmarks.store(session, held.task, held.token, (0, "sums", 9), figures(0.5))
        finish(sessions, held)
        found = client.get(f"/jobs/{job}/trials/0").json()["heldout"]["values"]
        assert found["harness.sums.acc"]["value"] == 0.5 and found["harness.sums.acc"]["n"] == 9
        states = [item["state"] for item in client.get(trial).json()["items"]]
        assert states == ["done", "cancelled"]
        assert client.get(f"/jobs/{job}").json()["state"] == "completed"
    with api.as_user(admin) as client:
        assert client.post(trial, json={"tasks": ["sums"]}).status_code == 202
    with api.with_token(None) as client:
        assert problem(client.post(trial, json={"tasks": ["sums"]}), 401)
