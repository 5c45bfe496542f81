"""What a job will need, before it is submitted: from config.json and safetensors headers alone."""

from __future__ import annotations

from typing import Any

import httpx
from huggingface_hub import HfApi
from pydantic import BaseModel, Field

from jobs import checkpoints, models
from jobs.problems import Invalid
from jobs.settings import Settings
from jobs.spec.job import JobSpec, Quantization

UNREACHABLE: tuple[type[Exception], ...] = (*models.UNREACHABLE, httpx.HTTPError)
# Architectures whose residual writers the engine finds by name (dense decoder-only models).
SUPPORTED = frozenset(
    {
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "Phi3ForCausalLM",
        "OlmoForCausalLM",
        "Olmo2ForCausalLM",
        "GraniteForCausalLM",
        "SmolLM3ForCausalLM",
    }
)
# bytes per quantised parameter: nf4 keeps an absmax per 64 values, itself in 8 bits per 256
NF4_BYTES = 0.5 + (1 + 4 / 256) / 64
INT8_BYTES = 1.0
OVERHEAD_BYTES = 700_000_000  # CUDA context, cuBLAS workspace, allocator slack
BATCH = 32
PROMPT_TOKENS = 64


class Estimate(BaseModel):
    """Figures before submitting. `None` where they could not be known."""

    parameters: int
    architecture: str
    layers: int
    hidden: int
    weight_bytes: dict[Quantization, int] = Field(description="loaded weights by quantisation")
    gpu_bytes: int = Field(description="peak device memory with the spec's quantisation")
    ram_bytes: int = Field(description="peak host memory besides the device")
    disk_bytes: int = Field(description="one merged export and its temporary copy")
    supported: bool | None = Field(description="None: unknown architecture, the engine will tell")
    seconds: float | None = None
    warnings: list[str] = []


def estimate(spec: JobSpec, settings: Settings, *, hub_token: str | None = None) -> Estimate:
    """Estimate memory and disk of `spec`. Invalid(field="model") where the files cannot be had.

    With P the parameters, of which Q lie in the 2-D weights of decoder layers (the part that is
    quantised; embeddings, norms and the head stay in 16 bit), L layers, hidden size d, and kv the
    number of key/value heads times the head size:

        none      2·P                     (4·P for float32)
        bnb_8bit  1·Q + 2·(P - Q)
        bnb_4bit  0.516·Q + 2·(P - Q)     nf4 with double quantisation, bitsandbytes
        gpu       weights + B·T·2·L·kv·2 (key/value cache) + 2·B·V·4 (log-probabilities of the
                  vocabulary V in float32, twice) + B·T·d·8·2 (activations) + 0.7 GB of context,
                  with B = 32 rows of T = 64 prompt tokens + the answer tokens
        ram       the largest file's worth of tensors while loading, or all weights on a CPU, + 1 GB
        disk      one merged export in the source's dtype (sum of the tensors' bytes) + 2 %
    """
    commit = models.check(spec.model, spec.revision, settings, hub_token=hub_token)
    folder = models.local_path(spec.model, settings)
    if folder is not None:
        checkpoint = checkpoints.from_folder(folder)
    else:
        checkpoint = _from_hub(spec.model, commit or spec.revision, hub_token)
    return figures(spec, checkpoint)


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


def figures(spec: JobSpec, checkpoint: checkpoints.Checkpoint) -> Estimate:
    """The estimate of `spec` on a checkpoint whose headers are known; see `estimate`."""
    config = checkpoint.config
    # models with a vision tower keep the language model's sizes one level down
    text: dict[str, Any] = {**config, **(config.get("text_config") or {})}
    warnings: list[str] = []
    parameters = sum(tensor.parameters for tensor in checkpoint.tensors)
    quantised = sum(
        tensor.parameters
        for tensor in checkpoint.tensors
        if len(tensor.shape) >= 2 and ".layers." in f".{tensor.name}"
    )
    source = sum(tensor.size for tensor in checkpoint.tensors)
    layers, hidden = int(text.get("num_hidden_layers", 0)), int(text.get("hidden_size", 0))
    if not layers or not hidden:
        warnings.append("config.json does not say how many layers there are or how wide they are")
    wide = 4 if spec.dtype == "float32" else 2
    rest = parameters - quantised
    weights: dict[Quantization, int] = {
        "none": parameters * wide,
        "bnb_8bit": round(quantised * INT8_BYTES) + rest * wide,
        "bnb_4bit": round(quantised * NF4_BYTES) + rest * wide,
    }
    heads = int(text.get("num_attention_heads") or 1)
    kv_heads = int(text.get("num_key_value_heads") or heads)
    head_size = int(text.get("head_dim") or (hidden // heads if heads else 0))
    vocabulary = int(text.get("vocab_size") or 0)
    tokens = PROMPT_TOKENS + len(spec.system_prompt or "") // 3 + spec.max_new_tokens
    cache = BATCH * tokens * 2 * layers * kv_heads * head_size * wide
    logits = 2 * BATCH * vocabulary * 4
    activations = BATCH * tokens * hidden * 8 * wide
    loaded = weights[spec.quantization]
    needed = loaded + cache + logits + activations
    architecture = str((config.get("architectures") or ["unknown"])[0])
    if config.get("auto_map"):
        warnings.append("the repository brings its own code, which is never run here")
    if config.get("quantization_config"):
        warnings.append("the weights are already quantised; exports keep the source's format")
    return Estimate(
        parameters=parameters,
        architecture=architecture,
        layers=layers,
        hidden=hidden,
        weight_bytes=weights,
        gpu_bytes=0 if spec.device == "cpu" else needed + OVERHEAD_BYTES,
        ram_bytes=(needed if spec.device == "cpu" else _largest(checkpoint)) + 1_000_000_000,
        disk_bytes=round(source * 1.02) + 20_000_000,
        supported=True if architecture in SUPPORTED else None,
        seconds=None,
        warnings=warnings,
    )


def _largest(checkpoint: checkpoints.Checkpoint) -> int:
    """Bytes of the largest shard that a loader holds at once: at most 5 GB by convention."""
    return min(5_000_000_000, sum(tensor.size for tensor in checkpoint.tensors))
