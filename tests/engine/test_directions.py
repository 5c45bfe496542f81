"""Directions against formulas in numpy's float64, and the residuals that they come from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.anatomy import survey
from engine.centers import geometric_median, winsorized
from engine.directions import measure
from engine.errors import EngineError
from engine.report import Silent
from engine.residuals import collect
from jobs.spec.candidate import Ablation, Recipe, constant
from tests.engine.conftest import RECIPES, random_directions
from tests.engine.families import DENSE, tiny

Floats = NDArray[np.float64]


def states(rows: int, shift: float, seed: int, hidden: int = 16) -> Tensor:
    """(rows, 4, hidden): random states after an embedding and three blocks."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 4, hidden, generator=generator) + shift


def normal(v: Floats) -> Floats:
    return v / np.linalg.norm(v)


def candidate(recipe: Recipe, index: float | None = None) -> Ablation:
    scope: Any = "per_layer" if index is None else "global"
    return Ablation(recipe=recipe, scope=scope, index=index, attention=constant(), mlp=constant())


def test_difference_of_means_and_projection() -> None:
    bad, good = states(20, 0, 0), states(30, 2, 1)
    found = measure({-1: bad}, {-1: good}, RECIPES)
    projected, raw = (found.axes(recipe) for recipe in RECIPES)
    for layer in range(3):
        b = bad[:, layer + 1].double().numpy().mean(0)
        g = good[:, layer + 1].double().numpy().mean(0)
        r, unit = normal(b - g), normal(g)
        assert np.allclose(raw.vectors[layer, 0], r, atol=1e-6)
        assert np.allclose(projected.vectors[layer, 0], normal(r - (r @ unit) * unit), atol=1e-6)
        assert np.allclose(raw.good[layer], g, atol=1e-6)
        assert raw.gap[layer] == pytest.approx(np.linalg.norm(b - g), rel=1e-6)


