"""prompts: list, upload, import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nullspace.commands.options import AsJson, Token, Url, client_of
from nullspace.prompt_files import import_dataset
from nullspace.terminal import dump, plain, say, show, table, when

prompts = typer.Typer(no_args_is_help=True, help="Prompt sets.")
Name = Annotated[str, typer.Argument(help="Lower-case letters, digits, '.', '_' and '-'.")]
Note = Annotated[str, typer.Option("--note", help="Where they come from.")]


@prompts.command("list")
def list_sets(as_json: AsJson = False, url: Url = None, token: Token = None) -> None:
    """List the prompt sets that jobs can name."""
    with client_of(url, token) as client:
        found = client.prompt_sets()
    if as_json:
        dump(found)
        return
    rows = [
        (row["name"], row["count"], plain(row["note"], 60), when(row["created_at"]))
        for row in found
    ]
    table(("name", "#prompts", "note", "created"), rows)


@prompts.command("upload")
def upload(
    name: Name,
    file: Annotated[Path, typer.Argument(help=".txt (one a line), .jsonl, .json or .csv, UTF-8.")],
    note: Note = "",
    as_json: AsJson = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Upload a file as a prompt set."""
    with client_of(url, token) as client:
        found = client.upload_prompts(name, file, note)
    if as_json:
        dump(found)
    else:
        say(f"{found['count']} prompts")
        show(found["name"])


@prompts.command("import")
def import_set(
    name: Name,
    repository: Annotated[str, typer.Argument(help="Data set on the hub: owner/name.")],
    split: Annotated[str, typer.Option("--split")] = "train",
    config: Annotated[
        str | None, typer.Option("--config", help="Which configuration of it.")
    ] = None,
    column: Annotated[str | None, typer.Option("--column", help="Where the texts are.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=8, max=20_000)] = 2000,
    as_json: AsJson = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Make a prompt set of a data set on the hub (needs the extra `datasets`)."""
    texts = import_dataset(repository, config=config, split=split, column=column, limit=limit)
    with client_of(url, token) as client:
        found = client.send_prompts(name, texts, f"{repository} ({split})")
    if as_json:
        dump(found)
    else:
        say(f"{found['count']} prompts")
        show(found["name"])


def register(app: typer.Typer) -> None:
    """Add the group."""
    app.add_typer(prompts, name="prompts")
