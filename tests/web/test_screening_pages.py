"""Trials that were not decoded, on the pages: no place in the plot, a reason, no button to pick."""

from __future__ import annotations

import re
import uuid

import pytest
from fastapi.testclient import TestClient
from playwright.sync_api import expect

from jobs import screening, trials
from jobs.database import Sessions
from jobs.settings import Settings
from jobs.spec.candidate import single_pass
from jobs.spec.protocol import Scored
from jobs.spec.scores import Outcome, Scores
from jobs.tables import Trial, User
from tests.web import seed
from tests.web.markup import good
from tests.web.test_browser import WIDTHS, Open, fits, open_page, search_task, touchable
from web.views import formats
from web.views.jobs import sentence
from web.views.trials import reason

__all__ = ["open_page"]
TRIALS = 30


@pytest.fixture
def job(
    sessions: Sessions, web_settings: Settings, person: User, sets: tuple[str, str]
) -> uuid.UUID:
    return seed.demo_job(
        sessions, web_settings, person, trials_done=TRIALS, budget=TRIALS, screened=True
    )


def rows_of(sessions: Sessions, job: uuid.UUID) -> list[Trial]:
    with sessions() as session:
        return trials.list_trials(session, job)


def test_the_page_of_a_job(client: TestClient, sessions: Sessions, job: uuid.UUID) -> None:
    rows = rows_of(sessions, job)
    left_out = [row.number for row in rows if row.screened]
    assert 3 <= len(left_out) <= TRIALS - 3
    page = good(client.get(f"/jobs/{job}"))
    for row in rows:  # the wide and the small plot; the table has all
        assert page.count(f'data-number="{row.number}"') == (0 if row.screened else 2)
        assert f'scope="row"><a href="/jobs/{job}/trials/{row.number}"' in page
    assert f"{len(left_out)} of {TRIALS} trials are not drawn: they were not decoded" in page
    cells = re.findall(r"<td>(?:<span[^>]*>not decoded</span>)</td>", page)
    assert len(cells) == len(left_out)
    event = {"number": 4, "state": "complete", "refusals": 0, "kl_first": 0.25, "screened": True}
    assert sentence("trial", event) == "trial 4: not decoded, KL 0.25"
    # no trial has a KL over several tokens, so the table has no column for it
    table = page[page.index('data-scroll="trials"') :]
    assert "several tokens" not in table[: table.index("</table>")] and "None" not in table
    # by refusals they come last, by KL in their place
    listed = [
        [int(n) for n in re.findall(rf'"row"><a href="/jobs/{job}/trials/(\d+)"', text)]
        for text in (page, good(client.get(f"/jobs/{job}?sort=kl")))
    ]
    assert listed[0][-len(left_out) :] == left_out
    assert listed[1] == [row.number for row in sorted(rows, key=lambda r: (r.kl_first, r.number))]


def without_answers(sessions: Sessions, job: uuid.UUID) -> int:
    """A trial of a running job that is dominated before its first answer."""
    task, token = search_task(sessions, job)
    scores = Scores(role="search", refusals=0, total=0, kl_first=2.5)
    said = [Outcome(refused=False, answered=False)] * 100
    with sessions.begin() as session:
        (slot,) = trials.reserve(session, task, token, 1)
        trials.begin(session, task, token, slot.number, single_pass(8), {}, "sampler", None)
        scored = Scored(scores=scores, outcomes=said, screened=True)
        trials.complete(session, task, token, slot.number, scored)
    return slot.number


def test_the_page_of_a_trial(
    client: TestClient,
    sessions: Sessions,
    web_settings: Settings,
    person: User,
    sets: tuple[str, str],
) -> None:
    lasting = web_settings.model_copy(update={"lease_seconds": 600.0})
    job = seed.demo_job(
        sessions, lasting, person, trials_done=12, budget=13, finish=False, screened=True
    )
    number = without_answers(sessions, job)
    rows = rows_of(sessions, job)
    partly = next(row for row in rows if row.screened and row.total)
    for row in (partly, rows[number]):
        with sessions() as session:
            better = screening.dominator(session, row, ["refusals", "kl_first"])
        assert better is not None
        page = good(client.get(f"/jobs/{job}/trials/{row.number}"))
        assert f'<a href="/jobs/{job}/trials/{better.number}">Open trial' in page
        assert f"trial {better.number} has a lower KL and " in page
        assert formats.divergence(row.kl_first) in page and "None" not in page
        assert "/pick" not in page and "not measured yet" not in page
        assert f"/jobs/{job}/trials/{row.number}/artifacts" in page, "its files can be had"
        assert f"/jobs/{job}/trials/{row.number}/chat" in page
        assert page.count('<article class="answer">') == min(20, row.total or 0)
        page = good(client.post(f"/jobs/{job}/trials/{row.number}/pick"), 409)
        assert "was not decoded" in page
    whole = next(row for row in rows if not row.screened and not row.picked)
    page = good(client.get(f"/jobs/{job}/trials/{whole.number}"))
    assert "/pick" in page and "decoded" not in page


@pytest.mark.parametrize(
    ("mine", "better", "said"),
    [
        ((0, 0, 0.2), (0, 0.1),
         "Not decoded: trial 7 has a lower KL and no refusals."),
        ((0, 0, 0.2), (0, 0.2),
         "Not decoded: trial 7 has no higher KL and no refusals."),
        ((3, 16, 0.2), (1, 0.1),
         "Not decoded to the end: trial 7 has a lower KL and 1 refusal; "
         "3 of this one's first 16 answers were refusals."),
    ],
)  # fmt: skip
def test_the_reason(mine: tuple[int, int, float], better: tuple[int, float], said: str) -> None:
    row = Trial(number=9, screened=True, refusals=mine[0], total=mine[1], kl_first=mine[2])
    other = Trial(number=7, screened=False, refusals=better[0], total=100, kl_first=better[1])
    assert reason(row, other, ["refusals", "kl_first"]) == said
    assert reason(other, None, ["refusals", "kl_first"]) == ""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_and_is_said_in_words(
    open_page: Open, sessions: Sessions, job: uuid.UUID, width: int, scheme: str
) -> None:
    left_out = [row for row in rows_of(sessions, job) if row.screened]
    page = open_page(width, color_scheme=scheme)
    page.goto(f"/jobs/{job}")
    note = page.get_by_text(f"{len(left_out)} of {TRIALS} trials are not drawn")
    expect(note).to_be_visible()
    # between figure and note nothing overlaps: the note lies below the legend
    legend = page.locator("figcaption.legend").bounding_box()
    box = note.bounding_box()
    assert legend is not None and box is not None
    assert box["y"] >= legend["y"] + legend["height"]
    fits(page)
    page.get_by_role("row").filter(has_text="not decoded").first.get_by_role("link").click()
    expect(
        page.get_by_text(re.compile(r"^Not decoded.*: trial \d+ has a lower KL"))
    ).to_be_visible()
    expect(page.get_by_role("button", name="Pick this trial")).to_have_count(0)
    fits(page)
    touchable(page)
    page.get_by_role("link", name=re.compile("^Open trial")).click()
    expect(page.get_by_role("heading", level=1)).to_have_text(re.compile(r"Trial \d+"))
    assert page.get_by_text("Not decoded").count() == 0
