"""This machine, as far as numbers depend on it."""

from __future__ import annotations

import platform

import torch

from jobs.spec.manifest import Machine


def machine(device: torch.device, name: str) -> Machine:
    """What a manifest says of the machine; `name` is what the device calls itself."""
    drivers = driver_versions(device)
    return Machine(
        device=device.type,
        device_name=name,
        driver=drivers.get("nvidia-driver", ""),
        cuda=drivers.get("cuda", ""),
        threads=torch.get_num_threads(),
        platform=f"{platform.system()} {platform.machine()}",
    )


def driver_versions(device: torch.device) -> dict[str, str]:
    """CUDA's version and the driver's; empty on a CPU."""
    if device.type != "cuda":
        return {}
    found = {"cuda": str(torch.version.cuda or "")}
    try:
        import pynvml

        pynvml.nvmlInit()
        found["nvidia-driver"] = str(pynvml.nvmlSystemGetDriverVersion())
    except (ImportError, OSError, RuntimeError):
        return found  # without NVML the driver stays unknown
    return found
