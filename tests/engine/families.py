"""Tiny random models of many decoder families."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 96
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
LAYERED: dict[str, Any] = {"layer_types": ["full_attention"] * 3}
GPT2: dict[str, Any] = {
    "vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128,
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip

# family -> (settings, writers per layer)
DENSE: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "mistral": SMALL,
    "qwen2": SMALL | LAYERED,
    "qwen3": SMALL | LAYERED,
    "gemma": SMALL,
    "gemma2": SMALL | {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    "gemma3_text": SMALL | LAYERED,
    "phi": SMALL | {"partial_rotary_factor": 0.5},
    "phi3": SMALL,
    "gpt2": GPT2,
    "gpt_neox": SMALL | {"num_key_value_heads": 4},
    "gptj": {**GPT2, "rotary_dim": 4},
    "gpt_bigcode": GPT2,
    "falcon": {k: v for k, v in SMALL.items() if k != "head_dim"},
    "lfm2": SMALL | {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": SMALL | {"expand": 2, "num_heads": 8, "n_groups": 1, "state_size": 8},
    "bloom": {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "opt": SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "olmo": SMALL,
    "olmo2": SMALL,
    "olmo3": SMALL | LAYERED,
    "stablelm": SMALL,
    "starcoder2": SMALL,
    "cohere": SMALL,
    "cohere2": SMALL | LAYERED,
    "granite": SMALL | {"residual_multiplier": 0.25},
    "glm": SMALL,
    "glm4": SMALL,
    "smollm3": SMALL | LAYERED,
    "nemotron": SMALL,
    "helium": SMALL,
    "exaone4": SMALL | LAYERED,
    "ernie4_5": SMALL,
    "mpt": {"vocab_size": VOCAB, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 128},
}  # fmt: skip
# A post-norm that passes a scaled output shows as a writer "via" that norm.
NORMED = {"gemma2", "gemma3_text", "olmo2", "olmo3", "glm4", "exaone4"}
FUSED: dict[str, dict[str, Any]] = {
    "mixtral": SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": SMALL
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, 
       "mlp_only_layers": []},
    "olmoe": SMALL | {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2}
    | LAYERED,
    "llama4_text": SMALL
    | {"num_local_experts": 4, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1,
       "no_rope_layers": [1, 1, 1]}
    | LAYERED,
    "dbrx": {"vocab_size": VOCAB, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 128,
       "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
       "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
       "initializer_range": 0.2},
    "qwen2_moe": SMALL
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
       "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1, "mlp_only_layers": []}
    | LAYERED,
}  # fmt: skip

GEMMA3N: dict[str, Any] = SMALL | {
    "num_hidden_layers": 2, "intermediate_size": [48, 48], "vocab_size_per_layer_input": VOCAB,
    "layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0,
    "activation_sparsity_pattern": [0.0, 0.0], "hidden_size_per_layer_input": 16,
    "laurel_rank": 16,
}  # fmt: skip


def tiny(family: str, settings: dict[str, Any], seed: int = 0, **more: Any) -> Any:
    """A random model of a family, float32, in eval mode."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**settings, **more})
    factory: Any = AutoModelForCausalLM
    model = factory.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norm weights of 1 and biases of 0 would hide mistakes.
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model
