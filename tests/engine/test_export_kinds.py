"""Artifacts of stacks of experts, affine edits, updates and vision-language models.

Read back by plain transformers and plain PEFT, against the patched session.
"""

from __future__ import annotations

import json
import subprocess
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from demo.vocabulary import build_tokenizer
from engine import export
from engine.anatomy import Anatomy, survey
from engine.change import Change, Projection, Update, formula
from engine.edit import EditBuilder
from engine.errors import EngineError
from engine.export import adapter
from engine.export.original import Edited
from engine.load import Loaded, load, load_folder
from engine.patch import Patch
from engine.report import Silent
from engine.writer import Writer
from jobs.spec.candidate import Ara, EditMode, constant
from jobs.spec.protocol import Export, Exported
from tests.engine.conftest import random_directions, request
from tests.engine.families import DENSE, FUSED, SMALL, tiny
from tests.engine.test_export import logits, tensors
from tests.engine.test_packed import CONFIGS, linear, pack_into
from tests.engine.test_patch import MODES, candidate, edit_of

# Shared experts and dense layers beside the stacks: PEFT knows their names from older checkpoints.
SHARED: dict[str, dict[str, Any]] = {
    "qwen2_moe": SMALL
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
       "shared_expert_intermediate_size": 24, "decoder_sparse_step": 2},
    "granitemoe": SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip
MIXTURES = {name: FUSED[name] for name in ("mixtral", "qwen3_moe", "gpt_oss")} | SHARED


class Case:
    """A model on disk, loaded, and what exporting it needs."""

    def __init__(self, folder: Path, loaded: Loaded | None = None) -> None:
        self.folder = folder
        self.loaded = loaded or load(request(folder), Silent())
        self.anatomy: Anatomy = survey(self.loaded.model)
        directions = random_directions(self.anatomy.layers, self.anatomy.hidden)
        self.builder = EditBuilder(self.anatomy, directions)

    def changes(self, mode: EditMode, **more: Any) -> tuple[Change | None, ...]:
        return self.builder.changes(candidate(mode, **more))

    def write(self, out: Path, changes: Sequence[Change | None], **more: Any) -> Exported:
        out.mkdir(exist_ok=True)
        asked: dict[str, Any] = {"candidate": candidate("full"), "directory": str(out), **more}
        return export.write(self.loaded, self.anatomy, changes, Export(**asked), Silent())

    def patched(self, changes: Sequence[Change | None]) -> Tensor:
        with Patch(self.anatomy) as patch:
            patch.select([edit_of(self.anatomy, changes)])
            return logits(self.loaded.model)


def save(folder: Path, family: str, settings: dict[str, Any], shard: str = "5GB") -> Path:
    tiny(family, settings).save_pretrained(folder, max_shard_size=shard)
    build_tokenizer().save_pretrained(folder)
    return folder


def adapted(folder: Path, adapter: Path) -> Any:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft warns of missing and of unexpected keys
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", ".*lora_bias=True.*has no bias.*")
        return PeftModel.from_pretrained(base, adapter).eval()


@pytest.fixture(scope="module", params=list(MIXTURES))
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    return Case(save(folder, request.param, MIXTURES[request.param], "40KB"))


@pytest.mark.parametrize("mode", MODES)
def test_merged_mixture_is_the_patched_model(mode: EditMode, mixture: Case, tmp_path: Path) -> None:
    changes = mixture.changes(mode)
    true = mixture.patched(changes)
    assert (true - logits(mixture.loaded.model)).abs().max() > 1e-2
    mixture.write(tmp_path, changes)
    assert "stacks of 4 experts |" in (tmp_path / "README.md").read_text()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert (logits(merged) - true).abs().max() < 1e-4
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=tmp_path, check=True)


def test_only_the_writers_tensors_differ(mixture: Case, tmp_path: Path) -> None:
    """By the names of the original checkpoints: everything else is byte for byte the same."""
    mixture.write(tmp_path, mixture.changes("pre", attention=constant(0.9)))
    before, after = tensors(mixture.folder), tensors(tmp_path)
    assert before.keys() == after.keys()
    assert len(list(mixture.folder.glob("*.safetensors"))) > 3
    leaves = ("o_proj", "down_proj", "w2", "output_linear")
    for name, tensor in before.items():
        edited = any(f".{leaf}" in name for leaf in leaves) and "bias" not in name
        assert torch.equal(tensor, after[name]) is not edited, name


