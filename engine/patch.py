"""The model with an edit: hooks that scale and add a rank-k term, and no weight is touched.

Only writers without a module of their own, such as stacks of experts, are rewritten in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import LongTensor, Tensor, nn

from engine.anatomy import Anatomy
from engine.change import Change
from engine.edit import Edit, Term
from engine.errors import EngineError
from engine.in_place import Rewritten, Suppressed, place_of, same
from engine.loading.placement import device_of
from engine.routers import Router, Suppression


class _Selected:
    """What is selected for one writer: y' = s∘(W(c∘x)) + a (u x) + b + bias, of K edits of rank k.

    u x is one product in the model's dtype (its sums are float32 inside), the rest is float32.
    a is scaled to max 1 and u by the inverse, so that u x stays in float16's range wherever the
    writer's own output does. Shapes: s (K, d); c (K, n); a (K, k, d); u (n, K·k); rows (B) or None
    for K = 1. Edits of smaller rank are filled up with zeros.
    """

    def __init__(
        self, edits: Sequence[Term | None], rows: Tensor | None, like: Tensor, bias: Tensor | None
    ) -> None:
        """Stack the edits; None is the original. `like` gives the device and the dtype."""
        self.rows = rows
        self.s: Tensor | None = None
        self.c: Tensor | None = None
        self.shift: Tensor | None = None  # b + (1−s)∘bias (K, d)
        self.product: Tensor | None = None
        known = next(e for e in edits if e is not None)
        d, n = known.a.shape[0], known.u.shape[1]
        self.rank = max(e.a.shape[1] for e in edits if e is not None)

        def stack(vectors: list[Tensor | None], shape: tuple[int, ...], empty: float) -> Tensor:
            filled = torch.full((len(vectors), *shape), empty, device=like.device)
            for place, v in enumerate(vectors):
                if v is not None:
                    filled[place][tuple(slice(size) for size in v.shape)] = v
            return filled

        a = stack([e.a.T if e else None for e in edits], (self.rank, d), 0.0)
        u = stack([e.u if e else None for e in edits], (self.rank, n), 0.0)
        peak = a.abs().amax(-1, keepdim=True)
        peak = torch.where(peak > 0, peak, torch.ones_like(peak))
        self.a, self.u = a / peak, (u * peak).flatten(0, 1).T.contiguous().to(like.dtype)
        if any(e is not None and e.b is not None for e in edits):
            self.shift = stack([e.b if e else None for e in edits], (d,), 0.0)
        if any(e is not None and e.s is not None for e in edits):
            self.s = stack([e.s if e else None for e in edits], (d,), 1.0)
            if bias is not None:
                kept = (1 - self.s) * bias.to(like.device, torch.float32)
                self.shift = kept if self.shift is None else self.shift + kept
        if any(e is not None and e.c is not None for e in edits):
            self.c = stack([e.c if e else None for e in edits], (n,), 1.0).to(like.dtype)

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

    def before(self, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Take u x (B, T, k) of the original input; scale the input where an edit has c."""
        x = args[0]
        product = x @ self.u if x.dtype == self.u.dtype else x.to(self.u.dtype) @ self.u
        if self.rows is not None:
            index = self._rows_of(x)
            product = product.view(*product.shape[:-1], -1, self.rank)  # (B, T, K, k)
            index = index.view(-1, *([1] * (product.dim() - 1)))
            product = product.gather(-2, index.expand(*product.shape[:-2], 1, self.rank))[..., 0, :]
        self.product = product
        return None if self.c is None else (x * self.pick(self.c, x), *args[1:])

    def after(self, y: Tensor) -> Tensor | None:
        """Scale the output and add the rank-k term and the bias."""
        if self.product is None:
            return None
        product, self.product = self.product.float(), None
        edited = y.float() if self.s is None else y * self.pick(self.s, y)
        edited = self._added(edited, product, y)
        if self.shift is not None:
            edited += self.pick(self.shift, y)
        return edited.to(y.dtype)

    def _added(self, edited: Tensor, product: Tensor, y: Tensor) -> Tensor:
        """edited + a (u x): product (B, T, k) or (B·T, k)."""
        if self.rank == 1:
            return torch.addcmul(edited, product, self.pick(self.a[:, 0], y))
        if self.rows is None:
            return edited + product @ self.a[0]
        picked = self.a[self._rows_of(y)]  # (B, k, d)
        flat = product if product.dim() == 3 else product[:, None]
        return edited + torch.bmm(flat, picked).view_as(edited)


