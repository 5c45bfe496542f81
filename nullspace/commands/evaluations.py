"""evaluate, benchmark: jobs that search nothing, and harness tasks on a trial."""

from __future__ import annotations

from typing import Annotated

import typer

from nullspace.client import Client, ClientError, Json
from nullspace.commands.jobs import (
    Fields,
    Harmful,
    Harmless,
    OverRefusal,
    Quantization,
    Scorers,
    build,
    send,
)
from nullspace.commands.options import AsJson, Token, Url, client_of, job_id
from nullspace.results import FIGURES, benchmark_rows, figure_rows
from nullspace.terminal import dump, say, show, table

Original = Annotated[
    str | None, typer.Option("--original", help="The model to compare with, and measure KL from.")
]
Tasks = Annotated[
    list[str] | None, typer.Option("--task", "-t", help="A harness task; again for more.")
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Samples per task.")]
Name = Annotated[str | None, typer.Option("--name")]
Priority = Annotated[int | None, typer.Option("--priority")]
Private = Annotated[bool | None, typer.Option("--private/--shared")]
Watch = Annotated[bool, typer.Option("--watch", "-w", help="Follow it to its end.")]


def evaluate(
    model: Annotated[str, typer.Argument(help="owner/name on the hub, or an operator's model.")],
    original: Original = None,
    harmful: Harmful = None,
    harmless: Harmless = None,
    over_refusal: OverRefusal = None,
    scorer: Scorers = None,
    task: Tasks = None,
    limit: Limit = None,
    judge: Annotated[str | None, typer.Option("--judge", help="An operator's judge.")] = None,
    quantization: Quantization = None,
    name: Name = None,
    priority: Priority = None,
    private: Private = None,
    fields: Fields = None,
    watch: Watch = False,
    as_json: AsJson = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Score a model as it is, or against its original: refusals, KL, further scores."""
    with client_of(url, token) as client:
        built = build(
            client, model, None, harmful, harmless, over_refusal, fields, kind="evaluate",
            original=original, scorers=scorer, tasks=task, task_limit=limit, judge=judge,
            quantization=quantization, name=name, priority=priority, private=private,
        )  # fmt: skip
        send(client, built, watch, as_json, _figures)


def benchmark(
    model: Annotated[str | None, typer.Argument(help="owner/name, or an operator's model.")] = None,
    task: Tasks = None,
    limit: Limit = None,
    original: Original = None,
    job: Annotated[str | None, typer.Option("--job", help="Of this job ...")] = None,
    trial: Annotated[int | None, typer.Option("--trial", min=0, help="... the trial.")] = None,
    quantization: Quantization = None,
    name: Name = None,
    priority: Priority = None,
    private: Private = None,
    fields: Fields = None,
    watch: Watch = False,
    as_json: AsJson = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Run tasks of lm-evaluation-harness on a model, or with --job and --trial on a trial."""
    if not task:
        raise ClientError("name at least one task: --task T")
    if (job is None) != (trial is None) or (model is None) == (job is None):
        raise ClientError("give either a MODEL, or --job and --trial")
    with client_of(url, token) as client:
        if job is not None and trial is not None:
            _trial(client, job_id(client, job), trial, task, limit, watch, as_json)
            return
        built = build(
            client, model, None, None, None, None, fields, kind="benchmark", original=original,
            tasks=task, task_limit=limit, quantization=quantization, name=name, priority=priority,
            private=private,
        )  # fmt: skip
        send(client, built, watch, as_json, _figures)


def _figures(job: Json) -> None:
    table(FIGURES, figure_rows(job))


def _trial(
    client: Client, job: str, trial: int, tasks: list[str], limit: int | None, watch: bool,
    as_json: bool,
) -> None:  # fmt: skip
    asked = client.benchmark(job, trial, tasks, limit)
    if not watch:
        if as_json:
            dump(asked)
        else:
            show(asked["id"])
        return
    say(f"benchmarking trial {trial}")
    client.wait_benchmark(job, trial, asked["id"])
    before = ((client.job(job)["baseline"] or {}).get("heldout") or {}).get("values") or {}
    after = client.trial(job, trial)["heldout"]["values"]
    sides = {"original": _harness(before), "model": _harness(after)}
    if as_json:
        dump(sides)
    else:
        table(("figure", "original", f"trial {trial}"), benchmark_rows(sides))


def _harness(values: Json) -> Json:
    """All harness figures among further scores, by `<task>.<metric>`."""
    return {
        name.removeprefix("harness."): value
        for name, value in values.items()
        if name.startswith("harness.")
    }


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(evaluate)
    app.command()(benchmark)
