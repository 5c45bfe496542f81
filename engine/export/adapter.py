"""The edit as a PEFT adapter, computed from the original weights.

mode, kind        adapter                                     error
none, pre         LoRA of rank 1                              none
full, adapter     DoRA of rank 1 (ENGINE.md, consequence 3)   none
full, lora        LoRA of rank r by truncated SVD of ΔW       measured
columns           LoRA of rank r by truncated SVD of ΔW       measured

DoRA (Liu et al. 2024, arXiv 2402.09353): W' = m ∘ rownorm(W + B A). With A = vᵀŴ and
B = −λ(N∘v), W + B A = N∘(Ŵ − λ v (vᵀŴ)), so m = N gives `full`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from safetensors.torch import save
from torch import Tensor

from engine.checkpoint import Checkpoint
from engine.edit import TINY, rewrite, sums
from engine.export.folder import Folder
from engine.export.original import Edited, originals
from engine.report import Report
from jobs.spec.candidate import EditMode

EXACT_SVD = 1024  # up to this smaller side the SVD is exact, beyond it randomised
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """What was written: its kind, rank, and ‖ΔW − BA‖/‖ΔW‖ over the writers (0 where exact)."""

    dora: bool
    rank: int
    worst_error: float
    mean_error: float


def write_adapter(
    folder: Folder,
    checkpoint: Checkpoint,
    edited: list[Edited],
    mode: EditMode,
    plain: bool,
    rank: int,
    base: str,
    commit: str | None,
    report: Report,
) -> Adapter:
    """Write adapter_config.json and adapter_model.safetensors; `plain` asks for LoRA always."""
    dora = mode == "full" and not plain
    if dora or mode in ("none", "pre"):
        rank = 1
    rank = max(1, min([rank, *(min(e.writer.d, e.writer.n) for e in edited)]))
    tensors: dict[str, Tensor] = {}
    errors: list[float] = []
    for k, (one, W) in enumerate(originals(checkpoint, edited)):
        report.progress("export", k, len(edited), one.writer.name)
        key = PREFIX + one.writer.name
        if dora or mode in ("none", "pre"):
            A, B, N = rank_one_factors(W, one.v, one.lam, mode)
            if dora:
                tensors[f"{key}.lora_magnitude_vector"] = N.float()
        else:
            A, B, error = truncated(W, one.v, one.lam, mode, rank)
            errors.append(error)
        tensors[f"{key}.lora_A.weight"] = A.float().contiguous()
        tensors[f"{key}.lora_B.weight"] = B.float().contiguous()
    data = save({k: t.cpu() for k, t in tensors.items()}, metadata={"format": "pt"})
    folder.need(len(data))
    folder.write("adapter_model.safetensors", [data])
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": commit,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "use_dora": dora,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": any(e.writer.transposed for e in edited),
        "init_lora_weights": True,
        "target_modules": [e.writer.name for e in edited],
    }
    folder.write("adapter_config.json", [(json.dumps(config, indent=2) + "\n").encode()])
    mean = sum(errors) / len(errors) if errors else 0.0
    return Adapter(dora, rank, max(errors, default=0.0), mean)


def rank_one_factors(
    W: Tensor, v: Tensor, lam: float, mode: EditMode
) -> tuple[Tensor, Tensor, Tensor]:
    """A (1, n), B (d, 1), row norms N (d), float64: `none` and `pre` are W + BA, `full` is DoRA."""
    whole, v = sums(W, v), v.double()
    if mode == "none":
        return whole.t[None], (-lam * v)[:, None], whole.N
    return whole.u[None], (-lam * whole.N * v)[:, None], whole.N


def truncated(
    W: Tensor, v: Tensor, lam: float, mode: EditMode, rank: int
) -> tuple[Tensor, Tensor, float]:
    """A (r, n), B (d, r) of the best rank-r ΔW, and the relative Frobenius error, measured.

    Beyond `EXACT_SVD` the randomised SVD of Halko et al. 2011 (arXiv 0909.4061).
    """
    W = W.float()
    delta = rewrite(W, v, lam, mode) - W
    if min(delta.shape) <= EXACT_SVD:
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    else:
        q = min(rank + 16, *delta.shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            U, S, V = torch.svd_lowrank(delta, q=q, niter=4)
        Vh = V.T
    root = S[:rank].sqrt()
    A, B = root[:, None] * Vh[:rank], U[:, :rank] * root
    size = torch.linalg.vector_norm(delta).clamp_min(TINY)
    return A, B, float(torch.linalg.vector_norm(delta - B @ A) / size)