class _Hooked:
    """The hooks of one writer, which apply what is selected."""

    def __init__(self, module: nn.Module, bias: Tensor | None) -> None:
        self.bias = bias
        self.selected: _Selected | None = None
        self._last: tuple[Term, _Selected] | None = None  # of all rows alike
        self.handles: list[Any] = [
            module.register_forward_pre_hook(self.before),
            module.register_forward_hook(self.after),
        ]

    def select(self, edits: Sequence[Term | None], rows: Tensor | None, like: Tensor) -> None:
        """Use these edits; see `_Selected`."""
        if rows is None and self._last is not None and self._last[0] is edits[0]:
            self.selected = self._last[1]  # a candidate is selected several times
            return
        some = any(edit is not None for edit in edits)
        self.selected = _Selected(edits, rows, like, self.bias) if some else None
        if rows is None and self.selected is not None and edits[0] is not None:
            self._last = edits[0], self.selected

    def before(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """What the module gets."""
        return None if self.selected is None else self.selected.before(args)

    def after(self, module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor | None:
        """What it gives."""
        return None if self.selected is None else self.selected.after(y)


class Patch:
    """The edits of a model: a pair of hooks per writer, and weights that are rewritten in place.

    patch.select([edit], None)              every row gets `edit`
    patch.select(edits, rows)               row b gets edits[rows[b]]; -1 is the original
    patch.clear()                           the original model

    The context manager removes the hooks and restores the weights. Writers without a module of
    their own (stacks of experts) are rewritten, for all rows alike: see `batches`.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        """Install inactive hooks: the model stays what it is until `select`."""
        self._hooked: list[tuple[int, _Hooked, Tensor]] = []
        self._in_place: list[tuple[int, Rewritten]] = []
        self._routers: list[Suppressed] = []
        for k, w in enumerate(anatomy.writers):
            if w.hooked:
                # What the module computes in: the block's norms tell, packed weights do not.
                like = _plain(anatomy.blocks[w.layer])
                self._hooked.append((k, _Hooked(w.module, w.bias()), like))
            else:
                self._in_place.append((k, Rewritten(w)))
        self._rows: Tensor | None = None  # the edit of each row of the batch
        self._places: dict[torch.device, torch.device] = {}

    @property
    def batches(self) -> bool:
        """Whether different edits may share a batch: not where weights are rewritten in place."""
        return not self._in_place and not self._routers

    def include(self, routers: Sequence[Router]) -> None:
        """Edits may suppress experts of these routers from now on, in the builder's order."""
        self._routers = [Suppressed(router) for router in routers]

    def select(self, edits: Sequence[Edit], rows: LongTensor | Tensor | None = None) -> None:
        """Use `edits` in the next forwards; `rows` (B) as in the class's table.

        Raises bad_request for rows beyond the edits, and where rows of one batch differ in a
        weight that is rewritten in place.
        """
        if not edits:
            self.clear()
            return
        shared = rows is None or (len(edits) == 1 and bool((rows == 0).all()))
        if rows is not None and bool((rows >= len(edits)).any() | (rows < -1).any()):
            raise EngineError("bad_request", f"rows must lie in -1..{len(edits) - 1}")
        used = [0] if rows is None else sorted(set(rows.tolist()))
        self._rewrite([edits[edit] if edit >= 0 else None for edit in used])
        self._rows = None if rows is None else rows.clone()
        for k, hooked, like in self._hooked:
            if shared:
                hooked.select([edits[0].terms[k]], None, like)
                continue
            assert rows is not None
            # The original is edit number K.
            entries = [*(e.terms[k] for e in edits), None]
            index = torch.where(rows < 0, len(edits), rows).to(like.device)
            hooked.select(entries, index, like)

    def keep(self, index: Tensor) -> None:
        """Keep only these rows of the batch (positions (B') or a mask (B)), in this order."""
        if self._rows is None:
            return
        self._rows = self._rows[index.to(self._rows.device)]
        moved: dict[torch.device, Tensor] = {}
        for _, hooked, _ in self._hooked:
            selected = hooked.selected
            if selected is not None and selected.rows is not None:
                device = selected.rows.device
                if device not in moved:
                    moved[device] = index.to(device)
                selected.rows = selected.rows[moved[device]]

    def clear(self) -> None:
        """Back to the original model."""
        self._rows = None
        for _, hooked, _ in self._hooked:
            hooked.selected = None
        self._rewrite([None])

    def close(self) -> None:
        """Remove the hooks, restore the weights and forget their originals."""
        self.clear()
        for _, hooked, _ in self._hooked:
            for handle in hooked.handles:
                handle.remove()
            hooked.handles = []
        for _, weight in self._in_place:
            weight.forget()

    def __enter__(self) -> Patch:
        """The patch itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the hooks and restore the weights."""
        self.close()

    def _rewrite(self, edits: list[Edit | None]) -> None:
        """Let the weights hold the change on which all of `edits` agree; None: the original."""
        wanted: list[Change | None] = []
        for k, weight in self._in_place:
            changes = [None if edit is None else edit.changes[k] for edit in edits]
            if not all(same(change, changes[0]) for change in changes):
                raise EngineError(
                    "bad_request",
                    f"{weight.writer.name} is edited in place: the rows of one batch cannot hold "
                    "different edits of it",
                    "Give every row of the batch the same edit.",
                )
            wanted.append(changes[0])
        lowered: list[Suppression | None] = []
        for k, router in enumerate(self._routers):
            each = {edit.suppressions[k] if edit and edit.suppressions else None for edit in edits}
            if len(each) > 1:
                raise EngineError(
                    "bad_request",
                    f"{router.bias.name} is edited in place: the rows of one batch cannot suppress "
                    "different experts",
                    "Give every row of the batch the same edit.",
                )
            lowered.append(each.pop())
        for (_, weight), change in zip(self._in_place, wanted, strict=True):
            weight.select(change, self._place(weight.held.device))
        for router, suppression in zip(self._routers, lowered, strict=True):
            router.select(suppression)

    def _place(self, device: torch.device) -> torch.device:
        """Where the originals of this device's weights are kept; decided once."""
        if device not in self._places:
            self._places[device] = place_of([weight for _, weight in self._in_place], device)
        return self._places[device]


def _plain(block: nn.Module) -> Tensor:
    """An empty tensor with the block's device and compute dtype: that of an unpacked parameter.

    float32 where all are packed (OLMo's norms have no weights): right for any input, if slower.
    """
    parameters = list(block.parameters())
    for parameter in parameters:
        if parameter.is_floating_point() and type(parameter) is nn.Parameter:
            return torch.empty(0, dtype=parameter.dtype, device=device_of(block))
    return torch.empty(0, dtype=torch.float32, device=device_of(block))
