"""What every page must be: checks that the page tests share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html.parser import HTMLParser
from typing import Protocol

VOID = {"meta", "link", "input", "br", "img", "hr", "option"}


class Response(Protocol):
    """What the tests look at of an answer, whichever client library made it."""

    @property
    def status_code(self) -> int: ...

    @property
    def text(self) -> str: ...

    @property
    def headers(self) -> Mapping[str, str]: ...


class Audit(HTMLParser):
    """What every page must have and must not have."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.faults: list[str] = []
        self.labelled: set[str] = set()
        self.fields: list[dict[str, str | None]] = []
        self.tags: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if found.get("id"):
            self.ids.append(str(found["id"]))
        if tag == "label":
            self.labelled.add(str(found.get("for")))
        if tag in ("input", "select", "textarea") and found.get("type") != "hidden":
            self.fields.append(found)
        if "style" in found or any(name.startswith("on") for name in found):
            self.faults.append(f"inline style or script on {tag}")
        if tag == "style" or (tag == "script" and not found.get("src")):
            self.faults.append(f"inline {tag}")
        for name in ("src", "href", "action"):
            if re.match(r"(https?:|//|javascript:|data:)", found.get(name) or ""):
                self.faults.append(f"{tag} leads away: {found[name]}")

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"unbalanced </{tag}>")


def good(response: Response, status: int = 200) -> str:
    """The page's text, after checking its status, its headers and its markup."""
    assert response.status_code == status, response.text[:2000]
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'self'" in response.headers["content-security-policy"]
    assert "unsafe-inline" not in response.headers["content-security-policy"]
    audit = Audit()
    audit.feed(re.sub(r"<(path|circle|rect|line)\b([^>]*)/>", r"<\1\2></\1>", response.text))
    assert not audit.faults and not audit.open, (audit.faults, audit.open)
    assert len(audit.ids) == len(set(audit.ids)), "an id is used twice"
    assert audit.tags.count("h1") == 1 and audit.tags.count("main") == 1
    for field in audit.fields:
        assert field.get("id") in audit.labelled or field.get("aria-label"), field
    return response.text


def location(response: Response) -> str:
    assert response.status_code == 303, response.text[:2000]
    return response.headers["location"]
