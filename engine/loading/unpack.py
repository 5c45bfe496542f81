"""GPTQ and AWQ checkpoints as plain weights, without the libraries that run them packed.

The whole model lies dequantised in the host's memory before it goes to its device.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint import open_checkpoint
from engine.dequantise import awq, gptq
from engine.errors import EngineError

SUFFIXES = (".qweight", ".qzeros", ".scales", ".g_idx")
FORMATS = {"gptq": 1, "gptq_v2": 0}  # checkpoint_format -> what is added to a stored zero point


def check_format(settings: dict[str, Any], name: str) -> None:
    """Raise unsupported_architecture for a packing that is not among those read here."""
    method, bits = settings.get("quant_method"), _bits(settings)
    if method == "gptq":
        packing = str(settings.get("checkpoint_format") or "gptq")
        known = packing in FORMATS and bits in (2, 4, 8) and not settings.get("is_marlin_format")
    else:
        packing = str(settings.get("version") or "gemm").lower()
        backend = settings.get("backend", "autoawq")
        known = packing == "gemm" and bits == 4 and backend != "llm-awq"
    if not known:
        raise EngineError(
            "unsupported_architecture",
            f"{name} is packed by {method} in the format {packing} with {bits} bits, which cannot "
            "be read",
            "Use the model's original bf16 release, or one packed as gptq (2, 4 or 8 bits) or as "
            "AWQ gemm (4 bits).",
        )


def unpacked_tensors(
    folder: Path, settings: dict[str, Any], name: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """All tensors of a GPTQ or AWQ folder by name, packed ones dequantised to `dtype`.

    Raises model_not_found for damaged files.
    """
    from safetensors import safe_open

    files = open_checkpoint(folder, name).files
    found: dict[str, Tensor] = {}
    packed: dict[str, dict[str, Tensor]] = {}
    for file in files:
        with safe_open(folder / file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - no mapping
                base, dot, last = key.rpartition(".")
                if dot + last in SUFFIXES:
                    packed.setdefault(base, {})[last] = tensors.get_tensor(key)
                else:
                    value = tensors.get_tensor(key)
                    found[key] = value.to(dtype) if value.is_floating_point() else value
        for base in [base for base, parts in packed.items() if _whole(parts)]:
            found[f"{base}.weight"] = _dense(packed.pop(base), settings).to(dtype)
    for base, parts in packed.items():  # split over two files, or without g_idx
        found[f"{base}.weight"] = _dense(parts, settings).to(dtype)
    return found


def _whole(parts: dict[str, Tensor]) -> bool:
    return len(parts) == len(SUFFIXES)


def _dense(parts: dict[str, Tensor], settings: dict[str, Any]) -> Tensor:
    bits, size = _bits(settings), int(settings.get("group_size") or -1)
    qweight, qzeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
    if settings["quant_method"] == "awq":
        return awq(qweight, qzeros, scales, size if size > 0 else len(qweight))
    inputs = len(qweight) * 32 // bits
    groups = parts.get("g_idx", torch.arange(inputs) // (size if size > 0 else inputs))
    offset = FORMATS[str(settings.get("checkpoint_format") or "gptq")]
    return gptq(qweight, qzeros, scales, groups, bits, offset)


def _bits(settings: dict[str, Any]) -> int:
    return int(settings.get("bits") or settings.get("w_bit") or 4)
