"""The database's schema, revision by revision. `nullspace migrate` calls `upgrade`.

Works from an installed package: nothing but this folder is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from jobs.database import connect

__all__ = ["current", "downgrade", "head", "upgrade"]


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _run(url: str, move: Callable[[Config, str], None], revision: str) -> None:
    engine = connect(url, pool_size=1)
    try:
        with engine.begin() as connection:
            config = _config()
            config.attributes["connection"] = connection
            move(config, revision)
    finally:
        engine.dispose()


def upgrade(url: str, revision: str = "head") -> None:
    """Bring the database at `url` to `revision`. Safe to call from several processes at once."""
    _run(url, command.upgrade, revision)


def downgrade(url: str, revision: str) -> None:
    """Take the database at `url` back to `revision`; "base" removes every table."""
    _run(url, command.downgrade, revision)


def current(url: str) -> str | None:
    """The revision of the database at `url`; None where it was never migrated."""
    engine = connect(url, pool_size=1)
    try:
        with engine.connect() as connection:
            return MigrationContext.configure(connection).get_current_revision()
    finally:
        engine.dispose()


def head() -> str:
    """The revision that this version of the code needs."""
    found = ScriptDirectory.from_config(_config()).get_current_head()
    if found is None:
        raise RuntimeError("the migrations folder holds no revision")
    return found
