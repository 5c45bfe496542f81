"""An artifact made twice: same bytes, and what is said where something is not as it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from engine.report import Silent
from engine.session import Session
from jobs import prompts as prompt_sets
from jobs.spec.job import Prompts
from jobs.spec.manifest import Manifest
from jobs.spec.protocol import Export, PromptTexts
from nullspace import reproduce as room
from nullspace.cli import main
from nullspace.client import ClientError
from tests.engine.fixtures_run import CANDIDATES, prepare_request, tiny_folder

__all__ = ["tiny_folder"]
SETS = Prompts(direction=24, search=12, heldout=8)


def texts() -> PromptTexts:
    lines = {"harmful": prompt_sets.builtin("demo-refused"),
             "harmless": prompt_sets.builtin("demo-answered")}  # fmt: skip
    return prompt_sets.arranged({k: v for k, v in lines.items() if v}, SETS)


@pytest.fixture(scope="module")
def artifact(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged artifact of the tiny model."""
    session = Session()
    session.prepare(prepare_request(tiny_folder, prompts=texts()), Silent())
    folder = tmp_path_factory.mktemp("first")
    card = {"prompts": SETS.model_dump(mode="json")}
    request = Export(candidate=CANDIDATES[1], directory=str(folder), card=card)
    names = {file.name for file in session.export(request, Silent()).files}
    assert {"manifest.json", "README.md", "SHA256SUMS", "model.safetensors"} <= names
    return folder


def test_manifest_says_what_it_is(artifact: Path, tiny_folder: Path) -> None:
    plain = json.loads((artifact / "manifest.json").read_text())
    weights = (tiny_folder / "model.safetensors").read_bytes()
    assert plain["source"]["files"][0]["sha256"] == hashlib.sha256(weights).hexdigest()
    assert plain["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert plain["prompts"]["search_harmful"]["count"] == 12
    assert plain["machine"]["threads"] == 1
    assert plain["measured"]["search"]["total"] == 12
    everything = json.dumps(plain)
    for text in texts().search_harmful:
        assert text not in everything  # hashes, no prompts
    assert str(tiny_folder) not in everything  # and no path of the machine


def test_the_same_bytes_come_out(
    artifact: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "again"
    arguments = ["reproduce", str(artifact), "--model", str(tiny_folder), "-o", str(output)]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["identical"] and found["differences"] == [] and found["scores"] == []
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (output / name).read_bytes() == (artifact / name).read_bytes()
    assert main(arguments) == 1  # the folder is not empty any more


def test_other_settings_are_named(artifact: Path, tiny_folder: Path, tmp_path: Path) -> None:
    manifest = room.read(artifact)
    changed = manifest.model_copy(
        update={
            "versions": {**manifest.versions, "torch": "1.0", "python": "2.7"},
            "candidate": CANDIDATES[0],
        }
    )
    outcome = room.reproduce(changed, texts(), tiny_folder, tmp_path / "other", lambda text: None)
    assert not outcome.identical
    assert [f.name for f in outcome.files if not f.same] == ["model.safetensors"]
    assert [(d.what, d.severity) for d in outcome.differences] == [
        ("torch", "numeric"), ("python", "harmless"),
    ]  # fmt: skip
    assert outcome.scores_differ


def test_another_model_is_refused(artifact: Path, tiny_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    weights = other / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ClientError, match="another experiment"):
        room.reproduce(room.read(artifact), texts(), other, tmp_path / "o", lambda text: None)


def test_other_prompts_are_refused(artifact: Path, tmp_path: Path) -> None:
    manifest = room.read(artifact)
    assert room.prompts_for(manifest, {}) == texts()
    lines = [json.dumps(line) for line in prompt_sets.builtin("demo-refused") or []]
    same, other = tmp_path / "same.jsonl", tmp_path / "other.jsonl"
    same.write_text("\n".join(lines))
    other.write_text("\n".join(lines[1:]))
    assert room.prompts_for(manifest, {"harmful": same}) == texts()
    with pytest.raises(ClientError, match="direction_harmful"):
        room.prompts_for(manifest, {"harmful": other})
    assert manifest.sets is not None
    unknown = manifest.sets.model_copy(update={"harmless": "ours"})
    with pytest.raises(ClientError, match="--harmless"):
        room.prompts_for(manifest.model_copy(update={"sets": unknown}), {})


def test_what_is_no_manifest(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ClientError, match="is no manifest"):
        room.read(tmp_path)
    with pytest.raises(ClientError, match="cannot be read"):
        room.read(tmp_path / "absent.json")


def test_manifests_survive_json(artifact: Path) -> None:
    manifest = room.read(artifact)
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest
