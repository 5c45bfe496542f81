"""Fixtures of the running side: a tiny random chat model on disk, the engine as a child."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from demo import MODEL, grammar
from demo.vocabulary import build_tokenizer
from engine.change import formula
from engine.load import load_folder
from engine.preparation import Ready, prepare
from engine.report import Silent
from jobs.spec.candidate import Ablation, Candidate, Kernel, Recipe, constant
from jobs.spec.protocol import (
    Envelope,
    Error,
    Log,
    Partial,
    Prepare,
    Progress,
    PromptTexts,
    Request,
    Result,
    answers,
)

RAW = Recipe(projection="none")
Message = Progress | Log | Partial | Result | Error


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 4 layers, hidden 64, float32, with the demo model's tokenizer.

    Wide weights and many end tokens: its answers differ in text and in length.
    """
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = build_tokenizer()
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        initializer_range=0.3, tie_word_embeddings=False, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    model.eval()
    ends = [tokenizer.eos_token_id, *range(300, 340)]
    model.generation_config.eos_token_id = ends
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    model.lm_head.weight.data[[piece.startswith("<") for piece in pieces]] = 0  # bytes: never said
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The committed demo model."""
    if not (MODEL / "config.json").is_file():
        pytest.skip("the demo model is not there; make it with `python -m demo.train`")
    return MODEL


def prompts(count: int, start: int = 0) -> tuple[list[str], list[str]]:
    """`count` requests that the demo model refuses, and as many that it answers."""
    refused, answered = [], []
    verbs, allowed, objects = list(grammar.FORBIDDEN), list(grammar.ALLOWED), list(grammar.OBJECTS)
    for number in range(start, start + count):
        thing = objects[(7 * number) % len(objects)]
        refused.append(grammar.request(verbs[number % len(verbs)], thing, number % 14))
        answered.append(grammar.request(allowed[number % len(allowed)], thing, number % 14))
    return refused, answered


def prompt_texts(direction: int = 24, search: int = 12, heldout: int = 8) -> PromptTexts:
    """Disjoint prompts of every role."""
    bad, good = prompts(direction + search + heldout)
    first, second = direction, direction + search
    return PromptTexts(
        direction_harmful=bad[:first], direction_harmless=good[:first],
        search_harmful=bad[first:second], search_harmless=good[first:second],
        heldout_harmful=bad[second:], heldout_harmless=good[second:],
        over_refusal=good[:4],
    )  # fmt: skip


def prepare_request(folder: Path, **more: Any) -> Prepare:
    """A small job on the model in `folder`, on the CPU in float32."""
    settings: dict[str, Any] = {
        "model": "tiny", "path": str(folder), "dtype": "float32", "device": "cpu",
        "recipes": [Recipe(), RAW], "prompts": prompt_texts(), "max_new_tokens": 24,
        "kl_tokens": 6,
    }  # fmt: skip
    return Prepare(**(settings | more))


CANDIDATES = [
    Ablation(mode="full", attention=constant(1.0), mlp=constant(0.5)),
    Ablation(
        mode="none", scope="global", index=1.5, attention=constant(0.8),
        mlp=Kernel(max_weight=1.2, min_weight=0.1, position=2.0, distance=2.0),
    ),
    Ablation(mode="columns", recipe=RAW, attention=constant(0.3), mlp=constant(0.0)),
]  # fmt: skip


class Engine:
    """A real `python -m engine` child, driven over two pipes as a supervisor does."""

    def __init__(self, log: Path) -> None:
        self._theirs_read, self.requests = os.pipe()
        self.answers, theirs_write = os.pipe()
        self._log = log.open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "engine", "--read", str(self._theirs_read),
             "--write", str(theirs_write)],
            pass_fds=(self._theirs_read, theirs_write),
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip
        os.close(self._theirs_read)
        os.close(theirs_write)
        self._pending = b""
        self._number = 0

    def send(self, request: Request) -> int:
        """Send a request; its id."""
        self._number += 1
        line = Envelope(id=self._number, request=request).model_dump_json()
        self.write(line.encode() + b"\n")
        return self._number

    def write(self, line: bytes) -> None:
        """Raw bytes to the engine."""
        while line:
            line = line[os.write(self.requests, line) :]

    def next(self, seconds: float = 120) -> Message:
        """The next message. Raises EOFError at end of file, TimeoutError after `seconds`."""
        limit = time.monotonic() + seconds
        while b"\n" not in self._pending:
            if not select.select([self.answers], [], [], max(0.0, limit - time.monotonic()))[0]:
                raise TimeoutError(f"no message within {seconds} s")
            chunk = os.read(self.answers, 1 << 16)
            if not chunk:
                raise EOFError
            self._pending += chunk
        line, self._pending = self._pending.split(b"\n", 1)
        return answers.validate_json(line)

    def until_end(self, seconds: float = 240) -> list[Message]:
        """All messages up to and with the next result or error."""
        found: list[Message] = []
        while not found or not isinstance(found[-1], (Result, Error)):
            found.append(self.next(seconds))
        return found

    def ask(self, request: Request) -> dict[str, Any]:
        """The value of a request that succeeds."""
        self.send(request)
        last = self.until_end()[-1]
        assert isinstance(last, Result), last
        return last.value

    def hang_up(self) -> None:
        """Close the request pipe: the engine reads end of file."""
        if self.requests >= 0:
            os.close(self.requests)
            self.requests = -1

    def close(self) -> None:
        """End the child, whatever it does."""
        self.hang_up()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(timeout=10)
        os.close(self.answers)
        self._log.close()


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Engine]:
    """An engine process that has said that it is ready."""
    process = Engine(tmp_path / "engine.log")
    try:
        first = process.next(60)
        assert isinstance(first, Log) and "engine ready" in first.text
        yield process
    finally:
        process.close()


@pytest.fixture(scope="session")
def ready(tiny_folder: Path) -> Ready:
    """The tiny model, prepared."""
    return prepare(prepare_request(tiny_folder), Silent())


def replaced(ready: Ready, candidate: Candidate, dtype: torch.dtype) -> Any:
    """A second model in `dtype` whose writers hold the candidate's weights by the formula."""
    model, _ = load_folder(ready.loaded.source, torch.device("cpu"), dtype)
    changes = ready.builder.changes(candidate)
    for writer, change in zip(ready.anatomy.writers, changes, strict=True):
        if change is not None:
            weight = model.get_submodule(writer.name).weight
            weight.data.copy_(formula(weight.detach(), change))
    return model
