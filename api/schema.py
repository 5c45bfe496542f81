"""Whether the database has the tables of this version."""

from __future__ import annotations

from functools import lru_cache

from alembic.runtime.migration import MigrationContext
from sqlalchemy.orm import Session

import migrations
from jobs.problems import Problem


class NotMigrated(Problem):
    """The tables are older or newer than the program."""

    status = 503
    title = "Service unavailable"


@lru_cache(maxsize=1)
def head() -> str:
    """The revision that this version of the code needs, read once."""
    return migrations.head()


def at_head(session: Session) -> None:
    """Raise NotMigrated unless the database is at `head()`."""
    found = MigrationContext.configure(session.connection()).get_current_revision()
    if found != head():
        raise NotMigrated(
            f"The tables are at revision {found or 'none'}, this version needs {head()}. "
            "Run `nullspace migrate`, or start the matching version."
        )
