"""Chat templates of the main families, in the smallest form that shows what each does.

What must come out is written out by hand; transformers' own tokenizer renders.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
from transformers import PreTrainedTokenizerBase

from demo.vocabulary import build_tokenizer
from engine.chat import Formatter
from engine.errors import EngineError

CHATML = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
)
QWEN3 = (
    CHATML + "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
QWQ = CHATML + "{{- '<think>\n' }}{%- endif %}"
SMOLLM3 = (
    "{%- if enable_thinking is not defined %}{%- set enable_thinking = true %}{%- endif %}"
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{% generation %}"
    "{{- '<|im_start|>assistant\n' + m.content + '<|im_end|>\n' }}{% endgeneration %}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content.replace('/no_think', '') "
    "+ '<|im_end|>\n' }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\n' }}{%- if not enable_thinking %}"
    "{{- '<think>\n\n</think>\n' }}{%- endif %}{%- endif %}"
)
R1 = (
    "{{ bos_token }}{%- for m in messages %}{%- if m.role == 'system' %}{{ m.content }}"
    "{%- elif m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{%- else %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{%- endif %}"
)
V31 = (
    "{% if not thinking is defined %}{% set thinking = false %}{% endif %}{{ bos_token }}"
    "{%- for m in messages %}{{ '<｜User｜>' + m.content }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<｜Assistant｜>' }}"
    "{%- if thinking %}{{ '<think>' }}{%- else %}{{ '</think>' }}{%- endif %}{%- endif %}"
)
HARMONY = (
    "{%- macro build_system_message() -%}{{- 'Knowledge cutoff: 2024-06\n' }}"
    "{{- 'Current date: ' + strftime_now('%Y-%m-%d') + '\n\n' }}"
    "{%- if reasoning_effort is not defined %}{%- set reasoning_effort = 'medium' %}{%- endif %}"
    "{{- 'Reasoning: ' + reasoning_effort + '\n\n# Valid channels: analysis, final.' }}"
    "{%- endmacro -%}{{- '<|start|>system<|message|>' }}{{- build_system_message() }}"
    "{{- '<|end|>' }}{%- if messages[0].role in ['developer', 'system'] %}"
    "{{- '<|start|>developer<|message|># Instructions\n\n' + messages[0].content + '<|end|>' }}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}"
    "{%- endif %}{%- for m in loop_messages %}"
    "{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endfor -%}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif -%}"
)
GEMMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{{ '<start_of_turn>' + m['role'] + '\n' + m['content'] | trim "
    "+ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}"
    "{%- set first = messages[0]['content'] + '\n\n' -%}{%- set rest = messages[1:] -%}"
    "{%- else -%}{%- set first = '' -%}{%- set rest = messages -%}{%- endif -%}"
    "{%- for m in rest -%}{{ '<start_of_turn>' + m['role'] + '\n' + first "
    "+ m['content'] | trim + '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
GEMMA4 = (
    "{{ bos_token }}{%- if enable_thinking is defined and enable_thinking -%}"
    "{{ '<|turn>system\n<|think|><turn|>\n' }}{%- endif -%}{%- for m in messages -%}"
    "{{ '<|turn>' + m['role'] + '\n' + m['content'] + '<turn|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|turn>model\n<|channel>thought\n' }}{%- endif -%}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% if m['role'] == 'user' %}{{ ' [INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}"
    "{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}"
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system_message = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' }}"
    "{{- system_message + '<|eot_id|>' }}{%- for m in messages %}"
    "{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim "
    "+ '<|eot_id|>' }}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
MAGISTRAL = (  # a default system prompt with the date, only where nobody gives one
    "{{- bos_token }}{%- if messages[0]['role'] != 'system' %}"
    "{{- '[SYSTEM_PROMPT]Today is ' + strftime_now('%Y-%m-%d') + '.[/SYSTEM_PROMPT]' }}"
    "{%- endif %}{%- for m in messages %}{%- if m.role == 'system' %}"
    "{{- '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}{%- else %}"
    "{{- '[INST]' + m.content + '[/INST]' }}{%- endif %}{%- endfor %}"
)
MISTRAL4 = (
    "{%- set reasoning_effort = reasoning_effort if reasoning_effort is defined else 'none' %}"
    "{%- if reasoning_effort not in ['none', 'high'] %}{{ raise_exception('effort') }}{%- endif %}"
    "{{- bos_token + '[MODEL_SETTINGS]' + reasoning_effort + '[/MODEL_SETTINGS]' }}"
    "{%- for m in messages %}{{- '[INST]' + m.content + '[/INST]' }}{%- endfor %}"
)
SEED = (
    "{%- for m in messages %}{{- bos_token + m.role + '\n' + m.content + eos_token }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- bos_token + 'assistant\n' }}"
    "{%- if thinking_budget is defined and thinking_budget == 0 %}"
    "{{- '<seed:think><seed:cot_budget_reflect>none left</seed:cot_budget_reflect></seed:think>' }}"
    "{%- endif %}{%- endif %}"
)
GLM = (
    "[gMASK]<sop>{%- for m in messages %}{{- '<|' + m.role + '|>\n' + m.content }}"
    "{{- '/nothink' if (enable_thinking is defined and not enable_thinking) else '' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|assistant|>' }}"
    "{{- '\n<think></think>' if (enable_thinking is defined and not enable_thinking) else '' }}"
    "{%- endif %}"
)
NANO2 = (
    "{{- bos_token }}{%- set ns = namespace(think=true) %}{%- for m in messages %}"
    "{%- if '/no_think' in m.content %}{%- set ns.think = false %}{%- endif %}"
    "{{- '<SPECIAL_11>' + m.role + '\n' + m.content.replace('/no_think', '') + '\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<SPECIAL_11>Assistant\n' }}"
    "{%- if ns.think %}{{- '<think>\n' }}{%- else %}{{- '<think></think>' }}{%- endif %}"
    "{%- endif %}"
)
NEMOTRON = (
    "{#- The system prompt 'detailed thinking on' or 'detailed thinking off' sets the mode. #}"
    "{{- bos_token }}{%- for m in messages %}{{- '<' + m.role + '>' + m.content + '</>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<assistant>' }}{%- endif %}"
)
PARTS = (
    "{% for m in messages %}{{ m.role | upper }}:{% for part in m.content %}"
    "{% if part.type == 'image' %}{{ '<image>' }}{% elif part.type == 'text' %}"
    "{{ ' ' + part.text }}{% endif %}{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
EITHER = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"
)
COUNTS_TOOLS = (
    "[AVAILABLE_TOOLS]{{ tools | length }}{% for tool in tools %}{{ tool.function.name }}"
    "{% endfor %}[/AVAILABLE_TOOLS]{% for m in messages %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% endfor %}"
)
TOOLS_ONLY = "{% if not tools %}{{ raise_exception('tools are needed') }}{% endif %}" + COUNTS_TOOLS


@dataclass(frozen=True)
class Case:
    """What must come out of `template` for the prompt "Hi" with the system prompt `system`."""

    template: str
    expected: str
    system: str | None = None
    warns: list[str] = field(default_factory=list)  # a part of each warning


CASES = {
    "qwen3": Case(QWEN3, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
                  "<think>\n\n</think>\n\n"),
    "qwq": Case(QWQ, "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
                "<|im_start|>assistant\n<think>\n\n</think>\n\n", "Be brief."),
    "smollm3": Case(SMOLLM3, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
                    "<think>\n\n</think>\n"),
    "deepseek-r1": Case(R1, "<s>Be brief.<｜User｜>Hi<｜Assistant｜><think>\n\n</think>\n\n",
                        "Be brief."),
    "deepseek-v3.1": Case(V31, "<s><｜User｜>Hi<｜Assistant｜></think>"),
    "gpt-oss": Case(
        HARMONY, "<|start|>system<|message|>Knowledge cutoff: 2024-06\nCurrent date: 2024-07-26\n\n"
        "Reasoning: low\n\n# Valid channels: analysis, final.<|end|><|start|>developer<|message|>"
        "# Instructions\n\nBe brief.<|end|><|start|>user<|message|>Hi<|end|><|start|>assistant",
        "Be brief.", ["date"]),
    "gemma-2": Case(GEMMA2, "<s><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n"
                    "<start_of_turn>model\n", "Be brief.", ["no system role"]),
    "gemma-3": Case(GEMMA3, "<s><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n"
                    "<start_of_turn>model\n", "Be brief."),
    "gemma-4": Case(GEMMA4, "<s><|turn>user\nHi<turn|>\n<|turn>model\n"
                    "<|channel>thought\n<channel|>"),
    "mistral": Case(MISTRAL, "<s> [INST] Be brief.\n\nHi [/INST]", "Be brief.",
                    ["no system role"]),
    "llama-3": Case(
        LLAMA3, "<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n"
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n", None, ["26 Jul 2024"]),
    "magistral": Case(MAGISTRAL, "<s>[SYSTEM_PROMPT]Today is 2024-07-26.[/SYSTEM_PROMPT]"
                      "[INST]Hi[/INST]", None, ["date"]),
    "magistral, told": Case(MAGISTRAL, "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT]"
                            "[INST]Hi[/INST]", "Be brief."),
    "mistral-small-4": Case(MISTRAL4, "<s>[MODEL_SETTINGS]none[/MODEL_SETTINGS][INST]Hi[/INST]"),
    "seed-oss": Case(SEED, "<s>user\nHi</s><s>assistant\n<seed:think><seed:cot_budget_reflect>"
                     "none left</seed:cot_budget_reflect></seed:think>"),
    "glm-4.5": Case(GLM, "[gMASK]<sop><|user|>\nHi/nothink<|assistant|>\n<think></think>"),
    "nemotron-nano-2": Case(NANO2, "<s><SPECIAL_11>system\n\n\nBe brief.\n<SPECIAL_11>user\nHi\n"
                            "<SPECIAL_11>Assistant\n<think></think>", "Be brief."),
    "nemotron": Case(NEMOTRON, "<s><system>detailed thinking off</><user>Hi</><assistant>"),
    "parts": Case(PARTS, "SYSTEM: Be brief.\nUSER: Hi\nASSISTANT:", "Be brief."),
    "text or parts": Case(EITHER, "<user>Hi"),
    "counts tools": Case(COUNTS_TOOLS, "[AVAILABLE_TOOLS]0[/AVAILABLE_TOOLS][INST]Hi[/INST]"),
    "tools only": Case(TOOLS_ONLY, "[AVAILABLE_TOOLS]1nothing[/AVAILABLE_TOOLS][INST]Hi[/INST]",
                       None, ["demands tools"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def known() -> PreTrainedTokenizerBase:
    return build_tokenizer()


@pytest.fixture
def tokenizer(known: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that a test may give another template."""
    return copy.deepcopy(known)


