"""What does an export cost beside `cp`? A synthetic llama-shaped checkpoint, every writer edited.

    python -m bench.export FOLDER [--gigabytes 8] [--rounds 3]

FOLDER needs room for the checkpoint twice; what is made there is removed again. Each round copies
the checkpoint with `cp` and `sync`, then exports it with the real export code in a process of its
own; the pages of the source are dropped from the cache before both. Peak memory is VmHWM of that
process less VmHWM of an interpreter that has imported torch. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HIDDEN, INTERMEDIATE, KV, VOCABULARY = 4096, 14336, 1024, 32000
SHARD = 2_000_000_000
LAYER = {
    "input_layernorm.weight": (HIDDEN,),
    "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
    "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
    "post_attention_layernorm.weight": (HIDDEN,),
    "self_attn.k_proj.weight": (KV, HIDDEN),
    "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
    "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
    "self_attn.v_proj.weight": (KV, HIDDEN),
}
WRITERS = {"self_attn.o_proj": "attention", "mlp.down_proj": "mlp"}


def build(folder: Path, gigabytes: float) -> int:
    """Write the checkpoint, a tensor at a time; its number of layers.

    All layers hold the same values, so that two modules stand for all writers of the model.
    """
    import torch
    from transformers import LlamaConfig

    ends = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    ends["lm_head.weight"] = (VOCABULARY, HIDDEN)
    size = 2 * sum(_numel(shape) for shape in LAYER.values())
    layers = max(1, round((gigabytes * 1e9 - 4 * VOCABULARY * HIDDEN) / size))
    tensors = ends | {
        f"model.layers.{k}.{name}": shape for k in range(layers) for name, shape in LAYER.items()
    }
    LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=VOCABULARY,
        architectures=["LlamaForCausalLM"], dtype="bfloat16",
    ).save_pretrained(folder)  # fmt: skip

    torch.manual_seed(0)
    values = torch.randn(VOCABULARY * HIDDEN, dtype=torch.bfloat16).mul_(0.02)
    data = values.view(torch.uint8).numpy().data
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in tensors.items():
        if shards[-1] and 2 * sum(map(_numel, [*shards[-1].values(), shape])) > SHARD:
            shards.append({})
        shards[-1][name] = shape
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        where |= dict.fromkeys(shard, file)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, shape in shard.items():
            end = position + 2 * _numel(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
            position = end
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for shape in shard.values():
                out.write(data[: 2 * _numel(shape)])
            os.fsync(out.fileno())
    index = {
        "metadata": {"total_size": 2 * sum(map(_numel, tensors.values()))},
        "weight_map": where,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return layers


def _numel(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def export(source: Path, target: Path) -> dict[str, float]:
    """Export `source` into `target` in this process: seconds, and the peak memory in bytes."""
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM

    from engine.anatomy import Anatomy
    from engine.change import Projection
    from engine.checkpoint import open_checkpoint
    from engine.export import write
    from engine.load import Loaded
    from engine.report import Silent
    from engine.writer import Writer
    from jobs.spec.candidate import Ablation, Component, constant
    from jobs.spec.protocol import Export

    config = AutoConfig.from_pretrained(source)
    layers, torch_device = int(config.num_hidden_layers), torch.device("cpu")
    with torch.device("meta"):  # the names; the weights would be the model's, not the export's
        factory: Any = AutoModelForCausalLM
        model = factory.from_config(config, dtype=torch.bfloat16)
    checkpoint = open_checkpoint(source, "synthetic")
    modules: dict[str, nn.Linear] = {}
    for name in WRITERS:
        weight = checkpoint.read(checkpoint.tensors[f"model.layers.0.{name}.weight"])
        modules[name] = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        modules[name].weight = nn.Parameter(weight, requires_grad=False)
    kinds: dict[str, Component] = {"self_attn.o_proj": "attention", "mlp.down_proj": "mlp"}
    writers = [
        Writer(f"model.layers.{k}.{name}", k, kinds[name], module, *module.weight.shape)
        for k in range(layers)
        for name, module in modules.items()
    ]
    torch.manual_seed(1)
    direction = nn.functional.normalize(torch.randn(1, HIDDEN), dim=1)
    loaded = Loaded(
        name="synthetic", model=model, tokenizer=None, source=source, commit=None,
        device=torch_device, device_name="cpu", dtype=torch.bfloat16, quantization="none",
        weight_bytes=0, source_bytes=0,
    )  # fmt: skip
    anatomy = Anatomy("LlamaForCausalLM", layers, HIDDEN, writers, [])
    candidate = Ablation(attention=constant(), mlp=constant())
    begun = time.monotonic()
    done = write(
        loaded, anatomy, [Projection(direction, 1.0, "full") for _ in writers],
        Export(candidate=candidate, directory=str(target), measure=False), Silent(),
    )  # fmt: skip
    seconds = time.monotonic() - begun
    assert any(file.name.endswith(".safetensors") for file in done.files)
    return {"seconds": seconds, "peak": peak(), "edited": float(len(writers))}


def peak() -> int:
    """VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise OSError("this system does not tell a process's peak memory")


def child(*arguments: str) -> dict[str, float]:
    """Run this script in a process of its own; what its last line says."""
    command = [sys.executable, "-m", "bench.export", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def forget(folder: Path) -> None:
    """Drop the pages of a folder's files from the cache."""
    os.sync()
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def copied(source: Path, target: Path) -> float:
    """Seconds of `cp -r` with a `sync` of every file."""
    begun = time.monotonic()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    subprocess.run(["sync", *map(str, target.iterdir()), str(target)], check=True)
    return time.monotonic() - begun


def compare(folder: Path, gigabytes: float, rounds: int) -> str:
    """Build, copy and export; the table."""
    source, target = folder / "source", folder / "target"
    source.mkdir(parents=True)
    try:
        layers = build(source, gigabytes)
        size = sum(path.stat().st_size for path in source.iterdir())
        baseline = child("--baseline")["peak"]
        lines = [
            "| round | load | `cp` + `sync` | export | speed | peak over torch |",
            "|---" * 6 + "|",
        ]
        ratios, peaks = [], []
        for number in range(1, rounds + 1):
            load = os.getloadavg()[0]
            forget(source)
            plain = copied(source, target)
            shutil.rmtree(target)
            forget(source)
            target.mkdir()
            found = child("--export", str(source), str(target))
            shutil.rmtree(target)
            ratios.append(plain / found["seconds"])
            peaks.append(found["peak"] - baseline)
            lines.append(
                f"| {number} | {load:.1f} | {plain:.1f} s | {found['seconds']:.1f} s "
                f"| {ratios[-1]:.0%} of `cp` | {peaks[-1] / 1e6:.0f} MB |"
            )
        lines += [
            "",
            f"{size / 1e9:.2f} GB in {len(list(source.glob('*.safetensors')))} files, bf16, "
            f"{layers} layers, {2 * layers} matrices edited; median speed "
            f"{statistics.median(ratios):.0%} of `cp`, peak at most {max(peaks) / 1e6:.0f} MB.",
        ]
        return "\n".join(lines)
    finally:
        shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)


def main() -> None:
    """The command line; the flags with two dashes and no help are the script's own children."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--baseline", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--export", type=Path, nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.baseline:
        import torch

        print(json.dumps({"peak": peak(), "threads": torch.get_num_threads()}))
    elif given.export:
        print(json.dumps(export(*given.export)))
    elif given.folder is None:
        parser.error("name a folder with room for the checkpoint twice")
    else:
        print(compare(given.folder, given.gigabytes, given.rounds))


if __name__ == "__main__":
    main()
