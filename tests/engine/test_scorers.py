"""Further scores against plain computations: log-odds, perplexity, length drift."""

from __future__ import annotations

import math
import random

import pytest
import torch

from engine.decode import Answer
from engine.load import load_folder
from engine.preparation import Ready
from engine.report import Silent
from engine.scorers import harness, length, log_odds, perplexity
from engine.scorers.further import Further, measured
from engine.session import Session
from jobs.spec.protocol import Score, ScoredBatch
from tests.engine.fixtures_run import CANDIDATES, prepare_request, ready, replaced, tiny_folder

__all__ = ["ready", "tiny_folder"]


def test_log_odds_are_the_formula() -> None:
    torch.manual_seed(0)
    logits = 30 * torch.randn(6, 50)
    logits[0, 7] = 200  # P rounds to 1: 1 − P must not cancel
    tokens = [3, 7, 11]
    p = logits.double().softmax(-1)
    inside = p[:, tokens].sum(-1)
    rest = [k for k in range(50) if k not in tokens]
    expected = inside.log() - p[:, rest].sum(-1).log()
    assert torch.allclose(log_odds.log_odds(logits, tokens), expected, atol=1e-9)


def test_refusal_tokens_cover_most_refusals() -> None:
    first = [5] * 60 + [9] * 30 + [2] * 6 + [1] * 4
    answers = [Answer([token, 40], "", True) for token in first] + [Answer([], "", True)]
    assert log_odds.refusal_tokens(answers) == (5, 9, 2)
    assert log_odds.refusal_tokens([]) == ()


@pytest.mark.parametrize("place", [None, 0, 1])
def test_log_odds_of_an_edit_equal_those_of_replaced_weights(
    ready: Ready, place: int | None
) -> None:
    tokens, prompts = [301, 17, 60], ready.roles["search"].harmful
    edit = None if place is None else ready.builder.build(CANDIDATES[place])
    found = log_odds.value(ready.decoder, prompts, tokens, edit, Silent())
    if place is None:
        model, _ = load_folder(ready.loaded.source, torch.device("cpu"), torch.float64)
    else:
        model = replaced(ready, CANDIDATES[place], torch.float64)
    each = []
    for ids in prompts:
        with torch.no_grad():
            p = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
        chosen = float(p[tokens].sum())
        each.append(math.log(chosen) - math.log1p(-chosen))
    mean = sum(each) / len(each)
    error = 1.959963984540054 * torch.tensor(each).std().item() / math.sqrt(len(each))
    assert found.value == pytest.approx(mean, abs=1e-4)
    assert found.n == len(prompts)
    assert found.low == pytest.approx(mean - error, abs=1e-3)
    assert found.high == pytest.approx(mean + error, abs=1e-3)


def test_perplexity_is_that_of_the_loss_of_transformers(ready: Ready) -> None:
    texts = [
        "The floor is mopped with a mop, slowly and from the far corner to the door.",
        "A window.",
        "Take a cloth. " * 40,
    ]
    pieces = perplexity.windows(ready.loaded.tokenizer, texts, context=100)
    assert max(map(len, pieces)) == 100 and len(pieces) > 3
    edit = ready.builder.build(CANDIDATES[0])
    with ready.decoder.edited(edit):
        found = perplexity.perplexity(ready.decoder, pieces, Silent())
    model = replaced(ready, CANDIDATES[0], torch.float64)
    total, tokens = 0.0, 0
    for piece in pieces:
        ids = torch.tensor([piece])
        with torch.no_grad():
            loss = float(model(ids, labels=ids).loss)
        total += loss * (len(piece) - 1)
        tokens += len(piece) - 1
    assert found.value == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert found.n == tokens
    assert found.low is not None and found.high is not None
    assert found.low < found.value < found.high


