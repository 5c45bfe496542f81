"""Numbers and hostile text as a person reads them; sorting; forms."""

from __future__ import annotations

import datetime as dt
import hashlib
import os
import subprocess
import uuid
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from starlette.datastructures import FormData

from jobs.spec.candidate import Ablation, Ara, Recipe, Router, constant
from jobs.spec.job import JobSpec
from jobs.spec.protocol import AnatomyReport, WriterReport
from jobs.spec.scores import Outcome, Value, wilson
from jobs.tables import ArtifactFile, Trial
from web import forms
from web.routes.submit import budget_words, defaults
from web.session import local_target
from web.views import artifacts, edits, formats, logs, preflight, scores, trials


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "–"), (-1, "–"), (float("nan"), "–"), (0, "0.0 s"), (0.42, "0.4 s"), (12.4, "12 s"),
        (59.6, "1 min 00 s"), (200, "3 min 20 s"), (1200, "20 min"), (3900, "1 h 05 min"),
        (187200, "2 d 4 h"),
    ],
)  # fmt: skip
def test_duration(seconds: float | None, text: str) -> None:
    assert formats.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "–"), (0, "0 B"), (999, "999 B"), (1000, "1 kB"), (12_345_678, "12.3 MB"),
     (999_600_000, "1 GB"), (140_000_000_000, "140 GB"), (3.2e12, "3.2 TB")],
)  # fmt: skip
def test_size(count: float | None, text: str) -> None:
    assert formats.size(count) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0, "0"), (-1e-9, "0"), (2.1e-4, "2.1×10⁻⁴"), (0.01234, "0.0123"),
     (1.5, "1.5"), (12.34, "12.3"), (float("inf"), "∞"), (float("nan"), "–")],
)  # fmt: skip
def test_divergence(value: float | None, text: str) -> None:
    assert formats.divergence(value) == text


def test_intervals_are_wilsons() -> None:
    found = scores.score({"refusals": 3, "total": 100})
    assert found is not None and found.interval == "1.0–8.5 %"
    assert (found.low, found.high) == wilson(3, 100)
    assert scores.score(None) is None and scores.score({"refusals": None, "total": 3}) is None


