"""`nullspace migrate`: the tables, the built-in prompt sets and the first admin. Idempotent."""

from __future__ import annotations

import migrations
from jobs import people, prompts
from jobs.database import connect, session_factory
from jobs.settings import Settings


def migrate(settings: Settings) -> str | None:
    """Bring the database to this version; the e-mail of an admin that was just made."""
    migrations.upgrade(settings.database_url)
    engine = connect(settings.database_url, pool_size=1)
    try:
        with session_factory(engine).begin() as session:
            prompts.ensure_builtin(session)
            admin = people.ensure_first_admin(session, settings)
            return admin.email if admin is not None else None
    finally:
        engine.dispose()
