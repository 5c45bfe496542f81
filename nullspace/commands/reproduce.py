"""reproduce."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from nullspace import reproduce as room
from nullspace.commands.options import AsJson
from nullspace.terminal import err, say, show, table

Given = Annotated[Path | None, typer.Option(help="The file of this prompt set of the job.")]


def reproduce(
    manifest: Annotated[Path, typer.Argument(help="manifest.json of an artifact, or its folder.")],
    model: Annotated[
        Path | None, typer.Option("--model", help="The model's folder; default: from the hub.")
    ] = None,
    harmful: Given = None,
    harmless: Given = None,
    over_refusal: Given = None,
    texts: Given = None,
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("reproduced"),
    as_json: AsJson = False,
) -> int:
    """Make an artifact again from its manifest and compare it byte for byte.

    Exit code 0: every file is identical; 1: some differ, and it is said what is not as it was.
    """
    read = room.read(manifest)
    given = {
        "harmful": harmful, "harmless": harmless, "over_refusal": over_refusal, "texts": texts,
    }  # fmt: skip
    prompts = room.prompts_for(read, {role: file for role, file in given.items() if file})
    from jobs.models import DEMOS

    folder = model or DEMOS.get(read.source.model)
    with err.status("starting the engine") as status:
        outcome = room.reproduce(
            read, prompts, folder, output, lambda text: status.update(escape(text))
        )
    if as_json:
        show(room.as_json(outcome))
        return 0 if outcome.identical else 1
    table(
        ("file", "bytes"),
        [(file.name, "identical" if file.same else "DIFFER") for file in outcome.files],
    )
    if outcome.differences:
        table(
            ("not as it was", "severity", "then", "now"),
            [(each.what, each.severity, each.then, each.now) for each in outcome.differences],
        )
    for line in outcome.scores_differ:
        say(line)
    say(
        "every file is identical"
        if outcome.identical
        else "some files differ; numeric differences may change the last bits of a weight"
    )
    return 0 if outcome.identical else 1


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(reproduce)
