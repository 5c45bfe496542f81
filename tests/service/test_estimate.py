"""Estimates from headers alone, against safetensors and against sizes counted by hand."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from jobs import checkpoints
from jobs.checkpoints import Checkpoint, Tensor
from jobs.estimate import Estimate, estimate, figures
from jobs.needs import OVERHEAD
from jobs.problems import Invalid
from jobs.settings import Settings
from jobs.spec.job import JobSpec
from jobs.weights import NF4_BYTES, NF4_TABLES
from tests.engine import hub_server
from tests.service.builders import make_spec, write_model
from tests.service.test_models import asking, hub, point_at

__all__ = ["asking", "hub"]  # fixtures

HIDDEN, LAYERS = 16, 2
QUANTISED = LAYERS * (HIDDEN * HIDDEN + 4 * HIDDEN * HIDDEN)
REST = 100 * HIDDEN + LAYERS * HIDDEN


def test_sizes_counted_by_hand(farm: Settings) -> None:
    spec = make_spec(quantization="bnb_4bit", max_new_tokens=36, device="cuda")
    found = estimate(spec, farm)
    assert (found.parameters, found.layers, found.hidden) == (QUANTISED + REST, LAYERS, HIDDEN)
    assert found.architecture == "LlamaForCausalLM" and found.supported
    weights = {
        "none": 2 * (QUANTISED + REST),
        "bnb_8bit": QUANTISED + LAYERS * 2 * HIDDEN * 4 + 2 * REST,  # a float32 scale a row
        "bnb_4bit": round(QUANTISED * NF4_BYTES) + LAYERS * 2 * NF4_TABLES + 2 * REST,
    }
    assert found.weight_bytes == weights
    # The baseline answers 100 prompts of 64 tokens with 36. Two heads of 8, one of keys: a token's
    # keys and values are 2 · 8 numbers of 2 bytes in each of 2 layers. The widest moment is one
    # block over the prompt, its norm and edit in float32: 64 · (2·2·16 + 3·4·16) bytes.
    (baseline,) = (each for each in found.needs["cuda"].phases if each.name == "baseline")
    attention = 2 * (2 * 16 + 4 * 16 + 16 + 2 * 16)
    feed_forward = 2 * (2 * 16 + 3 * 4 * 16)  # no width in the file: four times the residual's
    assert max(attention, feed_forward, 2 * 2 * 16 + 3 * 4 * 16) == feed_forward == 448
    prompt = 64 * (2 * 8) * 2 * LAYERS + 64 * feed_forward + 100 * 2
    # bases: for each of 2 directions d + 2n numbers of 4 bytes, and d + n norms, of 2 + 2 writers
    bases = LAYERS * 4 * (LAYERS * (16 + 32) + 32 + LAYERS * (16 + 128) + 80)
    parts = {"weights": weights["bnb_4bit"], "bases": bases, "libraries": OVERHEAD["cuda"]}
    assert {name: baseline.parts[name] for name in parts} == parts
    assert baseline.bytes == sum(parts.values()) + 100 * prompt
    assert found.gpu_bytes == found.needs["cuda"].bytes >= baseline.bytes
    assert found.disk_bytes > 2 * (QUANTISED + REST)
    on_cpu = estimate(make_spec(device="cpu"), farm)
    assert on_cpu.gpu_bytes == 0 and on_cpu.ram_bytes == on_cpu.needs["cpu"].bytes
    assert on_cpu.ram_bytes > on_cpu.weight_bytes["bnb_4bit"] + OVERHEAD["cpu"]


def test_more_of_everything_needs_more_memory() -> None:
    """The peak grows with rows, answers and prompts; a single row is the least."""
    plain = llama(make_spec()).needs["cuda"]
    assert plain.least < plain.bytes < plain.most
    for changed in (
        llama(make_spec(max_new_tokens=400)),
        llama(make_spec(prompts={"search": 400})),
        llama(make_spec(system_prompt="Be kind. " * 400)),
        llama(make_spec(quantization="none")),
    ):
        assert changed.needs["cuda"].bytes > plain.bytes
    peak = max(phase.bytes for phase in plain.phases if not phase.optional)
    assert plain.bytes == peak
    assert all(phase.bytes == sum(phase.parts.values()) for phase in plain.phases)


def test_workers_that_it_fits() -> None:
    """8 billion parameters in 4 bits: not on 6 GB, in small batches on 8.0, at ease on 24."""
    devices = [
        {"kind": "cuda", "name": "NVIDIA Nought", "memory_bytes": 6_000_000_000},
        {"kind": "cuda", "name": "NVIDIA L4", "memory_bytes": 24_000_000_000},
        {"kind": "cuda", "name": "NVIDIA H200", "memory_bytes": 141_000_000_000},
        {"kind": "cpu", "name": "Unheard-of", "memory_bytes": 2_000_000_000},
    ]
    found = llama(make_spec(trials=100), devices)
    assert [fit.fits for fit in found.fits] == [False, True, True, False]
    assert found.fits[0].seconds is None is found.fits[3].seconds  # nobody measured them
    slow, fast = found.fits[1].seconds, found.fits[2].seconds
    assert slow is not None and fast is not None and slow > fast > 60
    assert found.seconds == fast
    assert "fits on NVIDIA L4, NVIDIA H200; disk 16 GB; about" in found.summary
    tight = {"kind": "cuda", "name": "Tight", "memory_bytes": found.needs["cuda"].least + 1}
    (fit,) = llama(make_spec(), [tight]).fits
    assert fit.fits and fit.smaller_batches
    assert "no worker that is here now" in llama(make_spec(), devices[:1]).summary
    assert not llama(make_spec(device="cpu"), devices[:3]).fits


def test_time_grows_with_the_work() -> None:
    """Twice the trials take about twice as long; two workers share them."""
    device = [{"kind": "cuda", "name": "NVIDIA H200", "memory_bytes": 141_000_000_000}]
    times = [
        llama(make_spec(trials=trials, parallelism=workers), device).seconds
        for trials, workers in ((1000, 1), (2000, 1), (2000, 2))
    ]
    one, two, shared = (time or 0.0 for time in times)
    assert 1.8 * one < two < 2 * one and shared == pytest.approx(one, rel=0.01)


def test_experts_are_not_quantised() -> None:
    """bitsandbytes packs linear modules; experts are one parameter of three dimensions."""
    tensors = [Tensor("model.embed_tokens.weight", "BF16", (1000, 64))]
    tensors += [Tensor(f"model.layers.0.mlp.experts.{e}.{name}.weight", "BF16", shape)
                for e in range(8)
                for name, shape in {"up_proj": (32, 64), "gate_proj": (32, 64),
                                    "down_proj": (64, 32)}.items()]  # fmt: skip
    tensors.append(Tensor("model.layers.0.mlp.gate.weight", "BF16", (8, 64)))
    tensors.append(Tensor("model.layers.0.self_attn.o_proj.weight", "BF16", (64, 64)))
    config = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 1000, "num_experts": 8,
              "num_attention_heads": 4, "num_experts_per_tok": 2}  # fmt: skip
    found = figures(make_spec(), Checkpoint(config, tensors))
    experts = 8 * 3 * 32 * 64
    assert found.weight_bytes["bnb_4bit"] == round(4096 * NF4_BYTES) + NF4_TABLES + 2 * (
        experts + 64_512
    )
    assert found.active == found.parameters - experts * 6 // 8
    assert any("42% of the parameters are fused experts" in text for text in found.warnings)
    assert not figures(make_spec(quantization="none"), Checkpoint(config, tensors)).warnings
    routed = make_spec(quantization="none", methods=["mpoa", "router"])
    assert not figures(routed, Checkpoint(config, tensors)).warnings
    dense = [tensor for tensor in tensors if "experts" not in tensor.name]
    (refused,) = figures(routed, Checkpoint(config, dense)).warnings
    assert refused.startswith("method router needs a mixture of experts")


def test_what_is_loaded_of_a_checkpoint() -> None:
    """A tied head and layers that predict further tokens are not; an image tower is."""
    names: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (1000, 64),
        "lm_head.weight": (1000, 64),
        "model.layers.0.self_attn.o_proj.weight": (64, 64),
        "model.layers.1.self_attn.o_proj.weight": (64, 64),  # beyond num_hidden_layers
        "mtp.layers.0.self_attn.o_proj.weight": (64, 64),
        "model.vision_tower.encoder.layers.7.mlp.fc1.weight": (96, 48),
    }
    tensors = [Tensor(name, "BF16", shape) for name, shape in names.items()]
    text = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 1000}
    config = {"text_config": text, "tie_word_embeddings": True}
    found = figures(make_spec(), Checkpoint(config, tensors))
    assert found.parameters == 64_000 + 64 * 64 + 96 * 48
    assert found.disk_bytes > 2 * (2 * 64_000 + 3 * 64 * 64 + 96 * 48)  # exports copy it all
    free = figures(make_spec(), Checkpoint({**config, "tie_word_embeddings": False}, tensors))
    assert free.parameters - found.parameters == 64_000


def test_weights_that_come_packed() -> None:
    """Eight-bit floats are loaded as they are, whatever the job's quantisation."""
    tensors = [
        Tensor("model.layers.0.self_attn.o_proj.weight", "F8_E4M3", (64, 64)),
        Tensor("model.embed_tokens.weight", "BF16", (1000, 64)),
    ]
    config = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 1000,
              "quantization_config": {"quant_method": "fp8"}}  # fmt: skip
    found = figures(make_spec(), Checkpoint(config, tensors))
    assert set(found.weight_bytes.values()) == {64 * 64 + 2 * 64_000}
    assert any("already quantised" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    ("files", "read"),
    [
        (["model.safetensors", "consolidated.safetensors"], ["model.safetensors"]),
        (["adapter_model.safetensors", "model-00002-of-00002.safetensors",
          "model-00001-of-00002.safetensors"],
         ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]),
        (["weights.safetensors", "other/model.safetensors"], ["weights.safetensors"]),
    ],
)  # fmt: skip
def test_the_files_that_transformers_loads(files: list[str], read: list[str]) -> None:
    assert checkpoints.weight_files(files) == read


