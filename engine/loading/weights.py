"""A folder's weights as a model that is ready to run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.errors import EngineError
from engine.loading.architecture import auto_class
from engine.loading.faults import explained
from engine.loading.packed import Packed
from engine.loading.unpack import unpacked_tensors
from jobs.spec.job import Quantization


def read_config(folder: Path, name: str) -> Any:
    """The configuration of a folder; code of the repository is never run."""
    from transformers import AutoConfig

    with explained(name):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def read_model(
    folder: Path,
    config: Any,
    name: str,
    dtype: torch.dtype,
    place: dict[str, Any],
    quantization: Quantization = "none",
    packed: Packed | None = None,
) -> Any:
    """The model in eval mode.

    place         where to: `engine.loading.placement.placement`
    quantization  what to quantise to while loading; nothing on top of a `packed` source
    Raises out_of_memory, missing_library, unsupported_architecture, bad_request.
    """
    from transformers import GenerationConfig

    arguments: dict[str, Any] = {
        "dtype": dtype,
        "use_safetensors": True,
        "trust_remote_code": False,
        "local_files_only": True,
        "config": config,
        **place,
    }
    quiet_casts = quantization != "none"
    source: Path | None = folder
    if packed is not None and packed.unpacked_here:
        for part in (config, config.get_text_config()):
            vars(part).pop("quantization_config", None)
        source = None  # transformers takes a folder or tensors
        arguments["state_dict"] = unpacked_tensors(folder, packed.given, name, dtype)
    elif packed is not None:
        config.quantization_config = packed.loading
        quiet_casts = packed.quantization != "none"
    elif quantization != "none":
        if "offload_folder" in place:
            raise EngineError(
                "bad_request",
                f"device_map: offload does not go with quantization {quantization}: what "
                "bitsandbytes has packed must stay on its device",
                "Choose quantisation none, or device_map auto.",
            )
        arguments["quantization_config"] = _bitsandbytes(quantization, dtype)
    if quiet_casts:
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_worth_reading)
    with explained(name):
        of: Any = auto_class(config, name)
        if source is None:
            with torch.device("meta"):
                of = type(of.from_config(config))  # an Auto class wants a folder
        model: Any = of.from_pretrained(source, **arguments)
    for module in model.modules():
        # On CPUs with avx512_bf16 the first forward would repack the weight in place, and
        # dequantising it returns garbage from then on.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if source is None and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    if packed is not None and not packed.stays:
        _align(model, dtype)
    return model.eval()


def _align(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring what was not packed to `dtype` too: of packed sources it keeps the files' own."""
    for parameter in model.parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16) and not parameter.is_meta:
            parameter.data = parameter.data.to(dtype)


def _bitsandbytes(quantization: Quantization, dtype: torch.dtype) -> Any:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise EngineError(
            "missing_library",
            f"quantization: {quantization} needs the library bitsandbytes",
            "Install bitsandbytes on the worker, or choose quantisation none.",
        ) from error
    import transformers

    config: Any = transformers.BitsAndBytesConfig
    if quantization == "bnb_8bit":
        return config(load_in_8bit=True)
    return config(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _worth_reading(record: logging.LogRecord) -> bool:
    """bitsandbytes tells of its casts in every int8 matrix product."""
    return "inputs will be cast" not in record.getMessage()
