"""The zoo's odd ones past the anatomy: decoding against `generate`, divergence, samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.anatomy import examine
from engine.ara import Sample
from engine.decode import Decoder, Row
from engine.patch import Patch
from engine.report import Silent
from engine.samples import collect_samples
from engine.scorers.kl import divergences, measure_reference
from engine.shortcuts import choose_shortcuts
from jobs.spec.shape import Shape
from tests.engine.zoo import ENTRIES, build

PROMPTS = [
    [9, 17, 33, 21, 40, 12, 50, 8, 30, 61, 11],
    [14, 52, 7, 33, 5],
    [44, 8, 23, 61, 70, 13, 9],
]
NEW = 6


class Words:
    """A tokenizer of numbers."""

    pad_token_id = 0
    eos_token_id = None

    def batch_decode(self, tokens: list[list[int]], **_: Any) -> list[str]:
        return [" ".join(map(str, row)) for row in tokens]


def decoder_of(name: str) -> Decoder:
    """A decoder of a tiny model of the zoo, with the shortcuts that it bears."""
    model = build(next(entry for entry in ENTRIES if entry.id.startswith(name + "-")))
    model.generation_config.eos_token_id = None
    return Decoder(model, Words(), None)


# model type -> whether it bears padding, and a cache
KINDS = {
    "llama": (True, True),
    "mamba": (True, True),
    "mamba2": (True, True),
    "falcon_mamba": (True, True),
    "deepseek_v4": (False, True),
    "minimax": (True, False),
    "openai-gpt": (True, False),
    "git": (True, False),
    "rwkv": (False, False),
    "recurrent_gemma": (False, False),
}


@pytest.mark.parametrize("name", KINDS)
def test_answers_are_those_of_generate(name: str) -> None:
    decoder = decoder_of(name)
    warnings = choose_shortcuts(decoder, PROMPTS[0])
    assert (decoder.pads, decoder.caches) == KINDS[name]
    assert len(warnings) == KINDS[name].count(False)
    decoder.reserve(11, NEW)
    assert (decoder.batch_size == 1) == (not decoder.pads)
    answers = decoder.answers([Row(ids) for ids in PROMPTS], [], NEW, Silent(), "answers")
    for ids, answer in zip(PROMPTS, answers, strict=True):
        row = torch.tensor([ids])
        out = decoder.model.generate(
            input_ids=row, attention_mask=torch.ones_like(row), max_new_tokens=NEW, do_sample=False
        )
        assert answer.tokens == out[0, len(ids) :].tolist()


@pytest.mark.parametrize("name", ["gemma4_text", "nemotron_h_omni"])
def test_divergence_from_itself_is_zero(name: str) -> None:
    """Settings that differ from block to block, and a head that the outer model does not know."""
    decoder = decoder_of(name)
    decoder.reserve(11, NEW)
    own = decoder.answers([Row(ids) for ids in PROMPTS], [], NEW, Silent(), "answers")
    reference = measure_reference(decoder, PROMPTS, own, 4, Silent())
    (moved,) = divergences(decoder, reference, [], Silent(), "divergence")
    assert moved.multi < 1e-9


def test_blocks_that_differ_count_with_their_largest_size() -> None:
    config = decoder_of("gemma4_text").text_config
    blocks = [block.head_dim for block in config.per_layer_config]
    assert min(blocks) < max(blocks)
    shape = Shape.of(config, 2)
    assert shape.queries == config.num_attention_heads * max(blocks)
    assert Shape.of(config.to_dict(), 2) == shape


def test_writers_that_text_does_not_run_have_no_samples() -> None:
    decoder = decoder_of("mllama")
    anatomy = examine(decoder.model)
    decoder.patch = Patch(anatomy)
    decoder.batch_size = 2
    samples = collect_samples(decoder, anatomy, PROMPTS, PROMPTS, Silent(), affine=True, ara=True)
    assert samples.means is not None and samples.ara is not None
    known = {w.name: s for w, s in zip(anatomy.writers, samples.ara, strict=True)}
    silent = {name for name, sample in known.items() if sample is None}
    assert silent == {"model.layers.1.cross_attn.o_proj", "model.layers.1.mlp.down_proj"}
    assert any(isinstance(sample, Sample) for sample in known.values())
