"""The schema as migrated is the schema of the tables."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from typing import Any

import optuna
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, inspect, text

import migrations
from jobs import trials
from jobs.database import connect, session_factory
from jobs.spec.candidate import Ablation, parse
from jobs.spec.job import JobSpec
from jobs.tables import Base, Job, Trial
from tests.servers import Servers
from worker.study import open_storage


def test_migrated_schema_equals_tables(engine: Engine) -> None:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        difference = compare_metadata(context, Base.metadata)
        assert [d for d in difference if "alembic_version" not in str(d)] == []
        assert "optuna" in inspect(connection).get_schema_names()
        assert connection.execute(text("SELECT nextval('lease_tokens')")).scalar_one() == 1


def test_upgrade_from_nothing_and_current(running_servers: Servers) -> None:
    with running_servers.database(migrated=False) as url:
        assert migrations.current(url) is None
        migrations.upgrade(url)
        assert migrations.current(url) == migrations.head()
        migrations.upgrade(url)  # nothing left to do


def test_several_upgrades_at_once(running_servers: Servers) -> None:
    """Containers that start together; processes, because Alembic's context is one per process."""
    command = [sys.executable, "-c", "import sys, migrations; migrations.upgrade(sys.argv[1])"]
    with running_servers.database(migrated=False) as url:
        started = [subprocess.Popen([*command, url]) for _ in range(3)]
        assert [process.wait(60) for process in started] == [0, 0, 0]
        assert migrations.current(url) == migrations.head()


def test_downgrade_leaves_nothing(running_servers: Servers) -> None:
    with running_servers.database(migrated=False) as url:
        migrations.upgrade(url)
        migrations.downgrade(url, "base")
        engine = connect(url, pool_size=1)
        with engine.connect() as connection:
            assert inspect(connection).get_table_names() == ["alembic_version"]
            assert "optuna" not in inspect(connection).get_schema_names()
        engine.dispose()


# What revision 0001 wrote for a search over two modes, and for a single pass.
OLD_SPEC: dict[str, Any] = {
    "name": "", "model": "demo", "revision": None, "method": "search", "quantization": "bnb_4bit",
    "dtype": "auto", "device": "auto",
    "prompts": {
        "harmful": "demo-refused", "harmless": "demo-answered", "over_refusal": None,
        "direction": 400, "search": 100, "heldout": 100,
    },
    "system_prompt": None, "trials": 30, "startup_trials": None, "modes": ["columns", "full"],
    "projected": True, "max_new_tokens": 100, "kl_tokens": 16, "markers": ["no"], "seed": 3,
    "priority": 0, "parallelism": 1, "private": False,
}  # fmt: skip
KERNEL = {"max_weight": 1.2, "min_weight": 0.3, "position": 5.0, "distance": 3.0}
OLD_CANDIDATE = {
    "mode": "columns", "projected": True, "scope": "global", "index": 4.5,
    "attention": KERNEL, "mlp": KERNEL,
}  # fmt: skip
OLD_TRIALS: list[dict[str, Any]] = [
    {**OLD_CANDIDATE},
    {**OLD_CANDIDATE, "mode": "full"},
    {**OLD_CANDIDATE, "mode": "full", "projected": False},
    {},  # reserved, not begun
]


def old_params(candidate: dict[str, Any]) -> dict[str, Any]:
    """A point of the space of 0001 over two modes; {} where there is none yet."""
    return {"mode": candidate["mode"], "index": candidate["index"]} if candidate else {}


INSERT_USER = """INSERT INTO users (id, email, name, role, weight, disabled)
    VALUES (:id, 'a@example.org', '', 'member', 1, false)"""
INSERT_JOB = """INSERT INTO jobs (id, owner_id, name, model, spec, prompts, state, desired_state,
        trials, priority, parallelism, private, progress, event_seq)
    VALUES (:id, :user, '', 'demo', CAST(:spec AS jsonb), '{}', 'paused', 'pause',
        30, 0, 1, false, '{}', 0)"""
INSERT_TRIAL = """INSERT INTO trials (id, job_id, number, state, origin, params, candidate,
        optuna_number, refusals, total, kl_first, picked)
    VALUES (:id, :job, :number, :state, 'sampler', CAST(:params AS jsonb),
        CAST(:candidate AS jsonb), :number, :number, 10, 0.1, false)"""