def test_geometric_median_has_the_least_sum_of_distances() -> None:
    torch.manual_seed(1)
    points = torch.randn(40, 5, dtype=torch.float64)
    points[:5] += 50  # far outliers, which move a mean by 6
    found = geometric_median(points)
    # Independently: quasi-Newton on the sum of distances.
    y = points.mean(0).requires_grad_()
    search = torch.optim.LBFGS(
        [y], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> Tensor:
        search.zero_grad()
        total: Tensor = torch.linalg.vector_norm(points - y, dim=1).sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    search.step(loss)  # type: ignore[no-untyped-call]
    assert torch.allclose(found, y.detach(), atol=1e-6)
    assert found.norm() < 2 < points.mean(0).norm()


def test_geometric_median_at_a_point_and_of_equal_points() -> None:
    cross = torch.tensor([[0.0, 0], [1, 0], [-1, 0], [0, 3], [0, -3]])
    assert torch.equal(geometric_median(cross), torch.zeros(2, dtype=torch.float64))
    # The start, the mean, is a point but not the median: the iteration must leave it.
    line = torch.tensor([[0.0], [-1], [-1], [-1], [-2], [5]])
    assert line.mean() == 0
    assert geometric_median(line) == pytest.approx(-1, abs=1e-6)
    same = torch.full((3, 4), 2.5)
    assert torch.equal(geometric_median(same), same[0].double())


def test_winsorised_states_are_clamped_at_their_own_quantile() -> None:
    torch.manual_seed(2)
    h = torch.randn(7, 33, dtype=torch.float64)
    h[:, 4] = -900.0
    found = winsorized(h, 0.93).numpy()
    limit = np.quantile(np.abs(h.numpy()), 0.93, axis=1)[:, None]
    assert np.allclose(found, np.clip(h.numpy(), -limit, limit), atol=1e-12)
    assert np.abs(found).max() < 5


def test_recipes_choose_the_center() -> None:
    bad, good = states(20, 0, 0), states(30, 2, 1)
    bad[3, :, 7] = 3e4  # one massive state
    bad[:, :, 5] = 400  # one massive entry, in all states
    robust = Recipe(center="median", projection="none", winsorize=0.9)
    plain = Recipe(projection="none")
    found = measure({-1: bad}, {-1: good}, [robust, plain])
    for layer in range(3):
        b, g = (winsorized(h[:, layer + 1].double(), 0.9) for h in (bad, good))
        true = normal((geometric_median(b) - geometric_median(g)).numpy())
        assert np.allclose(found.axes(robust).vectors[layer, 0], true, atol=1e-6)
        # The mean is decided by the two.
        assert found.axes(plain).vectors[layer, 0, [5, 7]].norm() > 0.99 > 2 * abs(true[7])


def test_positions_have_directions_of_their_own() -> None:
    bad, good = ({-1: states(9, s, 0), -3: states(9, s, 5)} for s in (0.0, 2.0))
    recipes = [Recipe(position=-1), Recipe(position=-3)]
    found = measure(bad, good, recipes)
    for recipe in recipes:
        p = recipe.position
        alone = measure({-1: bad[p]}, {-1: good[p]})
        assert torch.equal(found.axes(recipe).vectors, alone.axes(Recipe()).vectors)
    with pytest.raises(EngineError, match="position"):
        measure(bad, good, [Recipe(position=-2)])


def test_global_direction_is_interpolated() -> None:
    directions = random_directions(5, 16)
    r = directions.axes(Recipe()).vectors[:, 0].double()
    for index, low, f in ((0.0, 0, 0.0), (2.25, 2, 0.25), (3.9, 3, 0.9), (4.0, 4, 0.0)):
        v = (1 - f) * r[low] + (f * r[low + 1] if f else 0)
        found = directions.of(candidate(Recipe(), index))
        assert found.shape == (5, 1, 16)
        assert torch.allclose(found[:, 0].double(), (v / v.norm()).expand(5, -1), atol=1e-6)
    for recipe in RECIPES:
        assert torch.equal(directions.of(candidate(recipe)), directions.axes(recipe).vectors)


def test_biprojected_is_off_the_harmless_mean_of_both_layers() -> None:
    both, once = Recipe(projection="biprojected"), Recipe()
    directions = random_directions(5, 16, recipes=[both, once])
    good = directions.axes(both).good.double().numpy()
    assert torch.equal(directions.of(candidate(both)), directions.of(candidate(once)))
    for index in (2.0, 2.25):
        shared = directions.of(candidate(once, index))[0, 0].double().numpy()
        found = directions.of(candidate(both, index))[:, 0].double().numpy()
        for layer in range(5):
            g = normal(good[layer])
            assert np.allclose(found[layer], normal(shared - (shared @ g) * g), atol=1e-6)
            assert abs(found[layer] @ g) < 1e-6
    # Used where it was measured, the second projection changes nothing.
    assert np.allclose(directions.of(candidate(both, 2.0))[2], directions.of(candidate(once))[2],
                       atol=1e-6)  # fmt: skip


def test_equal_sides_are_refused() -> None:
    same = torch.randn(3, 4, 8)
    with pytest.raises(EngineError) as caught:
        measure({-1: same}, {-1: same})
    assert caught.value.reason == "bad_prompts"
    # Before the prompts differ, a position has no direction; that is for a selection to see.
    early = Recipe(position=-4)
    assert not measure({-4: same}, {-4: same}, [early]).axes(early).vectors.any()


def test_states_that_are_not_finite_are_an_error() -> None:
    bad = states(3, 0, 0)
    bad[1, 2, 3] = torch.inf
    with pytest.raises(EngineError) as caught:
        measure({-1: bad}, {-1: states(3, 1, 1)})
    assert caught.value.reason == "engine_failed"


FINAL_NORMS = {
    "llama": "model.norm",
    "gpt2": "transformer.ln_f",
    "gemma2": "model.norm",
    "bloom": "transformer.ln_f",
    "opt": "model.decoder.final_layer_norm",
}


@pytest.mark.parametrize("family", FINAL_NORMS)
def test_residuals_are_those_of_single_prompts(family: str) -> None:
    model = tiny(family, DENSE[family])
    anatomy = survey(model)
    inputs = [[5, 6, 7], [9, 8, 7, 6, 5, 4], [11], [3, 4, 5, 6]]
    found = collect(model, anatomy, inputs, 0, Silent(), batch_size=3)[-1]
    assert found.shape == (4, 4, 32)
    for row, ids in enumerate(inputs):
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        # The last of them has passed the final norm.
        for layer in range(3):
            assert torch.allclose(found[row, layer], states[layer][0, -1], atol=1e-4)
    with torch.no_grad():
        last = model.get_submodule(FINAL_NORMS[family])(found[3, 3])
    assert torch.allclose(last, states[3][0, -1], atol=1e-4)
