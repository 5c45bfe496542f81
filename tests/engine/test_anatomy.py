"""Writers of many families, found by behaviour; what is not understood is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.anatomy import examine, survey
from engine.edit import formula
from engine.errors import EngineError
from engine.load import load
from engine.report import Silent
from engine.writer import weight_of
from tests.engine.conftest import Save, request
from tests.engine.families import DENSE, FUSED, NORMED, tiny

ATTENTION = ("attn", "attention", "conv", "mixer")


@pytest.mark.parametrize("family", sorted(DENSE))
def test_dense_families_are_covered_whole(family: str) -> None:
    model = tiny(family, DENSE[family])
    anatomy = survey(model)
    assert anatomy.coverage == 1.0
    assert (anatomy.layers, anatomy.hidden) == (3, 32)
    per_layer = 1 if family == "mamba2" else 2
    assert [w.layer for w in anatomy.writers] == [k for k in range(3) for _ in range(per_layer)]
    for writer in anatomy.writers:
        # By name, too, each is what its behaviour says.
        named = any(word in writer.name for word in ATTENTION)
        assert (writer.component == "attention") == named
        assert model.get_submodule(writer.name) is writer.module
        assert writer.weight().shape == (writer.d, writer.n) == (32, writer.n)
        assert bool(writer.via) == (family in NORMED)
    report = anatomy.report()
    assert report.coverage == 1.0 and len(report.writers) == 3 * per_layer


@pytest.mark.parametrize("family", sorted(DENSE))
def test_ablated_writers_write_nothing_along_v(family: str) -> None:
    """λ = 1, mode `none`: vᵀ(writer's output − bias) = 0 in a whole forward pass."""
    model = tiny(family, DENSE[family])
    torch.manual_seed(2)
    v = torch.nn.functional.normalize(torch.randn(32), dim=0)
    heard: list[float] = []

    def listen(module: nn.Module, args: Any, out: Tensor) -> None:
        bias = getattr(module, "bias", None)
        y = out if bias is None else out - bias
        heard.append(float((y @ v).norm() / y.norm()))

    for writer in survey(model).writers:
        new = formula(writer.weight(), v, 1.0, "none").float()
        writer.module.weight.data = new.T.contiguous() if writer.transposed else new
        writer.module.register_forward_hook(listen)
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7, 8]]))
    assert len(heard) >= 3
    assert max(heard) < 1e-5


@pytest.mark.parametrize("family", sorted(FUSED))
def test_fused_experts_are_refused_loudly(family: str) -> None:
    model = tiny(family, FUSED[family])
    anatomy = examine(model)
    assert 0 < anatomy.coverage < 1
    missed = [w for w in anatomy.report().writers if not w.covered]
    assert len(missed) == 3 and all(w.name.endswith("experts.down_proj") for w in missed)
    with pytest.raises(EngineError, match=r"experts\.down_proj") as caught:
        survey(model)
    assert caught.value.reason == "unsupported_architecture"
    assert "layers.2" in caught.value.detail


class Extra(nn.Module):
    """A feed-forward layer that also adds something of its own, outside any linear module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out + 0.1 * x.roll(1, dims=-1)


def test_writers_of_no_known_kind_are_refused() -> None:
    model = tiny("llama", DENSE["llama"])
    model.model.layers[1].mlp = Extra(model.model.layers[1].mlp)
    with pytest.raises(EngineError, match="besides its writers") as caught:
        survey(model)
    assert "layers.1" in caught.value.message


def test_writing_between_blocks_is_refused() -> None:
    model = tiny("llama", DENSE["llama"])
    model.model.layers[2].register_forward_pre_hook(lambda m, args: (args[0] * 1.5, *args[1:]))
    with pytest.raises(EngineError, match="between this block and the next"):
        survey(model)


def test_shared_blocks_are_refused() -> None:
    model = tiny("llama", DENSE["llama"])
    model.model.layers[2] = model.model.layers[0]
    with pytest.raises(EngineError, match="shared"):
        survey(model)


def test_square_feed_forward_is_not_mistaken() -> None:
    """Where all matrices are d × d, only behaviour tells writers from readers."""
    wide = {"intermediate_size": 32, "num_key_value_heads": 4}
    model = tiny("llama", DENSE["llama"], **wide)
    names = {w.name.split(".", 3)[-1] for w in survey(model).writers}
    assert names == {"self_attn.o_proj", "mlp.down_proj"}


def test_residual_multiplier_is_seen() -> None:
    assert {round(w.scale, 3) for w in survey(tiny("granite", DENSE["granite"])).writers} == {0.25}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    for family in ("llama", "gemma2", "gpt2"):
        anatomy = survey(tiny(family, DENSE[family]).to(dtype))
        assert len(anatomy.writers) == 6
        assert {bool(w.via) for w in anatomy.writers} == {family in NORMED}


@pytest.mark.parametrize("quantization", ["bnb_4bit", "bnb_8bit"])
def test_quantised_models(quantization: str, save: Save) -> None:
    """Writers are found and dequantised near their originals, before and after a forward."""
    folder: Path = save("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    plain = load(request(folder), Silent()).model
    model = load(request(folder, quantization=quantization), Silent()).model
    anatomy = survey(model)
    assert len(anatomy.writers) == 6 and {w.component for w in anatomy.writers} == {
        "attention",
        "mlp",
    }
    for _ in range(2):
        for writer in anatomy.writers:
            true = weight_of(plain.get_submodule(writer.name))
            assert writer.weight().dtype == torch.float32
            bound = 0.12 if quantization == "bnb_4bit" else 0.02
            assert (writer.weight() - true).norm() < bound * true.norm()
        with torch.no_grad():
            model(torch.tensor([[5, 6, 7, 8]]))
