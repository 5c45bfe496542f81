"""A model's own chat template: which of several, how it wants its input, its thinking switched off.

Templates are programs, so what one wants is found out by rendering: content as text or as a list
of parts, tools absent, empty or there. The first form counts in which the prompt comes out whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
from jinja2.parser import Parser

from engine.errors import EngineError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Variables with which templates switch thinking aloud off, and their value for it.
SWITCHES: dict[str, object] = {
    "enable_thinking": False,  # Qwen3, GLM-4.5, SmolLM3, Gemma 4
    "thinking": False,  # DeepSeek-V3.1, Granite 3.2
    "reasoning": False,  # Command A
    "enable_reasoning": False,
    "thinking_budget": 0,  # Seed-OSS
}
EFFORT = "reasoning_effort"  # gpt-oss, Mistral Small 4; the least that the template names:
EFFORTS = ("none", "no_think", "minimal", "low")
# Words in the system prompt that do the same, for templates that speak of them (Nemotron).
WORDS = ("/no_think", "detailed thinking off")
PROBE = "\u2063probe\u2063"  # a text that no template contains by itself
TODAY = datetime(2024, 7, 26)  # what Llama 3's templates write where nobody tells them the date
NO_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "nothing",
        "description": "Does nothing.",
        "parameters": {"type": "object", "properties": {}},
    },
}
CODES = ("-d", "-m", *"aAbBcdDeFGHIjmMpSTuUVwWxXyYzZ")  # of strftime
RAISED = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)

Turns = list[tuple[str, str]]  # (role, text)


@dataclass(frozen=True)
class Template:
    """A chat template and the form in which it takes its input.

    arguments  variables beside the messages: switches of thinking, tools
    parts      content is a list of {"type": "text"} parts, as vision-language models have it
    word       what the system prompt must say so that the model does not think aloud, or ""
    asks_date  it may write today's date; it is told TODAY, so that results can be repeated
    warnings   what a person should know
    """

    tokenizer: PreTrainedTokenizerBase
    text: str
    arguments: Mapping[str, Any]
    parts: bool = False
    word: str = ""
    asks_date: bool = False
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Template | None:
        """The tokenizer's template; None where it has none.

        Raises unsupported_architecture for one that does not compile or renders no prompt.
        """
        if not tokenizer.chat_template:
            return None
        text, warnings = _chosen(tokenizer.chat_template)
        switches, word, asks_date = _asks(text)
        fault = ""
        for given, tools, parts in _forms(switches):
            arguments = given if tools is None else {**given, "tools": tools}
            found = cls(tokenizer, text, arguments, parts, word, asks_date, warnings)
            try:
                if PROBE in found.render([("user", PROBE)]):
                    if tools:
                        warnings.append(
                            "The chat template demands tools: each prompt is given with one tool "
                            f"that does nothing ({NO_TOOL['function']['name']})."
                        )
                    return found
                fault = fault or "it leaves the user's text out"
            except EngineError as error:
                fault = fault or error.detail
        raise _broken(fault)

    def render(self, turns: Turns, today: datetime = TODAY) -> str:
        """The text after which the model answers.

        Raises unsupported_architecture where the template raises; `detail` holds its words.
        """
        messages = [{"role": role, "content": self._content(content)} for role, content in turns]
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages,
                chat_template=(_calendar(today) if self.asks_date else "") + self.text,
                tokenize=False,
                add_generation_prompt=True,
                **self.arguments,
            )
        except RAISED as error:
            raise _broken(f"{error}" or type(error).__name__) from error
        return str(rendered)

    def takes_system(self) -> bool:
        """Some templates raise on a system turn, others silently leave it out."""
        try:
            return PROBE in self.render([("system", PROBE), ("user", "Hello")])
        except EngineError:
            return False

    def dated(self, turns: Turns) -> bool:
        """Whether the rendered text depends on the date."""
        return self.asks_date and self.render(turns) != self.render(turns, datetime(2001, 2, 3))

    def _content(self, text: str) -> Any:
        return [{"type": "text", "text": text}] if self.parts else text


class _Generation(jinja2.ext.Extension):
    """The tag {% generation %} of transformers; what is inside is all that matters here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        """The statements between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _chosen(templates: str | Mapping[str, str]) -> tuple[str, list[str]]:
    """(template, warnings): of several by name `default`, else one that is not for tools."""
    if isinstance(templates, str):
        return templates, []
    if "default" in templates:
        return templates["default"], []
    name = min(templates, key=lambda known: ("tool" in known, "rag" in known, known))
    several = ", ".join(sorted(templates))
    return templates[name], [
        f"The tokenizer has no default chat template ({several}): {name} is used."
    ]


def _asks(text: str) -> tuple[list[dict[str, Any]], str, bool]:
    """(switches to try, the last being none; word for the system prompt; whether for the date)."""
    environment = jinja2.Environment(
        extensions=["jinja2.ext.loopcontrols", _Generation], trim_blocks=True, lstrip_blocks=True
    )
    try:
        tree = environment.parse(text)
        named = [node.value for node in tree.find_all(jinja2.nodes.Const)]
        known = jinja2.meta.find_undeclared_variables(tree)
    except jinja2.TemplateSyntaxError as error:
        raise _broken(f"line {error.lineno}: {error}") from error
    found = {name: value for name, value in SWITCHES.items() if name in known}
    if EFFORT in known:
        found[EFFORT] = next((effort for effort in EFFORTS if effort in named), EFFORTS[-1])
    asks_date = "strftime_now" in known
    if found:
        return [found, {}], "", asks_date
    return [{}], next((word for word in WORDS if word in text), ""), asks_date


def _calendar(today: datetime) -> str:
    """A macro in the place of transformers' strftime_now: the date is `today`.

    transformers hands no functions to templates. The line break is the tag's own (trim_blocks).
    """
    steps = "".join(f" | replace('%{code}', '{today.strftime('%' + code)}')" for code in CODES)
    return "{%- macro strftime_now(format) -%}{{ format" + steps + " }}{%- endmacro %}\n"


def _forms(
    switches: list[dict[str, Any]],
) -> Iterator[tuple[dict[str, Any], list[Any] | None, bool]]:
    """(switches, tools, parts), from the most to the least usual."""
    for given in switches:
        for tools in (None, [], [NO_TOOL]):
            for parts in (False, True):
                yield given, tools, parts


def _broken(fault: str) -> EngineError:
    first = fault.splitlines()[0] if fault else "it raised an error"
    return EngineError(
        "unsupported_architecture",
        f"the model's chat template cannot be used: {first}",
        "Mend chat_template.jinja (or chat_template in tokenizer_config.json) in the model's "
        "folder, or remove it: prompts are then given as plain text.",
        fault,
    )
