"""A tiny random model of an entry, through the class that transformers maps it to."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.engine.zoo.entries import Entry
from tests.engine.zoo.shrink import shrink

TOKENS = 8


def build(entry: Entry, seed: int = 0, vectors: bool = True) -> Any:
    """The entry's model: float32, eval mode, every parameter finite and none of them constant.

    Without `vectors` its vectors (norm weights, biases, gates) are constant, so that a norm is a
    mere division and a gate a number.
    """
    torch.manual_seed(seed)
    kind: Any = getattr(transformers, entry.architecture)
    config = shrink(entry.model_type, entry.settings)
    text = config.get_text_config(decoder=True)
    if type(text) is kind.config_class:  # the text half's class, mapped to by the whole's type
        config = text
    with _empty_is_nan():
        model = kind._from_config(config, dtype=torch.float32).eval()
    _disturb(model, seed, vectors)
    return model


def tokens(model: Any) -> dict[str, Any]:
    """A prompt of 8 tokens, as the model's arguments; an image's states where blocks read them."""
    ids: Tensor = 10 + torch.arange(TOKENS)[None]  # above all special tokens
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    if "cross_attention_states" in inspect.signature(model.forward).parameters:
        random = torch.Generator().manual_seed(0)
        width = model.config.get_text_config().hidden_size
        given["cross_attention_states"] = torch.randn((1, 4, width), generator=random)
    return given


@contextmanager
def _empty_is_nan() -> Iterator[None]:
    """Fill uninitialised memory with NaN, so that a forgotten parameter cannot pass for random."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@torch.no_grad()
def _disturb(model: nn.Module, seed: int, vectors: bool) -> None:
    """Norm weights of 1, biases of 0 and experts that nobody initialised would hide mistakes."""
    random = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        drawn = torch.randn(parameter.shape, generator=random)
        if not parameter.isfinite().all():
            parameter.copy_(0.2 * drawn)
        elif parameter.ndim == 1 and not vectors:
            parameter.fill_(parameter.mean())
        elif parameter.ndim == 1 or parameter.min() == parameter.max():
            parameter.add_(0.1 * drawn)