def test_rows_of_0001_are_read_by_this_version(running_servers: Servers) -> None:
    with running_servers.database(migrated=False) as url:
        migrations.upgrade(url, "0001")
        engine = connect(url, pool_size=1)
        user, searched, single = uuid.uuid4(), uuid.uuid4(), uuid.uuid4()
        once = {**OLD_SPEC, "method": "single_pass", "modes": ["none"]}
        with engine.begin() as connection:
            connection.execute(text(INSERT_USER), {"id": user})
            for job_id, spec in ((searched, OLD_SPEC), (single, once)):
                values = {"id": job_id, "user": user, "spec": json.dumps(spec)}
                connection.execute(text(INSERT_JOB), values)
                for number, candidate in enumerate(OLD_TRIALS):
                    row = {"id": uuid.uuid4(), "job": job_id, "number": number}
                    row["candidate"] = json.dumps(candidate)
                    row["state"] = "complete" if candidate else "running"
                    row["params"] = json.dumps(old_params(candidate))
                    connection.execute(text(INSERT_TRIAL), row)
        storage = open_storage(url, 30.0)
        name = f"job-{searched}"
        optuna.create_study(storage=storage, study_name=name, directions=["minimize"] * 2)

        migrations.upgrade(url)
        with session_factory(engine).begin() as session:
            found = JobSpec.model_validate(session.get_one(Job, searched).spec)
            assert found.methods == ["mpoa_columns", "mpoa"] and found.kind == "abliterate"
            assert (found.seed, found.markers) == (3, ["no"])
            assert found.objectives == ["refusals", "kl_first"]
            assert JobSpec.model_validate(session.get_one(Job, single).spec).methods == ["deccp"]
            rows = trials.list_trials(session, searched)
            assert [row.method for row in rows] == ["mpoa_columns", "mpoa", "raw"]
            assert [row.values for row in rows] == [{}] * 3
            # what is not in the space of a method must not be told to its study
            assert [row.params for row in rows] == [{"index": 4.5}] * 3
            # numbers in the old study mean nothing in the study of another method
            assert [row.optuna_number for row in rows] == [0, None, None]
            edits = [edit for row in rows if isinstance(edit := parse(row.candidate), Ablation)]
            projections = [edit.recipe.projection for edit in edits]
            assert projections == ["projected", "projected", "none"]
            assert edits[0].attention.model_dump() == KERNEL and edits[0].index == 4.5
            assert [row.number for row in trials.front(session, searched)] == [0]
            assert {row.method for row in trials.list_trials(session, single)} == {"deccp"}
            # with every field of today, as if it had been submitted after the upgrade
            session.get_one(Job, searched).spec = found.model_dump(mode="json")
        assert optuna.get_all_study_names(storage) == [f"{name}-mpoa_columns"]

        migrations.downgrade(url, "0001")
        with engine.connect() as connection:
            kept = connection.execute(text("SELECT id, spec FROM jobs")).all()
            assert {row.id: row.spec for row in kept} == {searched: OLD_SPEC, single: once | {
                "modes": ["full"]  # which mode a single pass had is not kept
            }}  # fmt: skip
            query = "SELECT candidate, params FROM trials WHERE job_id = :job ORDER BY number"
            stored = connection.execute(text(query), {"job": searched}).all()
            assert [row.candidate for row in stored] == OLD_TRIALS[:3]
            assert [row.params for row in stored] == list(map(old_params, OLD_TRIALS[:3]))
        assert optuna.get_all_study_names(storage) == [name]
        storage.engine.dispose()
        engine.dispose()


def test_geometry_moves_to_its_column_and_back(running_servers: Servers) -> None:
    kept: dict[str, Any] = {"layers": [], "points": []}
    stored = [{"batch_size": 4, "geometry": kept}, {"batch_size": 4, "geometry": None}, None]
    with running_servers.database(migrated=False) as url:
        migrations.upgrade(url, "0003")
        engine = connect(url, pool_size=1)
        user, jobs = uuid.uuid4(), [uuid.uuid4() for _ in stored]
        with engine.begin() as connection:
            connection.execute(text(INSERT_USER), {"id": user})
            for job, prepared in zip(jobs, stored, strict=True):
                connection.execute(text(INSERT_JOB), {"id": job, "user": user, "spec": "{}"})
                if prepared is not None:
                    connection.execute(
                        text("UPDATE jobs SET prepared = CAST(:it AS jsonb) WHERE id = :id"),
                        {"it": json.dumps(prepared), "id": job},
                    )
        migrations.upgrade(url, "0004")
        with engine.connect() as connection:
            query = text("SELECT geometry, prepared FROM jobs WHERE id = :id")
            rows = [connection.execute(query, {"id": job}).one() for job in jobs]
            assert [row.geometry for row in rows] == [kept, None, None]
            assert [row.prepared for row in rows] == [{"batch_size": 4}, {"batch_size": 4}, None]
        migrations.downgrade(url, "0003")
        with engine.connect() as connection:
            query = text("SELECT prepared FROM jobs WHERE id = :id")
            back = [connection.execute(query, {"id": job}).scalar_one() for job in jobs]
            assert back == [stored[0], {"batch_size": 4}, None]
        engine.dispose()


