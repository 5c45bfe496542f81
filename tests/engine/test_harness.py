"""Benchmarks against the harness's own command on the exported folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.errors import EngineError
from engine.report import Silent
from engine.session import Session
from jobs.spec.candidate import Candidate
from jobs.spec.protocol import Benchmark, Benchmarked, Export
from tests.engine.fixtures_run import CANDIDATES, prepare_request, tiny_folder

__all__ = ["tiny_folder"]

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""
GENERATE = """
output_type: generate_until
doc_to_target: "{{choices[0]}}"
generation_kwargs:
  until: ["."]
  max_gen_toks: 12
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one task of multiple choice and one of generation, with local data."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "floors.jsonl"
    rows = [
        {
            "question": f"How do I mop floor number {k}?",
            "choices": ["Take a mop.", f"I cannot mop {k} floors, sorry.", "Rain falls."],
            "label": k % 3,
        }
        for k in range(24)
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    for name, kind in (("floors", CHOICE), ("floors_said", GENERATE)):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + kind)
    return folder


@pytest.fixture(scope="module")
def session(tiny_folder: Path) -> Session:
    made = Session()
    made.prepare(prepare_request(tiny_folder), Silent())
    return made


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def command(model: Path, tasks: Path, out: Path) -> dict[str, Any]:
    """The figures of `lm_eval` itself on a folder."""
    run = subprocess.run(
        [sys.executable, "-m", "lm_eval", "--model", "hf",
         "--model_args", f"pretrained={model},dtype=float32", "--tasks", "floors,floors_said",
         "--include_path", str(tasks), "--device", "cpu", "--batch_size", "8",
         "--output_path", str(out)],
        capture_output=True, text=True, timeout=170, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(out / "datasets")},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    (found,) = out.glob("**/results_*.json")
    return dict(json.loads(found.read_text())["results"])


@pytest.mark.filterwarnings("ignore")  # of the harness and its data sets, about their own insides
@pytest.mark.parametrize("candidate", [CANDIDATES[0], pytest.param(None, marks=pytest.mark.slow)])
def test_figures_are_those_of_the_command(
    session: Session, tasks: Path, tiny_folder: Path, tmp_path: Path, candidate: Candidate | None
) -> None:
    asked = Benchmark(tasks=["floors", "floors_said"], task_folder=str(tasks), candidate=candidate)
    found = session.handle(asked, Silent())
    assert isinstance(found, Benchmarked)
    folder = tiny_folder
    if candidate is not None:
        folder = tmp_path / "merged"
        folder.mkdir()
        session.handle(Export(candidate=candidate, directory=str(folder), measure=False), Silent())
    theirs = command(folder, tasks, tmp_path / "out")
    assert set(found.values) == {
        "floors.acc", "floors.acc_norm", "floors_said.exact_match"
    }  # fmt: skip
    for name, value in found.values.items():
        task, metric = name.split(".")
        assert value.value == pytest.approx(theirs[task][f"{metric},none"], abs=1e-12)
        assert value.n == 24 and value.low is not None
        error = theirs[task][f"{metric}_stderr,none"]
        assert value.value - value.low == pytest.approx(1.959963984540054 * error, abs=1e-12)
    assert 0 < found.values["floors.acc"].value < 1


@pytest.mark.filterwarnings("ignore")
def test_limits_and_stops(session: Session, tasks: Path) -> None:
    found = session.handle(Benchmark(tasks=["floors"], task_folder=str(tasks), limit=5), Silent())
    assert isinstance(found, Benchmarked) and found.values["floors.acc"].n == 5

    class Stopping(Silent):
        def progress(self, phase: str, done: float = 0, total: float = 0, text: str = "") -> None:
            if done >= 2:
                raise EngineError("stopped", "the request was stopped")

    with pytest.raises(EngineError, match="stopped"):
        session.handle(Benchmark(tasks=["floors"], task_folder=str(tasks)), Stopping())


@pytest.mark.filterwarnings("ignore")
def test_unknown_tasks_are_named_before_any_is_run(session: Session, tasks: Path) -> None:
    request = Benchmark(tasks=["floors"], planned=["no_such_task"], task_folder=str(tasks))
    with pytest.raises(EngineError, match="no_such_task") as caught:
        session.handle(request, Silent())
    assert caught.value.reason == "bad_request" and "task folder" in caught.value.mend
