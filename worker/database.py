"""Addresses of the database as workers use it."""

from __future__ import annotations

from sqlalchemy.engine import make_url

from jobs.database import normal_url


def bounded(url: str, seconds: float, schema: str | None = None) -> str:
    """`url` with an end to transactions in which nothing happens for `seconds`.

    A worker that is stopped, or whose machine vanishes, in the middle of a transaction keeps its
    row locks, and whoever takes over its task would wait for them for ever. The server ends such a
    session; the lease is over by then anyway. `schema` becomes the search path.
    """
    parsed = make_url(normal_url(url))
    options = [f"-cidle_in_transaction_session_timeout={int(seconds * 1000)}"]
    if schema is not None:
        options.append(f"-csearch_path={schema}")
    given = parsed.query.get("options", "")
    before = [given] if isinstance(given, str) else list(given)
    placed = parsed.update_query_dict({"options": " ".join([*filter(None, before), *options])})
    return placed.render_as_string(hide_password=False)
