"""The rewriting of large weights against the formula in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from engine import change
from engine.change import Change, Projection, Update, column_sums, formula, rewrite, row_sums
from jobs.spec.candidate import EditMode

MODES: tuple[EditMode, ...] = ("none", "pre", "full", "columns")
D, N, E = 40, 56, 5


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of seven rows, so that matrices end in the middle of one."""
    monkeypatch.setattr(change, "STRIP", 7 * 8 * N)


def changes() -> Iterator[Change]:
    """Every mode with one, three and a zero direction, strengths above 1, and updates."""
    torch.manual_seed(3)
    for mode in MODES:
        for k in (1, 3):
            V = torch.linalg.qr(torch.randn(D, k))[0].T.contiguous()
            yield Projection(V, 1.3, mode)
            yield Projection(V * torch.tensor([1.0, 0, 0])[:k, None], 1.0, mode)
    yield Update(torch.randn(D, 4), torch.randn(4, N))


def weight(*shape: int) -> Tensor:
    """Rows and columns of many sizes, one of each zero."""
    torch.manual_seed(5)
    W = torch.randn(*shape) * torch.logspace(-2, 2, shape[-2])[:, None]
    W[..., 3, :] = 0
    W[..., :, 4] = 0
    return W


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rewrite_is_the_formula_rounded_once(dtype: torch.dtype) -> None:
    W = weight(D, N).to(dtype)
    for one in changes():
        new, true = rewrite(W, one), formula(W, one)
        assert new.dtype == dtype
        # A value in the middle of two numbers may go either way after 1e-16 of difference.
        rounded = (new != true.to(dtype)).float().mean()
        near = torch.allclose(new.double(), true, rtol=1e-12, atol=1e-12)
        assert near if dtype is torch.float64 else rounded < 2e-3


@pytest.mark.parametrize("transposed", [False, True])
def test_a_stack_is_its_matrices_bit_for_bit(transposed: bool) -> None:
    stored = weight(E, D, N).transpose(1, 2).contiguous() if transposed else weight(E, D, N)
    W = stored.transpose(1, 2) if transposed else stored
    for one in changes():
        whole = rewrite(W, one)
        for e in range(E):
            assert torch.equal(whole[e], rewrite(W[e], one))
            alone = stored[e].clone().T if transposed else stored[e].clone()
            assert torch.equal(whole[e], rewrite(alone, one, out=alone))  # in its own place


def test_many_matrices_at_once_are_near_those_one_at_a_time() -> None:
    """What a GPU does, on the CPU."""
    W = weight(E, D, N)
    for one in changes():
        out = torch.empty_like(W)
        change._rewrite(W, one, out)
        assert torch.allclose(out, rewrite(W, one), rtol=2e-7, atol=1e-30)


def test_out_is_written_in_the_stored_layout() -> None:
    """A transposed parameter is rewritten through its view."""
    stored = weight(E, D, N).transpose(1, 2).contiguous()
    held = torch.zeros_like(stored)
    one = next(changes())
    found = rewrite(stored.transpose(1, 2), one, out=held.transpose(1, 2))
    assert found.data_ptr() == held.data_ptr()
    for e in range(E):
        true = formula(stored[e].T, one).float()
        assert torch.allclose(held[e].T, true, rtol=1e-6, atol=1e-9)


def test_sums() -> None:
    W, V = weight(E, D, N), torch.randn(3, D)
    rows, u = row_sums(W, V)
    squares, t = column_sums(W, V)
    w, v = W.double(), V.double()
    assert torch.allclose(rows, w.norm(dim=2))
    assert torch.allclose(u, v @ (w / w.norm(dim=2, keepdim=True).clamp_min(1e-30)))
    assert torch.allclose(squares, w.square().sum(1)) and torch.allclose(t, v @ w)
    assert torch.equal(row_sums(W[2], V)[1], row_sums(W[2:3], V)[1][0])
