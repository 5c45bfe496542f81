"""Every decoder-only architecture of transformers: all writers are found, and nothing else writes.

The truth of these tests is the model's own forward pass. They use the anatomy for the list of
writers and blocks alone: ablated writers must say nothing along v, and a model whose writers are
zero must carry each token's embedding unchanged to the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from engine.anatomy import Anatomy, Writer, examine
from engine.change import Projection, formula
from tests.engine.zoo import ALL, ENTRIES, VARIANTS, Entry, build, tokens
from tests.engine.zoo.build import TOKENS
from tests.engine.zoo.entries import OUT, UNREACHED
from tests.engine.zoo.table import LISTING, PAGE, line, listing, page

FLOAT32 = 1e-5  # relative error of a float32 product of these sizes


@dataclass(frozen=True)
class Animal:
    """An entry's tiny model, and what the anatomy says of it."""

    entry: Entry
    model: Any
    anatomy: Anatomy


@pytest.fixture(scope="module", params=[*ENTRIES, *VARIANTS], ids=lambda entry: entry.id)
def animal(request: pytest.FixtureRequest) -> Iterator[Animal]:
    model = build(request.param)
    yield Animal(request.param, model, examine(model))


def run(model: nn.Module) -> Tensor:
    """The logits (T, vocab) of the 8 tokens."""
    with torch.no_grad():
        logits: Tensor = model(**tokens(model)).logits
    return logits[0]


def test_every_writer_is_found(animal: Animal) -> None:
    assert animal.anatomy.uncovered == []
    assert animal.anatomy.coverage == 1.0
    if not animal.entry.settings:
        assert line(animal.entry, animal.anatomy) in PAGE.read_text("utf-8").splitlines()


def test_ablated_writers_write_nothing_along_v(animal: Animal) -> None:
    """λ = 1, mode `none`: vᵀ(what a writer adds to its module's output) = 0 in a whole pass."""
    assert run(animal.model).isfinite().all()
    v = torch.nn.functional.normalize(torch.randn(animal.anatomy.hidden), dim=0)
    along: dict[str, float] = {}
    for writer in animal.anatomy.writers:
        ablate(writer, v)

        def listen(
            module: nn.Module, args: Any, kwargs: Any, out: Any, writer: Writer = writer
        ) -> None:
            said = first(out) - without(writer, module, args, kwargs)
            if said.any():
                part = float((said @ v).norm() / said.norm())
                along[writer.name] = max(along.get(writer.name, 0.0), part)

        writer.module.register_forward_hook(listen, with_kwargs=True)
    run(animal.model)
    assert max(along.values()) < FLOAT32
    assert not {w.name for w in animal.anatomy.writers if w.hooked} - along.keys()


def without(writer: Writer, module: nn.Module, args: Any, kwargs: Any) -> Tensor:
    """What the writer's module gives while the writer is zero: biases, experts that do nothing."""
    held = getattr(writer.module, writer.parameter).data
    kept = held.clone()
    held.zero_()
    out: Tensor = first(module.forward(*args, **kwargs))
    held.copy_(kept)
    return out


def first(out: Any) -> Any:
    return out[0] if isinstance(out, (tuple, list)) else out


def ablate(writer: Writer, v: Tensor) -> None:
    """Replace every matrix of a writer by the formula's."""
    old = writer.weight().clone()
    change = Projection(v[None], 1.0, "none")
    matrices = [formula(W, change).float() for W in old.reshape(-1, writer.d, writer.n)]
    with torch.no_grad():
        stored = getattr(writer.module, writer.parameter).data
        writer.oriented(stored).copy_(torch.stack(matrices).view(old.shape))
    new = writer.weight().reshape(-1, writer.d, writer.n)
    assert (v @ new).norm() < FLOAT32 * new.norm()
    assert not torch.equal(new, old.reshape(new.shape))


def test_with_all_writers_at_zero_every_token_keeps_its_embedding(animal: Animal) -> None:
    """Nothing else writes, in a block or between blocks; and no token reaches another."""
    model, states = hushed(animal, animal.anatomy.writers)
    logits = run(model)
    assert max(outside(state, states[0]) for state in states) < 1e-3
    with torch.no_grad():
        others = tokens(model)
        others["input_ids"][:, :-1] += 20
        moved = model(**others).logits[0, -1]
    torch.testing.assert_close(moved, logits[-1], rtol=1e-3, atol=1e-4)


