"""What the sizes of a configuration become, whatever family names them."""

from __future__ import annotations

from typing import Any

VOCAB = 96

_SIZES: list[tuple[int, str]] = [
    # widths
    (32, "hidden_size d_model n_embd embed_dim text_hidden_size out_hidden_size projection_dim"),
    (32, "projector_hidden_size word_embed_proj_dim output_dim vision_output_dim adapter_in_dim"),
    (32, "adapter_out_dim adapter_input_size encoder_hidden_size patch_embed_hidden_size"),
    (32, "lru_width moe_hidden_size projection_hidden_size projector_input_dim"),
    (32, "projector_output_dim image_token_embed_dim base_channels latent_channels"),
    (32, "output_channels downsample_channels hidden_sizes"),
    (48, "intermediate_size ffn_dim dim_ff dff mlp_dim ffn_hidden_size intermediate_size_mlp"),
    (48, "dense_intermediate_size encoder_ffn_dim alignment_intermediate_size"),
    (48, "projection_intermediate_size"),
    (24, "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size"),
    (24, "expert_ffn_hidden_size moe_shared_expert_intermediate_size share_expert_dim"),
    (24, "shared_experts_intermediate_size"),
    (16, "q_lora_rank kv_lora_rank o_lora_rank laurel_rank adapter_rank router_hidden_size"),
    (16, "hidden_size_per_layer_input hc_lowrank gated_norm_rank"),
    # heads
    (4, "num_attention_heads num_heads n_head n_heads attention_heads swa_num_attention_heads"),
    (4, "index_n_heads linear_num_heads linear_num_value_heads encoder_attention_heads"),
    (4, "resampler_n_heads"),
    (2, "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads"),
    (8, "head_dim swa_head_dim v_head_dim linear_key_head_dim linear_value_head_dim dim_head"),
    (8, "linear_head_dim kv_channels mamba_d_head mamba_head_dim index_head_dim"),
    (8, "resampler_head_dim"),
    (4, "qk_rope_head_dim qk_nope_head_dim rotary_dim"),
    # experts
    (4, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    (2, "num_experts_per_tok moe_topk moe_k n_group zero_expert_num"),
    (1, "topk_group n_shared_experts num_shared_experts moe_num_shared_experts"),
    (1, "first_k_dense_replace num_dense_layers"),
    # state spaces
    (8, "mamba_n_heads mamba_num_heads n_mamba_heads state_size ssm_state_size mamba_d_state"),
    (2, "n_groups mamba_dt_rank"),
    (64, "mamba_d_ssm"),
    # layers of image and sound towers
    (2, "depth encoder_layers num_blocks resampler_depth"),
    # tokens and images
    (VOCAB, "vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
    (128, "max_position_embeddings n_positions max_seq_len context_length n_ctx"),
    (64, "num_embeddings"),
    (32, "image_size"),
    (8, "patch_size"),
    (1, "channel_multiplier"),
    (0, "pad_token_id"),
    (1, "bos_token_id"),
    (2, "eos_token_id"),
]
SIZES: dict[str, Any] = {
    **{name: size for size, names in _SIZES for name in names.split()},
    "initializer_range": 0.2,
    "mlp_only_layers": [0],
}
# Set whatever they are by default: their effect is wanted.
ALWAYS = {"num_key_value_heads", "initializer_range", "mlp_only_layers"}
# The names of the number of decoder layers.
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "layers")
