"""The prompts of a job, checked and tokenised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.chat import Formatter
from engine.errors import EngineError
from jobs.spec.protocol import Prepare

OPTIONAL = ("over_refusal", "texts")
DIRECTIONS = ("direction_harmful", "direction_harmless")


def check_texts(request: Prepare) -> None:
    """Every role that the purpose needs has prompts, and none is blank; else `bad_prompts`."""
    free = set(OPTIONAL)
    if request.purpose != "abliterate":
        free |= set(DIRECTIONS)
    for role, texts in request.prompts:
        if not texts and role not in free and request.purpose != "respond":
            raise EngineError(
                "bad_prompts", f"{role}: there is no prompt", "Choose a prompt set with more lines."
            )
        for number, text in enumerate(texts, start=1):
            if not text.strip():
                raise EngineError(
                    "bad_prompts", f"{role}: prompt {number} is blank", "Remove blank prompts."
                )


def tokenised(
    formatter: Formatter, request: Prepare, context: int | None
) -> dict[str, list[list[int]]]:
    """The token ids of every role's prompts; `bad_prompts` for one without room to answer."""
    found = {
        role: [formatter.ids(text) for text in texts]
        for role, texts in request.prompts
        if role != "texts"
    }
    for role, inputs in found.items():
        for number, ids in enumerate(inputs, start=1):
            check_length(f"{role}: prompt {number}", ids, request.max_new_tokens, context)
    return found


def check_length(name: str, ids: Sequence[int], new: int, context: int | None) -> None:
    """Raise `bad_prompts` where prompt and answer exceed the model's context (None: unknown)."""
    if context is not None and len(ids) + new > context:
        raise EngineError(
            "bad_prompts",
            f"{name} has {len(ids)} tokens; with {new} answer tokens that is more than the "
            f"model's context of {context}",
            "Shorten or remove the prompt, or ask for fewer answer tokens.",
        )


def context_of(model: Any) -> int | None:
    """The longest sequence that the model was made for, in tokens."""
    text = model.config.get_text_config(decoder=True)
    given = getattr(text, "max_position_embeddings", None)
    return int(given) if given else None
