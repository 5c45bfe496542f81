"""Options that many commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nullspace.client import Client
from nullspace.connection import resolve
from nullspace.errors import ClientError, Missing

Url = Annotated[
    str | None, typer.Option("--url", help="Server; default NULLSPACE_URL, else of `nullspace up`.")
]
Token = Annotated[
    str | None, typer.Option("--token", help="Default NULLSPACE_TOKEN, else of `nullspace up`.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="The job's id, or its first characters.")]
Data = Annotated[
    Path | None,
    typer.Option("--data", help="Folder; default NULLSPACE_DATA, else ~/.local/share/nullspace."),
]


def client_of(url: str | None, token: str | None) -> Client:
    """The client that the options, the environment or `up` name."""
    return resolve(url, token).client()


def job_id(client: Client, given: str) -> str:
    """The full id of a job named by its first characters.

    Missing when none fits, ClientError when many do.
    """
    if len(given) == 36:
        return given
    found = [job["id"] for job in client.jobs() if str(job["id"]).startswith(given.lower())]
    if len(found) == 1:
        return str(found[0])
    if not found:
        raise Missing(f"no job begins with {given!r}: `nullspace ls` shows the ids")
    raise ClientError(f"{len(found)} jobs begin with {given!r}: `nullspace ls` shows the ids")
