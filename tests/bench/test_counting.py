"""What bench.counting counts, against torch's own counter and against a clock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from multiprocessing import Barrier
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from bench.counting import PHASES, REST, Counter, linear_layers
from engine.decode import Decoder, Row
from engine.lanes import Lanes
from engine.report import Report, Silent

CPU = torch.device("cpu")


class Letters:
    """Enough of a tokenizer for a decoder."""

    pad_token_id, eos_token_id = 0, None

    def batch_decode(self, tokens: list[list[int]], **_: Any) -> list[str]:
        return ["x" * len(one) for one in tokens]


@pytest.fixture(scope="module")
def model() -> Iterator[LlamaForCausalLM]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, eos_token_id=None,
    )  # fmt: skip
    made = LlamaForCausalLM(config)
    made.train(False)
    made.generation_config.eos_token_id = None
    yield made


def test_operations_are_those_of_torchs_own_counter(model: LlamaForCausalLM) -> None:
    decoder = Decoder(model, Letters(), None)
    decoder.batch_size = 2
    rows = [Row([5, 6, 7]), Row([8, 9]), Row([3])]
    # the plain backend is made of matrix products, which both count
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as truth:
        decoder.answers(rows, [], 4, Silent(), "answers")
    with Counter(model, CPU) as counter:
        decoder.answers(rows, [], 4, Silent(), "answers")
    assert counter.phases["answers"].flops == truth.get_total_flops() > 0
    assert counter.phases[REST].flops == counter.phases["divergence"].flops == 0
    assert counter.total.flops == counter.phases["answers"].flops


@torch.inference_mode()
def test_bytes_are_weights_and_the_cache(model: LlamaForCausalLM) -> None:
    ids = torch.ones(2, 5, dtype=torch.long)
    with Counter(model, CPU) as counter:
        model(input_ids=ids, use_cache=False)
    weights = sum(p.nbytes for name, p in model.named_parameters() if "embed" not in name)
    norms = sum(p.nbytes for name, p in model.named_parameters() if "norm" in name)
    cache = 3 * 2 * (2 * 2 * 5 * 8) * 4  # layers, keys and values, rows, heads, tokens, float32
    assert counter.total.bytes == weights - norms + cache


def test_nothing_stays_behind(model: LlamaForCausalLM) -> None:
    before = nn.functional.scaled_dot_product_attention, Decoder.answers
    with pytest.raises(RuntimeError, match="on purpose"), Counter(model, CPU):
        raise RuntimeError("on purpose")
    assert (nn.functional.scaled_dot_product_attention, Decoder.answers) == before
    assert all(not layer._forward_hooks for layer in linear_layers(model))


def diverge() -> None:
    """Call the function of the phase, by whatever is there now."""
    owner, name = PHASES["divergence"]
    getattr(owner, name)()


def burn(seconds: float) -> None:
    """Use the processor of this thread for so long."""
    began = time.thread_time()
    while time.thread_time() - began < seconds:
        torch.ones(1 << 15).sin_()  # without the interpreter's lock


def test_phases_have_their_own_seconds(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A phase inside of another is not counted twice."""
    monkeypatch.setattr(*PHASES["divergence"], lambda: burn(0.1))

    def answers(self: Decoder) -> None:
        burn(0.2)
        diverge()

    monkeypatch.setattr(Decoder, "answers", answers)
    with Counter(model, CPU) as counter:
        Decoder.answers(None)  # type: ignore[call-arg, arg-type]
        burn(0.3)
    found = {name: work.processor for name, work in counter.phases.items()}
    assert found["divergence"] == pytest.approx(0.1, abs=0.06)
    assert found["answers"] == pytest.approx(0.2, abs=0.06)
    assert found[REST] == pytest.approx(0.3, abs=0.06)
    assert sum(found.values()) == pytest.approx(counter.total.processor)
    walls = sum(work.wall for work in counter.phases.values())
    assert walls == pytest.approx(counter.total.wall)


def test_lanes_share_the_seconds(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes: the operations of both, the seconds of the clock, all processor seconds."""
    layer, x = next(iter(linear_layers(model))), torch.ones(3, 32)
    together = Barrier(2)

    def divergences() -> None:
        together.wait(10)  # both are in the phase at once
        layer(x)
        burn(0.2)

    def work(number: int, report: Report) -> None:
        torch.set_num_threads(1)
        diverge()

    monkeypatch.setattr(*PHASES["divergence"], divergences)
    with Counter(model, CPU) as counter:
        layer(x)
        counter.restart()  # what came before is forgotten
        lanes = Lanes(2, work)
        items = iter(range(2))
        lanes.run(lambda: next(items, None), Silent(), lambda number, found: None)
        lanes.close()
    moved = counter.phases["divergence"]
    assert counter.total.flops == moved.flops == 2 * 2 * 3 * 32 * 32
    assert moved.processor == pytest.approx(counter.total.processor, abs=0.1)
    assert counter.total.processor >= 0.4
    assert 0.2 <= moved.wall <= counter.total.wall * 1.001, "not both lanes' seconds added up"


def test_a_stack_of_experts_is_refused() -> None:
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, num_experts=8,
        num_experts_per_tok=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="stacks of experts"):
        linear_layers(Qwen3MoeForCausalLM(config))


def test_another_attention_is_refused(model: LlamaForCausalLM) -> None:
    model.config._attn_implementation = "eager"
    try:
        with pytest.raises(ValueError, match="eager"):
            Counter(model, CPU)
    finally:
        model.config._attn_implementation = "sdpa"
