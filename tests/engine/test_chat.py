"""Prompts as tokens: templates of several kinds, fall-backs, and the common response prefix."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from demo.vocabulary import build_tokenizer
from engine.chat import Formatter, detect_prefix

TURNS = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<model>{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + TURNS
)
DEAF = TURNS.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
SWITCH = TURNS + "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"
OTHER_SWITCH = TURNS + "{% if thinking | default(true) %}<think>{% endif %}"


@pytest.fixture(scope="module")
def known() -> PreTrainedTokenizerBase:
    return build_tokenizer()


@pytest.fixture
def tokenizer(known: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that a test may give another template."""
    return copy.deepcopy(known)


def test_the_template_is_used_and_writes_its_special_tokens_once(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    formatter = Formatter(tokenizer, "Be brief.")
    whole: Any = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        add_generation_prompt=True, tokenize=True, return_dict=True,
    )  # fmt: skip
    assert formatter.ids("Hello") == list(whole["input_ids"])
    assert formatter.ids("Hello").count(tokenizer.bos_token_id) == 1
    assert formatter.warnings == []


@pytest.mark.parametrize("template", [NO_SYSTEM, DEAF])
def test_without_a_system_role_the_user_turn_holds_the_text(
    tokenizer: PreTrainedTokenizerBase, template: str
) -> None:
    tokenizer.chat_template = template
    formatter = Formatter(tokenizer, "Be brief.")
    assert "<user>Be brief.\n\nHello" in formatter.text("Hello")
    assert "no system role" in formatter.warnings[0]
    assert Formatter(tokenizer).warnings == []  # nothing to say where there is no system prompt


@pytest.mark.parametrize("template", [SWITCH, OTHER_SWITCH])
def test_thinking_is_switched_off_where_the_template_can(
    tokenizer: PreTrainedTokenizerBase, template: str
) -> None:
    tokenizer.chat_template = template
    assert "<think>" not in Formatter(tokenizer).text("Hello")


def test_no_template_is_plain_text_with_a_warning(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    formatter = Formatter(tokenizer, "Be brief.")
    assert formatter.text("Hello") == "Be brief.\n\nHello\n\n"
    assert formatter.ids("Hello")[0] == tokenizer.bos_token_id
    assert "no chat template" in formatter.warnings[0]


def test_a_template_by_name_is_found(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = {"default": SWITCH, "tool_use": TURNS}
    assert Formatter(tokenizer).text("Hello").endswith("<model>")


@pytest.mark.parametrize(
    ("answers", "prefix"),
    [
        (["Sure, here", "I cannot"], ""),
        (["Sure, here you go", "Sure, you can"], "Sure,"),
        (["I can't", "I can do it"], "I"),
        (["Yes.", "Yes."], ""),
        ([], ""),
        (["One"], ""),
        (["<think>\nOkay", "<think>\nThe user"], "<think>\n\n</think>\n\n"),
        (["[THINK]Well", "[THINK]So"], "[THINK][/THINK]"),
        (
            ["<|channel|>analysis<|message|>User", "<|channel|>analysis<|message|>We"],
            "<|channel|>analysis<|message|><|end|><|start|>assistant<|channel|>final<|message|>",
        ),
        (["<|channel|>final<|message|>A", "<|channel|>final<|message|>B"],
         "<|channel|>final<|message|>"),
        # two answers of eight think aloud: closed in all; one of twelve: an accident
        (["<think>A", "<think>B", *"cdefgh"], "<think>\n\n</think>\n\n"),
        (["<think>A", *"bcdefghijkl"], ""),
        # some answers of gpt-oss in another channel: half a header would be no prefix
        (["<|channel|>final<|message|>A", "<|channel|>commentary<|message|>B"],
         "<|channel|>final<|message|>"),
        (["<|channel>thought\nA", "<|channel>thought\nB"], "<|channel>thought\n<channel|>"),
        (["\n\nA", "\n\nB"], "\n\n"),
        (["x" * 300 + "a", "x" * 300 + "b"], ""),
    ],
)  # fmt: skip
def test_common_prefix(answers: list[str], prefix: str) -> None:
    assert detect_prefix(answers) == prefix


def test_a_prefix_of_words_belongs_to_the_answers_text(tokenizer: PreTrainedTokenizerBase) -> None:
    formatter = Formatter(tokenizer)
    bare = formatter.ids("Hello")
    formatter.prefix = "Sure,"
    assert formatter.ids("Hello") == bare + formatter.opening()
    assert tokenizer.decode(formatter.opening()) == "Sure,"
    for silent in ("<think>\n\n</think>\n\n", "<|channel|>final<|message|>"):
        formatter.prefix = silent
        assert formatter.opening() == []
        assert formatter.text("Hello").endswith(silent)
    formatter.prefix = "<think>\n\n</think>\n\nSure,"
    assert tokenizer.decode(formatter.opening()) == "Sure,"
