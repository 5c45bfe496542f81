"""Sources that come quantised, written by hand from their formats' definitions, bit by bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from demo.vocabulary import build_tokenizer
from engine.anatomy import survey
from engine.dequantise import weight_of
from engine.errors import EngineError
from engine.load import Loaded, load, load_folder
from engine.report import Silent
from tests.engine.conftest import Save, request
from tests.engine.families import FUSED, tiny

IDS = torch.tensor([[5, 6, 7, 8]])
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # and the same with a sign
CPU = torch.device("cpu")
COMPRESSED = find_spec("compressed_tensors") is not None

Pack = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]  # W -> (tensors by suffix, W again)


def pack_into(
    folder: Path, quantization: dict[str, Any], pack: Pack, of: Callable[[str], bool]
) -> dict[str, Tensor]:
    """Pack the tensors that `of` names; what each of them must be when it is loaded."""
    tensors: dict[str, Tensor] = {}
    truth: dict[str, Tensor] = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if of(name):
            parts, truth[name] = pack(value.float())
            base = name.removesuffix(".weight")
            tensors.update({base + suffix: part.contiguous() for suffix, part in parts.items()})
        else:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    return truth


def linear(name: str) -> bool:
    return ".layers." in name and name.endswith("proj.weight")


def fp8(block: int) -> Pack:
    """DeepSeek-V3's: e4m3 codes, a float32 scale for each block × block."""

    def pack(W: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        d, n = W.shape
        scales = torch.rand(d // block, n // block) / 100
        whole = scales.repeat_interleave(block, 0).repeat_interleave(block, 1)
        codes = (W / whole).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {".weight": codes, ".weight_scale_inv": scales}, codes.float() * whole

    return pack


def gptq(bits: int, group: int, offset: int, act_order: bool) -> Pack:
    """GPTQ: element by element into int32 words, lowest bits first."""

    def pack(W: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        d, n = W.shape
        count, top, per = n // group, 1 << bits, 32 // bits
        g_idx = torch.arange(n) // group
        if act_order:
            g_idx = g_idx[torch.randperm(n)]
        scales = torch.rand(count, d).half() / 10
        codes = torch.randint(0, top, (n, d))
        zeros = torch.randint(1, top, (count, d))
        qweight = [[0] * d for _ in range(n // per)]
        for i, row in enumerate(codes.tolist()):
            for o, code in enumerate(row):
                qweight[i // per][o] |= code << (bits * (i % per))
        qzeros = [[0] * (d // per) for _ in range(count)]
        for g, row in enumerate(zeros.tolist()):
            for o, zero in enumerate(row):
                qzeros[g][o // per] |= (zero - offset) << (bits * (o % per))
        truth = torch.empty(d, n)
        for i in range(n):
            g = int(g_idx[i])
            truth[:, i] = scales[g].float() * (codes[i] - zeros[g])
        words = {".qweight": int32(qweight), ".qzeros": int32(qzeros)}
        return {**words, ".scales": scales, ".g_idx": g_idx.to(torch.int32)}, truth

    return pack


def awq(group: int) -> Pack:
    """AutoAWQ's `gemm`: eight outputs to a word, the even ones in its lower half."""

    def pack(W: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        d, n = W.shape
        scales = torch.rand(n // group, d).half() / 10
        codes, zeros = torch.randint(0, 16, (n, d)), torch.randint(0, 16, (n // group, d))

        def words(table: Tensor) -> Tensor:
            rows = []
            for values in table.tolist():
                row = []
                for first in range(0, d, 8):
                    even, odd = values[first : first + 8 : 2], values[first + 1 : first + 8 : 2]
                    row.append(sum(v << (4 * k) for k, v in enumerate(even + odd)))
                rows.append(row)
            return int32(rows)

        truth = torch.empty(d, n)
        for i in range(n):
            truth[:, i] = scales[i // group].float() * (codes[i] - zeros[i // group])
        return {".qweight": words(codes), ".qzeros": words(zeros), ".scales": scales}, truth

    return pack


def fp8_rows(W: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """compressed-tensors `float-quantized`: e4m3 codes, a bfloat16 scale for each output."""
    scales = (W.abs().amax(1, keepdim=True) / 448).bfloat16()
    codes = (W / scales.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {".weight": codes, ".weight_scale": scales}, codes.float() * scales.float()


def int4(W: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """compressed-tensors `pack-quantized`: codes + 8, eight inputs to a word, scales for 32."""
    d, n = W.shape
    grouped = W.reshape(d, n // 32, 32)
    scales = (grouped.abs().amax(-1) / 7).bfloat16()
    codes = (grouped / scales.float()[..., None]).round().clamp(-8, 7)
    stored = (codes.reshape(d, n) + 8).long()
    words = [[sum(v << (4 * k) for k, v in enumerate(row[i : i + 8])) for i in range(0, n, 8)]
             for row in stored.tolist()]  # fmt: skip
    truth = (codes * scales.float()[..., None]).reshape(d, n)
    shape = torch.tensor([d, n])
    return {".weight_packed": int32(words), ".weight_scale": scales, ".weight_shape": shape}, truth


def mxfp4(W: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """OCP MX: e2m1 codes, two to a byte, and a power of two for each 32 along the inputs."""
    E, n, d = W.shape  # gpt-oss keeps its experts transposed
    codes = torch.randint(0, 16, (E, d, n // 32, 32))
    exponents = torch.randint(120, 126, (E, d, n // 32))
    values = torch.tensor([*E2M1, *(-v for v in E2M1)])[codes]
    truth = (values * 2.0 ** (exponents - 127)[..., None]).reshape(E, d, n).transpose(1, 2)
    packed = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    return {"_blocks": packed, "_scales": exponents.to(torch.uint8)}, truth


def int32(rows: list[list[int]]) -> Tensor:
    """Words of 32 bits as int32, as numpy's view would give them."""
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)


CONFIGS: dict[str, tuple[dict[str, Any], Pack, str]] = {
    "fp8": ({"quant_method": "fp8", "weight_block_size": [16, 16],
             "modules_to_not_convert": ["lm_head"]}, fp8(16), "FP8"),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False},
             gptq(4, 16, 1, False), "GPTQ"),
    "gptq, act order": ({"quant_method": "gptq", "bits": 8, "group_size": 16, "desc_act": True,
                         "checkpoint_format": "gptq_v2"}, gptq(8, 16, 0, True), "GPTQ"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm",
             "zero_point": True}, awq(16), "AWQ"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_dequantised_when_loaded(name: str, save: Save) -> None:
    quantization, pack, label = CONFIGS[name]
    torch.manual_seed(1)
    folder = save("llama", torch.bfloat16, num_hidden_layers=2)
    truth = pack_into(folder, quantization, pack, linear)
    assert len(truth) == 2 * 7
    loaded = load(request(folder, quantization="bnb_4bit"), Silent())
    parameters = dict(loaded.model.named_parameters())
    for key, W in truth.items():
        assert torch.equal(parameters[key], W), key
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    assert loaded.packed == label and loaded.quantization == "none"
    (statement,) = loaded.warnings
    assert f"({label})" in statement and "dequantised to float32" in statement
    assert "bnb_4bit is not applied" in statement and "adapter" in statement
    assert survey(loaded.model).coverage == 1.0
    assert loaded.model.generation_config.eos_token_id == 2
    again, _ = load_folder(folder, CPU, torch.float32)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, loaded.model(IDS).logits)


def test_experts_in_mxfp4(tmp_path: Path) -> None:
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "intermediate_size": 32}  # blocks of 32 along the inputs
    tiny("gpt_oss", FUSED["gpt_oss"], **sizes).bfloat16().save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    skipped = ["self_attn", "router", "embed_tokens", "lm_head"]
    config = {"quant_method": "mxfp4", "modules_to_not_convert": skipped}
    truth = pack_into(tmp_path, config, mxfp4, lambda name: name.endswith("_proj"))
    assert len(truth) == 3 * 2
    loaded = load(request(tmp_path, dtype="bfloat16"), Silent())
    parameters = dict(loaded.model.named_parameters())
    for key, W in truth.items():
        assert torch.equal(parameters[key].float(), W), key  # 4 bits times a power of two: exact
    assert "MXFP4" in loaded.warnings[0] and "bfloat16" in loaded.warnings[0]


@pytest.mark.parametrize(
    ("quantization", "other", "bits"), [("bnb_4bit", "bnb_8bit", 4), ("bnb_8bit", "none", 8)]
)
def test_bitsandbytes_stays_packed(
    quantization: str, other: str, bits: int, save: Save, tmp_path: Path
) -> None:
    folder = save("llama", hidden_size=64, intermediate_size=128)
    first = load(request(folder, quantization=quantization), Silent())
    first.model.save_pretrained(tmp_path)
    first.tokenizer.save_pretrained(tmp_path)
    for wanted in (quantization, other):
        loaded = load(request(tmp_path, quantization=wanted), Silent())
        assert loaded.quantization == quantization
        assert loaded.packed == f"bitsandbytes {bits} bit"
        assert loaded.source_bytes == first.source_bytes
        assert loaded.weight_bytes == first.weight_bytes
        down = [m.model.layers[1].mlp.down_proj for m in (first.model, loaded.model)]
        assert torch.equal(weight_of(down[0]), weight_of(down[1]))
        with torch.no_grad():
            assert torch.equal(loaded.model(IDS).logits, first.model(IDS).logits)
        assert ("not applied" in loaded.warnings[0]) == (wanted not in ("none", quantization))


def test_dequantised_in_memory_is_near_the_original(save: Save) -> None:
    folder = save("llama", hidden_size=64, intermediate_size=128)
    plain, _ = load_folder(folder, CPU, torch.float32)
    W = plain.model.layers[0].mlp.down_proj.weight
    assert torch.equal(weight_of(plain.model.layers[0].mlp.down_proj), W)
    for quantization, most in (("bnb_4bit", 0.12), ("bnb_8bit", 0.02)):
        loaded: Loaded = load(request(folder, quantization=quantization), Silent())
        found = weight_of(loaded.model.model.layers[0].mlp.down_proj)
        assert 0 < (found - W).norm() / W.norm() < most


@pytest.mark.parametrize(
    ("quantization", "reason", "words"),
    [
        ({"quant_method": "aqlm"}, "unsupported_architecture", "aqlm"),
        ({"bits": 4}, "unsupported_architecture", "does not name"),
        ({"quant_method": "gptq", "bits": 3}, "unsupported_architecture", "3 bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
         "unsupported_architecture", "marlin"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "unsupported_architecture", "gemv"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(
    quantization: dict[str, Any], reason: str, words: str, save: Save
) -> None:
    folder = save("llama")
    pack_into(folder, quantization, lambda W: ({}, W), lambda name: False)
    with pytest.raises(EngineError) as caught:
        load(request(folder), Silent())
    assert caught.value.reason == reason and words in caught.value.message
    assert "bf16 release" in caught.value.mend


@pytest.mark.skipif(COMPRESSED, reason="compressed-tensors is installed")
def test_a_missing_library_is_named(save: Save) -> None:
    folder = save("llama")
    config = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    pack_into(folder, config, lambda W: ({}, W), lambda name: False)
    with pytest.raises(EngineError) as caught:
        load(request(folder), Silent())
    assert caught.value.reason == "missing_library"
    assert "compressed-tensors" in caught.value.message
    assert "pip install compressed-tensors" in caught.value.mend


@pytest.mark.skipif(not COMPRESSED, reason="needs compressed-tensors")
@pytest.mark.parametrize("form", ["float-quantized", "pack-quantized"])
def test_compressed_tensors(form: str, save: Save) -> None:
    folder = save("llama", torch.bfloat16, hidden_size=64, intermediate_size=128)
    codes = {"num_bits": 8, "type": "float", "strategy": "channel"}
    if form == "pack-quantized":
        codes = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    weights = {**codes, "symmetric": True, "dynamic": False}
    config = {
        "quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"],
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip
    truth = pack_into(folder, config, fp8_rows if codes["num_bits"] == 8 else int4, linear)
    loaded = load(request(folder), Silent())
    found = dict(loaded.model.named_parameters())
    for key, W in truth.items():  # the library multiplies in the scales' bfloat16
        assert (found[key] - W).abs().max() <= 2**-8 * W.abs().max(), key
    assert loaded.packed == "compressed-tensors" and survey(loaded.model).coverage == 1.0
