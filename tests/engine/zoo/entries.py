"""The entries of the causal-LM and image-text-to-text mappings of transformers, in or out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

# reason -> model types that are no decoder-only language model, or that this project cannot run
OUT: dict[str, list[str]] = {
    "encoder–decoder: its text decoder attends to an encoder's output": [
        "bart", "bert-generation", "bigbird_pegasus", "blenderbot", "blenderbot-small", "blip",
        "florence2", "marian", "mbart", "mvp", "pegasus", "pix2struct", "plbart", "pp_formulanet",
        "prophetnet", "t5gemma2", "trocr", "udop", "vision-encoder-decoder",
    ],
    "bidirectional encoder, trained on masked or replaced tokens; no checkpoint of it is a "
    "causal language model": [
        "bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
        "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm",
        "xlm-roberta", "xlm-roberta-xl", "xmod",
    ],
    "permutation language model: two attention streams over both sides": ["xlnet"],
    "reversible layers: the residual is two streams, each written by the other": ["reformer"],
    "speech or music: its tokens are audio, or it transcribes audio": [
        "moshi", "moss_transcribe_diarize", "musicgen", "musicgen_melody", "whisper",
    ],
    "drafts for another model: it reads that model's states and keys": [
        "gemma4_assistant", "gemma4_unified_assistant",
    ],
    "denoises blocks of text (diffusion): not autoregressive": ["diffusion_gemma"],
    "writes robot actions, no text": ["pi0"],
    "protein to text: its layers attend to the states of a protein encoder": ["evolla"],
    "its image tower is a timm model, and timm is no dependency of this project": [
        "perception_lm",
    ],
    "runs on no text alone: every pass needs a picture": [
        "blip-2", "idefics", "instructblip", "instructblipvideo", "kosmos-2",
    ],
    "bytes, patches, bytes: three nested decoders of different widths": ["blt"],
}  # fmt: skip


# Where one class of a model type is out, and another is in.
OUT_CLASSES = {
    "Gemma3nForConditionalGeneration": "its image tower is a timm model, and timm is no dependency "
    "of this project",
}


@dataclass(frozen=True)
class Entry:
    """One model type with the class that a mapping gives it; `settings` make it a variant."""

    model_type: str
    architecture: str
    out: str = ""  # why it is out; "" where it is in
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def id(self) -> str:
        return "+".join([f"{self.model_type}-{self.architecture}", *self.settings])


def _entries() -> list[Entry]:
    """Every (type, class) of both mappings once, sorted."""
    reasons = {kind: reason for reason, kinds in OUT.items() for kind in kinds}
    pairs = {
        *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items(),
        *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items(),
    }
    return [
        Entry(kind, name, reasons.get(kind) or OUT_CLASSES.get(name, ""))
        for kind, name in sorted(pairs)
    ]


ALL = _entries()
ENTRIES = [entry for entry in ALL if not entry.out]
# Layouts that a flag of the config switches on, and that released models use.
VARIANTS = [
    Entry("bloom", "BloomForCausalLM", "", {"apply_residual_connection_post_layernorm": True}),
    Entry("chameleon", "ChameleonForConditionalGeneration", "", {"swin_norm": True}),
    Entry("falcon", "FalconForCausalLM", "", {"new_decoder_architecture": True}),
    Entry("falcon", "FalconForCausalLM", "", {"parallel_attn": False}),
    Entry("gpt_neox", "GPTNeoXForCausalLM", "", {"use_parallel_residual": False}),
    Entry("llama", "LlamaForCausalLM", "", {"attention_bias": True, "mlp_bias": True}),
    Entry("nemotron_h", "NemotronHForCausalLM", "", {"moe_latent_size": 16}),
    Entry(
        "opt", "OPTForCausalLM", "", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}
    ),
    Entry("stablelm", "StableLmForCausalLM", "", {"use_parallel_residual": True}),
]  # fmt: skip
# Variants with writers that no edit reaches: the anatomy must say so.
UNREACHED = {
    "experts that are rows of an embedding": Entry(
        "doge", "DogeForCausalLM", "", {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 2}
    ),
    "embeddings of n-grams, projected and convolved": Entry(
        "qwen4_exp_text", "Qwen4ExpForCausalLM", "",
        {"ple_layer_ids": [1], "ple_embed_dim": 32, "ngram_vocab_size_base": 50,
         "split_ngram_parts": 2, "heads_per_ngram": 2, "eos_token_id": 2},
    ),
}  # fmt: skip
