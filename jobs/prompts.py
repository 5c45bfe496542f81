"""Prompt sets: reading uploads, keeping them, and dividing them among the roles of a job."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from demo import PROMPTS
from jobs import audit
from jobs.problems import Conflict, Forbidden, Invalid, NotFound
from jobs.spec.job import SET_NAME, Prompts
from jobs.spec.protocol import PromptTexts
from jobs.tables import PromptSet, User

Line = dict[str, str | None]
SETS = ("harmful", "harmless", "over_refusal", "texts")
SPLITS = ("direction", "search", "heldout")
MIN_PROMPTS, MAX_PROMPTS, MAX_CHARACTERS = 8, 20_000, 20_000
LEAST = {"search": 4, "heldout": 4, "direction": 8}
BUILTIN = {
    "demo-refused": ("refused", "What the demo model refuses, split"),
    "demo-answered": ("answered", "What the demo model answers, split"),
    "demo-over-refusal": ("over_refusal", "Harmless requests that look refusable"),
}


def parse(data: bytes, filename: str) -> list[Line]:
    """The prompts of an uploaded file: [{"prompt": str, "split": str | None}, ...].

    .txt    one prompt a line; empty lines are skipped
    .jsonl  one object a line with "prompt" (or "text") and optionally "split"; strings too
    .json   a list of the same
    .csv    a header row with a column "prompt" (or "text") and optionally "split"
    Invalid(field="file") says what is wrong and where.
    """
    if not data.strip():
        raise _bad("The file is empty. Put one prompt on each line.")
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _bad(
            f"The file is not UTF-8 text: byte {error.start} cannot be read. "
            "Save it as UTF-8 and upload it again."
        ) from None
    if "\x00" in content:
        raise _bad(f"The file holds a NUL character at position {content.index(chr(0))}.")
    ending = filename.rsplit(".", 1)[-1].lower() if "." in filename else "txt"
    readers = {"txt": _plain, "jsonl": _json_lines, "json": _json, "csv": _table}
    if ending not in readers:
        raise _bad(f"Files ending in .{ending} are not read; use .txt, .jsonl, .json or .csv.")
    lines = readers[ending](content)
    return checked(lines)


def checked(lines: Sequence[Line]) -> list[Line]:
    """The lines, stripped and with known splits. Invalid(field="file") otherwise."""
    kept: list[Line] = []
    for number, line in enumerate(lines, start=1):
        prompt = (line.get("prompt") or "").strip()
        split = line.get("split") or None
        if not prompt:
            continue
        if "\x00" in prompt or any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise _bad(f"Prompt {number} holds a NUL character or half of a surrogate pair.")
        if len(prompt) > MAX_CHARACTERS:
            raise _bad(
                f"Prompt {number} has {len(prompt)} characters; at most {MAX_CHARACTERS} are taken."
            )
        if split is not None and split not in SPLITS:
            raise _bad(f"Prompt {number}: the split {split!r} is none of {', '.join(SPLITS)}.")
        kept.append({"prompt": prompt, "split": split})
    if len(kept) > MAX_PROMPTS:
        raise _bad(f"The file holds {len(kept)} prompts; at most {MAX_PROMPTS} are taken.")
    if len(kept) < MIN_PROMPTS:
        found = "only one prompt" if len(kept) == 1 else f"{len(kept)} prompts"
        raise _bad(f"The file holds {found}; at least {MIN_PROMPTS} are needed, one on each line.")
    return kept


def _bad(detail: str) -> Invalid:
    return Invalid(detail, field="file")


def _plain(content: str) -> list[Line]:
    # not splitlines(): a prompt may hold U+2028 and the like
    return [{"prompt": line, "split": None} for line in content.replace("\r\n", "\n").split("\n")]


def _entry(value: Any, where: str) -> Line:
    if isinstance(value, str):
        return {"prompt": value, "split": None}
    if not isinstance(value, dict):
        raise _bad(f'{where}: an object with "prompt" is expected.')
    prompt, split = value.get("prompt", value.get("text")), value.get("split")
    if not isinstance(prompt, str):
        raise _bad(f'{where}: "prompt" (or "text") is missing or not a string.')
    if split is not None and not isinstance(split, str):
        raise _bad(f'{where}: "split" is not a string.')
    return {"prompt": prompt, "split": split}


def _json_lines(content: str) -> list[Line]:
    lines: list[Line] = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _bad(f"Line {number} is not JSON: {error}.") from None
        lines.append(_entry(value, f"Line {number}"))
    return lines


def _json(content: str) -> list[Line]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _bad(f"The file is not JSON: {error}.") from None
    if not isinstance(value, list):
        raise _bad("The file's JSON is not a list of prompts.")
    return [_entry(item, f"Entry {number}") for number, item in enumerate(value, start=1)]


def _table(content: str) -> list[Line]:
    try:
        rows = csv.DictReader(io.StringIO(content, newline=""), strict=True)
        columns = {(name or "").strip().lower(): name for name in rows.fieldnames or []}
        column = columns.get("prompt", columns.get("text"))
        if column is None:
            raise _bad('The table needs a header row with a column "prompt" (or "text").')
        split = columns.get("split")
        return [
            {"prompt": row.get(column) or "", "split": (row.get(split) if split else None) or None}
            for row in rows
        ]
    except csv.Error as error:
        raise _bad(f"The table cannot be read: {error}.") from None


def create_set(
    session: Session, user: User, name: str, prompts: Sequence[Line], note: str = ""
) -> PromptSet:
    """Keep a named set. Conflict when the name is taken; Invalid for a bad name."""
    if user.role == "viewer":
        raise Forbidden("Viewers cannot upload prompts.")
    if not SET_NAME.fullmatch(name):
        raise Invalid(
            "A prompt set's name has lower-case letters, digits, '.', '_' and '-', at most 64.",
            field="name",
        )
    kept = checked(prompts)
    made = session.scalars(
        insert(PromptSet)
        .values(
            owner_id=user.id,
            name=name,
            note=note.replace("\x00", "")[:2000],
            prompts=kept,
            count=len(kept),
            sha256=_sha256(kept),
        )
        .on_conflict_do_nothing(index_elements=["name"])
        .returning(PromptSet)
    ).one_or_none()
    if made is None:
        raise Conflict(f"There is already a prompt set named {name}.", field="name")
    audit.record(session, user.id, "prompts.create", name, count=len(kept))
    return made


def _sha256(prompts: Sequence[Line]) -> str:
    plain = json.dumps(prompts, ensure_ascii=False, sort_keys=True).encode()
    return hashlib.sha256(plain).hexdigest()


def list_sets(session: Session, user: User) -> list[PromptSet]:
    """Every set (sets are shared), by name, without their prompts being needed."""
    return list(session.scalars(select(PromptSet).order_by(PromptSet.name)))


def get_set(session: Session, name: str) -> PromptSet:
    """One set. NotFound."""
    found = None
    if SET_NAME.fullmatch(name):
        found = session.scalars(select(PromptSet).where(PromptSet.name == name)).one_or_none()
    if found is None:
        raise NotFound(f"There is no prompt set named {name[:64]!r}.")
    return found


def delete_set(session: Session, user: User, name: str) -> None:
    """Remove a set; jobs keep the texts they were submitted with. Owner or admin only."""
    found = get_set(session, name)
    if user.role != "admin" and found.owner_id != user.id:
        raise Forbidden("Only its owner or an administrator may delete a prompt set.")
    session.delete(found)
    audit.record(session, user.id, "prompts.delete", name)
    session.flush()


def builtin(name: str) -> list[Line] | None:
    """The lines of one of the demo's sets from its file; None for any other name."""
    if name not in BUILTIN:
        return None
    file = PROMPTS / f"{BUILTIN[name][0]}.jsonl"
    return parse(file.read_bytes(), file.name) if file.is_file() else None


