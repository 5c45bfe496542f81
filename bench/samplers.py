"""Which sampler needs the fewest trials, and the least time, for the same front?

    python -m bench.samplers --samplers tpe nsga3 cmaes qnehvi --seeds 5 --trials 100 --rows FILE
                             [--ahead 6] [--dtype bfloat16] [--method mpoa] [--random N]
                             [--surrogate bench/trials.jsonl]

Each search is one of a job on the demo model, in this process with one thread: `--ahead` says how
many are in hand, 6 as of a worker on a CPU: the next is asked for when the first of them is scored.
Each finished search is appended to FILE as JSON, and what stands there is not run again. Prints two
Markdown tables of hypervolumes (refusal rate and first-token KL): after so many trials, and after
so many processor seconds of asking and scoring together.

A trial takes most of a second, and seeds differ more than samplers do. With `--surrogate` scores
come from a model of recorded trials instead (`bench.surrogate`), so that dozens of seeds are
minutes; the seconds of such searches are those of asking, and nothing is said of equal times.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import get_args

from pydantic import BaseModel

from bench.search import WINDOW, prepare, scored, steps
from bench.surrogate import LAYERS, Surrogate, recorded
from engine.session import Session
from jobs.fronts import hypervolume
from jobs.spec.candidate import Candidate
from jobs.spec.job import SamplerName
from jobs.spec.methods import MethodName, recipes
from jobs.spec.protocol import Scored

NAMES: tuple[SamplerName, ...] = get_args(SamplerName)
TRIALS = (10, 25, 50, 100, 200)


class Row(BaseModel):
    """One search: its points (refusal rate, KL) in order, with their processor seconds."""

    sampler: SamplerName
    ahead: int
    seed: int
    points: list[tuple[float, float]]
    sampling: list[float]
    scoring: list[float]

    def after(self, trials: int) -> float:
        """Hypervolume of the first trials."""
        return hypervolume(self.points[:trials])

    def within(self, seconds: float) -> float:
        """Hypervolume of what was scored within so many processor seconds."""
        spent = itertools.accumulate(map(sum, zip(self.sampling, self.scoring, strict=True)))
        return self.after(sum(each <= seconds for each in spent))

    @property
    def seconds(self) -> float:
        """Of asking and scoring."""
        return sum(self.sampling) + sum(self.scoring)


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samplers", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--ahead", type=int, nargs="+", default=[WINDOW])
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--method", default="mpoa", choices=get_args(MethodName))
    parser.add_argument("--random", type=int, help="random trials first; as in a job if not given")
    parser.add_argument("--surrogate", type=Path)
    parser.add_argument("--rows", type=Path, required=True)
    given = parser.parse_args()
    wanted = [
        (name, ahead, seed)
        for seed in range(given.seeds)
        for name in given.samplers
        for ahead in given.ahead
    ]
    rows = _read(given.rows)
    known = {(row.sampler, row.ahead, row.seed) for row in rows if len(row.points) >= given.trials}
    missing = [key for key in wanted if key not in known]
    score, layers = _scoring(given) if missing else (None, 0)
    for name, ahead, seed in missing:
        assert score is not None
        found = list(
            steps(
                score, layers, given.method, given.trials, seed,
                name=name, ahead=ahead, random=given.random,
            )
        )  # fmt: skip
        row = Row(
            sampler=name,
            ahead=ahead,
            seed=seed,
            points=[step.point for step in found],
            sampling=[step.sampling for step in found],
            scoring=[step.scoring for step in found],
        )
        rows.append(row)
        print(f"{name} {ahead} {seed}: {row.after(given.trials):.4f}", file=sys.stderr, flush=True)
        with given.rows.open("a", encoding="utf-8") as file:
            file.write(row.model_dump_json() + "\n")
    rows = [row for row in rows if (row.sampler, row.ahead, row.seed) in wanted]
    _after_trials(rows, given.trials)
    if given.surrogate is None:
        _after_seconds(rows)


def _scoring(given: argparse.Namespace) -> tuple[Callable[[Candidate], Scored], int]:
    """What scores a candidate, and the layers that it has."""
    if given.surrogate is not None:
        return Surrogate(recorded(given.surrogate)), LAYERS
    session = Session()
    prepare(session, dtype=given.dtype, recipes=recipes([given.method]))
    return partial(scored, session), session.ready.anatomy.layers


def _read(file: Path) -> list[Row]:
    if not file.is_file():
        return []
    return [Row.model_validate_json(line) for line in file.read_text("utf-8").splitlines()]


def _after_trials(rows: list[Row], trials: int) -> None:
    cuts = [cut for cut in TRIALS if cut <= trials]
    print(_heading([*(f"{cut} trials" for cut in cuts), "asking, ms a trial"]))
    for place, ahead, group in _groups(rows):
        cells = [_spread([row.after(cut) for row in group]) for cut in cuts]
        asking = 1000 * mean(mean(row.sampling) for row in group)
        print(_line(NAMES[place], ahead, group, [*cells, f"{asking:.0f}"]))


def _after_seconds(rows: list[Row]) -> None:
    """At a quarter, a half and the whole of what the quickest sampler takes for all trials."""
    groups = _groups(rows)
    whole = min(mean(row.seconds for row in group) for _, _, group in groups)
    spans = [round(whole * share) for share in (0.25, 0.5, 1.0)]
    print("\n" + _heading([*(f"{span} s" for span in spans), "scoring, ms a trial"]))
    for place, ahead, group in groups:
        cells = [_spread([row.within(span) for row in group]) for span in spans]
        scoring = 1000 * mean(mean(row.scoring) for row in group)
        print(_line(NAMES[place], ahead, group, [*cells, f"{scoring:.0f}"]))


def _groups(rows: list[Row]) -> list[tuple[int, int, list[Row]]]:
    """Searches by sampler, as its place in NAMES, and by how many are asked for at once."""
    ordered = itertools.groupby(sorted(rows, key=_group), key=_group)
    return [(place, ahead, list(group)) for (place, ahead), group in ordered]


def _group(row: Row) -> tuple[int, int]:
    return NAMES.index(row.sampler), row.ahead


def _heading(cells: list[str]) -> str:
    columns = ["sampler", "in hand", "seeds", *cells]
    return f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"


def _line(name: str, ahead: int, group: list[Row], cells: list[str]) -> str:
    return f"| {' | '.join([name, str(ahead), str(len(group)), *cells])} |"


def _spread(values: list[float]) -> str:
    """Mean, its standard error, and the range: 0.9780 ± 0.0016 (0.9612–0.9880)."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{mean(values):.4f} ± {error:.4f} ({min(values):.4f}–{max(values):.4f})"


if __name__ == "__main__":
    main()