def test_no_decoder_is_not_supported() -> None:
    for config, supported in (
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, False),
        ({"architectures": ["BertForMaskedLM"]}, False),
        ({"architectures": ["LlamaForSequenceClassification"]}, False),
        ({"architectures": ["WhisperForCausalLM"]}, False),
        ({"architectures": ["NobodysForCausalLM"]}, None),
        ({"architectures": ["GptOssForCausalLM"]}, True),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, True),
        ({"architectures": ["Qwen3ForCausalLM"]}, True),
        ({}, None),
    ):
        assert figures(make_spec(), Checkpoint(config, [])).supported is supported


def test_headers_agree_with_safetensors(models_folder: Path) -> None:
    from safetensors import safe_open

    ours = checkpoints.from_folder(models_folder / "tiny")
    with safe_open(models_folder / "tiny" / "model.safetensors", "np") as file:
        theirs = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert {tensor.name: tensor.shape for tensor in ours.tensors} == theirs


def test_the_hub_gives_the_same_without_the_weights(
    asking: Settings, hub: hub_server.Hub, farm: Settings
) -> None:
    assert estimate(make_spec(model="acme/tiny"), asking) == estimate(make_spec(), farm)
    resolved = [path for path in hub.asked if "/resolve/" in path]
    assert resolved and all(hub_server.COMMIT in path for path in resolved)


