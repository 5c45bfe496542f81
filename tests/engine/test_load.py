"""Loading from folders and from a hub that really answers over HTTP."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from engine.checkpoint import open_checkpoint
from engine.errors import EngineError
from engine.load import load, load_folder
from engine.loading.precision import dtype_chain
from engine.report import Silent
from jobs.spec.protocol import Prepare
from tests.engine.conftest import Save, request
from tests.engine.hub_server import COMMIT, Hub, serve

IDS = torch.tensor([[5, 6, 7, 8]])


class Recorded(Silent):
    """A report that remembers."""

    def __init__(self) -> None:
        self.progresses: list[tuple[str, float, float]] = []
        self.logs: list[str] = []

    def progress(self, phase: str, done: float = 0, total: float = 0, text: str = "") -> None:
        self.progresses.append((phase, done, total))

    def log(self, text: str, level: str = "info") -> None:
        self.logs.append(text)


@pytest.fixture(scope="module")
def folder(save: Save) -> Path:
    return save("llama", hidden_size=128, intermediate_size=256, head_dim=32, num_hidden_layers=4)


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copied"))


def fails(prepare: Prepare) -> EngineError:
    with pytest.raises(EngineError) as caught:
        load(prepare, Silent())
    assert caught.value.mend
    return caught.value


# --- folders ------------------------------------------------------------------------------------


def test_a_folder(folder: Path) -> None:
    loaded = load(request(folder), Silent())
    true = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(loaded.model(IDS).logits, true(IDS).logits)
    assert loaded.dtype == torch.float32 and loaded.device.type == "cpu"
    assert loaded.source == folder and loaded.commit is None and not loaded.warnings
    parameters = sum(p.numel() for p in true.parameters())
    assert loaded.source_bytes == 2 * parameters
    assert loaded.weight_bytes >= 4 * parameters
    assert loaded.tokenizer.padding_side == "left" and loaded.tokenizer.pad_token_id is not None
    assert loaded.device_name and "torch" in loaded.versions


@pytest.mark.parametrize("quantization, share", [("bnb_4bit", 0.35), ("bnb_8bit", 0.55)])
def test_quantised_weights_are_small_and_stay_sound(
    quantization: str, share: float, folder: Path
) -> None:
    loaded = load(request(folder, quantization=quantization), Silent())
    model = loaded.model
    packed = [m for m in model.modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")]
    assert len(packed) == 4 * 7
    outside = sum(
        p.nbytes for n, p in model.named_parameters() if ".layers." not in n or "norm" in n
    )
    linear = sum(m.in_features * m.out_features for m in packed)
    assert loaded.weight_bytes - outside < share * 2 * linear
    with torch.no_grad():
        first, second = model(IDS).logits, model(IDS).logits
    assert torch.isfinite(first).all() and torch.equal(first, second)


def test_nf4_uses_double_quantisation_and_no_repacking(folder: Path) -> None:
    model = load(request(folder, quantization="bnb_4bit"), Silent()).model
    layers = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    for layer in layers:
        state = layer.weight.quant_state
        assert state.quant_type == "nf4" and state.nested
        assert layer.support_avx512bf16_for_cpu is False


def test_asked_dtype_and_load_folder(folder: Path) -> None:
    assert load(request(folder, dtype="bfloat16"), Silent()).dtype == torch.bfloat16
    model, tokenizer = load_folder(folder, torch.device("cpu"), torch.float32)
    assert model.dtype == torch.float32 and tokenizer.pad_token_id is not None


def test_dtype_chain() -> None:
    cpu = torch.device("cpu")
    assert dtype_chain("auto", cpu) == [torch.float32]
    assert dtype_chain("auto", cpu, "bnb_4bit") == [torch.bfloat16, torch.float32]
    assert dtype_chain("float32", cpu, "bnb_4bit") == [torch.float32]
    assert dtype_chain("float32", cpu) == [torch.float32]
    assert dtype_chain("float16", cpu) == [torch.float16, torch.bfloat16, torch.float32]


def test_overflow_falls_back_to_the_next_dtype(copied: Path) -> None:
    """Weights of 1e6 are infinite in float16 and fine in bfloat16."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(copied / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1e6
    tensors["model.layers.0.mlp.down_proj.weight"] *= 1e-6
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    report = Recorded()
    loaded = load(request(copied, dtype="float16"), report)
    assert loaded.dtype == torch.bfloat16
    assert any("float16: NaN or infinity" in line for line in loaded.warnings)
    assert report.logs == loaded.warnings


def test_what_a_folder_may_lack(copied: Path, tmp_path: Path) -> None:
    assert fails(request(tmp_path / "absent")).reason == "model_not_found"
    weights = copied / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    assert "damaged" in fails(request(copied)).message
    weights.unlink()
    assert fails(request(copied)).reason == "model_not_found"
    torch.save({}, copied / "pytorch_model.bin")
    found = fails(request(copied))
    assert found.reason == "unsafe_weights" and "pytorch_model.bin" in found.message
    (copied / "config.json").unlink()
    assert "config.json" in fails(request(copied)).message


