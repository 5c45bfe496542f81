"""How much memory each phase of a job takes, and which one decides.

The phases are the engine's (`engine.preparation`, `engine.scorers`, `engine.export`); the bytes of
a row come from `jobs.spec.memory`. Measured beside it in bench/memory.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pydantic import BaseModel, Field

from jobs.spec.job import JobSpec
from jobs.spec.memory import (
    CANDIDATES,
    CPU_ROWS,
    CUDA_ROWS,
    LANES,
    STATIONS,
    Kind,
    block_row,
    cache_row,
    compared_rows,
    comparing_bytes,
    decode_row,
    drafts_bytes,
    logits_row,
    lower_bytes,
)
from jobs.spec.methods import METHODS, needs_router
from jobs.spec.shape import FLOAT32, Shape
from jobs.weights import Weights

PREFIX_PROMPTS, PREFIX_TOKENS = 100, 16  # per side, read for what all answers begin with
# Besides all tensors. A CPU's process: interpreter, torch, transformers, bitsandbytes and peft,
# measured. CUDA: context, cuBLAS workspace and allocator slack on the device, and the libraries'
# pages on the host; both are rules of thumb.
OVERHEAD: dict[Kind, int] = {"cuda": 700_000_000, "cpu": 530_000_000}
HOST_BESIDE_CUDA = 2_000_000_000
# What oneDNN keeps on a CPU of the 16-bit kernels that it makes for each new shape; every expert
# of a mixture gets a number of tokens of its own. Measured.
KERNELS, KERNELS_OF_EXPERTS = 50_000_000, 150_000_000
# What each process that scores comes to hold in a search of 200 trials, measured: holes of its heap
# and pages that it copied (where it was forked); and of those kernels, of more and more shapes.
FORKED, KERNELS_OF_SEARCH = 75_000_000, 330_000_000
SAMPLED = 256  # prompts a side of which ARA keeps every writer's inputs and outputs


class Phase(BaseModel):
    """What one phase holds on the device (of a CPU job: in memory), in bytes."""

    name: str
    bytes: int = Field(description="peak of the phase, all parts and the libraries")
    parts: dict[str, int]
    reclaimable: int = Field(
        0, description="mapped pages of files besides, which the system takes back when it must"
    )
    optional: bool = Field(False, description="left out where memory does not allow it")


class Need(BaseModel):
    """The memory of a job on one kind of device."""

    kind: Kind
    bytes: int = Field(description="peak, with one candidate's prompts in a batch (of a CPU: two)")
    least: int = Field(description="peak with batches of one row: less than this cannot run")
    most: int = Field(description="peak with all candidates of a request in a batch")
    decides: str = Field(description="the phase of that peak")
    host: int = Field(description="peak of the host's memory; of a CPU job the same as `bytes`")
    phases: list[Phase]


@dataclass(frozen=True)
class Workload:
    """A job's prompts and batches: `prompt` tokens of the longest prompt, rows of each batch.

    Of the `together` candidates of a request, `group` share a batch and `lanes` batches are worked
    on at once (`engine.lanes`).
    """

    kind: Kind
    prompt: int
    new: int
    compared: int
    side: int
    scored: int
    heldout: int
    group: int
    lanes: int = 1
    together: int = 1

    @classmethod
    def of(
        cls, spec: JobSpec, weights: Weights, kind: Kind, prompt: int, candidates: int
    ) -> Workload:
        """What `spec` asks of the engine on a device of this kind, with so many candidates."""
        scored, cap = spec.prompts.search, CUDA_ROWS if kind == "cuda" else CPU_ROWS
        # `Decoder.lanes`: not where an edit rewrites weights, nor where rows of a batch mix
        alone = spec.quantization == "bnb_8bit" or weights.stacked or needs_router(spec.methods)
        lanes = 1 if alone or spec.kind != "abliterate" else LANES[kind]
        return cls(
            kind=kind,
            prompt=prompt,
            new=spec.max_new_tokens,
            compared=spec.kl_tokens,
            side=spec.prompts.direction,
            scored=scored,
            heldout=spec.prompts.heldout,
            group=min(candidates, max(1, cap // scored)) if kind == "cuda" else 1,
            lanes=min(lanes, candidates),
            together=candidates,
        )

    def rows(self, wanted: int) -> int:
        """Rows of one batch where `wanted` are to be worked on."""
        return min(wanted, CUDA_ROWS if self.kind == "cuda" else CPU_ROWS)


def width_of(spec: JobSpec, kind: Kind) -> int:
    """Bytes of a number that is not packed, as the engine's dtypes are chosen."""
    if spec.dtype == "auto":
        return FLOAT32 if kind == "cpu" and spec.quantization == "none" else 2
    return FLOAT32 if spec.dtype == "float32" else 2


