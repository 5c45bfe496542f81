"""Alembic's environment. `python -m alembic -c migrations/alembic.ini` uses DATABASE_URL."""

from __future__ import annotations

import os

from alembic import context
from sqlalchemy import Connection, text

from jobs.database import connect
from jobs.tables import Base

# any number that no other lock of the project has: one migration at a time
LOCK = 7_310_000


def _url() -> str:
    url = context.config.get_main_option("sqlalchemy.url") or os.environ.get("DATABASE_URL")
    if not url:
        raise SystemExit("DATABASE_URL is not set: it names the database to migrate.")
    return url


def _run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        compare_type=True,
        include_name=lambda name, kind, parents: kind != "schema" or name is None,
    )
    with context.begin_transaction():
        # containers that start together wait here; the second finds nothing left to do
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK})
        context.run_migrations()


if context.is_offline_mode():
    context.configure(dialect_name="postgresql", target_metadata=Base.metadata, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()
else:
    given = context.config.attributes.get("connection")
    if given is not None:
        _run(given)
    else:
        engine = connect(_url(), pool_size=1)
        with engine.connect() as opened:
            _run(opened)
        engine.dispose()
