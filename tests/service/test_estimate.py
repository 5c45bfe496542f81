"""Estimates from headers alone, against safetensors and against sizes counted by hand."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import checkpoints
from jobs.estimate import NF4_BYTES, OVERHEAD_BYTES, Estimate, estimate
from jobs.problems import Invalid
from jobs.settings import Settings
from tests.engine import hub_server
from tests.service.builders import make_spec, write_model
from tests.service.test_models import asking, hub, point_at

__all__ = ["asking", "hub"]  # fixtures

HIDDEN, LAYERS = 16, 2
QUANTISED = LAYERS * (HIDDEN * HIDDEN + 4 * HIDDEN * HIDDEN)
REST = 100 * HIDDEN + LAYERS * HIDDEN


def test_sizes_counted_by_hand(farm: Settings) -> None:
    found = estimate(make_spec(quantization="bnb_4bit", max_new_tokens=36), farm)
    assert (found.parameters, found.layers, found.hidden) == (QUANTISED + REST, LAYERS, HIDDEN)
    assert found.architecture == "LlamaForCausalLM" and found.supported
    weights = {
        "none": 2 * (QUANTISED + REST),
        "bnb_8bit": QUANTISED + 2 * REST,
        "bnb_4bit": round(QUANTISED * NF4_BYTES) + 2 * REST,
    }
    assert found.weight_bytes == weights
    # 32 rows of 100 tokens; one key/value head of 8; two copies of 100 float32 log-probabilities
    cache, logits, activations = 32 * 100 * 2 * 2 * 8 * 2, 2 * 32 * 100 * 4, 32 * 100 * 16 * 8 * 2
    expected = weights["bnb_4bit"] + cache + logits + activations + OVERHEAD_BYTES
    assert found.gpu_bytes == expected
    assert found.disk_bytes > 2 * (QUANTISED + REST)
    on_cpu = estimate(make_spec(device="cpu"), farm)
    assert on_cpu.gpu_bytes == 0 and on_cpu.ram_bytes > on_cpu.weight_bytes["bnb_4bit"]


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


def test_a_large_model_by_its_shapes(make_settings: Callable[..., Settings]) -> None:
    """Llama 3.1 8B by its published shapes: 8.03e9 parameters, about 5.6 GB in nf4."""
    d, ff, kv, v = 4096, 14_336, 1024, 128_256
    tensors = [checkpoints.Tensor("model.embed_tokens.weight", "BF16", (v, d))]
    tensors.append(checkpoints.Tensor("lm_head.weight", "BF16", (v, d)))
    for layer in range(32):
        for name, shape in {
            "q": (d, d),
            "k": (kv, d),
            "v": (kv, d),
            "o": (d, d),
            "gate": (ff, d),
            "up": (ff, d),
            "down": (d, ff),
            "norm1": (d,),
            "norm2": (d,),
        }.items():
            tensors.append(checkpoints.Tensor(f"model.layers.{layer}.{name}", "BF16", shape))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": d,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": v,
    }
    from jobs.estimate import figures

    found: Estimate = figures(make_spec(), checkpoints.Checkpoint(config, tensors))
    assert found.parameters == pytest.approx(8.03e9, rel=1e-3)
    assert found.weight_bytes["none"] == pytest.approx(16.06e9, rel=1e-3)
    assert found.weight_bytes["bnb_4bit"] == pytest.approx(5.7e9, rel=0.02)
    assert 6e9 < found.gpu_bytes < 9e9
