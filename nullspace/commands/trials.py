"""trials, pick, export, pull, chat."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from nullspace.client import Client, ClientError, Json
from nullspace.commands.options import AsJson, JobId, Token, Url, client_of, job_id
from nullspace.terminal import FRONT as COLUMNS
from nullspace.terminal import (
    dump,
    err,
    front_rows,
    number,
    plain,
    ratio,
    say,
    show,
    size,
    table,
)

Number = Annotated[int, typer.Argument(metavar="TRIAL", min=0, help="The trial's number.")]
Kind = Annotated[str, typer.Option("--kind", "-k", help="merged, adapter or lora.")]
Rank = Annotated[int | None, typer.Option("--rank", help="Of adapter and lora.")]


def trials(
    job: JobId,
    trial: Annotated[int | None, typer.Argument(metavar="[TRIAL]", help="Only this one.")] = None,
    front: Annotated[bool, typer.Option("--front", help="Only the Pareto front.")] = False,
    answers: Annotated[int, typer.Option("--answers", min=0, help="Answers to show of one.")] = 5,
    as_json: AsJson = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """List a job's trials, or show one with what the model said."""
    with client_of(url, token) as client:
        full = job_id(client, job)
        if trial is not None:
            _one(client.trial(full, trial), answers, as_json)
            return
        found = client.front(full) if front else list(client.trials(full))
    if as_json:
        dump(found)
    else:
        table(COLUMNS, front_rows(found))


def _one(found: Json, answers: int, as_json: bool) -> None:
    if as_json:
        dump(found)
        return
    rows = [("trial", found["number"]), ("state", found["state"]), ("origin", _origin(found))]
    for role in ("search", "heldout", "over_refusal"):
        scores = found.get(role)
        if scores:
            kls = [
                f"{number(scores[name])} {word}"
                for name, word in (("kl_first", "first"), ("kl_multi", "multi"))
                if scores[name] is not None
            ]
            rows.append((role, f"{ratio(scores)}, KL {', '.join(kls)}" if kls else ratio(scores)))
    if found["screened"]:
        by = found["screened_by"]
        better = "a finished trial" if by is None else f"trial {by}"
        rows.append(("not decoded", f"{better} is better whatever this one answers"))
    edit = found["candidate"]
    rows.append(
        (
            "edit",
            ", ".join(
                f"{key}={value}" for key, value in edit.items() if key not in ("attention", "mlp")
            ),
        )
    )
    for part in ("attention", "mlp"):
        if part in edit:
            rows.append((part, ", ".join(f"{k}={number(v)}" for k, v in edit[part].items())))
    table(("", ""), rows)
    for role, said in found["responses"].items():
        for answer in said[:answers]:
            show(f"\n[{role}] {plain(answer['prompt'])}")
            show(f"  original: {plain(answer['original_text'])}")
            show(f"  edited:   {plain(answer['text'])}")


def _origin(trial: Json) -> str:
    """What a trial comes from, in words."""
    source = trial["warm_start"]
    origin = str(trial["origin"])
    return f"{origin}, trial {source['trial']} of job {source['job']}" if source else origin


def pick(
    job: JobId,
    trial: Number,
    undo: Annotated[bool, typer.Option("--undo", help="Take the pick back.")] = False,
    as_json: AsJson = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Pick a trial: its files are kept."""
    with client_of(url, token) as client:
        found = client.pick(job_id(client, job), trial, not undo)
    if as_json:
        dump(found)
    else:
        table(COLUMNS, front_rows([found]))


def export(
    job: JobId,
    trial: Number,
    kind: Kind = "merged",
    rank: Rank = None,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Until the files are there.")
    ] = True,
    as_json: AsJson = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Have files made of a trial; prints the artifact's id."""
    with client_of(url, token) as client:
        found = client.export(job_id(client, job), trial, kind, rank)
        if wait:
            say("exporting")
            found = client.wait_artifact(found["id"])
    if as_json:
        dump(found)
    else:
        show(found["id"])


def pull(
    artifact: Annotated[str, typer.Argument(help="The artifact's id, from `nullspace export`.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder.")] = None,
    as_json: AsJson = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Download an artifact: resumed where it was cut, every file checked by its sha256."""
    with client_of(url, token) as client:
        found = client.artifact(artifact)
        if found["state"] != "ready":
            say(f"the artifact is {found['state']}; waiting")
            found = client.wait_artifact(artifact)
        folder = output or Path(f"{found['kind']}-{str(found['id'])[:8]}")
        paths = download(client, artifact, folder)
    if as_json:
        dump({"artifact": found["id"], "kind": found["kind"], "path": str(folder.absolute()),
              "files": [str(path) for path in paths]})  # fmt: skip
    else:
        say(f"{len(paths)} files, {size(found['size'])}")
        show(str(folder))


def download(client: Client, artifact: str, folder: Path) -> list[Path]:
    """Download with a bar on terminals."""
    if not err.is_terminal:
        return client.download(artifact, folder)
    columns = (TextColumn("downloading"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("", total=None)
        return client.download(
            artifact,
            folder,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def chat(
    job: JobId,
    prompt: Annotated[
        str | None,
        typer.Argument(help="One question; without it, a conversation of single questions."),
    ] = None,
    trial: Annotated[
        int | None,
        typer.Option("--trial", "-t", min=0, help="Edited model; default: the original."),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Answer tokens at most.")] = 200,
    as_json: AsJson = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Ask the original or an edited model. A worker answers; the first answer loads the model."""
    with client_of(url, token) as client:
        full = job_id(client, job)
        if prompt is not None:
            _ask(client, full, prompt, trial, tokens, as_json)
            return
        who = "the original" if trial is None else f"trial {trial}"
        say(f"asking {who}; every question stands alone; an empty line ends")
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return
            if not line:
                return
            _ask(client, full, line, trial, tokens, as_json)


def _ask(
    client: Client, job: str, prompt: str, trial: int | None, tokens: int, as_json: bool
) -> None:
    found = client.chat(job, prompt, trial=trial, tokens=tokens)
    if as_json:
        dump(found)
        return
    if not found.get("answers"):
        raise ClientError("the answer is empty")
    show(plain(found["answers"][0]["text"]))


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (trials, pick, export, pull, chat):
        app.command()(command)
