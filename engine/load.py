"""Loading a model: from a folder or the hub, safetensors only, quantised or not.

What each step does is in `engine.loading`: architecture, packed sources, placement, precision.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from engine import hub
from engine.checkpoint import open_checkpoint
from engine.errors import EngineError
from engine.loading.packed import packed_source
from engine.loading.placement import (
    check_placed,
    choose_device,
    device_name,
    input_device,
    placement,
)
from engine.loading.precision import dtype_chain, first_forward, label
from engine.loading.size import parameters, weight_bytes
from engine.loading.tokens import complete_ends, read_tokenizer
from engine.loading.weights import read_config, read_model
from engine.report import Report
from jobs.spec.job import DeviceMap, Quantization
from jobs.spec.protocol import Prepare

LIBRARIES = (
    "torch", "transformers", "accelerate", "safetensors", "tokenizers", "peft", "bitsandbytes",
    "compressed-tensors", "huggingface-hub",
)  # fmt: skip


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, and where it came from.

    source        local folder with the original config and safetensors
    device        where token ids go; with several devices the first layers'
    quantization  of the weights in memory; of a source that comes packed in another way, none
    packed        how the source itself is quantised ("FP8"), "" where it is not
    weight_bytes  bytes of the loaded weights, quantisation tables included
    source_bytes  bytes of the same weights in bf16
    """

    name: str
    model: Any
    tokenizer: Any
    source: Path
    commit: str | None
    device: torch.device
    device_name: str
    dtype: torch.dtype
    quantization: Quantization
    weight_bytes: int
    source_bytes: int
    packed: str = ""
    warnings: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)


def load(request: Prepare, report: Report) -> Loaded:
    """Load `request.model`; tries the next dtype where one gives NaN or is not supported.

    Raises model_not_found, gated_model, hub_unreachable, unsafe_weights, missing_library,
    out_of_memory, unsupported_architecture; bad_request for a device that is not there.
    """
    device = choose_device(request.device)
    warnings: list[str] = []

    def warn(text: str) -> None:
        warnings.append(text)
        report.log(text, "warning")

    if request.path is not None:
        source, commit = Path(request.path), None
        if not source.is_dir():
            raise EngineError(
                "model_not_found",
                f"{request.model}: its folder is not there",
                "Check the name and the models folder of the workers.",
            )
    else:
        source, commit = hub.fetch(request.model, request.revision, report, warn)
    open_checkpoint(source, request.model)  # before anything is read: are the files sound?

    packed = packed_source(read_config(source, request.model), request.model)
    quantization = request.quantization if packed is None else packed.quantization
    model, dtype = _first_that_works(source, request, quantization, device, report, warn)
    if packed is not None:
        warn(packed.statement(label(dtype), request.quantization))
    tokenizer = read_tokenizer(source, request.model)
    complete_ends(model, tokenizer, warn)
    return Loaded(
        name=request.model,
        model=model,
        tokenizer=tokenizer,
        source=source,
        commit=commit,
        device=input_device(model),
        device_name=device_name(device),
        dtype=dtype,
        quantization=quantization,
        weight_bytes=weight_bytes(model),
        source_bytes=2 * parameters(model),
        packed="" if packed is None else packed.label,
        warnings=warnings,
        versions=versions(),
    )


def load_folder(
    folder: Path, device: torch.device, dtype: torch.dtype, device_map: DeviceMap = "single"
) -> tuple[Any, Any]:
    """(model, tokenizer) of an exported folder, by plain transformers."""
    config = read_config(folder, folder.name)
    packed = packed_source(config, folder.name)
    place = placement(device_map, device)
    model = read_model(folder, config, folder.name, dtype, place, packed=packed)
    check_placed(model, device_map)
    tokenizer = read_tokenizer(folder, folder.name)
    complete_ends(model, tokenizer, lambda text: None)
    return model, tokenizer


def versions() -> dict[str, str]:
    """Versions of the libraries that the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _first_that_works(
    source: Path,
    request: Prepare,
    quantization: Quantization,
    device: torch.device,
    report: Report,
    warn: Callable[[str], None],
) -> tuple[Any, torch.dtype]:
    """The model in the first dtype of the chain whose first forward is sound."""
    fault = ""
    for dtype in dtype_chain(request.dtype, device, quantization):
        if fault:
            warn(f"{fault}; trying {label(dtype)}")
        report.progress("load", 0, 0, f"loading {request.model} as {label(dtype)}")
        config = read_config(source, request.model)
        packed = packed_source(config, request.model)
        place = placement(request.device_map, device)
        model = read_model(source, config, request.model, dtype, place, quantization, packed)
        check_placed(model, request.device_map)
        found = first_forward(model)
        if found is None:
            return model, dtype
        fault = f"{label(dtype)}: {found}"
        del model
    raise EngineError(
        "engine_failed",
        f"{request.model}: the first forward pass failed in every data type; {fault}",
        "The weights may be damaged; check them with plain transformers.",
    )
