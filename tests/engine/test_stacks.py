"""Weights that are rewritten in place: stacks of fused experts, in models with hooked writers too.

The truth is the model whose weights were really replaced by the formula, matrix by matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from demo.vocabulary import build_tokenizer
from engine import export, in_place
from engine.anatomy import Anatomy, survey
from engine.change import Projection, rewrite
from engine.decode import Decoder, Row
from engine.dequantise import weight_of
from engine.edit import Edit, EditBuilder
from engine.errors import EngineError
from engine.in_place import Rewritten
from engine.load import load
from engine.patch import Patch
from engine.report import Silent
from jobs.spec.candidate import EditMode, constant
from jobs.spec.protocol import Export
from tests.engine.conftest import random_directions, request
from tests.engine.families import FUSED, tiny
from tests.engine.test_patch import IDS, MASK, MODES, candidate, close, logits, replaced

FAMILIES = ["mixtral", "qwen3_moe", "gpt_oss"]  # gpt_oss: transposed, with biases


class Case:
    """A mixture of experts and its edits, one per mode."""

    def __init__(self, family: str, **more: Any) -> None:
        self.model = tiny(family, FUSED[family], **more)
        self.anatomy: Anatomy = survey(self.model)
        self.directions = random_directions(self.anatomy.layers, self.anatomy.hidden)
        self.builder = EditBuilder(self.anatomy, self.directions)
        self.edits: list[Edit] = [self.builder.build(candidate(mode)) for mode in MODES]
        self.original = logits(self.model)
        self.weights = self.snapshot()
        self.twins = [self.twin(edit) for edit in self.edits]
        self.true = [logits(twin) for twin in self.twins]

    def twin(self, edit: Edit) -> Any:
        return replaced(self.model, self.anatomy, edit.changes)

    def snapshot(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def untouched(self) -> bool:
        return all(torch.equal(p, self.weights[n]) for n, p in self.model.named_parameters())


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.fixture
def patch(case: Case) -> Iterator[Patch]:
    with Patch(case.anatomy) as found:
        yield found
    assert case.untouched() and torch.equal(logits(case.model), case.original)


def test_writers_of_both_kinds(case: Case) -> None:
    kinds = {(w.hooked, w.component) for w in case.anatomy.writers}
    assert kinds == {(True, "attention"), (False, "mlp")}


def test_every_mode_one_after_another(case: Case, patch: Patch) -> None:
    """A → B → … → original, each by one rewrite, the original bit for bit."""
    for edit, true in zip(case.edits, case.true, strict=True):
        assert not close(true, case.original)
        patch.select([edit])
        assert close(logits(case.model), true)
    patch.clear()
    assert case.untouched() and torch.equal(logits(case.model), case.original)
    patch.select([case.edits[1]], torch.zeros(4, dtype=torch.int64))
    patch.select(case.edits, torch.tensor([-1, -1, -1, -1]))
    assert torch.equal(logits(case.model), case.original)


def test_generate(case: Case, patch: Patch) -> None:
    """Eight tokens of cached decoding against `generate` on replaced weights."""
    prompts = [row[mask.bool()].tolist() for row, mask in zip(IDS, MASK, strict=True)]
    case.model.generation_config.eos_token_id = None
    decoder = Decoder(case.model, build_tokenizer(), patch)
    decoder.ends, decoder.batch_size = frozenset(), 4
    for edit, twin in zip(case.edits, case.twins, strict=True):
        twin.generation_config.eos_token_id = None
        rows = [Row(prompt, 0) for prompt in prompts]
        answers = decoder.answers(rows, [edit], 8, Silent(), "answers")
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = torch.tensor([prompt])
            whole = twin.generate(ids, do_sample=False, max_new_tokens=8, pad_token_id=0)
            assert answer.tokens == whole[0, len(prompt) :].tolist()
        assert case.untouched()  # no edit stays behind


def test_rows_of_a_batch_hold_one_edit(case: Case, patch: Patch) -> None:
    assert not patch.batches
    for rows in ([0, 1, 0, 1], [0, -1, 0, 0]):
        with pytest.raises(EngineError, match="edited in place") as caught:
            patch.select(case.edits, torch.tensor(rows))
        assert caught.value.reason == "bad_request" and caught.value.mend
    # Edits that agree on the stacks share a batch: only the attention differs here.
    strengths = [candidate("full", attention=constant(s)) for s in (0.5, 1.2)]
    edits = [case.builder.build(c) for c in strengths]
    true = [logits(case.twin(edit)) for edit in edits]
    patch.select(edits, torch.tensor([1, 0, 0, 1]))
    found = logits(case.model)
    for row, number in enumerate([1, 0, 0, 1]):
        assert close(found[row], true[number][row], MASK[row])


def test_one_rewrite_per_change(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held already is not written again."""
    written: list[str] = []

    def counted(W: Tensor, change: Any, out: Tensor) -> Tensor:
        written.append(change.mode)
        return rewrite(W, change, out)

    monkeypatch.setattr(in_place, "rewrite", counted)
    stacks = sum(not w.hooked for w in case.anatomy.writers)
    again = case.builder.build(candidate("pre"))  # equal, not the same object
    with Patch(case.anatomy) as patch:
        for edit in (case.edits[1], case.edits[1], again, case.edits[2], case.edits[2]):
            patch.select([edit])
        attention_only = candidate("pre", attention=constant(0.3))
        patch.select([case.builder.build(attention_only)])
        patch.clear()
    assert written == ["pre"] * stacks + ["full"] * stacks + ["pre"] * stacks


