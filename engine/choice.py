"""Which token greedy decoding picks, and which ones end it, as `generate(do_sample=False)` does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import GenerationConfig

CHANGING = (  # settings of generation_config.json that change greedy tokens; not honoured here
    "no_repeat_ngram_size", "bad_words_ids", "min_length", "min_new_tokens", "sequence_bias",
    "forced_bos_token_id", "forced_eos_token_id", "guidance_scale", "stop_strings",
)  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """How `generate(do_sample=False)` picks a token under a model's generation_config.

    Greedy decoding ignores temperature, top_p and top_k, but not the repetition penalty (Keskar et
    al. 2019, arXiv 1909.05858: logits of tokens already seen are divided by it when positive and
    multiplied when negative; padding is not seen) nor suppressed tokens.
    """

    penalty: float = 1.0
    suppressed: tuple[int, ...] = ()
    suppressed_first: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: GenerationConfig | None) -> Choice:
        """From a model's generation_config; None is plain argmax."""
        if config is None:
            return cls()
        return cls(
            penalty=float(getattr(config, "repetition_penalty", None) or 1.0),
            suppressed=tuple(getattr(config, "suppress_tokens", None) or ()),
            suppressed_first=tuple(getattr(config, "begin_suppress_tokens", None) or ()),
        )

    @property
    def plain(self) -> bool:
        """Whether the most likely token is always chosen, whatever stands before it."""
        return self == Choice()

    def start(self, ids: Tensor, mask: Tensor, vocabulary: int) -> Chooser:
        """For a batch of prompts `ids` under `mask`, both (rows, t)."""
        return Chooser(self, ids, mask, vocabulary)


class Chooser:
    """Picks the next token of each row of one batch: logits (rows, V) -> token ids (rows)."""

    def __init__(self, choice: Choice, ids: Tensor, mask: Tensor, vocabulary: int) -> None:
        self._choice = choice
        self._first = True
        self._seen: Tensor | None = None
        if choice.penalty != 1.0:
            counts = torch.zeros(len(ids), vocabulary, dtype=torch.int64, device=ids.device)
            self._seen = counts.scatter_add_(1, ids, mask.to(torch.int64)) > 0

    def __call__(self, logits: Tensor) -> Tensor:
        """The most likely token of each row; of equally likely ones the first."""
        choice = self._choice
        if self._seen is not None:
            logits = logits.float()
            penalised = torch.where(logits < 0, logits * choice.penalty, logits / choice.penalty)
            logits = torch.where(self._seen[:, : logits.shape[1]], penalised, logits)
        banned = choice.suppressed + (choice.suppressed_first if self._first else ())
        if banned:
            logits = logits.clone()
            logits[:, list(banned)] = float("-inf")
        self._first = False
        newest = logits.argmax(dim=-1)
        if self._seen is not None:
            self._seen.scatter_(1, newest[:, None], True)
        return newest

    def keep(self, places: Tensor) -> None:
        """Keep only the rows at `places`."""
        if self._seen is not None:
            self._seen = self._seen[places]


def ignored_settings(config: GenerationConfig | None) -> list[str]:
    """The settings of a generation_config that `Choice` leaves out and that change tokens."""
    return [name for name in CHANGING if getattr(config, name, None)]


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer: the generation_config's, or else the tokenizer's."""
    given = getattr(model.generation_config, "eos_token_id", None)
    if given is None:
        given = tokenizer.eos_token_id
    if given is None:
        return frozenset()
    return frozenset([given] if isinstance(given, int) else given)


def until(tokens: list[int], ends: frozenset[int]) -> tuple[list[int], bool]:
    """The tokens before the first end token, and whether there is one."""
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[:place], True
    return list(tokens), False
