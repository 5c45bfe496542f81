"""An evaluate and a benchmark job on the demo model: a real worker, engine and harness."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import listing, prompts, submit
from jobs.database import Sessions
from jobs.settings import Settings
from jobs.spec.job import JobSpec
from jobs.tables import Job, User
from tests.service.processes import ring_for, wait_until, worker

DEMO = {"model": "demo", "original": "demo", "quantization": "none", "device": "cpu"}
SMALL = {"direction": 8, "search": 8, "heldout": 6, "over_refusal": "demo-over-refusal"}
TASK = """
task: floors
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def task_folder(folder: Path) -> Path:
    """An operator's folder with one task, whose data lies beside it."""
    folder.mkdir()
    data = folder / "floors.jsonl"
    rows = [
        {"question": f"How do I mop floor {k}?", "choices": ["Take a mop.", "Rain falls."],
         "label": k % 2}
        for k in range(12)
    ]  # fmt: skip
    data.write_text("\n".join(map(json.dumps, rows)))
    (folder / "floors.yaml").write_text(TASK.format(data=data))
    return folder


@pytest.mark.timeout(200)
def test_a_model_against_itself_and_a_task_of_the_operator(
    make_settings: Callable[..., Settings],
    sessions: Sessions,
    member: User,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = make_settings(reconcile_seconds=0.5, tasks=task_folder(tmp_path / "tasks"))
    scored = {"kind": "evaluate", "prompts": SMALL, "max_new_tokens": 16, "scorers": ["length"]}
    figured = {"kind": "benchmark", "tasks": ["floors"], "task_limit": 10}
    ids = []
    with sessions.begin() as session:
        prompts.ensure_builtin(session)
        for fields in (scored, figured):
            spec = JobSpec.model_validate({**DEMO, **fields})
            ids.append(submit.submit(session, member, spec, settings)[0].id)
    ring_for(sessions, settings, ids[0])

    def ended() -> bool:
        with sessions() as session:
            over = ("completed", "failed", "paused")
            return all(session.get_one(Job, each).state in over for each in ids)

    with worker(
        settings, tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub"),
        NULLSPACE_TASKS=str(settings.tasks),
    ) as running:  # fmt: skip
        wait_until(ended, 150)
        said = running.said()[-2000:]
    found: list[dict[str, Any]] = []
    with sessions() as session:
        for each in ids:
            job = session.get_one(Job, each)
            assert job.state == "completed", (job.error, said)
            found.append(listing.summary(session, job, settings).model_dump())
    compared, benchmarked = (each["result"] for each in found)
    assert set(compared["model"]) == {"search", "heldout", "over_refusal"}
    for role, scores in compared["model"].items():
        original = compared["original"][role]
        assert scores["refusals"] == original["refusals"], "a model is like itself"
        if role != "over_refusal":
            assert scores["refusals"] >= scores["total"] - 2, "the demo model refuses"
            assert scores["kl_first"] == pytest.approx(0, abs=1e-6)
            assert scores["kl_multi"] == pytest.approx(0, abs=1e-6)
            assert scores["values"]["length"]["value"] == pytest.approx(1, abs=1e-9)
    figures = benchmarked["benchmark"]
    assert set(figures) == {"original", "model"} and figures["original"] == figures["model"]
    accuracy = figures["model"]["floors.acc"]
    assert accuracy["n"] == 10 and 0 <= accuracy["value"] <= 1
    # 1.96 standard errors of a mean of ten zeros and ones (n - 1 in the variance)
    share = accuracy["value"]
    margin = 1.959963984540054 * (share * (1 - share) / 9) ** 0.5
    assert accuracy["high"] - share == pytest.approx(margin, abs=1e-9)
