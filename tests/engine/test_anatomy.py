"""Writers of many families, found by behaviour; what is not understood is refused.

Every model type of transformers is walked in test_zoo.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.anatomy import Anatomy, examine, survey
from engine.dequantise import weight_of
from engine.errors import EngineError
from engine.load import load
from engine.report import Silent
from tests.engine.conftest import Save, request
from tests.engine.families import DENSE, FUSED, GEMMA3N, NORMED, SMALL, tiny

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
        assert writer.hooked
        assert writer.weight().shape == (writer.d, writer.n) == (32, writer.n)
        assert bool(writer.via) == (family in NORMED)
    report = anatomy.report()
    assert report.coverage == 1.0 and len(report.writers) == 3 * per_layer


def ablate(anatomy: Anatomy, v: Tensor) -> None:
    """Take v out of all that is written: W − v(vᵀW), each writer in its own layout."""
    for writer in anatomy.writers:
        W = writer.oriented(getattr(writer.module, writer.parameter).data)
        W -= v[:, None] * (v @ W).unsqueeze(-2)  # a view of what is stored
        if (bias := writer.bias()) is not None:
            bias.data -= (bias @ v)[..., None] * v


def passed(model: Any, anatomy: Anatomy) -> list[tuple[Tensor, Tensor]]:
    """The stream before and after every block in a whole forward pass."""
    seen: list[tuple[Tensor, Tensor]] = []

    def listen(block: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        seen.append((anatomy.stream_of(given), anatomy.stream_of(out)))

    hooks = [b.register_forward_hook(listen, with_kwargs=True) for b in anatomy.blocks]
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7, 8]]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


PLAIN = sorted((DENSE | FUSED).keys() - NORMED)


@pytest.mark.parametrize("family", PLAIN)
def test_ablated_writers_move_the_stream_orthogonally_to_v(family: str) -> None:
    """vᵀ(h_out − h_in) = 0 for every block: nothing that writes was left out or misread."""
    model = tiny(family, (DENSE | FUSED)[family])
    torch.manual_seed(2)
    v = torch.nn.functional.normalize(torch.randn(32), dim=0)
    anatomy = survey(model)
    assert max(float(((b - a) @ v).norm()) for a, b in passed(model, anatomy)) > 0.01
    ablate(anatomy, v)
    seen = passed(model, anatomy)
    assert len(seen) == 3
    for before, after in seen:
        assert float((after - before).norm()) > 0.1
        assert float(((after - before) @ v).norm()) < 1e-5 * float(after.norm())


@pytest.mark.parametrize("family", sorted(FUSED))
def test_fused_experts_are_one_stack(family: str) -> None:
    model = tiny(family, FUSED[family])
    anatomy = survey(model)
    stacks = [w for w in anatomy.writers if w.experts]
    assert [w.layer for w in stacks] == [0, 1, 2]
    for w in stacks:
        assert w.component == "mlp" and not w.hooked and w.via == ""
        assert w.shape == (4, 32, w.n) == tuple(w.weight().shape)
        assert model.get_parameter(w.name) is getattr(w.module, w.parameter)
        assert w.transposed == (family in ("gpt_oss", "llama4_text", "dbrx"))
        assert (w.bias() is not None) == (family == "gpt_oss")
    assert anatomy.coverage == 1 and anatomy.report().writers[0].covered
    experts = sum(w.weight().numel() for w in stacks)
    whole = sum(w.weight().numel() for w in anatomy.writers)
    assert anatomy.shares()["experts"] == pytest.approx(experts / whole)
    assert sum(anatomy.shares().values()) == pytest.approx(1)


@pytest.mark.parametrize(("family", "transposed"), [("gpt_oss", True), ("qwen3_moe", False)])
@pytest.mark.parametrize("flag", [True, False])
def test_square_stacks_are_read_by_what_they_do(family: str, transposed: bool, flag: bool) -> None:
    """Where experts are d × d the shape tells nothing, and here the flag may lie."""
    square = {"intermediate_size": 32, "moe_intermediate_size": 32}
    model = tiny(family, FUSED[family], **square)
    model.set_experts_implementation("eager")  # does not read the flag
    for layer in model.model.layers:
        layer.mlp.experts.is_transposed = flag
    stacks = [w for w in survey(model).writers if w.experts]
    assert len(stacks) == 3 and all(w.transposed == transposed for w in stacks)
    assert all(w.parameter == "down_proj" for w in stacks)


def test_shared_experts_behind_a_gate() -> None:
    """Qwen2-MoE multiplies its shared expert by a number per token."""
    writers = survey(tiny("qwen2_moe", FUSED["qwen2_moe"])).writers
    shared = [w for w in writers if w.name.endswith("shared_expert.down_proj")]
    assert [w.layer for w in shared] == [0, 1, 2] and all(w.hooked for w in shared)


def test_attention_made_of_experts() -> None:
    more = {"num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 4}
    stacks = survey(tiny("jetmoe", SMALL | more)).writers
    assert {(w.component, w.parameter, w.experts) for w in stacks} == {
        ("attention", "weight", 4),
        ("mlp", "weight", 4),
    }


class Experts(nn.Module):
    """A list of experts of which only the first is ever chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(32, 16), "down_proj": nn.Linear(16, 32)})
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        chosen: Any = self.experts[0]
        out: Tensor = chosen["down_proj"](chosen["up"](x.reshape(-1, 32)[::2]))
        return (
            torch.zeros_like(x)
            .view(-1, 32)
            .index_add(0, torch.arange(0, x[..., 0].numel(), 2), out)
            .view_as(x)
        )


