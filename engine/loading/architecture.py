"""Which class a folder's weights are for: a language model, alone or with eyes."""

from __future__ import annotations

from typing import Any

from engine.errors import EngineError


def auto_class(config: Any, name: str) -> Any:
    """The Auto class that loads `config` with all of its weights.

    vision-language alone, or named in `architectures`   AutoModelForImageTextToText
    any other                                            AutoModelForCausalLM

    Some configurations have both (Qwen3.5, Llama 4, Mllama): then the text model alone would leave
    the image tower out, and the weights would have other names than in the files.
    Raises unsupported_architecture for encoder-decoders: their answers are no residual stream's.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as SEEING,
    )

    if getattr(config, "is_encoder_decoder", False):
        raise EngineError(
            "unsupported_architecture",
            f"{name} is an encoder-decoder ({config.model_type})",
            "Choose a decoder-only language model.",
        )
    seeing = SEEING.get(config.model_type)
    named = getattr(config, "architectures", None) or []
    if seeing is not None and (config.model_type not in CAUSAL or seeing in named):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM
