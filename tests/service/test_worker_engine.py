"""The engine process from the supervisor's side, with a program that speaks the protocol."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from jobs.settings import Settings
from jobs.spec.candidate import single_pass
from jobs.spec.protocol import (
    Log,
    Partial,
    Prepare,
    Prepared,
    PromptTexts,
    Result,
    Score,
    ScoredBatch,
)
from jobs.tables import Worker
from tests.service.processes import ROOT, fake_engine, live_engines, wait_until
from worker.engine_process import EngineProcess, environment
from worker.problems import EngineDied, EngineError, Interrupted
from worker.settings import WorkerSettings
from worker.station import Station
from worker.task_log import TaskLog

TEXTS = PromptTexts(
    direction_harmful=["a"], direction_harmless=["b"], search_harmful=["c"] * 7,
    search_harmless=["d"], heldout_harmful=["e"], heldout_harmless=["f"],
)  # fmt: skip
PREPARE = Prepare(model="fake", prompts=TEXTS)
SCORE = Score(candidates=[single_pass(8), single_pass(4)])


def never() -> None:
    return None


def last(engine: EngineProcess, request: Prepare | Score) -> Result:
    *_, result = engine.request(request, never)
    assert isinstance(result, Result)
    return result


def test_prepare_and_score(tmp_path: Path) -> None:
    engine = EngineProcess(fake_engine(tmp_path))
    prepared = Prepared.model_validate(last(engine, PREPARE).value)
    assert prepared.anatomy.layers == 8
    batch = ScoredBatch.model_validate(last(engine, SCORE).value)
    assert [scored.scores.total for scored in batch.scored] == [7, 7]
    assert os.getpgid(engine.pid) == engine.pid != os.getpgid(0), "its own process group"
    engine.end(5)
    assert not live_engines(tmp_path)


def test_candidates_join_the_request_that_runs(tmp_path: Path) -> None:
    """Its own come back in the result, all of them as partials; too late, they are dropped."""
    engine = EngineProcess(fake_engine(tmp_path, delay=0.1, lanes=2))
    assert Prepared.model_validate(last(engine, PREPARE).value).ahead == 6
    seen: list[int] = []
    batch = ScoredBatch(scored=[])
    for answer in engine.request(SCORE, never):
        if isinstance(answer, Partial):
            seen.append(answer.index)
            if len(seen) == 1:
                engine.add([single_pass(2), single_pass(3)], [])
        elif isinstance(answer, Result):
            batch = ScoredBatch.model_validate(answer.value)
    assert len(batch.scored) == 2 and sorted(seen) == [0, 1, 2, 3]
    engine.add([single_pass(2)], [])
    assert len(ScoredBatch.model_validate(last(engine, SCORE).value).scored) == 2
    engine.end(5)


def test_a_request_larger_than_the_pipe(tmp_path: Path) -> None:
    engine = EngineProcess(fake_engine(tmp_path))
    many = TEXTS.model_copy(update={"search_harmful": ["x" * 1000] * 3000})
    last(engine, PREPARE.model_copy(update={"prompts": many}))
    assert ScoredBatch.model_validate(last(engine, SCORE).value).scored[0].scores.total == 3000
    engine.end(5)


def test_death_is_told_with_the_signal_and_the_last_words(tmp_path: Path) -> None:
    engine = EngineProcess(fake_engine(tmp_path))
    last(engine, PREPARE)
    (tmp_path / "die").touch()
    with pytest.raises(EngineDied) as caught:
        last(engine, SCORE)
    assert caught.value.reason == "engine_died"
    assert "SIGKILL" in caught.value.message
    assert caught.value.detail == "the last words"
    assert not engine.alive


def test_the_death_of_a_process_of_the_engine_is_its_own(tmp_path: Path) -> None:
    """Of a lane, for example: the task is tried again, as after the engine's own."""
    engine = EngineProcess(fake_engine(tmp_path))
    last(engine, PREPARE)
    said = {"reason": "engine_died", "message": "a lane was ended", "mend": ""}
    (tmp_path / "refuse-score").write_text(json.dumps(said))
    with pytest.raises(EngineDied, match="a lane was ended"):
        last(engine, SCORE)
    engine.end(5)


def test_a_command_that_is_no_engine(tmp_path: Path) -> None:
    engine = EngineProcess([sys.executable, "-c", "import sys; sys.exit(3)"])
    with pytest.raises(EngineDied, match="status 3"):
        last(engine, PREPARE)


def test_a_typed_error_leaves_the_engine_usable(tmp_path: Path) -> None:
    engine = EngineProcess(fake_engine(tmp_path))
    (tmp_path / "refuse-prepare").write_text(
        '{"reason": "gated_model", "message": "no", "mend": "accept the licence"}'
    )
    with pytest.raises(EngineError) as caught:
        last(engine, PREPARE)
    assert caught.value.facts() == {
        "reason": "gated_model", "message": "no", "mend": "accept the licence"
    }  # fmt: skip
    (tmp_path / "refuse-prepare").unlink()
    last(engine, PREPARE)
    engine.end(5)


