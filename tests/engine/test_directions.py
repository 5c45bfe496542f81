"""Directions against means in float64, and the residuals that they come from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.anatomy import survey
from engine.directions import measure
from engine.errors import EngineError
from engine.report import Silent
from engine.residuals import collect
from jobs.spec.candidate import Candidate, constant
from tests.engine.conftest import random_directions
from tests.engine.families import DENSE, tiny


def test_difference_of_means_and_projection() -> None:
    torch.manual_seed(0)
    bad, good = torch.randn(20, 4, 16), torch.randn(30, 4, 16) + 2
    found = measure(bad, good)
    for state in range(4):
        b, g = bad[:, state].double().mean(0), good[:, state].double().mean(0)
        r = (b - g) / (b - g).norm()
        g = g / g.norm()
        p = r - (r @ g) * g
        assert torch.allclose(found.raw[state].double(), r, atol=1e-6)
        assert torch.allclose(found.projected[state].double(), p / p.norm(), atol=1e-6)


def test_global_direction_is_interpolated() -> None:
    directions = random_directions(5, 16)
    fields: dict[str, Any] = {"scope": "global", "attention": constant(), "mlp": constant()}
    r = directions.projected.double()
    for index, low, f in ((0.0, 1, 0.0), (2.25, 3, 0.25), (3.9, 4, 0.9), (4.0, 5, 0.0)):
        v = (1 - f) * r[low] + (f * r[low + 1] if f else 0)
        found = directions.of(Candidate(index=index, **fields))
        assert found.shape == (5, 16)
        assert torch.allclose(found.double(), (v / v.norm()).expand(5, -1), atol=1e-6)
    per_layer = directions.of(
        Candidate(projected=False, attention=constant(), mlp=constant(), scope="per_layer")
    )
    assert torch.equal(per_layer, directions.raw[1:])


def test_equal_sides_are_refused() -> None:
    same = torch.randn(3, 4, 8)
    with pytest.raises(EngineError) as caught:
        measure(same, same)
    assert caught.value.reason == "bad_prompts"


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
    found = collect(model, anatomy, inputs, 0, Silent(), batch_size=3)
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
