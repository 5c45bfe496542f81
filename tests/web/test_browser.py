"""The pages in a real Chromium: used, looked at, attacked; with and without scripts."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Dialog, Page, Route, expect

from jobs import artifacts, chats, control, events, live, queue, trials
from jobs.database import Sessions
from jobs.settings import Settings
from jobs.spec.candidate import Ablation, constant
from jobs.spec.protocol import Scored
from jobs.spec.scores import Outcome, Scores
from jobs.tables import Task, User
from tests.web import seed
from tests.web.conftest import PASSWORD

WIDTHS = (390, 1440)
Open = Callable[..., Page]


@pytest.fixture
def open_page(chromium: Browser, address: str, person: User) -> Iterator[Open]:
    """A signed-in page; at the end its console must have been silent."""
    contexts: list[BrowserContext] = []
    noise: list[str] = []

    def heard(kind: str, text: str) -> None:
        # Chromium reports the status of a page that is meant to have it.
        if kind in ("error", "warning") and not text.startswith("Failed to load resource"):
            noise.append(f"{kind}: {text}")

    def opened(dialog: Dialog) -> None:
        noise.append("a dialog opened")
        dialog.dismiss()

    def make(width: int = 1440, *, signed_in: bool = True, **options: Any) -> Page:
        context = chromium.new_context(
            viewport={"width": width, "height": 900}, base_url=address, **options
        )
        context.set_default_timeout(15_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: heard(message.type, message.text))
        page.on("pageerror", lambda error: noise.append(f"exception: {error}"))
        page.on("dialog", opened)
        if signed_in:
            page.goto("/signin")
            page.get_by_label("E-mail").fill(person.email)
            page.get_by_label("Password").fill(PASSWORD)
            page.get_by_role("button", name="Sign in", exact=True).click()
            expect(page.get_by_role("heading", name="Jobs")).to_be_visible()
        return page

    yield make
    for context in contexts:
        context.close()
    assert not noise, noise


def fits(page: Page) -> None:
    """Nothing makes the page itself scroll sideways."""
    wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    assert wide <= 0, f"{page.url} is {wide} pixels too wide"


def touchable(page: Page) -> None:
    """Buttons, fields and summaries are at least 40 pixels high."""
    small = page.evaluate(
        """() => [...document.querySelectorAll('button, .button, select, summary,'
            + 'input:not([type=hidden], [type=checkbox], [type=radio])')]
            .filter(e => e.getClientRects().length && e.getBoundingClientRect().height < 40)
            .map(e => e.outerHTML.slice(0, 100))"""
    )
    assert not small, small


def search_task(sessions: Sessions, job_id: uuid.UUID) -> tuple[Task, int]:
    with sessions.begin() as session:
        task = next(t for t in live.tasks(session, job_id) if t.state == "running")
        assert task.lease_token is not None
        return task, task.lease_token


def score_one(sessions: Sessions, job_id: uuid.UUID, refusals: int, kl: float) -> int:
    """What a worker does when a trial is scored."""
    task, token = search_task(sessions, job_id)
    with sessions.begin() as session:
        (slot,) = trials.reserve(session, task, token, 1)
        edit = Ablation(attention=constant(), mlp=constant())
        trials.begin(session, task, token, slot.number, edit, {}, "sampler", slot.number)
        scores = Scores(role="search", refusals=refusals, total=100, kl_first=kl, kl_multi=kl)
        said = [Outcome(refused=False, text="Sure.")] * 100
        trials.complete(session, task, token, slot.number, Scored(scores=scores, outcomes=said))
    return slot.number


@pytest.fixture
def running(
    sessions: Sessions, web_settings: Settings, person: User, sets: tuple[str, str]
) -> uuid.UUID:
    lasting = web_settings.model_copy(update={"lease_seconds": 600.0})
    return seed.demo_job(sessions, lasting, person, trials_done=4, budget=10, finish=False)


@pytest.mark.parametrize("width", WIDTHS)
def test_from_sign_in_to_a_job(open_page: Open, sets: tuple[str, str], width: int) -> None:
    page = open_page(width)
    page.get_by_role("link", name="New job").click()
    page.wait_for_url("**/jobs/new*")
    fits(page)
    # the browser's own constraints, shown beside the field
    model = page.get_by_label("Model", exact=True)
    model.fill("../etc/passwd")
    page.get_by_role("button", name="Submit").click()
    expect(page.locator("#model-error")).to_contain_text("no paths")
    assert page.url.endswith("/jobs/new")
    # a fault that only the server knows; what was typed stays
    model.fill("nowhere")
    page.get_by_label("Name of the job").fill("My job")
    page.get_by_label("Prompts that the model refuses").select_option("refused-requests")
    page.get_by_label("Prompts that the model answers").select_option("answered-requests")
    page.get_by_role("button", name="Submit").click()
    expect(page.locator("#model-error")).to_contain_text("no model named nowhere")
    expect(page.get_by_label("Name of the job")).to_have_value("My job")
    fits(page)
    model.fill("small")
    page.get_by_role("button", name="Estimate").click()
    expect(page.get_by_role("heading", name="Estimate")).to_be_visible()
    page.get_by_role("button", name="Submit").click()
    expect(page.get_by_role("heading", name="My job")).to_be_visible()
    expect(page.get_by_text("Submitted.")).to_be_visible()
    fits(page)
    touchable(page)


def test_what_the_chosen_methods_make_of_the_budget(open_page: Open, sets: tuple[str, str]) -> None:
    page = open_page()
    page.goto("/jobs/new?demo=1")
    shares = page.locator("#shares")
    expect(shares).to_have_text("60 trials.")
    page.get_by_label("ARA", exact=True).check()
    page.get_by_label("Single pass", exact=True).check()
    page.get_by_label("Trials", exact=True).fill("42")
    words = "42 trials: MPOA, rows 21, ARA 20, Single pass 1."
    expect(shares).to_have_text(words)
    # the server says the same
    page.get_by_label("Prompts that the model refuses").select_option("refused-requests")
    page.get_by_label("Prompts that the model answers").select_option("answered-requests")
    page.get_by_label("Model", exact=True).fill("small")
    page.get_by_role("button", name="Estimate").click()
    expect(page.get_by_role("heading", name="Estimate")).to_be_visible()
    expect(page.locator("#shares")).to_have_text(words)
    for name in ("MPOA, rows", "ARA"):
        page.get_by_label(name, exact=True).uncheck()
    expect(page.locator("#shares")).to_have_text("1 trial.")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_comparison_fits(
    open_page: Open,
    sessions: Sessions,
    web_settings: Settings,
    person: User,
    sets: tuple[str, str],
    width: int,
    scheme: str,
) -> None:
    job_id = seed.demo_job(
        sessions, web_settings, person, trials_done=12, budget=12, scorers=["log_odds"],
        methods=["mpoa", "ara", "svd", "biprojected", "mpoa_columns", "deccp"],
    )  # fmt: skip
    with sessions.begin() as session:
        rows = {row.method: row.number for row in trials.list_trials(session, job_id)}
    page = open_page(width, color_scheme=scheme)
    for path in ("", f"/trials/{rows['ara']}", f"/trials/{rows['svd']}"):
        page.goto(f"/jobs/{job_id}{path}")
        for summary in page.locator("summary").all():
            summary.click()
        fits(page)
        touchable(page)
        low = page.evaluate(CONTRAST)
        assert not low, (path, low)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_fits(
    open_page: Open, sessions: Sessions, done: uuid.UUID, width: int, scheme: str
) -> None:
    page = open_page(width, color_scheme=scheme)
    with sessions.begin() as session:
        artifact = next(a.id for a in artifacts.list_for_job(session, done) if a.kind == "merged")
        number = trials.front(session, done)[0].number
    for path in (
        "/", "/jobs/new", "/jobs/new?demo=1", f"/jobs/{done}", f"/jobs/{done}?show=front",
        f"/jobs/{done}/trials/{number}", f"/jobs/{done}/cancel", f"/artifacts/{artifact}",
        f"/jobs/{done}/geometry",
        "/prompt-sets", "/prompt-sets/refused-requests", "/prompt-sets/refused-requests/delete",
        "/workers", "/tokens", "/account", "/nothing", "/signin", "/signout",
    ):  # fmt: skip
        page.goto(path)
        for summary in page.locator("summary").all():
            summary.click()
        fits(page)
        touchable(page)
        low = page.evaluate(CONTRAST)
        assert not low, (path, low)


# WCAG 2 contrast of every visible text against the first opaque background behind it.
CONTRAST = """() => {
  const rgb = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => {
    const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const f = [r, g, b].map((v) => linear(v / 255));
    return 0.2126 * f[0] + 0.7152 * f[1] + 0.0722 * f[2];
  };
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = rgb(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] === 1) return c;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !e.getClientRects().length) continue;
    if (e.closest('.sr-only, :disabled, .skip, .over') || e.localName === 'option') continue;
    const style = getComputedStyle(e);
    const ink = e.closest('svg') ? style.fill : style.color;
    const [a, b] = [light(rgb(ink)), light(behind(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push(ratio.toFixed(2) + ' ' + e.outerHTML.slice(0, 120));
  }
  return found;
}"""


def test_the_page_follows_the_job(open_page: Open, sessions: Sessions, running: uuid.UUID) -> None:
    page = open_page()
    page.goto(f"/jobs/{running}")
    expect(page.locator("html[data-live=stream]")).to_be_attached()
    page.evaluate("window.same = true")
    page.locator("tbody th a").first.focus()
    number = score_one(sessions, running, refusals=0, kl=1e-5)
    row = page.get_by_role("table").get_by_role("link", name=str(number), exact=True)
    expect(row).to_be_visible()
    expect(page.locator(f".plot-wide .front[data-number='{number}']")).to_be_attached()
    expect(page.get_by_text(f"Best trial {number}").first).to_be_visible()
    expect(page.locator("progress").first).to_have_attribute("value", "5")
    expect(page.locator("#announce")).to_have_text(re.compile("50 % of the trials"))
    assert page.evaluate("window.same"), "the page was loaded again"
    assert page.evaluate("document.activeElement.localName") == "a", "the focus was lost"


def test_what_somebody_types_is_left_alone(
    open_page: Open, sessions: Sessions, running: uuid.UUID
) -> None:
    page = open_page()
    page.goto(f"/jobs/{running}")
    expect(page.locator("html[data-live=stream]")).to_be_attached()
    page.get_by_text("More trials").click()
    page.get_by_label("Trials in all").fill("77")
    page.locator("h1").click()
    score_one(sessions, running, refusals=1, kl=1e-4)
    expect(page.locator("progress").first).to_have_attribute("value", "5")
    expect(page.get_by_label("Trials in all")).to_have_value("77")
    page.get_by_role("button", name="Set").click()
    expect(page.get_by_text("5/77 trials")).to_be_visible()


def test_without_a_stream_the_page_polls(
    open_page: Open, sessions: Sessions, running: uuid.UUID
) -> None:
    page = open_page()

    def refuse(route: Route) -> None:
        route.abort()

    page.route("**/api/v1/**/events*", refuse)
    page.goto(f"/jobs/{running}")
    expect(page.locator("html[data-live=poll]")).to_be_attached()
    score_one(sessions, running, refusals=2, kl=1e-3)
    expect(page.locator("progress").first).to_have_attribute("value", "5")


def test_an_answer_arrives(
    open_page: Open, sessions: Sessions, web_settings: Settings, person: User, done: uuid.UUID
) -> None:
    page = open_page()
    page.goto(f"/jobs/{done}/trials/0#try")
    page.get_by_label("Prompt", exact=True).fill("How do I wax the boot?")
    page.get_by_role("button", name="Ask").click()
    expect(page.get_by_text("waiting for a worker")).to_be_visible()
    with sessions.begin() as session:
        claim = queue.claim(session, seed.worker(session), web_settings)
        assert claim is not None and claim.task.kind == "chat"
        answers = [{"prompt": "How do I wax the boot?", "text": "With <i>beeswax</i>."}]
        payload = {"id": str(claim.task.id), "number": 0, "answers": answers}
        events.append(session, done, "chat", payload)
        queue.release(session, claim.task.id, claim.token, state="done")
    expect(page.get_by_text("With <i>beeswax</i>.")).to_be_visible()
    expect(page.get_by_text("waiting for a worker")).to_have_count(0)


def test_a_point_leads_to_its_trial(open_page: Open, done: uuid.UUID) -> None:
    for width, plot in ((1440, ".plot-wide"), (390, ".plot-small")):
        page = open_page(width)
        page.goto(f"/jobs/{done}")
        point = page.locator(f"{plot} a.picked")
        number = point.get_attribute("data-number")
        point.click()
        expect(page.get_by_role("heading", name=f"Trial {number}", exact=True)).to_be_visible()


def test_by_keyboard(open_page: Open, done: uuid.UUID) -> None:
    page = open_page()
    page.goto(f"/jobs/{done}")
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('.plot a')"):
            break
    assert page.evaluate(
        "document.activeElement.matches('.plot-wide a.front, .plot-wide a.picked')"
    )
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name=re.compile(r"^Trial \d+$"))).to_be_visible()


def test_all_without_scripts(open_page: Open, sets: tuple[str, str], done: uuid.UUID) -> None:
    page = open_page(390, java_script_enabled=False)
    page.goto("/jobs/new")
    page.get_by_label("Model", exact=True).fill("small")
    page.get_by_label("Name of the job").fill("No scripts")
    page.get_by_label("Prompts that the model refuses").select_option("refused-requests")
    page.get_by_label("Prompts that the model answers").select_option("answered-requests")
    page.get_by_role("button", name="Submit").click()
    expect(page.get_by_role("heading", name="No scripts")).to_be_visible()
    # Chromium's emulation does not show <noscript>; that it is there, test_pages sees
    page.get_by_role("button", name="Pause").click()
    expect(page.locator("h1 + .sub .badge")).to_have_text("paused")
    page.get_by_text("More trials").click()
    page.get_by_label("Trials in all").fill("33")
    page.get_by_role("button", name="Set").click()
    expect(page.get_by_text("0/33 trials")).to_be_visible()
    page.get_by_role("link", name="Cancel…").click()
    page.get_by_role("button", name="Cancel the job").click()
    expect(page.locator("h1 + .sub .badge")).to_have_text("cancelled")
    page.goto(f"/jobs/{done}?sort=kl&show=front")
    page.get_by_role("table").get_by_role("link").last.click()
    page.get_by_role("link", name=re.compile("^Held-out")).click()
    expect(page.locator("article").first).to_be_visible()
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_text("You are signed out.")).to_be_visible()


PAYLOADS = [
    "<script>window.pwned=1</script>",
    '"><img src=x onerror="window.pwned=1">',
    "'><svg onload=window.pwned=1>",
    "</textarea><script>window.pwned=1</script>",
    "</title><script>window.pwned=1</script>",
    "</pre></noscript><img src=x onerror=window.pwned=1>",
    "javascript:window.pwned=1//",
    "{{ 7*7 }} {% raw %} ${7*7} #{7*7}",
    "<a href=javascript:window.pwned=1>click</a>",
    "\u202e<b>bidi</b>\u2066 \x1b[31mred\x1b[0m \u200b",
    "--><style>*{display:none}</style><!--",
    "<meta http-equiv=refresh content='0;url=/signin'>",
    "&lt;script&gt;window.pwned=1&lt;/script&gt;",
]


def test_hostile_text_is_only_shown(
    open_page: Open, sessions: Sessions, web_settings: Settings, person: User
) -> None:
    everything = " ".join(PAYLOADS)
    with sessions.begin() as session:
        seed.prompt_sets(session, person, hostile=[*PAYLOADS, *(f"plain {n}" for n in range(9))])
    job_id = seed.demo_job(
        sessions, web_settings, person, trials_done=3, budget=3, hostile=everything,
        name=everything[:120], system_prompt=everything,
    )  # fmt: skip
    with sessions.begin() as session:
        job = control.editable(session, person, job_id)
        job.error = {"reason": everything, "message": everything, "mend": everything}
        number = trials.front(session, job_id)[0].number
        artifact = next(a for a in artifacts.list_for_job(session, job_id) if a.kind == "lora")
        artifact.state, artifact.error = "failed", {"message": everything, "mend": everything}
        answers = [{"prompt": text, "text": text} for text in PAYLOADS]
        events.append(session, job_id, "chat", {"id": "x", "number": number, "answers": answers})
        chats.request(session, person, job, everything, number=number)
        here = seed.worker(session, everything)
        here.host, here.device = everything, {"kind": everything, "name": everything}
    page = open_page()
    page.add_init_script(
        "document.addEventListener('securitypolicyviolation', () => { window.pwned = 2 })"
    )
    for path in (
        "/", "/?q=%3Cscript%3Ewindow.pwned%3D1%3C%2Fscript%3E%22%3E",
        f"/jobs/{job_id}", f"/jobs/{job_id}?sort=%22%3E%3Cscript%3E", f"/jobs/{job_id}/cancel",
        f"/jobs/{job_id}/trials/{number}", f"/jobs/{job_id}/trials/{number}?role=heldout",
        f"/artifacts/{artifact.id}", "/prompt-sets", "/prompt-sets/refused-requests", "/workers",
        "/signin?next=javascript:window.pwned=1", "/%3Cscript%3Ewindow.pwned=1%3C/script%3E",
    ):  # fmt: skip
        page.goto(path)
        fits(page)
        state = page.evaluate(
            """() => ({
                pwned: window.pwned ?? null,
                inside: document.querySelectorAll('main :is(script, style, img, meta,'
                    + '[onerror], [onload], a[href^="javascript:" i])').length,
                shown: document.querySelector('main').getBoundingClientRect().height,
            })"""
        )
        assert state["pwned"] is None and state["inside"] == 0 and state["shown"] > 50, (
            path,
            state,
        )
    # answers given back into fields
    page.goto("/jobs/new")
    page.get_by_text("Advanced").click()
    page.get_by_label("System prompt").fill(everything.replace("\x1b", ""))
    page.get_by_label("Extra refusal markers").fill("\n".join(PAYLOADS).replace("\x1b", ""))
    page.get_by_label("Model", exact=True).fill("nowhere")
    page.get_by_role("button", name="Submit").click()
    expect(page.locator("#model-error")).to_contain_text("no model named nowhere")
    expect(page.get_by_label("System prompt")).to_have_value(everything.replace("\x1b", ""))
    assert page.evaluate("window.pwned ?? null") is None
    page.goto(f"/jobs/{job_id}/trials/{number}")
    body = page.locator("main").inner_text()
    assert PAYLOADS[0] in body and "⟨U+202E⟩" in body and "\u202e" not in body
