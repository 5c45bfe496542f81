"""The figures of `bench.workers`: one search by several workers, and what many say together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from pydantic import BaseModel

HEAD = (
    "workers", "seed", "trials", "seconds", "trials a minute", "scoring",
    "processor seconds a trial: engines", "workers", "servers", "hypervolume",
)  # fmt: skip


class Row(BaseModel):
    """One search. Seconds of the clock, and processor seconds of all processes of a kind."""

    workers: int
    seed: int
    trials: int
    seconds: float
    scored: float
    engines: float
    supervisors: float
    servers: float
    hypervolume: float

    @property
    def rate(self) -> float:
        """Trials a minute."""
        return 60 * self.trials / self.seconds

    @property
    def scoring(self) -> float:
        """Share of the workers' time in which they scored."""
        return self.scored / (self.seconds * self.workers)

    def cells(self) -> list[str]:
        """The figures."""
        used = (self.engines, self.supervisors, self.servers)
        return [
            f"{self.seconds:.1f}", f"{self.rate:.1f}", f"{self.scoring:.1%}",
            *(f"{one / self.trials:.3f}" for one in used), f"{self.hypervolume:.4f}",
        ]  # fmt: skip


def read(file: Path | None) -> list[Row]:
    """The finished runs of a file of JSON lines; none where it is not there."""
    if file is None or not file.is_file():
        return []
    return [Row.model_validate_json(line) for line in file.read_text("utf-8").splitlines()]


def table(rows: Sequence[Row]) -> list[str]:
    """Each run, and by the number of workers the means and ratios to one worker, seed by seed."""
    order = sorted(rows, key=lambda row: (row.seed, row.workers))
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    for row in order:
        cells = [str(row.workers), str(row.seed), str(row.trials), *row.cells()]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| workers | seeds | trials a minute | against one | processor seconds a trial against one "
        "| hypervolume | against one |",
        "|---|---|---|---|---|---|---|",
    ]
    alone = {row.seed: row for row in rows if row.workers == 1}
    for count in sorted({row.workers for row in rows}):
        mine = [row for row in rows if row.workers == count]
        pairs = [(row, alone[row.seed]) for row in mine if row.seed in alone]
        faster = [row.rate / one.rate for row, one in pairs]
        dearer = [_all(row) / _all(one) for row, one in pairs]
        better = [row.hypervolume for row, _ in pairs], [one.hypervolume for _, one in pairs]
        ratio = f"{mean(better[0]) / mean(better[1]) - 1:+.1%}" if pairs else "–"
        lines.append(
            f"| {count} | {len(mine)} | {mean(row.rate for row in mine):.1f} | {_range(faster)} "
            f"| {_range(dearer)} | {mean(row.hypervolume for row in mine):.4f} | {ratio} |"
        )
    return lines


def _all(row: Row) -> float:
    """Processor seconds a trial, of all processes."""
    return (row.engines + row.supervisors + row.servers) / row.trials


def _range(ratios: Sequence[float]) -> str:
    """`1.87 × (1.82–1.93)`."""
    if not ratios:
        return "–"
    return f"{mean(ratios):.2f} × ({min(ratios):.2f}–{max(ratios):.2f})"
