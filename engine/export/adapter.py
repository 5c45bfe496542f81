"""The edit as a PEFT adapter, computed from the original weights.

mode, kind        adapter                                      error
none, pre         LoRA of rank k, the number of directions     none
full, adapter     DoRA of rank k (ENGINE.md, consequence 3)    none
full, lora        LoRA of rank r by truncated SVD of ΔW        measured
columns           LoRA of rank r by truncated SVD of ΔW        measured
ARA               LoRA of the update's own rank                none

DoRA (Liu et al. 2024, arXiv 2402.09353): W' = m ∘ rownorm(W + B A). With A = VŴ and
B = −λ(N∘Vᵀ), W + B A = N∘(Ŵ − λ Vᵀ(V Ŵ)), so m = N gives `full`. PEFT has no DoRA with biases
(affine edits) nor for stacks of experts: there `full` becomes a plain LoRA.

A stack is adapted through PEFT's `target_parameters`, rank r for each of its E experts:
lora_A (E r, n), row e r + j, and lora_B (d, r E), column j E + e.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from engine.anatomy import Writer
from engine.change import TINY, Change, Update, column_sums, rewrite, row_sums
from engine.checkpoint import Checkpoint
from engine.errors import EngineError
from engine.export.folder import Folder
from engine.export.original import Edited, original
from engine.report import Report

EXACT_SVD = 512  # up to this smaller side the SVD is exact, beyond it randomised
PREFIX = "base_model.model."
# Leaves that PEFT takes for experts' projections wherever a model's experts are stacked.
EXPERTS = ("down_proj", "w2")


@dataclass(frozen=True)
class Adapter:
    """What was written: its kind, rank, and ‖ΔW − BA‖/‖ΔW‖ over the matrices (0 where exact)."""

    dora: bool
    rank: int
    worst_error: float
    mean_error: float


@dataclass(frozen=True)
class Factors:
    """W + B A is the edit: A (r, n), B (d, r); DoRA's magnitude N (d); error of a truncation."""

    A: Tensor
    B: Tensor
    N: Tensor
    error: float = 0.0

    def padded(self, r: int) -> Factors:
        """The same update with rank `r`, by zeros."""
        A, B = self.A, self.B
        A = torch.cat([A, A.new_zeros(r - len(A), A.shape[1])])
        B = torch.cat([B, B.new_zeros(len(B), r - B.shape[1])], dim=1)
        return replace(self, A=A, B=B)


def write_adapter(
    folder: Folder,
    checkpoint: Checkpoint,
    edited: list[Edited],
    plain: bool,
    rank: int,
    base: str,
    commit: str | None,
    stacks: bool,
    report: Report,
) -> Adapter:
    """Write adapter_config.json and adapter_model.safetensors.

    plain    LoRA always
    stacks   whether the model holds stacks of experts, edited or not

    Raises unsupported_architecture for writers that PEFT cannot adapt.
    """
    for one in edited:
        _check(one, stacks)
    affine = any(one.shift() is not None for one in edited)
    plain = plain or affine or not all(one.writer.hooked for one in edited)
    forms = {_form(one.change, plain) for one in edited}
    dora, exact = forms == {"dora"}, "svd" not in forms
    factors: list[list[Factors]] = []
    for k, one in enumerate(edited):
        report.progress("export", k, len(edited), one.writer.name)
        most = _rank(one.change) if exact else rank
        r = max(1, min(most, one.writer.d, one.writer.n))
        matrices = (original(checkpoint, one, e) for e in range(max(1, one.writer.experts)))
        factors.append(
            [exact_factors(W, one.change) if exact else truncated(W, one.change, r)
             for W in matrices]
        )  # fmt: skip
    errors = [f.error for found in factors for f in found]
    most = max(len(found[0].A) for found in factors)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for one, found in zip(edited, factors, strict=True):
        kind, name = _target(one.writer, stacks)
        if kind == "parameter":  # PEFT takes ranks of their own for modules only
            found = [f.padded(most) for f in found]
        ranks[name] = len(found[0].A)
        tensors |= _tensors(one, found, dora)
    data = save({k: t.cpu() for k, t in tensors.items()}, metadata={"format": "pt"})
    folder.need(len(data))
    folder.write("adapter_model.safetensors", [data])
    config = _config(edited, ranks, stacks) | {
        "base_model_name_or_path": base, "revision": commit, "use_dora": dora, "lora_bias": affine,
    }  # fmt: skip
    folder.write("adapter_config.json", [(json.dumps(config, indent=2) + "\n").encode()])
    return Adapter(dora, max(ranks.values()), max(errors), sum(errors) / len(errors))


