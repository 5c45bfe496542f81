"""`nullspace run MODEL`: one job in the terminal, without a server to keep.

It is the same path as everywhere: private servers, api and workers in the background for as long
as the job takes, in the folder `run` of the data folder (so an interrupted job can be seen later).
"""

from __future__ import annotations

import sys
from pathlib import Path

from nullspace import one_job, up
from nullspace.client import Client, ClientError, Json
from nullspace.terminal import (
    FRONT,
    METHODS,
    dump,
    err,
    front_rows,
    method_rows,
    say,
    show,
    table,
)
from nullspace.watch import sink


def locate(model: str) -> tuple[str, Path | None]:
    """(name of the job's model, models folder): a folder on this machine is served by its name."""
    folder = Path(model).expanduser()
    if not (folder / "config.json").is_file():
        if model.startswith((".", "/", "~")):
            raise ClientError(f"{model} is not a model's folder: it holds no config.json")
        return model, None
    folder = folder.resolve()
    return folder.name, folder.parent


def run(
    spec: Json,
    *,
    sets: dict[str, str | None],
    models: Path | None,
    data: Path,
    output: Path,
    pick: str | None,
    kinds: list[str],
    as_json: bool,
) -> None:
    """Search, choose, export to `output`. `pick`: best, a trial's number, or None to ask.

    Raises ClientError, StartFailed.
    """
    from nullspace.prompt_files import set_of

    if spec.get("kind", "abliterate") != "abliterate":
        raise ClientError("`nullspace run` searches; submit other kinds of jobs to a server")
    if pick not in (None, "best") and not str(pick).isdigit():
        raise ClientError("--pick is `best` or a trial's number")
    if output.exists() and any(output.iterdir()):
        raise ClientError(f"{output} exists and is not empty: choose another folder with --output")
    watch = one_job.Stopwatch()
    watch.enter("start")
    with up.service(up.Options(data / "run", port=0, models=models), say) as running:
        watch.enter("")
        with running.client() as client:
            for role, given in sets.items():
                if given is not None:
                    spec.setdefault("prompts", {})[role] = set_of(client, given)
            if spec["model"] != "demo" and not {"harmful", "harmless"} <= set(
                spec.get("prompts", {})
            ):
                say("note: --harmful and --harmless are not given; the demo's toy prompts are used")
            with sink() as view:
                job = one_job.search(client, spec, view, watch)
            identity = str(job["id"])
            front = client.front(identity)
            table(FRONT, front_rows(front), console=err)
            compared = client.methods(identity)
            if len(compared) > 1:
                table(METHODS, method_rows(compared), console=err)
            chosen = choose(client, identity, front, pick)
            client.pick(identity, chosen)
            say(f"exporting trial {chosen}")
            files = one_job.fetch(client, identity, chosen, kinds, output, watch)
            trial = client.trial(identity, chosen)
    trial.pop("responses")
    if as_json:
        dump({"job": identity, "baseline": job["baseline"], "front": front, "pick": trial,
              "methods": compared, "artifacts": files, "seconds": watch.seconds})  # fmt: skip
    else:
        for each in files:
            show(each["path"])


def choose(client: Client, job: str, front: list[Json], pick: str | None) -> int:
    """The trial to export: named, best by the rule of `one_job.best`, or asked for."""
    if not front:
        raise ClientError("no trial was completed")
    best = int(one_job.best(front)["number"])
    if pick == "best" or (pick is None and not sys.stdin.isatty()):
        return best
    while True:
        answer = pick
        if answer is None:
            err.print(f"Which trial is to be exported? [{best}] ", end="", markup=False)
            answer = input().strip() or str(best)
        try:
            return int(client.trial(job, int(answer))["number"])
        except (ValueError, ClientError) as error:
            if pick is not None:
                raise ClientError(f"--pick {pick}: {error}") from error
            say(f"{answer}: {error}")
