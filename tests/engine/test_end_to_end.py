"""A real `python -m engine` process over pipes: a whole job, errors, stop, end of file, death."""

from __future__ import annotations

import json
import os
import select
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo import prompt_file
from engine.scorers.refusals import Refusals
from jobs.spec.candidate import Ablation, constant, single_pass
from jobs.spec.protocol import (
    Error,
    Export,
    Exported,
    Log,
    Partial,
    Prepared,
    Progress,
    PromptTexts,
    Respond,
    Responses,
    Result,
    Score,
    ScoredBatch,
    Stop,
)
from tests.engine.fixtures_run import (
    CANDIDATES,
    Engine,
    child,
    demo_folder,
    prepare_request,
    tiny_folder,
)

__all__ = ["child", "demo_folder", "tiny_folder"]


def test_one_job_from_prepare_to_stop(child: Engine, tiny_folder: Path, tmp_path: Path) -> None:
    child.send(prepare_request(tiny_folder))
    *before, last = child.until_end()
    assert isinstance(last, Result)
    prepared = Prepared.model_validate(last.value)
    assert {"load", "response prefix", "baseline"} <= {
        m.phase for m in before if isinstance(m, Progress)
    }
    assert any(isinstance(m, Log) and m.level == "warning" for m in before)

    child.send(Score(candidates=CANDIDATES))
    *before, last = child.until_end()
    assert isinstance(last, Result)
    scored = ScoredBatch.model_validate(last.value).scored
    partials = {m.index: m.scored for m in before if isinstance(m, Partial)}
    assert partials == dict(enumerate(scored))

    texts = Responses.model_validate(child.ask(Respond(prompts=["How do I fold the hat?"]))).texts
    assert len(texts) == 1

    folder = tmp_path / "artifact"
    folder.mkdir()
    value = child.ask(Export(candidate=CANDIDATES[0], directory=str(folder)))
    exported = Exported.model_validate(value)
    assert exported.measured["search"].refusals == scored[0].scores.refusals
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 4
    assert prepared.anatomy.layers == 4

    assert child.ask(Stop()) == {}
    assert child.process.wait(timeout=20) == 0


def test_errors_are_typed_and_the_process_goes_on(child: Engine, tmp_path: Path) -> None:
    child.send(Score(candidates=CANDIDATES))
    last = child.until_end()[-1]
    assert isinstance(last, Error) and last.reason == "bad_request"

    child.send(prepare_request(tmp_path / "nowhere"))
    last = child.until_end()[-1]
    assert isinstance(last, Error) and last.reason == "model_not_found" and last.mend

    child.write(b'{"id": 99, "request": {"op": "fly"}}\n')
    last = child.until_end()[-1]
    assert isinstance(last, Error) and last.reason == "bad_request" and last.id == 99

    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}", encoding="utf-8")
    child.send(prepare_request(tmp_path / "broken"))
    assert isinstance(child.until_end()[-1], Error)
    assert child.ask(Stop()) == {}


LONG = Respond(prompts=["How do I fold the hat?"] * 64, max_new_tokens=440)


def started(child: Engine, folder: Path) -> None:
    """Leave the child in the middle of a long answer."""
    child.ask(prepare_request(folder))
    child.send(LONG)
    while not isinstance(child.next(), Partial):
        pass


def test_stop_ends_a_running_request(child: Engine, tiny_folder: Path) -> None:
    started(child, tiny_folder)
    begun = time.monotonic()
    child.send(Stop())
    last = child.until_end()[-1]
    assert isinstance(last, Error) and last.reason == "stopped"
    assert isinstance(child.until_end()[-1], Result)
    assert child.process.wait(timeout=10) == 0
    assert time.monotonic() - begun < 5


def test_end_of_file_ends_a_running_request(child: Engine, tiny_folder: Path) -> None:
    started(child, tiny_folder)
    begun = time.monotonic()
    child.hang_up()
    child.process.wait(timeout=10)
    assert time.monotonic() - begun < 5


def test_end_of_file_ends_a_computation_that_never_reports(
    child: Engine, tiny_folder: Path
) -> None:
    """The main thread is stuck in a write that nobody reads: only the guard can end it."""
    started(child, tiny_folder)
    fill_the_pipe(child)
    child.hang_up()
    begun = time.monotonic()
    child.process.wait(timeout=15)
    assert time.monotonic() - begun < 6


