"""Prompts named on the command line: a set that the server has, or a file here."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from nullspace.client import Client, ClientError, Refused

SET_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
USUAL = ("prompt", "text", "instruction", "goal")
SUFFIXES = (".txt", ".jsonl", ".json", ".csv")


def set_of(client: Client, given: str) -> str:
    """The prompt set that `given` names; a file is uploaded first, the same file only once."""
    file = Path(given)
    if not file.is_file():
        if file.suffix in SUFFIXES or "/" in given:
            raise ClientError(f"{given}: no such file")
        return given
    try:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    except OSError as error:
        raise ClientError(f"{given} cannot be read: {error.strerror}") from error
    stem = re.sub(r"[^a-z0-9._-]+", "-", file.stem.lower()).strip("-._")[:50] or "prompts"
    name = f"{stem}-{digest}"
    try:
        client.upload_prompts(name, file)
    except Refused as error:
        if error.status in (413, 422):
            # a command may name three files: say which one
            named = [{**fault, "field": given} for fault in error.errors]
            raise Refused(error.status, error.title, f"{given}: {error.detail}", named) from error
        if error.status != 409:
            raise
    return name


def import_dataset(
    repository: str, *, config: str | None, split: str, column: str | None, limit: int
) -> list[str]:
    """Texts of one column of a data set on the hub. ClientError with the mend."""
    try:
        import datasets
    except ImportError as error:
        raise ClientError(
            "data sets need one more package: pip install 'nullspace[datasets]'"
        ) from error
    try:
        rows = datasets.load_dataset(repository, config, split=split, streaming=True)
        first = next(iter(rows), None)
    except Exception as error:
        # the library raises dozens of kinds for unknown names, splits and the network
        raise ClientError(f"{repository} could not be loaded: {error}") from error
    if first is None:
        raise ClientError(f"{repository} has no rows in the split {split}")
    texts = [name for name, value in first.items() if isinstance(value, str)]
    chosen = column or next(
        (n for n in ("prompt", "text", "instruction", "goal") if n in texts), None
    )
    if chosen is None and len(texts) == 1:
        chosen = texts[0]
    if chosen not in texts:
        raise ClientError(
            f"choose the column with --column: {', '.join(texts) or 'none holds texts'}"
        )
    found: list[str] = []
    for row in rows:
        if isinstance(row[chosen], str) and row[chosen].strip():
            found.append(row[chosen].strip())
        if len(found) == limit:
            break
    return found
