"""Writing the wide model shard by shard, with no more than one tensor in memory."""

from __future__ import annotations

import json
import math
import shutil
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from bench.inflate.shapes import Shape
from bench.inflate.weights import Maker, epsilon, tensors
from demo import MODEL
from engine.checkpoint import INDEX, SINGLE

SHARD = 2_000_000_000  # bytes of tensors in a file, more only where one tensor is larger
DTYPES = {"bfloat16": ("BF16", torch.bfloat16), "float32": ("F32", torch.float32)}
COPIED = (
    "chat_template.jinja",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
)

Planned = dict[str, tuple[tuple[int, ...], Maker]]


@dataclass(frozen=True)
class Written:
    """What a folder holds: parameters, bytes of its weights, and how long writing took."""

    parameters: int
    bytes: int
    files: int
    seconds: float


def inflate(shape: Shape, out: Path, dtype: str = "bfloat16", source: Path = MODEL) -> Written:
    """Write the model in `source`, widened to `shape`, into the new folder `out`.

    ValueError where it does not fit or the dtype is neither bfloat16 nor float32;
    FileExistsError where `out` is there and holds something.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype}: choose {' or '.join(DTYPES)}")
    began = time.monotonic()
    config = AutoConfig.from_pretrained(source)
    known = {name: tensor.float() for name, tensor in load_file(source / SINGLE).items()}
    planned = tensors(known, config, shape)
    wide = _config(config, shape, dtype)
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty")
    for name in COPIED:
        shutil.copyfile(source / name, out / name)
    wide.save_pretrained(out)
    size = DTYPES[dtype][1].itemsize
    shards = _shards(planned, size)
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if shards[1:] else SINGLE
        _write(out / file, shard, dtype)
        files |= dict.fromkeys(shard, file)
    parameters = sum(math.prod(sizes) for sizes, _ in planned.values())
    if shards[1:]:
        index = {"metadata": {"total_size": size * parameters}, "weight_map": files}
        (out / INDEX).write_text(json.dumps(index, indent=1))
    return Written(parameters, size * parameters, len(shards), time.monotonic() - began)


def _config(config: Any, shape: Shape, dtype: str) -> Any:
    """The wide model's configuration. ValueError where the norms leave no room."""
    sizes = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.feed_forward,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied,
        "rms_norm_eps": epsilon(config, shape),
        "dtype": dtype,
    }
    return type(config).from_dict(config.to_dict() | sizes)


def _shards(planned: Planned, size: int) -> list[Planned]:
    """The tensors in their order, at most SHARD bytes together or one alone."""
    shards: list[Planned] = [{}]
    filled = 0
    for name, (sizes, make) in planned.items():
        if shards[-1] and filled + size * math.prod(sizes) > SHARD:
            shards.append({})
            filled = 0
        shards[-1][name] = sizes, make
        filled += size * math.prod(sizes)
    return shards


def _write(path: Path, shard: Planned, dtype: str) -> None:
    """One safetensors file: length of the header, header, tensors as they are made."""
    tag, kind = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (sizes, _) in shard.items():
        end = position + kind.itemsize * math.prod(sizes)
        header[name] = {"dtype": tag, "shape": sizes, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligned, as the format wants its tensors
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, make in shard.values():
            file.write(make().to(kind).view(torch.uint8).numpy().data)
