"""The closed form of every mode against the literal formula in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from engine.anatomy import survey
from engine.edit import EditBuilder, RankOne, basis, formula, rank_one, rewrite
from engine.errors import EngineError
from engine.load import load
from engine.report import Silent
from jobs.spec.candidate import Candidate, EditMode, Kernel, constant
from tests.engine.conftest import Save, random_directions, request
from tests.engine.families import DENSE, tiny

MODES: tuple[EditMode, ...] = get_args(EditMode)


def matrix(W: Tensor, edit: RankOne) -> Tensor:
    """W' (d, n), float64, of y' = s∘(W(c∘x)) + a (u·x)."""
    new = W.double()
    if edit.c is not None:
        new = new * edit.c.double()
    if edit.s is not None:
        new = edit.s.double()[:, None] * new
    return new + torch.outer(edit.a.double(), edit.u.double())


def relative(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true).norm() / true.norm())


def closed_form(W: Tensor, v: Tensor, lam: float, mode: EditMode) -> RankOne:
    b = basis(W, v[None])
    return rank_one(mode, lam, v, b.N, b.columns, b.u[0], b.Wu[0], b.t[0])


def uneven(d: int = 96, n: int = 160) -> tuple[Tensor, Tensor]:
    """A weight with rows and columns of very different size, one row zero; a unit v."""
    torch.manual_seed(1)
    W = torch.randn(d, n) * torch.logspace(-2, 2, d)[:, None] * torch.logspace(1, -1, n)
    W[5] = 0
    v = torch.randn(d)
    return W, v / v.norm()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lam", [0.25, 1.0, 1.5])
def test_closed_form_is_the_formula(mode: EditMode, lam: float) -> None:
    W, v = uneven()
    true = formula(W, v, lam, mode)
    assert relative(matrix(W, closed_form(W, v, lam, mode)), true) < 1e-6
    assert relative(matrix(W, closed_form(W, v, lam, mode)) - W.double(), true - W.double()) < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_rewrite_in_strips_is_the_formula(mode: EditMode) -> None:
    W, v = uneven()
    new = rewrite(W.double(), v, 1.2, mode, rows=37)
    assert relative(new, formula(W, v, 1.2, mode)) < 1e-13
    assert rewrite(W.bfloat16(), v, 1.2, mode).dtype == torch.bfloat16


def test_what_the_modes_promise() -> None:
    W, v = uneven()
    assert (v.double() @ formula(W, v, 1.0, "none")).norm() < 1e-5 * W.norm()
    assert (v.double() @ formula(W, v, 1.0, "columns")).norm() < 1e-5 * W.norm()
    assert torch.allclose(formula(W, v, 1.3, "full").norm(dim=1), W.double().norm(dim=1))
    assert torch.allclose(formula(W, v, 1.3, "columns").norm(dim=0), W.double().norm(dim=0))


def test_columns_along_v_stay_finite() -> None:
    v = torch.zeros(32)
    v[3] = 1.0
    W = torch.randn(32, 8)
    W[:, 0] = 2 * v
    new = rewrite(W, v, 1.0, "columns")
    edit = closed_form(W, v, 1.0, "columns")
    assert torch.isfinite(new).all() and torch.isfinite(matrix(W, edit)).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("quantization", ["none", "bnb_4bit", "bnb_8bit"])
def test_builder_on_a_loaded_model(mode: EditMode, quantization: str, folder: Path) -> None:
    loaded = load(request(folder, quantization=quantization), Silent())
    anatomy = survey(loaded.model)
    directions = random_directions(anatomy.layers, anatomy.hidden)
    builder = EditBuilder(anatomy, directions)
    kernel = Kernel(max_weight=1.4, min_weight=0.2, position=1.5, distance=1.6)
    for scope in ({"scope": "per_layer"}, {"scope": "global", "index": 0.7}):
        candidate = Candidate.model_validate(
            {"mode": mode, "attention": kernel, "mlp": constant(0.9), **scope}
        )
        table = directions.of(candidate)
        for writer, edit in zip(anatomy.writers, builder.build(candidate).writers, strict=True):
            lam = candidate.kernel(writer.component).weight(writer.layer)
            if lam == 0:
                assert edit is None
                continue
            assert edit is not None
            W = writer.weight()
            true = formula(W, table[writer.layer], lam, mode)
            assert relative(matrix(W, edit), true) < 1e-5
            assert relative(matrix(W, edit) - W.double(), true - W.double()) < 1e-5


def test_indices_are_checked() -> None:
    anatomy = survey(tiny("llama", DENSE["llama"]))
    builder = EditBuilder(anatomy, random_directions(3, 32))
    for index in (2.01, None):
        fields: dict[str, Any] = {"attention": constant(), "mlp": constant(), "scope": "global"}
        with pytest.raises(EngineError, match="index") as caught:
            builder.build(Candidate(index=index, **fields))
        assert caught.value.reason == "bad_request"
    with pytest.raises(EngineError, match="another model"):
        EditBuilder(anatomy, random_directions(4, 32))


@pytest.fixture(scope="module")
def folder(save: Save) -> Path:
    return save("llama", hidden_size=64, intermediate_size=128, head_dim=16)