def need(spec: JobSpec, shape: Shape, weights: Weights, kind: Kind, prompt: int) -> Need:
    """The phases of `spec`, with prompts of up to `prompt` tokens, template included."""
    width = width_of(spec, kind)
    shape = replace(shape, width=width)
    work = Workload.of(spec, weights, kind, prompt, 1 if kind == "cuda" else CANDIDATES)
    phases = _phases(spec, shape, weights, work)
    decides = _peak(phases)
    single = replace(work, side=1, scored=1, heldout=1, group=1, together=1)
    whole = Workload.of(spec, weights, kind, prompt, CANDIDATES)
    host = decides.bytes if kind == "cpu" else HOST_BESIDE_CUDA + _host(spec, shape, weights, work)
    return Need(
        kind=kind,
        bytes=decides.bytes,
        least=_peak(_phases(spec, shape, weights, single)).bytes,
        most=_peak(_phases(spec, shape, weights, whole)).bytes,
        decides=decides.name,
        host=host,
        phases=phases,
    )


def _peak(phases: list[Phase]) -> Phase:
    """The phase that takes most, of those that must run."""
    return max((phase for phase in phases if not phase.optional), key=lambda phase: phase.bytes)


def _phases(spec: JobSpec, shape: Shape, weights: Weights, work: Workload) -> list[Phase]:
    w, packed = shape.width, spec.quantization != "none"
    loaded = weights.loaded(spec.quantization, w)
    on_cpu = work.kind == "cpu"
    # A CPU maps the files: tensors that keep their dtype stay where they are, and the rest of the
    # file stays mapped with them.
    mapped = on_cpu and w == weights.own_width
    kept = w * (weights.kept + (0 if weights.converted else weights.experts))
    beside = (weights.files - kept if packed else weights.converted) if mapped else 0
    edits = spec.kind == "abliterate"
    bases = weights.bases * _kinds_of_bases(spec) if edits else 0
    chosen = round(work.together * weights.bases / max(1, shape.layers)) if edits else 0
    found: list[Phase] = []

    def add(
        name: str, parts: dict[str, int], reclaimable: int = beside, optional: bool = False
    ) -> None:
        kernels = KERNELS_OF_EXPERTS if weights.experts else KERNELS
        compiled = kernels if on_cpu and w == 2 and name != "load" else 0
        libraries = OVERHEAD[work.kind] + compiled
        whole = {"weights": loaded, **parts, "libraries": libraries}
        found.append(
            Phase(
                name=name,
                bytes=sum(whole.values()),
                parts={key: value for key, value in whole.items() if value},
                reclaimable=reclaimable,
                optional=optional,
            )
        )

    states = _states(shape, work) if on_cpu else {"states": 0, "originals": 0}
    originals = {"originals": states["originals"]}
    # Stacks are edited in place; the original is kept beside, by a GPU on the host.
    stacks = w * weights.stacked if edits and on_cpu else 0
    one = _lower(shape, work, loaded) if edits and on_cpu else 0
    lower = (work.lanes + 1) * one  # once more while it is read and told
    held = {"bases": bases, "edits": chosen, "stacks": stacks, "lower": lower, **originals}
    # A matrix is packed from 16 bits; a block's experts are stacked from matrices of their own.
    packing = 2 * weights.widest if packed else 0
    stacking = 2 * w * weights.experts // max(1, shape.layers) if weights.converted else 0
    converting = max(packing, stacking)
    opened = (beside if mapped else weights.files) if on_cpu else 0
    add("load", {"conversion": converting}, opened)
    rows = work.rows(2 * min(PREFIX_PROMPTS, work.side))
    add("prefix", _decoding(shape, rows, work.prompt, PREFIX_TOKENS))
    if edits:
        activations = block_row(shape, work.prompt) + logits_row(shape, 1)
        rows = work.rows(work.side)
        add("residuals", {"activations": rows * activations, "states": states["states"]})
        if "ara" in spec.methods and on_cpu:
            add("samples", {"samples": _samples(weights, shape)})
        add("edit bases", {"bases": bases, "copies": 2 * FLOAT32 * weights.widest})
    rows = work.rows(max(work.scored, work.heldout))
    decoded = _decoding(shape, rows, work.prompt, work.new)
    own = {"bases": bases, "stacks": stacks, "lower": 2 * one}
    add("baseline", {**own, **decoded, **originals})
    grown: dict[str, int] = {}
    if edits:
        grown["heap"] = FORKED * work.lanes if work.lanes > 1 else 0
        grown["kernels"] = KERNELS_OF_SEARCH * work.lanes if on_cpu and w == 2 else 0
        rows = work.rows(work.group * work.scored)
        answers = _decoding(shape, rows, work.prompt, work.new)
        answers["drafts"] = drafts_bytes(shape, rows * work.new)
        add("answers", {**held, **grown, **_beside(answers, work.lanes)})
        first = replace(work, compared=1)
        compared = _beside(_comparing(shape, first, work.group), work.lanes)
        add("divergence of trials", {**held, **grown, **compared})
    add("divergence", {**held, **grown, **_beside(_comparing(shape, work, 1), work.lanes)})
    if edits:
        decoded = _decoding(shape, work.rows(work.scored), work.prompt, work.new)
        scoring = max(decoded, _comparing(shape, work, 1), key=lambda parts: sum(parts.values()))
        artifact = w * weights.parameters + weights.stored
        again = weights.converted if mapped else weights.files if on_cpu else 0
        parts = {**held, "artifact": artifact, **scoring}
        add("measure", parts, beside + again, optional=True)
    return found