def _config(edited: list[Edited], ranks: dict[str, int], stacks: bool) -> dict[str, Any]:
    """PEFT's LoraConfig; scaling is 1 everywhere (alpha = r)."""
    targets = [_target(one.writer, stacks) for one in edited]
    most = max(ranks.values())
    other = {name: r for name, r in ranks.items() if r != most}
    conv1d = any(one.writer.hooked and one.writer.transposed for one in edited)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": other,
        "alpha_pattern": other,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": conv1d,
        "init_lora_weights": True,
        "target_modules": [name for kind, name in targets if kind == "module"],
        "target_parameters": [name for kind, name in targets if kind == "parameter"] or None,
    }


def _target(writer: Writer, stacks: bool) -> tuple[str, str]:
    """("module" | "parameter", name) by which PEFT finds a writer.

    In models with stacked experts PEFT reads a module `….down_proj` as the experts' projections of
    older checkpoints, so that a shared expert's has to be named as a parameter.
    """
    if not writer.hooked:
        return "parameter", writer.name
    if stacks and writer.name.rpartition(".")[2] in EXPERTS:
        return "parameter", f"{writer.name}.weight"
    return "module", writer.name


def _check(one: Edited, stacks: bool) -> None:
    """Refuse what PEFT cannot load."""
    writer, fault = one.writer, ""
    if _target(writer, stacks)[0] == "parameter" and one.shift() is not None:
        fault = "an adapter of a parameter holds no bias"
    elif writer.experts and getattr(writer.module, writer.parameter).dim() != 3:
        fault = "its experts share one matrix"
    elif writer.experts and writer.transposed != getattr(writer.module, "is_transposed", False):
        fault = "its experts are stored transposed without saying so"
    if fault:
        raise EngineError(
            "unsupported_architecture",
            f"{writer.name} cannot be adapted by PEFT: {fault}",
            "Export it with kind merged.",
        )


def _tensors(one: Edited, found: list[Factors], dora: bool) -> dict[str, Tensor]:
    """The adapter's tensors of one writer, float32, by PEFT's names."""
    writer = one.writer
    key = PREFIX + (writer.name if writer.hooked else writer.name.rpartition(".")[0])
    A, B = torch.stack([f.A for f in found]), torch.stack([f.B for f in found])  # (E,r,n), (E,d,r)
    lora_A, lora_B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
    if not writer.hooked and not writer.experts and writer.transposed:
        lora_A, lora_B = lora_B.T, lora_A.T  # stored as (n, d): ΔWᵀ = Aᵀ Bᵀ
    tensors = {f"{key}.lora_A.weight": lora_A, f"{key}.lora_B.weight": lora_B}
    if dora:
        tensors[f"{key}.lora_magnitude_vector"] = found[0].N
    if (shift := one.shift()) is not None:
        tensors[f"{key}.lora_B.bias"] = shift
    return {name: tensor.float().contiguous() for name, tensor in tensors.items()}


def _form(change: Change, plain: bool) -> str:
    """How a change becomes an adapter: "exact" LoRA, "dora" or "svd"."""
    if isinstance(change, Update) or change.mode in ("none", "pre"):
        return "exact"
    return "dora" if change.mode == "full" and not plain else "svd"


def _rank(change: Change) -> int:
    return len(change.A) if isinstance(change, Update) else len(change.V)


def exact_factors(W: Tensor, change: Change) -> Factors:
    """A (k, n), B (d, k), row norms N (d), float64: W + BA is the edit, or DoRA's for `full`."""
    if isinstance(change, Update):
        return Factors(change.A.double(), change.B.double(), torch.empty(0))
    V = change.V.double()
    if change.mode == "none":
        return Factors(column_sums(W, V)[1], -change.lam * V.T, torch.empty(0))
    N, u = row_sums(W, V)
    return Factors(u, -change.lam * N[:, None] * V.T, N)


def truncated(W: Tensor, change: Change, rank: int) -> Factors:
    """A (r, n), B (d, r) of the best rank-r ΔW, and the relative Frobenius error, measured.

    Beyond `EXACT_SVD` the randomised SVD of Halko et al. 2011 (arXiv 0909.4061).
    """
    W = W.float()
    delta = rewrite(W, change) - W
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
    return Factors(A, B, torch.empty(0), float(torch.linalg.vector_norm(delta - B @ A) / size))
