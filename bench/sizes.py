"""How much memory do a search and an export take, by size and quantisation?

    python -m bench.sizes [--shapes test 0.5B ...] [--kinds none bnb_8bit bnb_4bit]
        [--device auto|cpu|cuda] [--prompts 16] [--folder FOLDER]

1. Measured: the demo model at the shape of a well-known one (`bench.inflate`), each quantisation in
   a process of its own (`bench.memory`): prepare, two trials three times, export merged, load the
   export and measure it. Files in 16 bits; `none` runs in 16 bits too.
2. By estimate alone, from the shapes: weights, and what a search in 4 bits takes on a GPU in all,
   up to 70 B, beside what `heretic-llm` publishes of its own 4 bits.

FOLDER (the system's for temporary files) needs room for the largest model twice. Prints Markdown.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import machine, memory
from bench.inflate.shapes import SHAPES, Shape
from bench.inflate.write import inflate
from jobs.checkpoints import Checkpoint, Tensor
from jobs.estimate import figures
from jobs.spec.job import JobSpec, Quantization

KINDS: tuple[Quantization, ...] = ("none", "bnb_8bit", "bnb_4bit")
MEASURED = {"cpu": ["test", "0.5B", "1.7B"], "cuda": ["0.5B", "1.7B", "8B", "32B"]}
ESTIMATED = {
    "7B": Shape("Llama-2-7B", 4096, 32, 32, 32, 128, 11_008, 32_000, False),
    "8B": SHAPES["8B"],
    "13B": Shape("Llama-2-13B", 5120, 40, 40, 40, 128, 13_824, 32_000, False),
    "32B": SHAPES["32B"],
    "70B": Shape("Llama-2-70B", 8192, 80, 64, 8, 128, 28_672, 32_000, False),
}
PUBLISHED = {"7B": 4.2, "13B": 7.8, "70B": 42.0}  # GB in 4 bits: 70 % less than 14, 26 and 140
HEAD = (
    "shape", "quantisation", "weights", "of 16 bits", "search: estimated", "measured", "error",
    "export: measured", "and loading it again: estimated", "measured", "error",
)  # fmt: skip
NEW_TOKENS = 48


@dataclass(frozen=True)
class Row:
    """One shape in one quantisation, bytes: weights in memory; peaks above the libraries.

    search, again   (estimated, measured): up to the last trial; with a second model in memory, the
                    export, while it is measured
    written         while the export is written
    """

    weights: int
    parameters: int
    search: memory.Line
    written: int
    again: memory.Line
    libraries: int

    @classmethod
    def of(cls, lines: list[memory.Line], found: dict[str, Any], parameters: int) -> Row:
        """From what `bench.memory` found."""
        (again,) = (line for line in lines if line.phase == "measure")
        before = [line for line in lines if line is not again]
        search = memory.Line(
            "search",
            max(line.estimated for line in before),
            max(line.measured for line in before),
        )
        written = found["peaks"]["export"] - found["base"]
        return cls(found["weights"], parameters, search, written, again, found["base"])

    def cells(self) -> list[str]:
        """The figures in GB."""
        return [
            _gb(self.weights), f"{self.weights / (2 * self.parameters):.0%}",
            *_compared(self.search), _gb(self.written), *_compared(self.again),
        ]  # fmt: skip


def main() -> None:
    """Measure, estimate and print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.sizes", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--shapes", nargs="*", choices=SHAPES)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--prompts", type=int, default=16, help="of each side and role")
    parser.add_argument("--folder", type=Path, help="for the models")
    given = parser.parse_args()
    device = machine.device_here(given.device)
    print(f"{machine.machine(device, 1)}. GB above the libraries.\n")
    print(f"| {' | '.join(HEAD)} |\n{'|---' * len(HEAD)}|", flush=True)
    libraries = 0
    for name in MEASURED[device] if given.shapes is None else given.shapes:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            inflate(SHAPES[name], Path(folder) / name)
            for kind in given.kinds:
                row = measured(name, kind, device, given.prompts, Path(folder))
                libraries = max(libraries, row.libraries)
                print(f"| {name} | {kind} | {' | '.join(row.cells())} |", flush=True)
    print(f"\nLibraries: {libraries / 1e6:.0f} MB. {given.prompts} prompts of a role and side.\n")
    print("\n".join(estimated()))


def measured(
    name: str, kind: Quantization, device: machine.Place, prompts: int, parent: Path
) -> Row:
    """Run one shape, which lies in `parent` already, in one quantisation."""
    job: dict[str, Any] = {"quantization": kind, "max_new_tokens": NEW_TOKENS}
    if kind == "none":
        job["dtype"] = "bfloat16"
    case = memory.Case(name, SHAPES[name].like, "llama", {}, job=job, prompts=prompts)
    lines, found = memory.compare(case, device, parent)
    return Row.of(lines, found, parameters_of(SHAPES[name]))


def estimated() -> list[str]:
    """The second table: weights by quantisation, and what a search in 4 bits takes with them."""
    head = ["shape", "like", "parameters", *(f"weights, `{kind}`" for kind in KINDS)]
    head += ["4 bits, published", "search, `bnb_4bit`: one prompt at a time", "100 at a time"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, shape in ESTIMATED.items():
        spec = {"model": name, "device": "cuda", "quantization": "bnb_4bit"}
        found = figures(JobSpec.model_validate(spec), checkpoint_of(shape))
        need, told = found.needs["cuda"], PUBLISHED.get(name)
        cells = [name, shape.like, f"{found.parameters / 1e9:.1f} B"]
        cells += [_gb(found.weight_bytes[kind]) for kind in KINDS]
        cells += [_gb(1e9 * told) if told else "–", _gb(need.least), _gb(need.bytes)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def checkpoint_of(shape: Shape) -> Checkpoint:
    """What config.json and the files' headers of a Llama of `shape` in 16 bits would say."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        vocab_size=shape.vocabulary, tie_word_embeddings=shape.tied,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    factory: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = factory.from_config(config)
    found = [Tensor(name, "BF16", tuple(part.shape)) for name, part in model.named_parameters()]
    return Checkpoint(config.to_dict(), found)


def parameters_of(shape: Shape) -> int:
    """Numbers of a model of `shape`."""
    return sum(tensor.parameters for tensor in checkpoint_of(shape).tensors)


def _compared(line: memory.Line) -> list[str]:
    return [_gb(line.estimated), _gb(line.measured), f"{line.error:+.0%}"]


def _gb(count: float) -> str:
    """Bytes in GB with three digits or so: 0.457, 7.81, 42.3."""
    value = count / 1e9
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


if __name__ == "__main__":
    main()
