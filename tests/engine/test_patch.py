"""The patched model against the model whose weights are really replaced."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.anatomy import Anatomy, survey
from engine.change import Change, Projection, Update, formula
from engine.dequantise import weight_of
from engine.edit import Edit, EditBuilder, basis, term
from engine.errors import EngineError
from engine.load import load
from engine.patch import Patch
from engine.report import Silent
from jobs.spec.candidate import Ablation, EditMode, Kernel, constant
from tests.engine.conftest import Save, random_directions, request
from tests.engine.families import DENSE, tiny

MODES: tuple[EditMode, ...] = ("none", "pre", "full", "columns")
IDS = torch.tensor([[0, 0, 5, 6, 7], [9, 8, 7, 6, 5], [0, 3, 4, 5, 6], [0, 0, 0, 0, 12]])
MASK = (IDS != 0).long()


def candidate(mode: EditMode, **more: Any) -> Ablation:
    fields: dict[str, Any] = {
        "mode": mode,
        "attention": Kernel(max_weight=1.3, min_weight=0.4, position=2.0, distance=1.5),
        "mlp": constant(1.0),
        **more,
    }
    return Ablation(**fields)


def replaced(model: Any, anatomy: Anatomy, changes: Sequence[Change | None]) -> Any:
    """A copy of the model with W' in place of W, stacks too, and biases moved: the slow twin."""
    twin = copy.deepcopy(model)
    for writer, change in zip(anatomy.writers, changes, strict=True):
        if change is None:
            continue
        path = f"{writer.name}.weight" if writer.hooked else writer.name
        module = twin.get_submodule(path.rpartition(".")[0])
        held = getattr(module, path.rpartition(".")[2])
        W = writer.weight()
        new = torch.stack([formula(w, change) for w in W]) if writer.experts else formula(W, change)
        new = new.transpose(-1, -2) if writer.transposed else new
        held.data = new.to(held.dtype).reshape(held.shape).contiguous()
        if isinstance(change, Projection) and change.mean is not None:
            shift = change.lam * (change.mean @ change.V)
            before = 0 if module.bias is None else module.bias.detach()
            module.bias = torch.nn.Parameter(before + shift)
    return twin


def logits(model: Any, ids: Tensor = IDS, mask: Tensor = MASK, **more: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, attention_mask=mask, **more).logits.float()
    return found


class Case:
    """A model, its patch, four edits (one per mode) and their slow twins' logits."""

    def __init__(self, family: str) -> None:
        self.model = tiny(family, DENSE[family])
        self.anatomy = survey(self.model)
        self.directions = random_directions(self.anatomy.layers, self.anatomy.hidden)
        builder = EditBuilder(self.anatomy, self.directions)
        self.candidates = [candidate(mode) for mode in MODES]
        self.edits: list[Edit] = [builder.build(c) for c in self.candidates]
        self.original = logits(self.model)
        self.twins = [replaced(self.model, self.anatomy, e.changes) for e in self.edits]
        self.true = [logits(twin) for twin in self.twins]


FAMILIES = ["llama", "gpt2", "phi", "gemma2", "opt", "gpt_neox", "granite"]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def close(found: Tensor, true: Tensor, mask: Tensor = MASK) -> bool:
    """Equal logits to 1e-5 of their size, wherever the mask is 1."""
    f, t = found[mask.bool()], true[mask.bool()]
    return bool((f - t).norm() < 1e-5 * t.norm())


def test_one_edit_for_all_rows(case: Case) -> None:
    with Patch(case.anatomy) as patch:
        assert torch.equal(logits(case.model), case.original)
        for edit, true in zip(case.edits, case.true, strict=True):
            assert not close(true, case.original)
            patch.select([edit], None)
            assert close(logits(case.model), true)
        patch.clear()
        assert torch.equal(logits(case.model), case.original)
        patch.select([case.edits[0]])
    assert torch.equal(logits(case.model), case.original)


