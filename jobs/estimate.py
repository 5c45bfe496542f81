"""What a job will need, before it is submitted: from config.json and safetensors headers alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import HfApi
from pydantic import BaseModel, Field

from jobs import checkpoints, models
from jobs.duration import seconds
from jobs.needs import Need, need
from jobs.problems import Invalid
from jobs.settings import Settings
from jobs.spec.job import JobSpec, Quantization
from jobs.spec.memory import Kind
from jobs.spec.methods import needs_router
from jobs.spec.shape import Shape
from jobs.weights import PACKED, Weights, weights_of

UNREACHABLE: tuple[type[Exception], ...] = (*models.UNREACHABLE, httpx.HTTPError)
PROMPT_TOKENS = 64  # of a chat template and a short question
CHARACTERS = 3  # of a token, cautiously
ARCHITECTURES = Path(__file__).with_name("architectures.json")
OTHER_TASKS = ("Classification", "MaskedLM", "QuestionAnswering", "TokenClassification")


class Fit(BaseModel):
    """One device that the job could run on."""

    name: str
    kind: Kind
    memory_bytes: int
    fits: bool = Field(description="False: not even one prompt at a time")
    smaller_batches: bool = Field(description="the batches must be smaller than the engine likes")
    seconds: float | None = Field(None, description="None: nobody measured this device")


class Estimate(BaseModel):
    """Figures before submitting. `None` where they could not be known."""

    parameters: int
    active: int = Field(description="parameters that one token passes")
    architecture: str
    layers: int
    hidden: int
    weight_bytes: dict[Quantization, int] = Field(description="loaded weights by quantisation")
    gpu_bytes: int = Field(description="peak device memory with the spec's quantisation")
    ram_bytes: int = Field(description="peak host memory besides the device")
    disk_bytes: int = Field(description="one merged export and its temporary copy")
    needs: dict[Kind, Need] = Field(description="memory by phase on a GPU and on a CPU")
    fits: list[Fit] = Field([], description="the workers' devices")
    supported: bool | None = Field(description="None: the engine will tell")
    seconds: float | None = Field(None, description="on the fastest known device that it fits")
    summary: str = ""
    warnings: list[str] = []


def estimate(
    spec: JobSpec,
    settings: Settings,
    *,
    hub_token: str | None = None,
    devices: Sequence[Mapping[str, Any]] = (),
) -> Estimate:
    """Estimate memory, disk and time of `spec`, and on which of the workers' `devices` it fits.

    `devices` are as workers register them: {"kind", "name", "memory_bytes"}.
    Invalid(field="model") where the files cannot be had.
    """
    commit = models.check(spec.model, spec.revision, settings, hub_token=hub_token)
    folder = models.local_path(spec.model, settings)
    if folder is not None:
        checkpoint = checkpoints.from_folder(folder)
    else:
        checkpoint = _from_hub(spec.model, commit or spec.revision, hub_token)
    return figures(spec, checkpoint, devices=devices)


def _from_hub(name: str, revision: str | None, token: str | None) -> checkpoints.Checkpoint:
    try:
        api = HfApi(token=token or False)
        info = api.model_info(name, revision=revision, timeout=models.HUB_SECONDS)
        files = [file.rfilename for file in info.siblings or []]
        return checkpoints.from_hub(name, info.sha, files, token, models.HUB_SECONDS)
    except UNREACHABLE:
        raise Invalid(
            f"The hub could not be asked about {name}. Try again later, or put the model into the "
            "operator's models folder.",
            field="model",
        ) from None


def figures(
    spec: JobSpec,
    checkpoint: checkpoints.Checkpoint,
    *,
    devices: Sequence[Mapping[str, Any]] = (),
    prompt: int | None = None,
) -> Estimate:
    """The estimate of `spec` on a checkpoint whose headers are known.

    prompt   tokens of the longest prompt, template included; None: a short question's
    """
    shape = Shape.of(checkpoint.config, 2)
    weights = weights_of(checkpoint, shape)
    prompt = prompt or PROMPT_TOKENS + len(spec.system_prompt or "") // CHARACTERS
    needs = {kind: need(spec, shape, weights, kind, prompt) for kind in _kinds(spec)}
    fits = [
        fit
        for device in devices
        if (fit := _fit(spec, shape, weights, needs, device, prompt)) is not None
    ]
    times = [fit.seconds for fit in fits if fit.fits and fit.seconds is not None]
    on_gpu, on_cpu = needs.get("cuda"), needs.get("cpu")
    disk = round(weights.files * 1.02) + 20_000_000
    found = Estimate(
        parameters=weights.parameters,
        active=weights.active,
        architecture=str((checkpoint.config.get("architectures") or ["unknown"])[0]),
        layers=shape.layers,
        hidden=shape.hidden,
        weight_bytes={
            kind: weights.loaded(kind, 4 if spec.dtype == "float32" else 2) for kind in PACKED
        },
        gpu_bytes=0 if on_gpu is None else on_gpu.bytes,
        ram_bytes=on_gpu.host if on_gpu is not None else on_cpu.bytes if on_cpu is not None else 0,
        disk_bytes=disk,
        needs=needs,
        fits=fits,
        supported=_supported(checkpoint.config),
        seconds=min(times, default=None),
        warnings=_warnings(spec, checkpoint.config, shape, weights),
    )
    return found.model_copy(update={"summary": summary(found)})


def summary(found: Estimate) -> str:
    """One sentence for a person.

    "Needs about 6.1 GB of GPU memory (weights 4.2, cache 1.1, libraries 0.7, logits 0.1), fits on
    NVIDIA L4; disk 15 GB; about 9 minutes."
    """
    live = {fit.kind for fit in found.fits if fit.fits}
    kind: Kind = "cuda" if "cuda" in found.needs and (live != {"cpu"}) else "cpu"
    chosen = found.needs[kind]
    phase = next(phase for phase in chosen.phases if phase.name == chosen.decides)
    parts = sorted(phase.parts.items(), key=lambda part: -part[1])
    shown = ", ".join(f"{name} {_amount(count)}" for name, count in parts if count >= 5e7)
    memory = "GPU memory" if kind == "cuda" else "memory"
    text = f"Needs about {_amount(chosen.bytes)} GB of {memory}" + (f" ({shown})" if shown else "")
    names = dict.fromkeys(
        fit.name + (" in smaller batches" if fit.smaller_batches else "")
        for fit in found.fits
        if fit.fits
    )
    if names:
        text += f", fits on {', '.join(names)}"
    elif found.fits:
        text += ", fits on no worker that is here now"
    text += f"; disk {_amount(found.disk_bytes)} GB"
    if found.seconds is not None:
        text += f"; about {_span(found.seconds)}"
    return text + "."


def _kinds(spec: JobSpec) -> list[Kind]:
    if spec.device == "auto":
        return ["cuda", "cpu"]
    return [spec.device]


def _fit(
    spec: JobSpec,
    shape: Shape,
    weights: Weights,
    needs: Mapping[Kind, Need],
    device: Mapping[str, Any],
    prompt: int,
) -> Fit | None:
    """How the job fits on one worker's device; None for a kind that the job excludes."""
    kind: Kind = "cuda" if device.get("kind") == "cuda" else "cpu"
    if kind not in needs:
        return None
    name, memory = str(device.get("name") or kind), int(device.get("memory_bytes") or 0)
    wanted = needs[kind]
    return Fit(
        name=name,
        kind=kind,
        memory_bytes=memory,
        fits=memory >= wanted.least,
        smaller_batches=memory < wanted.bytes,
        seconds=seconds(spec, shape, weights, kind, name, prompt, memory >= wanted.most),
    )


