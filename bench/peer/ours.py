"""Our side: one search in a process of its own, with the engine and the search of a job.

    python -m bench.peer.ours SETTING FILE

SETTING is a `Setting` as JSON. Into FILE goes a line when the search begins, and one per trial.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import optuna

from bench.peer.setting import (
    MARKERS,
    MAX_NEW_TOKENS,
    METHODS,
    SYSTEM_PROMPT,
    Run,
    Setting,
    Trial,
)
from bench.peer.watch import now, watch
from bench.search import point, texts
from bench.stream import stream
from engine.heap import return_blocks
from engine.libraries import settle
from engine.report import Silent
from engine.session import Session
from jobs.spec.candidate import Candidate
from jobs.spec.methods import recipes
from jobs.spec.protocol import Prepare, Prepared, Scored
from worker.samplers import sampler, startup

ROOT = Path(__file__).parents[2]
FINISHED = "the search has ended"


def run(setting: Setting, folder: Path) -> Run:
    """Search in a process of its own; `folder` takes its record."""
    record = folder / "ours.jsonl"
    fields = json.dumps(dataclasses.asdict(setting))
    command = [sys.executable, "-m", "bench.peer.ours", fields, str(record)]
    seen = watch(command, ROOT, setting.environment(), FINISHED)
    began, *trials = map(json.loads, record.read_text(encoding="utf-8").splitlines())
    scored = [Trial(**{**trial, "at": trial["at"] - seen.began}) for trial in trials]
    return Run.of(seen, began["at"], scored)


def prepare(session: Session, setting: Setting) -> Prepared:
    """What a job of this setting asks of the engine before its first trial."""
    request = Prepare(
        model=Path(setting.model).name,
        path=setting.model,
        dtype=setting.dtype,
        device=setting.device,
        recipes=recipes([METHODS[setting.mode]]),
        prompts=texts(),
        system_prompt=SYSTEM_PROMPT,
        max_new_tokens=MAX_NEW_TOKENS,
        markers=list(MARKERS),
        seed=setting.seed,
    )
    prepared = session.handle(request, Silent())
    assert isinstance(prepared, Prepared)
    return prepared


def search(setting: Setting, record: Path) -> None:
    """The search of a job: single pass, plain point, then TPE; as many in hand as a worker has."""
    settle()  # as an engine process does
    return_blocks()
    session, method = Session(), METHODS[setting.mode]
    layers = prepare(session, setting).anatomy.layers
    study = optuna.create_study(directions=["minimize", "minimize"])
    asked: dict[int, optuna.Trial] = {}
    finished: list[dict[str, float]] = []

    def ask(number: int) -> tuple[Candidate, list[dict[str, float]]]:
        own = sampler(setting.seed, startup(setting.trials), number)
        candidate, trial = point(study, own, number, layers, method)
        if trial is not None:
            asked[number] = trial
        return candidate, list(finished) if setting.screening and trial is not None else []

    def tell(number: int, scored: Scored) -> None:
        refusals, kl = scored.scores.refusals, float(scored.scores.kl_first or 0)
        if not scored.screened:
            finished.append({"refusals": refusals / scored.scores.total, "kl_first": kl})
        if number in asked:  # of a screened one the worst, as in a job
            told = len(scored.outcomes) if scored.screened else refusals
            study.tell(asked[number], [float(told), kl])

    def write(**fields: Any) -> None:
        with record.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"at": now(), **fields}) + "\n")

    def seen(scored: Scored) -> None:
        scores = scored.scores
        write(
            refusals=scores.refusals, total=len(scored.outcomes), kl=scores.kl_first,
            screened=scored.screened,
        )  # fmt: skip

    write()
    stream(session, setting.trials, ask, tell, seen, kl_multi=False)


if __name__ == "__main__":
    search(Setting(**json.loads(sys.argv[1])), Path(sys.argv[2]))
    print(FINISHED, flush=True)
