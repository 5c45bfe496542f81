"""A folder of original weights: which safetensors files, and where in them each tensor lies.

The format (safetensors 0.x): 8 bytes, little-endian length of a JSON header; the header, tensor
name -> dtype, shape, data_offsets relative to its end; the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import EngineError

FLOATS: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """One tensor: `begin` and `size` in bytes from the start of `file`."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    size: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """The safetensors files of a folder, in order, and their tensors by name."""

    folder: Path
    files: list[str]
    tensors: dict[str, Entry]

    def read(self, entry: Entry) -> Tensor:
        """One tensor, alone in memory. Raises unsupported_architecture for packed dtypes."""
        if entry.dtype not in FLOATS:
            raise EngineError(
                "unsupported_architecture",
                f"{entry.name} is stored as {entry.dtype}: the checkpoint is already quantised",
                "Use the model's original bf16, f16 or f32 release.",
            )
        with (self.folder / entry.file).open("rb") as file:
            file.seek(entry.begin)
            data = bytearray(entry.size)
            if file.readinto(data) != entry.size:
                raise EngineError("model_not_found", f"{entry.file} is cut short", "Fetch it anew.")
        return torch.frombuffer(data, dtype=FLOATS[entry.dtype]).reshape(entry.shape)


def weight_files(names: set[str], model: str) -> str:
    """The entry point of the weights among top-level file names: the index or the single file.

    index or single file there   that name
    only pickles                 unsafe_weights
    neither                      model_not_found
    """
    if INDEX in names:
        return INDEX
    if SINGLE in names:
        return SINGLE
    pickles = sorted(n for n in names if n.endswith(PICKLES) and n != "training_args.bin")
    if pickles:
        raise EngineError(
            "unsafe_weights",
            f"{model} holds no safetensors weights, only {pickles[0]}; such files can run code "
            "when they are read, so they are never opened",
            "Choose a revision or a re-upload with safetensors, or convert the weights on a "
            "machine where you trust them: model.save_pretrained(folder).",
        )
    raise EngineError(
        "model_not_found",
        f"{model} holds no weights: neither {SINGLE} nor {INDEX}",
        "Choose a transformers model in safetensors format.",
    )


def shards(index: Path, model: str) -> list[str]:
    """The files that an index names, in order. Refuses names that leave the folder."""
    try:
        found = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(
            "model_not_found", f"{model}: {INDEX} cannot be read", "Fetch the model anew."
        ) from error
    for name in found:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise EngineError(
                "unsafe_weights",
                f"{model}: {INDEX} names {name!r}, which is no safetensors file of its folder",
                "Choose another copy of the model.",
            )
    return found


def open_checkpoint(folder: Path, model: str) -> Checkpoint:
    """Read the headers of the folder's safetensors files.

    Raises model_not_found (no config, missing or damaged file) and unsafe_weights.
    """
    names = {p.name for p in folder.iterdir()}
    if "config.json" not in names:
        raise EngineError(
            "model_not_found",
            f"{model} holds no config.json",
            "Choose the folder of a whole transformers model, not of an adapter.",
        )
    if "adapter_config.json" in names:
        raise EngineError(
            "unsupported_architecture",
            f"{model} carries a PEFT adapter beside its weights",
            "Merge the adapter first, or remove adapter_config.json.",
        )
    entry = weight_files(names, model)
    files = shards(folder / INDEX, model) if entry == INDEX else [SINGLE]
    tensors: dict[str, Entry] = {}
    for name in files:
        if name not in names:
            raise EngineError(
                "model_not_found", f"{model}: the weight file {name} is missing", "Fetch it anew."
            )
        tensors.update(_header(folder, name, model))
    return Checkpoint(folder, files, tensors)


def _header(folder: Path, name: str, model: str) -> dict[str, Entry]:
    """The tensors of one file."""
    size = (folder / name).stat().st_size
    damaged = EngineError(
        "model_not_found", f"{model}: the weight file {name} is damaged", "Fetch it anew."
    )
    with (folder / name).open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise damaged
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            found = {
                key: Entry(
                    name=key,
                    file=name,
                    dtype=value["dtype"],
                    shape=tuple(value["shape"]),
                    begin=8 + length + value["data_offsets"][0],
                    size=value["data_offsets"][1] - value["data_offsets"][0],
                )
                for key, value in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged from error
    if any(e.size < 0 or e.begin + e.size > size for e in found.values()):
        raise damaged
    return found
