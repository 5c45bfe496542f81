"""The schema as migrated is the schema of the tables."""

from __future__ import annotations

import subprocess
import sys

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, inspect, text

import migrations
from jobs.database import connect
from jobs.tables import Base
from tests.servers import Servers


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
