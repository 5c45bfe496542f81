"""Does screening find the same front with the same trials, and how much sooner?

    python -m bench.screening --rows FILE [--seeds 5] [--trials 100] [--dtype bfloat16]
                              [--surrogate bench/trials.jsonl]

Each seed is searched twice on the demo model, in this process with one thread, as a worker on a CPU
would: all trials decoded whole, and what a finished trial dominates screened. Finished searches are
appended to FILE as JSON, and what stands there is not run again. Prints Markdown: hypervolume
(refusal rate and first-token KL) at equal trials, and processor seconds a trial. With `--surrogate`
scores come from a model of recorded trials (`bench.surrogate`): many seeds in minutes, and nothing
is said of the time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import torch
from pydantic import BaseModel

from bench.search import WINDOW, prepare, steps
from bench.surrogate import LAYERS, Surrogate, recorded
from engine.report import Silent
from engine.scorers.screen import bound
from engine.session import Session
from jobs.fronts import hypervolume
from jobs.spec.candidate import Candidate
from jobs.spec.methods import MethodName
from jobs.spec.protocol import Score, Scored, ScoredBatch

METHOD: MethodName = "mpoa"
WHOLE = 2  # single pass and plain point are never screened
TRIALS = (25, 50, 100, 200)

Finished = list[dict[str, float]]


class Row(BaseModel):
    """One search: points (refusal rate, KL) in order, how many were screened, its seconds."""

    screening: bool
    seed: int
    points: list[tuple[float, float]]
    screened: int
    seconds: float

    def after(self, trials: int) -> float:
        """Hypervolume of the first trials."""
        return hypervolume(self.points[:trials])


def by_engine(session: Session) -> Callable[[Candidate, Finished], Scored]:
    """Scores by the engine."""

    def score(candidate: Candidate, finished: Finished) -> Scored:
        asked = Score(candidates=[candidate], finished=finished, kl_multi=False)
        result = session.handle(asked, Silent())
        assert isinstance(result, ScoredBatch)
        return result.scored[0]

    return score


def by_surrogate(file: Path) -> Callable[[Candidate, Finished], Scored]:
    """Scores by the surrogate, screened as the engine would at the end of all answers."""
    told = Surrogate(recorded(file))

    def score(candidate: Candidate, finished: Finished) -> Scored:
        found = told(candidate)
        scores = found.scores
        most = bound({"kl_first": float(scores.kl_first or 0)}, finished, scores.total)
        lost = most is not None and scores.refusals >= most
        return found.model_copy(update={"screened": lost})

    return score


def search(
    score: Callable[[Candidate, Finished], Scored], layers: int, trials: int, seed: int,
    screening: bool,
) -> Row:  # fmt: skip
    """One search, screened or whole."""
    finished: dict[int, dict[str, float]] = {}
    asked = 0

    def one(candidate: Candidate) -> Scored:
        nonlocal asked
        known = [point for number, point in finished.items() if number <= asked - WINDOW]
        found = score(candidate, known if screening and asked >= WHOLE else [])
        if not found.screened:
            rate = found.scores.refusals / found.scores.total
            finished[asked] = {"refusals": rate, "kl_first": float(found.scores.kl_first or 0)}
        asked += 1
        return found

    found = list(steps(one, layers, METHOD, trials, seed, ahead=WINDOW))
    return Row(
        screening=screening,
        seed=seed,
        points=[step.point for step in found],
        screened=sum(step.scored.screened for step in found),
        seconds=sum(step.sampling + step.scoring for step in found),
    )


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--surrogate", type=Path)
    parser.add_argument("--rows", type=Path, required=True)
    given = parser.parse_args()
    lines = given.rows.read_text("utf-8").splitlines() if given.rows.exists() else []
    rows = [Row.model_validate_json(line) for line in lines]
    known = {(row.screening, row.seed) for row in rows if len(row.points) >= given.trials}
    for seed in range(given.seeds):
        for screening in (False, True):
            if (screening, seed) in known:
                continue
            score, layers = _scoring(given)  # anew: an engine remembers answers
            row = search(score, layers, given.trials, seed, screening)
            rows.append(row)
            print(f"{seed} {screening}: {row.after(given.trials):.4f}", file=sys.stderr, flush=True)
            with given.rows.open("a", encoding="utf-8") as file:
                file.write(row.model_dump_json() + "\n")
    _table([row for row in rows if row.seed < given.seeds], given)


def _scoring(given: argparse.Namespace) -> tuple[Callable[[Candidate, Finished], Scored], int]:
    if given.surrogate is not None:
        return by_surrogate(given.surrogate), LAYERS
    torch.set_num_threads(1)
    session = Session()
    prepare(session, dtype=given.dtype)
    return by_engine(session), session.ready.anatomy.layers


def _table(rows: list[Row], given: argparse.Namespace) -> None:
    marks = [count for count in TRIALS if count <= given.trials]
    print(f"| search | {' | '.join(f'after {n}' for n in marks)} | screened | s a trial |")
    print("|---" * (len(marks) + 3) + "|")
    for screening, name in ((False, "whole"), (True, "screened")):
        mine = [row for row in rows if row.screening == screening]
        cells = [
            f"{mean(values):.4f} ± {stdev(values) / len(values) ** 0.5 if values[1:] else 0:.4f}"
            for values in ([row.after(count) for row in mine] for count in marks)
        ]
        cells.append(f"{mean(row.screened for row in mine):.0f} of {given.trials}")
        seconds = mean(row.seconds / len(row.points) for row in mine)
        cells.append("–" if given.surrogate else f"{seconds:.3f}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
