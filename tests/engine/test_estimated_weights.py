"""The estimate's weights, from headers, against models that transformers has loaded and packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
)

from engine.loading.size import parameters, weight_bytes
from jobs import checkpoints
from jobs.spec.job import Quantization
from jobs.spec.shape import Shape
from jobs.weights import weights_of

SIZES: dict[str, Any] = {
    "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "gemma3_text": {**SIZES, "tie_word_embeddings": True, "head_dim": 32},
    "qwen3_moe": {**SIZES, "num_experts": 4, "num_experts_per_tok": 2,
                  "moe_intermediate_size": 128},
    "gpt2": {"vocab_size": 2048, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gemma3": {"text_config": {**SIZES, "head_dim": 32}, "vision_config": {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 56, "patch_size": 14},
        "mm_tokens_per_image": 4},
}  # fmt: skip
KINDS: dict[Quantization, dict[str, Any]] = {
    "none": {},
    "bnb_8bit": {"load_in_8bit": True},
    "bnb_4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                 "bnb_4bit_use_double_quant": True},
}  # fmt: skip


@pytest.mark.parametrize("family", CASES)
def test_headers_tell_the_bytes_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **CASES[family])
    packing: Any = BitsAndBytesConfig
    factory: Any = AutoModelForImageTextToText if family == "gemma3" else AutoModelForCausalLM
    factory.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    checkpoint = checkpoints.from_folder(tmp_path)
    found = weights_of(checkpoint, Shape.of(checkpoint.config, 2))
    for kind, settings in KINDS.items():
        quantised = {"quantization_config": packing(**settings)} if settings else {}
        model = factory.from_pretrained(tmp_path, dtype=torch.bfloat16, **quantised)
        if kind == "none":
            assert found.parameters == parameters(model)
        # buffers of positions and the tables of small matrices are all that may differ
        assert found.loaded(kind, 2) == pytest.approx(weight_bytes(model), rel=0.02), kind
        experts = [p for n, p in model.named_parameters() if ".experts." in n]
        assert found.experts == sum(p.numel() for p in experts)
        assert all(p.dtype == torch.bfloat16 for p in experts)  # packed in none of the kinds
