"""Every page and form through the real application on a real database."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from markupsafe import escape

from jobs import people, queue
from jobs.database import Sessions
from jobs.settings import Settings
from jobs.spec.methods import METHODS
from jobs.tables import Job, User
from tests.conftest import SECRET
from tests.web import seed
from tests.web.conftest import PASSWORD
from tests.web.markup import good, location
from web.session import COOKIE

FORM = {
    "model": "small", "methods": "mpoa", "trials": "12", "quantization": "none",
    "prompts.harmful": "refused-requests", "prompts.harmless": "answered-requests",
    "dtype": "auto", "device": "auto", "device_map": "single",
    "objectives": ["refusals", "kl_first"], "sampler": "tpe", "screening": "on", "warm_start": "on",
    "parallelism": "1", "priority": "0", "seed": "0", "max_new_tokens": "40", "kl_tokens": "8",
    "prompts.direction": "100", "prompts.search": "50", "prompts.heldout": "50",
}  # fmt: skip


# --- signing in -----------------------------------------------------------------------------


def test_password_sign_in_and_out(anonymous: TestClient, person: User) -> None:
    assert location(anonymous.get("/jobs/new?demo=1")) == "/signin?next=/jobs/new%3Fdemo%3D1"
    good(anonymous.get("/signin"))
    form = {"email": person.email, "password": "wrong", "next": "/workers"}
    page = good(anonymous.post("/signin", data=form), 401)
    assert "password is wrong" in page and 'value="ada@example.org"' in page
    answer = anonymous.post("/signin", data=form | {"password": PASSWORD})
    assert location(answer) == "/workers"
    cookie = answer.headers["set-cookie"].lower()
    assert cookie.startswith(f"{COOKIE}=")
    assert "httponly" in cookie and "samesite=lax" in cookie and "secure" not in cookie
    good(anonymous.get("/workers"))
    good(anonymous.get("/signout"))
    kept = anonymous.cookies[COOKIE]
    assert location(anonymous.post("/signout")) == "/signin?out=1"
    anonymous.cookies.set(COOKIE, kept)
    assert location(anonymous.get("/workers")).startswith("/signin")


def test_the_cookie_is_secure_behind_https(
    make_settings: Callable[..., Settings], person: User
) -> None:
    from api.app import create_app
    from web.app import add_pages

    app = create_app(make_settings(public_url="https://n.example"))
    add_pages(app)
    with TestClient(app, follow_redirects=False) as client:
        answer = client.post("/signin", data={"email": person.email, "password": PASSWORD})
    assert "; Secure" in answer.headers["set-cookie"]


def test_token_sign_in(anonymous: TestClient, sessions: Sessions, person: User) -> None:
    with sessions.begin() as session:
        _, token = people.issue_token(session, person, secret=SECRET)
    page = good(anonymous.post("/signin", data={"token": "ns_wrong", "next": "/"}), 401)
    assert "not known here" in page
    answer = anonymous.post("/signin", data={"token": token, "next": "//evil.example"})
    assert location(answer) == "/"
    good(anonymous.get("/"))


def test_guessing_is_slowed_down(anonymous: TestClient, person: User) -> None:
    for _ in range(10):
        assert (
            anonymous.post("/signin", data={"email": person.email, "password": "x"}).status_code
            == 401
        )
    page = good(anonymous.post("/signin", data={"email": person.email, "password": PASSWORD}), 429)
    assert "Too many failed sign-ins" in page


def test_other_sites_cannot_post(client: TestClient) -> None:
    answer = client.post("/signout", headers={"Sec-Fetch-Site": "cross-site"})
    assert "another site" in good(answer, 403)
    good(client.get("/"))


# --- the list -------------------------------------------------------------------------------


def test_empty_list_leads_to_the_first_job(client: TestClient) -> None:
    page = good(client.get("/"))
    assert 'href="/jobs/new?demo=1"' in page and "No worker has called in" in page
    form = good(client.get("/jobs/new?demo=1"))
    assert 'name="model" type="text" value="demo"' in form


def test_list_and_filters(
    client: TestClient,
    sign_in: Callable[[User], TestClient],
    sessions: Sessions,
    web_settings: Settings,
    person: User,
    make_user: Callable[..., User],
    done: uuid.UUID,
) -> None:
    with sessions.begin() as session:
        seed.submit_job(
            session, web_settings, person, name="Waits", model="org-a/model", private=True
        )
    page = good(client.get("/"))
    assert f'href="/jobs/{done}"' in page and "Waits" in page and "next in line" in page
    assert 'max="12" value="12"' in page
    assert "Waits" in good(client.get("/?state=queued"))
    assert str(done) not in good(client.get("/?state=queued"))
    assert "Waits" not in good(client.get("/?q=Demo+model"))
    assert "Waits" in good(client.get("/?q=ORG-A"))
    assert "No job matches" in good(client.get("/?q=%00nothing%25"))
    assert good(client.get("/?state=nonsense&cursor=rubbish")).count("<li>") == 2
    other = sign_in(make_user("eve@example.org"))
    page = good(other.get("/"))
    assert str(done) in page and "Waits" not in page
    assert "No job matches" in good(other.get("/?mine=1"))


def test_list_has_pages(
    client: TestClient, sessions: Sessions, make_settings: Callable[..., Settings],
    web_settings: Settings, person: User, sets: tuple[str, str],
) -> None:  # fmt: skip
    roomy = make_settings(max_running=100, models=web_settings.models)
    for number in range(27):
        with sessions.begin() as session:
            seed.submit_job(session, roomy, person, name=f"Job no {number:02d}")
    first = good(client.get("/?state=queued"))
    assert "Job no 26" in first and "Job no 01" not in first
    older = re.search(r'href="(/\?[^"]*cursor=[^"]*)">Older', first)
    assert older is not None
    second = good(client.get(older[1].replace("&amp;", "&")))
    assert "Job no 01" in second and "Job no 02" not in second and ">Newest<" in second


# --- submitting -----------------------------------------------------------------------------


def test_submit(client: TestClient, sessions: Sessions, sets: tuple[str, str]) -> None:
    form = good(client.get("/jobs/new"))
    key = re.search(r'name="key" value="([^"]+)"', form)
    assert key is not None and 'value="bnb_4bit" selected' in form
    data = FORM | {"name": "Mine", "key": key[1], "action": "submit", "markers": "Nope\n\n Never "}
    target = location(client.post("/jobs/new", data=data))
    assert target.endswith("?done=submitted")
    page = good(client.get(target))
    assert (
        "Submitted. This page follows the job by itself." in page and "No worker is running" in page
    )
    with sessions.begin() as session:
        job = session.get_one(Job, uuid.UUID(target.split("/")[2].split("?")[0]))
        assert job.spec["markers"] == ["Nope", "Never"] and job.trials == 12
        assert queue.claimable_of(session, job.id)
    # the same form twice is one job; changed after Back it is another
    assert location(client.post("/jobs/new", data=data)) == target
    assert location(client.post("/jobs/new", data=data | {"trials": "13"})) != target


@pytest.mark.parametrize(
    ("changed", "field", "says"),
    [
        ({"trials": "0"}, "trials", "At least 1."),
        ({"trials": "1000000000"}, "trials", "At most 10000."),
        ({"model": "../../etc"}, "model", "paths and addresses are not accepted"),
        ({"model": "unknown"}, "model", "There is no model named unknown"),
        ({"prompts.harmful": "no-such-set"}, "prompts-harmful", "Upload it first."),
        ({"prompts.harmless": "refused-requests"}, "prompts-harmless", "no text twice"),
        ({"startup_trials": "99"}, "startup_trials", "Must not exceed trials."),
        ({"scorers": "harness"}, "tasks", "needs at least one task"),
        ({"scorers": "perplexity"}, "prompts-texts", "needs a prompt set with texts"),
        ({"scorers": "judge"}, "judge", "needs the name of one"),
        ({"scorers": "judge", "judge": "nobody"}, "judge", "There is no judge"),
    ],
)
def test_faults_stand_beside_their_field(
    client: TestClient, sets: tuple[str, str], changed: dict[str, str], field: str, says: str
) -> None:
    data = FORM | {"name": "Kept name", "key": "k"} | changed
    page = good(client.post("/jobs/new", data=data), 422)
    beside = re.search(rf'id="{field}-error">([^<]*)<', page)
    assert beside is not None and says in beside[1]
    assert f'href="#{field}"' in page  # the summary leads there
    assert 'value="Kept name"' in page and page.count('aria-invalid="true"') == 1
    assert "No job matches" in good(client.get("/?mine=1&state=queued"))


@pytest.mark.parametrize(
    ("changed", "field", "says"),
    [
        ({"methods": []}, "methods", "Choose at least 1."),
        ({"methods": ["magic"]}, "methods", "Choose one of"),
        ({"objectives": ["refusals"]}, "objectives", "Choose at least 2."),
        ({"objectives": ["refusals", "length"]}, "objectives", "choose among refusals, log_odds"),
    ],
)
def test_faults_of_groups_stand_below_them(
    client: TestClient, sets: tuple[str, str], changed: dict[str, list[str]], field: str, says: str
) -> None:
    page = good(client.post("/jobs/new", data=FORM | {"key": "k"} | changed), 422)
    beside = re.search(rf'id="{field}-error">([^<]*)<', page)
    assert beside is not None and says in beside[1]
    assert f'href="#{field}"' in page and re.search(rf'<fieldset[^>]* id="{field}"', page)


def checked(page: str, group: str) -> list[str]:
    """The values of the ticked boxes of a group."""
    return re.findall(
        rf'type="checkbox" id="{group}-[^"]*" name="{group}" value="(\w+)" checked', page
    )


def test_methods_are_chosen_in_the_form(
    client: TestClient, sessions: Sessions, sets: tuple[str, str]
) -> None:
    fresh = good(client.get("/jobs/new"))
    assert checked(fresh, "methods") == ["mpoa"] and checked(fresh, "scorers") == []
    assert checked(fresh, "objectives") == ["refusals", "kl_first"]
    for name, method in METHODS.items():
        assert f'id="methods-{name}"' in fresh and escape(method.about) in fresh
    chosen = {
        "methods": ["mpoa", "ara", "deccp"],
        "objectives": ["refusals", "kl_first", "log_odds"],
        "scorers": ["length"],
        "allow_partial": "on",
        "device_map": "offload",
    }
    page = good(client.post("/jobs/new", data=FORM | chosen | {"action": "estimate"}))
    assert checked(page, "methods") == chosen["methods"]
    assert checked(page, "scorers") == ["length"]
    assert "12 trials: MPOA, rows 6, ARA 5, Single pass 1." in page
    assert 'value="offload" selected' in page and '<details class="panel" open>' in page
    target = location(client.post("/jobs/new", data=FORM | chosen | {"key": "m"}))
    with sessions.begin() as session:
        spec = session.get_one(Job, uuid.UUID(target.split("/")[2].split("?")[0])).spec
    assert {name: spec[name] for name in ("methods", "scorers", "device_map")} == {
        name: chosen[name] for name in ("methods", "scorers", "device_map")
    }
    assert set(spec["objectives"]) == set(chosen["objectives"]) and spec["allow_partial"] is True
    shown = good(client.get(target))
    assert "MPOA, rows, ARA, Single pass" in shown and "First-token refusal log-odds" in shown
    # a fixed budget is no fault of who left the field as it was
    once = FORM | {"methods": ["deccp"], "trials": "", "startup_trials": "99", "key": "s"}
    assert "No worker is running" in good(client.get(location(client.post("/jobs/new", data=once))))


def test_how_it_searches_is_chosen_in_the_form(
    client: TestClient, sessions: Sessions, sets: tuple[str, str]
) -> None:
    fresh = good(client.get("/jobs/new"))
    assert 'value="tpe" selected' in fresh
    for name in ("screening", "warm_start"):
        assert re.search(rf'id="{name}-on" name="{name}" value="on" checked', fresh), name
    usual = good(client.post("/jobs/new", data=FORM | {"key": "u", "seed": "x"}), 422)
    assert 'value="tpe" selected' in usual
    bare = {name: it for name, it in FORM.items() if name not in ("screening", "warm_start")}
    page = good(client.post("/jobs/new", data=bare | {"sampler": "nsga3", "action": "estimate"}))
    assert 'value="nsga3" selected' in page and '<details class="panel" open>' in page
    assert not re.search(r'name="(screening|warm_start)" value="on" checked', page)
    page = good(client.post("/jobs/new", data=FORM | {"sampler": "dice", "key": "d"}), 422)
    assert "Choose one of" in page and 'href="#sampler"' in page
    for data, expected in (
        (bare | {"sampler": "nsga3", "key": "a"}, ("nsga3", False, False)),
        (FORM | {"key": "b"}, ("tpe", True, True)),
    ):
        target = location(client.post("/jobs/new", data=data))
        with sessions.begin() as session:
            spec = session.get_one(Job, uuid.UUID(target.split("/")[2].split("?")[0])).spec
        assert (spec["sampler"], spec["screening"], spec["warm_start"]) == expected


def test_a_kind_that_searches_nothing_ignores_how(
    client: TestClient, sessions: Sessions, sets: tuple[str, str]
) -> None:
    """The fields are hidden by a style sheet alone."""
    data = FORM | {"kind": "evaluate", "sampler": "cmaes", "screening": "", "key": "e"}
    target = location(client.post("/jobs/new", data=data))
    with sessions.begin() as session:
        spec = session.get_one(Job, uuid.UUID(target.split("/")[2].split("?")[0])).spec
    assert (spec["sampler"], spec["screening"]) == ("tpe", True)


def test_estimate_is_shown_in_the_page(client: TestClient, sets: tuple[str, str]) -> None:
    page = good(client.post("/jobs/new", data=FORM | {"action": "estimate", "name": "Kept"}))
    assert 'id="estimate"' in page and "LlamaForCausalLM, 2 layers of 32" in page
    assert 'value="Kept"' in page
    page = good(client.post("/jobs/new", data=FORM | {"action": "estimate", "model": "nope"}), 422)
    assert 'id="estimate"' not in page and "There is no model named nope" in page


def test_quota_and_viewers(
    client: TestClient, app: FastAPI, sessions: Sessions, sets: tuple[str, str],
    sign_in: Callable[[User], TestClient], make_user: Callable[..., User],
) -> None:  # fmt: skip
    for number in range(app.state.settings.max_running):
        assert location(client.post("/jobs/new", data=FORM | {"key": f"k{number}"}))
    page = good(client.post("/jobs/new", data=FORM | {"key": "more"}), 429)
    assert "You have 8 queued or running jobs" in page
    viewer = sign_in(make_user("viewer@example.org", role="viewer"))
    assert "Your role is viewer" in good(viewer.get("/jobs/new"))
    assert "Viewers cannot submit jobs" in good(viewer.post("/jobs/new", data=FORM), 403)


# --- prompt sets, tokens, account, workers ---------------------------------------------------


def test_prompt_sets(client: TestClient, sets: tuple[str, str]) -> None:
    assert "120 / 100 / 100" in good(client.get("/prompt-sets"))
    page = good(client.get("/prompt-sets/refused-requests?split=heldout&page_number=2"))
    assert "page 2 of 2" in page
    lines = "\n".join(f"prompt number {n}" for n in range(40)).encode()
    data = {"name": "mine", "note": "a note"}
    made = client.post("/prompt-sets", data=data, files={"file": ("mine.txt", lines)})
    assert location(made) == "/prompt-sets/mine"
    assert "prompt number 39" in good(client.get("/prompt-sets/mine"))
    again = client.post("/prompt-sets", data=data, files={"file": ("mine.txt", lines)})
    assert "already a prompt set named mine" in good(again, 409)
    good(client.get("/prompt-sets/mine/delete"))
    assert location(client.post("/prompt-sets/mine/delete")) == "/prompt-sets"
    good(client.get("/prompt-sets/mine"), 404)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "The file is empty"),
        (b"one line only\n", "only one prompt"),
        (b"fine\n" * 9 + b"\xff\xfe", "not UTF-8 text: byte 45"),
        (b"a\n" * 20_001, "at most 20000"),
    ],
)
def test_bad_uploads(client: TestClient, content: bytes, says: str) -> None:
    data = {"name": "bad", "note": "kept note"}
    page = good(client.post("/prompt-sets", data=data, files={"file": ("x.txt", content)}), 422)
    assert says in page and 'value="kept note"' in page


def test_upload_without_a_file_and_too_large(client: TestClient, app: FastAPI) -> None:
    page = good(client.post("/prompt-sets", data={"name": "x"}, files={"file": ("", b"")}), 422)
    assert "Choose a file." in page
    app.state.settings.upload_bytes = 1000
    large = client.post("/prompt-sets", data={"name": "x"}, files={"file": ("x.txt", b"a\n" * 600)})
    assert "The file is larger than" in good(large, 422)


def test_tokens(client: TestClient, sessions: Sessions, person: User) -> None:
    page = good(client.post("/tokens", data={"name": "laptop", "days": "30", "scopes": "read"}))
    token = re.search(r"ns_[\w-]{43}", page)
    assert token is not None
    headers = {"Authorization": f"Bearer {token[0]}", "Accept": "application/json"}
    client.cookies.clear()
    assert client.get("/api/v1/jobs", headers=headers).status_code == 200
    with sessions.begin() as session:
        cookie = people.open_session(session, person, hours=1, secret=SECRET)
    client.cookies.set(COOKIE, cookie)
    page = good(client.get("/tokens"))
    assert token[0] not in page and "laptop" in page and token[0][:10] in page
    assert "1 to 3650 days" in good(client.post("/tokens", data={"days": "0"}), 422)
    assert "does not include admin" in good(client.post("/tokens", data={"scopes": "admin"}), 403)
    revoke = re.search(r'action="(/tokens/[^"]+/revoke)"', page)
    assert revoke is not None
    assert location(client.post(revoke[1])) == "/tokens"
    assert "revoked" in good(client.get("/tokens"))
    good(client.post(f"/tokens/{uuid.uuid4()}/revoke"), 404)


def test_password_change(client: TestClient, person: User) -> None:
    new = "another long password"
    form = {"current": PASSWORD, "password": new, "again": new}
    assert "not your current" in good(
        client.post("/account/password", data=form | {"current": "x"}), 422
    )
    assert "not the same" in good(client.post("/account/password", data=form | {"again": "y"}), 422)
    short = form | {"password": "short", "again": "short"}
    assert "10 to 1000" in good(client.post("/account/password", data=short), 422)
    good(client.get("/account"))
    assert "was changed" in good(client.post("/account/password", data=form))
    good(client.get("/account"))  # this browser stays signed in
    client.cookies.clear()
    assert location(client.post("/signin", data={"email": person.email, "password": new})) == "/"


def test_workers(client: TestClient, sessions: Sessions) -> None:
    assert "No worker has called in today" in good(client.get("/workers"))
    with sessions.begin() as session:
        seed.worker(session)
    page = good(client.get("/workers"))
    assert "NVIDIA H200" in page and "alive" in page


# --- errors ---------------------------------------------------------------------------------


def test_error_pages(client: TestClient, app: FastAPI) -> None:
    assert "There is nothing here" in good(client.get("/no/such/page"), 404)
    assert "There is nothing here" in good(client.get(f"/jobs/{uuid.uuid4()}"), 404)
    good(client.get("/jobs/not-a-uuid"), 422)
    assert client.get("/api/v1/jobs/none").headers["content-type"].startswith("application/problem")

    def broken() -> None:
        raise RuntimeError("a secret detail")

    app.add_api_route("/broken", broken)
    page = good(client.get("/broken"), 500)
    assert "Something broke" in page and "secret detail" not in page


def test_without_a_database(client: TestClient, app: FastAPI) -> None:
    from jobs.database import connect, session_factory

    whole = app.state.sessions
    away = connect("postgresql://nobody@127.0.0.1:1/none")
    app.state.sessions = session_factory(away)
    try:
        answer = client.get("/")
        page = good(answer, 503)
        assert "catching its breath" in page and 'content="15"' in page
        assert int(answer.headers["retry-after"]) > 0
    finally:
        app.state.sessions = whole
        away.dispose()


def test_static_files(client: TestClient) -> None:
    page = client.get("/signin").text
    for path in re.findall(r'(?:href|src)="(/static/[^"]+)"', page):
        got = client.get(path)
        assert got.status_code == 200 and "immutable" in got.headers["cache-control"]
    assert client.get("/static/../app.py").status_code == 404
    assert client.get("/static/%2e%2e/app.py").status_code == 404
