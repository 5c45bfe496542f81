"""Chains of thought in an answer: how they open, and the closed, empty block in their place.

A model that thinks aloud decides in its thoughts whether it refuses, hundreds of tokens before it
does. So thoughts are closed before they begin, and the first answer token is one of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_PREFIX = 200  # characters; longer "common prefixes" are answers that happen to be equal
SOME = 0.1  # share of answers that think, above which thoughts are closed in all of them


@dataclass(frozen=True)
class Thought:
    """One way to write thoughts: what opens them, what ends them, the empty block as a whole."""

    opening: str
    end: str
    closed: str


def _tags(opening: str, end: str, between: str = "", after: str = "") -> Thought:
    return Thought(opening, end, f"{opening}{between}{end}{after}")


FINAL = "<|channel|>final<|message|>"  # gpt-oss: the header of what the reader sees
THOUGHTS: tuple[Thought, ...] = (
    # gpt-oss ("harmony"): a message of its own in the channel `analysis`, then one in `final`
    _tags("<|channel|>analysis<|message|>", "<|end|>", after=f"<|start|>assistant{FINAL}"),
    _tags("<|channel>thought", "<channel|>", "\n"),  # Gemma 4
    _tags("<think>", "</think>", "\n\n", "\n\n"),  # Qwen3, DeepSeek-R1 and most others
    _tags("<thinking>", "</thinking>", "\n\n", "\n\n"),
    _tags("<thought>", "</thought>", "\n\n", "\n\n"),
    _tags("<reasoning>", "</reasoning>", "\n\n", "\n\n"),
    _tags("[THINK]", "[/THINK]"),  # Magistral
    _tags("<seed:think>", "</seed:think>"),  # Seed-OSS
    _tags("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    _tags("◁think▷", "◁/think▷"),  # Kimi
)


def close_opened(text: str, prompt: str) -> str:
    r"""`text` (a rendered `prompt`) with the thought closed that the generation prompt opens.

    close_opened("<user>Hi<assistant><think>\n", "Hi")   # "<user>Hi<assistant><think>\n\n</think>…"
    close_opened("<user>Hi<assistant>", "Hi")            # as it is; so are closed thoughts
    """
    asked = prompt.strip()  # may itself speak of <think>
    tail = text.rpartition(asked)[2] if asked else text
    for thought in THOUGHTS:
        place = tail.rfind(thought.opening)
        if place >= 0 and thought.end not in tail[place:]:
            return text[: len(text) - len(tail) + place] + thought.closed
    return text


def detect_prefix(answers: Sequence[str]) -> str:
    r"""What all `answers` (decoded with their special tokens) begin with, as it should be appended.

    detect_prefix(["<think>\nOkay, the", "<think>\nHmm"])   # "<think>\n\n</think>\n\n"
    detect_prefix(["Sure, here", "Sure, you can"])          # "Sure,"
    detect_prefix(["I cannot", "I can"])                    # "I"
    detect_prefix(["Yes.", "Yes."])                         # "": equal answers say nothing

    A model that thinks in some of its answers only gets the closed block in all of them.
    """
    for thought in THOUGHTS:
        thinking = sum(answer.lstrip().startswith(thought.opening) for answer in answers)
        if thinking > SOME * len(answers):
            return thought.closed
    if len(set(answers)) < 2:
        return ""
    common = _common_beginning(answers)
    if common and FINAL.startswith(common) and any(a.startswith(FINAL) for a in answers):
        return FINAL  # half a header is none
    return _whole_words(common) if len(common) <= MAX_PREFIX else ""


def spoken(prefix: str) -> str:
    """The part of a prefix that a reader should see: neither closed thoughts nor a header."""
    for silent in (*(thought.closed for thought in THOUGHTS), FINAL):
        prefix = prefix.removeprefix(silent)
    return prefix


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