def test_a_rewrite_that_failed_is_made_again(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(W: Tensor, change: Any, out: Tensor) -> Tensor:
        out.zero_()
        raise MemoryError

    with Patch(case.anatomy) as patch:
        patch.select([case.edits[0]])
        with monkeypatch.context() as broken:
            broken.setattr(in_place, "rewrite", failing)
            with pytest.raises(MemoryError):
                patch.select([case.edits[1]])
        patch.select([case.edits[0]])  # what it held before the failure
        assert close(logits(case.model), case.true[0])
    assert case.untouched()


def test_an_affine_change_is_refused(case: Case) -> None:
    """A stack has no bias of its own that hooks could give it."""
    writer = next(w for w in case.anatomy.writers if not w.hooked)
    V = torch.eye(1, writer.d)
    with pytest.raises(EngineError, match="affine"):
        Rewritten(writer).select(Projection(V, 1.0, "none", torch.ones(1)), torch.device("cpu"))
    held = Rewritten(writer)  # also where the same weight is held already
    held.select(Projection(V, 1.0, "none"), torch.device("cpu"))
    with pytest.raises(EngineError, match="affine"):
        held.select(Projection(V, 1.0, "none", torch.ones(1)), torch.device("cpu"))
    held.select(None, torch.device("cpu"))


def save(folder: Path, family: str, dtype: torch.dtype = torch.float32, **more: Any) -> Path:
    tiny(family, FUSED[family], **more).to(dtype).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])  # one tensor per expert; one for all
def test_bits_in_memory_are_those_of_the_merged_export(
    family: str, dtype: str, tmp_path: Path
) -> None:
    folder = save(tmp_path / "base", family, getattr(torch, dtype))
    loaded = load(request(folder, dtype=dtype), Silent())
    anatomy = survey(loaded.model)
    builder = EditBuilder(anatomy, random_directions(anatomy.layers, anatomy.hidden))
    for mode in MODES:
        out = tmp_path / mode
        out.mkdir()
        edit = builder.build(candidate(mode))
        asked = Export(candidate=candidate(mode), directory=str(out))
        export.write(loaded, anatomy, edit.changes, asked, Silent())
        merged = load(request(out, dtype=dtype), Silent()).model
        with Patch(anatomy) as patch:
            patch.select([edit])
            for w in anatomy.writers:
                if not w.hooked:
                    there = merged.get_parameter(w.name)
                    assert torch.equal(loaded.model.get_parameter(w.name), there)


@pytest.mark.parametrize("mode", MODES)
def test_a_model_in_4_bits_keeps_its_experts_whole(mode: EditMode, tmp_path: Path) -> None:
    folder = save(tmp_path, "mixtral", hidden_size=64, head_dim=16, intermediate_size=128)
    loaded = load(request(folder, quantization="bnb_4bit", dtype="float32"), Silent())
    anatomy = survey(loaded.model)
    assert any(not w.hooked for w in anatomy.writers)
    directions = random_directions(anatomy.layers, anatomy.hidden)
    edit = EditBuilder(anatomy, directions).build(candidate(mode))
    twin = load(request(folder), Silent()).model
    for name, module in loaded.model.named_modules():
        if hasattr(module, "quant_state"):
            twin.get_submodule(name).weight.data = weight_of(module).clone()
    before, true = logits(loaded.model), logits(replaced(twin, anatomy, edit.changes))
    with Patch(anatomy) as patch:
        patch.select([edit])
        assert close(logits(loaded.model), true)
        assert not close(logits(loaded.model), before)
    assert torch.equal(logits(loaded.model), before)