def test_stop_yields_what_is_finished_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "deaf").touch()  # it finishes the first candidate though it was told to stop
    engine = EngineProcess(fake_engine(tmp_path, delay=0.3))
    last(engine, PREPARE)
    asked = time.monotonic()

    def check() -> None:
        if time.monotonic() > asked + 0.1:
            raise Interrupted("pause")

    with pytest.raises(Interrupted):
        list(engine.request(SCORE, check))
    finished = list(engine.stop(5.0))
    assert [partial.index for partial in finished] == [0, 1]
    assert all(isinstance(partial, Partial) and partial.scored for partial in finished)
    assert not live_engines(tmp_path)


def test_a_deaf_engine_is_killed_in_time(tmp_path: Path) -> None:
    (tmp_path / "deaf").touch()
    engine = EngineProcess(fake_engine(tmp_path, delay=60))
    last(engine, PREPARE)
    threading.Timer(0.3, engine.strike).start()
    with pytest.raises(Interrupted, match="lost"):
        list(engine.request(SCORE, never))
    engine = EngineProcess(fake_engine(tmp_path, delay=60))
    engine.end(0.5)
    assert not engine.alive


def test_nothing_secret_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATABASE_URL", "REDIS_URL", "NULLSPACE_SECRET_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "canary")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = environment("2")
    assert "canary" not in given.values()
    assert given["HF_HUB_OFFLINE"] == "1"
    assert given["CUDA_VISIBLE_DEVICES"] == "2"


def test_output_goes_to_the_log_without_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    (tmp_path / "print").write_text("the token is hf_canary")
    log = TaskLog(tmp_path / "task.log")
    engine = EngineProcess(fake_engine(tmp_path), log)
    last(engine, PREPARE)
    engine.end(5)
    log.close()
    written = (tmp_path / "task.log").read_text()
    assert "the token is ***" in written and "hf_canary" not in written


def test_messages_of_the_protocol_come_without_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library's error may quote the header that it sent; a file's token ends in a newline."""
    monkeypatch.setenv("HF_TOKEN", "hf_canary123\n")
    engine = EngineProcess(fake_engine(tmp_path))
    line = b'{"type": "log", "text": "Illegal header value Bearer hf_canary123"}\n'
    [told] = engine._parse(line)
    assert isinstance(told, Log) and told.text == "Illegal header value Bearer ***"
    engine.kill()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PDEATHSIG is Linux's")
def test_the_engine_dies_with_its_starter(tmp_path: Path) -> None:
    """Also when it listens to nothing: this one never reads its pipe."""
    script = (
        "import sys, time; from worker.engine_process import EngineProcess\n"
        "engine = EngineProcess([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(engine.pid, flush=True); time.sleep(600)\n"
    )
    starter = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT)
    assert starter.stdout is not None
    with starter.stdout:
        pid = int(starter.stdout.readline())
    wait_until(lambda: psutil.Process(pid).cmdline()[1:2] == ["-c"], 5, "it has become the engine")
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    wait_until(lambda: not psutil.pid_exists(pid), 5, "it died too")


def test_a_stop_does_not_cut_a_request_in_two(tmp_path: Path) -> None:
    """A pause may come while a large request is still being written: both must arrive whole."""

    def paused() -> None:
        raise Interrupted("pause")

    engine = EngineProcess(fake_engine(tmp_path))
    many = TEXTS.model_copy(update={"search_harmful": ["x" * 1000] * 3000})
    with pytest.raises(Interrupted):
        for _ in engine.request(PREPARE.model_copy(update={"prompts": many}), paused):
            pass
    engine.end(30)
    assert engine._process.returncode == 0, "it understood the stop"
    assert not live_engines(tmp_path)


def test_a_full_disk_loses_the_log_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "logs").touch()  # no folder can be made there
    log = TaskLog(tmp_path / "logs" / "task.log")
    log.line("info", "lost")
    log.close()


def test_a_struck_engine_is_not_used_again(
    tmp_path: Path, make_settings: Callable[..., Settings]
) -> None:
    """The last beat of a task may find its lease just released, and strike the warm engine."""
    own = WorkerSettings(engine_command=fake_engine(tmp_path))
    worker = Worker(id=uuid.uuid4(), name="w", accepts=[], device={})
    station = Station.open(make_settings(), own, worker)
    log = TaskLog(tmp_path / "task.log")
    first, _ = station.engine_for(PREPARE, log)
    station.note_prepared(PREPARE, Prepared.model_validate(last(first, PREPARE).value))
    assert station.engine_for(PREPARE, log) == (first, True)
    station.strike_engine()
    second, ready = station.engine_for(PREPARE, log)
    assert (second is first, ready) == (False, False)
    assert not first.alive
    last(second, PREPARE)
    station.close()
    log.close()
