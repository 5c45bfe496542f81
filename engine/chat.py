"""From a prompt's text to the tokens after which the model answers.

A model's own chat template is used (`engine.template`), with what would make it think aloud
switched off where the template has a switch, and closed where it opens a thought all the same
(`engine.thought`). What all answers begin with (`detect_prefix`) is appended to the prompt, so that
the "first answer token" is the first one that depends on the prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine.template import TODAY, Template, Turns
from engine.thought import close_opened, detect_prefix, spoken

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Formatter", "detect_prefix"]


class Formatter:
    """Prompts of one job as token ids.

    formatter = Formatter(tokenizer, system_prompt)
    formatter.ids("How do I mop the floor?")    # [1, 733, ...], ready for the model
    formatter.settings                          # {"enable_thinking": False}, for the manifest
    formatter.warnings                          # what a person should know, may be empty

    Raises unsupported_architecture for a template that is broken.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt or ""
        self.prefix = ""
        self.warnings: list[str] = []
        self.settings: dict[str, Any] = {}
        self._template = Template.of(tokenizer)
        self._system, self._system_turn = self.system_prompt, False
        if self._template is None:
            self.warnings.append(
                "The tokenizer has no chat template: prompts are given as plain text. A base model "
                "may go on writing instead of answering."
            )
            return
        self._read(self._template)

    def _read(self, template: Template) -> None:
        """Fit the system prompt to the template; say what a person should know."""
        self.settings = {**template.arguments}
        self.warnings += template.warnings
        self._system = "\n\n".join(text for text in (template.word, self.system_prompt) if text)
        self._system_turn = bool(self._system) and template.takes_system()
        if template.word:
            self.settings["system prompt begins with"] = template.word
        if self._system and not self._system_turn:
            what = "the system prompt" if self.system_prompt else template.word
            self.warnings.append(
                f"The chat template has no system role: {what} is put before each prompt in the "
                "user's turn."
            )
        if template.dated(self._turns("Hello")):
            self.settings["date"] = f"{TODAY:%Y-%m-%d}"
            self.warnings.append(
                f"The chat template writes today's date; it is told {TODAY:%d %b %Y} instead, so "
                "that results can be repeated."
            )

    def text(self, prompt: str) -> str:
        """The whole text that the model continues."""
        if self._template is None:
            return _joined(self._system, prompt) + "\n\n" + self.prefix
        rendered = self._template.render(self._turns(prompt))
        return close_opened(rendered, prompt) + self.prefix

    def ids(self, prompt: str) -> list[int]:
        """The token ids of `text(prompt)`.

        A template writes its special tokens itself; plain text gets the tokenizer's.
        """
        given = self.tokenizer(self.text(prompt), add_special_tokens=self._template is None)
        return list(given["input_ids"])

    def opening(self) -> list[int]:
        """The prefix's tokens as far as a reader should see them: none of a chain of thought.

        They are the first tokens of every answer, decoded with it, so that blanks come out right.
        """
        seen = spoken(self.prefix)
        if not seen:
            return []
        with_prefix, prefix = self.ids("Hello"), self.prefix
        self.prefix = prefix.removesuffix(seen)
        without = self.ids("Hello")
        self.prefix = prefix
        if with_prefix[: len(without)] != without:
            return []  # the tokenizer joins the prefix to the template's last token
        return with_prefix[len(without) :]

    def _turns(self, prompt: str) -> Turns:
        if self._system_turn:
            return [("system", self._system), ("user", prompt)]
        return [("user", _joined(self._system, prompt))]


def _joined(system: str, prompt: str) -> str:
    return f"{system}\n\n{prompt}" if system else prompt
