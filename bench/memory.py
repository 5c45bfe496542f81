"""Does the estimate before submitting tell how much memory a job takes? Peaks measured by phase.

    python -m bench.memory [--only NAME ...] [--device cpu|cuda] [--threads N] [--keep FOLDER]

Builds random-weight models of real proportions, one at a time, in a temporary folder; estimates
from their headers and configurations alone; and runs the real engine on each in a process of its
own: prepare, score two candidates three times (of the demo model: those of a search), export,
measure the export. Prints a Markdown table.

On a CPU the peak of a phase is the process's resident high-water mark (VmHWM of /proc/self/status,
set back between phases through /proc/self/clear_refs), above what the interpreter with all
libraries takes; while candidates are scored, by processes of their own, the most that they and it
held in ten looks a second, pages that they share counted once. On a GPU it is
torch.cuda.max_memory_allocated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from demo import MODEL
from engine.libraries import settle
from jobs import checkpoints
from jobs.estimate import figures
from jobs.needs import OVERHEAD, Phase
from jobs.spec.job import JobSpec
from jobs.spec.memory import Kind

PHASES = {  # what the engine reports -> the phase of the estimate
    "load": "load",
    "response prefix": "prefix",
    "residuals": "residuals",
    "baseline": "baseline",
    "edit bases": "edit bases",
}
LOOK = 0.1  # seconds between two looks at the lanes' memory
THREADS = 2  # of the engine: two lanes on a CPU
SCORING = ("answers", "divergence")  # one request: their peaks cannot be told apart


@dataclass(frozen=True)
class Case:
    """One model: how to build its configuration, the dtype of its files, and its job.

    folder, trials   where the model is instead, and how many candidates of a search are scored:
                     0, the single pass six times
    """

    name: str
    about: str
    family: str
    sizes: dict[str, Any]
    stored: str = "bfloat16"
    job: dict[str, Any] = field(default_factory=dict)
    prompts: int = 8
    words: int = 0
    folder: Path | None = None
    trials: int = 0


SMALL = {"vocab_size": 32_000, "tie_word_embeddings": False}
CASES = (
    Case("dense-float32", "Llama, 0.25 B, bf16 files run in float32", "llama",
         {**SMALL, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16,
          "num_attention_heads": 16, "num_key_value_heads": 4}),
    Case("dense-bf16", "the same in bfloat16", "llama",
         {**SMALL, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16,
          "num_attention_heads": 16, "num_key_value_heads": 4}, job={"dtype": "bfloat16"}),
    Case("wide-vocabulary", "Gemma 3, 0.15 B, V = 131 072, tied, float32", "gemma3_text",
         {"vocab_size": 131_072, "hidden_size": 640, "intermediate_size": 2048,
          "num_hidden_layers": 12, "num_attention_heads": 4, "num_key_value_heads": 1,
          "head_dim": 256}, stored="float32", prompts=24),
    Case("experts-bf16", "Qwen3-MoE, 0.36 B, 32 experts fused while loading", "qwen3_moe",
         {**SMALL, "hidden_size": 768, "num_hidden_layers": 8, "num_attention_heads": 12,
          "num_key_value_heads": 4, "head_dim": 64, "moe_intermediate_size": 512,
          "num_experts": 32, "num_experts_per_tok": 4, "intermediate_size": 2048},
         job={"dtype": "bfloat16"}),
    Case("deep-4bit", "Qwen3, 0.45 B, 36 layers, 8 queries a key, nf4", "qwen3",
         {**SMALL, "hidden_size": 1024, "intermediate_size": 2560, "num_hidden_layers": 36,
          "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 64},
         job={"quantization": "bnb_4bit"}),
    Case("dense-8bit", "Llama, 0.25 B, int8", "llama",
         {**SMALL, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16,
          "num_attention_heads": 16, "num_key_value_heads": 4},
         job={"quantization": "bnb_8bit"}),
    Case("long-prompts", "Llama, 43 M, prompts of 260 tokens, float32", "llama",
         {**SMALL, "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536,
          "num_hidden_layers": 10, "num_attention_heads": 8, "num_key_value_heads": 8},
         words=60),
    *(Case(f"search-{name}", f"the demo model, 5 M, {name}: 200 trials of 100 answers", "", {},
           job={"dtype": dtype, "quantization": quantization, "max_new_tokens": 100},
           prompts=100, folder=Path(MODEL), trials=200)
      for name, dtype, quantization in (
          ("float32", "float32", "none"), ("bfloat16", "bfloat16", "none"),
          ("4bit", "auto", "bnb_4bit"))),
    Case("hybrid", "Qwen3-Next, 0.2 B, 3 of 4 blocks with a constant state, fused experts, bf16",
         "qwen3_next",
         {**SMALL, "hidden_size": 768, "num_hidden_layers": 8, "num_attention_heads": 12,
          "num_key_value_heads": 2, "head_dim": 64, "moe_intermediate_size": 384,
          "shared_expert_intermediate_size": 384, "num_experts": 16, "num_experts_per_tok": 2,
          "intermediate_size": 1536, "linear_num_value_heads": 12, "linear_num_key_heads": 6,
          "linear_key_head_dim": 64, "linear_value_head_dim": 64}, job={"dtype": "bfloat16"}),
)  # fmt: skip


def specification(case: Case, device: Kind) -> JobSpec:
    """The job that the case estimates and runs."""
    sides = {"direction": case.prompts, "search": case.prompts, "heldout": case.prompts}
    return JobSpec.model_validate(
        {
            "model": case.name,
            "device": device,
            "quantization": "none",
            "trials": 2,
            "max_new_tokens": 8,
            "prompts": sides,
            "system_prompt": " ".join(["steady"] * case.words) or None,
            **case.job,
        }
    )


def build(case: Case, folder: Path) -> None:
    """Write the case's model with random weights and the demo model's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from demo.vocabulary import build_tokenizer

    tokenizer = build_tokenizer()
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    pad = {"pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(case.family, **case.sizes, **ends, **pad)
    torch.manual_seed(0)
    factory: Any = AutoModelForCausalLM
    model = factory.from_config(config, dtype=getattr(torch, case.stored))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def texts(case: Case) -> dict[str, list[str]]:
    """The demo's prompts by role, as many as the case wants."""
    from demo import PROMPTS

    found: dict[str, list[str]] = {}
    for side, name in (("harmful", "refused"), ("harmless", "answered")):
        lines = (PROMPTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        for place, split in enumerate(("direction", "search", "heldout")):
            mine = lines[place * case.prompts : (place + 1) * case.prompts]
            found[f"{split}_{side}"] = [json.loads(line)["prompt"] for line in mine]
    return found


# --- the process that is measured ---------------------------------------------------------------


class Meter:
    """A `Report` that notes the peak of every phase."""

    def __init__(self, cuda: bool) -> None:
        self.cuda, self.phase, self.fixed = cuda, "", ""
        self.peaks: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic()
        self._beside = 0
        if not cuda:
            threading.Thread(target=self._look, daemon=True).start()
        self.base = 0 if cuda else self._peak()
        self._reset()

    def enter(self, phase: str) -> None:
        """A new phase begins; the one before has had its peak."""
        if phase == self.phase:
            return
        now = time.monotonic()
        if self.phase:
            peak = max(self.peaks.get(self.phase, 0), self._peak())
            self.peaks[self.phase] = peak
            self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self._since
        self.phase, self._since = phase, now
        self._reset()

    def progress(self, phase: str, done: float = 0, total: float = 0, text: str = "") -> None:
        """The engine says where it is."""
        if phase == "measure":
            self.fixed = "measure"
        self.enter(self.fixed or PHASES.get(phase, self.phase))

    def log(self, text: str, level: str = "info") -> None:
        """What the engine says goes to standard error."""
        print(text, file=sys.stderr)

    def partial(self, index: int, text: str = "", scored: Any = None) -> None:
        """Nothing of it is kept."""

    def _peak(self) -> int:
        if self.cuda:
            import torch

            return torch.cuda.max_memory_allocated()
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return max(self._beside, int(line.split()[1]) * 1024)
        raise RuntimeError("/proc/self/status names no VmHWM")

    def _look(self) -> None:
        """Note what this process and its lanes hold, as long as there are lanes."""
        own = psutil.Process()
        while True:
            time.sleep(LOOK)
            held = [_held(process.pid) for process in (own, *own.children())]
            if len(held) > 1:
                # the pages of files are the same in all
                whole = sum(beside for beside, _ in held) + max(mapped for _, mapped in held)
                self._beside = max(self._beside, whole)

    def _reset(self) -> None:
        self._beside = 0
        if self.cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")


def _held(pid: int) -> tuple[int, int]:
    """Bytes of a process, what others have too counted in shares; and of files that it has mapped,
    whoever else has."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return 0, 0  # it has ended
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    mapped = kilobytes["Rss"] - kilobytes["Anonymous"]
    return 1024 * kilobytes["Pss_Anon"], 1024 * mapped


def child(request: dict[str, Any]) -> dict[str, Any]:
    """Run the engine on one case; peaks and seconds by phase."""
    settle()  # before torch is imported, as an engine process does
    import bitsandbytes  # noqa: F401  loaded by the engine when it is needed: libraries here
    import peft  # noqa: F401
    import torch

    from bench.search import drawn
    from bench.stream import stream
    from engine.chat import Formatter
    from engine.heap import return_blocks
    from engine.session import Session
    from jobs.spec.candidate import single_pass
    from jobs.spec.protocol import Export, Prepare, Prepared, Score

    torch.set_num_threads(request["threads"])
    return_blocks()
    meter, session = Meter(request["prepare"]["device"] == "cuda"), Session()
    asked = Prepare.model_validate(request["prepare"])
    prepared = session.handle(asked, meter)
    assert isinstance(prepared, Prepared)
    longest = _longest(Formatter, asked)
    layers = prepared.anatomy.layers
    meter.fixed = "scoring"
    meter.enter("scoring")
    if request["trials"]:
        points = [(candidate, list[Any]()) for candidate in drawn(layers, request["trials"])]
        stream(session, len(points), points.__getitem__, lambda *_: None, kl_multi=False)
    else:
        for _ in range(3):  # states are kept from the second time on
            session.handle(Score(candidates=[single_pass(layers), single_pass(layers)]), meter)
    meter.fixed = ""
    meter.enter("export")
    with tempfile.TemporaryDirectory() as folder:
        session.handle(Export(candidate=single_pass(layers), directory=folder), meter)
    meter.enter("end")
    return {
        "base": meter.base, "peaks": meter.peaks, "seconds": meter.seconds, "prompt": longest,
        "weights": prepared.weight_bytes, "device": prepared.device_name,
    }  # fmt: skip


def _longest(formatter: Callable[..., Any], asked: Any) -> int:
    """Tokens of the longest prompt."""
    from transformers import AutoTokenizer

    made = formatter(AutoTokenizer.from_pretrained(asked.path), asked.system_prompt)
    return max(len(made.ids(text)) for _, side in asked.prompts for text in side)


# --- the comparison -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One phase of one case: bytes above the libraries."""

    phase: str
    estimated: int
    measured: int

    @property
    def error(self) -> float:
        """Relative: positive where the estimate is too high."""
        return self.estimated / self.measured - 1


def compare(
    case: Case, device: Kind, parent: Path, threads: int = THREADS
) -> tuple[list[Line], dict[str, Any]]:
    """Build, run and estimate one case."""
    folder = case.folder or parent / case.name
    if not (folder / "config.json").is_file():
        build(case, folder)
    spec = specification(case, device)
    prepare = {
        "model": case.name, "path": str(folder), "device": device, "prompts": texts(case),
        "quantization": spec.quantization, "dtype": spec.dtype, "kl_tokens": spec.kl_tokens,
        "system_prompt": spec.system_prompt, "max_new_tokens": spec.max_new_tokens,
    }  # fmt: skip
    asked = parent / f"{case.name}.json"
    asked.write_text(json.dumps({"prepare": prepare, "threads": threads, "trials": case.trials}))
    command = [sys.executable, "-m", "bench.memory", "--child", str(asked)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    needs = figures(spec, checkpoints.from_folder(folder), prompt=found["prompt"]).needs[device]
    estimated: dict[str, int] = {}
    for phase in needs.phases:
        name = "scoring" if phase.name in SCORING else phase.name
        estimated[name] = max(estimated.get(name, 0), above(phase, device, found["base"]))
    lines = [
        Line(name, estimated[name], found["peaks"][name] - found["base"])
        for name in estimated
        if name in found["peaks"]
    ]
    return lines, found


def above(phase: Phase, device: Kind, base: int) -> int:
    """The estimate of a phase above the measured libraries, mapped files included as measured.

    What torch, tokenizers and the model's own module take while they run belongs to the estimate's
    libraries, so of a CPU the measured process before the job is taken off, not the constant.
    """
    libraries = base if device == "cpu" else OVERHEAD[device]
    return phase.bytes + phase.reclaimable - libraries


def main() -> None:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[case.name for case in CASES])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--keep", type=Path, help="build the models here and leave them")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(json.loads(arguments.child.read_text()))))
        return
    print("| model | phase | estimated MB | measured MB | error |")
    print("|---|---|---|---|---|")
    peaks: list[str] = []
    for case in (case for case in CASES if case.name in arguments.only):
        with tempfile.TemporaryDirectory() as temporary:
            lines, found = compare(
                case, arguments.device, arguments.keep or Path(temporary), arguments.threads
            )
        for line in lines:
            print(f"| {case.name} | {line.phase} {_row(line)}", flush=True)
        whole = Line(
            "peak", max(line.estimated for line in lines), max(line.measured for line in lines)
        )
        base = f"{found['base'] / 1e6:.0f}" if arguments.device == "cpu" else "-"
        peaks.append(f"| {case.name} | {case.about} | {base} {_row(whole)}")
    print("\n| model | what it is | libraries MB | estimated peak MB | measured peak MB | error |")
    print("|---|---|---|---|---|---|")
    print("\n".join(peaks))


def _row(line: Line) -> str:
    return f"| {line.estimated / 1e6:.0f} | {line.measured / 1e6:.0f} | {line.error:+.1%} |"


if __name__ == "__main__":
    main()
