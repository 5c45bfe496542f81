"""Form fields as text, and a specification's faults as sentences beside the fields."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any

from fastapi import Depends, Request
from pydantic import ValidationError
from starlette.datastructures import FormData

from jobs.spec.job import UNUSED
from jobs.spec.methods import METHODS

SELECTS = ("kind", "quantization", "dtype", "device", "device_map", "sampler")
GROUPS = ("methods", "objectives", "scorers")  # of check boxes
NUMBERS = (
    "trials", "startup_trials", "max_new_tokens", "kl_tokens", "seed", "priority", "parallelism",
    "prompts.direction", "prompts.search", "prompts.heldout", "task_limit",
)  # fmt: skip
TEXTS = ("name", "model", "original", "revision", "system_prompt", "prompts.harmful",
         "prompts.harmless", "prompts.over_refusal", "prompts.texts", "judge")  # fmt: skip
LINES = ("markers", "tasks")
SWITCHES = ("allow_partial", "screening", "warm_start", "private")


async def _fields(request: Request) -> AsyncIterator[FormData]:
    async with request.form(max_files=1, max_fields=200) as fields:
        yield fields


#: The posted form; parsed on the event loop, so that routes may be plain functions.
Fields = Annotated[FormData, Depends(_fields)]


def text_of(fields: FormData, name: str) -> str:
    """The text of one field, '' where it is missing or a file."""
    value = fields.get(name)
    return value if isinstance(value, str) else ""


def kept(fields: FormData) -> dict[str, Any]:
    """What was typed, by field name, to fill the form again."""
    values: dict[str, Any] = {
        name: text_of(fields, name) for name in (*SELECTS, *NUMBERS, *TEXTS, *LINES)
    }
    values |= {name: text_of(fields, name) == "on" for name in SWITCHES}
    for name in GROUPS:
        values[name] = [value for value in fields.getlist(name) if isinstance(value, str)]
    return values


def specification(values: Mapping[str, Any]) -> dict[str, Any]:
    """The form's values as the input of `JobSpec`: empty fields are left to their defaults."""
    spec: dict[str, Any] = {"prompts": {}}
    for name in (*SELECTS, *NUMBERS, *TEXTS):
        value = values[name]
        if name != "system_prompt":
            value = value.strip()
        if value == "":
            continue
        if name.startswith("prompts."):
            spec["prompts"][name.removeprefix("prompts.")] = value
        else:
            spec[name] = value
    spec.setdefault("model", "")
    known = [METHODS[name] for name in values["methods"] if name in METHODS]
    if known and all(method.kind == "fixed" for method in known):
        # The form hides nothing without scripts: a budget that does not apply must not be a fault.
        spec.pop("trials", None)
        spec.pop("startup_trials", None)
    spec |= {name: values[name] for name in (*SWITCHES, *GROUPS)}
    for name in LINES:
        spec[name] = [line.strip() for line in values[name].splitlines() if line.strip()]
    if spec["tasks"] and "harness" not in spec["scorers"]:
        spec["scorers"] = [*spec["scorers"], "harness"]
    # hidden by a style sheet alone: what the kind has no use for must not be a fault either
    unused = UNUSED.get(spec.get("kind", "abliterate"), ())
    return {name: value for name, value in spec.items() if name not in unused}


def faults(error: ValidationError) -> dict[str, str]:
    """The first fault of each field, in words: {'trials': 'At most 10000.'}."""
    found: dict[str, str] = {}
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"] if not isinstance(part, int))
        message = sentence(item["type"], item.get("ctx", {}), item["msg"])
        if not name and ": " in message:
            # a rule about several fields names the one to mend: "startup_trials: must not …"
            name, message = message.split(": ", 1)
            name, message = name.lower(), message[:1].upper() + message[1:]
        found.setdefault(name, message)
    return found


def sentence(kind: str, context: Mapping[str, Any], message: str) -> str:
    """One of pydantic's faults as a short sentence that says what to write instead."""
    plain = {
        "int_parsing": "Write a whole number, digits only.",
        "int_from_float": "Write a whole number, without a fraction.",
        "int_parsing_size": "That number is too large.",
        "float_parsing": "Write a number.",
        "missing": "Fill this in.",
        "string_too_long": f"At most {context.get('max_length')} characters.",
        "too_short": f"Choose at least {context.get('min_length', 1)}.",
        "too_long": f"At most {context.get('max_length')}.",
        "greater_than_equal": f"At least {context.get('ge')}.",
        "greater_than": f"More than {context.get('gt')}.",
        "less_than_equal": f"At most {context.get('le')}.",
        "less_than": f"Less than {context.get('lt')}.",
        "literal_error": f"Choose one of {context.get('expected')}.",
    }
    if kind in plain:
        return plain[kind]
    message = message.removeprefix("Value error, ")
    return message[:1].upper() + message[1:] + ("" if message.endswith(".") else ".")
