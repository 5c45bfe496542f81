"""The sizes of a model that its memory depends on, read from its configuration alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FLOAT32 = 4
SLIDING = {"sliding_attention", "chunked_attention", "hybrid_sliding", "local_attention"}
RECURRENT = {
    "linear_attention", "conv", "mamba", "mamba2", "recurrent", "hybrid", "hybrid_sliding",
    "gated_delta_net",
}  # fmt: skip
EMPTY = RECURRENT - {"hybrid", "hybrid_sliding"} | {"moe", "mlp", "dummy"}
CHUNK_DELTA = 64  # positions of one chunk of the gated delta rule
CHUNK_SSM = 256  # of a state-space scan, where the configuration names none

HIDDEN = ("hidden_size", "n_embd", "d_model", "dim")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
KERNELS = (
    "linear_conv_kernel_dim", "linear_conv_kernel_size", "mamba_d_conv", "conv_kernel",
    "conv_kernel_size", "conv_L_cache", "conv1d_width",
)  # fmt: skip

Read = Any  # a raw config.json as a mapping, or a configuration object of transformers


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that memory depends on; `width` is of one element, in bytes.

    queries     numbers of one token's queries in one block: heads × head size
    kv          numbers that one token leaves in the cache of one attention block: 2 × key/value
                heads × head size; of latent attention (DeepSeek) the latent and the rotary key
    spread      the same while a block attends, once for every query head
    keeping     blocks that keep the keys and values of all tokens
    sliding     blocks that keep those of the last `window` tokens
    state       bytes of one row's constant states, all blocks together
    scan        bytes of one token in a recurrent block's scan over the prompt
    chunk       positions to which that scan pads
    inner       m: feed-forward numbers of one token in one block, per projection
    gathered    numbers that a mixture's block copies for one token before and after its experts
    eager       heads whose attention scores are held, 0 where a fused kernel does not hold them
    capped      whether the logits are soft-capped
    """

    layers: int
    hidden: int
    queries: int
    kv: int
    spread: int
    keeping: int
    inner: int
    vocabulary: int
    width: int
    sliding: int = 0
    window: int = 0
    state: int = 0
    scan: int = 0
    chunk: int = 1
    gathered: int = 0
    eager: int = 0
    capped: bool = False

    @classmethod
    def of(cls, config: Read, width: int) -> Shape:
        """From config.json or from a configuration of transformers; the text part counts.

        Sizes that are not there count as 0, so a configuration of another layout gives less than
        the truth, never an error.
        """
        text = text_part(config)
        hidden, layers = _int(text, *HIDDEN), _int(text, *LAYERS)
        heads = _int(text, "num_attention_heads", "n_head", "num_heads") or 1
        kinds = layer_kinds(text, layers)
        head = max(_int(text, "head_dim", "attention_head_dim"), _int(text, "global_head_dim"))
        head = head or hidden // heads
        kv_heads = _int(text, "num_key_value_heads", "n_head_kv", "num_kv_heads") or heads
        queries, kv, spread = heads * head, 2 * kv_heads * head, 2 * heads * head
        if latent := _int(text, "kv_lora_rank"):
            rotary = _int(text, "qk_rope_head_dim")
            key = _int(text, "qk_nope_head_dim") + rotary
            queries, kv = heads * key, latent + rotary
            spread = heads * (2 * key + _int(text, "v_head_dim"))  # keys are put together anew
        recurrent = sum(kind in RECURRENT for kind in kinds)
        state, scan, chunk = _recurrent(text, hidden, kinds, width) if recurrent else (0, 0, 1)
        inner, gathered = _feed_forward(text, hidden)
        capped = bool(_get(text, "final_logit_softcapping"))
        eager = _get(text, "attn_logit_softcapping") or _get(text, "model_type") == "gpt_oss"
        return cls(
            layers=layers,
            hidden=hidden,
            queries=queries,
            kv=kv,
            spread=spread,
            keeping=sum(kind not in EMPTY and kind not in SLIDING for kind in kinds),
            inner=inner,
            vocabulary=_int(text, "vocab_size"),
            width=width,
            sliding=sum(kind in SLIDING for kind in kinds),
            window=_int(text, "sliding_window", "attention_chunk_size", "attention_window_size"),
            state=recurrent * state,
            scan=scan,
            chunk=chunk,
            gathered=gathered,
            eager=heads if eager else 0,
            capped=capped,
        )


def text_part(config: Read) -> Read:
    """The part that describes the decoder; of a vision-language model one or two levels down."""
    if not isinstance(config, Mapping):
        return config.get_text_config(decoder=True)
    for name in TEXT_PARTS:
        part = config.get(name)
        if isinstance(part, Mapping):
            return text_part({**config, name: None, **part})
    return config


