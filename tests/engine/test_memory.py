"""The memory model against figures computed by hand and against real caches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
)

from engine.heap import return_blocks
from engine.libraries import SETTINGS
from engine.memory import (
    Shape,
    decode_row,
    fitting_rows,
    forward_row,
    free_bytes,
    is_out_of_memory,
)
from jobs.spec.memory import CPU_ROWS, CUDA_ROWS, cache_row, lower_bytes

LLAMA_8B = Shape(
    layers=32, hidden=4096, queries=4096, kv=2 * 8 * 128, spread=2 * 4096, keeping=32, inner=14336,
    vocabulary=128256, width=2,
)  # fmt: skip
CUDA = torch.device("cuda")
CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3_moe": {**EXPERTS, "num_experts": 4, "head_dim": 16},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6, "layer_types": [
        "sliding_attention", "full_attention", "sliding_attention", "full_attention"]},
    "deepseek_v3": {**EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "kv_lora_rank": 16,
                    "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
                    "v_head_dim": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
                    "num_key_value_heads": 4},
    "qwen3_next": {**EXPERTS, "num_experts": 4, "head_dim": 8, "linear_num_value_heads": 4,
                   "linear_num_key_heads": 2, "linear_key_head_dim": 8,
                   "linear_value_head_dim": 8, "shared_expert_intermediate_size": 16},
    "jamba": {"num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2,
              "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_expand": 2,
              "use_mamba_kernels": False},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
                  "mamba_chunk_size": 8, "head_dim": 8},
    "lfm2": {"full_attn_idxs": [1, 3], "conv_L_cache": 3, "block_auto_adjust_ff_dim": False},
}  # fmt: skip


def test_shape_of_a_configuration() -> None:
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256,
    )  # fmt: skip
    assert Shape.of(config, 2) == LLAMA_8B
    # the same from the file, whether it names all settings or leaves the defaults out
    assert Shape.of(json.loads(config.to_json_string(use_diff=False)), 2) == LLAMA_8B
    wide = Shape.of(Qwen3Config(head_dim=96, num_attention_heads=16, hidden_size=1024), 4)
    assert wide.queries == 16 * 96


def test_a_row_of_llama_8b() -> None:
    # keys and values: 2 · 32 layers · 8 heads · 128 · 2 bytes = 131072 bytes a token, 160 tokens
    cache = 131072 * 160
    assert cache == cache_row(LLAMA_8B, 160) == 20_971_520
    # the last step: one layer's 4096 bytes a token once more, two steps' 128256 logits of 2 bytes
    assert decode_row(LLAMA_8B, 60, 100) == cache + 160 * 4096 + 2 * 128256 * 2 == 22_139_904
    # a long prompt and a short answer: one block over the prompt, its feed-forward being the
    # wider: (2 · 4096 + 3 · 14336) · 2 bytes a token
    prompt = 131072 * 1000 + 1000 * (2 * 4096 + 3 * 14336) * 2 + 128256 * 2
    assert decode_row(LLAMA_8B, 1000, 4) == prompt == 233_728_512


@pytest.mark.parametrize(
    ("weights", "lanes", "each"),
    [
        (20 << 20, 1, 64 << 20),
        (20 << 20, 2, 64 << 20),  # each process needs as much
        (2_000_000_000, 1, 400_000_000),
        (2_000_000_000, 2, 200_000_000),
        (140_000_000_000, 1, 2 << 30),
    ],
)
def test_room_for_kept_states(weights: int, lanes: int, each: int) -> None:
    assert lower_bytes(weights, lanes) == each


def test_a_forward_row_of_llama_8b() -> None:
    # 32 positions of bf16 logits weigh more than 75 tokens in one block: and the stream beside
    assert forward_row(LLAMA_8B, 75, 32) == 75 * 4096 * 2 + 32 * 128256 * 2 == 8_822_784
    assert forward_row(LLAMA_8B, 75, 1) == 75 * (2 * 4096 + 3 * 14336) * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_is_what_transformers_keeps(family: str) -> None:
    """Bytes of a real cache after a prompt and a step: keys, values and recurrent states."""
    torch.manual_seed(0)
    config: PretrainedConfig = AutoConfig.for_model(family, **{**TINY, **FAMILIES[family]})
    factory: Any = AutoModelForCausalLM
    model = factory.from_config(config, dtype=torch.float32).eval()
    cache = DynamicCache(config=config)
    ids = torch.arange(3, 13)[None].repeat(3, 1)  # 3 rows of 10 tokens
    with torch.inference_mode():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    held = {id(tensor): tensor.nbytes for layer in cache.layers for tensor in _tensors(vars(layer))}
    measured = sum(held.values())
    for source in (config, json.loads(config.to_json_string(use_diff=False))):
        # a window of w keeps w − 1 tokens between two steps; states of a convolution round up
        assert 3 * cache_row(Shape.of(source, 4), 11) == pytest.approx(measured, rel=0.12)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else ()
    return [tensor for each in inner for tensor in _tensors(each)]


@pytest.mark.parametrize(
    ("free", "per_row", "device", "rows"),
    [
        (100_000, 1_000, CUDA, 85),
        (100_000, 1_000, CPU, 50),
        (10**12, 1_000, CUDA, CUDA_ROWS),
        (10**12, 1_000, CPU, CPU_ROWS),
        (10, 1_000, CUDA, 1),
        (-5, 1_000, CPU, 1),
    ],
)
def test_fitting_rows(free: int, per_row: int, device: torch.device, rows: int) -> None:
    assert fitting_rows(free, per_row, device) == rows


def test_an_8b_model_on_a_24_gb_gpu() -> None:
    """16.1 GB of bf16 weights leave 7 GB: two candidates of 100 prompts fit at once."""
    assert fitting_rows(7 * 10**9, decode_row(LLAMA_8B, 60, 100), CUDA) == 268


def test_free_memory_of_this_machine() -> None:
    assert 10**6 < free_bytes(CPU) < 1 << 50


def test_out_of_memory_is_recognised() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)  # really more than there is
    assert is_out_of_memory(caught.value)


HELD = """
import torch
from engine.heap import return_blocks
if {large}: return_blocks()
def resident():
    return int(open('/proc/self/statm').read().split()[1]) * 4096
