"""What single families need beyond the rules of `shrink`, by the model type of the config."""

from __future__ import annotations

from typing import Any

# Three rotary sections (time, height, width) that fill half a head of 8.
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
SECTIONED = [
    "cosmos3_edge_text", "glm4v_text", "glm_ocr_text", "paddleocr_vl_text", "qwen2_5_omni_text",
    "qwen2_5_vl_text", "qwen2_vl_text",
]  # fmt: skip
EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
DENSE_AND_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
}  # fmt: skip

OVERRIDES: dict[str, dict[str, Any]] = {
    # Layers of a kind that the defaults lack.
    "bamba": {"attn_layer_indices": [1]},
    "cohere2_moe": DENSE_AND_SPARSE | {"num_shared_experts": 1},
    "deepseek_ocr2_text": DENSE_AND_SPARSE | EXPERTS,
    "deepseek_v2": EXPERTS | {"first_k_dense_replace": 1},
    "dots1": EXPERTS | {"first_k_dense_replace": 1},
    "gemma3n_text": {
        "num_hidden_layers": 4, "intermediate_size": [48] * 4, "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {
        "global_head_dim": 16, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
        "moe_intermediate_size": 24,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoe_swa": {"shared_intermediate_size": 24},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "granitemoeshared": {"shared_intermediate_size": 24},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "inkling_text": DENSE_AND_SPARSE,
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
    "mellum": DENSE_AND_SPARSE,
    "minimax_m3_vl_text": {
        **DENSE_AND_SPARSE, "layer_types": ["full_attention", "minimax_m3_sparse"],
    },
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "muse_spark_text": DENSE_AND_SPARSE,
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    # Sizes that belong together.
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": SECTIONS, "full_attention": SECTIONS},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots3_note_text": {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16, "swa_head_dim": 8, "swa_qk_nope_head_dim": 4, "swa_v_head_dim": 8,
    },
    "ernie4_5_vl_moe_text": {"rope_parameters": SECTIONS | {"mrope_section": [1, 1, 2]}},
    "gemma4_unified_text": {"global_head_dim": 16},
    "glm4v_moe_text": {
        "rope_parameters": SECTIONS | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5},
    },
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_vl_text": {
        "head_dim": 8, "rope_parameters": SECTIONS | {"mrope_section": [1, 1, 1, 1]},
    },
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": 8},
    "step3p5": {"sliding_window": 4},
    "zaya": {"num_experts_per_tok": 1},
    **{kind: {"rope_parameters": SECTIONS} for kind in SECTIONED},
    # Images.
    "chameleon": {"vocabulary_map": {"<image>": 90}},
    "emu3": {"vocabulary_map": {"<image>": 90}},
    "fast_vlm": {"vision_config": CLIP},
    "granite4_vision": {
        "deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [0, 1, 0, 1],
        "downsample_rate": "1/2", "vision_config": CLIP | {"hidden_size": 64},
    },
    "inkling_vision": {"num_hidden_layers": 6},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 90},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 90},
    "radio": {"video_temporal_patch_size": 2},
}  # fmt: skip
