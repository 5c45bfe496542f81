"""Greedy decoding against its slow twin: plain `generate` on really replaced weights."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from engine.decode import Decoder, Row
from engine.errors import EngineError
from engine.preparation import Ready
from engine.report import Silent
from engine.scorers.refusals import Refusals
from tests.engine.fixtures_run import CANDIDATES, prompts, ready, replaced, tiny_folder

__all__ = ["ready", "tiny_folder"]

NEW = 24


@pytest.fixture
def inputs(ready: Ready) -> list[list[int]]:
    """16 prompts of different lengths as token ids."""
    bad, good = prompts(8)
    return [ready.formatter.ids(text) for text in [*bad, *good]]


@pytest.fixture
def decoder(ready: Ready) -> Iterator[Decoder]:
    """The prepared decoder, with a batch that holds everything; restored afterwards."""
    saved = ready.decoder.batch_size, ready.decoder.limit, ready.decoder.choice
    ready.decoder.batch_size = 128
    yield ready.decoder
    ready.decoder.batch_size, ready.decoder.limit, ready.decoder.choice = saved


def generated(model: Any, ready: Ready, inputs: list[list[int]]) -> list[list[int]]:
    """Answers by plain `generate`, one prompt at a time, as tokens without the end token."""
    answers = []
    for ids in inputs:
        out = model.generate(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=NEW, do_sample=False,
        )  # fmt: skip
        answer = out[0, len(ids) :].tolist()
        if answer and answer[-1] in ready.decoder.ends:
            answer = answer[:-1]
        answers.append(answer)
    return answers


@pytest.fixture(scope="module")
def truth(ready: Ready) -> list[list[list[int]]]:
    """The answers of the original and of each candidate, by the slow way."""
    bad, good = prompts(8)
    inputs = [ready.formatter.ids(text) for text in [*bad, *good]]
    models = [replaced(ready, candidate, torch.float32) for candidate in CANDIDATES]
    return [generated(model, ready, inputs) for model in [ready.loaded.model, *models]]


@pytest.mark.parametrize("batch", [128, 7, 1])
def test_candidates_in_one_batch_give_the_tokens_of_generate(
    ready: Ready,
    decoder: Decoder,
    inputs: list[list[int]],
    truth: list[list[list[int]]],
    batch: int,
) -> None:
    decoder.batch_size = batch
    edits = [ready.builder.build(candidate) for candidate in CANDIDATES]
    rows = [Row(ids, e) for e in range(-1, len(edits)) for ids in inputs]
    answers = decoder.answers(rows, edits, NEW, Silent(), "answers")
    assert [answer.tokens for answer in answers] == [a for model in truth for a in model]


def test_answers_differ_in_length_and_between_candidates(truth: list[list[list[int]]]) -> None:
    """The comparison above means something."""
    assert len({len(answer) for answer in truth[0]}) > 4
    assert all(truth[0] != answers for answers in truth[1:])


@pytest.mark.parametrize("markers", [["the", "lamp"], ["e", "a"], ["bask", "tape", "Sure"]])
def test_early_stop_gives_the_same_decisions(
    ready: Ready, decoder: Decoder, inputs: list[list[int]], truth: list[list[list[int]]],
    markers: list[str],
) -> None:  # fmt: skip
    refusals = Refusals(markers)
    edits = [ready.builder.build(candidate) for candidate in CANDIDATES]
    rows = [Row(ids, e) for e in range(-1, len(edits)) for ids in inputs]
    answers = decoder.answers(rows, edits, NEW, Silent(), "answers", refusals.decided)
    slow = [refusals.is_refusal(text) for model in truth for text in decoder.texts(model)]
    assert [refusals.is_refusal(answer.text) for answer in answers] == slow
    assert sum(slow) > 0
    if markers == ["e", "a"]:
        assert sum(len(answer.tokens) for answer in answers) < 0.8 * NEW * len(rows)


def test_generation_config_is_honoured_as_generate_does(
    ready: Ready, decoder: Decoder, inputs: list[list[int]]
) -> None:
    config = ready.loaded.model.generation_config
    saved = {name: getattr(config, name, None) for name in ("repetition_penalty", "temperature",
             "suppress_tokens", "begin_suppress_tokens", "top_k")}  # fmt: skip
    settings: dict[str, Any] = {"repetition_penalty": 1.4, "temperature": 0.1, "top_k": 1,
                "suppress_tokens": [310, 311, 320], "begin_suppress_tokens": [333]}  # fmt: skip
    plain = [a.tokens for a in decoder.answers([Row(i) for i in inputs], [], NEW, Silent(), "")]
    try:
        for name, value in settings.items():
            setattr(config, name, value)
        decoder.choice = type(decoder.choice).of(config)
        slow = generated(ready.loaded.model, ready, inputs)
    finally:
        for name, value in saved.items():
            setattr(config, name, value)
    fast = [a.tokens for a in decoder.answers([Row(i) for i in inputs], [], NEW, Silent(), "")]
    assert fast == slow != plain


class Narrow:
    """A model that runs out of memory beyond `rows` rows of a batch."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if len(kwargs["input_ids"]) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory (as the test wants it)")


