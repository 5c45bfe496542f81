"""`nullspace demo`: the whole job on the demo model, from nothing to a downloaded model.

The demo model is small and refuses a harmless toy list of verbs ("polish", ...), so the whole way
can be seen in minutes on a CPU, with nothing fetched from anywhere.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path

from nullspace import one_job, up
from nullspace.client import Client, Json
from nullspace.terminal import (
    FRONT,
    METHODS,
    dump,
    duration,
    err,
    front_rows,
    method_rows,
    number,
    plain,
    ratio,
    say,
    table,
)
from nullspace.watch import sink

FOLDER = Path("nullspace-demo")
TITLES = {"search": "search", "heldout": "held-out", "over_refusal": "look-alikes"}


def spec(trials: int, methods: list[str] | None = None) -> Json:
    """The demo job: MPOA, or what `methods` names, on the demo model and its prompt sets."""
    return {
        "name": "Demo",
        "model": "demo",
        "methods": methods or ["mpoa"],
        "trials": trials,
        "quantization": "none",
        "max_new_tokens": 40,
        "prompts": {
            "harmful": "demo-refused",
            "harmless": "demo-answered",
            "over_refusal": "demo-over-refusal",
        },
    }


def demo(
    *,
    trials: int,
    methods: list[str] | None = None,
    data: Path | None,
    port: int | None,
    as_json: bool,
    keep: bool,
    stay: bool | None,
) -> None:
    """Run it. `stay`: keep serving until Ctrl-C (default: on a terminal). Raises ClientError.

    `data` None: ./nullspace-demo with `keep`, else a temporary folder that is removed.
    """
    if stay is None:
        stay = sys.stdin.isatty() and err.is_terminal and not as_json
    with ExitStack() as stack:
        if data is None and not keep:
            data = Path(tempfile.mkdtemp(prefix="nullspace-demo-"))
            stack.callback(shutil.rmtree, data, ignore_errors=True)
            say(f"{data} is removed at the end")
        folder = (data or FOLDER).absolute()
        watch = one_job.Stopwatch()
        watch.enter("start")
        running = stack.enter_context(up.service(up.Options(folder, port=port), say))
        watch.enter("")
        say(f"dashboard: {running.url}  (sign in: {up.account(running)})")
        found = _conduct(running, spec(trials, methods), watch)
        _tell(found)
        if as_json:
            dump({key: value for key, value in found.items() if key != "samples"})
        if stay:
            say(f"\nThe dashboard stays at {running.url} until Ctrl-C.")
            say(f"It begins again with: nullspace up --data {folder}")
            threading.Event().wait()


def _conduct(running: up.Service, asked: Json, watch: one_job.Stopwatch) -> Json:
    with running.client() as client:
        with sink() as view:
            say(f"submitting the demo job: {asked['trials']} trials")
            job = one_job.search(client, asked, view, watch)
        identity = str(job["id"])
        front = client.front(identity)
        pick = one_job.best(front)
        client.pick(identity, pick["number"])
        with watch.phase("answers"):
            samples = one_job.answers(client, identity, pick["number"])
            restored = _restored(client, identity, pick["number"])
        say(f"exporting trial {pick['number']}")
        files = one_job.fetch(
            client,
            identity,
            pick["number"],
            ["merged", "adapter"],
            running.data / "models" / identity[:8],
            watch,
        )
        front = client.front(identity)
        pick = next(trial for trial in front if trial["number"] == pick["number"])
        compared = client.methods(identity)
    return {
        "address": running.url,
        "job": identity,
        "page": f"{running.url}/jobs/{identity}",
        "baseline": {role: _scores(scores) for role, scores in job["baseline"].items()},
        "front": [_point(trial) for trial in front],
        "pick": _point(pick),
        "methods": compared,
        "restored": restored,
        "artifacts": files,
        "seconds": watch.seconds,
        "samples": samples,
    }


def _restored(client: Client, job: str, number: int) -> Json:
    """{"same", "of"}: held-out prompts that were refused and are now answered word for word as the
    model was taught before it learnt to refuse."""
    from demo import prompt_file

    taught = {}
    for line in prompt_file("expected").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        taught[row["prompt"]] = row["answer"].strip()
    rows = client.trial(job, number)["responses"].get("heldout", [])
    refused = [row for row in rows if row["original_refused"]]
    same = sum(row["text"].strip() == taught.get(row["prompt"]) for row in refused)
    return {"same": same, "of": len(refused)}


def _scores(scores: Json | None) -> Json | None:
    """Scores with their Wilson 95 % interval."""
    if not scores:
        return None
    from jobs.spec.scores import wilson

    interval = scores.get("interval") or wilson(scores["refusals"], scores["total"])
    kept = ("refusals", "total", "kl_first", "kl_multi")
    return {key: scores.get(key) for key in kept} | {"interval": list(interval)}


def _point(trial: Json) -> Json:
    return {
        "number": trial["number"],
        "picked": trial["picked"],
        "method": trial["method"],
        "candidate": trial["candidate"],
        **{role: _scores(trial.get(role)) for role in ("search", "heldout", "over_refusal")},
    }


def _tell(found: Json) -> None:
    """The result for people, on stderr."""
    say("\nPareto front (fewer refusals, less change)", "bold")
    table(FRONT, front_rows(found["front"]), console=err)
    if len(found["methods"]) > 1:
        say("\nMethods side by side", "bold")
        table(METHODS, method_rows(found["methods"]), console=err)
    pick = found["pick"]
    say(
        f"\nPicked: trial {pick['number']} (least KL, at most 2 % above the fewest refusals)",
        "bold",
    )
    rows = []
    for role, title in (
        ("search", "search"),
        ("heldout", "held-out"),
        ("over_refusal", "look-alikes"),
    ):
        before, after = found["baseline"].get(role), pick.get(role)
        if before or after:
            kl = after or {}
            rows.append(
                (
                    title,
                    ratio(before),
                    ratio(after),
                    number(kl.get("kl_first")),
                    number(kl.get("kl_multi")),
                )
            )
    table(
        ("prompts", "refusals before", "refusals after", "#KL first token", "#KL multi?"),
        rows,
        console=err,
    )
    say("(95 % Wilson intervals in brackets; KL in nats, on prompts that are answered)")
    restored = found["restored"]
    say(
        f"{restored['same']} of {restored['of']} held-out requests that were refused now get, word "
        "for word, the answer that the model was taught before it learnt to refuse"
    )
    for sample in found["samples"]:
        say(f"\n{plain(sample['prompt'])}", "bold")
        say(f"  before: {plain(sample['before'], 300)}")
        say(f"  after:  {plain(sample['after'], 300)}")
    say("")
    for each in found["artifacts"]:
        say(f"{each['kind']}: {each['path']}")
    spent = ", ".join(f"{phase} {duration(seconds)}" for phase, seconds in found["seconds"].items())
    say(f"time: {spent}")
    say(f"page: {found['page']}")