def _beside(parts: dict[str, int], lanes: int) -> dict[str, int]:
    """The parts of several batches at once."""
    return {name: lanes * size for name, size in parts.items()}


def _decoding(shape: Shape, rows: int, prompt: int, new: int) -> dict[str, int]:
    """The parts of `decode_row`, of `rows` rows."""
    whole, cache = decode_row(shape, prompt, new), cache_row(shape, prompt + new)
    cache = min(whole, cache)
    return {"cache": rows * cache, "activations": rows * (whole - cache)}


def _comparing(shape: Shape, work: Workload, group: int) -> dict[str, int]:
    """One forward of the second KL, with the originals' logits below the edited ones."""
    rows = min(compared_rows(shape, work.compared), work.rows(group * work.scored))
    tokens = work.prompt + work.compared
    originals = -(-rows // group) * logits_row(shape, work.compared)
    compared = comparing_bytes(rows * work.compared, shape.vocabulary)
    logits = rows * logits_row(shape, work.compared) + originals + compared
    stream = rows * tokens * shape.hidden * shape.width
    block = rows * block_row(shape, tokens)
    return {"logits": logits + stream} if logits + stream > block else {"activations": block}


def _states(shape: Shape, work: Workload) -> dict[str, int]:
    """On the host: residuals of both sides in float32 and of one in float64; KL's references."""
    one = work.side * (shape.layers + 1) * shape.hidden
    rows = work.scored + work.heldout
    originals = rows * work.compared * shape.hidden * shape.width
    return {"states": 2 * one * FLOAT32 + one * 8, "originals": originals}


def _lower(shape: Shape, work: Workload, loaded: int) -> int:
    """What one process keeps of what the original computes below edits, of all prompts with their
    answers (host memory)."""
    tokens = (work.scored + work.heldout) * (2 * work.prompt + work.compared + work.new)
    most = STATIONS * tokens * shape.hidden * shape.width
    return min(lower_bytes(loaded, work.lanes), most)


def _samples(weights: Weights, shape: Shape) -> int:
    """ARA's inputs and outputs of both sides: 8 bytes × prompts × (n + d) of every writer."""
    vectors = weights.bases // (FLOAT32 * max(1, 2 * shape.layers))  # about n + d/2 of all writers
    return 2 * FLOAT32 * SAMPLED * vectors


def _host(spec: JobSpec, shape: Shape, weights: Weights, work: Workload) -> int:
    """Host memory of a CUDA job besides the libraries; the files are mapped, not read."""
    samples = _samples(weights, shape) if "ara" in spec.methods else 0
    stacks = shape.width * weights.stacked
    lower = 2 * _lower(shape, work, weights.loaded(spec.quantization, shape.width))
    return sum(_states(shape, work).values()) + samples + stacks + lower + 2 * weights.widest


def _kinds_of_bases(spec: JobSpec) -> int:
    """How many kinds of directions bases are kept for: those of one direction per layer."""
    recipes = {
        METHODS[name].recipe
        for name in spec.methods
        if METHODS[name].kind != "ara"
        and METHODS[name].recipe.subspace == "single"
        and METHODS[name].recipe.projection != "biprojected"
    }
    return len(recipes)
