"""The model with an edit, without touching a weight: hooks that scale and add a rank-one term."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import LongTensor, Tensor, nn

from engine.anatomy import Anatomy
from engine.edit import Edit, RankOne
from engine.errors import EngineError


class _Hooked:
    """The hooks of one writer: y' = s∘(W(c∘x)) + a (u·x) + bias for K edits.

    u·x is one product in the model's dtype (its sums are float32 inside), the rest is float32.
    a is scaled to max 1 and u by the inverse, so that u·x stays in float16's range wherever the
    writer's own output does. Shapes: s, a (K, d); c (K, n); u (n, K); rows (B) or None for K = 1.
    """

    def __init__(self, module: nn.Module, bias: Tensor | None) -> None:
        self.bias = bias
        self.active = False
        self.s: Tensor | None = None
        self.c: Tensor | None = None
        self.a = self.u = torch.empty(0)
        self.rows: Tensor | None = None
        self.shift: Tensor | None = None  # (1−s)∘bias (K, d)
        self.product: Tensor | None = None
        self.handles: list[Any] = [
            module.register_forward_pre_hook(self.before),
            module.register_forward_hook(self.after),
        ]

    def select(self, edits: Sequence[RankOne | None], rows: Tensor | None, like: Tensor) -> None:
        """Stack the edits; None is the original. `like` gives the device and the dtype."""
        self.active = any(e is not None for e in edits)
        self.rows = rows
        self.s = self.c = self.shift = None
        if not self.active:
            return
        known = next(e for e in edits if e is not None)
        d, n = known.a.numel(), known.u.numel()

        def stack(vectors: list[Tensor | None], size: int, empty: float) -> Tensor:
            filled = [
                v.to(like.device, torch.float32)
                if v is not None
                else torch.full((size,), empty, device=like.device)
                for v in vectors
            ]
            return torch.stack(filled)

        a = stack([e.a if e else None for e in edits], d, 0.0)
        u = stack([e.u if e else None for e in edits], n, 0.0)
        peak = a.abs().amax(1, keepdim=True)
        peak = torch.where(peak > 0, peak, torch.ones_like(peak))
        self.a, self.u = a / peak, (u * peak).T.contiguous().to(like.dtype)
        if any(e is not None and e.s is not None for e in edits):
            self.s = stack([e.s if e else None for e in edits], d, 1.0)
            if self.bias is not None:
                self.shift = (1 - self.s) * self.bias.to(like.device, torch.float32)
        if any(e is not None and e.c is not None for e in edits):
            self.c = stack([e.c if e else None for e in edits], n, 1.0).to(like.dtype)

    def clear(self) -> None:
        """The original module."""
        self.active = False
        self.rows = self.s = self.c = self.shift = self.product = None
        self.a = self.u = torch.empty(0)

    def pick(self, table: Tensor, x: Tensor) -> Tensor:
        """Rows of a (K, w) table for x (B, T, ·) or a flattened (B·T, ·): broadcastable to it."""
        if self.rows is None:
            return table[0]
        picked = table[self._rows_of(x)]
        return picked[:, None, :] if x.dim() == 3 else picked

    def _rows_of(self, x: Tensor) -> Tensor:
        """The edit of each entry of x's first dimension; some modules get (B·T, ·)."""
        assert self.rows is not None
        per, rest = divmod(x.shape[0], self.rows.numel()) if self.rows.numel() else (0, 1)
        if rest or per < 1 or (per > 1 and x.dim() == 3):
            raise EngineError(
                "engine_failed",
                f"{self.rows.numel()} rows were selected but the batch holds {x.shape[0]}",
            )
        return self.rows.repeat_interleave(per) if per > 1 else self.rows

    def before(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Take u·x (B, T, 1) of the original input; scale the input where an edit has c."""
        if not self.active:
            return None
        x = args[0]
        product = x @ self.u if x.dtype == self.u.dtype else x.to(self.u.dtype) @ self.u
        if self.rows is not None:
            index = self._rows_of(x)
            index = index.view(-1, *([1] * (product.dim() - 1))).expand(*product.shape[:-1], 1)
            product = product.gather(-1, index)
        self.product = product
        return None if self.c is None else (x * self.pick(self.c, x), *args[1:])

    def after(self, module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor | None:
        """Scale the output and add the rank-one term."""
        if not self.active or self.product is None:
            return None
        product, self.product = self.product.float(), None
        edited = y.float() if self.s is None else y * self.pick(self.s, y)
        edited = torch.addcmul(edited, product, self.pick(self.a, y))
        if self.shift is not None:
            edited += self.pick(self.shift, y)
        return edited.to(y.dtype)


class Patch:
    """One pair of hooks per writer, installed once; the context manager removes them.

    patch.select([edit], None)              every row gets `edit`
    patch.select(edits, rows)               row b gets edits[rows[b]]; -1 is the original
    patch.clear()                           the original model
    """

    def __init__(self, anatomy: Anatomy) -> None:
        """Install inactive hooks: the model stays what it is until `select`."""
        self._writers = [_Hooked(w.module, w.bias()) for w in anatomy.writers]
        # What the module computes in: the blocks' norms tell, packed weights do not.
        self._like: list[Tensor] = [_plain(anatomy.blocks[w.layer]) for w in anatomy.writers]
        self._rows: Tensor | None = None

    def select(self, edits: Sequence[Edit], rows: LongTensor | Tensor | None = None) -> None:
        """Use `edits` in the next forwards; `rows` (B) as in the class's table."""
        if not edits:
            self.clear()
            return
        shared = rows is None or (len(edits) == 1 and bool((rows == 0).all()))
        if rows is not None and bool((rows >= len(edits)).any() | (rows < -1).any()):
            raise EngineError("bad_request", f"rows must lie in -1..{len(edits) - 1}")
        self._rows = None if rows is None else rows.clone()
        for k, (hooked, like) in enumerate(zip(self._writers, self._like, strict=True)):
            if shared:
                hooked.select([edits[0].writers[k]], None, like)
                continue
            assert rows is not None
            # The original is edit number K.
            entries = [*(e.writers[k] for e in edits), None]
            index = torch.where(rows < 0, len(edits), rows).to(like.device)
            hooked.select(entries, index, like)

    def keep(self, index: Tensor) -> None:
        """Keep only these rows of the batch (positions (B') or a mask (B)), in this order."""
        if self._rows is None:
            return
        self._rows = self._rows[index.to(self._rows.device)]
        moved: dict[torch.device, Tensor] = {}
        for hooked in self._writers:
            if hooked.rows is not None:
                device = hooked.rows.device
                if device not in moved:
                    moved[device] = index.to(device)
                hooked.rows = hooked.rows[moved[device]]

    def clear(self) -> None:
        """Back to the original model."""
        self._rows = None
        for hooked in self._writers:
            hooked.clear()

    def close(self) -> None:
        """Remove the hooks."""
        self.clear()
        for hooked in self._writers:
            for handle in hooked.handles:
                handle.remove()
            hooked.handles = []

    def __enter__(self) -> Patch:
        """The patch itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the hooks."""
        self.close()


def _plain(block: nn.Module) -> Tensor:
    """A tensor with the block's device and compute dtype: its first unpacked parameter.

    float32 where all are packed (OLMo's norms have no weights): right for any input, if slower.
    """
    parameters = list(block.parameters())
    for parameter in parameters:
        if parameter.is_floating_point() and type(parameter) is nn.Parameter:
            return parameter
    return torch.empty(0, dtype=torch.float32, device=parameters[0].device)