def test_no_hub_no_estimate(asking: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at(monkeypatch, "http://127.0.0.1:1")
    with pytest.raises(Invalid, match="could not be asked") as caught:
        estimate(make_spec(model="acme/tiny"), asking)
    assert caught.value.field == "model"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", b""),
        ("model.safetensors", b"\xff" * 16),
        ("model.safetensors", b"\x02\x00\x00\x00\x00\x00\x00\x00[]"),
        ("model.safetensors", b"\x0a\x00\x00\x00\x00\x00\x00\x00" + b'{"a": {}} '),
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", b"\xff\xfe"),
    ],
)
def test_broken_files_are_the_models_fault(
    farm: Settings, models_folder: Path, file: str, content: bytes
) -> None:
    write_model(models_folder / "broken")
    (models_folder / "broken" / file).write_bytes(content)
    with pytest.raises(Invalid) as caught:
        estimate(make_spec(model="broken"), farm)
    assert caught.value.field == "model"


def test_odd_configs_do_not_break_it(farm: Settings, models_folder: Path) -> None:
    folder = write_model(models_folder / "odd")
    (folder / "config.json").write_text(
        '{"architectures": null, "text_config": {"hidden_size": 8, "num_hidden_layers": 3},'
        ' "auto_map": {"x": "y"}, "quantization_config": {}}'
    )
    found = estimate(make_spec(model="odd"), farm)
    assert (found.architecture, found.supported, found.layers) == ("unknown", None, 3)
    assert any("own code" in warning for warning in found.warnings)


