"""The closed form of every mode against the literal formula in float64."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from engine.anatomy import survey
from engine.change import Projection, Update, formula, rewrite
from engine.edit import EditBuilder, Term, basis, term
from engine.errors import EngineError
from engine.load import load
from engine.report import Silent
from engine.samples import Samples, reached
from jobs.spec.candidate import Ablation, Ara, EditMode, Kernel, Recipe, Scope, constant
from tests.engine.conftest import Save, random_directions, request
from tests.engine.families import DENSE, tiny

MODES: tuple[EditMode, ...] = get_args(EditMode)
SVD = Recipe(subspace="svd", count=3)
BIPROJECTED = Recipe(projection="biprojected")
ALL = (Recipe(), Recipe(projection="none"), SVD, BIPROJECTED)


def matrix(W: Tensor, edit: Term) -> Tensor:
    """W' (d, n), float64, of y' = s∘(W(c∘x)) + a (u x)."""
    new = W.double()
    if edit.c is not None:
        new = new * edit.c.double()
    if edit.s is not None:
        new = edit.s.double()[:, None] * new
    return new + edit.a.double() @ edit.u.double()


def relative(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true).norm() / true.norm())


def uneven(k: int = 1, d: int = 96, n: int = 160) -> tuple[Tensor, Tensor]:
    """A weight with rows and columns of very different size, one row zero; k orthonormal rows."""
    torch.manual_seed(1)
    W = torch.randn(d, n) * torch.logspace(-2, 2, d)[:, None] * torch.logspace(1, -1, n)
    W[5] = 0
    return W, torch.linalg.qr(torch.randn(d, k)).Q.T.contiguous()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lam", [0.25, 1.0, 1.5])
@pytest.mark.parametrize("k", [1, 3])
def test_closed_form_is_the_formula(mode: EditMode, lam: float, k: int) -> None:
    W, V = uneven(k)
    change = Projection(V, lam, mode)
    true = formula(W, change)
    found = matrix(W, term(change, basis(W, V)))
    assert relative(found, true) < 1e-6
    assert relative(found - W.double(), true - W.double()) < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_zero_rows_of_a_subspace_change_nothing(mode: EditMode) -> None:
    W, V = uneven(2)
    filled = torch.cat([V, torch.zeros(2, V.shape[1])])
    true = formula(W, Projection(V, 1.1, mode))
    assert relative(formula(W, Projection(filled, 1.1, mode)), true) < 1e-14
    edit = term(Projection(filled, 1.1, mode), basis(W, filled))
    assert relative(matrix(W, edit), true) < 1e-6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("k", [1, 3])
def test_rewrite_in_strips_is_the_formula(
    mode: EditMode, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    W, V = uneven(k)
    monkeypatch.setattr("engine.change.STRIP", 37 * 8 * W.shape[1])  # 37 rows of 96
    change = Projection(V, 1.2, mode)
    assert relative(rewrite(W.double(), change), formula(W, change)) < 1e-13
    assert rewrite(W.bfloat16(), change).dtype == torch.bfloat16


def test_what_the_modes_promise() -> None:
    W, V = uneven(2)
    exact: tuple[EditMode, ...] = ("none", "columns")
    for mode in exact:
        new = formula(W, Projection(V, 1.0, mode))
        assert (V.double() @ new).norm() < 1e-5 * W.norm()
    full = formula(W, Projection(V, 1.3, "full"))
    assert torch.allclose(full.norm(dim=1), W.double().norm(dim=1))
    columns = formula(W, Projection(V, 1.3, "columns"))
    assert torch.allclose(columns.norm(dim=0), W.double().norm(dim=0))


def test_columns_along_v_stay_finite() -> None:
    V = torch.zeros(1, 32)
    V[0, 3] = 1.0
    W = torch.randn(32, 8)
    W[:, 0] = 2 * V[0]
    change = Projection(V, 1.0, "columns")
    edit = term(change, basis(W, V))
    assert torch.isfinite(rewrite(W, change)).all() and torch.isfinite(matrix(W, edit)).all()


@pytest.mark.parametrize("quantization", ["none", "bnb_4bit", "bnb_8bit"])
def test_builder_on_a_loaded_model(quantization: str, folder: Path) -> None:
    loaded = load(request(folder, quantization=quantization), Silent())
    anatomy = survey(loaded.model)
    directions = random_directions(anatomy.layers, anatomy.hidden, recipes=ALL)
    builder = EditBuilder(anatomy, directions)
    kernel = Kernel(max_weight=1.4, min_weight=0.2, position=1.5, distance=1.6)
    for mode, recipe, scope in product(MODES, ALL, get_args(Scope)):
        candidate = Ablation(
            mode=mode, recipe=recipe, scope=scope, index=0.7, attention=kernel, mlp=constant(0.9)
        )
        table = directions.of(candidate)
        edit = builder.build(candidate)
        for writer, made, change in zip(anatomy.writers, edit.terms, edit.changes, strict=True):
            lam = candidate.kernel(writer.component).weight(writer.layer)
            if lam == 0:
                assert made is None and change is None
                continue
            assert made is not None
            W = writer.weight()
            true = formula(W, Projection(table[writer.layer], lam, mode))
            assert relative(matrix(W, made), true) < 1e-5
            assert relative(matrix(W, made) - W.double(), true - W.double()) < 1e-5


def test_affine_sets_the_harmless_mean() -> None:
    """At λ = 1, `none`: what V sees of the output is its harmless mean, whatever the input."""
    torch.manual_seed(2)
    W, V = torch.randn(32, 48), uneven(2, 32)[1]
    bias, good = torch.randn(32), torch.randn(50, 48)
    mean = (good @ W.T).mean(0)  # of W x, the bias apart
    change = Projection(V, 1.0, "none", V @ mean)
    made = term(change, basis(W, V))
    x = 5 * torch.randn(7, 48)
    y = x.double() @ matrix(W, made).T + made.b.double() + bias.double()  # type: ignore[union-attr]
    true = V.double() @ (good.double() @ W.double().T + bias.double()).mean(0)
    assert torch.allclose(y @ V.double().T, true.expand(7, -1), atol=1e-4)


def test_affine_asks_for_means(folder: Path) -> None:
    anatomy = survey(load(request(folder), Silent()).model)
    directions = random_directions(anatomy.layers, anatomy.hidden)
    candidate = Ablation(mode="none", affine=True, attention=constant(0.5), mlp=constant(2.0))
    with pytest.raises(EngineError, match="affine"):
        EditBuilder(anatomy, directions).build(candidate)
    means = tuple(torch.randn(w.d) for w in anatomy.writers)
    edit = EditBuilder(anatomy, directions, Samples(means=means)).build(candidate)
    table = directions.of(candidate)
    for writer, made, mean in zip(anatomy.writers, edit.terms, means, strict=True):
        v = table[writer.layer, 0]
        lam = 0.5 if writer.component == "attention" else 2.0
        assert made is not None and made.b is not None
        assert torch.allclose(made.b, lam * (v @ mean) * v, atol=1e-5)


def test_an_update_is_its_own_term() -> None:
    W, B, A = torch.randn(16, 24), torch.randn(16, 3), torch.randn(3, 24)
    assert relative(matrix(W, term(Update(B, A), None)), formula(W, Update(B, A))) < 1e-7


def test_indices_are_checked() -> None:
    anatomy = survey(tiny("llama", DENSE["llama"]))
    builder = EditBuilder(anatomy, random_directions(3, 32))
    for index in (2.01, None):
        fields: dict[str, Any] = {"attention": constant(), "mlp": constant(), "scope": "global"}
        with pytest.raises(EngineError, match="index") as caught:
            builder.build(Ablation(index=index, **fields))
        assert caught.value.reason == "bad_request"
    with pytest.raises(EngineError, match="recipe"):
        builder.build(Ablation(recipe=SVD, attention=constant(), mlp=constant()))
    with pytest.raises(EngineError, match="another model"):
        EditBuilder(anatomy, random_directions(4, 32))


def test_what_each_method_reaches() -> None:
    anatomy = survey(tiny("llama", DENSE["llama"]))
    ara = Ara(start=0, end=1, preserve=1, steer=1, overshoot=1, neighbours=1)
    assert reached(anatomy, ara) == 1
    assert reached(anatomy, Ablation(attention=constant(), mlp=constant())) == 1


@pytest.fixture(scope="module")
def folder(save: Save) -> Path:
    return save("llama", hidden_size=64, intermediate_size=128, head_dim=16)
