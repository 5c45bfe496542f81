"""What the modules of one decoder block do, told from its behaviour on random input.

With every candidate's output held at zero a block must be the identity (or a multiple of it); a
writer's output, given alone, must appear in the block's output, scaled or through a norm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from engine.writer import Writer, linear_width
from jobs.spec.candidate import Component
from jobs.spec.protocol import WriterReport

TOKENS = 8
# A writer's share of the block's output must be reproduced to this relative error; bfloat16 keeps
# 8 bits, int8 matmuls are exact in the zeroed run.
TOLERANCE = 0.02


@dataclass(frozen=True)
class Call:
    """How the model called one block: its arguments, the stream (1, T, d) before and after."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    stream: Tensor
    output: Tensor


def _first(value: Any) -> Tensor:
    """The hidden states of a block's output."""
    found: Tensor = value[0] if isinstance(value, (tuple, list)) else value
    return found


def record_calls(model: nn.Module, blocks: list[nn.Module], vocab: int) -> dict[int, Call]:
    """Run the model once on a few tokens and keep what each block was given."""
    calls: dict[int, Call] = {}

    def keep(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        stream = args[0] if args else kwargs["hidden_states"]
        calls[id(block)] = Call(args, dict(kwargs), stream.clone(), _first(out).clone())

    device = next(model.parameters()).device
    ids = (torch.arange(1, TOKENS + 1, device=device) % vocab)[None]
    hooks = [b.register_forward_hook(keep, with_kwargs=True) for b in blocks]
    try:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _rerun(block: nn.Module, call: Call, stream: Tensor) -> Tensor:
    """The block's output (1, T, d) for another stream."""
    if call.args:
        return _first(block(stream.clone(), *call.args[1:], **call.kwargs))
    return _first(block(**{**call.kwargs, "hidden_states": stream.clone()}))


Replace = Callable[[Tensor], Tensor]


@contextlib.contextmanager
def _outputs(replaced: dict[nn.Module, Replace]) -> Iterator[None]:
    """Replace the tensor outputs of some modules while the context lasts."""

    def hook(module: nn.Module, args: Any, out: Any) -> Any:
        if isinstance(out, (tuple, list)):
            return type(out)([replaced[module](out[0]), *out[1:]])
        return replaced[module](out)

    hooks = [m.register_forward_hook(hook) for m in replaced]
    try:
        yield
    finally:
        for h in hooks:
            h.remove()


def _relative(error: Tensor, size: Tensor) -> float:
    return float(error.float().norm() / size.float().norm().clamp_min(1e-30))


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether two streams are equal but for an error of `tolerance` of b's norm."""
    return a.shape == b.shape and _relative(a.float() - b.to(a.device).float(), b) <= tolerance


def _proportional(moved: Tensor, by: Tensor) -> float | None:
    """κ where moved = κ·by, else None."""
    m, b = moved.double().flatten(), by.double().flatten().to(moved.device)
    scale = float(m @ b / (b @ b).clamp_min(1e-30))
    if abs(scale) < 1e-6 or _relative(m - scale * b, scale * b) > TOLERANCE:
        return None
    return scale


def probe(
    block: nn.Module, call: Call, prefix: str, layer: int, hidden: int
) -> tuple[list[Writer], list[WriterReport]]:
    """The writers of one block and whatever else in it writes."""
    random = torch.Generator().manual_seed(layer)

    def noise() -> Tensor:
        # Tokens of different size, so that a norm cannot pass for a mere factor.
        sizes = torch.linspace(0.5, 2, call.stream.shape[1])[:, None]
        drawn = torch.randn(call.stream.shape, generator=random) * sizes
        return drawn.to(call.stream.device, call.stream.dtype)

    stream = noise()
    candidates = {
        name: module
        for name, module in block.named_modules()
        if (width := linear_width(module)) is not None and width[0] == hidden
    }
    silent: dict[nn.Module, Replace] = {m: torch.zeros_like for m in candidates.values()}

    # 1. Nothing else writes: with the candidates silent the block is the identity.
    with _outputs(silent):
        base = _rerun(block, call, stream)
    missed: list[WriterReport] = []
    if _proportional(base, stream) is None:
        unknown = _unknown_owners(block, silent)
        missed = _unknown_writers(unknown, prefix, layer, hidden)
        silent |= {m: torch.zeros_like for m in unknown.values()}
        with _outputs(silent):
            base = _rerun(block, call, stream)
        if not missed or _proportional(base, stream) is None:
            reason = "the block adds something besides its writers"
            missed.append(missing(prefix, layer, (), reason))

    # 2. Each candidate alone, with a random output: does the stream move by it?
    writers: list[Writer] = []
    ends = _ends(block, call, stream, base, list(candidates.values()), silent)
    mixing = _mixing(block, call, stream, noise(), ends, silent)
    for name, module in candidates.items():
        spoken: list[Tensor] = []
        normed: dict[str, Tensor] = {}

        def speak(out: Tensor, spoken: list[Tensor] = spoken) -> Tensor:
            spoken.append(noise().reshape(out.shape).to(out.dtype))
            return spoken[-1]

        with _outputs({**silent, module: speak}), _norms(block, spoken, normed):
            moved = _rerun(block, call, stream) - base
        if module not in ends or not spoken:
            continue  # it feeds something else, such as the queries
        said = spoken[-1].reshape(moved.shape)
        d, n = linear_width(module) or (0, 0)
        component: Component = "attention" if module in mixing else "mlp"
        scale, via = _proportional(moved, said), ""
        for norm, value in normed.items():
            if scale is None:
                scale, via = _proportional(moved, value.reshape(moved.shape)), norm
        if scale is None:
            reason = "its output reaches the stream neither as it is nor through a norm"
            missed.append(missing(f"{prefix}.{name}", layer, (d, n), reason))
            continue
        writers.append(
            Writer(
                f"{prefix}.{name}", layer, component, module, d, n, via, scale,
                transposed=isinstance(module, Conv1D),
            )
        )  # fmt: skip
    if not writers and not missed:
        missed.append(missing(prefix, layer, (), "the block holds no writer"))
    return writers, missed


@contextlib.contextmanager
def _norms(block: nn.Module, spoken: list[Tensor], normed: dict[str, Tensor]) -> Iterator[None]:
    """Note what norms make of the tensor just spoken (gemma2 and olmo2 norm a writer's output)."""
    names = {m: name for name, m in block.named_modules() if "norm" in type(m).__name__.lower()}

    def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        given = args[0] if args else None
        if not spoken or not isinstance(given, Tensor) or not isinstance(out, Tensor):
            return
        if given.numel() == spoken[-1].numel() and close(
            given.reshape(spoken[-1].shape), spoken[-1], TOLERANCE
        ):
            normed[names[module]] = out.clone()

    hooks = [m.register_forward_hook(hook) for m in names]
    try:
        yield
    finally:
        for h in hooks:
            h.remove()


def _ends(
    block: nn.Module, call: Call, stream: Tensor, base: Tensor, candidates: list[nn.Module],
    silent: dict[nn.Module, Replace],
) -> set[nn.Module]:  # fmt: skip
    """The candidates whose own output moves the block's while all others are silent."""
    found: set[nn.Module] = set()
    for module in candidates:
        with _outputs({**silent, module: lambda out: torch.ones_like(out).cumsum(-1)}):
            if _relative(_rerun(block, call, stream) - base, stream) > TOLERANCE / 10:
                found.add(module)
    return found


def _mixing(
    block: nn.Module, call: Call, stream: Tensor, other: Tensor, ends: set[nn.Module],
    silent: dict[nn.Module, Replace],
) -> set[nn.Module]:  # fmt: skip
    """The writers whose input at the last token depends on earlier tokens.

    Token mixers (attention, convolution, state space) do, feed-forward layers do not. Whatever
    enters the stream is silent, so that only the module's own path counts; queries, keys and
    values speak.
    """
    quiet = {m: r for m, r in silent.items() if m in ends or linear_width(m) is None}

    def listen(before: Tensor) -> dict[nn.Module, Tensor]:
        heard: dict[nn.Module, Tensor] = {}

        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            heard[module] = args[0].reshape(TOKENS, -1)[-1].clone()

        hooks = [m.register_forward_hook(hook) for m in ends]
        try:
            with _outputs(quiet):
                _rerun(block, call, before)
        finally:
            for h in hooks:
                h.remove()
        return heard

    changed = other.clone()
    changed[:, -1] = stream[:, -1]
    first, second = listen(stream), listen(changed)
    return {
        m for m in first if m in second and _relative(second[m] - first[m], first[m]) > TOLERANCE
    }


def _unknown_owners(block: nn.Module, silent: dict[nn.Module, Replace]) -> dict[str, nn.Module]:
    """Modules of the block that hold matrices and are not linear: fused experts and the like."""
    return {
        name: module
        for name, module in block.named_modules()
        if name
        and module not in silent
        and linear_width(module) is None
        and any(p.ndim >= 2 for p in module.parameters(recurse=False))
    }


def _unknown_writers(
    owners: dict[str, nn.Module], prefix: str, layer: int, hidden: int
) -> list[WriterReport]:
    """The matrices of these modules that seem to write."""
    found = []
    for name, module in owners.items():
        matrices = {
            f"{prefix}.{name}.{key}": tuple(p.shape)
            for key, p in module.named_parameters(recurse=False)
            if p.ndim >= 2 and hidden in p.shape and not key.endswith("bias")
        }
        if "gate" in name.rsplit(".", 1)[-1] or "router" in name:
            continue  # it chooses experts and writes nothing
        named = {k: s for k, s in matrices.items() if any(w in k for w in ("down", "out", "w2"))}
        found += [
            missing(key, layer, shape, f"held as one parameter by {type(module).__name__}")
            for key, shape in (named or matrices).items()
        ]
    return found


def missing(name: str, layer: int, shape: tuple[int, ...], reason: str) -> WriterReport:
    """A writer that no edit reaches; `shape` () where no parameter can be named."""
    return WriterReport(
        name=name, layer=layer, component="mlp", shape=shape, covered=False, reason=reason
    )