@pytest.mark.parametrize("name", CASES)
def test_families(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    case = CASES[name]
    tokenizer.chat_template = case.template
    formatter = Formatter(tokenizer, case.system)
    assert formatter.text("Hi") == case.expected
    plain = tokenizer(case.expected, add_special_tokens=False)["input_ids"]
    assert formatter.ids("Hi") == plain
    assert len(formatter.warnings) == len(case.warns)
    for warning, part in zip(formatter.warnings, case.warns, strict=True):
        assert part in warning


@pytest.mark.parametrize(
    ("template", "settings"),
    [
        (QWEN3, {"enable_thinking": False}),
        (HARMONY, {"reasoning_effort": "low", "date": "2024-07-26"}),
        (MISTRAL4, {"reasoning_effort": "none"}),
        (NANO2, {"system prompt begins with": "/no_think"}),
        (MISTRAL, {}),
        (COUNTS_TOOLS, {"tools": []}),
    ],
)
def test_what_was_set_can_be_written_down(
    tokenizer: PreTrainedTokenizerBase, template: str, settings: dict[str, object]
) -> None:
    tokenizer.chat_template = template
    assert Formatter(tokenizer).settings == settings


def test_a_prompt_that_speaks_of_thoughts_is_left_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = "What does <think> mean?"
    tokenizer.chat_template = MISTRAL
    assert Formatter(tokenizer).text(prompt) == f"<s> [INST] {prompt} [/INST]"
    tokenizer.chat_template = R1
    text = Formatter(tokenizer).text(prompt)
    assert text == f"<s><｜User｜>{prompt}<｜Assistant｜><think>\n\n</think>\n\n"
    assert Formatter(tokenizer).text("").endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("templates", "expected", "warns"),
    [
        ({"default": MISTRAL, "tool_use": TOOLS_ONLY}, "<s> [INST] Hi [/INST]", 0),
        ({"rag": TOOLS_ONLY, "chat": MISTRAL, "tool_use": TOOLS_ONLY}, "<s> [INST] Hi [/INST]", 1),
        ({"tool_use": TOOLS_ONLY},
         "[AVAILABLE_TOOLS]1nothing[/AVAILABLE_TOOLS][INST]Hi[/INST]", 2),
    ],
)  # fmt: skip
def test_one_of_several_templates(
    tokenizer: PreTrainedTokenizerBase, templates: dict[str, str], expected: str, warns: int
) -> None:
    tokenizer.chat_template = templates
    formatter = Formatter(tokenizer)
    assert formatter.text("Hi") == expected
    assert len(formatter.warnings) == warns


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{{ m.content }}", "line 1"),
        ("{{ raise_exception('not for chats') }}", "not for chats"),
        ("{{ messages[0].content + 1 }}", "can only concatenate"),
        ("Hello!", "leaves the user's text out"),
    ],
)
def test_a_broken_template_is_named_with_its_mend(
    tokenizer: PreTrainedTokenizerBase, template: str, words: str
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(EngineError) as caught:
        Formatter(tokenizer)
    assert caught.value.reason == "unsupported_architecture"
    assert "chat template" in caught.value.message and words in caught.value.message
    assert "chat_template.jinja" in caught.value.mend


def test_a_template_that_refuses_one_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    refusing = "{% if messages[-1].content == 'No' %}{{ raise_exception('not this') }}{% endif %}"
    tokenizer.chat_template = refusing + MISTRAL
    formatter = Formatter(tokenizer)
    assert formatter.text("Yes") == "<s> [INST] Yes [/INST]"
    with pytest.raises(EngineError, match="not this"):
        formatter.text("No")
