"""One model against another: KL against a plain computation, and what cannot be compared."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from engine.load import load_folder
from engine.report import Silent
from engine.session import Session
from jobs.spec.protocol import Compare, Compared, Prepare
from tests.engine.fixtures_run import prepare_request, tiny_folder

__all__ = ["tiny_folder"]


@pytest.fixture(scope="module")
def session(tiny_folder: Path) -> Session:
    """The tiny model, prepared to be evaluated."""
    made = Session()
    request: Prepare = prepare_request(tiny_folder, purpose="evaluate")
    prepared = made.prepare(request, Silent())
    assert prepared.anatomy.writers == [] and prepared.anatomy.layers == 4
    assert set(prepared.baseline) == {"search", "heldout", "over_refusal"}
    return made


@pytest.fixture(scope="module")
def moved(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with noise on every weight, the output head's too."""
    folder = tmp_path_factory.mktemp("moved") / "model"
    model, tokenizer = load_folder(tiny_folder, torch.device("cpu"), torch.float32)
    torch.manual_seed(8)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def compared(session: Session, request: Compare) -> Compared:
    found = session.handle(request, Silent())
    assert isinstance(found, Compared)
    return found


def test_divergence_is_the_plain_one(session: Session, moved: Path, tiny_folder: Path) -> None:
    found = compared(session, Compare(model="moved", path=str(moved)))
    original, _ = load_folder(tiny_folder, torch.device("cpu"), torch.float64)
    other, _ = load_folder(moved, torch.device("cpu"), torch.float64)
    for role in ("search", "heldout"):
        reference = session.ready.roles[role].reference
        assert reference is not None
        first, every = [], []
        for ids, states in zip(reference.inputs, reference.states, strict=True):
            with torch.no_grad():
                p, q = (m(torch.tensor([ids])).logits[0, -len(states) :] for m in (original, other))
            each = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
            first.append(each[0])
            every.append(each)
        scores = found.scored[role].scores
        assert scores.kl_first == pytest.approx(float(torch.stack(first).mean()), abs=1e-5)
        assert scores.kl_multi == pytest.approx(float(torch.cat(every).mean()), abs=1e-5)
        assert scores.kl_multi is not None and scores.kl_multi > 0.01
        for prompt, outcome in zip(
            session.ready.roles[role].harmful, found.scored[role].outcomes, strict=True
        ):
            out = other.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=24, do_sample=False,
            )  # fmt: skip
            said = [int(t) for t in out[0, len(prompt) :]]
            ended = said[-1] in session.ready.decoder.ends
            text = session.ready.loaded.tokenizer.decode(
                said[:-1] if ended else said, skip_special_tokens=True
            )
            assert outcome.text == text


def test_a_model_does_not_differ_from_itself(session: Session, tiny_folder: Path) -> None:
    found = compared(session, Compare(model="same", path=str(tiny_folder)))
    for role, scored in found.scored.items():
        assert scored.scores.refusals == session.ready.prepared.baseline[role].refusals
        if role != "over_refusal":
            assert (scored.scores.kl_first or 0.0) < 1e-9 and scored.scores.kl_first is not None
            assert (scored.scores.kl_multi or 0.0) < 1e-9
    assert found.warnings == []


def test_another_template_has_no_divergence(
    session: Session, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(tiny_folder, folder)
    template = folder / "chat_template.jinja"
    template.write_text("Q: " + template.read_text())
    found = compared(session, Compare(model="other", path=str(folder), roles=["search"]))
    assert set(found.scored) == {"search"}
    assert found.scored["search"].scores.kl_first is None
    assert any("no KL" in warning for warning in found.warnings)


def test_answers_are_whole(session: Session, tiny_folder: Path) -> None:
    """The model against itself, refusals too: both sides' answer lengths are comparable."""
    texts = [outcome.text for outcome in session.ready.prepared.baseline_outcomes["search"]]
    longest = max(range(len(texts)), key=lambda place: len(texts[place]))
    marker = texts[longest].split()[0]  # what this model says counts as a refusal
    mine = Session()
    mine.prepare(prepare_request(tiny_folder, purpose="evaluate", markers=[marker]), Silent())
    whole = mine.ready.prepared.baseline_outcomes["search"]
    request = Compare(model="same", path=str(tiny_folder), roles=["search"])
    found = compared(mine, request).scored["search"]
    assert found.outcomes == whole and whole[longest].refused
    assert found.scores.mean_tokens == mine.ready.prepared.baseline["search"].mean_tokens