def _supported(config: Mapping[str, Any]) -> bool | None:
    """True where every writer is found, False for what is no decoder, else the engine will tell.

    docs/architectures.md is the table; the engine itself decides before a search.
    """
    names = [str(name) for name in config.get("architectures") or []]
    if config.get("is_encoder_decoder") or any(t in name for name in names for t in OTHER_TASKS):
        return False
    known = _architectures()
    if names and names[0] in known["out"]:
        return False
    return True if names and names[0] in known["covered"] else None


@lru_cache(maxsize=1)
def _architectures() -> dict[str, Any]:
    """Written by `python -m tests.engine.zoo`, which builds a tiny model of each."""
    found: dict[str, Any] = json.loads(ARCHITECTURES.read_text("utf-8"))
    return found


def _warnings(
    spec: JobSpec, config: Mapping[str, Any], shape: Shape, weights: Weights
) -> list[str]:  # fmt: skip
    found = []
    if not shape.layers or not shape.hidden:
        found.append("config.json does not say how many layers there are or how wide they are")
    if config.get("auto_map"):
        found.append("the repository brings its own code, which is never run here")
    if needs_router(spec.methods) and not weights.experts:
        found.append("method router needs a mixture of experts; it will be refused for this model")
    if config.get("quantization_config") or weights.stored:
        found.append("the weights are already quantised; exports keep the source's format")
    elif weights.experts and spec.quantization != "none":
        share = weights.experts / max(1, weights.parameters)
        found.append(
            f"{share:.0%} of the parameters are fused experts, which bitsandbytes does not "
            f"quantise: they stay in 16 bits ({_amount(2 * weights.experts)} GB)"
        )
    return found


def _amount(count: float) -> str:
    """Bytes in GB with two digits: 4.2, 0.35, 140."""
    value = count / 1e9
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.95 else f"{value:.2f}"


def _span(time: float) -> str:
    """Seconds in words: 40 seconds, 9 minutes, 3.5 hours."""
    if time < 90:
        return f"{max(1, round(time))} seconds"
    return f"{time / 60:.0f} minutes" if time < 5400 else f"{time / 3600:.1f} hours"
