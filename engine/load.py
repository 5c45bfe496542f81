"""Loading a model: from a folder or the hub, safetensors only, quantised or not."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine import hub
from engine.checkpoint import Checkpoint, open_checkpoint
from engine.errors import EngineError
from engine.report import Report
from jobs.spec.job import Dtype, Quantization
from jobs.spec.protocol import Prepare

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
LIBRARIES = ("torch", "transformers", "safetensors", "peft", "bitsandbytes", "huggingface-hub")


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, and where it came from.

    source        local folder with the original config and safetensors
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
    checkpoint = open_checkpoint(source, request.model)

    model, dtype = _first_that_works(source, request, device, report, warn)
    tokenizer = _tokenizer(source, request.model)
    return Loaded(
        name=request.model,
        model=model,
        tokenizer=tokenizer,
        source=source,
        commit=commit,
        device=device,
        device_name=device_name(device),
        dtype=dtype,
        quantization=request.quantization,
        weight_bytes=weight_bytes(model),
        source_bytes=2 * _parameters(model, checkpoint),
        warnings=warnings,
        versions=versions(),
    )


def load_folder(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """(model, tokenizer) of an exported folder, by plain transformers."""
    from transformers import AutoModelForCausalLM

    with _explained(folder.name):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    plain: Any = model
    return plain.to(device).eval(), _tokenizer(folder, folder.name)


def choose_device(wanted: str) -> torch.device:
    """The device of `auto`, `cuda` or `cpu`. Raises bad_request for an absent GPU."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise EngineError(
            "bad_request",
            "device: cuda was asked for, but this worker has no usable GPU",
            "Choose device auto or cpu, or start a worker with a GPU.",
        )
    return torch.device("cuda", torch.cuda.current_device())


def dtype_chain(
    wanted: Dtype, device: torch.device, quantization: Quantization = "none"
) -> list[torch.dtype]:
    """The dtypes to try in turn.

    auto on CPU    float32; quantised bfloat16, float32: memory is what 4 bits are chosen for, and
                   a small model's embedding in float32 weighs as much as its layers
    auto on CUDA   bfloat16 where the GPU has it, float16, float32
    any other      itself, then the wider ones of that list
    """
    half = [torch.float16]
    if device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False):
        half.insert(0, torch.bfloat16)
    if wanted == "auto":
        if device.type == "cpu":
            return [torch.float32] if quantization == "none" else [torch.bfloat16, torch.float32]
        return [*half, torch.float32]
    first = DTYPES[wanted]
    if first is torch.float32:
        return [first]
    return [first, *(d for d in half if d is not first), torch.float32]


@torch.no_grad()
def first_forward(model: nn.Module, device: torch.device) -> str | None:
    """What is wrong with the logits of a few tokens, or None."""
    config: Any = model.config
    vocab = int(config.get_text_config(decoder=True).vocab_size)
    ids = (torch.arange(1, 9, device=device) % vocab)[None]
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    except torch.OutOfMemoryError as error:
        raise _out_of_memory() from error
    except (RuntimeError, TypeError, NotImplementedError) as error:
        text = str(error)
        if any(word in text.lower() for word in ("dtype", "bfloat16", "half", "not implemented")):
            return f"data type not supported ({text.splitlines()[0]})"
        raise
    return None if torch.isfinite(logits).all() else "NaN or infinity in the logits"


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, buffers and quantisation tables, shared storage once."""
    sizes: dict[int, int] = {}

    def count(tensor: Any) -> None:
        if isinstance(tensor, torch.Tensor):
            sizes[tensor.data_ptr()] = tensor.nbytes

    def count_state(state: Any) -> None:
        for value in vars(state).values():
            count(value)
        if getattr(state, "state2", None) is not None:
            count_state(state.state2)

    for tensor in [*model.parameters(), *model.buffers()]:
        count(tensor)
        state = getattr(tensor, "quant_state", None)
        if state is not None:
            count_state(state)
        count(getattr(tensor, "SCB", None))
    for module in model.modules():
        count(getattr(getattr(module, "state", None), "SCB", None))
    return sum(sizes.values())


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.is_file() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of the libraries that the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


# --- inside -------------------------------------------------------------------------------------


def _first_that_works(
    source: Path,
    request: Prepare,
    device: torch.device,
    report: Report,
    warn: Callable[[str], None],
) -> tuple[Any, torch.dtype]:
    """The model in the first dtype of the chain whose first forward is sound."""
    fault = ""
    for dtype in dtype_chain(request.dtype, device, request.quantization):
        if fault:
            warn(f"{fault}; trying {_label(dtype)}")
        report.progress("load", 0, 0, f"loading {request.model} as {_label(dtype)}")
        model = _from_pretrained(source, request, device, dtype)
        found = first_forward(model, device)
        if found is None:
            return model, dtype
        fault = f"{_label(dtype)}: {found}"
        del model
    raise EngineError(
        "engine_failed",
        f"{request.model}: the first forward pass failed in every data type; {fault}",
        "The weights may be damaged; check them with plain transformers.",
    )


def _label(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _parameters(model: nn.Module, checkpoint: Checkpoint) -> int:
    """Parameters of the model, tied ones once; the checkpoint may hold more (other heads)."""
    unpacked = sum(entry.numel for entry in checkpoint.tensors.values())
    if any("Params4bit" in type(p).__name__ for p in model.parameters()):
        return unpacked
    return min(unpacked, sum(p.numel() for p in model.parameters()))


def _out_of_memory() -> EngineError:
    return EngineError(
        "out_of_memory",
        "the model does not fit into the device's memory",
        "Use quantisation bnb_4bit, a smaller model or a larger GPU.",
    )


def _quantization_config(quantization: Quantization, dtype: torch.dtype) -> Any:
    if quantization == "none":
        return None
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


def _from_pretrained(
    source: Path, request: Prepare, device: torch.device, dtype: torch.dtype
) -> Any:
    """The model in eval mode on its device."""
    from transformers import AutoModelForCausalLM

    arguments: dict[str, Any] = {
        "dtype": dtype,
        "use_safetensors": True,
        "trust_remote_code": False,
        "local_files_only": True,
    }
    quantization = _quantization_config(request.quantization, dtype)
    if quantization is not None:
        arguments["quantization_config"] = quantization
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_worth_reading)
    if quantization is not None or device.type == "cuda":
        arguments["device_map"] = {"": device}
    with _explained(request.model):
        model: Any = AutoModelForCausalLM.from_pretrained(source, **arguments)
    for module in model.modules():
        # On CPUs with avx512_bf16 the first forward would repack the weight in place, and
        # dequantising it returns garbage from then on.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def _tokenizer(folder: Path, name: str) -> Any:
    """The tokenizer, left-padding, with a padding token."""
    from transformers import AutoTokenizer

    with _explained(name):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn what transformers raises while loading into typed reasons."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory() from error
    except ImportError as error:
        raise EngineError(
            "missing_library",
            f"{name}: loading needs a library that is not installed: {error}",
            "Install it on the worker.",
        ) from error
    except (ValueError, KeyError, OSError, AttributeError) as error:
        text = str(error)
        if "trust_remote_code" in text or "custom code" in text:
            raise EngineError(
                "unsupported_architecture",
                f"{name} needs code from its repository, which is never run",
                "Choose a model whose architecture transformers itself has.",
                text,
            ) from error
        raise EngineError(
            "unsupported_architecture",
            f"{name} could not be loaded: {text.splitlines()[0] if text else type(error).__name__}",
            "Choose a decoder-only language model that the installed transformers can load.",
            text,
        ) from error
