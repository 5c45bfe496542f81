"""The requests of the protocol, in this process, on the tiny model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from engine.errors import EngineError
from engine.report import Silent
from engine.session import Session
from jobs.spec.candidate import Ablation, constant
from jobs.spec.protocol import Export, Prepare, Prepared, Respond, Score, Scored
from tests.engine.fixtures_run import CANDIDATES, prepare_request, prompt_texts, tiny_folder

__all__ = ["tiny_folder"]


class Notes(Silent):
    """A report that remembers what was said."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.logs: list[tuple[str, str]] = []
        self.scored: dict[int, Scored] = {}
        self.texts: dict[int, str] = {}

    def progress(self, phase: str, done: float = 0, total: float = 0, text: str = "") -> None:
        assert done <= total or total == 0
        if phase not in self.phases:
            self.phases.append(phase)

    def log(self, text: str, level: str = "info") -> None:
        self.logs.append((level, text))

    def partial(self, index: int, text: str = "", scored: Scored | None = None) -> None:
        if scored is not None:
            assert index not in self.scored
            self.scored[index] = scored
        self.texts[index] = self.texts.get(index, "") + text


@pytest.fixture(scope="module")
def session(tiny_folder: Path) -> Session:
    """A session with the tiny model prepared."""
    made = Session()
    made.prepare(prepare_request(tiny_folder), Silent())
    return made


@pytest.fixture
def prepared(session: Session, tiny_folder: Path) -> Prepared:
    """What prepare found."""
    return session.prepare(prepare_request(tiny_folder), Silent())


def test_prepare_tells_everything(prepared: Prepared) -> None:
    assert prepared.anatomy.coverage == 1 and len(prepared.anatomy.writers) == 8
    assert prepared.dtype == "float32" and prepared.device == "cpu" and prepared.batch_size > 8
    assert set(prepared.baseline) == {"search", "heldout", "over_refusal"}
    assert [len(o) for o in prepared.baseline_outcomes.values()] == [12, 8, 4]
    assert prepared.baseline["search"].kl_first == 0
    assert prepared.baseline["over_refusal"].kl_first is None
    assert {"load", "anatomy", "residuals", "baseline"} <= set(prepared.seconds)
    assert any("nothing to remove" in text for text in prepared.warnings)


def test_an_equal_prepare_is_answered_from_memory(session: Session, tiny_folder: Path) -> None:
    notes = Notes()
    again = session.handle(prepare_request(tiny_folder), notes)
    assert again is session.prepare(prepare_request(tiny_folder), Silent())
    assert notes.phases == []


def test_score_sends_every_candidate_and_returns_them_in_order(session: Session) -> None:
    notes = Notes()
    batch = session.score(Score(candidates=CANDIDATES), notes)
    assert [notes.scored[index] for index in range(3)] == batch.scored
    alone = [session.score(Score(candidates=[c]), Silent()).scored[0] for c in CANDIDATES]
    for together, single in zip(batch.scored, alone, strict=True):
        assert together.outcomes == single.outcomes
        assert together.scores.kl_first == pytest.approx(single.scores.kl_first, abs=1e-6)
        assert together.scores.kl_multi == pytest.approx(single.scores.kl_multi, abs=1e-6)
        assert together.scores.total == 12 and together.seconds > 0


