"""docker-compose.yml as data: interpolated by the rules of the Compose Specification."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docker-compose.yml"
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Missing(ValueError):
    """A variable that ${NAME:?message} requires."""


def interpolate(text: str, env: Mapping[str, str]) -> str:
    """$NAME, ${NAME}, :- - :? ? :+ + with nesting, and $$ for a dollar sign."""
    out, at = [], 0
    while at < len(text):
        if text[at] != "$":
            out.append(text[at])
            at += 1
        elif text[at + 1 : at + 2] == "$":
            out.append("$")
            at += 2
        elif text[at + 1 : at + 2] == "{":
            end = _closing(text, at + 2)
            out.append(_braced(text[at + 2 : end], env))
            at = end + 1
        else:
            found = NAME.match(text, at + 1)
            if found is None:
                raise ValueError(f"invalid interpolation in {text!r}")
            out.append(env.get(found[0], ""))
            at = found.end()
    return "".join(out)


def _closing(text: str, at: int) -> int:
    depth = 1
    while at < len(text):
        if text.startswith("${", at):
            depth += 1
            at += 1
        elif text[at] == "}":
            depth -= 1
            if depth == 0:
                return at
        at += 1
    raise ValueError(f"unclosed brace in {text!r}")


def _braced(inside: str, env: Mapping[str, str]) -> str:
    found = NAME.match(inside)
    if found is None:
        raise ValueError(f"invalid interpolation ${{{inside}}}")
    name, rest = found[0], inside[found.end() :]
    value = env.get(name)
    if not rest:
        return value or ""
    operator = rest[:2] if rest[:1] == ":" else rest[:1]
    word = rest[len(operator) :]
    there = value is not None and (value != "" or not operator.startswith(":"))
    if operator in (":-", "-"):
        return value if there and value is not None else interpolate(word, env)
    if operator in (":?", "?"):
        if there and value is not None:
            return value
        raise Missing(f"{name}: {word}")
    if operator in (":+", "+"):
        return interpolate(word, env) if there else ""
    raise ValueError(f"invalid interpolation ${{{inside}}}")


def load(env: Mapping[str, str]) -> dict[str, Any]:
    """The file with every value interpolated."""

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return interpolate(value, env)
        if isinstance(value, dict):
            return {key: walk(each) for key, each in value.items()}
        if isinstance(value, list):
            return [walk(each) for each in value]
        return value

    found = walk(yaml.safe_load(FILE.read_text()))
    assert isinstance(found, dict)
    return found


def command_of(text: str, word: str) -> list[str]:
    """The last CMD, or HEALTHCHECK's CMD, of a Dockerfile; its exec form as a list."""
    import json

    joined = re.sub(r"\\\n", " ", text)
    lines = [line.strip() for line in joined.splitlines()]
    found = [line for line in lines if line.startswith(f"{word} ")]
    array = found[-1][found[-1].index("[") :]
    parsed = json.loads(array)
    assert isinstance(parsed, list)
    return parsed