def hushed(animal: Animal, writers: list[Writer]) -> tuple[nn.Module, list[Tensor]]:
    """A new model of the entry with these writers at zero, weights and biases.

    The list takes, in a forward pass, what enters and leaves its blocks: (T, S, d), S streams.
    Its norms only divide and its gates are numbers: their weights are constant.
    """
    model = build(animal.entry, vectors=False)
    modules = dict(model.named_modules())
    names = {module: name for name, module in animal.model.named_modules()}
    for writer in writers:
        twin = modules[names[writer.module]]
        for parameter in (writer.parameter, "bias", f"{writer.parameter}_bias"):
            if isinstance(held := getattr(twin, parameter, None), Tensor):
                held.data.zero_()
    d = animal.anatomy.hidden
    states: list[Tensor] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        states.append(streams(args[0] if args else kwargs["hidden_states"], d))

    def after(module: nn.Module, args: Any, out: Any) -> None:
        states.append(streams(first(out), d))

    for block in animal.anatomy.blocks:
        twin = modules[names[block]]
        twin.register_forward_pre_hook(before, with_kwargs=True)
        twin.register_forward_hook(after)
    return model, states


def streams(state: Tensor, d: int) -> Tensor:
    """A block's state as (T, S, d): S streams of T tokens."""
    state = state.detach()
    if state.ndim == 4 and state.shape[1] != TOKENS:  # (S, 1, T, d)
        state = state.permute(1, 2, 0, 3)
    return state.reshape(TOKENS, -1, d).double()


def outside(state: Tensor, first: Tensor) -> float:
    """How much of the states (T, S, d) lies outside the span of the first and the constant.

    Norms divide and hyper-connections mix the streams of one token, so a state may be any
    combination of the token's first streams and the constant vector, which LayerNorm subtracts.
    """
    basis = torch.cat([first, torch.ones_like(first[:, :1])], dim=1).transpose(1, 2)
    Q = torch.linalg.svd(basis, full_matrices=False)
    kept = Q.U * (Q.S / Q.S[:, :1] > 1e-6)[:, None]
    inside = kept @ (kept.transpose(1, 2) @ state.transpose(1, 2))
    return float((state.transpose(1, 2) - inside).norm() / state.norm().clamp_min(1e-30))


@pytest.mark.parametrize("kind", ["gpt2", "gpt_oss", "mamba", "nemotron_h", "qwen3_next"])
def test_a_writer_that_is_left_out_shows(kind: str) -> None:
    """The truth of the test above is sharp: with any one writer speaking, states leave the span."""
    entry = next(entry for entry in ENTRIES if entry.model_type == kind)
    model = build(entry)
    animal = Animal(entry, model, examine(model))
    for spared in animal.anatomy.writers:
        loud, states = hushed(animal, [w for w in animal.anatomy.writers if w != spared])
        run(loud)
        assert max(outside(state, states[0]) for state in states) > 1e-2, spared.name


@pytest.mark.parametrize("entry", UNREACHED.values(), ids=lambda entry: entry.model_type)
def test_what_no_edit_reaches_is_named(entry: Entry) -> None:
    anatomy = examine(build(entry))
    assert anatomy.uncovered
    assert anatomy.coverage < 1


def test_the_table_lists_every_entry() -> None:
    """The page is what its own lines give; each line is checked with its entry."""
    text = PAGE.read_text("utf-8")
    starts = tuple(f"| {e.model_type} | {e.architecture} | " for e in ENTRIES)
    lines = [row for row in text.split("## Not reached")[0].splitlines() if row.startswith(starts)]
    assert len(lines) == len(ENTRIES) >= 210
    assert text == page(lines)
    assert LISTING.read_text("utf-8") == listing(lines)


def test_encoder_decoders_and_unknown_types_are_out_by_name() -> None:
    known = {entry.model_type for entry in ALL}
    assert {kind for kinds in OUT.values() for kind in kinds} <= known
    for entry in ENTRIES:
        assert not CONFIG_MAPPING[entry.model_type]().is_encoder_decoder, entry.id
