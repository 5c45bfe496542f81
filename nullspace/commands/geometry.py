"""geometry: how harmful and harmless prompts lie in the residual stream."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from nullspace.client import ClientError, Json
from nullspace.commands.options import AsJson, JobId, Token, Url, client_of, job_id
from nullspace.terminal import dump, number, say, table

COLUMNS = (
    "#layer", "#d'", "#silhouette", "#cos means", "#cos direction, harmless", "#cos next",
    "#|harmful|", "#|harmless|", "#|difference|", "",
)  # fmt: skip


def geometry(
    job: JobId,
    svg: Annotated[Path | None, typer.Option("--svg", help="Write a figure to this file.")] = None,
    layer: Annotated[
        int | None, typer.Option("--layer", min=0, help="With --svg: the points of this layer.")
    ] = None,
    as_json: AsJson = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """How harmful and harmless prompts lie, layer by layer: separation, cosines, norms."""
    if layer is not None and svg is None:
        raise ClientError("--layer chooses the figure that --svg FILE writes: give both")
    with client_of(url, token) as client:
        full = job_id(client, job)
        found = client.geometry(full)
        drawn = None if svg is None else client.geometry_svg(full, layer)
    if svg is not None and drawn is not None:
        try:
            svg.write_text(drawn, encoding="utf-8")
        except OSError as error:
            raise ClientError(f"--svg {svg} cannot be written: {error.strerror}") from error
        say(f"{svg} is written")
    if as_json:
        dump(found)
    elif svg is None:
        table(COLUMNS, rows(found["layers"]))


def rows(layers: list[Json]) -> Iterable[tuple[object, ...]]:
    """Rows of the table with the columns COLUMNS."""
    separated = max(layers, key=lambda one: float(one["separation"]))
    grouped = max(layers, key=lambda one: float(one["silhouette"]))
    for one in layers:
        notes = [
            words
            for best, words in ((separated, "most separated"), (grouped, "largest silhouette"))
            if best is one
        ]
        yield (
            one["layer"],
            number(one["separation"]),
            f"{one['silhouette']:.3f}",
            f"{one['cosine_means']:.3f}",
            f"{one['cosine_direction_harmless']:.3f}",
            # none follows the last layer
            "-" if one is layers[-1] else f"{one['cosine_next']:.3f}",
            number(one["norm_harmful"]),
            number(one["norm_harmless"]),
            number(one["norm_difference"]),
            ", ".join(notes),
        )


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(geometry)