def test_freed_blocks_are_kept_until_memory_has_run_out(
    session: Session, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[bool] = []
    monkeypatch.setattr("engine.session.reuse_blocks", lambda: kept.append(True))
    decoder = session.ready.decoder
    session.handle(Score(candidates=CANDIDATES[:1]), Silent())
    assert kept == [True]
    monkeypatch.setattr(decoder, "limit", prepared.batch_size // 2)
    session.handle(Score(candidates=CANDIDATES[:1]), Silent())
    assert kept == [True]


def test_a_candidate_that_edits_nothing_is_the_original(
    session: Session, prepared: Prepared
) -> None:
    nothing = Ablation(attention=constant(0), mlp=constant(0))
    (found,) = session.score(Score(candidates=[nothing], role="heldout"), Silent()).scored
    assert found.outcomes == prepared.baseline_outcomes["heldout"]
    assert found.scores.kl_multi == pytest.approx(0, abs=1e-9)


def test_over_refusal_has_no_divergence_and_longer_answers_can_be_asked(session: Session) -> None:
    request = Score(candidates=CANDIDATES[:1], role="over_refusal", max_new_tokens=40)
    (found,) = session.score(request, Silent()).scored
    assert found.scores.kl_first is None and found.scores.total == 4
    short = Score(candidates=CANDIDATES[:1], role="over_refusal", max_new_tokens=3)
    (cut,) = session.score(short, Silent()).scored
    assert all(o.tokens <= 3 for o in cut.outcomes)
    assert max(o.tokens for o in found.outcomes) > 10


def test_respond_streams_pieces_that_make_the_texts(session: Session, prepared: Prepared) -> None:
    texts = prompt_texts().heldout_harmful
    notes = Notes()
    original = session.respond(Respond(prompts=texts, max_new_tokens=24), notes)
    assert original.texts == [o.text for o in prepared.baseline_outcomes["heldout"]]
    assert [notes.texts[index] for index in range(len(texts))] == original.texts
    edited = session.respond(
        Respond(prompts=texts, candidate=CANDIDATES[0], max_new_tokens=24), Silent()
    )
    (scored,) = session.score(Score(candidates=CANDIDATES[:1], role="heldout"), Silent()).scored
    assert edited.texts == [outcome.text for outcome in scored.outcomes] != original.texts


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_export_is_measured_from_disk_before_its_card(
    session: Session, tmp_path: Path, kind: str
) -> None:
    request = Export.model_validate(
        {"candidate": CANDIDATES[0], "kind": kind, "directory": str(tmp_path)}
    )
    exported = session.export(request, Silent())
    for role in ("search", "heldout"):
        (scored,) = session.score(Score(candidates=CANDIDATES[:1], role=role), Silent()).scored
        measured = exported.measured[role]
        assert measured.refusals == scored.scores.refusals
        assert measured.kl_first == pytest.approx(scored.scores.kl_first, abs=1e-3)
        assert measured.kl_multi == pytest.approx(scored.scores.kl_multi, abs=1e-3)
    for file in exported.files:
        content = (tmp_path / file.name).read_bytes()
        assert (file.size, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert "artifact" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_without_measure_nothing_is_loaded(session: Session, tmp_path: Path) -> None:
    request = Export(candidate=CANDIDATES[0], directory=str(tmp_path), measure=False)
    assert session.export(request, Silent()).measured == {}


def test_no_memory_for_a_second_model_is_a_warning(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.measure.free_bytes", lambda device: 1000)
    notes = Notes()
    exported = session.export(Export(candidate=CANDIDATES[0], directory=str(tmp_path)), notes)
    assert exported.measured == {} and exported.files
    assert any(level == "warning" and "not measured" in text for level, text in notes.logs)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"search_harmful": []}, "search_harmful: there is no prompt"),
        ({"heldout_harmless": ["Hello", " \n"]}, "heldout_harmless: prompt 2 is blank"),
        ({"search_harmless": ["Hello", "word " * 600]}, "search_harmless: prompt 2 has"),
    ],
)
def test_bad_prompts_are_named(tiny_folder: Path, change: dict[str, Any], words: str) -> None:
    prompts = prompt_texts().model_copy(update=change)
    with pytest.raises(EngineError) as caught:
        Session().prepare(prepare_request(tiny_folder, prompts=prompts), Silent())
    assert caught.value.reason == "bad_prompts" and words in caught.value.message
    assert caught.value.mend


@pytest.mark.parametrize(
    "request_", [Score(candidates=CANDIDATES), Respond(prompts=["Hello"]),
                 Export(candidate=CANDIDATES[0], directory="/")]
)  # fmt: skip
def test_nothing_works_before_prepare(request_: Score | Respond | Export) -> None:
    with pytest.raises(EngineError) as caught:
        Session().handle(request_, Silent())
    assert caught.value.reason == "bad_request" and "prepare" in caught.value.mend


def test_a_role_without_prompts_and_a_long_prompt(session: Session, tiny_folder: Path) -> None:
    with pytest.raises(EngineError) as caught:
        session.respond(Respond(prompts=["Hello", "word " * 600]), Silent())
    assert caught.value.reason == "bad_prompts" and "prompt 2" in caught.value.message
    without: Prepare = prepare_request(
        tiny_folder, prompts=prompt_texts().model_copy(update={"over_refusal": []})
    )
    other = Session()
    assert "over_refusal" not in other.prepare(without, Silent()).baseline
    with pytest.raises(EngineError) as caught:
        other.score(Score(candidates=CANDIDATES, role="over_refusal"), Silent())
    assert caught.value.reason == "bad_request"
