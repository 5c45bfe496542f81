"""Weights that do not lie on one device: offloaded, here really to the disk, the same tokens."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from demo.vocabulary import build_tokenizer
from engine.decode import Decoder, Row
from engine.dequantise import present, weight_of
from engine.errors import EngineError
from engine.load import load, load_folder
from engine.loading.placement import (
    FOLDER,
    check_placed,
    choose_device,
    device_of,
    input_device,
    placement,
)
from engine.loading.size import parameters, weight_bytes
from engine.loading.weights import read_config, read_model
from engine.report import Silent
from tests.engine.conftest import Save, request
from tests.engine.families import FUSED, tiny

CPU = torch.device("cpu")
PROMPTS = [[1, 9, 10, 11], [1, 12, 13, 14, 15, 16]]


def offloaded(folder: Path, share: float, total: int) -> Any:
    """The model with `share` of its bytes in memory and the rest on the disk."""
    place = placement("offload", CPU, {"cpu": int(share * total)})
    return read_model(folder, read_config(folder, "tiny"), "tiny", torch.float32, place)


def answers(model: Any) -> list[list[int]]:
    decoder = Decoder(model, build_tokenizer(), None)
    decoder.batch_size = len(PROMPTS)
    found = decoder.answers([Row(ids) for ids in PROMPTS], [], 12, Silent(), "answers")
    return [answer.tokens for answer in found]


@pytest.mark.parametrize("share", [0.05, 0.9])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_offloaded_models_answer_alike(family: str, share: float, save: Save) -> None:
    folder = save(family, vocab_size=1024)
    plain, _ = load_folder(folder, CPU, torch.float32)
    model = offloaded(folder, share, weight_bytes(plain))
    away = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert away and "disk" in model.hf_device_map.values()
    assert any("embed" in name or "wte" in name for name in away) == (share < 0.5)
    assert input_device(model) == CPU
    assert answers(model) == answers(plain)
    assert weight_bytes(model) == weight_bytes(plain) and parameters(model) == parameters(plain)


def test_offloaded_weights_can_be_read(save: Save) -> None:
    folder = save("gpt2")
    plain, _ = load_folder(folder, CPU, torch.float32)
    model = offloaded(folder, 0.05, weight_bytes(plain))
    for (name, module), (_, true) in zip(model.named_modules(), plain.named_modules(), strict=True):
        if name.endswith("c_proj"):
            assert module.weight.is_meta and device_of(module) == CPU
            assert torch.equal(weight_of(module), true.weight.T)  # GPT-2 keeps (n, d)
            with present(module):
                assert torch.equal(module.bias, true.bias)
            assert module.weight.is_meta


def test_single_and_auto_on_a_cpu_offload_nothing(save: Save) -> None:
    folder = save("llama")
    assert placement("auto", CPU) == placement("single", CPU) == {"device_map": {"": CPU}}
    for device_map in ("auto", "offload"):  # there is room enough for a tiny model
        loaded = load(request(folder, device_map=device_map), Silent())
        assert not any(p.is_meta for p in loaded.model.parameters())
        assert loaded.device == CPU


def test_what_does_not_go_together(save: Save, tmp_path: Path) -> None:
    folder = save("llama")
    with pytest.raises(EngineError) as caught:
        load(request(folder, device_map="offload", quantization="bnb_4bit"), Silent())
    assert caught.value.reason == "bad_request" and "device_map" in caught.value.message

    experts = tiny("mixtral", FUSED["mixtral"])
    experts.save_pretrained(tmp_path)
    model = offloaded(tmp_path, 0.6, weight_bytes(experts))
    with pytest.raises(EngineError) as caught:
        check_placed(model, "offload")
    assert "experts" in caught.value.message and caught.value.mend


def test_auto_means_gpus_alone(save: Save) -> None:
    folder = save("llama")
    plain, _ = load_folder(folder, CPU, torch.float32)
    check_placed(plain, "auto")
    model = offloaded(folder, 0.6, weight_bytes(plain))
    check_placed(model, "offload")
    with pytest.raises(EngineError) as caught:
        check_placed(model, "auto")
    assert caught.value.reason == "out_of_memory" and "offload" in caught.value.mend


def test_folders_of_dead_processes_go() -> None:
    dead = Path(tempfile.mkdtemp(prefix=f"{FOLDER}-4194305-"))  # above the largest pid of Linux
    own = placement("offload", CPU, {"cpu": 1})["offload_folder"]
    again = placement("offload", CPU, {"cpu": 1})["offload_folder"]
    assert not dead.exists() and Path(own).is_dir() and Path(again).is_dir()
    for folder in (own, again):
        Path(folder).rmdir()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_and_the_host(save: Save) -> None:
    device = choose_device("cuda")
    folder = save("llama", vocab_size=1024)
    plain, _ = load_folder(folder, device, torch.float32)
    total = weight_bytes(plain)
    place = placement("offload", device, {0: total // 2, "cpu": total})
    model = read_model(folder, read_config(folder, "tiny"), "tiny", torch.float32, place)
    assert {str(at) for at in model.hf_device_map.values()} == {"0", "cpu"}
    assert input_device(model) == device
    assert answers(model) == answers(plain)
