"""The same job twice, each with an engine of its own: the same trials and the same bytes."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import artifacts, prompts, submit, trials
from jobs.database import Sessions
from jobs.settings import Settings
from jobs.spec.job import JobSpec
from jobs.tables import Artifact, Job, User
from tests.service.processes import ring_for, wait_until, worker

SPEC = {
    "model": "demo", "device": "cpu", "quantization": "none", "seed": 5,
    "startup_trials": 2, "max_new_tokens": 20, "warm_start": False,
    "prompts": {"direction": 40, "search": 12, "heldout": 8},
}  # fmt: skip


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("threads", "methods", "count"), [(1, ["mpoa", "ara"], 8), (2, ["mpoa"], 14)]
)
def test_the_same_seed_gives_the_same_trials_and_files(
    make_settings: Callable[..., Settings],
    sessions: Sessions,
    member: User,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    threads: int,
    methods: list[str],
    count: int,
) -> None:
    """One after the other, and side by side, where it depends on who is faster what ends first."""
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    spec = JobSpec.model_validate({**SPEC, "methods": methods, "trials": count})
    settings = make_settings(reconcile_seconds=0.5)
    with sessions.begin() as session:
        prompts.ensure_builtin(session)
    with worker(settings, tmp_path, NULLSPACE_LINGER_SECONDS="0"):
        first, second = (_run(sessions, settings, member, spec) for _ in range(2))
    assert len(first[0]) == count and {row["method"] for row in first[0]} == set(methods)
    assert first[0] == second[0]
    assert first[1] == second[1] and "model.safetensors" in first[1]


def _run(
    sessions: Sessions, settings: Settings, member: User, spec: JobSpec
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A job to its end and one export: its trials, and the hashes of the files."""
    with sessions.begin() as session:
        owner = session.get_one(User, member.id)
        job, _ = submit.submit(session, owner, spec, settings)
    ring_for(sessions, settings, job.id)

    def ended() -> bool:
        with sessions() as session:
            return session.get_one(Job, job.id).state in ("completed", "failed")

    wait_until(ended, 180)
    with sessions.begin() as session:
        owner, mine = session.get_one(User, member.id), session.get_one(Job, job.id)
        assert mine.state == "completed", mine.error
        asked = artifacts.request(session, owner, mine, 3, "merged").id
    ring_for(sessions, settings, job.id)

    def made() -> bool:
        with sessions() as session:
            return session.get_one(Artifact, asked).state in ("ready", "failed")

    wait_until(made, 120)
    with sessions() as session:
        assert session.get_one(Artifact, asked).state == "ready"
        # the card and the manifest name the job
        hashes = {
            file.name: file.sha256
            for file in artifacts.files(session, asked)
            if file.name not in ("README.md", "SHA256SUMS")
        }
        return [_facts(session, job.id, row) for row in trials.list_trials(session, job.id)], hashes


def _facts(session: Any, job_id: uuid.UUID, row: Any) -> dict[str, Any]:
    """All that a trial is, but for its times."""
    said = trials.responses(session, job_id, row.number)
    names = ("number", "method", "origin", "params", "candidate", "refusals", "total", "kl_first",
             "kl_multi", "mean_tokens", "values", "heldout")  # fmt: skip
    return {name: getattr(row, name) for name in names} | {
        "said": {role: [o.model_dump() for o in outcomes] for role, outcomes in said.items()}
    }
