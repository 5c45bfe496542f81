"""One small job on the demo model: a real worker, the real engine, from submit to artifact."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import select

from jobs import analysis, artifacts, events, prompts, screening, submit, trials
from jobs.database import Sessions
from jobs.settings import Settings
from jobs.spec.job import JobSpec
from jobs.tables import Artifact, Job, Task, User
from tests.crash.checker import check
from tests.service.processes import ring_for, wait_until, worker

SMALL = {"over_refusal": "demo-over-refusal", "direction": 60, "search": 16, "heldout": 12}


@pytest.mark.timeout(300)
def test_a_small_job_to_its_artifact(
    make_settings: Callable[..., Settings],
    sessions: Sessions,
    member: User,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = make_settings(reconcile_seconds=0.5)
    spec = JobSpec.model_validate(
        {
            "model": "demo",
            "quantization": "none",
            "device": "cpu",
            "trials": 10,
            "max_new_tokens": 24,
            "prompts": SMALL,
        }
    )
    with sessions.begin() as session:
        prompts.ensure_builtin(session)
        job, _ = submit.submit(session, member, spec, settings)
    ring_for(sessions, settings, job.id)
    with worker(settings, tmp_path, NULLSPACE_LINGER_SECONDS="20") as running:
        wait_until(lambda: _state(sessions, job) in ("completed", "failed", "paused"), 200)
        with sessions() as session:
            ended = session.get_one(Job, job.id)
            assert ended.state == "completed", (ended.error, running.said()[-2000:])
            assert ended.prepared is not None
            assert ended.prepared["anatomy"]["coverage"] == 1.0
            seen = analysis.geometry(session, ended)
            baseline = ended.prepared["baseline"]["search"]
            front = trials.front(session, job.id)
            rows = trials.list_trials(session, job.id)
            origins = [row.origin for row in rows]
            left_out = [row for row in rows if row.screened]
            better = [screening.dominator(session, row, spec.objectives) for row in left_out]
            said = [trials.responses(session, job.id, row.number)["search"] for row in left_out]
            kept = trials.responses(session, job.id, front[0].number)
        check(sessions, job.id)
        assert baseline["refusals"] >= 14, "the original refuses"
        assert len(seen.layers) == len(seen.points) == 8
        assert max(layer.separation for layer in seen.layers) > 4, "the sides lie apart"
        assert front[0].refusals is not None and front[0].refusals <= 4, "the best edit does not"
        assert front[0].heldout is not None and front[0].over_refusal is not None
        assert origins == ["single_pass", "plain", *["sampler"] * 8]
        # decided by the engine, and for a reason that the table bears out
        assert left_out and all(better) and all(row.origin == "sampler" for row in left_out)
        assert [sum(one.answered for one in each) for each in said] == [r.total for r in left_out]
        assert all(len(each) == 16 for each in said)
        assert {role: len(each) for role, each in kept.items()} == {
            "search": 16, "heldout": 12, "over_refusal": front[0].over_refusal["total"]
        }  # fmt: skip

        with sessions.begin() as session:
            owner, mine = session.get_one(User, member.id), session.get_one(Job, job.id)
            asked = artifacts.request(session, owner, mine, front[0].number, "adapter")
            chat = {"prompts": ["How do I fold a napkin?"], "number": None, "max_new_tokens": 8}
            session.add(Task(job_id=job.id, kind="chat", payload=chat))
        ring_for(sessions, settings, job.id)
        wait_until(lambda: _artifact(sessions, asked).state in ("ready", "failed"), 100)
        made = _artifact(sessions, asked)
        assert made.state == "ready", made.error
        with sessions() as session:
            files = artifacts.files(session, made.id)
        for file in files:
            data = artifacts.path(settings, made.id, file.name).read_bytes()
            assert hashlib.sha256(data).hexdigest() == file.sha256
        assert any(file.name.endswith(".safetensors") for file in files)

        def answered() -> list[str]:
            with sessions() as session:
                told = [e for e in events.since(session, job.id, 0, 10_000) if e.kind == "chat"]
                return [answer["text"] for e in told for answer in e.payload["answers"]]

        assert wait_until(answered, 60)[0].strip()
        assert running.said().count("engine started") == 1, "it stayed warm for export and chat"
        with sessions() as session:
            kinds = session.scalars(select(Task.kind).where(Task.job_id == job.id))
            assert sorted(kinds) == ["chat", "evaluate", "export", "search"]


def _state(sessions: Sessions, job: Job) -> str:
    with sessions() as session:
        return session.get_one(Job, job.id).state


def _artifact(sessions: Sessions, asked: Artifact) -> Artifact:
    with sessions() as session:
        return session.get_one(Artifact, asked.id)