torch.ones(31 << 18)                    # 31 MB freed: glibc keeps smaller blocks on its heap now
kept, before = [], resident()
for _ in range(20):
    large = torch.ones(20 << 18)
    kept.append(torch.ones(30_000))     # 120 kB, above the block: the heap cannot shrink below it
    large = None
    kept.append(torch.ones(20_000))
print(resident() - before - sum(t.nbytes for t in kept))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the C library's own setting")
def test_large_blocks_go_back_to_the_system() -> None:
    """20 MB freed at a time, with small tensors that live on above them."""

    def held(large: bool) -> int:
        code = HELD.format(large=large)
        run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        return int(run.stdout)

    assert held(True) < 2_000_000
    return_blocks()  # twice does no harm


REUSED = """
import resource, torch
from engine.heap import return_blocks, reuse_blocks
def resident():
    return int(open('/proc/self/statm').read().split()[1]) * 4096
def faults():
    for _ in range(3):
        torch.ones(20 << 18), torch.ones(10 << 18)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(20 << 18), torch.ones(10 << 18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
return_blocks()
given, before = faults(), resident()
reuse_blocks()
kept, held = faults(), resident() - before
return_blocks()
print(given, kept, held, resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the C library's own setting")
def test_a_search_keeps_its_blocks_until_something_else_is_asked() -> None:
    plain = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    command = [sys.executable, "-c", REUSED]  # with pages of 4096 bytes
    run = subprocess.run(command, check=True, capture_output=True, env=plain)
    given, kept, held, after = map(int, run.stdout.split())
    assert given > 20 * 25_000_000 / 4096 and kept < given / 10  # pages that come anew
    assert held > 25_000_000 and after < 2_000_000