def fill_the_pipe(child: Engine) -> None:
    """Read nothing until the engine sleeps in write(2), its pipe full."""
    status = Path(f"/proc/{child.process.pid}/stat")
    limit, last = time.monotonic() + 60, -1
    while time.monotonic() < limit:
        fields = status.read_text(encoding="ascii").rsplit(")", 1)[1].split()
        used = int(fields[11]) + int(fields[12])  # clock ticks of processor time
        if fields[0] == "S" and used == last:
            return
        last = used
        select.select([], [], [], 0.2)
    raise TimeoutError("the engine never blocked")


def test_killed_while_it_works_leaves_only_end_of_file(child: Engine, tiny_folder: Path) -> None:
    started(child, tiny_folder)
    child.process.send_signal(signal.SIGKILL)
    with pytest.raises(EOFError):
        while True:
            child.next(20)
    assert child.process.wait(timeout=10) == -signal.SIGKILL


def test_the_pipes_are_not_inherited(child: Engine) -> None:
    """A child of the engine that outlives it must not look like a living engine."""
    folder = Path(f"/proc/{child.process.pid}/fdinfo")
    if not folder.is_dir():
        pytest.skip("needs /proc")
    pipes = [
        entry for entry in folder.iterdir()
        if os.readlink(f"/proc/{child.process.pid}/fd/{entry.name}").startswith("pipe:")
    ]  # fmt: skip
    assert len(pipes) == 2
    for entry in pipes:
        flags = int(entry.read_text(encoding="ascii").split("flags:")[1].split()[0], 8)
        assert flags & os.O_CLOEXEC


def split(name: str, part: str) -> list[str]:
    """The prompts of one split of a committed prompt file."""
    lines = prompt_file(name).read_text(encoding="utf-8").splitlines()
    return [row["prompt"] for row in map(json.loads, lines) if row["split"] == part]


def test_the_demo_model_is_edited_and_the_artifact_keeps_the_figures(
    child: Engine, demo_folder: Path, tmp_path: Path
) -> None:
    """The truth is plain transformers: `generate` and float64 on the exported folder."""
    texts = {
        f"{part}_{side}": split(name, part)[:size]
        for part, size in (("direction", 64), ("search", 40), ("heldout", 20))
        for side, name in (("harmful", "refused"), ("harmless", "answered"))
    }
    prepared = Prepared.model_validate(
        child.ask(
            prepare_request(
                demo_folder, prompts=PromptTexts(**texts), max_new_tokens=40, kl_tokens=8
            )
        )
    )
    assert prepared.baseline["search"].refusals >= 36 and prepared.warnings == []

    candidates = [
        single_pass(prepared.anatomy.layers),
        Ablation(attention=constant(1), mlp=constant(0.6)),
        Ablation(mode="columns", attention=constant(0.5), mlp=constant(0)),
    ]
    scored = ScoredBatch.model_validate(child.ask(Score(candidates=candidates))).scored
    assert scored[1].scores.refusals < 0.2 * prepared.baseline["search"].refusals

    (tmp_path / "out").mkdir()
    exported = Exported.model_validate(
        child.ask(Export(candidate=candidates[1], directory=str(tmp_path / "out")))
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    edited: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    refusals, decisions = Refusals(), []
    for text in texts["search_harmful"]:
        ids = torch.tensor([chat(tokenizer, text)])
        out = edited.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False
        )
        answer = str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
        decisions.append(refusals.is_refusal(answer))
    assert decisions == [outcome.refused for outcome in scored[1].outcomes]
    assert exported.measured["search"].refusals == sum(decisions)

    original = AutoModelForCausalLM.from_pretrained(demo_folder, dtype=torch.float64)
    edited = edited.double()
    total = 0.0
    for text in texts["search_harmless"]:
        ids = torch.tensor([chat(tokenizer, text)])
        with torch.no_grad():
            p, q = (model(ids).logits[0, -1].log_softmax(-1) for model in (original, edited))
        total += float((p.exp() * (p - q)).sum()) / len(texts["search_harmless"])
    assert scored[1].scores.kl_first == pytest.approx(total, abs=1e-3)
    assert exported.measured["search"].kl_first == pytest.approx(total, abs=1e-5)


def chat(tokenizer: Any, text: str) -> list[int]:
    """A prompt as transformers' own template gives it."""
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    )
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])