def test_experts_of_the_checkpoint_follow_the_formula(tmp_path: Path) -> None:
    """One tensor per expert (Mixtral's w2), and one for all, transposed (gpt-oss)."""
    for family, transposed in (("mixtral", False), ("gpt_oss", True)):
        case = Case(save(tmp_path / family, family, FUSED[family]))
        case.write(tmp_path / f"{family}-out", changes := case.changes("full"))
        before, after = tensors(case.folder), tensors(tmp_path / f"{family}-out")
        for writer, change in zip(case.anatomy.writers, changes, strict=True):
            if writer.hooked:
                continue
            assert change is not None
            for e in range(4):
                key = f"model.layers.{writer.layer}.mlp.experts.down_proj"
                if not transposed:
                    key = f"model.layers.{writer.layer}.block_sparse_moe.experts.{e}.w2.weight"
                old, new = ((t[key][e].T if transposed else t[key]) for t in (before, after))
                assert torch.allclose(new.double(), formula(old, change), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_adapter_of_a_mixture(mode: EditMode, mixture: Case, tmp_path: Path) -> None:
    changes = mixture.changes(mode)
    done = mixture.write(tmp_path, changes, kind="adapter", rank=48)
    exact = mode in ("none", "pre")
    assert done.truncation_error == 0 if exact else (done.truncation_error or 1) < 1e-5
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["use_dora"] is False and config["r"] == (1 if exact else 32)
    model = adapted(mixture.folder, tmp_path)
    assert (logits(model) - mixture.patched(changes)).abs().max() < 1e-4


def test_a_mixture_s_attention_alone_is_dora(mixture: Case, tmp_path: Path) -> None:
    changes = mixture.changes("full", mlp=constant(0.0))
    mixture.write(tmp_path, changes, kind="adapter")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"] is True
    model = adapted(mixture.folder, tmp_path)
    assert (logits(model) - mixture.patched(changes)).abs().max() < 1e-4


def test_a_small_rank_states_its_error(mixture: Case, tmp_path: Path) -> None:
    changes = mixture.changes("full")
    done = mixture.write(tmp_path, changes, kind="lora", rank=2)
    worst = 0.0
    for writer, change in zip(mixture.anatomy.writers, changes, strict=True):
        if change is None:
            continue
        W = writer.weight()
        for one in W if writer.experts else W[None]:
            delta = formula(one, change) - one.double()
            S = torch.linalg.svdvals(delta)
            worst = max(worst, float(S[2:].norm() / S.norm()))
    assert done.truncation_error == pytest.approx(worst, rel=1e-3) and worst > 0.01
    assert f"{worst:.2%}" in (tmp_path / "README.md").read_text()


def affine(case: Case, mode: EditMode) -> tuple[Change | None, ...]:
    torch.manual_seed(2)
    found = case.changes(mode)
    return tuple(replace(c, mean=torch.randn(1)) if isinstance(c, Projection) else c for c in found)


@pytest.mark.parametrize("mode", MODES)
def test_affine_in_the_biases_that_are_there(mode: EditMode, tmp_path: Path) -> None:
    case = Case(save(tmp_path / "base", "gpt2", DENSE["gpt2"]))
    changes = affine(case, mode)
    case.write(tmp_path / "out", changes)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    true = case.patched(changes)
    assert (true - case.patched(case.changes(mode))).abs().max() > 1e-2
    assert (logits(merged) - true).abs().max() < 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_affine_without_biases_is_an_adapter(mode: EditMode, tmp_path: Path) -> None:
    case = Case(save(tmp_path / "base", "llama", DENSE["llama"]))
    changes = affine(case, mode)
    with pytest.raises(EngineError, match="affine") as caught:
        case.write(tmp_path / "out", changes)
    assert caught.value.reason == "unsupported_architecture"
    assert "kind adapter" in caught.value.mend and not list((tmp_path / "out").iterdir())
    done = case.write(tmp_path / "adapter", changes, kind="adapter", rank=32)
    assert (done.truncation_error or 0) < 1e-5
    model = adapted(case.folder, tmp_path / "adapter")
    assert (logits(model) - case.patched(changes)).abs().max() < 1e-4


def test_affine_stacks_have_no_adapter(tmp_path: Path) -> None:
    case = Case(save(tmp_path / "base", "mixtral", FUSED["mixtral"]))
    with pytest.raises(EngineError, match="no bias") as caught:
        case.write(tmp_path / "out", affine(case, "none"), kind="adapter")
    assert "merged" in caught.value.mend


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_updates_of_several_ranks(family: str, tmp_path: Path) -> None:
    """ARA: merged W + BA, and the adapter is the update itself, whatever its rank."""
    case = Case(save(tmp_path / "base", family, DENSE[family]))
    torch.manual_seed(4)
    changes = [
        Update(0.3 * torch.randn(w.d, 2 + k % 3), 0.3 * torch.randn(2 + k % 3, w.n)) if k else None
        for k, w in enumerate(case.anatomy.writers)
    ]
    of = Ara(start=0, end=3, preserve=0.5, steer=0.1, overshoot=1.0, neighbours=3, rank=4)
    case.write(tmp_path / "merged", changes, candidate=of)
    done = case.write(tmp_path / "adapter", changes, candidate=of, kind="adapter", rank=1)
    assert done.truncation_error == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    true = case.patched(changes)
    assert (true - logits(case.loaded.model)).abs().max() > 1e-2
    assert (logits(merged) - true).abs().max() < 1e-4
    assert (logits(adapted(case.folder, tmp_path / "adapter")) - true).abs().max() < 1e-4
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "LoRA adapter of rank up to 4, which is the edit exactly" in card
    assert "| rank of each change | at most 4 |" in card and "| overshoot | 1 |" in card


VLM = {
    "text_config": {"model_type": "llama", **SMALL},
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 8,
        "projection_dim": 32,
    },
    "image_token_index": 90, "image_seq_length": 4, "tie_word_embeddings": False,
}  # fmt: skip


