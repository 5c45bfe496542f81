"""The original paper's choice of a direction, on the demo model, against plain forwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.change import Projection, formula
from engine.errors import EngineError
from engine.report import Silent
from engine.selection import VALIDATION, ablation
from engine.session import Session
from jobs.spec.candidate import Ablation, Ara, Recipe
from jobs.spec.methods import POSITIONS, needs_affine, needs_ara, needs_router, recipes
from jobs.spec.protocol import Choice, Score, ScoredBatch, Select, Selected
from tests.engine.fixtures_run import demo_folder, prepare_request, prompt_texts

__all__ = ["demo_folder"]


@pytest.fixture(scope="module")
def session(demo_folder: Any) -> Session:
    """The demo model, prepared for the paper's method and for ARA."""
    made = Session()
    asked = prepare_request(
        demo_folder, prompts=prompt_texts(direction=48, search=16, heldout=4), max_new_tokens=16,
        recipes=recipes(["arditi"]), ara=True,
    )  # fmt: skip
    made.prepare(asked, Silent())
    return made


@pytest.fixture(scope="module")
def selected(session: Session) -> Selected:
    result = session.handle(Select(positions=[-1, -2]), Silent())
    assert isinstance(result, Selected)
    return result


def refusals(session: Session, candidate: Ablation | Ara) -> int:
    batch = session.handle(Score(candidates=[candidate]), Silent())
    assert isinstance(batch, ScoredBatch)
    return batch.scored[0].scores.refusals


def first_logits(model: Any, prompts: list[list[int]]) -> Tensor:
    """(N, V) at the first answer token, a prompt at a time, float64."""
    with torch.no_grad():
        return torch.stack([model(torch.tensor([ids])).logits[0, -1].double() for ids in prompts])


def odds(logits: Tensor, tokens: tuple[int, ...]) -> float:
    p = logits.softmax(-1)[:, list(tokens)].sum(-1)
    return float((p / (1 - p)).log().mean())


def test_all_directions_of_the_first_four_fifths_are_looked_at(selected: Selected) -> None:
    looked = {(c.position, c.layer) for c in selected.choices}
    assert looked == {(p, layer) for p in (-1, -2) for layer in range(7)}  # 6 < 0.8 · 8 < 7


def test_scores_are_those_of_replaced_weights(session: Session, selected: Selected) -> None:
    ready = session.ready
    role, tokens = ready.roles["search"], tuple(ready.baseline.further.openings)
    harmful, harmless = role.harmful[:VALIDATION], role.harmless[:VALIDATION]
    original = first_logits(ready.loaded.model, harmless).log_softmax(-1)
    for choice in (selected.choices[0], selected.choices[-1]):
        axes = ready.directions.axes(Recipe(projection="none", position=choice.position))
        v = axes.vectors[choice.layer]
        twin = copy.deepcopy(ready.loaded.model)
        for writer in ready.anatomy.writers:
            weight = twin.get_submodule(writer.name).weight
            weight.data.copy_(formula(weight.detach(), Projection(v, 1.0, "none")))
        assert choice.log_odds == pytest.approx(odds(first_logits(twin, harmful), tokens), abs=2e-3)
        edited = first_logits(twin, harmless).log_softmax(-1)
        kl = (original.exp() * (original - edited)).sum(-1).mean()
        assert choice.kl == pytest.approx(float(kl), rel=1e-2, abs=1e-5)
        # The direction enters the next block instead of leaving this one.
        added = axes.gap[choice.layer] * v[0]
        following = ready.loaded.model.model.layers[choice.layer + 1]
        handle = following.register_forward_pre_hook(
            lambda module, args, added=added: (args[0] + added, *args[1:])
        )
        induced = odds(first_logits(ready.loaded.model, harmless), tokens)
        handle.remove()
        assert choice.induced == pytest.approx(induced, abs=2e-3)


def test_the_order_and_what_is_kept(selected: Selected) -> None:
    kept = [c for c in selected.choices if c.kept]
    assert kept == selected.choices[: len(kept)] and kept
    assert all(c.kl <= 0.1 and c.induced > 0 for c in kept)
    assert not any(c.kl <= 0.1 and c.induced > 0 for c in selected.choices[len(kept) :])
    assert [c.log_odds for c in kept] == sorted(c.log_odds for c in kept)
    best = selected.choices[0]
    assert selected.candidate == ablation(best.position, best.layer)


def test_the_choice_removes_refusals(session: Session, selected: Selected) -> None:
    before = session.ready.prepared.baseline["search"]
    assert before.refusals >= 15
    assert refusals(session, selected.candidate) <= 1


def test_where_none_passes_the_least_harmful_is_chosen(session: Session) -> None:
    class Notes(Silent):
        warned = ""

        def log(self, text: str, level: str = "info") -> None:
            self.warned = text if level == "warning" else self.warned

    notes = Notes()
    result = session.handle(Select(positions=[-1], kl_limit=0.0), notes)
    assert isinstance(result, Selected)
    assert not any(c.kept for c in result.choices) and "0 of 7" in notes.warned
    least: Choice = min(result.choices, key=lambda c: c.kl)
    assert result.choices[0] == least


def test_positions_must_be_prepared(session: Session) -> None:
    with pytest.raises(EngineError, match="not prepared"):
        session.handle(Select(positions=[-9]), Silent())


def test_ara_removes_refusals_and_the_patch_is_the_replaced_weight(session: Session) -> None:
    ready = session.ready
    chosen = Ara(start=2, end=8, preserve=0.5, steer=0.2, overshoot=0.3, neighbours=4)
    assert refusals(session, chosen) <= 3
    edit = ready.builder.build(chosen)
    twin = copy.deepcopy(ready.loaded.model)
    for writer, change in zip(ready.anatomy.writers, edit.changes, strict=True):
        assert (change is None) == (writer.layer < 2)
        if change is not None:
            weight = twin.get_submodule(writer.name).weight
            weight.data.copy_(formula(weight.detach(), change))
    harmful = ready.roles["search"].harmful[:6]
    true = first_logits(twin, harmful)
    with ready.decoder.edited(edit):
        found = first_logits(ready.loaded.model, harmful)
    assert (found - true).norm() < 1e-4 * true.norm()
    assert (first_logits(ready.loaded.model, harmful) - true).norm() > 0.05 * true.norm()


def test_what_a_job_must_prepare() -> None:
    found = recipes(["mpoa", "arditi", "deccp", "svd"])
    assert {r.position for r in found if r.projection == "none"} == set(POSITIONS)
    assert len(found) == len(set(found)) == 7
    assert needs_ara(["mpoa", "ara"]) and not needs_ara(["mpoa"])
    assert needs_affine(["affine"]) and not needs_affine(["ara", "som"])
    assert needs_router(["mpoa", "router"]) and not needs_router(["mpoa", "ara"])
