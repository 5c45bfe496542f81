"""KL(original‖edited) against a direct float64 computation on really replaced weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.decode import Row
from engine.load import load_folder
from engine.preparation import Ready
from engine.report import Silent
from engine.scorers import kl
from engine.scorers.kl import divergence, divergences, measure_reference
from tests.engine.fixtures_run import CANDIDATES, ready, replaced, tiny_folder

__all__ = ["ready", "tiny_folder"]


def direct(ready: Ready, candidate: int) -> tuple[float, float]:
    """(kl_first, kl_multi) in float64: both models really there, one prompt at a time."""
    original, _ = load_folder(ready.loaded.source, torch.device("cpu"), torch.float64)
    edited = replaced(ready, CANDIDATES[candidate], torch.float64)
    texts = ready.request.prompts.search_harmless
    first, every = [], []
    for text in texts:
        prompt = ready.formatter.ids(text)
        out = ready.loaded.model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=ready.request.kl_tokens, do_sample=False,
        )  # fmt: skip
        count = out.shape[1] - len(prompt)
        with torch.no_grad():
            p, q = (model(out[:, :-1]).logits[0, -count:] for model in (original, edited))
        each = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
        assert each.dtype == torch.float64 and count == len(each)
        first.append(each[0])
        every.append(each)
    return float(torch.stack(first).mean()), float(torch.cat(every).mean())


@pytest.mark.parametrize("rows", [128, 5, 1])
def test_both_divergences_equal_the_direct_computation(ready: Ready, rows: int) -> None:
    decoder = ready.decoder
    saved, decoder.batch_size = decoder.batch_size, rows
    reference = ready.roles["search"].reference
    assert reference is not None
    edits = [ready.builder.build(candidate) for candidate in CANDIDATES]
    fast = divergences(decoder, reference, edits, Silent(), "divergence")
    decoder.batch_size = saved
    for number, found in enumerate(fast):
        first, multi = direct(ready, number)
        assert found.first == pytest.approx(first, abs=1e-5) and first > 0.01
        assert found.multi == pytest.approx(multi, abs=1e-5) and multi > 0.01


def test_the_original_does_not_differ_from_itself(ready: Ready) -> None:
    reference = ready.roles["heldout"].reference
    assert reference is not None
    (found,) = divergences(ready.decoder, reference, [], Silent(), "divergence")
    assert found.first < 1e-9 and found.multi < 1e-9


def test_answers_shorter_than_the_tokens_count_their_end_token(ready: Ready) -> None:
    prompts = [ready.formatter.ids(text) for text in ready.request.prompts.search_harmful]
    answers = ready.decoder.answers([Row(i) for i in prompts], [], 24, Silent(), "answers")
    reference = measure_reference(ready.decoder, prompts, answers, 20, Silent())
    counts = [len(states) for states in reference.states]
    assert counts == [min(20, len(a.tokens) + a.ended) for a in answers]
    assert min(counts) < max(counts) == 20
    for ids, prompt, answer, count in zip(reference.inputs, prompts, answers, counts, strict=True):
        assert ids == prompt + answer.tokens[: count - 1]


def logits(rows: int, vocabulary: int, moved: float) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(vocabulary)
    p = 3.0 * torch.randn(rows, vocabulary, generator=made)
    return p, p + moved * torch.randn(rows, vocabulary, generator=made)


@pytest.mark.parametrize("moved", [0.0001, 0.05])
@pytest.mark.parametrize("vocabulary", [1000, 262144])
def test_chunks_of_rows_give_the_formula(
    vocabulary: int, moved: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the divergence (5e-9) is less than float32's rounding of a logarithm."""
    p, q = logits(6, vocabulary, moved)
    a, b = (side.numpy().astype(np.longdouble) for side in (p, q))
    a, b = (side - np.log(np.exp(side).sum(-1, keepdims=True)) for side in (a, b))
    slow = torch.tensor((np.exp(a) * (a - b)).sum(-1).astype(np.float64))
    assert float(slow.min()) > 1e-9 and float(slow.max()) < 1e-2
    torch.testing.assert_close(divergence(p, q), slow, rtol=1e-6, atol=0)
    monkeypatch.setattr(kl, "KL_CHUNK", vocabulary)
    torch.testing.assert_close(divergence(p, q), slow, rtol=1e-6, atol=0)


def test_impossible_tokens_and_broken_models() -> None:
    p, q = logits(2, 100, 0.05)
    p[:, 7] = q[:, 7] = float("-inf")
    assert torch.isfinite(divergence(p, q)).all()
    broken = kl.mean_divergence([divergence(p, q * float("nan"))])
    assert broken.first == broken.multi == kl.WORST
