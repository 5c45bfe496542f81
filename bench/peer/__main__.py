"""Our engine beside `heretic-llm`: speed, memory and what either finds, on one machine.

    python -m bench.peer [--trials 20] [--rounds 2] [--modes full none] [--dtype float32]
        [--fast bfloat16] [--threads 2] [--model FOLDER] [--device cpu] [--venv FOLDER]

Both get the same model, prompts, markers, system prompt, token limit and number of trials, and take
turns; ours once in the same way, all prompts answered in every trial, and once as a job would, in
the fast data type and with screening. At the first call the other program is installed into a
virtual environment of its own, which `--venv` names. Its trials are then scored by our engine as
well: the same parameters must give the same scores. Prints Markdown.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

from bench.peer import heretic, ours, shared
from bench.peer.setting import METHODS, Mode, Run, Setting
from demo import MODEL
from jobs.fronts import best

BATCH = 128  # prompts at once where the other program is told; ours decides by free memory
HEAD = (
    "search", "trials/min", "against it", "s to the first trial", "s in all",
    "processor s: start, each trial", "peak memory, MB", "peak GPU, MB",
    "pick of each round: refusals, KL", "hypervolume at our end", "at its end",
)  # fmt: skip


@dataclass
class Side:
    """One program in one mode. `batch` is None for ours; `fast`: as a job would run it."""

    name: str
    mode: Mode
    batch: int | None = None
    fast: bool = False
    runs: list[Run] = field(default_factory=list)
    edits: list[heretic.Edit] = field(default_factory=list)  # of the first round


def measure(sides: Sequence[Side], options: argparse.Namespace) -> list[float]:
    """Run every side once a round, the order turned round each time; the load before each round."""
    loads = []
    for number in range(options.rounds):
        loads.append(os.getloadavg()[0])
        for side in sides if number % 2 == 0 else list(reversed(sides)):
            print(f"round {number + 1}: {side.name}", file=sys.stderr, flush=True)
            setting = _setting(options, side.mode, number, side.fast)
            with tempfile.TemporaryDirectory() as name:
                if side.batch is None:
                    side.runs.append(ours.run(setting, Path(name)))
                    continue
                run, edits = heretic.run(setting, Path(name), options.venv, side.batch)
                side.runs.append(run)
                side.edits = side.edits or edits
    return loads


def table(sides: Sequence[Side]) -> list[str]:
    """The figures of all rounds: medians, and the range of the rates."""
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    for side in sides:
        same = [one for one in sides if one.mode == side.mode]
        mine = next(one for one in same if one.batch is None)
        other = next(one for one in same if one.batch is not None)
        rates = [run.rate for run in side.runs]
        cells = [
            side.name,
            f"{median(rates):.1f} ({min(rates):.1f}–{max(rates):.1f})",
            f"{median(rates) / median([run.rate for run in other.runs]):.1f} ×",
            f"{_median(side, lambda run: min(trial.at for trial in run.trials)):.1f}",
            f"{_median(side, lambda run: run.end):.1f}",
            f"{_median(side, lambda run: run.cpu[0]):.1f}, "
            f"{_median(side, lambda run: run.cpu[1] / len(run.trials)):.2f}",
            f"{_median(side, lambda run: run.memory / 1e6):.0f}",
            f"{_median(side, lambda run: run.gpu / 1e6):.0f}",
            "; ".join(map(_pick, side.runs)),
            f"{_hypervolume(side, mine):.4f}",
            f"{_hypervolume(side, other):.4f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def note(options: argparse.Namespace, its: dict[str, str], loads: Sequence[float]) -> str:
    """How the figures were measured, and with what."""
    packages = ", ".join(
        f"{name} {number} ({version(name)} here)"
        for name, number in its.items()
        if name != heretic.PACKAGE
    )
    return (
        f"{options.trials} trials, rounds: {options.rounds} in alternating order, {options.dtype}, "
        f"{options.threads} threads, {_device(options.device)}; load before each round: "
        f"{', '.join(f'{load:.1f}' for load in loads)}. {heretic.PACKAGE} {its[heretic.PACKAGE]} "
        f"with {packages}; {BATCH} prompts at once where it is told. Seconds count from the start "
        "of the process, trials per minute from the beginning of the first trial. Medians of the "
        "rounds; a hypervolume is that of the trials scored by then. Before its first trial ours "
        f"also scores held-out prompts. Fast: {options.fast}, with screening."
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.peer", description=__doc__)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--fast", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--modes", nargs="+", default=["full", "none"], choices=list(METHODS))
    parser.add_argument("--automatic", action="store_true", help="also with its own batch size")
    parser.add_argument("--model", type=Path, default=MODEL, help="a folder; the demo model")
    parser.add_argument("--threads", type=int, default=2, help="OMP_NUM_THREADS of both")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--venv", type=Path, default=heretic.cache(), help="of the other program")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # and what it started, with it
    torch.set_num_threads(options.threads)
    its = heretic.install(options.venv)
    sides: list[Side] = []
    for mode in options.modes:
        sides += [
            Side(f"ours, `{METHODS[mode]}`", mode),
            Side(f"heretic, `{mode}`", mode, BATCH),
            Side(f"ours, `{METHODS[mode]}`, fast", mode, fast=True),
        ]
        if options.automatic:
            sides.append(Side(f"heretic, `{mode}`, its own batch size", mode, heretic.AUTOMATIC))
    loads = measure(sides, options)
    print("\n".join(table(sides)))
    print("\n" + note(options, its, loads))
    for side in (side for side in sides if side.batch == BATCH):
        print("\n" + "\n".join(shared.table(_setting(options, side.mode), side.edits)))


def _setting(options: argparse.Namespace, mode: Mode, seed: int = 0, fast: bool = False) -> Setting:
    return Setting(
        str(options.model.resolve()), mode, options.trials, seed,
        options.fast if fast else options.dtype, options.device, options.threads, screening=fast,
    )  # fmt: skip


def _median(side: Side, of: Callable[[Run], float]) -> float:
    return median(map(of, side.runs))


def _hypervolume(side: Side, until: Side) -> float:
    """Of `side`, by the second at which `until` ended in the same round."""
    pairs = zip(side.runs, until.runs, strict=True)
    return median(run.hypervolume(ended.end) for run, ended in pairs)


def _pick(run: Run) -> str:
    trial = run.whole[best([trial.point for trial in run.whole])]
    return f"{trial.refusals}/{trial.total}, {trial.kl:.4f}"


def _device(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"


if __name__ == "__main__":
    main()
