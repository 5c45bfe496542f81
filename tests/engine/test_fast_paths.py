"""Drafts, kept states and their checks: every fast path against plain decoding, in many models.

The truth is the same decoder without the fast paths (itself held against `generate` on replaced
weights in test_decode and test_stacks), and for divergences the forward of all blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.anatomy import Anatomy, examine
from engine.batch import Batch
from engine.decode import Decoder, Row
from engine.drafts import FIRST, KEPT, Drafts, worthwhile
from engine.edit import Edit, EditBuilder
from engine.lanes import Lanes
from engine.lower import Lower
from engine.patch import Patch
from engine.preparation import Ready
from engine.report import Report, Silent
from engine.scorers.kl import Divergence, divergences, measure_reference
from engine.scorers.refusals import Refusals
from engine.shared import alike
from engine.shortcuts import choose_lower, choose_shortcuts
from jobs.spec.candidate import Ablation, Kernel
from tests.engine.conftest import random_directions
from tests.engine.fixtures_run import prompts, ready, tiny_folder
from tests.engine.test_zoo_decoding import Words
from tests.engine.zoo import ENTRIES, Entry, build

__all__ = ["ready", "tiny_folder"]

NEW = 12
PROMPTS = [
    [9, 17, 33, 21, 40, 12, 50, 8, 30, 61, 11],
    [14, 52, 7, 33, 5],
    [44, 8, 23, 61, 70, 13, 9],
    [14, 52, 7, 33, 5, 21],
]
FRONT = [26, 5, 19, 47, 35, 10]  # what all of the second set begin with, as after a system prompt


def kernel(strength: float, layers: int, reach: int) -> Kernel:
    """The last `reach` layers."""
    return Kernel(
        max_weight=strength, min_weight=strength, position=layers - 1.0, distance=reach - 0.5
    )


def candidate(strength: float, layers: int, reach: int) -> Ablation:
    chosen = kernel(strength, layers, reach)
    return Ablation(mode="none", scope="per_layer", index=None, attention=chosen, mlp=chosen)


class Case:
    """A tiny model with its edits: two that begin at the last layer, one that begins at the first.

    The order in which they come shows each fast path: answers are known, known and other, new.
    """

    def __init__(self, model: Any, **settings: Any) -> None:
        self.model = model
        self.prompts = PROMPTS
        self.anatomy: Anatomy = examine(model)
        self.decoder = Decoder(model, Words(), Patch(self.anatomy))
        self.decoder.ends, self.decoder.batch_size = frozenset({3}), 4
        choose_shortcuts(self.decoder, PROMPTS[0])
        if not self.decoder.pads:
            self.decoder.batch_size = 1
        choose_lower(self.decoder, self.anatomy, 0, PROMPTS[0])
        layers = self.anatomy.layers
        builder = EditBuilder(self.anatomy, random_directions(layers, self.anatomy.hidden))
        self.edits = [builder.build(candidate(1.0, layers, 1)),
                      builder.build(candidate(0.02, layers, 1)),
                      builder.build(candidate(0.5, layers, layers))]  # fmt: skip

    def answers(self, edit: Edit) -> list[list[int]]:
        rows = [Row(ids, 0) for ids in self.prompts]
        found = self.decoder.answers(rows, [edit], NEW, Silent(), "answers")
        self.decoder.learn(rows, found, [], Silent())
        return [answer.tokens for answer in found]

    def beside(self, edit: Edit, report: Report) -> list[list[int]]:
        """The answers in a process of its own."""
        rows = [Row(ids, 0) for ids in self.prompts]
        with self.decoder.keeping_beginnings():
            found = self.decoder.answers(rows, [edit], NEW, report, "answers")
        return [answer.tokens for answer in found]

    def moved(self) -> list[Divergence]:
        """Of each edit, from references that are read anew."""
        self.decoder.select([], [])
        rows = [Row(ids) for ids in self.prompts]
        own = self.decoder.answers(rows, [], NEW, Silent(), "answers")
        reference = measure_reference(self.decoder, self.prompts, own, 4, Silent())
        found = []
        for _ in range(3):  # states are kept from the second time on
            found = [
                divergences(self.decoder, reference, [edit], Silent(), "kl")[0]
                for edit in self.edits
            ]
            self.decoder.learn([], [], reference.inputs, Silent())
        return found


@contextmanager
def without(decoder: Decoder) -> Iterator[None]:
    """Within it the fast paths are taken away."""
    names = ("drafts", "lower", "shares", "ending")
    saved = {name: getattr(decoder, name) for name in names}
    decoder.drafts = decoder.lower = decoder.ending = None
    decoder.shares = False
    yield
    for name, value in saved.items():
        setattr(decoder, name, value)


def check(case: Case) -> None:
    """Of prompts that have nothing in common, and of some that begin alike."""
    case.decoder.overhead = 1  # prompts of unlike lengths are read apart then
    compare(case)
    case.prompts = [FRONT + ids for ids in PROMPTS]
    assert alike(case.prompts) == len(FRONT)  # which is read once
    compare(case)
    case.decoder.overhead = 15  # the same, and the rest of all prompts together
    compare(case)


def compare(case: Case) -> None:
    with without(case.decoder):
        slow = [case.answers(edit) for edit in case.edits]
        moved = case.moved()
    for _ in range(3):
        for edit, answers in zip(case.edits, slow, strict=True):
            assert case.answers(edit) == answers
    if case.decoder.lanes > 1:  # side by side, as candidates on a CPU are
        lanes = Lanes(2, case.beside)
        two: dict[int, object] = {}
        edits = iter(case.edits[:2])
        lanes.run(lambda: next(edits, None), Silent(), two.__setitem__)
        lanes.close()
        assert [two[number] for number in range(2)] == slow[:2]
    for fast, plain in zip(case.moved(), moved, strict=True):
        assert fast.first == pytest.approx(plain.first, rel=1e-3, abs=1e-7)
        assert fast.multi == pytest.approx(plain.multi, rel=1e-3, abs=1e-7)


# model type -> whether it bears drafts, kept states, and a feed-forward of the last tokens alone
KINDS = {
    "llama": (True, True, True),
    "gpt2": (True, True, True),
    "gpt_neox": (True, True, True),
    "bloom": (True, False, False),  # blocks that give more than their states
    "gemma2": (True, True, True),  # a window that slides, capped logits
    "gpt_oss": (True, True, False),  # stacks that are edited in place
    "deepseek_v3": (True, True, True),  # latent attention
    "mllama": (True, False, False),  # layers that leave their place in the cache empty
    "longcat_flash": (True, True, True),  # two layers of the cache in one block
    "qwen3_next": (False, True, True),  # a recurrent state cannot be taken back
    "mamba": (False, True, False),
    "rwkv": (False, False, False),
}


@pytest.mark.parametrize("name", KINDS)
def test_fast_paths_give_what_plain_decoding_gives(name: str) -> None:
    case = Case(build(next(entry for entry in ENTRIES if entry.id.startswith(f"{name}-"))))
    own = case.decoder.drafts, case.decoder.lower, case.decoder.ending
    assert tuple(one is not None for one in own) == KINDS[name]
    assert case.decoder.shares == (case.decoder.drafts is not None)
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.id)
def test_fast_paths_in_the_whole_zoo(entry: Entry) -> None:
    check(Case(build(entry)))


def test_kept_states_shorten_the_forwards(ready: Ready) -> None:
    """Blocks below the edit run once more for the states, then no more."""
    decoder, layers = ready.decoder, ready.anatomy.layers
    assert decoder.drafts is not None and decoder.lower is not None
    inputs = [ready.formatter.ids(text) for text in prompts(8)[0]]
    edit = ready.builder.build(candidate(1e-4, layers, 1))
    ran = 0

    def count(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal ran
        ran += 1

    hook = (
        ready.anatomy.blocks[0]
        .get_submodule("self_attn")
        .register_forward_pre_hook(count, with_kwargs=True)
    )
    runs, answers = [], []
    try:
        for _ in range(3):
            before = ran
            rows = [Row(ids, 0) for ids in inputs]
            found = decoder.answers(rows, [edit], NEW, Silent(), "answers")
            decoder.learn(rows, found, [], Silent())
            answers.append([answer.tokens for answer in found])
            runs.append(ran - before)
    finally:
        hook.remove()
    assert answers[0] == answers[1] == answers[2]
    assert runs[0] > runs[2] == 0


def test_decisions_do_not_depend_on_what_was_answered_before(ready: Ready) -> None:
    """Refusals are cut at the same token whether they came one by one or all at once."""
    decoder, layers = ready.decoder, ready.anatomy.layers
    refusals = Refusals(["e", "a"])
    inputs = [ready.formatter.ids(text) for side in prompts(8) for text in side]
    edits = [ready.builder.build(candidate(weight, layers, 2)) for weight in (1.0, 0.3, 0.7)]

    def answers(edit: Edit) -> list[tuple[list[int], str, bool]]:
        rows = [Row(ids, 0) for ids in inputs]
        found = decoder.answers(rows, [edit], NEW, Silent(), "answers", refusals.decided)
        decoder.learn(rows, found, [], Silent())
        return [(answer.tokens, answer.text, answer.ended) for answer in found]

    with without(decoder):
        slow = [answers(edit) for edit in edits]
    assert len({len(tokens) for tokens, _, _ in slow[0]}) > 2
    for _ in range(3):
        assert [answers(edit) for edit in edits] == slow


def test_right_and_wrong_drafts(ready: Ready) -> None:
    decoder = ready.decoder
    decoder.select([], [])
    inputs = [ready.formatter.ids(text) for text in prompts(3)[0]]
    slow = Batch(decoder, inputs, [[], [], []], NEW, drafts=False)
    slow.step(9)
    fast = Batch(decoder, inputs, [[], [], []], NEW, drafts=True)
    assert fast.drafts
    first, second, third = slow.tokens
    wrong = first[2] + 1
    fast.verify([[*first[:2], wrong, *first[3:6]], second[:6], []])
    assert fast.tokens == [first[:3], second[:7], third[:1]]
    fast.keep([2, 0])
    fast.verify([third[1:4], [wrong]])
    assert fast.tokens == [third[:5], first[:4]]
    fast.step(2)
    assert fast.tokens == [third[:7], first[:6]]


def test_drafts_are_the_latest_that_fit() -> None:
    drafts, prompt = Drafts(), [1, 2]
    assert drafts.after(prompt, [], 4) == []
    assert drafts.learn(prompt, [5, 6, 7, 8, 9]) == [5, 6, 7, 8, 9]
    assert drafts.learn(prompt, [5, 6]) == [5, 6, 7, 8, 9]  # says no more
    drafts.learn(prompt, [5, 1, 1])
    assert drafts.after(prompt, [5], 4) == [1, 1]
    assert drafts.after(prompt, [5, 6], 2) == [7, 8]
    assert drafts.after(prompt, [4, 4, 6, 7, 8], 2) == [9]  # after the same three tokens
    assert drafts.after(prompt, [4, 4], 2) == []
    assert drafts.after([1], [5], 2) == []
    for number in range(2 * KEPT):
        drafts.learn(prompt, [number])
    assert len(drafts.known(prompt)) == KEPT


@pytest.mark.parametrize(
    ("lengths", "overhead", "best"),
    [
        ([FIRST] * 10, 0, 0),  # nothing is saved where forwards cost nothing beside their tokens
        ([FIRST] * 10, 10, FIRST),
        ([8] + [0] * 99, 10, 0),
        ([8] + [0] * 99, 1000, 0),
        ([8] * 60 + [0] * 40, 1000, 8),
        ([0, 0], 100, 0),
    ],
)
def test_drafts_are_read_where_that_is_cheaper(
    lengths: list[int], overhead: int, best: int
) -> None:
    assert worthwhile(lengths, overhead) == best


def test_states_stay_within_their_budget(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = ready.decoder
    inputs = [ready.formatter.ids(text) for text in prompts(8)[0]]
    lower = Lower(ready.anatomy, 0)
    one: Tensor = lower.read(decoder, inputs[:1])[0]
    assert one.shape == (len(lower.stations), len(inputs[0]), ready.anatomy.hidden)
    budget = 3 * one.nbytes
    monkeypatch.setattr(lower, "_budget", budget)
    front = alike(inputs)

    def learn(sequences: list[list[int]]) -> list[list[int]]:
        """Those of which states are kept then, all in one batch if there were room."""
        lower.note(sequences)
        for studied in lower.study(decoder, Silent()):
            lower.keep(studied)
        lower.keep(None)
        return [ids for ids in inputs if lower.states(ids, lower.stations[0]) is not None]

    def held(kept: list[list[int]]) -> int:
        tokens = sum(len(ids) - front for ids in kept) + front
        return tokens * one.nbytes // len(inputs[0])

    assert not learn(inputs)  # which were read only once so far
    kept = learn(inputs)
    assert 1 < len(kept) < len(inputs) and held(kept) <= budget
    assert inputs[-1] not in kept  # the longest
    for _ in range(8):
        assert learn(inputs[-1:]) == kept
    later = learn(inputs[-1:])  # the others make room, not read for long, as far as they must
    assert inputs[-1] in later and 1 < len(later) <= len(kept) and held(later) <= budget


def test_states_are_those_of_the_original(ready: Ready) -> None:
    lower, decoder = ready.decoder.lower, ready.decoder
    assert lower is not None
    decoder.select([], [])
    ids = ready.formatter.ids(prompts(1)[0][0])
    whole = ready.loaded.model(
        input_ids=torch.tensor([ids]), output_hidden_states=True
    ).hidden_states
    with torch.inference_mode():
        (states,) = lower.read(decoder, [ids])
    for place, station in enumerate(lower.stations):
        torch.testing.assert_close(states[place], whole[station][0], rtol=1e-5, atol=1e-5)


def test_states_of_what_all_begin_with_are_kept_once_and_by_all_copies(ready: Ready) -> None:
    """Of sequences that begin alike, one that does not, and in a copy that studied nothing."""
    decoder = ready.decoder
    before = ready.formatter.ids("Where do I buy a lamp for the hall?")
    inputs = [before + ready.formatter.ids(text) for side in prompts(8) for text in side]
    front = alike(inputs)
    assert decoder.shares and len(inputs) * front > front + decoder.overhead
    inputs.append(inputs[0][1:])
    ours, copy = (Lower(ready.anatomy, 0) for _ in range(2))
    for some in (inputs[:-1], inputs[-1:]):
        for lower in (ours, copy):
            lower.note(some * 2)
        studied = list(ours.study(decoder, Silent()))
        assert len(studied) == len(some) + (some[0] is inputs[0])  # and what they begin with
        for one in studied:
            behind = len(one.ids) > front and one.ids[:front] == tuple(inputs[0][:front])
            held = front if behind else 0
            assert (one.front, one.states.shape[1]) == (held, len(one.ids) - held)
            ours.keep(one)
            copy.keep(one)
        ours.keep(None)
        copy.keep(None)
        assert not [*ours.study(decoder, Silent()), *copy.study(decoder, Silent())]
    for ids in inputs:
        with torch.inference_mode():
            (truth,) = ours.read(decoder, [ids])
        for lower in (ours, copy):
            for place, station in enumerate(lower.stations):
                states = lower.states(ids, station)
                assert states is not None
                assert len(states[:]) == len(ids)
                for start, stop in ((0, len(ids)), (1, front + 2), (front + 1, len(ids) - 1)):
                    part = truth[place][start:stop]
                    torch.testing.assert_close(states[start:stop], part, rtol=1e-4, atol=1e-4)
