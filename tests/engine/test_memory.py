"""The memory model against figures computed by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config

from engine.memory import (
    CPU_ROWS,
    CUDA_ROWS,
    Shape,
    decode_row,
    fitting_rows,
    forward_row,
    free_bytes,
    is_out_of_memory,
)

LLAMA_8B = Shape(32, 8, 128, 4096, 14336, 128256, 2)
CUDA = torch.device("cuda")
CPU = torch.device("cpu")


def test_shape_of_a_configuration() -> None:
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256,
    )  # fmt: skip
    assert Shape.of(config, 2) == LLAMA_8B
    assert (
        Shape.of(Qwen3Config(head_dim=96, num_attention_heads=16, hidden_size=1024), 4).head_dim
        == 96
    )


def test_a_row_of_llama_8b() -> None:
    # keys and values: 2 · 32 layers · 8 heads · 128 · 2 bytes = 131072 bytes a token, 160 tokens
    cache = 131072 * 160
    assert cache == 20_971_520
    activations = 60 * (6 * 4096 + 3 * 14336) * 2  # 60 prompt tokens: 8 110 080
    logits = 128256 * (2 + 8)  # 1 282 560
    assert decode_row(LLAMA_8B, 60, 100) == cache + 2 * cache // 32 + activations + logits
    assert decode_row(LLAMA_8B, 60, 100) == 20_971_520 + 1_310_720 + 8_110_080 + 1_282_560


def test_a_forward_row_of_llama_8b() -> None:
    # 75 tokens of activations and one layer's keys and values, 32 positions of bf16 logits
    expected = 75 * (6 * 4096 + 3 * 14336) * 2 + 2 * 75 * 8 * 128 * 2 + 32 * 128256 * 2
    assert forward_row(LLAMA_8B, 75, 32) == expected == 18_653_184


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
    """16.1 GB of bf16 weights leave 7 GB: one candidate of 100 prompts fits at once."""
    assert fitting_rows(7 * 10**9, decode_row(LLAMA_8B, 60, 100), CUDA) == 187


def test_free_memory_of_this_machine() -> None:
    assert 10**6 < free_bytes(CPU) < 1 << 50


def test_out_of_memory_is_recognised() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)  # really more than there is
    assert is_out_of_memory(caught.value)
