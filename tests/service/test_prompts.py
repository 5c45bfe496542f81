"""Reading prompt files and dividing sets among roles."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.orm import Session

from demo import PROMPTS
from jobs import prompts
from jobs.database import Sessions
from jobs.problems import Conflict, Forbidden, Invalid, NotFound
from jobs.spec.job import Prompts
from jobs.spec.protocol import PromptTexts
from jobs.tables import User

EIGHT = [f"question {n}" for n in range(8)]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.txt", "\n".join(EIGHT)),
        ("a.txt", "\ufeff" + "\r\n\r\n".join(EIGHT) + "\r\n"),
        ("noending", "\n".join(EIGHT)),
        ("a.jsonl", "\n".join(json.dumps({"prompt": p}) for p in EIGHT)),
        ("a.JSONL", "\n".join(json.dumps({"text": p, "split": None}) for p in EIGHT)),
        ("a.json", json.dumps(EIGHT)),
        ("a.csv", "id,Prompt\n" + "\n".join(f'1,"{p}"' for p in EIGHT)),
        ("a.csv", "text\n" + "\n".join(EIGHT)),
    ],
)
def test_every_format_gives_the_same(name: str, data: str) -> None:
    assert prompts.parse(data.encode(), name) == [{"prompt": p, "split": None} for p in EIGHT]


def test_splits_and_line_breaks_are_kept() -> None:
    lines = [json.dumps({"prompt": f"a\n{n}", "split": "search"}) for n in range(8)]
    assert prompts.parse("\n".join(lines).encode(), "a.jsonl")[3] == {
        "prompt": "a\n3",
        "split": "search",
    }
    table = "prompt,split\n" + "".join(f'"x\n{n}",heldout\n' for n in range(8))
    assert prompts.parse(table.encode(), "a.csv")[7] == {"prompt": "x\n7", "split": "heldout"}


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b" \n\n", "empty"),
        ("a.txt", b"one line", "only one prompt"),
        ("a.txt", b"a\nb\nc", "3 prompts"),
        ("a.txt", b"caf\xe9\n" * 9, "byte 3"),
        ("a.txt", b"a\x00\n" * 9, "NUL character at position 1"),
        ("a.txt", b"ok\n" * 8 + b"x" * 20_001, "Prompt 9 has 20001 characters"),
        ("a.txt", b"x\n" * 20_001, "20001 prompts"),
        ("a.pdf", b"x\n" * 9, ".pdf"),
        ("a.jsonl", b'{"prompt": "a"}\n{', "Line 2 is not JSON"),
        ("a.jsonl", b'{"question": "a"}', "Line 1"),
        ("a.jsonl", b'{"prompt": 3}', "Line 1"),
        ("a.jsonl", b'{"prompt": "a", "split": "train"}\n' * 9, "'train'"),
        ("a.jsonl", b'{"prompt": "\\ud800"}\n' * 9, "surrogate"),
        ("a.jsonl", b'{"prompt": "a\\u0000"}\n' * 9, "NUL"),
        ("a.json", b'{"prompt": "a"}', "not a list"),
        ("a.json", b"[" * 100_000, "not JSON"),
        ("a.csv", b"question\na\n", "header"),
        ("a.csv", b'prompt\n"a"b\n', "cannot be read"),
    ],
)
def test_bad_files_say_what_and_where(name: str, data: bytes, says: str) -> None:
    with pytest.raises(Invalid) as caught:
        prompts.parse(data, name)
    assert caught.value.field == "file"
    assert says in caught.value.detail


@given(st.binary(max_size=200), st.sampled_from(["a.txt", "a.jsonl", "a.json", "a.csv"]))
def test_any_bytes_are_read_or_refused(data: bytes, name: str) -> None:
    try:
        assert len(prompts.parse(data, name)) >= 8
    except Invalid as error:
        assert error.field == "file"


def put(session: Session, owner: User, name: str, lines: list[prompts.Line]) -> None:
    prompts.create_set(session, owner, name, lines)


def unsplit(name: str, count: int) -> list[prompts.Line]:
    return [{"prompt": f"{name} {n}", "split": None} for n in range(count)]


def test_sets_are_kept_shared_and_deleted_by_their_owner(
    sessions: Sessions, member: User, admin: User
) -> None:
    with sessions.begin() as session:
        put(session, member, "mine", unsplit("m", 8))
        with pytest.raises(Conflict):
            put(session, admin, "mine", unsplit("m", 8))
        for name in ("", "Big", "a/b", "a\x00", "x" * 65):
            with pytest.raises(Invalid) as caught:
                put(session, member, name, unsplit("m", 8))
            assert caught.value.field == "name"
            with pytest.raises(NotFound):
                prompts.get_set(session, name)
        assert [found.name for found in prompts.list_sets(session, admin)] == ["mine"]
        put(session, admin, "theirs", unsplit("m", 8))
        with pytest.raises(Forbidden):
            prompts.delete_set(session, member, "theirs")
        prompts.delete_set(session, admin, "mine")
        with pytest.raises(NotFound):
            prompts.get_set(session, "mine")
        with pytest.raises(Forbidden):
            put(session, User(role="viewer", email="v"), "x", unsplit("m", 8))


def texts(sessions: Sessions, **changes: object) -> PromptTexts:
    values = {"harmful": "a", "harmless": "b", "search": 10, "heldout": 10, "direction": 40}
    with sessions.begin() as session:
        return prompts.texts(session, Prompts.model_validate({**values, **changes}))


def test_unsplit_sets_are_cut_in_order(sessions: Sessions, member: User) -> None:
    with sessions.begin() as session:
        put(session, member, "a", unsplit("a", 100))
        put(session, member, "b", unsplit("b", 100))
    found = texts(sessions)
    assert found.search_harmful == [f"a {n}" for n in range(10)]
    assert found.heldout_harmful == [f"a {n}" for n in range(10, 20)]
    assert found.direction_harmful == [f"a {n}" for n in range(20, 60)]
    assert len(found.direction_harmless) == 40 and found.over_refusal == []


@pytest.mark.parametrize(
    ("count", "expected"), [(16, (4, 4, 8)), (30, (5, 5, 20)), (59, (9, 9, 40))]
)
def test_small_sets_shrink_the_counts(
    sessions: Sessions, member: User, count: int, expected: tuple[int, int, int]
) -> None:
    with sessions.begin() as session:
        put(session, member, "a", unsplit("a", count))
        put(session, member, "b", unsplit("b", 100))
    found = texts(sessions)
    sizes = (len(found.search_harmful), len(found.heldout_harmful), len(found.direction_harmful))
    assert sizes == expected


def test_too_small_sets_name_the_field_and_the_counts(sessions: Sessions, member: User) -> None:
    with sessions.begin() as session:
        put(session, member, "a", unsplit("a", 15))
        put(session, member, "b", unsplit("b", 100))
        put(session, member, "same", unsplit("b", 100))
    with pytest.raises(Invalid, match="4 search, 4 heldout, 7 direction") as caught:
        texts(sessions)
    assert caught.value.field == "prompts.harmful"
    with pytest.raises(Invalid) as caught:
        texts(sessions, harmful="b", harmless="same")  # every text is in both
    assert caught.value.field == "prompts.harmless"
    with pytest.raises(Invalid) as caught:
        texts(sessions, harmful="missing")
    assert caught.value.field == "prompts.harmful"


@given(data=st.data())
def test_no_text_has_two_roles(data: st.DataObject) -> None:
    """Random sets with many repeated texts, split, unsplit and mixed."""
    words = st.integers(0, 60).map(str)
    split = st.sampled_from([None, "direction", "search", "heldout"])
    lines = st.lists(st.builds(lambda p, s: {"prompt": p, "split": s}, words, split), max_size=120)
    used: set[str] = set()
    wanted = {"search": 6, "heldout": 5, "direction": 12}
    seen: list[str] = []
    for side in ("harmful", "harmless"):
        try:
            parts = prompts.divide(data.draw(lines), wanted, used, side)
        except Invalid:
            continue
        for name, part in parts.items():
            assert prompts.LEAST[name] <= len(part) <= max(wanted[name], prompts.LEAST[name])
            seen += part
    assert len(seen) == len(set(seen))


def test_builtin_sets_come_from_the_demo(sessions: Sessions, member: User) -> None:
    for _ in range(2):
        with sessions.begin() as session:
            prompts.ensure_builtin(session)
    names = {
        name for name, (stem, _) in prompts.BUILTIN.items() if (PROMPTS / f"{stem}.jsonl").is_file()
    }
    with sessions.begin() as session:
        assert {found.name for found in prompts.list_sets(session, member)} == names
        if len(names) < 3:
            pytest.skip("the demo's prompts are not there")
        found = prompts.texts(session, Prompts(over_refusal="demo-over-refusal"))
    assert len(found.search_harmful) == len(found.heldout_harmless) == 100
    assert len(found.direction_harmful) >= 100 and len(found.over_refusal) >= 20
    everything = [text for role in found.model_dump().values() for text in role]
    assert len(everything) == len(set(everything))