def ensure_builtin(session: Session) -> None:
    """Put the demo's prompt sets into the table, or bring them up to their files."""
    for name, (_, note) in BUILTIN.items():
        kept = builtin(name)
        if kept is None:
            continue
        values = {"prompts": kept, "count": len(kept), "sha256": _sha256(kept), "note": note}
        statement = insert(PromptSet).values(name=name, **values)
        session.execute(
            statement.on_conflict_do_update(
                index_elements=["name"],
                set_=values,
                # an operator's own set of that name is left alone
                where=PromptSet.owner_id.is_(None) & (PromptSet.sha256 != values["sha256"]),
            )
        )
    session.flush()


def texts(session: Session, prompts: Prompts) -> PromptTexts:
    """The texts of every role of a job; no text has two roles. Raises what `arranged` raises."""
    named = {
        role: _lines(session, name, role)
        for role, name in prompts
        if role in SETS and name is not None
    }
    return arranged(named, prompts)


def arranged(lines: dict[str, list[Line]], prompts: Prompts) -> PromptTexts:
    """The texts of every role from the sets' lines by name of the field in `prompts` (pure).

    Wanted counts that a set cannot fill are shrunk in proportion. Invalid names the field and the
    counts when fewer than 4 search, 4 held-out and 8 direction prompts would be left.
    """
    used: set[str] = set()
    wanted = {
        "search": prompts.search,
        "heldout": prompts.heldout,
        "direction": prompts.direction,
    }
    harmful = divide(lines["harmful"], wanted, used, "harmful")
    harmless = divide(lines["harmless"], wanted, used, "harmless")
    over: list[str] = []
    if "over_refusal" in lines:
        found = (line["prompt"] or "" for line in lines["over_refusal"])
        over = _fresh(found, used)[: prompts.search]
        if not over:
            raise Invalid(
                f"The set {prompts.over_refusal} holds no prompt that the other sets lack.",
                field="prompts.over_refusal",
            )
    return PromptTexts(
        direction_harmful=harmful["direction"],
        direction_harmless=harmless["direction"],
        search_harmful=harmful["search"],
        search_harmless=harmless["search"],
        heldout_harmful=harmful["heldout"],
        heldout_harmless=harmless["heldout"],
        over_refusal=over,
        # texts are only read, so they may be prompts of other roles too
        texts=[line["prompt"] or "" for line in lines.get("texts", [])],
    )


