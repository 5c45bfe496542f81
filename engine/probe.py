"""What the modules of one decoder block do, told from its behaviour on random input.

1. A candidate writes if, all others silent, whatever vector v it says moves the stream by g∘v, with
   a g (T, d) that does not depend on v: as it is (g = 1), scaled, through a norm, through a gate.
2. With exactly the writers silent, the block must leave the stream what it was (`Span`). This is
   the proof that no other matrix writes; it does not rest on any name.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from engine.candidates import Candidate, candidates, unreadable
from engine.experiment import Call, Experiment
from engine.writer import Writer
from jobs.spec.candidate import Component
from jobs.spec.protocol import WriterReport


@dataclass(frozen=True)
class Found:
    """What `probe` says of a block.

    keys       of the candidates that write
    readers    keys of those that were run and do not
    idle       paths of those that were not run, by key
    """

    writers: list[Writer]
    missed: list[WriterReport]
    keys: frozenset[str]
    readers: frozenset[str] = frozenset()
    idle: dict[str, list[str]] = field(default_factory=dict)


def probe(
    block: nn.Module, call: Call, prefix: str, layer: int, d: int,
    expected: frozenset[str] | None = None,
) -> Found:  # fmt: skip
    """The writers of one block and whatever else in it writes.

    `expected`: the keys that wrote in a block like this one; only they are tried at first.
    """
    probing = Experiment(block, call, layer, d)
    known = candidates(block, d)
    found = None
    if expected is not None:
        found = _probe(probing, [c for c in known if c.key in expected], prefix, layer)
    if found is None or found.missed or found.keys != expected:
        found = _probe(probing, known, prefix, layer)
    quiet = [c for c in known if c.key not in found.keys]
    run = probing.run_modules(quiet)
    return replace(
        found,
        readers=frozenset(c.key for c in quiet if c in run),
        idle={c.key: [f"{prefix}.{name}" for name in c.modules] for c in quiet if c not in run},
    )


def _probe(probing: Experiment, known: list[Candidate], prefix: str, layer: int) -> Found:
    # 1. The writers: parameters with all linear modules silent, then those, then what only shows
    #    while the readers, such as gates, speak.
    linear: list[Candidate] = [c for c in known if not c.parameter]
    held: list[Candidate] = [c for c in known if c.parameter]
    gains: dict[Candidate, Tensor] = {}

    def search(among: list[Candidate], quiet: list[Candidate]) -> None:
        again = True
        while again:
            again = False
            for c in among:
                taken = any(c.key == g.key for g in gains)
                others = [q for q in quiet if not c.parameter or q.owner is not c.owner]
                silent: dict[Candidate, Tensor | None] = dict.fromkeys([*others, *gains])
                if not taken and (gain := probing.gain(c, silent)) is not None:
                    gains[c] = gain
                    again = bool(c.parameter)

    def whole() -> bool:
        return probing.hear(dict.fromkeys(gains), trace=True).whole

    search(held, known)
    if held:
        search(held, linear)
    search(linear, linear)
    missed: list[WriterReport] = []
    proven = whole()
    if not proven:
        search(known, [])
        proven = whole()
    if not proven:
        unknown = unreadable(probing.block, known)
        search(linear, [*linear, *unknown])
        others = [c for c in known if all(c.key != g.key for g in gains)]
        missed = _unknown(probing, [*unknown, *others], gains, prefix, layer)

    # 2. What they are.
    mixers = probing.mixers(gains)
    writers: list[Writer] = []
    for candidate, gain in gains.items():
        component: Component = "attention" if candidate in mixers else "mlp"
        via, scale = _way(probing, candidate, gain)
        for name, module in candidate.modules.items():
            path = f"{prefix}.{name}" if name else prefix
            if candidate.parameter and candidate.parameter != "weight":
                path = f"{path}.{candidate.parameter}"
            writers.append(
                Writer(
                    path, layer, component, module, candidate.d, candidate.n, via, scale,
                    candidate.parameter or "weight", candidate.experts,
                    candidate.transposed or type(module).__name__ == "Conv1D",
                )
            )  # fmt: skip
    if not writers and not missed:
        missed = [missing(prefix, layer, (), "the block holds no writer")]
    return Found(writers, missed, frozenset(c.key for c in gains))


def _way(probing: Experiment, candidate: Candidate, gain: Tensor) -> tuple[str, float]:
    """What an output passes before it is added, "" where only a number, and that number."""

    def even(over: tuple[int, ...]) -> bool:
        mean = gain.mean(over, keepdim=True)
        return bool((gain - mean).norm() <= 2 * probing.tolerance * gain.norm())

    if even((0, 1, 2)):
        routed = candidate.parameter or len(candidate.modules) > 1
        return "", 1.0 if routed else float(gain.mean())
    if even((1, 2)):
        return "", 1.0
    if even((0,)):
        return "a norm or a scale per channel", 1.0
    return "a gate per token", 1.0


def _unknown(
    probing: Experiment, others: list[Candidate], gains: Collection[Candidate], prefix: str,
    layer: int,
) -> list[WriterReport]:  # fmt: skip
    """What writes besides the writers: the matrix without which the block is the identity."""
    blamed: dict[str, WriterReport] = {}
    for c in others:
        if not probing.hear(dict.fromkeys([*gains, c]), trace=True).whole:
            continue
        for name, module in c.modules.items():
            path = ".".join(part for part in (prefix, name, c.parameter) if part)
            shape = tuple(getattr(module, c.parameter).shape) if c.parameter else (c.d, c.n)
            reason = f"{type(module).__name__} writes with it in a way that is not understood"
            blamed[path] = missing(path, layer, shape, reason)
    return list(blamed.values()) or [
        missing(prefix, layer, (), "the block adds something besides its writers")
    ]


def missing(name: str, layer: int, shape: tuple[int, ...], reason: str) -> WriterReport:
    """A writer that no edit reaches; `shape` () where no parameter can be named."""
    return WriterReport(
        name=name, layer=layer, component="mlp", shape=shape, covered=False, reason=reason
    )
