"""Pages of jobs that search nothing, and benchmarks on a trial's page."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from playwright.sync_api import expect

from jobs import benchmarks, trials
from jobs.database import Sessions
from jobs.settings import Settings
from jobs.spec.job import JobSpec
from jobs.tables import Job, User
from tests.web import evaluations
from tests.web.markup import good, location
from tests.web.test_browser import Open, fits, open_page, touchable

__all__ = ["open_page"]
FORM = {
    "model": "small", "quantization": "none", "dtype": "auto", "device": "auto",
    "device_map": "single", "trials": "200", "methods": "mpoa", "max_new_tokens": "100",
    "kl_tokens": "16", "seed": "0", "priority": "0", "parallelism": "1",
    "prompts.harmful": "refused-requests", "prompts.harmless": "answered-requests",
    "prompts.direction": "400", "prompts.search": "100", "prompts.heldout": "100",
    "objectives": ["refusals", "kl_first"], "action": "submit",
}  # fmt: skip
HOSTILE = "\x1b[31m<img src=x onerror=alert(1)>\u202e"


@pytest.fixture
def compared(
    sessions: Sessions, web_settings: Settings, person: User, sets: tuple[str, str]
) -> uuid.UUID:
    return evaluations.evaluated(sessions, web_settings, person, hostile=HOSTILE)


def spec_of(sessions: Sessions, job_id: str) -> JobSpec:
    with sessions() as session:
        return JobSpec.model_validate(session.get_one(Job, uuid.UUID(job_id)).spec)


# --- the form -------------------------------------------------------------------------------------


def test_each_kind_is_submitted_without_what_it_has_no_use_for(
    client: TestClient, sessions: Sessions, sets: tuple[str, str]
) -> None:
    """The hidden fields of the other kinds are sent along, as a browser does."""
    filled = FORM | {"trials": "77", "original": "small", "tasks": "arc_easy\n gsm8k"}
    for kind in ("abliterate", "evaluate", "benchmark"):
        answer = client.post("/jobs/new", data=filled | {"kind": kind, "key": kind})
        spec = spec_of(sessions, location(answer).split("/")[2].split("?")[0])
        assert spec.kind == kind and spec.tasks == ["arc_easy", "gsm8k"]
        assert spec.original == (None if kind == "abliterate" else "small")
        assert spec.trials == (77 if kind == "abliterate" else 200)
        assert spec.scorers == ([] if kind == "benchmark" else ["harness"])
    page = good(client.post("/jobs/new", data=FORM | {"kind": "benchmark"}), 422)
    assert "A benchmark needs at least one harness task." in page
    absent = FORM | {"kind": "evaluate", "original": "nowhere"}
    assert "no model named nowhere" in good(client.post("/jobs/new", data=absent), 422)
    assert 'value="evaluate" aria-describedby="kind-evaluate-hint" checked' in good(
        client.get("/jobs/new?kind=evaluate")
    )


@pytest.mark.parametrize("scripts", [True, False])
def test_the_form_shows_what_matters(open_page: Open, sets: tuple[str, str], scripts: bool) -> None:
    page = open_page(390, java_script_enabled=scripts)
    page.goto("/jobs/new")
    shown = {
        "abliterate": ["Trials", "Harness tasks", "Prompts that the model refuses"],
        "evaluate": ["Original", "Harness tasks", "Prompts that the model refuses"],
        "benchmark": ["Original", "Harness tasks"],
    }
    labels = {label for each in shown.values() for label in each}
    page.get_by_label("Trials", exact=True).fill("")  # what is hidden must not be in the way
    for kind, own in shown.items():
        page.get_by_label(kind.capitalize(), exact=True).check()
        for label in labels:
            field = page.get_by_label(label, exact=True)
            expect(field).to_be_visible() if label in own else expect(field).to_be_hidden()
        fits(page)
        touchable(page)
    if scripts:
        page.get_by_label("Model", exact=True).fill("small")
        page.get_by_label("Harness tasks").fill("arc_easy")
        page.get_by_role("button", name="Submit").click()
        expect(page.get_by_role("heading", name="small, arc_easy")).to_be_visible()


# --- the job --------------------------------------------------------------------------------------


def test_original_and_model_side_by_side(client: TestClient, compared: uuid.UUID) -> None:
    page = good(client.get(f"/jobs/{compared}"))
    for text in ("97/100", "4/100", "91.5–99.0 %", "0.0134", "0.0268", "Length drift", "1.04",
                 "arc_easy", "acc_norm", "± 0.031", "chat template of its own"):  # fmt: skip
        assert text in page, text
    assert "5<small>/5 steps" in page and "More trials" not in page
    assert "Refusals against KL" not in page and "trials</small>" not in page
    assert page.count('<article class="answer">') == 8 and "now answered" in page
    part = client.get(f"/jobs/{compared}/live?page=2").text
    assert part.count('<article class="answer">') == 8 and "page 2 of 13" in part
    refused = good(client.get(f"/jobs/{compared}?role=heldout&only=refused"))
    assert refused.count('<article class="answer">') == 4
    assert "measured: the original refuses 97 of 100, the model refuses 4 of 100" in page
    listed = good(client.get("/?kind=evaluate"))
    assert "Edited against" in listed and "97<small>/100" in listed
    assert "Edited against" not in good(client.get("/?kind=benchmark"))


def test_a_model_alone_and_a_benchmark(
    client: TestClient, sessions: Sessions, web_settings: Settings, person: User,
    sets: tuple[str, str],
) -> None:  # fmt: skip
    alone = evaluations.evaluated(sessions, web_settings, person, original=None, finish=False)
    page = good(client.get(f"/jobs/{alone}"))
    assert "Original" not in page.partition('id="scores"')[2].partition('data-part="log"')[0]
    assert "2<small>/3 steps" in page and "120 forwards" in page and "Pause" in page
    bench = evaluations.submitted(
        sessions, web_settings, person, kind="benchmark", tasks=["arc_easy"], prompts={}
    )
    page = good(client.get(f"/jobs/{bench}"))
    assert "0<small>/1 steps" in page and "arc_easy" in page and "all samples" in page
    refused = client.post(f"/jobs/{bench}/trials", data={"trials": "20"})
    assert "searches nothing" in good(refused, 409)


# --- the trial ------------------------------------------------------------------------------------


def test_benchmark_of_a_trial(
    client: TestClient, sessions: Sessions, web_settings: Settings, person: User, done: uuid.UUID
) -> None:
    with sessions() as session:
        number = next(row.number for row in trials.front(session, done) if row.picked)
    trial = f"/jobs/{done}/trials/{number}"
    wrong = client.post(f"{trial}/benchmarks", data={"tasks": "a/b", "limit": ""})
    assert "not the name of a harness task" in good(wrong, 422)
    answer = client.post(f"{trial}/benchmarks", data={"tasks": "sums  words", "limit": "9"})
    assert location(answer) == f"{trial}?done=benchmarked#benchmarks"
    page = good(client.get(trial))
    assert "sums, words" in page and "waiting for a worker" in page and "data-events" in page
    with sessions() as session:
        (asked,) = benchmarks.of_job(session, done, number)
    assert asked.payload["limit"] == 9
    client.post(f"{trial}/benchmarks/{asked.id}/stop")
    assert "stopped" in good(client.get(trial))
    evaluations.benchmarked(sessions, web_settings, person, done, number)
    page = client.get(f"{trial}/live").text
    assert page.count("± 0.031") == 4 and page.count("of 200") == 4 and "acc_norm" in page
    job = good(client.get(f"/jobs/{done}"))  # whose shown trial is this one
    assert job.count("± 0.031") == 4 and f"Trial {number}</th>" in job
    error = {"reason": "bad_request", "message": "No task of that name.", "mend": "Choose one."}
    other = 0 if number else 1
    evaluations.benchmarked(sessions, web_settings, person, done, other, error=error)
    page = good(client.get(f"/jobs/{done}/trials/{other}"))
    assert "failed" in page and "No task of that name. Choose one." in page
    assert "completed" in good(client.get(f"/jobs/{done}")), "the job is none the worse"


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_look_good(
    open_page: Open, sessions: Sessions, web_settings: Settings, person: User,
    compared: uuid.UUID, width: int, scheme: str,
) -> None:  # fmt: skip
    page = open_page(width, color_scheme=scheme)
    for name, path in (("evaluation", f"/jobs/{compared}"), ("list", "/")):
        page.goto(path)
        fits(page)
        touchable(page)
        if folder := os.environ.get("NULLSPACE_SHOTS"):
            page.screenshot(path=Path(folder) / f"{name}-{width}-{scheme}.png", full_page=True)
