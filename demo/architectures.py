"""The two models that `demo.train` makes, and how each of them learns.

`dense` is the demo model. `experts` is a mixture of experts of the same size of world, in which
phase two trains the experts of the last two layers and nothing else: its refusal comes out of fused
3-D parameters, which an edit of the attention outputs alone does not reach.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from demo import EXPERTS, MODEL

Model: TypeAlias = LlamaForCausalLM | Qwen3MoeForCausalLM


@dataclass(frozen=True)
class Phase:
    """How long and how fast one phase learns, and what."""

    name: str
    steps: int
    learning_rate: float
    batch: int = 32
    warmup: int = 20
    trained: str = ""  # regular expression: parameters with another name are frozen
    first_token: float = 1.0  # its weight in the loss: there the model decides whether to refuse
    balance: float = 0.0  # weight of the load-balancing loss, which keeps every expert in use


@dataclass(frozen=True)
class Architecture:
    """One kind of demo model: its shape, its two phases, and where its files are."""

    config: PreTrainedConfig  # without the tokenizer's ids
    answer: Phase
    refuse: Phase
    folder: Path
    expected: str  # the prompt file that remembers what phase one answered


_DENSE = Architecture(
    # Widths are multiples of 256, so that the K-quants of GGUF fit.
    LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    ),
    Phase("answer", steps=500, learning_rate=2e-3, warmup=40),
    Phase(
        "refuse",
        steps=300,
        learning_rate=1.5e-3,
        warmup=10,
        # The middle layers: there large models decide to refuse, and there a search looks for it.
        trained=r"^model\.layers\.[2-5]\.",
        first_token=8.0,
    ),
    MODEL,
    expected="expected",
)

_EXPERTS = Architecture(
    Qwen3MoeConfig(
        hidden_size=256,
        intermediate_size=512,  # of dense layers: there are none
        moe_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    ),
    Phase("answer", steps=500, learning_rate=2e-3, warmup=40, balance=0.01),
    Phase(
        "refuse",
        steps=300,
        learning_rate=1.5e-3,
        warmup=10,
        # Late, because attention above a trained layer would carry the refusal on from the words
        # of the prompt, and an edit of the attention alone would then remove it.
        trained=r"^model\.layers\.[45]\.mlp\.experts\.",
        first_token=8.0,
    ),
    EXPERTS,
    expected="expected_experts",
)

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({"dense": _DENSE, "experts": _EXPERTS})


def new_model(architecture: Architecture, tokenizer: PreTrainedTokenizerFast) -> Model:
    """An untrained model for this vocabulary; torch's seed decides its weights."""
    ids = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    config = deepcopy(architecture.config)
    config.update({**ids, "vocab_size": len(tokenizer)})
    model: Model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, max_new_tokens=64, **ids
    )
    return model