def test_no_edit_stays_behind_a_score(ready: Ready) -> None:
    decoder, further = ready.decoder, Further(openings=(5, 9), pieces=[[1, 17, 33, 21, 40]])
    with torch.inference_mode():
        ids, mask = decoder.padded(ready.roles["search"].harmful[:3])
        before = decoder.forward(ids, mask, 1).logits
        edit = ready.builder.build(CANDIDATES[0])
        for name in ("log_odds", "perplexity"):
            found = measured([name], decoder, ready.roles["search"], further, edit, 4, Silent())
            assert name in found
            assert torch.equal(decoder.forward(ids, mask, 1).logits, before)
        with pytest.raises(ZeroDivisionError), decoder.edited(edit):
            assert not torch.equal(decoder.forward(ids, mask, 1).logits, before)
            1 / 0  # noqa: B018
        assert torch.equal(decoder.forward(ids, mask, 1).logits, before)


def test_rows_whose_logits_are_all_wanted_fit_into_memory(
    ready: Ready, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1024 positions of 1024 logits in float32 are 4 MB a row, and the harness's copy as much."""
    for module in (perplexity, harness):
        monkeypatch.setattr(module, "free_bytes", lambda device: 100 << 20)
    monkeypatch.setattr(ready.decoder, "batch_size", 1024)
    vocabulary = ready.decoder.text_config.vocab_size
    left = (100 << 20) - 4 * (1 << 24)
    assert perplexity._rows(ready.decoder, 512) == left // 2 // (512 * 4 * (64 + vocabulary))
    row = 512 * 4 * (64 + vocabulary) + 512 * 4 * vocabulary  # the context is 512
    assert harness._rows(ready.decoder) == (100 << 20) // 2 // row


def test_length_drift_covers_the_true_ratio() -> None:
    draw, hits = random.Random(3), 0
    for _ in range(300):
        original = [draw.randint(20, 60) for _ in range(80)]
        edited = [round(o * 1.2 + draw.gauss(0, 6)) for o in original]
        found = length.drift(edited, original)
        assert found.value == pytest.approx(sum(edited) / sum(original))
        assert found.low is not None and found.high is not None
        hits += found.low <= 1.2 <= found.high
    assert 275 <= hits <= 297  # 95 % of 300 is 285, standard deviation 3.8


def test_length_of_nothing() -> None:
    assert length.drift([], []).value == 1.0
    assert length.drift([3], [4]).low is None


def test_further_scores_come_with_the_candidates(ready: Ready) -> None:
    """Through the session: values of the original at baseline, of edits in each score."""
    texts = ready.request.prompts.model_copy(update={"texts": ["Mop the floor with a mop, twice."]})
    names = ["length", "perplexity"]
    request = prepare_request(ready.loaded.source, prompts=texts, scorers=names)
    session = Session()
    prepared = session.prepare(request, Silent())
    for role in ("search", "heldout"):
        assert prepared.baseline[role].values["length"].value == 1.0
    assert set(prepared.baseline["over_refusal"].values) == {"perplexity"}
    asked = Score(candidates=CANDIDATES, scorers=["length", "perplexity"])
    batch: ScoredBatch = session.score(asked, Silent())
    lengths = []
    for place, scored in enumerate(batch.scored):
        model = replaced(ready, CANDIDATES[place], torch.float32)
        ids = torch.tensor([ready.loaded.tokenizer("Mop the floor with a mop, twice.").input_ids])
        with torch.no_grad():
            loss = float(model(ids, labels=ids).loss)
        values = scored.scores.values
        assert values["perplexity"].value == pytest.approx(math.exp(loss), rel=1e-4)
        tokens = 0
        for prompt in session.ready.roles["search"].harmless:
            out = model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=24, do_sample=False,
            )[0, len(prompt) :]  # fmt: skip
            tokens += len(out) - (int(out[-1]) in session.ready.decoder.ends)
        original = sum(session.ready.roles["search"].lengths)
        assert values["length"].value == pytest.approx(tokens / original)
        lengths.append(values["length"].value)
    assert len(set(lengths)) > 1
