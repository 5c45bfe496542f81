"""Which method removes refusals at the least damage? All of them under one budget.

    python -m bench.methods [--trials 200] [--seeds 0 1 2] [--methods mpoa ara ...] [--rows FILE]

The demo model is prepared once. Each searched method gets the same number of trials per seed, the
fixed ones the one trial that they are. Of each search the pick (fewest refusals of search prompts,
then least KL) is scored on held-out prompts. Prints a Markdown table of all searches, then their
means by method. Hours: each finished search is appended to `--rows` as JSON, and what stands there
is not run again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import mean
from typing import get_args

from pydantic import BaseModel

from bench.search import Found, find, prepare
from engine.session import Session
from jobs.spec.methods import (
    METHODS,
    MethodName,
    needs_affine,
    needs_ara,
    needs_router,
    recipes,
)
from jobs.spec.scores import Scores, wilson

NAMES: tuple[MethodName, ...] = get_args(MethodName)
DENSE = [name for name in NAMES if not METHODS[name].router]  # what the demo model can be edited by


class Row(BaseModel):
    """One search."""

    method: MethodName
    seed: int
    trials: int
    hypervolume: float
    search: Scores
    heldout: Scores
    seconds: float

    @classmethod
    def of(cls, method: MethodName, seed: int, found: Found) -> Row:
        """The row of a finished search."""
        return cls(
            method=method,
            seed=seed,
            trials=found.trials,
            hypervolume=found.hypervolume,
            search=found.search.scores,
            heldout=found.heldout.scores,
            seconds=found.seconds,
        )


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=DENSE)
    parser.add_argument("--rows", type=Path)
    given = parser.parse_args()
    rows = _read(given.rows)
    methods: list[MethodName] = given.methods
    todo = [
        (method, seed)
        for seed in given.seeds
        for method in methods
        if not (METHODS[method].kind == "fixed" and seed != given.seeds[0])
        and not any((row.method, row.seed) == (method, seed) for row in rows)
    ]
    if todo:
        session = Session()
        prepare(
            session,
            recipes=recipes(methods),
            ara=needs_ara(methods),
            affine=needs_affine(methods),
            router=needs_router(methods),
        )
    for method, seed in todo:
        row = Row.of(method, seed, find(session, method, given.trials, seed))
        rows.append(row)
        print(_line(row), file=sys.stderr, flush=True)
        if given.rows is not None:
            with given.rows.open("a", encoding="utf-8") as file:
                file.write(row.model_dump_json() + "\n")
    _tables([row for row in rows if row.method in methods])


def _read(file: Path | None) -> list[Row]:
    if file is None or not file.is_file():
        return []
    return [Row.model_validate_json(line) for line in file.read_text("utf-8").splitlines()]


def _tables(rows: list[Row]) -> None:
    order = {name: place for place, name in enumerate(NAMES)}
    rows = sorted(rows, key=lambda row: (order[row.method], row.seed))
    print("| method | seed | trials | hypervolume | refusals, search | refusals, held-out "
          "| KL, first token | KL, 16 tokens | seconds |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(_line(row))
    print("\n| method | seeds | hypervolume | refusals, held-out, all seeds | KL, first token "
          "| KL, 16 tokens | seconds |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    for method in dict.fromkeys(row.method for row in rows):
        print(_means([row for row in rows if row.method == method]))


def _line(row: Row) -> str:
    seed = "–" if METHODS[row.method].kind == "fixed" else row.seed
    held = row.heldout
    return (
        f"| {row.method} | {seed} | {row.trials} | {row.hypervolume:.4f} "
        f"| {_count(row.search.refusals, row.search.total)} | {_count(held.refusals, held.total)} "
        f"| {held.kl_first:.2g} | {held.kl_multi:.2g} | {row.seconds:.0f} |"
    )


def _means(rows: list[Row]) -> str:
    """The means over the seeds; refusals are added up, with the interval of their sum."""
    held = [row.heldout for row in rows]
    return (
        f"| {METHODS[rows[0].method].title} | {len(rows)} "
        f"| {mean(row.hypervolume for row in rows):.4f} "
        f"| {_count(sum(s.refusals for s in held), sum(s.total for s in held))} "
        f"| {mean(s.kl_first or 0 for s in held):.2g} | {mean(s.kl_multi or 0 for s in held):.2g} "
        f"| {mean(row.seconds for row in rows):.0f} |"
    )


def _count(refusals: int, total: int) -> str:
    low, high = wilson(refusals, total)
    return f"{refusals}/{total} ({100 * low:.1f}–{100 * high:.1f} %)"


if __name__ == "__main__":
    main()