def test_neither_torch_nor_web_is_loaded() -> None:
    """The API imports these; a process that did so must not have loaded what only workers need."""
    code = (
        "import pkgutil, sys, importlib, jobs\n"
        "for m in pkgutil.iter_modules(jobs.__path__): importlib.import_module('jobs.' + m.name)\n"
        "bad = {'torch', 'transformers', 'optuna', 'fastapi', 'worker', 'engine'}\n"
        "sys.exit(str(sorted(bad & set(sys.modules))) if bad & set(sys.modules) else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    spec = (
        "import pkgutil, sys, importlib, jobs.spec\n"
        "for m in pkgutil.iter_modules(jobs.spec.__path__):\n"
        "    importlib.import_module('jobs.spec.' + m.name)\n"
        "sys.exit(1 if {'sqlalchemy', 'celery', 'redis', 'torch'} & set(sys.modules) else 0)"
    )
    assert subprocess.run([sys.executable, "-c", spec], check=False).returncode == 0


def llama(spec: JobSpec, devices: Sequence[dict[str, Any]] = ()) -> Estimate:
    """The estimate of `spec` on Llama 3.1 8B by its published shapes."""
    d, ff, kv, v = 4096, 14_336, 1024, 128_256
    tensors = [
        Tensor(f"{name}.weight", "BF16", (v, d)) for name in ("model.embed_tokens", "lm_head")
    ]
    attention = {"q_proj": (d, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, d)}
    shapes: dict[str, tuple[int, ...]] = {
        **{f"self_attn.{name}": shape for name, shape in attention.items()},
        "mlp.gate_proj": (ff, d), "mlp.up_proj": (ff, d), "mlp.down_proj": (d, ff),
        "input_layernorm": (d,), "post_attention_layernorm": (d,),
    }  # fmt: skip
    for layer in range(32):
        for name, shape in shapes.items():
            tensors.append(Tensor(f"model.layers.{layer}.{name}.weight", "BF16", shape))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": d,
        "intermediate_size": ff,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": v,
    }
    return figures(spec, Checkpoint(config, tensors), devices=devices)


def test_a_large_model_by_its_shapes() -> None:
    """8.03e9 parameters, about 5.7 GB in nf4, and about 9 GB while 100 prompts are answered."""
    found = llama(make_spec())
    assert found.parameters == pytest.approx(8.03e9, rel=1e-3)
    assert found.active == pytest.approx(7.5e9, rel=1e-2)  # without the embedding table
    assert found.weight_bytes["none"] == pytest.approx(16.06e9, rel=1e-3)
    assert found.weight_bytes["bnb_4bit"] == pytest.approx(5.7e9, rel=0.02)
    # 100 rows of 164 tokens at 131 072 bytes, bases of 4 · 32 · (d + 2n) in 64 writers
    answers = next(phase for phase in found.needs["cuda"].phases if phase.name == "answers")
    assert answers.parts["cache"] == 100 * 164 * 131_072
    bases = 32 * 4 * 32 * ((4096 + 2 * 4096) + (4096 + 2 * 14_336))
    assert answers.parts["bases"] == pytest.approx(bases, rel=0.02)
    assert 8e9 < found.gpu_bytes < 10e9
