"""Pydantic's validation errors in words: which field, what is wrong, what to send instead."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any, get_args

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel

# error type -> mend; the placeholders are pydantic's `ctx`
MENDS = {
    "missing": "Add it.",
    "greater_than_equal": "Send {ge} or more.",
    "greater_than": "Send more than {gt}.",
    "less_than_equal": "Send {le} or less.",
    "less_than": "Send less than {lt}.",
    "int_parsing": "Send a whole number.",
    "int_type": "Send a whole number.",
    "int_from_float": "Send a whole number.",
    "int_parsing_size": "Send a smaller number.",
    "float_parsing": "Send a number.",
    "float_type": "Send a number.",
    "bool_parsing": "Send true or false.",
    "bool_type": "Send true or false.",
    "string_type": "Send text in quotes.",
    "string_unicode": "Remove unpaired surrogates from the text.",
    "string_too_long": "Shorten it to {max_length} characters.",
    "string_too_short": "Send at least {min_length} characters.",
    "string_pattern_mismatch": "It must match {pattern}.",
    "list_type": "Send a list.",
    "too_long": "Send at most {max_length} entries.",
    "too_short": "Send at least {min_length} entries.",
    "dict_type": "Send a JSON object.",
    "model_type": "Send a JSON object.",
    "model_attributes_type": "Send a JSON object with the header Content-Type: application/json.",
    "literal_error": "Use one of {expected}.",
    "enum": "Use one of {expected}.",
    "uuid_parsing": "Send the id as the service gave it.",
    "json_invalid": "Send valid JSON: {error}.",
}

RULE = re.compile(r"[a-z_.]+: ")


def explain(request: Request, error: RequestValidationError) -> list[dict[str, str]]:
    """One `{field, detail, mend}` per fault, at most 50."""
    return [_one(request, fault) for fault in error.errors()[:50]]


def _one(request: Request, fault: dict[str, Any]) -> dict[str, str]:
    location = tuple(fault["loc"])
    context = fault.get("ctx", {})
    detail = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        detail = "unknown field"
        mend = _nearest(request, location)
    elif fault["type"] == "json_invalid":
        position = location[-1] if location else "?"
        location, detail = ("body",), f"not JSON, at character {position}"
        mend = MENDS["json_invalid"].format(error=context.get("error", "see the JSON grammar"))
    elif fault["type"] == "value_error" and location == ("body",) and RULE.match(detail):
        # a rule about several fields names the one to mend: "startup_trials: must not exceed …"
        name, detail = detail.split(": ", 1)
        location = ("body", name)
        detail, _, mend = detail.partition("; ")  # "...: what is wrong; what to do"
        mend = f"{mend[:1].upper()}{mend[1:]}." if mend else ""
    else:
        mend = MENDS.get(fault["type"], "").format_map(_Blank(context))
    return {"field": _path(location), "detail": detail, "mend": mend}


class _Blank(dict[str, Any]):
    """A context in which an unknown placeholder is the word `its limit`."""

    def __missing__(self, key: str) -> str:
        return "its limit"


def _path(location: Sequence[Any]) -> str:
    """`('body', 'prompts', 'direction')` -> `prompts.direction`; the whole body is `body`."""
    parts = [str(part) for part in location]
    if len(parts) > 1 and parts[0] in ("body", "query", "path", "header", "cookie"):
        parts = parts[1:]
    return ".".join(parts)


def _nearest(request: Request, location: Sequence[Any]) -> str:
    known = _fields_beside(request, location[1:])
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    if close:
        return f"Did you mean `{close[0]}`? Otherwise remove it."
    return "Remove it." + (f" The fields are {', '.join(sorted(known))}." if known else "")


def _fields_beside(request: Request, location: Sequence[Any]) -> list[str]:
    """Names of the fields of the (nested) body model that `location` points into."""
    body = getattr(request.scope.get("route"), "body_field", None)
    kind: Any = getattr(getattr(body, "field_info", None), "annotation", None)
    for part in location[:-1]:
        model = _model(kind)
        field = model.model_fields.get(str(part)) if model is not None else None
        if field is None:
            return []
        kind = field.annotation
    model = _model(kind)
    return [field.alias or name for name, field in model.model_fields.items()] if model else []


def _model(kind: Any) -> type[BaseModel] | None:
    """The model inside `Model`, `Model | None` or `list[Model]`."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind
    return next((found for each in get_args(kind) if (found := _model(each))), None)
