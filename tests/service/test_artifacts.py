"""Artifacts: asked for once, published when ready, never outside their folder."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import artifacts, control, queue, trials
from jobs.database import Sessions
from jobs.problems import Conflict, Forbidden, Invalid, NotFound
from jobs.settings import Settings
from jobs.spec.protocol import Exported, ExportedFile
from jobs.tables import Job, User
from tests.service.builders import CANDIDATE, add_job, add_worker, scored


@pytest.fixture
def job(sessions: Sessions, owner: User, farm: Settings) -> Job:
    """A job with one complete trial; trial 1 has only been begun. No task is left to be claimed."""
    with sessions.begin() as session:
        job = add_job(session, owner, farm, trials=2, private=True)
        worker = add_worker(session)
    with sessions.begin() as session:
        held = queue.claim(session, worker, farm)
        assert held is not None
        trials.reserve(session, held.task, held.token, 2)
        trials.begin(session, held.task, held.token, 0, CANDIDATE, {}, "single_pass", None)
        trials.complete(session, held.task, held.token, 0, scored())
    return job


def claim(sessions: Sessions, settings: Settings) -> queue.Claim:
    with sessions.begin() as session:
        held = queue.claim(session, add_worker(session), settings)
        assert held is not None
        return held


def test_asked_for_twice_made_once(
    sessions: Sessions, owner: User, farm: Settings, job: Job
) -> None:
    with sessions.begin() as session:
        first = artifacts.request(session, owner, job, 0, "adapter")
        assert artifacts.request(session, owner, job, 0, "adapter").id == first.id
        assert artifacts.request(session, owner, job, 0, "adapter", rank=16).id != first.id
        merged = artifacts.request(session, owner, job, 0, "merged", rank=4)
        assert (merged.rank, first.rank) == (None, 8)
        assert len(artifacts.list_for_job(session, job.id)) == 3
        with pytest.raises(Conflict):
            artifacts.request(session, owner, job, 1, "merged")
        with pytest.raises(NotFound):
            artifacts.request(session, owner, job, 7, "merged")
        with pytest.raises(Invalid):
            artifacts.request(session, owner, job, 0, "zip")  # type: ignore[arg-type]
        with pytest.raises(Invalid):
            artifacts.request(session, owner, job, 0, "lora", rank=0)


def test_an_edit_that_no_adapter_holds_is_merged(
    sessions: Sessions, owner: User, farm: Settings, job: Job
) -> None:
    with sessions.begin() as session:
        trial = trials.get(session, job.id, 0)
        trial.candidate = {**trial.candidate, "router": {"experts": 2, "bias": 1.0}}
        for kind in ("adapter", "lora"):
            with pytest.raises(Invalid) as refused:
                artifacts.request(session, owner, job, 0, kind)
            assert refused.value.field == "kind" and "merged" in str(refused.value)
        assert artifacts.request(session, owner, job, 0, "merged").kind == "merged"


def test_only_those_who_may(
    sessions: Sessions, owner: User, make_user: Callable[..., User], job: Job
) -> None:
    other = make_user()
    with sessions.begin() as session:
        artifact = artifacts.request(session, owner, job, 0, "merged")
        with pytest.raises(NotFound):
            artifacts.get(session, other, artifact.id)
        with pytest.raises(NotFound):
            artifacts.request(session, other, job, 0, "merged")
        session.get_one(Job, job.id).private = False
        session.flush()
        assert artifacts.get(session, other, artifact.id).id == artifact.id
        with pytest.raises(Forbidden):
            artifacts.request(session, other, session.get_one(Job, job.id), 0, "merged")


def test_made_and_published(sessions: Sessions, owner: User, farm: Settings, job: Job) -> None:
    with sessions.begin() as session:
        artifact = artifacts.request(session, owner, job, 0, "merged")
    held = claim(sessions, farm)
    assert held.task.payload["artifact"] == str(artifact.id) and held.task.payload["number"] == 0
    exported = Exported(
        files=[
            ExportedFile(name="model.safetensors", size=7, sha256="ab"),
            ExportedFile(name="sub/config.json", size=2, sha256="cd"),
        ],
        measured={"search": scored().scores},
        truncation_error=0.5,
    )
    with sessions.begin() as session:
        artifacts.mark_running(session, held.task, held.token, artifact.id)
        artifacts.mark_ready(session, held.task, held.token, artifact.id, exported)
        artifacts.mark_ready(session, held.task, held.token, artifact.id, exported)
        queue.release(session, held.task.id, held.token, state="done")
    with sessions.begin() as session:
        made = artifacts.get(session, owner, artifact.id)
        assert (made.state, made.size, made.truncation_error) == ("ready", 9, 0.5)
        assert made.measured is not None and made.measured["search"]["refusals"] == 1
        assert [f.name for f in artifacts.files(session, made.id)] == [
            "model.safetensors",
            "sub/config.json",
        ]
        assert artifacts.request(session, owner, job, 0, "merged").id == made.id


@pytest.mark.parametrize("marked", [True, False])
def test_a_failed_export_can_be_asked_for_again(
    sessions: Sessions, owner: User, farm: Settings, job: Job, marked: bool
) -> None:
    with sessions.begin() as session:
        artifact = artifacts.request(session, owner, job, 0, "merged")
    held = claim(sessions, farm)
    error = {"reason": "disk_full", "message": "No room.", "mend": "Make room"}
    with sessions.begin() as session:
        if marked:
            artifacts.mark_failed(session, held.task, held.token, artifact.id, error)
        queue.release(session, held.task.id, held.token, state="failed", error=error)
    with sessions.begin() as session:
        failed = artifacts.get(session, owner, artifact.id)
        assert (failed.state, failed.error) == ("failed", error)
        # the search goes on: an export's failure is not the job's
        assert control.visible(session, owner, job.id).state == "running"
        assert artifacts.request(session, owner, job, 0, "merged").id != artifact.id


def test_a_name_never_leads_outside(farm: Settings) -> None:
    number = uuid.uuid4()
    folder = artifacts.folder(farm, number)
    (folder / "sub").mkdir(parents=True)
    (farm.data / "secret").write_text("x")
    (folder / "link").symlink_to(farm.data / "secret")
    (folder / "a..b").write_text("x")
    assert artifacts.path(farm, number, "sub/x.json") == folder / "sub" / "x.json"
    assert artifacts.path(farm, number, "a..b") == folder / "a..b"
    for name in ("", ".", "..", "../x", "sub/../../x", "/etc/passwd", "a\x00", "..\\x", "link"):
        with pytest.raises(NotFound):
            artifacts.path(farm, number, name)


@given(name=st.text(alphabet="./\\a\x00 ~%é", max_size=12))
def test_no_text_leads_outside(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    base = Settings.model_construct(data=tmp_path_factory.getbasetemp() / "artifact-names")
    number = uuid.UUID(int=1)
    try:
        found = artifacts.path(base, number, name)
    except NotFound:
        return
    assert found.resolve().is_relative_to(artifacts.folder(base, number).resolve())
    assert found != artifacts.folder(base, number)