def layer_kinds(text: Read, layers: int) -> list[str]:
    """What each block is, in the words of transformers' `layer_types`.

    Where config.json leaves that to the model's class, it is told from the settings that the class
    would use; blocks about which nothing is known count as full attention, the dearest kind.
    """
    kinds: list[str] = []
    for name in ("layer_types", "layers_block_type", "block_types"):
        found = _get(text, name)
        if isinstance(found, Sequence) and not isinstance(found, str):
            kinds = [str(kind) for kind in found]
            break
    if isinstance(pattern := _get(text, "hybrid_override_pattern"), str) and not kinds:
        names = {"M": "mamba", "*": "full_attention", "-": "mlp", "E": "moe"}
        kinds = [names.get(letter, "full_attention") for letter in pattern]
    if len(kinds) < layers and kinds and _get(text, "block_types"):
        kinds = (kinds * layers)[:layers]  # a pattern that repeats
    period = _int(text, "attn_layer_period")
    interval = _int(text, "full_attention_interval")
    if not kinds and period:
        offset = _int(text, "attn_layer_offset")
        kinds = ["full_attention" if i % period == offset else "mamba" for i in range(layers)]
    elif not kinds and interval:
        kinds = ["mamba" if (i + 1) % interval else "full_attention" for i in range(layers)]
    elif not kinds and _get(text, "model_type") == "falcon_h1":
        kinds = ["hybrid"] * layers
    elif not kinds and (indices := _get(text, "attn_layer_indices")) is not None:
        kinds = ["full_attention" if i in indices else "mamba" for i in range(layers)]
    elif not kinds and _int(text, "state_size") and not _int(text, "num_attention_heads"):
        kinds = ["mamba"] * layers
    elif not kinds and _int(text, "sliding_window") and _get(text, "use_sliding_window") in (
        None, True,
    ):  # fmt: skip
        kinds = ["sliding_attention"] * layers
    kinds = (kinds + ["full_attention"] * layers)[:layers]
    if shared := _int(text, "num_kv_shared_layers"):  # the last ones read others' keys and values
        kinds[layers - shared :] = ["dummy"] * shared
    return kinds


def _recurrent(
    text: Read, hidden: int, kinds: Sequence[str], width: int
) -> tuple[int, int, int]:  # fmt: skip
    """(bytes of one block's state, bytes of one token in its scan, positions of a chunk).

    As transformers computes it in torch; kernels of their own need less.
    """
    kernel = _int(text, *KERNELS) or 4
    if heads := _int(text, "linear_num_value_heads"):  # gated delta rule: Qwen3-Next, Qwen3.5
        key, value = _int(text, "linear_key_head_dim"), _int(text, "linear_value_head_dim")
        channels = 2 * _int(text, "linear_num_key_heads") * key + heads * value
        scan = heads * (6 * key + 6 * value + 3 * CHUNK_DELTA) * FLOAT32
        return heads * key * value * FLOAT32 + channels * kernel * width, scan, CHUNK_DELTA
    if (heads := _int(text, "linear_num_heads")) and (key := _int(text, "linear_head_dim")):
        state = heads * key * key * FLOAT32 + 3 * heads * key * kernel * width  # Kimi
        return state, heads * (12 * key + 3 * CHUNK_DELTA) * FLOAT32, CHUNK_DELTA
    states = _int(text, "mamba_d_state", "ssm_state_size", "state_size", "ssm_state")
    if not states:
        wide = _int(text, "lru_width") or hidden  # RecurrentGemma; short convolutions otherwise
        recurrence = FLOAT32 if _int(text, "lru_width") else 0
        return wide * (recurrence + kernel * width), 4 * wide * FLOAT32, 1
    heads = _int(text, "mamba_n_heads", "mamba_num_heads", "n_mamba_heads")
    inner = _int(text, "mamba_d_ssm", "mamba_intermediate_size")
    inner = inner or heads * _int(text, "mamba_d_head", "mamba_head_dim")
    inner = inner or (_int(text, "mamba_expand", "expand") or 2) * hidden
    state = inner * states * FLOAT32 + (inner + 2 * states) * kernel * width
    if not heads:  # Mamba-1: the discretised matrices of every token
        return state, 3 * inner * states * FLOAT32, 1
    chunk = _int(text, "mamba_chunk_size", "chunk_size") or CHUNK_SSM
    return state, (6 * inner + heads * (6 * states + 5 * chunk)) * FLOAT32, chunk


def _feed_forward(text: Read, hidden: int) -> tuple[int, int]:
    """(numbers of one token per projection, numbers gathered for a mixture's experts)."""
    dense = _int(text, "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size") or 4 * hidden
    chosen = experts_used(text)
    if not chosen:
        return dense, 0
    own = _int(text, "moe_intermediate_size", "expert_dim") or dense
    shared = _int(text, "shared_expert_intermediate_size")
    shared = shared or own * _int(text, "n_shared_experts", "num_shared_experts")
    return max(chosen * own + shared, dense), 2 * chosen * hidden


def experts_used(text: Read) -> int:
    """Experts that one token passes; 0 of a dense model."""
    return _int(text, "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k")


def _get(source: Read, name: str) -> Any:
    """The setting; a list of all values where blocks differ in it (Gemma 4)."""
    if not isinstance(source, Mapping):
        try:
            return getattr(source, name, None)
        except RuntimeError:  # transformers has no one answer
            return [getattr(block, name, None) for block in source.per_layer_config]
    own = source.get("per_layer_config")
    blocks = own.values() if isinstance(own, Mapping) else ()
    several = [block[name] for block in blocks if isinstance(block, Mapping) and name in block]
    return [source.get(name), *several] if several else source.get(name)


def _int(source: Read, *names: str) -> int:
    """The first of these settings that is a positive number (or a list of them: the largest)."""
    for name in names:
        value = _get(source, name)
        if isinstance(value, Sequence) and not isinstance(value, str):
            value = max((v for v in value if isinstance(v, int | float)), default=0)
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            return int(value)
    return 0
