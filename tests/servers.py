"""Real servers for the tests: one PostgreSQL and one Redis for a session, one database per test.

DATABASE_URL and REDIS_URL are used where they are set (the databases made there are dropped
again); otherwise private servers are started, the way `nullspace up` starts them.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import redis
from sqlalchemy import create_engine, make_url, text

import migrations
from jobs.database import normal_url
from nullspace.embedded import start_postgres, start_redis


def own_numbers() -> Iterator[int]:
    """Redis databases 1..15, round and round; with pytest-xdist this worker's part of them alone.

    A Redis that REDIS_URL names is shared by all workers.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    workers = min(15, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    return itertools.cycle(range(1 + worker % workers, 16, workers))


@dataclass
class Servers:
    """Addresses of the two servers, and the migrated database that tests copy."""

    postgres_url: str
    redis_url: str
    template: str = field(default_factory=lambda: f"nullspace_template_{uuid.uuid4().hex[:12]}")
    redis_numbers: Iterator[int] = field(default_factory=own_numbers)

    def admin(self, *statements: str) -> None:
        """Run statements such as CREATE DATABASE, outside of any transaction."""
        engine = create_engine(normal_url(self.postgres_url), isolation_level="AUTOCOMMIT")
        try:
            with engine.connect() as connection:
                for statement in statements:
                    connection.execute(text(statement))
        finally:
            engine.dispose()

    def url_of(self, database: str) -> str:
        """Address of one database of the server."""
        url = make_url(self.postgres_url).set(database=database)
        return url.render_as_string(hide_password=False)

    def make_template(self) -> None:
        """Create and migrate the database that every test's database is a copy of."""
        self.admin(f'CREATE DATABASE "{self.template}"')
        migrations.upgrade(self.url_of(self.template))

    @contextlib.contextmanager
    def database(self, *, migrated: bool = True) -> Iterator[str]:
        """Address of a fresh database, dropped afterwards; empty unless `migrated`."""
        name = f"nullspace_test_{uuid.uuid4().hex[:12]}"
        source = self.template if migrated else "template1"
        self.admin(f'CREATE DATABASE "{name}" TEMPLATE "{source}"')
        try:
            yield self.url_of(name)
        finally:
            self.admin(f'DROP DATABASE "{name}" WITH (FORCE)')

    def redis_database(self) -> str:
        """Address of an empty Redis database with a number of its own, as far as there are."""
        number = next(self.redis_numbers)
        base, _, tail = self.redis_url.rpartition("/")
        url = f"{base}/{number}" if tail.isdigit() else f"{self.redis_url}/{number}"
        with redis.Redis.from_url(url) as client:
            client.flushdb()
        return url


@contextlib.contextmanager
def servers(folder: Path) -> Iterator[Servers]:
    """Both servers, started in `folder` where the environment names none."""
    with contextlib.ExitStack() as stack:
        postgres_url = os.environ.get("DATABASE_URL")
        if not postgres_url:
            postgres = start_postgres(folder / "postgres", durable=False)
            stack.callback(postgres.stop)
            postgres_url = postgres.url
        redis_url = os.environ.get("REDIS_URL")
        if not redis_url:
            cache = start_redis(folder / "redis", durable=False)
            stack.callback(cache.stop)
            redis_url = cache.url
        running = Servers(postgres_url, redis_url)
        running.make_template()
        try:
            yield running
        finally:
            running.admin(f'DROP DATABASE "{running.template}" WITH (FORCE)')
