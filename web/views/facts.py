"""A name and a value: what the lists of facts on every page are made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """A name and a value; `note` explains."""

    name: str
    value: str
    note: str = ""