def test_an_index_cannot_leave_the_folder(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    index = {"weight_map": {"a": "../../secret.safetensors"}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    assert fails(request(copied)).reason == "unsafe_weights"


def test_code_of_a_repository_is_never_run(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    config |= {"model_type": "homemade", "auto_map": {"AutoConfig": "evil.Config"}}
    config |= {"architectures": ["Homemade"]}
    (copied / "config.json").write_text(json.dumps(config))
    (copied / "evil.py").write_text("raise SystemExit('this was run')")
    assert fails(request(copied)).reason == "unsupported_architecture"


def test_a_gpu_that_is_not_there(folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    found = fails(request(folder, device="cuda"))
    assert found.reason == "bad_request" and "device" in found.message


def test_shards_are_read(save: Save) -> None:
    found = open_checkpoint(save("llama", max_shard_size="40KB"), "tiny")
    assert len(found.files) > 1
    assert found.tensors["model.norm.weight"].shape == (32,)


# --- the hub ------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


def named(model: str, **more: object) -> Prepare:
    return request(Path("unused"), path=None, model=model, **more)


def test_a_model_from_the_hub(hub: Hub, save: Save) -> None:
    source = save("llama", max_shard_size="40KB")
    (source / "pytorch_model.bin").write_bytes(b"never fetched")
    (source / "modeling.py").write_text("raise SystemExit")
    (source / "original").mkdir()
    (source / "original" / "consolidated.safetensors").write_bytes(b"never fetched")
    (source / "LICENSE").write_text("terms")
    hub.folders["owner/tiny"] = source
    report = Recorded()
    loaded = load(named("owner/tiny"), report)
    assert loaded.commit == COMMIT and loaded.source.name == COMMIT
    fetched = {p.name for p in loaded.source.iterdir()}
    assert {"config.json", "tokenizer.json", "LICENSE"} <= fetched
    assert not fetched & {"pytorch_model.bin", "modeling.py", "original"}
    for path in source.glob("*.safetensors"):
        assert (loaded.source / path.name).read_bytes() == path.read_bytes()
    done = [(d, t) for phase, d, t in report.progresses if phase == "download" and t]
    assert done and done[-1][0] == done[-1][1] > 100_000

    # Again: nothing but questions; and with the hub away, the copy in the cache.
    hub.asked.clear()
    assert load(named("owner/tiny", revision=COMMIT), Silent()).commit == COMMIT
    assert not any("resolve" in path and path.endswith(".safetensors") for path in hub.asked)
    hub.statuses["owner/tiny"] = (503, "")
    away = load(named("owner/tiny"), Silent())
    assert away.commit == COMMIT and "cache" in away.warnings[0]


@pytest.mark.parametrize(
    "status, code, reason",
    [
        (401, "", "gated_model"),
        (401, "GatedRepo", "gated_model"),
        (403, "GatedRepo", "gated_model"),
        (403, "", "gated_model"),
        (404, "RepoNotFound", "model_not_found"),
        (404, "", "model_not_found"),
        (500, "", "hub_unreachable"),
        (503, "", "hub_unreachable"),
    ],
)
def test_what_the_hub_may_answer(hub: Hub, status: int, code: str, reason: str) -> None:
    hub.statuses["owner/tiny"] = (status, code)
    found = fails(named("owner/tiny"))
    assert found.reason == reason and "owner/tiny" in found.message


def test_gated_models_open_with_the_token(
    hub: Hub, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.folders["owner/tiny"] = save("llama")
    hub.gated.add("owner/tiny")
    assert fails(named("owner/tiny")).reason == "gated_model"
    monkeypatch.setenv("HF_TOKEN", "good")
    assert load(named("owner/tiny"), Silent()).commit == COMMIT


def test_unknown_names_and_revisions(hub: Hub, save: Save) -> None:
    assert fails(named("owner/none")).reason == "model_not_found"
    hub.folders["owner/tiny"] = save("llama")
    found = fails(named("owner/tiny", revision="v9"))
    assert found.reason == "model_not_found" and "revision" in found.message


def test_pickles_on_the_hub_are_not_fetched(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "config.json").write_text("{}")
    (tmp_path / "repo" / "pytorch_model.bin").write_bytes(b"x")
    hub.folders["owner/tiny"] = tmp_path / "repo"
    assert fails(named("owner/tiny")).reason == "unsafe_weights"
    assert not any("resolve" in path for path in hub.asked)


def test_no_hub_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with serve() as hub:
        gone = hub.url
    monkeypatch.setenv("HF_ENDPOINT", gone)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert fails(named("owner/tiny")).reason == "hub_unreachable"


def test_the_environment_names_hub_cache_and_token(hub: Hub, save: Save, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME and HF_TOKEN as a child process of its own reads them."""
    hub.folders["owner/tiny"] = save("llama")
    hub.gated.add("owner/tiny")
    code = (
        "from engine import hub; from engine.report import Silent;"
        "print(hub.fetch('owner/tiny', None, Silent(), print)[0])"
    )
    home = tmp_path / "home"
    more = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": "good"}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, **more, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(home)
