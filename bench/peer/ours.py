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
from bench.search import texts
from engine.heap import return_blocks
from engine.report import Silent
from engine.session import Session
from jobs.spec.candidate import Candidate
from jobs.spec.memory import CANDIDATES
from jobs.spec.methods import recipes
from jobs.spec.protocol import Prepare, Prepared, Score, Scored
from worker.samplers import sampler, startup
from worker.space import candidate_from, first, plain, plain_number, space

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


class Recorder(Silent):
    """Writes the score of each candidate as soon as the engine tells it, and keeps it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.scored: dict[int, Scored] = {}

    def line(self, **fields: Any) -> None:
        """Append a line with the time."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"at": now(), **fields}) + "\n")

    def partial(self, index: int, text: str = "", scored: Scored | None = None) -> None:
        """One candidate's finished score."""
        if scored is not None:
            self.scored[index] = scored
            scores = scored.scores
            self.line(
                refusals=scores.refusals, total=len(scored.outcomes), kl=scores.kl_first,
                screened=scored.screened,
            )  # fmt: skip


def search(setting: Setting, record: Path) -> None:
    """The search of a job: single pass, plain point, then TPE; as many at once as a worker asks."""
    return_blocks()  # as an engine process does
    session, recorder, method = Session(), Recorder(record), METHODS[setting.mode]
    prepared = prepare(session, setting)
    layers, size = prepared.anatomy.layers, CANDIDATES
    table = space(layers, method)
    study = optuna.create_study(directions=["minimize", "minimize"])
    finished: list[dict[str, float]] = []
    recorder.line()
    for start in range(0, setting.trials, size):
        asked: list[tuple[Candidate, optuna.Trial | None]] = []
        for number in range(start, min(start + size, setting.trials)):
            if number < plain_number(method):
                asked.append((first(layers, method), None))
                continue
            if number == plain_number(method):
                study.enqueue_trial(plain(layers, method))
            study.sampler = sampler(setting.seed, startup(setting.trials), number)
            trial = study.ask(table)
            asked.append((candidate_from(trial.params, layers, method), trial))
        candidates = [candidate for candidate, _ in asked]
        known = finished if setting.screening else []
        session.handle(Score(candidates=candidates, kl_multi=False, finished=known), recorder)
        for index, (_, asked_trial) in enumerate(asked):
            scored = recorder.scored[index]
            refusals, kl = scored.scores.refusals, float(scored.scores.kl_first or 0)
            if not scored.screened:
                rate = refusals / scored.scores.total
                finished.append({"refusals": rate, "kl_first": kl})
            if asked_trial is not None:  # of a screened one the worst, as in a job
                told = len(scored.outcomes) if scored.screened else refusals
                study.tell(asked_trial, [float(told), kl])


if __name__ == "__main__":
    search(Setting(**json.loads(sys.argv[1])), Path(sys.argv[2]))
    print(FINISHED, flush=True)
