"""submit, estimate, ls, show, watch, log, pause, resume, cancel, amend."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from nullspace.client import Client, ClientError, Json
from nullspace.commands.options import AsJson, JobId, Token, Url, client_of, job_id
from nullspace.prompt_files import set_of
from nullspace.results import FIGURES, figure_rows
from nullspace.terminal import (
    FRONT,
    METHODS,
    dump,
    duration,
    front_rows,
    method_rows,
    number,
    out,
    plain,
    ratio,
    say,
    show,
    size,
    table,
    when,
)
from nullspace.watch import course, explain, finished, follow, sink

Model = Annotated[str, typer.Argument(help="owner/name on the hub, or an operator's model.")]
Harmful = Annotated[
    str | None, typer.Option("--harmful", help="Prompts the model refuses: a set's name or a file.")
]
Harmless = Annotated[
    str | None, typer.Option("--harmless", help="Prompts it answers: a set's name or a file.")
]
OverRefusal = Annotated[
    str | None, typer.Option("--over-refusal", help="Harmless prompts that look refusable.")
]
Trials = Annotated[int | None, typer.Option("--trials", "-n", help="Budget of trials.")]
Quantization = Annotated[
    str | None, typer.Option("--quantization", "-q", help="none, bnb_4bit or bnb_8bit.")
]
Methods = Annotated[
    list[str] | None,
    typer.Option("--method", "-m", help="Of the list in docs/cli.md; again to compare several."),
]
Objectives = Annotated[
    list[str] | None,
    typer.Option("--objective", help="What the search minimises, two or three times."),
]
Scorers = Annotated[
    list[str] | None, typer.Option("--scorer", help="A further score; again for more.")
]
Sampler = Annotated[
    str | None, typer.Option("--sampler", help="tpe (default), nsga3, cmaes or qnehvi.")
]
Screening = Annotated[
    bool | None,
    typer.Option(
        "--screening/--no-screening",
        help="Skip the answers of trials that a finished one beats whatever they are (default).",
    ),
]
WarmStart = Annotated[
    bool | None,
    typer.Option(
        "--warm-start/--cold-start", help="Begin with what earlier jobs found (default), or not."
    ),
]
Fields = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Any other field, e.g. prompts.search=50."),
]
SpecFile = Annotated[
    Path | None, typer.Option("--spec", help="A job as JSON; - reads stdin. Options come on top.")
]


def build(
    client: Client | None,
    model: str | None,
    spec: Path | None,
    harmful: str | None,
    harmless: str | None,
    over_refusal: str | None,
    fields: list[str] | None,
    **options: Any,
) -> Json:
    """The job's specification from a file, options and FIELD=VALUE pairs, in that order."""
    built: Json = {}
    if spec is not None:
        try:
            text = sys.stdin.read() if str(spec) == "-" else spec.read_text()
            built = json.loads(text)
        except OSError as error:
            raise ClientError(f"--spec {spec} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ClientError(f"--spec {spec}: not JSON: {error}") from error
        if not isinstance(built, dict):
            raise ClientError(f"--spec {spec}: not a JSON object")
    if model:
        built["model"] = model
    # a list option that was not given is empty or None, as typer likes
    built |= {name: value for name, value in options.items() if value is not None and value != []}
    sets = {"harmful": harmful, "harmless": harmless, "over_refusal": over_refusal}
    for role, given in sets.items():
        if given is not None and client is not None:
            prompts = built.setdefault("prompts", {})
            if not isinstance(prompts, dict):
                raise ClientError(f'--spec {spec}: prompts: write an object, e.g. {{"search": 50}}')
            prompts[role] = set_of(client, given)
    for pair in fields or []:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise ClientError(f"--set {pair}: write FIELD=VALUE")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        place = built
        *outer, last = name.split(".")
        for part in outer:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ClientError(f"--set {pair}: {part} holds no fields")
        place[last] = value
    return built


def submit(
    model: Annotated[str | None, typer.Argument(help="owner/name, or an operator's model.")] = None,
    spec: SpecFile = None,
    trials: Trials = None,
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
    name: Annotated[str | None, typer.Option("--name")] = None,
    priority: Annotated[int | None, typer.Option("--priority")] = None,
    parallelism: Annotated[int | None, typer.Option("--parallelism")] = None,
    private: Annotated[bool | None, typer.Option("--private/--shared")] = None,
    fields: Fields = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Follow it to its end.")] = False,
    as_json: AsJson = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Submit a job."""
    with client_of(url, token) as client:
        built = build(
            client, model, spec, harmful, harmless, over_refusal, fields,
            trials=trials, methods=method, objectives=objective, scorers=scorer,
            sampler=sampler, screening=screening, warm_start=warm_start,
            quantization=quantization, name=name, priority=priority, parallelism=parallelism,
            private=private,
        )  # fmt: skip
        send(client, built, watch, as_json, lambda job: _front(client, job["id"]))


def send(
    client: Client, spec: Json, watch: bool, as_json: bool, ended: Callable[[Json], None]
) -> None:
    """Submit, follow if that is wanted, and print the job; `ended` shows one that was followed."""
    job = client.submit(spec)
    say(f"{client.url}/jobs/{job['id']}")
    if watch:
        with sink() as view:
            job = follow(client, job["id"], view)
    if as_json:
        dump(job)
    elif watch:
        ended(job)
    else:
        show(job["id"])


def estimate(
    model: Model,
    quantization: Quantization = None,
    trials: Trials = None,
    method: Methods = None,
    fields: Fields = None,
    as_json: AsJson = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """What a job would need: memory, disk, time. No weights are read."""
    with client_of(url, token) as client:
        built = build(
            client,
            model,
            None,
            None,
            None,
            None,
            fields,
            quantization=quantization,
            trials=trials,
            methods=method,
        )
        found = client.estimate(built)
    if as_json:
        dump(found)
        return
    rows = [
        ("architecture", found["architecture"]),
        ("supported", {True: "yes", False: "no", None: "not known yet"}[found["supported"]]),
        ("parameters", f"{found['parameters'] / 1e6:,.1f} million"),
        ("layers, hidden", f"{found['layers']}, {found['hidden']}"),
        *((f"weights, {kind}", size(count)) for kind, count in found["weight_bytes"].items()),
        ("device memory", size(found["gpu_bytes"])),
        ("host memory", size(found["ram_bytes"])),
        ("disk for an export", size(found["disk_bytes"])),
        ("time", duration(found["seconds"])),
        *((f"fits {fit['name']}", _fits(fit)) for fit in found["fits"]),
    ]
    table(("", ""), rows)
    say(plain(found["summary"]))
    for warning in found["warnings"]:
        say(f"note: {plain(warning)}")


def _fits(fit: Json) -> str:
    """How a job fits on one worker's device."""
    if not fit["fits"]:
        return "no"
    return "in smaller batches" if fit["smaller_batches"] else "yes"


def ls(
    state: Annotated[str | None, typer.Option("--state", help="Only jobs in this state.")] = None,
    kind: Annotated[
        str | None, typer.Option("--kind", help="Only abliterate, evaluate or benchmark.")
    ] = None,
    mine: Annotated[bool, typer.Option("--mine", help="Only my own.")] = False,
    query: Annotated[str | None, typer.Option("--grep", help="Part of name or model.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1)] = 50,
    as_json: AsJson = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """List jobs, newest first."""
    with client_of(url, token) as client:
        found = []
        for job in client.jobs(state=state, kind=kind, mine=mine or None, q=query):
            found.append(job)
            if len(found) == limit:
                break
    if as_json:
        dump(found)
        return
    rows = [
        (
            str(job["id"])[:8],
            job["state"],
            plain(job["name"] or job["model"], 40),
            f"{job['trials']['complete']}/{job['trials']['budget']}"
            if job["trials"]["budget"]
            else job["kind"],
            _best(job),
            duration(job["eta_seconds"]) if job["state"] == "running" else "",
            job["owner"],
            when(job["created_at"]),
        )
        for job in found
    ]
    table(("id", "state", "name", "#trials", "best", "#left", "owner", "created"), rows)


def _best(job: Json) -> str:
    best = job.get("best")
    if not best:
        return "-"
    return f"{best['refusals']}/{best['total']} at {number(best['kl_first'])}"


def show_job(job: JobId, as_json: AsJson = False, url: Url = None, token: Token = None) -> None:
    """One job: state, scores, front, artifacts."""
    with client_of(url, token) as client:
        found = client.job(job_id(client, job))
        if as_json:
            dump(found)
            return
        rows = [
            ("job", found["id"]),
            ("name", found["name"] or "-"),
            ("model", f"{found['model']} {found['commit'] or ''}"),
            ("owner", found["owner"]),
            ("state", course(found)),
            *_asked(found),
            ("created", when(found["created_at"])),
            ("page", f"{client.url}/jobs/{found['id']}"),
        ]
        if found["kind"] == "abliterate":
            for role, scores in (found.get("baseline") or {}).items():
                rows.append((f"original, {role}", ratio(scores)))
        if found.get("error"):
            rows.append(("error", explain(found["error"])))
        table(("", ""), rows)
        if found.get("result"):
            out.print()
            table(FIGURES, figure_rows(found))
        compared = client.methods(found["id"])
        if len(compared) > 1:
            out.print()
            table(METHODS, method_rows(compared))
        if found["front_size"]:
            out.print()
            _front(client, found["id"])
        if made := client.artifacts(found["id"]):
            out.print()
            cells = ((a["id"], a["trial"], a["kind"], a["state"], size(a["size"])) for a in made)
            table(("artifact", "#trial", "kind", "state", "#size"), cells)


def _asked(job: Json) -> list[tuple[str, str]]:
    """What a job is for, by its kind."""
    spec = job["spec"]
    if job["kind"] == "abliterate":
        named = {"methods": spec.get("methods"), "minimised": spec.get("objectives")}
    else:
        named = {"kind": [job["kind"]], "original": [spec.get("original") or "-"],
                 "tasks": spec.get("tasks")}  # fmt: skip
    return [(name, ", ".join(values or [])) for name, values in named.items()]


def _front(client: Client, job: str) -> None:
    table(FRONT, front_rows(client.front(job)))


def watch(job: JobId, as_json: AsJson = False, url: Url = None, token: Token = None) -> None:
    """Follow a job to its end. With --json: one event a line."""
    with client_of(url, token) as client:
        full = job_id(client, job)
        if as_json:
            for event in client.events(full):
                line = {
                    "seq": event.seq,
                    "kind": event.kind,
                    "at": event.at,
                    "payload": event.payload,
                }
                out.file.write(json.dumps(line) + "\n")
                out.file.flush()
            finished(client.job(full))
            return
        say(course(client.job(full)))
        with sink() as view:
            ended = follow(client, full, view)
        if ended["kind"] == "abliterate":
            _front(client, full)
        else:
            table(FIGURES, figure_rows(ended))


def log(
    job: JobId,
    follow_it: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job is over.")
    ] = False,
    task: Annotated[
        str | None,
        typer.Option("--task", help="Of this task, or of a kind: search, evaluate, export ..."),
    ] = None,
    url: Url = None,
    token: Token = None,
) -> None:
    """Print a job's log: of every task, or with --follow of the one that runs."""
    with client_of(url, token) as client:
        identity = job_id(client, job)
        pieces = client.log(identity, follow=True) if follow_it else client.logs(identity, task)
        for piece in pieces:
            out.file.write(piece)
            out.file.flush()


def _control(action: Callable[[Client, str], Json]) -> Callable[..., None]:
    def command(job: JobId, as_json: AsJson = False, url: Url = None, token: Token = None) -> None:
        with client_of(url, token) as client:
            found = action(client, job_id(client, job))
        if as_json:
            dump(found)
        else:
            say(course(found))

    return command


def amend(
    job: JobId,
    trials: Trials = None,
    priority: Annotated[int | None, typer.Option("--priority")] = None,
    parallelism: Annotated[int | None, typer.Option("--parallelism")] = None,
    name: Annotated[str | None, typer.Option("--name")] = None,
    as_json: AsJson = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Change a job: more trials, another priority, more workers, another name."""
    given = {"trials": trials, "priority": priority, "parallelism": parallelism, "name": name}
    changes = {key: value for key, value in given.items() if value is not None}
    if not changes:
        raise ClientError("nothing to change: give --trials, --priority, --parallelism or --name")
    with client_of(url, token) as client:
        found = client.amend(job_id(client, job), **changes)
    if as_json:
        dump(found)
    else:
        say(course(found))


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(submit)
    app.command()(estimate)
    app.command()(ls)
    app.command("show")(show_job)
    app.command()(watch)
    app.command()(log)
    app.command("pause", help="Pause a job; its worker hands the GPU back.")(_control(Client.pause))
    app.command("resume", help="Go on with a paused or failed job.")(_control(Client.resume))
    app.command("cancel", help="Cancel a job for good.")(_control(Client.cancel))
    app.command()(amend)