DEMO = JobSpec.model_validate({"model": "demo"}).model_dump(mode="json")


def with_job(url: str, revision: str, spec: dict[str, Any]) -> tuple[Engine, uuid.UUID]:
    """A database at `revision` that holds one job."""
    migrations.upgrade(url, revision)
    engine = connect(url, pool_size=1)
    user, job = uuid.uuid4(), uuid.uuid4()
    with engine.begin() as connection:
        connection.execute(text(INSERT_USER), {"id": user})
        values = {"id": job, "user": user, "spec": json.dumps(spec)}
        connection.execute(text(INSERT_JOB), values)
    return engine, job


INSERT_TASK = """INSERT INTO tasks (id, job_id, kind, state, payload, attempts, crashes)
    VALUES (:id, :job, :kind, 'ready', '{}', 0, 0)"""


def test_0002_has_no_results_and_no_benchmarks_of_trials(running_servers: Servers) -> None:
    with running_servers.database(migrated=False) as url:
        engine, job = with_job(url, "0002", DEMO)
        migrations.upgrade(url)
        with session_factory(engine).begin() as session:
            assert session.get_one(Job, job).result is None
            for kind in ("benchmark", "search"):
                values = {"id": uuid.uuid4(), "job": job, "kind": kind}
                session.execute(text(INSERT_TASK), values)
        migrations.downgrade(url, "0002")
        with engine.connect() as connection:
            assert "result" not in {c["name"] for c in inspect(connection).get_columns("jobs")}
            kinds = connection.execute(text("SELECT kind FROM tasks")).scalars()
            assert list(kinds) == ["search"], "what 0002 has no name for is gone"
        engine.dispose()


INSERT_SCORED = """INSERT INTO trials (id, job_id, number, state, method, origin, params, candidate,
        refusals, total, kl_first, picked, "values")
    VALUES (:id, :job, :number, 'complete', 'mpoa', 'sampler', '{}', '{}', 3, 100, 0.1, false,
        '{}')"""


def test_screened_trials_and_back(running_servers: Servers) -> None:
    with running_servers.database(migrated=False) as url:
        new = ("sampler", "screening", "warm_start")
        old = {name: value for name, value in DEMO.items() if name not in new}
        engine, job = with_job(url, "0004", old)
        with engine.begin() as connection:
            for number in range(2):
                row = {"id": uuid.uuid4(), "job": job, "number": number}
                connection.execute(text(INSERT_SCORED), row)
        migrations.upgrade(url)
        with session_factory(engine).begin() as session:
            rows = trials.list_trials(session, job)
            assert [row.screened for row in rows] == [False] * 2
            assert len(trials.front(session, job)) == 2, "equal ones do not dominate one another"
            rows[1].screened, rows[1].refusals, rows[1].total = True, 0, 0
            session.get_one(Job, job).spec = DEMO
        migrations.downgrade(url, "0004")
        with engine.connect() as connection:
            names = {column["name"] for column in inspect(connection).get_columns("trials")}
            assert "screened" not in names
            query = text("SELECT state, refusals, total FROM trials ORDER BY number")
            kept = [tuple(row) for row in connection.execute(query)]
            # 0004 would take "0 of 0" for the best trial of all
            assert kept == [("complete", 3, 100), ("complete", None, None)]
            assert connection.execute(text("SELECT spec FROM jobs")).scalar_one() == old
        engine.dispose()


def test_0005_knows_no_warm_starts(running_servers: Servers) -> None:
    with running_servers.database(migrated=False) as url:
        engine, job = with_job(url, "0005", DEMO)
        migrations.upgrade(url, "0006")
        with session_factory(engine).begin() as session:
            row = session.get_one(Job, job)
            assert row.warm_starts is None, "not decided yet"
            row.warm_starts = {"2": {"job": str(job), "trial": 1, "params": {}}}
            for number, origin in enumerate(("single_pass", "plain", "warm_start")):
                session.add(Trial(job_id=job, number=number, origin=origin, candidate={}))
        migrations.downgrade(url, "0005")
        with engine.connect() as connection:
            assert "warm_starts" not in {c["name"] for c in inspect(connection).get_columns("jobs")}
            found = connection.execute(text("SELECT origin FROM trials ORDER BY number")).scalars()
            assert list(found) == ["single_pass", "plain", "sampler"]
        engine.dispose()