def test_experts_that_get_no_token_are_covered_with_the_others() -> None:
    model = tiny("llama", DENSE["llama"])
    model.model.layers[1].mlp = Experts()
    names = {w.name for w in survey(model).writers if w.layer == 1}
    assert {f"model.layers.1.mlp.experts.{k}.down_proj" for k in range(3)} < names


def test_several_streams() -> None:
    """AltUp: Gemma 3n carries four; what is measured is the one that it computes on."""
    model = tiny("gemma3n_text", GEMMA3N)
    anatomy = survey(model)
    assert anatomy.streams == 0
    names = {w.name.split(".", 3)[-1] for w in anatomy.writers}
    assert names == {
        "self_attn.o_proj", "mlp.down_proj", "laurel.linear_right", "per_layer_projection"
    }  # fmt: skip
    kept: list[Tensor] = []
    anatomy.blocks[0].register_forward_hook(lambda m, args, out: kept.append(out))
    before, after = passed(model, anatomy)[0]
    assert before.shape == after.shape == (1, 4, 32)
    assert torch.equal(after, kept[0][0])


def test_the_model_is_left_as_it_was() -> None:
    model = tiny("gpt_oss", FUSED["gpt_oss"])
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    survey(model)
    for name, p in model.named_parameters():
        assert p.data_ptr() == before[name][0] and torch.equal(p, before[name][1])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


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


class Packed(nn.Module):
    """Experts in a layout that nobody knows: two in one matrix, told apart by a sign."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.down_packed = nn.Parameter(0.05 * torch.randn(2, 2, 32, 16))

    def forward(self, x: Tensor) -> Tensor:
        both = torch.einsum("btn,abdn->btd", x[..., :16].relu(), self.down_packed)
        out: Tensor = self.inner(x) + both
        return out


def test_a_parameter_that_writes_and_is_not_understood_is_named() -> None:
    model = tiny("llama", DENSE["llama"])
    model.model.layers[1].mlp = Packed(model.model.layers[1].mlp)
    anatomy = examine(model)
    assert 0 < anatomy.coverage < 1
    with pytest.raises(EngineError, match=r"layers\.1\.mlp\.down_packed") as caught:
        survey(model)
    assert caught.value.reason == "unsupported_architecture"
    assert "allow_partial" in (caught.value.mend or "")
    partial = survey(model, allow_partial=True)
    assert len(partial.writers) == 6 and partial.coverage == anatomy.coverage
    missed = {w.name for w in partial.report().writers if not w.covered}
    assert "model.layers.1.mlp.down_packed" in missed


def test_what_text_does_not_run_is_refused() -> None:
    """A matrix that may write, in a block that never uses it."""
    model = tiny("llama", DENSE["llama"])
    model.model.layers[1].other = nn.Linear(16, 32)
    with pytest.raises(EngineError, match=r"layers\.1\.other.*does not run"):
        survey(model)


def test_writing_between_blocks_is_refused() -> None:
    model = tiny("llama", DENSE["llama"])
    model.model.layers[2].register_forward_pre_hook(
        lambda m, args: (args[0] + 0.1 * args[0].roll(1, dims=-1), *args[1:])
    )
    with pytest.raises(EngineError, match="before this block"):
        survey(model)


def test_a_shared_block_counts_once() -> None:
    model = tiny("llama", DENSE["llama"])
    model.model.layers[2] = model.model.layers[0]
    anatomy = survey(model)
    assert anatomy.layers == 2 and [w.layer for w in anatomy.writers] == [0, 0, 1, 1]


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
