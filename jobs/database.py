"""Connections to PostgreSQL. Callers own transactions: `with sessions.begin() as session: ...`."""

from __future__ import annotations

from sqlalchemy import Engine, create_engine
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session, sessionmaker

Sessions = sessionmaker[Session]

# A server that vanished without a word is noticed within half a minute, in the middle of a
# statement too: a worker that waits longer holds a GPU for a lease that is over.
ALIVE = {
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,  # milliseconds
}


def normal_url(url: str) -> str:
    """`url` with the psycopg driver named, as SQLAlchemy wants it."""
    for prefix in ("postgres://", "postgresql://"):
        if url.startswith(prefix):
            return "postgresql+psycopg://" + url.removeprefix(prefix)
    return url


def bounded(url: str, seconds: float, schema: str | None = None) -> str:
    """`url` with an end to transactions in which nothing happens for `seconds`.

    A process that is stopped, or whose machine vanishes, in the middle of a transaction keeps its
    row locks, and whoever comes after it would wait for them for ever. The server ends such a
    session; a worker's lease is over by then anyway. `schema` becomes the search path.
    """
    parsed = make_url(normal_url(url))
    options = [f"-cidle_in_transaction_session_timeout={int(seconds * 1000)}"]
    if schema is not None:
        options.append(f"-csearch_path={schema}")
    given = parsed.query.get("options", "")
    before = [given] if isinstance(given, str) else list(given)
    placed = parsed.update_query_dict({"options": " ".join([*filter(None, before), *options])})
    return placed.render_as_string(hide_password=False)


def connect(url: str, *, pool_size: int = 5) -> Engine:
    """An engine whose connections are checked before use (a restarted server is survived)."""
    return create_engine(
        normal_url(url),
        pool_pre_ping=True,
        pool_size=pool_size,
        max_overflow=10,
        connect_args={"connect_timeout": 5, **ALIVE},
    )


def session_factory(engine: Engine) -> Sessions:
    """A factory of sessions whose objects stay readable after the commit."""
    return sessionmaker(engine, expire_on_commit=False)
