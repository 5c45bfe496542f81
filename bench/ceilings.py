"""How near is a trial to what the machine can do? Measured ceilings, and whole trials under them.

    python -m bench.ceilings [--model demo 0.5B FOLDER ...] [--dtype auto float32 ...]
        [--device auto|cpu|cuda] [--threads N] [--trials 16] [--warm 16] [--prompts 100] [--seed 0]
        [--profile] [--quiet]

1. Ceilings: FLOP/s of matrix products in each dtype, the best of cubes and of the shapes of the
   model's own layers, with the threads that a trial has on one product, or one product in each of
   as many threads; bytes/s of copying and of reading a tensor far larger than the caches. Measured
   before and after the trials; the best counts.
2. Trials: a search asks for candidates as a worker does, and the engine scores them. The first
   `--warm` trials build up drafts and kept states. Of the others operations, bytes and seconds, by
   phase and of the whole trial, as shares of the ceilings.

A share by the clock says what the machine did, and needs a quiet machine (`--quiet` refuses
another). A share by processor seconds (one thread's FLOP in a second that it ran, against the same
of the ceiling) says what the program does with the time that it gets, and hardly minds other work.
`--model` takes a folder, `demo`, or a shape of `bench.inflate`, which is then written to a
temporary folder. `--profile` adds the ten operations that take most of one request.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
import torch
from torch import nn

from bench import machine
from bench.counting import Counter, Work, linear_layers
from bench.inflate.shapes import SHAPES
from bench.inflate.write import inflate
from bench.peaks import Ceilings, measure
from bench.search import prepare, study_of, texts
from bench.stream import stream
from demo import MODEL
from engine.session import Session
from jobs.spec.candidate import Candidate
from jobs.spec.memory import CANDIDATES
from jobs.spec.protocol import PromptTexts, Scored
from worker.space import candidate_from, space

DEFAULT = {"cpu": ["demo", "0.5B"], "cuda": ["1.7B", "8B"]}
HEAD = (
    "model", "dtype", "phase", "seconds a trial", "processor seconds", "GFLOP", "FLOP/s",
    "of the ceiling", "by processor seconds", "GB", "of the reading ceiling",
)  # fmt: skip
DEMOS = ("demo", *SHAPES)
TOP = 10


class Search:
    """A search that goes on: each call has some candidates scored."""

    def __init__(self, session: Session, trials: int, seed: int) -> None:
        self._session, self._study = session, study_of(trials, seed)
        self._layers = session.ready.anatomy.layers

    def go_on(self, trials: int) -> None:
        """So many trials."""
        asked: list[optuna.Trial] = []

        def ask(number: int) -> tuple[Candidate, list[dict[str, float]]]:
            asked.append(self._study.ask(space(self._layers, "mpoa")))
            return candidate_from(asked[-1].params, self._layers, "mpoa"), []

        def tell(number: int, scored: Scored) -> None:
            scores = scored.scores
            self._study.tell(asked[number], [float(scores.refusals), float(scores.kl_first or 0)])

        stream(self._session, trials, ask, tell)


def main() -> None:
    """Measure every model in every dtype and print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.ceilings", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model", nargs="+", help="demo, a shape of bench.inflate, or a folder")
    parser.add_argument("--dtype", nargs="+", default=["auto"])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--trials", type=int, default=16, help="that are measured")
    parser.add_argument("--warm", type=int, default=16, help="trials before them")
    parser.add_argument("--prompts", type=int, default=100, help="of each side and role")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--quiet", action="store_true", help="only on a machine without a load")
    given = parser.parse_args()
    if given.quiet:
        machine.demand_quiet()
    before = machine.load()
    device = machine.device_here(given.device)
    torch.set_num_threads(given.threads)
    print(f"{machine.machine(device, given.threads)}; {machine.quiet(before)}.\n", flush=True)
    for model in given.model or DEFAULT[device]:
        with folder_of(model) as folder:
            for dtype in given.dtype:
                _report(model, folder, dtype, device, given)


@contextmanager
def folder_of(model: str) -> Iterator[Path]:
    """The folder of a model; that of a shape is written first and removed afterwards."""
    if model not in SHAPES:
        yield MODEL if model in DEMOS else Path(model)
        return
    with tempfile.TemporaryDirectory() as name:
        inflate(SHAPES[model], Path(name))
        yield Path(name)


def few(texts: PromptTexts, count: int) -> PromptTexts:
    """The first `count` prompts of each side and role."""
    return PromptTexts.model_validate({name: lines[:count] for name, lines in texts})


def _report(
    model: str, folder: Path, dtype: str, device: machine.Place, given: argparse.Namespace
) -> None:
    """Measure one model and print its tables."""
    session, name = Session(), model if model in DEMOS else folder.name
    prepare(
        session, path=str(folder), dtype=dtype, device=device, prompts=few(texts(), given.prompts)
    )
    search = Search(session, given.warm + given.trials, given.seed)
    loaded = session.ready.loaded
    sizes = sorted({_size(layer) for layer in linear_layers(loaded.model)})
    with Counter(loaded.model, loaded.device) as counter:
        search.go_on(given.warm)
        ceilings = measure(loaded.device, loaded.dtype, given.threads, sizes)
        counter.restart()
        search.go_on(given.trials)
    ceilings = ceilings.best(measure(loaded.device, loaded.dtype, given.threads, sizes))
    print("\n".join(ceilings.table()))
    print(f"\n| {' | '.join(HEAD)} |\n{'|---' * len(HEAD)}|")
    written = str(loaded.dtype).removeprefix("torch.")
    for phase, work in (*counter.phases.items(), ("whole trial", counter.total)):
        if work.wall > 0:
            cells = [name, written, phase, *cells_of(work, ceilings, given.trials)]
            print(f"| {' | '.join(cells)} |")
    print(flush=True)
    if given.profile:
        print("\n".join(profile(search, loaded.device)), flush=True)


def _size(layer: nn.Module) -> tuple[int, ...]:
    """The shape of a layer's weight."""
    return tuple(layer.get_parameter("weight").shape)


def cells_of(work: Work, ceilings: Ceilings, trials: int) -> list[str]:
    """The figures of one row: means of the trials, and shares of the ceilings."""
    rate = work.flops / work.wall
    own = work.flops / work.processor if work.processor > 0 else 0.0
    return [
        f"{work.wall / trials:.3f}",
        f"{work.processor / trials:.3f}",
        f"{work.flops / trials / 1e9:.1f}",
        f"{rate / 1e9:.0f} G",
        f"{rate / ceilings.product.rate:.0%}",
        f"{own / ceilings.product.own:.0%}" if ceilings.product.own else "-",
        f"{work.bytes / trials / 1e9:.2f}",
        f"{work.bytes / work.wall / ceilings.read.rate:.0%}",
    ]


def profile(search: Search, device: torch.device) -> list[str]:
    """The operations that take most of one request, by the time in themselves alone."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    torch.set_num_threads(1)  # no lanes: the profiler sees this process alone
    with torch.profiler.profile(activities=kinds) as seen:
        search.go_on(CANDIDATES)
    field = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    times = {event.key: (getattr(event, field), event.count) for event in seen.key_averages()}
    whole = sum(time for time, _ in times.values())
    lines = ["| operation | share | ms | calls |", "|---|---|---|---|"]
    for key, (time, count) in sorted(times.items(), key=lambda pair: -pair[1][0])[:TOP]:
        lines.append(f"| `{key}` | {time / whole:.1%} | {time / 1e3:.0f} | {count} |")
    return lines


if __name__ == "__main__":
    main()