@pytest.mark.parametrize("rows", [5, 1])
def test_out_of_memory_halves_the_batch_and_goes_on(
    ready: Ready, decoder: Decoder, inputs: list[list[int]], truth: list[list[list[int]]], rows: int
) -> None:
    hook = ready.loaded.model.register_forward_pre_hook(Narrow(rows), with_kwargs=True)
    try:
        answers = decoder.answers([Row(ids) for ids in inputs], [], NEW, Silent(), "answers")
    finally:
        hook.remove()
    assert [answer.tokens for answer in answers] == truth[0]
    assert decoder.batch_size <= rows
    assert decoder.reserve(64, NEW) <= rows  # remembered


def test_a_batch_that_failed_is_freed_before_memory_is_given_back(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed: list[weakref.ref[torch.Tensor]] = []
    gone: list[bool] = []
    monkeypatch.setattr("engine.decode.release", lambda: gone.append(failed[0]() is None))

    def forward() -> None:
        batch = torch.zeros(4, 8)
        failed.append(weakref.ref(batch))
        raise torch.OutOfMemoryError("CUDA out of memory (as the test wants it)")

    with decoder.surviving(4):
        forward()
    assert gone == [True]


def test_out_of_memory_with_one_row_is_a_typed_error(
    ready: Ready, decoder: Decoder, inputs: list[list[int]]
) -> None:
    hook = ready.loaded.model.register_forward_pre_hook(Narrow(0), with_kwargs=True)
    try:
        with pytest.raises(EngineError) as caught:
            decoder.answers([Row(ids) for ids in inputs], [], NEW, Silent(), "answers")
    finally:
        hook.remove()
    assert caught.value.reason == "out_of_memory"


def test_texts_are_streamed_and_complete(
    ready: Ready, decoder: Decoder, inputs: list[list[int]], truth: list[list[list[int]]]
) -> None:
    seen: dict[int, list[str]] = {index: [] for index in range(len(inputs))}
    decoder.answers(
        [Row(ids) for ids in inputs], [], NEW, Silent(), "answers",
        on_text=lambda index, text: seen[index].append(text),
    )  # fmt: skip
    assert [texts[-1] for texts in seen.values()] == decoder.texts(truth[0])
    assert max(map(len, seen.values())) > 5


def test_half_a_character_at_the_end_is_left_out(ready: Ready) -> None:
    tokenizer = ready.loaded.tokenizer
    ids = tokenizer("无法提供", add_special_tokens=False)["input_ids"]
    assert ready.decoder.texts([ids, ids[:-1], ids[:-2]]) == ["无法提供", "无法提", "无法提"]
    assert set(tokenizer.decode(ids[:-1])) == {"\ufffd"}  # what is avoided
