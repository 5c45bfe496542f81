"""What a checkpoint's config.json and safetensors headers say, without its weights.

A safetensors file begins with eight bytes (little-endian length n) and n bytes of JSON that name
every tensor with its dtype and shape. So a few kilobytes per file tell the exact sizes; for a model
on the hub they are fetched as byte ranges.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import hf_hub_url

from jobs.problems import Invalid

HEADER_LIMIT = 100_000_000
DTYPE_BITS = {
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "F32": 32,
    "I32": 32,
    "U32": 32,
    "F16": 16,
    "BF16": 16,
    "I16": 16,
    "U16": 16,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "I8": 8,
    "U8": 8,
    "BOOL": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint: its name, dtype (as in the header) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self.parameters * DTYPE_BITS.get(self.dtype, 16) // 8


@dataclass(frozen=True)
class Checkpoint:
    """A model's config and all its tensors."""

    config: dict[str, Any]
    tensors: list[Tensor]


Read = Callable[[str, int, int], bytes]  # (file, first byte, length) -> bytes; length -1: all


def from_folder(folder: Path) -> Checkpoint:
    """The checkpoint in a local folder. Invalid(field="model") when it cannot be read."""

    def read(name: str, start: int, length: int) -> bytes:
        with (folder / name).open("rb") as file:
            file.seek(start)
            return file.read(length)

    return _checkpoint(read, weight_files([file.name for file in folder.glob("*.safetensors")]))


def from_hub(
    name: str, revision: str | None, files: list[str], token: str | None, timeout: float
) -> Checkpoint:
    """The checkpoint of a hub model by range requests. httpx.HTTPError when unreachable."""
    headers = {"authorization": f"Bearer {token}"} if token else {}
    with httpx.Client(timeout=timeout, follow_redirects=True, headers=headers) as client:

        def read(file: str, start: int, length: int) -> bytes:
            url = hf_hub_url(name, file, revision=revision)
            ranged = {} if length < 0 else {"range": f"bytes={start}-{start + length - 1}"}
            with client.stream("GET", url, headers=ranged) as answer:
                answer.raise_for_status()
                # a server without ranges sends the file from its start: skip, never read it all
                skip = start if answer.status_code == 200 else 0
                limit = HEADER_LIMIT if length < 0 else length
                content = bytearray()
                for piece in answer.iter_bytes():
                    content += piece
                    if len(content) >= skip + limit:
                        break
                return bytes(content[skip : skip + limit])

        return _checkpoint(read, weight_files(files))


def weight_files(files: Sequence[str]) -> list[str]:
    """Those of a repository's files that hold the weights which transformers loads.

    `model.safetensors` or the shards `model-00001-of-00002.safetensors`; a copy of the weights in
    another layout (`consolidated.safetensors`) and adapters lie beside them in some repositories.
    """
    found = sorted(f for f in files if f.endswith(".safetensors") and "/" not in f)
    if "model.safetensors" in found:
        return ["model.safetensors"]
    return [f for f in found if f.startswith("model-")] or found


def _checkpoint(read: Read, files: list[str]) -> Checkpoint:
    try:
        config = json.loads(read("config.json", 0, -1))
        if not isinstance(config, dict):
            raise ValueError("config.json is not an object")
        tensors = [tensor for file in files for tensor in _tensors(read, file)]
    except FileNotFoundError:
        raise Invalid("The model has no config.json.", field="model") from None
    except (ValueError, struct.error, KeyError, TypeError) as error:
        raise Invalid(f"The model's files cannot be read: {error}.", field="model") from None
    return Checkpoint(config, tensors)


def _tensors(read: Read, file: str) -> Iterator[Tensor]:
    (length,) = struct.unpack("<Q", read(file, 0, 8))
    if not 2 <= length <= HEADER_LIMIT:
        raise ValueError(f"{file} is not a safetensors file")
    header = json.loads(read(file, 8, length))
    if not isinstance(header, dict):
        raise ValueError(f"{file} is not a safetensors file")
    for name, entry in header.items():
        if name != "__metadata__":
            yield Tensor(name, str(entry["dtype"]), tuple(int(size) for size in entry["shape"]))
