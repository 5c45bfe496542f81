"""The pages of jobs, trials and artifacts, through the real application on a real database."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable

import pytest
from fastapi.testclient import TestClient

from jobs import artifacts, comparison, control, queue, trials
from jobs.database import Sessions
from jobs.settings import Settings
from jobs.tables import Job, User
from tests.web import invented, seed
from tests.web.markup import good, location
from web.views import formats
from web.views import trials as trial_views

# --- a job ----------------------------------------------------------------------------------


def test_finished_job(
    client: TestClient, sessions: Sessions, person: User, done: uuid.UUID
) -> None:
    page = good(client.get(f"/jobs/{done}"))
    with sessions.begin() as session:
        front = trials.front(session, done)
        picked = next(row for row in front if row.picked)
    # plot and table hold every trial, as links; both plots (wide and small) do
    for number in range(12):
        assert page.count(f'data-number="{number}"') == 2
        assert page.count(f'href="/jobs/{done}/trials/{number}"') >= 3
    assert page.count("data-heldout=") == 2 * len(front)
    assert f"Picked trial {picked.number}" in page
    assert f'<p class="big edited">{picked.refusals}<small>/{picked.total} refused' in page
    assert "original refuses 98 of 100" in page and "93.0–99.4 %" in page
    assert "100 %" in page and "merged model" in page and "ready" in page
    assert "baseline: 98/100 search" in page and "\x1b" not in page
    assert "/pause" not in page and "/cancel" not in page
    assert "data-events" in page  # an export is still being written


def test_table_sorts_and_filters(client: TestClient, done: uuid.UUID) -> None:
    def numbers(query: str) -> list[int]:
        page = good(client.get(f"/jobs/{done}?{query}"))
        return [
            int(n) for n in re.findall(rf'scope="row"><a href="/jobs/{done}/trials/(\d+)"', page)
        ]

    assert numbers("sort=number") == list(range(12))
    assert numbers("sort=number&order=desc") == list(range(11, -1, -1))
    by_kl = numbers("sort=kl")
    assert numbers("sort=kl&order=desc") == by_kl[::-1] and sorted(by_kl) == list(range(12))
    assert numbers("sort=<script>&order=x&show=y") == numbers("")
    assert set(numbers("show=front")) < set(range(12))


def test_running_job_and_its_buttons(
    client: TestClient, sessions: Sessions, running: uuid.UUID
) -> None:
    page = good(client.get(f"/jobs/{running}"))
    assert "<noscript><meta http-equiv=" in page and f'data-events="/api/v1/jobs/{running}' in page
    assert "http-equiv" not in good(client.get(f"/jobs/{running}?still=1"))
    assert "5</b>" not in page and "Searching" in page and "left" in page
    assert location(client.post(f"/jobs/{running}/pause")) == f"/jobs/{running}?done=paused"
    page = good(client.get(f"/jobs/{running}?done=paused"))
    assert "pausing" in page and "/resume" in page
    assert location(client.post(f"/jobs/{running}/resume")).endswith("done=resumed")
    assert location(client.post(f"/jobs/{running}/trials", data={"trials": "30"})).endswith("more")
    page = good(client.post(f"/jobs/{running}/trials", data={"trials": "3"}), 422)
    assert "5 trials have already been started" in page
    page = good(client.post(f"/jobs/{running}/trials", data={"trials": "١٢"}), 422)
    assert "in digits" in page
    assert "Cancel this job?" in good(client.get(f"/jobs/{running}/cancel"))
    assert location(client.post(f"/jobs/{running}/cancel")).endswith("done=cancelled")
    assert "cancelling" in good(client.get(f"/jobs/{running}"))
    page = good(client.post(f"/jobs/{running}/pause"), 409)
    assert "cannot be paused" in page
    with sessions.begin() as session:
        job = session.get_one(Job, running)
        assert (job.trials, job.desired_state) == (30, "cancel")


def test_a_warm_start_leads_to_the_trial_that_it_is_from(
    client: TestClient, sessions: Sessions, done: uuid.UUID, running: uuid.UUID
) -> None:
    with sessions.begin() as session:
        source = {"job": str(done), "trial": 7, "params": {}}
        session.get_one(Job, running).warm_starts = {"3": source}
        trials.get(session, running, 3).origin = "warm_start"
    page = good(client.get(f"/jobs/{running}/trials/3"))
    assert f'from <a href="/jobs/{done}/trials/7">trial 7 of job {str(done)[:8]}</a>' in page
    good(client.get(f"/jobs/{done}/trials/7"))
    assert "trial 7 of job" not in good(client.get(f"/jobs/{running}/trials/2"))


def test_the_live_part_is_part_of_the_page(client: TestClient, running: uuid.UUID) -> None:
    page = good(client.get(f"/jobs/{running}?sort=kl"))
    url = re.search(r'data-part-url="([^"]+)"', page)
    assert url is not None
    part = client.get(url[1].replace("&amp;", "&"))
    assert part.status_code == 200 and "<html" not in part.text
    parts = re.findall(r'data-part="(\w+)"', part.text)
    assert len(parts) == len(set(parts)) >= 8
    assert parts == re.findall(r'data-part="(\w+)"', page)
    assert part.text.strip() in page


def test_other_peoples_jobs(
    client: TestClient, sign_in: Callable[[User], TestClient], make_user: Callable[..., User],
    sessions: Sessions, web_settings: Settings, person: User, running: uuid.UUID,
) -> None:  # fmt: skip
    with sessions.begin() as session:
        hidden = seed.submit_job(session, web_settings, person, name="Hidden", private=True)
    other = sign_in(make_user("eve@example.org"))
    page = good(other.get(f"/jobs/{running}"))
    assert "/pause" not in page and "More trials" not in page
    assert "Only the job" in good(other.post(f"/jobs/{running}/pause"), 403)
    assert "Only the job" in good(other.get(f"/jobs/{running}/cancel"), 403)
    for path in ("", "/live", "/cancel", "/trials/0"):
        assert "Hidden" not in good(other.get(f"/jobs/{hidden}{path}"), 404)
    good(other.post(f"/jobs/{hidden}/pause"), 404)


# --- a trial --------------------------------------------------------------------------------


def test_trial(client: TestClient, sessions: Sessions, done: uuid.UUID) -> None:
    with sessions.begin() as session:
        row = next(each for each in trials.front(session, done) if each.picked)
        prompts = session.get_one(Job, done).prompts
    path = f"/jobs/{done}/trials/{row.number}"
    page = good(client.get(path))
    assert "Attention λ" in page and page.count('class="knot attention" data-') == invented.LAYERS
    assert "Take the pick back" in page and "To polish the lamp, start with a soft cloth" in page
    assert page.count('<article class="answer">') == 20 and "page 1 of 5" in page
    assert prompts["search_harmful"][5] in page + good(client.get(path + "?page=2"))
    held = good(client.get(path + "?role=heldout"))
    assert prompts["heldout_harmful"][-1] in good(client.get(path + "?role=heldout&page=5"))
    assert 'role=heldout#answers" aria-current="true"' in held
    only = good(client.get(path + "?only=refused"))
    assert only.count("edited-side refused") == row.refusals
    assert location(client.post(path + "/pick", data={"picked": "no"})).endswith("?done=unpicked")
    assert "Pick this trial" in good(client.get(path))
    assert location(client.post(path + "/pick", data={"picked": "yes"})).endswith("?done=picked")
    good(client.get(f"/jobs/{done}/trials/99"), 404)
    good(client.get(f"/jobs/{done}/trials/{10**30}"), 404)
    good(client.get(f"/jobs/{done}/trials/-1"), 404)


def test_export_and_chat_from_the_trial(
    client: TestClient, sessions: Sessions, done: uuid.UUID
) -> None:
    path = f"/jobs/{done}/trials/0"
    assert location(
        client.post(path + "/artifacts", data={"kind": "lora", "rank": "4"})
    ).startswith(path + "?done=exported")
    assert "LoRA adapter, rank 4" in good(client.get(path))
    assert "1 to 1024" in good(
        client.post(path + "/artifacts", data={"kind": "lora", "rank": "x"}), 422
    )
    assert "none of merged" in good(client.post(path + "/artifacts", data={"kind": "gguf"}), 422)
    assert "done=asked" in location(
        client.post(path + "/chat", data={"prompt": "How do I wax it?"})
    )
    page = good(client.get(path))
    assert "How do I wax it?" in page and "waiting for a worker" in page and "data-events" in page
    assert "1 to 20000 characters" in good(client.post(path + "/chat", data={"prompt": " "}), 422)
    with sessions.begin() as session:
        made = [a for a in artifacts.list_for_job(session, done) if a.trial_number == 0]
        assert [(a.kind, a.rank, a.state) for a in made] == [("lora", 4, "queued")]


COMPARED = ["mpoa", "ara", "deccp"]


@pytest.fixture
def compared(
    sessions: Sessions, web_settings: Settings, person: User, sets: tuple[str, str]
) -> uuid.UUID:
    """A finished job with three methods, a further objective, and what it measures."""
    return seed.demo_job(
        sessions, web_settings, person, trials_done=13, budget=13, methods=COMPARED,
        objectives=["refusals", "kl_first", "log_odds"],
    )  # fmt: skip


def test_methods_side_by_side(client: TestClient, sessions: Sessions, compared: uuid.UUID) -> None:
    page = good(client.get(f"/jobs/{compared}"))
    with sessions.begin() as session:
        reports = comparison.compare(session, session.get_one(Job, compared))
        rows = trials.list_trials(session, compared)
    part = page[page.index('data-part="methods"') : page.index('data-part="plot"')]
    lines = re.findall(r"<tr>.*?</tr>", part, re.S)[1:]
    assert len(lines) == len(reports) == 3
    for line, report in zip(lines, reports, strict=True):
        assert report.best is not None and report.best.heldout is not None
        held = report.best.heldout
        assert report.title in line and f'/trials/{report.best.number}"' in line
        assert f"{held.refusals}<small>/{held.total}" in line
        assert formats.interval(*held.interval) in line
        assert f"{report.complete}/{report.budget}" in line
        assert f"{report.hypervolume:.4f}" in line
    # each trial's mark is that of its method, in both plots, and so are the legend's
    for row in rows:
        mark = re.search(rf'data-number="{row.number}".*?</a>', page, re.S)
        assert mark is not None and f'class="dot s{COMPARED.index(row.method)}"' in mark[0]
        assert "; " + trial_views.method_title(row.method) in mark[0]
    legend = page[page.index('<figcaption class="legend"') :]
    assert [f's{n}"' in legend for n in range(4)] == [True, True, True, False]


def test_one_method_is_no_comparison(client: TestClient, done: uuid.UUID) -> None:
    page = good(client.get(f"/jobs/{done}"))
    assert 'data-part="methods"' not in page and 'class="dot s0"' not in page


def test_trials_of_other_methods(
    client: TestClient, sessions: Sessions, compared: uuid.UUID
) -> None:
    with sessions.begin() as session:
        rows = {row.method: row for row in trials.list_trials(session, compared)}
    page = good(client.get(f"/jobs/{compared}/trials/{rows['ara'].number}"))
    assert "Arbitrary-rank ablation" in page and "Overshoot ω" in page
    assert "Strength over the layers" not in page and "λ</dt>" not in page
    assert "First-token refusal log-odds" in page and " nats" in page and "of 100" in page
    page = good(client.get(f"/jobs/{compared}/trials/{rows['deccp'].number}"))
    assert "Strength over the layers" in page and 'class="knot attention"' in page
    assert "made by single pass" in page


def test_preflight_names_what_edits_miss(
    client: TestClient, sessions: Sessions, compared: uuid.UUID
) -> None:
    with sessions.begin() as session:
        job = session.get_one(Job, compared)
        prepared = json.loads(json.dumps(job.prepared))
        writers = prepared["anatomy"]["writers"]
        writers[1] |= {"name": "layers.0.<b>experts</b>", "shape": [4, 256, 64]}
        writers[3] |= {"covered": False, "reason": "its layout is not known"}
        job.prepared = prepared
    page = good(client.get(f"/jobs/{compared}"))
    table = page[page.index('class="grid-table small reach"') : page.index('data-part="submitted"')]
    cells = [
        re.findall(r"<t[hd][^>]*>([^<]*)<", line) for line in re.findall(r"<tr>.*?</tr>", table)
    ]
    assert [row[:3] for row in cells[1:]] == [["Attention", "8", "0"], ["MLP", "8", "1"]]
    assert "Reached by no method: 1 matrix" in table and "its layout is not known" in table
    assert "Not reached by ARA: 1 matrix" in table and "&lt;b&gt;experts" in table


def test_a_trial_that_is_not_scored_yet(
    client: TestClient, sessions: Sessions, web_settings: Settings, person: User,
    sets: tuple[str, str],
) -> None:  # fmt: skip
    with sessions.begin() as session:
        job_id = seed.submit_job(session, web_settings, person, trials=2)
        claim = queue.claim(session, seed.worker(session), web_settings)
        assert claim is not None
        trials.reserve(session, claim.task, claim.token, 1)
    assert "Its parameters are not chosen yet" in good(client.get(f"/jobs/{job_id}/trials/0"))
    page = good(client.get(f"/jobs/{job_id}"))
    assert "The first point appears when a trial has been scored" in page
    assert "not complete" in good(client.post(f"/jobs/{job_id}/trials/0/pick"), 409)


def test_artifact(client: TestClient, sessions: Sessions, done: uuid.UUID) -> None:
    with sessions.begin() as session:
        found = {a.kind: a.id for a in artifacts.list_for_job(session, done)}
    page = good(client.get(f"/artifacts/{found['merged']}"))
    assert "from transformers import AutoModelForCausalLM" in page and "sha256sum --check" in page
    assert '<b class="count">98' in page and "2<small>/100" in page
    for name in ("config.json", "model.safetensors"):
        assert f'href="/api/v1/artifacts/{found["merged"]}/files/{name}"' in page
    got = client.get(f"/api/v1/artifacts/{found['merged']}/files/config.json")
    assert got.status_code == 200 and b"Llama" in got.content
    page = good(client.get(f"/artifacts/{found['lora']}"))
    assert "The files are being written" in page and "sha256sum" not in page
    good(client.get(f"/artifacts/{uuid.uuid4()}"), 404)


def test_control_shows_in_the_page_what_may_be_done(
    sessions: Sessions, client: TestClient, running: uuid.UUID, person: User
) -> None:
    with sessions.begin() as session:
        job = control.editable(session, person, running)
        job.error = {
            "reason": "disk_full",
            "message": "<b>The disk is full.</b>",
            "mend": "Free it.",
        }
    page = good(client.get(f"/jobs/{running}"))
    assert "&lt;b&gt;The disk is full.&lt;/b&gt;" in page and "Free it." in page


# --- the analysis ---------------------------------------------------------------------------


def test_analysis(client: TestClient, done: uuid.UUID) -> None:
    path = f"/jobs/{done}/geometry"
    assert f'href="{path}"' in good(client.get(f"/jobs/{done}"))
    page = good(client.get(path))
    found = invented.geometry()
    table = re.findall(r'<tr><th scope="row">(\d+)</th><td>([^<]+)(.*?)</tr>', page)
    assert [int(number) for number, _, _ in table] == list(range(invented.LAYERS))
    shown = [float(separation) for _, separation, _ in table]
    assert shown == pytest.approx([one.separation for one in found.layers], rel=0.01)
    best = max(range(invented.LAYERS), key=lambda n: found.layers[n].separation)
    marked = [int(number) for number, _, rest in table if rest.startswith('<span class="tag">')]
    assert f"most separated: layer {best} ·" in page
    assert marked == [best] and page.count('<span class="tag">most</span>') == 2
    # lines of three figures, and a picture of every layer that leads to a large one
    assert page.count('class="plot lines"') == 3
    assert page.count('class="plot points"') == invented.LAYERS
    for layer in range(invented.LAYERS):
        address = f"/api/v1{path}/{layer}.svg"
        assert page.count(f'href="{address}"') == 1
        assert client.get(address).headers["content-type"] == "image/svg+xml"
    for source in ("Arditi et al. 2024", "Rousseeuw 1987", "Green &amp; Swets 1966"):
        assert source in page


def test_analysis_of_others_and_before_there_is_one(
    client: TestClient, sign_in: Callable[[User], TestClient], make_user: Callable[..., User],
    sessions: Sessions, web_settings: Settings, person: User, sets: tuple[str, str],
) -> None:  # fmt: skip
    with sessions.begin() as session:
        hidden = seed.submit_job(session, web_settings, person, name="Hidden", private=True)
    assert "not known yet" in good(client.get(f"/jobs/{hidden}/geometry"))
    assert "/geometry" not in good(client.get(f"/jobs/{hidden}"))
    other = sign_in(make_user("eve@example.org"))
    assert "Hidden" not in good(other.get(f"/jobs/{hidden}/geometry"), 404)
