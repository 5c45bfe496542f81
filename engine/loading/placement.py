"""Where a model's weights lie: one device, several GPUs, or partly outside of them.

Of a model on several devices accelerate's hooks carry the activations along; an offloaded weight is
a `meta` tensor between its module's forwards. So nobody may ask a weight for its device: the tokens
go to `input_device(model)`, and a weight is read within `engine.dequantise.present(module)`.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from engine.errors import EngineError
from engine.loading.faults import out_of_memory
from jobs.spec.job import DeviceMap

FOLDER = "nullspace-offload"
SHARE = 0.8  # of the free memory, for weights; the rest is for caches, activations and logits


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


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.is_file() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def placement(
    wanted: DeviceMap, device: torch.device, room: Mapping[int | str, int] | None = None
) -> dict[str, Any]:
    """The arguments of `from_pretrained` that say where the weights go.

    single    all on `device`
    auto      over all visible GPUs, nothing outside of them; on a CPU as `single`
    offload   the GPUs, then the host's memory, then the disk (where the files already lie)

    room      bytes for weights of each GPU (by number), `cpu`; by default SHARE of what is free
    """
    if wanted == "single" or (wanted == "auto" and device.type == "cpu"):
        return {"device_map": {"": device}}
    if room is None:
        room = _free(device, host=wanted == "offload")
    arguments: dict[str, Any] = {"device_map": "auto", "max_memory": dict(room)}
    if wanted == "offload":
        # Weights that are converted while loading (fused experts) cannot be read where they lie.
        arguments["offload_folder"] = _folder()
    return arguments


def check_placed(model: nn.Module, wanted: DeviceMap) -> None:
    """Raise out_of_memory where a model that was to lie on GPUs does not.

    Raises bad_request for offloaded stacks of experts: they are edited in place.
    """
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if wanted == "auto" and len(places) > 1 and places & {"cpu", "disk"}:
        raise out_of_memory("the model does not fit into the memory of all visible GPUs")
    away = [name for name, p in model.named_parameters() if p.is_meta and p.dim() > 2]
    if away:
        raise EngineError(
            "bad_request",
            f"device_map: offload does not reach fused experts ({away[0]} is offloaded): they are "
            "edited in place",
            "Choose device_map auto with more GPUs, or a smaller model.",
        )


def input_device(model: nn.Module) -> torch.device:
    """Where token ids go: the device on which the input embedding runs."""
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    return device_of(embedding)


def device_of(module: nn.Module) -> torch.device:
    """The device on which a module runs, wherever its weights are kept."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            device = getattr(each, "execution_device", None)
            if device is not None:
                return (
                    torch.device("cuda", device)
                    if isinstance(device, int)
                    else torch.device(device)
                )
    return next(module.parameters()).device


def _folder() -> str:
    """A folder for what must be written anew; those that dead processes left behind go."""
    for old in Path(tempfile.gettempdir()).glob(f"{FOLDER}-*-*"):
        pid = old.name.split("-")[-2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(old, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"{FOLDER}-{os.getpid()}-")


def _free(device: torch.device, host: bool) -> dict[int | str, int]:
    """Bytes for weights on each device."""
    room: dict[int | str, int] = {}
    if device.type == "cuda":
        for number in range(torch.cuda.device_count()):
            room[number] = int(SHARE * torch.cuda.mem_get_info(number)[0])
    if host:
        room["cpu"] = int(SHARE * psutil.virtual_memory().available)
    return room