def test_ago_and_clock() -> None:
    now = dt.datetime(2026, 1, 31, 12, tzinfo=dt.timezone.utc)
    assert formats.ago(now - dt.timedelta(seconds=200), now) == "3 min ago"
    assert formats.ago(now, now) == "just now" and formats.ago(None, now) == "never"
    east = dt.timezone(dt.timedelta(hours=5))
    assert formats.clock(dt.datetime(2026, 1, 31, 3, tzinfo=east)) == "2026-01-30 22:00"


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("plain text", "plain text"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07after", "after"),
        ("\x1b]8;;https://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("a\x00b", "a⟨U+0000⟩b"),
        ("pay \u202e001", "pay ⟨U+202E⟩001"),
        ("zero\u200bwidth", "zero⟨U+200B⟩width"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("naïve 日本語 👩\u200d💻", "naïve 日本語 👩\u200d💻"),
    ],
)
def test_hidden_characters_are_shown(raw: str, text: str) -> None:
    assert formats.shown(raw) == text


def test_log_tail(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"x" * 50_000 + b"\nlast but one \xff\n\x1b[1mlast\x1b[0m\n10%\r50%\r100%\n")
    assert logs.tail(path) == ["last but one \ufffd", "last", "100%"]
    assert logs.tail(None) == [] and logs.tail(tmp_path / "none") == []
    ids = [uuid.uuid4(), uuid.uuid4()]
    (tmp_path / f"{ids[1]}.log").write_text("here")
    assert logs.newest(tmp_path, ids) == tmp_path / f"{ids[1]}.log"
    assert logs.newest(tmp_path, ids[:1]) is None


def _line(number: int, refusals: int | None, kl: float | None) -> trials.Line:
    row = Trial(number=number, state="complete", origin="sampler", picked=False,
                refusals=refusals, total=100, kl_first=kl)  # fmt: skip
    return trials.line(uuid.uuid4(), row, frozenset())


def _prepared(*writers: WriterReport) -> dict[str, Any]:
    whole = sum(writer.parameters for writer in writers)
    coverage = sum(writer.parameters for writer in writers if writer.covered) / whole
    report = AnatomyReport(
        architecture="MixtralForCausalLM", layers=2, hidden=8, writers=list(writers),
        coverage=coverage,
    )  # fmt: skip
    return {"anatomy": report.model_dump(mode="json")}


def test_preflight_counts_stacks_and_names_what_is_missed() -> None:
    prepared = _prepared(
        WriterReport(name="l.0.o_proj", layer=0, component="attention", shape=(8, 10)),
        WriterReport(name="l.0.experts.down", layer=0, component="mlp", shape=(4, 8, 5)),
        WriterReport(
            name="l.1.experts.down", layer=1, component="mlp", shape=(4, 8, 5), covered=False,
            reason="a layout that is not known",
        ),
    )  # fmt: skip
    attention, mlp = preflight.parts(prepared)
    assert (attention.writers, attention.stacks, attention.share) == (1, 0, 80 / 400)
    assert (mlp.writers, mlp.stacks, mlp.share, mlp.covered) == (2, 2, 320 / 400, 0.5)
    [all_of_them] = preflight.missed(prepared, ["mpoa"])
    assert all_of_them.covered == 240 / 400
    assert [(gap.name, gap.shape) for gap in all_of_them.gaps] == [
        ("l.1.experts.down", "4 × 8 × 5")
    ]
    _, ara = preflight.missed(prepared, ["mpoa", "ara"])
    assert ara.title == "Not reached by ARA" and ara.covered == 80 / 400
    assert [gap.name for gap in ara.gaps] == ["l.0.experts.down"]
    assert preflight.missed(None, ["ara"]) == [] and preflight.parts(None) == []


def test_a_candidate_in_words() -> None:
    edit = Ablation(
        mode="none", recipe=Recipe(subspace="svd", count=3, winsorize=0.995), affine=True,
        attention=constant(), mlp=constant(0.0), router=Router(experts=3, bias=0.25),
    )  # fmt: skip
    said = {fact.name: fact.value for fact in edits.parameter_facts(edit)}
    assert said["Routers"] == "− 0.25"
    plain = edit.model_copy(update={"router": None})
    assert "Routers" not in {fact.name for fact in edits.parameter_facts(plain)}
    assert said["Directions"] == "at most 3" and said["Winsorised"].startswith(
        "at the quantile 0.995"
    )
    assert said["Affine"] == "yes" and said["MLP λ"] == "0"
    ara = Ara(start=2, end=8, preserve=0.5, steer=0.01, overshoot=1.0, neighbours=5, rank=16)
    said = {fact.name: fact.value for fact in edits.parameter_facts(ara)}
    assert said["Layers"] == "2 to 7" and said["Rank"] == "cut to 16"
    assert not [name for name in said if "λ" in name]


def test_further_scores_in_words() -> None:
    found = scores.further("over_refusal", Value(value=0.085, low=0.01, high=0.2, n=47))
    assert (found.title, found.value) == ("Refusals of look-alikes", "8.5 %")
    assert found.note == "1.0 % to 20.0 %; of 47"
    odds = scores.further("log_odds", Value(value=-3.25), Value(value=4.0))
    assert (odds.value, odds.note) == ("-3.25 nats", "original 4")
    task = scores.further("harness.gsm8k.exact_match", Value(value=0.5))
    assert task.title == "gsm8k, exact_match"


@pytest.mark.parametrize(
    ("methods", "trials", "words"),
    [
        (["mpoa"], "200", "200 trials."),
        (["deccp"], "200", "1 trial."),
        (["mpoa", "ara", "deccp"], "200", "200 trials: MPOA, rows 100, ARA 99, Single pass 1."),
        (["mpoa", "ara", "deccp"], "1", "3 trials: MPOA, rows 1, ARA 1, Single pass 1."),
        ([], "200", ""),
        (["mpoa"], "٣", ""),
    ],
)
def test_the_budget_in_words(methods: list[str], trials: str, words: str) -> None:
    assert budget_words(defaults() | {"methods": methods, "trials": trials}) == words


def test_sorting_leaves_what_has_no_value_last() -> None:
    lines = [_line(0, None, None), _line(1, 5, 0.1), _line(2, 5, 0.01), _line(3, 90, 0.001)]
    assert [i.number for i in trials.ordered(lines, "refusals", "asc")] == [2, 1, 3, 0]
    assert [i.number for i in trials.ordered(lines, "refusals", "desc")] == [3, 1, 2, 0]
    assert [i.number for i in trials.ordered(lines, "kl", "asc")] == [3, 2, 1, 0]
    assert [i.number for i in trials.ordered(lines, "nonsense", "asc")] == [2, 1, 3, 0]


def test_answers_put_refusals_first_and_are_paged() -> None:
    said = [Outcome(refused=place in (3, 8), text=str(place)) for place in range(10)]
    original = [Outcome(refused=True)] * 9
    found = trials.answers(
        "search", ["p"] * 10, original, said, only_refused=False, page=1, length=4
    )
    assert [item.place for item in found.items] == [3, 8, 0, 1]
    assert (found.total, found.refused, found.pages) == (10, 2, 3)
    assert [item.change for item in found.items] == ["still refused"] * 2 + ["now answered"] * 2
    only = trials.answers("search", [], original, said, only_refused=True, page=99, length=4)
    assert [item.place for item in only.items] == [3, 8] and only.page == 1


def test_defaults_of_the_form_are_those_of_the_specification() -> None:
    values = defaults() | {"model": "owner/name"}
    assert JobSpec.model_validate(forms.specification(values)) == JobSpec.model_validate(
        {"model": "owner/name"}
    )


@pytest.mark.parametrize(
    ("changed", "field", "says"),
    [
        ({"trials": "0"}, "trials", "At least 1."),
        ({"trials": "1000000000"}, "trials", "At most 10000."),
        ({"trials": "many"}, "trials", "Write a whole number"),
        ({"trials": "9" * 6000}, "trials", "That number is too large"),
        ({"model": "../etc/passwd"}, "model", "paths and addresses are not accepted"),
        ({"model": "https://hub/x"}, "model", "paths and addresses are not accepted"),
        ({"model": ""}, "model", "owner/name"),
        ({"dtype": "int3"}, "dtype", "Choose one of"),
        ({"startup_trials": "300"}, "startup_trials", "Must not exceed trials."),
        ({"prompts.search": "1"}, "prompts.search", "At least 4."),
        ({"prompts.harmful": "NO SUCH"}, "prompts.harmful", "lower-case letters"),
        ({"methods": []}, "methods", "Choose at least 1."),
        ({"methods": ["weird"]}, "methods", "Choose one of"),
        ({"objectives": []}, "objectives", "Choose at least 2."),
        ({"objectives": ["refusals"]}, "objectives", "Choose at least 2."),
        ({"objectives": ["refusals", "judge"]}, "objectives", "choose among refusals, log_odds"),
        ({"scorers": ["harness"]}, "tasks", "The scorer harness needs at least one task."),
        ({"device_map": "x"}, "device_map", "Choose one of"),
    ],
)
def test_faults_name_the_field_and_the_mend(
    changed: dict[str, object], field: str, says: str
) -> None:
    values = defaults() | {"model": "owner/name"} | changed
    with pytest.raises(ValidationError) as caught:
        JobSpec.model_validate(forms.specification(values))
    found = forms.faults(caught.value)
    assert list(found) == [field] and says in found[field]


def test_fields_that_are_not_texts_count_as_empty() -> None:
    assert forms.text_of(FormData([("a", "b")]), "a") == "b"
    assert forms.text_of(FormData([]), "a") == ""


@pytest.mark.parametrize(
    ("wanted", "target"),
    [
        ("/jobs/1?x=y", "/jobs/1?x=y"), (None, "/"), ("", "/"), ("https://evil.example", "/"),
        ("//evil.example", "/"), ("/\\evil.example", "/"), ("javascript:alert(1)", "/"),
        ("/signin", "/"), ("/a\r\nSet-Cookie: x", "/"),
    ],
)  # fmt: skip
def test_no_open_redirects(wanted: str | None, target: str) -> None:
    assert local_target(wanted) == target


def test_download_loop_fetches_what_is_missing_and_quotes_names(tmp_path: Path) -> None:
    name = "a b'$(touch ran).txt"
    files = [
        ArtifactFile(name=each, size=1, sha256=hashlib.sha256(b"x").hexdigest())
        for each in ("whole.bin", name)
    ]
    folder = tmp_path / "nullspace-12345678"
    folder.mkdir()
    (folder / "whole.bin").write_bytes(b"x")
    # a stand-in for curl, which has nothing to say about a file that is whole but 416
    curl = tmp_path / "curl"
    curl.write_text('#!/bin/sh\ntest "$7" = whole.bin && kill $PPID\nprintf x > "$7"\n')
    curl.chmod(0o755)
    text = artifacts.download("https://n.example", "1234567890", files)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", text], cwd=tmp_path, env=env, check=True, timeout=20)
    assert {path.name for path in folder.iterdir()} == {"whole.bin", name}