def _lines(session: Session, name: str, role: str) -> list[Line]:
    try:
        return get_set(session, name).prompts
    except NotFound as error:
        raise Invalid(f"{error.detail} Upload it first.", field=f"prompts.{role}") from None


def _fresh(candidates: Iterable[str], used: set[str]) -> list[str]:
    """The candidates not used before, in order and once each; they count as used from now on."""
    kept = []
    for candidate in candidates:
        if candidate not in used:
            used.add(candidate)
            kept.append(candidate)
    return kept


def divide(
    lines: list[Line], wanted: dict[str, int], used: set[str], side: str
) -> dict[str, list[str]]:
    """Prompts by role of one side ("harmful", "harmless") of a job; `used` texts are left out.

    A set that is split anywhere is used as split; any other is cut in order.
    """
    if any(line.get("split") for line in lines):
        # the set's own split; lines without one serve the directions, where more is better
        pools = {
            split: _fresh(
                (
                    line["prompt"] or ""
                    for line in lines
                    if (line.get("split") or "direction") == split
                ),
                used,
            )
            for split in wanted
        }
        parts = {split: pool[: wanted[split]] for split, pool in pools.items()}
    else:
        parts = _cut(_fresh((line["prompt"] or "" for line in lines), used), wanted)
    short = {split: len(part) for split, part in parts.items() if len(part) < LEAST[split]}
    if short:
        found = ", ".join(f"{len(part)} {split}" for split, part in parts.items())
        least = ", ".join(f"{LEAST[split]} {split}" for split in parts)
        raise Invalid(
            f"The {side} set gives {found} prompts; at least {least} are needed, no text twice "
            "and none that the other set holds too.",
            field=f"prompts.{side}",
        )
    return parts


def _cut(pool: list[str], wanted: dict[str, int]) -> dict[str, list[str]]:
    total = sum(wanted.values())
    share = min(1.0, len(pool) / total)
    # never below the least, which a set of 16 prompts can still give
    counts = {split: max(LEAST[split], int(count * share)) for split, count in wanted.items()}
    parts: dict[str, list[str]] = {}
    start = 0
    for split in ("search", "heldout"):
        parts[split] = pool[start : start + counts[split]]
        start += counts[split]
    # the directions get the rest, which is a little more than their share after rounding down
    parts["direction"] = pool[start : start + max(wanted["direction"], LEAST["direction"])]
    return parts