def test_each_row_its_own_edit(case: Case) -> None:
    with Patch(case.anatomy) as patch:
        rows = torch.tensor([2, -1, 3, 1])
        patch.select(case.edits, rows)
        found = logits(case.model)
        for row, edit in enumerate(rows.tolist()):
            true = case.original if edit < 0 else case.true[edit]
            assert close(found[row], true[row], MASK[row])
        # -1 is the original, bit for bit.
        assert torch.equal(found[1], case.original[1])
        # Finished rows leave: 0 and 3 stay, in another order.
        kept = torch.tensor([3, 0])
        patch.keep(kept)
        found = logits(case.model, IDS[kept], MASK[kept])
        assert close(found[0], case.true[1][3], MASK[3])
        assert close(found[1], case.true[2][0], MASK[0])
        patch.keep(torch.tensor([False, True]))
        assert close(logits(case.model, IDS[:1], MASK[:1])[0], case.true[2][0], MASK[0])


def test_prefill_and_cached_decoding(case: Case) -> None:
    rows = torch.tensor([0, 1, 2, 3])
    with Patch(case.anatomy) as patch, torch.no_grad():
        patch.select(case.edits, rows)
        first = case.model(input_ids=IDS[:, :4], attention_mask=MASK[:, :4], use_cache=True)
        step = case.model(
            input_ids=IDS[:, 4:], attention_mask=MASK, past_key_values=first.past_key_values
        )
    for row in range(3):  # row 3 has no prompt yet at the prefill
        assert close(first.logits[row], case.true[row][row, :4], MASK[row, :4])
        assert close(step.logits[row], case.true[row][row, 4:], MASK[row, 4:])


def test_layers_without_an_edit_are_left_alone(case: Case) -> None:
    off = candidate("full", attention=constant(0.0), mlp=constant(0.0))
    edit = EditBuilder(case.anatomy, case.directions).build(off)
    assert all(e is None for e in edit.terms + edit.changes)
    with Patch(case.anatomy) as patch:
        patch.select([edit])
        assert torch.equal(logits(case.model), case.original)
        patch.select([edit, case.edits[2]], torch.tensor([0, 1, 0, 1]))
        found = logits(case.model)
        assert torch.equal(found[0], case.original[0])
        assert close(found[1], case.true[2][1], MASK[1])


def test_rows_must_fit() -> None:
    case = Case("llama")
    with Patch(case.anatomy) as patch:
        with pytest.raises(EngineError, match="rows"):
            patch.select(case.edits, torch.tensor([0, 4]))
        patch.select(case.edits, torch.tensor([0, 1, 2]))
        with pytest.raises(EngineError, match="batch holds 4"):
            logits(case.model)


@pytest.mark.parametrize("family", ["llama", "olmo"])  # olmo's norms hold no plain weights
@pytest.mark.parametrize("mode", MODES)
def test_quantised_weights(mode: EditMode, family: str, save: Save) -> None:
    """nf4: the twin holds the dequantised weights in plain linear layers, writers replaced."""
    folder = save(family, hidden_size=64, intermediate_size=128, head_dim=16)
    loaded = load(request(folder, quantization="bnb_4bit", dtype="float32"), Silent())
    anatomy = survey(loaded.model)
    directions = random_directions(anatomy.layers, anatomy.hidden)
    twin = plain_twin(folder, loaded.model)
    chosen = candidate(mode)
    edit = EditBuilder(anatomy, directions).build(chosen)
    edited = replaced(twin, anatomy, edit.changes)
    with Patch(anatomy) as patch:
        patch.select([edit])
        found, true = logits(loaded.model), logits(edited)
    assert close(found, true)


def plain_twin(folder: Path, quantised: Any) -> Any:
    """The model in float32 with every quantised weight dequantised."""
    twin = load(request(folder), Silent()).model
    for name, module in quantised.named_modules():
        if hasattr(module, "quant_state"):
            twin.get_submodule(name).weight.data = weight_of(module).clone()
    return twin


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_as_replaced_weights(dtype: torch.dtype) -> None:
    """Against float32 truth the patched half model errs no more than 1.5 times the replaced one."""
    case = Case("llama")
    half = copy.deepcopy(case.model).to(dtype)
    anatomy = survey(half)
    for k, chosen in enumerate(case.candidates):
        true = case.true[k][MASK.bool()]
        edit = EditBuilder(anatomy, case.directions).build(chosen)
        twin = logits(replaced(half, anatomy, edit.changes))[MASK.bool()]
        with Patch(anatomy) as patch:
            patch.select([edit])
            found = logits(half)[MASK.bool()]
        assert (found - true).norm() <= 1.5 * (twin - true).norm() + 1e-3 * true.norm()


