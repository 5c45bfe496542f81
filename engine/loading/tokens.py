"""The tokenizer of a folder, ready for batches, and what ends an answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.loading.faults import explained

# Where processors of vision-language models kept the chat template before chat_template.jinja.
PROCESSOR_FILES = ("chat_template.json", "processor_config.json", "preprocessor_config.json")


def read_tokenizer(folder: Path, name: str) -> Any:
    """The tokenizer, left-padding, with a padding token and the processor's chat template."""
    from transformers import AutoTokenizer

    with explained(name):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    if not tokenizer.chat_template:
        tokenizer.chat_template = _of_processor(folder)
    return tokenizer


def complete_ends(model: Any, tokenizer: Any, warn: Callable[[str], None]) -> None:
    """Let the tokenizer's end token end answers too; `generate` then stops where scoring does.

    Many fine-tunes keep the base model's generation_config, whose end token no chat ever writes.
    """
    config, own = model.generation_config, tokenizer.eos_token_id
    given = config.eos_token_id
    known = [] if given is None else [given] if isinstance(given, int) else list(given)
    if own is None and not known:
        warn("Neither generation_config nor tokenizer name an end token: answers run to the limit.")
    if own is None or own in known:
        return
    config.eos_token_id = [*known, own] if known else own
    if known:
        warn(
            f"generation_config ends answers at {_names(tokenizer, known)} alone; the tokenizer's "
            f"own end token {_names(tokenizer, [own])} ends them too."
        )


def _names(tokenizer: Any, ids: list[int]) -> str:
    return ", ".join(f"{tokenizer.convert_ids_to_tokens(number)}" for number in ids)


def _of_processor(folder: Path) -> str | None:
    """The chat template that a processor's own file holds, or None."""
    for file in PROCESSOR_FILES:
        try:
            found = json.loads((folder / file).read_text(encoding="utf-8")).get("chat_template")
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(found, str) and found:
            return found
    return None