def test_the_image_tower_and_the_projector_are_byte_identical(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    factory: Any = AutoModelForImageTextToText
    model = factory.from_config(AutoConfig.for_model("llava", **VLM))
    folder = tmp_path / "base"
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    for name in ("preprocessor_config.json", "processor_config.json"):
        (folder / name).write_text('{"image_processor_type": "CLIPImageProcessor"}\n')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "tokenizer.model").write_bytes(b"\x00\x01")
    case = Case(folder)
    changes = case.changes("full", attention=constant(1.0))
    assert len(changes) == 6 and all(changes)
    case.write(tmp_path / "out", changes)
    before, after = tensors(folder), tensors(tmp_path / "out")
    for name, tensor in before.items():
        edited = name.endswith(("o_proj.weight", "down_proj.weight")) and "language" in name
        assert torch.equal(tensor, after[name]) is not edited, name
        if "vision" in name or "projector" in name:
            assert tensor.numpy().tobytes() == after[name].numpy().tobytes()
    assert sum("vision" in name for name in before) > 10
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert (logits(merged) - case.patched(changes)).abs().max() < 1e-4
    front = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in front
    assert 'AutoModelForImageTextToText.from_pretrained("PATH"' in front
    case.write(tmp_path / "adapter", changes, kind="adapter")
    base = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert (logits(model) - case.patched(changes)).abs().max() < 1e-4


class Packed(torch.nn.Module):
    """Three experts (6, 4) that share one matrix, and a matrix (6, 4) that is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w2 = torch.nn.Parameter(torch.randn(18, 4))
        self.mix = torch.nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.mix


def test_a_stack_in_one_matrix_has_no_adapter() -> None:
    """PEFT would take it for a single matrix."""
    writer = Writer(
        "experts.w2", 0, "mlp", Packed(), 4, 6, parameter="w2", experts=3, transposed=True
    )
    change = Projection(torch.eye(1, 4), 1.0, "none")
    with pytest.raises(EngineError, match="share one matrix") as caught:
        adapter._check(Edited(writer, (), change), stacks=True)
    assert "merged" in caught.value.mend


def test_a_single_parameter_stored_transposed() -> None:
    """The factors of a matrix that no module holds, as PEFT applies them."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(Packed())
    writer = Writer("0.mix", 0, "mlp", model[0], 4, 6, parameter="mix", transposed=True)
    change = Update(torch.randn(4, 2), torch.randn(2, 6))
    factors = adapter.exact_factors(writer.weight(), change)
    made = adapter._tensors(Edited(writer, (), change), [factors], dora=False)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=[], target_parameters=["0.mix"])
    adapted: Any = get_peft_model(model, config)
    wrapper = adapted.base_model.model[0]
    for half in ("A", "B"):
        weight = getattr(wrapper, f"lora_{half}")["default"].weight
        weight.data = made[f"base_model.model.0.lora_{half}.weight"]
    x = torch.randn(5, 6)
    true = x.double() @ formula(writer.weight(), change).T
    assert torch.allclose(adapted(x).double(), true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("source", ["fp8", "gptq", "bnb_4bit"])
@pytest.mark.parametrize("mode", MODES)
def test_packed_sources_give_adapters(source: str, mode: EditMode, tmp_path: Path) -> None:
    """The adapter belongs to the dequantised weights, which is what its user will have."""
    folder = save(tmp_path / "model", "llama", DENSE["llama"])
    if source == "bnb_4bit":
        packed = load(request(folder, quantization="bnb_4bit"), Silent())
        folder = tmp_path / "packed"
        packed.model.save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)
    else:
        quantization, pack, _ = CONFIGS[source]
        pack_into(folder, quantization, pack, linear)
    case = Case(folder)
    assert case.loaded.packed
    changes = case.changes(mode)
    with pytest.raises(EngineError, match="quantised already") as caught:
        case.write(tmp_path / "merged", changes)
    assert "adapter" in caught.value.mend
    case.write(tmp_path / "adapter", changes, kind="adapter", rank=64)
    base, _ = load_folder(folder, torch.device("cpu"), torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    true = case.patched(changes)
    assert (true - logits(case.loaded.model)).abs().max() > 1e-2
    # bitsandbytes stays packed in memory, and computes in bfloat16
    bound = 0.03 if source == "bnb_4bit" else 1e-4
    assert (logits(model) - true).norm() < bound * true.norm()