def projection(anatomy: Anatomy, mode: EditMode, k: int, seed: int, affine: bool) -> list[Change]:
    """Projections of rank `k` for every writer; the last direction of each is zero."""
    torch.manual_seed(seed)
    made: list[Change] = []
    for writer in anatomy.writers:
        V = torch.linalg.qr(torch.randn(anatomy.hidden, k))[0].T.contiguous()
        if k > 1:
            V[-1] = 0
        mean = torch.randn(k) if affine else None
        made.append(Projection(V, 0.7 + 0.1 * writer.layer, mode, mean))
    return made


def update(anatomy: Anatomy, q: int, seed: int) -> list[Change]:
    """Updates of rank `q` for every writer."""
    torch.manual_seed(seed)
    return [Update(0.2 * torch.randn(w.d, q), 0.2 * torch.randn(q, w.n)) for w in anatomy.writers]


def edit_of(anatomy: Anatomy, changes: Sequence[Change | None]) -> Edit:
    """The edit of these changes, its terms from the definition of the basis."""
    terms = [
        None if change is None or not w.hooked
        else term(change, None if isinstance(change, Update) else basis(w.weight(), change.V))
        for w, change in zip(anatomy.writers, changes, strict=True)
    ]  # fmt: skip
    return Edit(tuple(terms), tuple(changes))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])  # gpt2's writers have biases
def test_several_directions_biases_and_updates(family: str) -> None:
    """Rank 3 in every mode, affine, and updates of rank 5: alone, and all in one batch."""
    model = tiny(family, DENSE[family])
    anatomy = survey(model)
    changes = [projection(anatomy, mode, 3, k, k % 2 == 1) for k, mode in enumerate(MODES)]
    changes += [projection(anatomy, "full", 1, 7, affine=True), update(anatomy, 5, 8)]
    edits = [edit_of(anatomy, c) for c in changes]
    true = [logits(replaced(model, anatomy, c)) for c in changes]
    original = logits(model)
    with Patch(anatomy) as patch:
        for edit, expected in zip(edits, true, strict=True):
            assert not close(expected, original)
            patch.select([edit])
            assert close(logits(model), expected)
        # Ranks 3, 5 and none, with and without biases, in one batch.
        for rows in ([0, 5, -1, 1], [4, 2, 3, 5]):
            patch.select(edits, torch.tensor(rows))
            found = logits(model)
            for row, edit_number in enumerate(rows):
                expected = original if edit_number < 0 else true[edit_number]
                assert close(found[row], expected[row], MASK[row])
            kept = torch.tensor([3, 1])
            patch.keep(kept)
            found = logits(model, IDS[kept], MASK[kept])
            for place, row in enumerate(kept.tolist()):
                assert close(found[place], true[rows[row]][row], MASK[row])


def test_an_edit_may_leave_writers_alone() -> None:
    """Rows whose edits differ in which writers they change."""
    model = tiny("llama", DENSE["llama"])
    anatomy = survey(model)
    first = [c if k % 2 else None for k, c in enumerate(projection(anatomy, "full", 2, 1, True))]
    second = [None if k % 2 else c for k, c in enumerate(update(anatomy, 3, 2))]
    edits = [edit_of(anatomy, first), edit_of(anatomy, second)]
    true = [logits(replaced(model, anatomy, c)) for c in (first, second)]
    with Patch(anatomy) as patch:
        patch.select(edits, torch.tensor([1, 0, 0, 1]))
        found = logits(model)
    for row, edit_number in enumerate([1, 0, 0, 1]):
        assert close(found[row], true[edit_number][row], MASK[row])
