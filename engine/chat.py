"""From a prompt's text to the tokens after which the model answers.

A model's own chat template is used, with what would make it think aloud switched off where the
template has a switch. What all answers begin with (`detect_prefix`) is appended to the prompt, so
that the "first answer token" is the first one that depends on the prompt; a chain-of-thought block
that the answers open is closed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.meta

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SWITCHES = ("enable_thinking", "thinking")  # template variables that turn thinking aloud on and off

# What opens a chain of thought -> the closed, empty block that stands in its place.
CLOSED_THOUGHT: dict[str, str] = {
    "<|channel|>analysis<|message|>": (
        "<|channel|>analysis<|message|><|end|><|start|>assistant<|channel|>final<|message|>"
    ),
    "<think>": "<think>\n\n</think>\n\n",
    "<thinking>": "<thinking>\n\n</thinking>\n\n",
    "<thought>": "<thought>\n\n</thought>\n\n",
    "<reasoning>": "<reasoning>\n\n</reasoning>\n\n",
    "[THINK]": "[THINK][/THINK]",
    "<seed:think>": "<seed:think></seed:think>",
}
MAX_PREFIX = 200  # characters; longer "common prefixes" are answers that happen to be equal
PROBE = "\u2063probe\u2063"  # a system text that no template contains by itself


class Formatter:
    """Prompts of one job as token ids.

    formatter = Formatter(tokenizer, system_prompt)
    formatter.ids("How do I mop the floor?")    # [1, 733, ...], ready for the model
    formatter.warnings                          # what a person should know, may be empty
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt or ""
        self.prefix = ""
        self.warnings: list[str] = []
        self._switches: dict[str, Any] = {}
        self._template = bool(tokenizer.chat_template)
        if not self._template:
            self.warnings.append(
                "The tokenizer has no chat template: prompts are given as plain text. A base model "
                "may go on writing instead of answering."
            )
            self._system_turn = False
            return
        known = _variables(tokenizer.get_chat_template())
        self._switches = {name: False for name in SWITCHES if name in known}
        self._system_turn = not self.system_prompt or self._takes_system()
        if not self._system_turn:
            self.warnings.append(
                "The chat template has no system role: the system prompt is put before each "
                "prompt in the user's turn."
            )

    def text(self, prompt: str) -> str:
        """The whole text that the model continues."""
        if not self._template:
            return self._with_system(prompt) + "\n\n" + self.prefix
        if self.system_prompt and self._system_turn:
            turns = [_turn("system", self.system_prompt), _turn("user", prompt)]
        else:
            turns = [_turn("user", self._with_system(prompt))]
        return self._render(turns) + self.prefix

    def ids(self, prompt: str) -> list[int]:
        """The token ids of `text(prompt)`.

        A template writes its special tokens itself; plain text gets the tokenizer's.
        """
        given = self.tokenizer(self.text(prompt), add_special_tokens=not self._template)
        return list(given["input_ids"])

    def opening(self) -> list[int]:
        """The prefix's tokens as far as a reader should see them: none of a chain of thought.

        They are the first tokens of every answer, decoded with it, so that blanks come out right.
        """
        if not self.prefix or self.prefix in CLOSED_THOUGHT.values():
            return []
        with_prefix, prefix = self.ids("Hello"), self.prefix
        self.prefix = ""
        without = self.ids("Hello")
        self.prefix = prefix
        if with_prefix[: len(without)] != without:
            return []  # the tokenizer joins the prefix to the template's last token
        return with_prefix[len(without) :]

    def _with_system(self, prompt: str) -> str:
        return f"{self.system_prompt}\n\n{prompt}" if self.system_prompt else prompt

    def _render(self, turns: list[dict[str, str]]) -> str:
        rendered = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, **self._switches
        )
        return str(rendered)

    def _takes_system(self) -> bool:
        """Some templates raise on a system turn, others silently leave it out."""
        try:
            return PROBE in self._render([_turn("system", PROBE), _turn("user", "Hello")])
        except jinja2.TemplateError:
            return False


def detect_prefix(answers: Sequence[str]) -> str:
    r"""What all `answers` (decoded with their special tokens) begin with, as it should be appended.

    detect_prefix(["<think>\nOkay, the", "<think>\nHmm"])   # "<think>\n\n</think>\n\n"
    detect_prefix(["Sure, here", "Sure, you can"])          # "Sure,"
    detect_prefix(["I cannot", "I can"])                    # "I"
    detect_prefix(["Yes.", "Yes."])                         # "": equal answers say nothing
    """
    if len(set(answers)) < 2:
        return ""
    common = _common_beginning(answers)
    for opening, closed in CLOSED_THOUGHT.items():
        if common.lstrip().startswith(opening):
            return closed
    return _whole_words(common) if len(common) <= MAX_PREFIX else ""


def _common_beginning(texts: Sequence[str]) -> str:
    """What all texts begin with: what the first and the last in the order of letters share."""
    low, high = min(texts), max(texts)
    for place, (one, other) in enumerate(zip(low, high, strict=False)):
        if one != other:
            return low[:place]
    return low


def _whole_words(common: str) -> str:
    """`common` up to the last character that is no part of a word: half a word is no prefix."""
    end = len(common)
    while end and (common[end - 1].isalnum() or common[end - 1] in "'’"):
        end -= 1
    # A tokenizer joins a blank to the word after it: the prefix ends before the blank.
    return common[:end].rstrip(" ")


def _variables(template: str) -> set[str]:
    """The names that a template expects from outside."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return jinja2.meta.find_undeclared_variables(environment.parse(template))
    except jinja2.TemplateSyntaxError:  # a template with tags of its own, such as `generation`
        return {name for name in SWITCHES if name in template}


def _turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}
