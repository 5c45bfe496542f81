"""up, demo, run, doctor, worker, api, migrate, workers."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nullspace.client import ClientError
from nullspace.commands.jobs import (
    Fields,
    Harmful,
    Harmless,
    Methods,
    Objectives,
    OverRefusal,
    Quantization,
    Sampler,
    Scorers,
    Screening,
    WarmStart,
    build,
)
from nullspace.commands.options import AsJson, Data, Token, Url, client_of
from nullspace.connection import Connection, config_file, data_folder, remember
from nullspace.terminal import dump, plain, say, show, size, table, when

if TYPE_CHECKING:
    from jobs.settings import Settings

Port = Annotated[
    int | None, typer.Option("--port", min=0, max=65535, help="Default 8600, or the next free one.")
]
Host = Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 for everybody.")]


def up(
    data: Data = None,
    host: Host = "127.0.0.1",
    port: Port = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=0, max=64, help="Default: one per GPU."),
    ] = None,
    models: Annotated[
        Path | None, typer.Option("--models", help="Folder of models that jobs may name.")
    ] = None,
) -> None:
    """Everything on this machine, until Ctrl-C: servers, api, workers. No root needed."""
    from nullspace import up as room

    chosen = room.Options(
        data=data or data_folder(),
        host=host,
        port=port,
        workers=workers,
        database_url=os.environ.get("DATABASE_URL"),
        redis_url=os.environ.get("REDIS_URL"),
        models=models or _folder(os.environ.get("NULLSPACE_MODELS")),
    )

    def tell(running: room.Service) -> None:
        kept = remember(Connection(running.url, running.token))
        say(f"\nNullspace runs at {running.url}", "bold")
        say(f"sign in: {room.account(running)}")
        if running.password is not None:
            say(f"token:   {running.token}")
            say("(password and token are shown this once)")
        if kept:
            say(f"`nullspace` in another terminal uses this server ({config_file()})")
        say(f"data:    {running.data}")
        say("Ctrl-C ends it; running jobs go on at the next start")

    room.stay(chosen, say, tell)


def _folder(text: str | None) -> Path | None:
    return Path(text) if text else None


def demo(
    trials: Annotated[int, typer.Option("--trials", "-n", min=1, max=10_000)] = 60,
    method: Methods = None,
    data: Data = None,
    port: Port = None,
    as_json: AsJson = False,
    keep: Annotated[
        bool,
        typer.Option("--keep/--discard", help="Keep ./nullspace-demo, or leave nothing."),
    ] = True,
    stay: Annotated[
        bool | None,
        typer.Option("--stay/--exit", help="Serve on until Ctrl-C; default: on a terminal."),
    ] = None,
) -> None:
    """The whole job on the demo model: search, front, export, download. Minutes on a CPU."""
    from nullspace.demo import demo as run_demo

    run_demo(
        trials=trials, methods=method, data=data, port=port, as_json=as_json, keep=keep, stay=stay
    )


def run(
    model: Annotated[str, typer.Argument(help="owner/name on the hub, or a folder.")],
    trials: Annotated[int, typer.Option("--trials", "-n", min=1, max=10_000)] = 200,
    method: Methods = None,
    objective: Objectives = None,
    scorer: Scorers = None,
    sampler: Sampler = None,
    screening: Screening = None,
    warm_start: WarmStart = None,
    quantization: Quantization = None,
    harmful: Harmful = None,
    harmless: Harmless = None,
    over_refusal: OverRefusal = None,
    fields: Fields = None,
    pick: Annotated[
        str | None, typer.Option("--pick", help="`best` or a trial's number; default: ask.")
    ] = None,
    kind: Annotated[
        list[str] | None, typer.Option("--kind", "-k", help="merged (default), adapter or lora.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the files.")
    ] = None,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """One job in this terminal, without a server: search, front, choice, files."""
    from nullspace import run as room

    name, models = room.locate(model)
    spec = build(
        None, name, None, None, None, None, fields, trials=trials, methods=method,
        objectives=objective, scorers=scorer, sampler=sampler, screening=screening,
        warm_start=warm_start, quantization=quantization,
    )  # fmt: skip
    room.run(
        spec,
        sets={"harmful": harmful, "harmless": harmless, "over_refusal": over_refusal},
        models=models,
        data=data or data_folder(),
        output=output or Path(f"{name.rpartition('/')[2]}-nullspace"),
        pick=pick,
        kinds=kind or ["merged"],
        as_json=as_json,
    )


def doctor(data: Data = None, as_json: AsJson = False) -> None:
    """What this machine has, what is missing, and how to mend it."""
    from nullspace.doctor import examine

    found = examine(data or data_folder())
    if as_json:
        dump([dataclasses.asdict(each) for each in found])
    else:
        table(
            ("", "", "found", "mend"),
            [(each.name, each.state, each.found, each.mend) for each in found],
        )
    if any(each.state == "missing" for each in found):
        raise typer.Exit(1)


def api(
    host: Host = "127.0.0.1", port: Annotated[int, typer.Option("--port", min=0, max=65535)] = 8600
) -> None:
    """Serve REST and pages. Settings come from the environment (docs/settings.md)."""
    from nullspace.server import serve

    _settings()
    serve(host, port)


def worker(
    check: Annotated[
        bool, typer.Option("--check", help="Only say whether this machine's worker is alive.")
    ] = False,
) -> None:
    """Work on tasks. Settings come from the environment (docs/settings.md)."""
    configured = _settings()
    if check:
        import socket

        from jobs import queue
        from jobs.database import connect, session_factory

        engine = connect(configured.database_url, pool_size=1)
        with session_factory(engine).begin() as session:
            live = [row.host for row in queue.live_workers(session, configured)]
        engine.dispose()
        if socket.gethostname() not in live:
            raise ClientError("no worker of this machine called in lately")
        return
    try:
        from worker.celery_app import main
    except ImportError as error:
        raise ClientError(
            f"a worker needs more packages ({error.name}): pip install 'nullspace[worker]'"
        ) from error
    try:
        raise typer.Exit(main())
    except ValueError as error:
        raise ClientError(str(error)) from error


def migrate() -> None:
    """Bring the database to this version; make built-in prompt sets and the first admin."""
    from nullspace.migrate import migrate as run_migrations

    made = run_migrations(_settings())
    say(f"the database is ready{f'; {made} is its first admin' if made else ''}")


def _settings() -> Settings:
    """The process's settings. ClientError names the variables that are missing or wrong."""
    from pydantic import ValidationError
    from pydantic_settings import SettingsError

    from jobs.settings import settings

    try:
        return settings()
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            name = str(fault["loc"][0])
            if name not in ("DATABASE_URL", "REDIS_URL"):
                name = f"NULLSPACE_{name.upper()}"
            lines.append(f"{name}: {fault['msg']}")
        raise ClientError("\n".join(lines) + "\n(docs/settings.md lists the settings)") from error
    except SettingsError as error:
        raise ClientError(f"{error}: write it as JSON (docs/settings.md has an example)") from error


def workers(as_json: AsJson = False, url: Url = None, token: Token = None) -> None:
    """List workers seen within a day."""
    with client_of(url, token) as client:
        found = client.workers()
    if as_json:
        dump(found)
        return
    rows = [
        (
            plain(row["name"]),
            "live" if row["live"] else "gone",
            plain(row["device"].get("name", "-"), 40),
            size(row["device"].get("memory_bytes")),
            " ".join(row["accepts"]),
            when(row["last_seen_at"]),
        )
        for row in found
    ]
    table(("name", "", "device", "#memory", "accepts", "last seen"), rows)
    if not any(row["live"] for row in found):
        show("no worker is live: jobs wait")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (up, demo, run, doctor, workers, worker, api, migrate):
        app.command()(command)
