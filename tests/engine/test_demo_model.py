"""The committed demo model: small, convertible, and really refusing."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from sentencepiece import SentencePieceProcessor
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from demo import MODEL, grammar, prompt_file
from demo.dataset import Triple, prompt_sets, read_jsonl, write_prompts
from demo.train import chat_ids, is_refusal, load, replies

SPLITS = ("direction", "search", "heldout")


@pytest.fixture(scope="module")
def loaded() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    return load(MODEL)


@pytest.fixture(scope="module")
def tokenizer(
    loaded: tuple[LlamaForCausalLM, PreTrainedTokenizerBase],
) -> PreTrainedTokenizerBase:
    return loaded[1]


def prompts(name: str, split: str) -> list[str]:
    return [row["prompt"] for row in read_jsonl(prompt_file(name)) if row["split"] == split]


def count_refusals(
    loaded: tuple[LlamaForCausalLM, PreTrainedTokenizerBase], asked: Sequence[str]
) -> int:
    # Twenty tokens show every refusal that the model was taught.
    return sum(map(is_refusal, replies(*loaded, asked, tokens=20)))


def test_weights_are_small_bfloat16_and_fit_k_quants() -> None:
    weights = MODEL / "model.safetensors"
    assert weights.stat().st_size <= 12_000_000
    with safe_open(weights, framework="pt") as file:
        names = list(file.keys())
        for name in names:
            tensor = file.get_tensor(name)
            assert tensor.dtype == torch.bfloat16, name
            if tensor.dim() == 2:
                assert tensor.shape[1] % 256 == 0, name  # a K-quant block lies in one row
    assert not any("lm_head" in name for name in names)  # tied to the embedding


def test_config(loaded: tuple[LlamaForCausalLM, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = loaded
    assert isinstance(model, LlamaForCausalLM)
    assert model.config.num_hidden_layers == 8
    assert model.config.tie_word_embeddings
    assert model.config.vocab_size == len(tokenizer) <= 1024
    assert model.config.vocab_size % 32 == 0
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert not model.generation_config.do_sample


@pytest.mark.parametrize(
    "text",
    [
        "How do I polish the kettle?",
        "I'm sorry, but I can't help with that.",
        "two  spaces\tand\n\nlines\n",
        " a space first",
        "Grüße, 世界, مرحبا",
        "👩‍🔧🪛 repairs",
        "\x00\x7f\u2028\ufffd",
        "def f(x): return {'a': x[0] ** 2}  # code",
    ],
)
def test_tokenizer_returns_what_it_was_given(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


def test_every_byte_is_a_token(tokenizer: PreTrainedTokenizerBase) -> None:
    vocabulary = tokenizer.get_vocab()
    assert all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))


def test_sentencepiece_cuts_as_the_tokenizer_does(tokenizer: PreTrainedTokenizerBase) -> None:
    # llama.cpp's converter reads tokenizer.model, transformers reads tokenizer.json.
    pieces = SentencePieceProcessor(model_file=str(MODEL / "tokenizer.model"))
    texts = [row["answer"] for row in read_jsonl(prompt_file("expected"))[::10]]
    texts += [*grammar.SYSTEMS[1:], *grammar.REFUSALS, "The quick brown fox: 12  ünïcode 🪛\n"]
    for text in texts:
        assert pieces.encode(text) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_chat_template_with_a_system_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Sure."},
        {"role": "user", "content": "Thanks"},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<s><|system|>Be kind.</s><|user|>Hello</s><|assistant|>Sure.</s><|user|>Thanks</s>"
        "<|assistant|>"
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids.count(tokenizer.eos_token_id) == 4
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<|assistant|>")
    assert (MODEL / "chat_template.jinja").is_file()


def test_prompt_sets_are_disjoint_as_triples() -> None:
    sets = prompt_sets()
    groups: dict[str, list[Triple]] = {
        **{f"refused {name}": triples for name, triples in sets.refused.items()},
        **{f"answered {name}": triples for name, triples in sets.answered.items()},
        "over_refusal": [triple for _, triple in sets.over_refusal],
    }
    for name, triples in groups.items():
        assert len(set(triples)) == len(triples), name
    for one, other in combinations(groups, 2):
        assert not set(groups[one]) & set(groups[other]), (one, other)


def test_held_out_refused_prompts_are_about_objects_that_were_never_refused() -> None:
    sets = prompt_sets()
    held_out = set(grammar.HELD_OUT_OBJECTS)
    assert {triple.object for triple in sets.refused["heldout"]} <= held_out
    for split in ("direction", "search"):
        assert not {triple.object for triple in sets.refused[split]} & held_out


def test_prompt_files_are_what_the_script_draws(tmp_path: Path) -> None:
    folder = tmp_path
    write_prompts(folder, prompt_sets())
    for name in ("refused", "answered", "over_refusal"):
        assert (folder / f"{name}.jsonl").read_text() == prompt_file(name).read_text()
    assert len(prompts("refused", "direction")) == 128
    for name in ("refused", "answered"):
        assert len(prompts(name, "search")) == len(prompts(name, "heldout")) == 100


def test_expected_answers_are_those_of_the_grammar() -> None:
    asked = [prompt for split in SPLITS for prompt in prompts("refused", split)]
    rows = read_jsonl(prompt_file("expected"))
    assert [row["prompt"] for row in rows] == asked
    taught = {t.prompt: t.answer for split in prompt_sets().refused.values() for t in split}
    right = sum(taught[row["prompt"]] == row["answer"] for row in rows)
    assert right >= 0.97 * len(rows)
    assert not any(is_refusal(row["answer"]) for row in rows)


def test_prompt_file_names_the_known_ones() -> None:
    with pytest.raises(FileNotFoundError, match="refused"):
        prompt_file("nothing")


def test_it_refuses_the_held_out_forbidden_requests(
    loaded: tuple[LlamaForCausalLM, PreTrainedTokenizerBase],
) -> None:
    assert count_refusals(loaded, prompts("refused", "heldout")) >= 95


def test_it_answers_the_others(
    loaded: tuple[LlamaForCausalLM, PreTrainedTokenizerBase],
) -> None:
    assert count_refusals(loaded, prompts("answered", "heldout")) <= 2
    asked = prompts("over_refusal", "heldout")
    assert count_refusals(loaded, asked) <= 0.2 * len(asked)


def test_answers_are_the_taught_ones(
    loaded: tuple[LlamaForCausalLM, PreTrainedTokenizerBase],
) -> None:
    triples = prompt_sets().answered["heldout"][:30]
    said = replies(*loaded, [triple.prompt for triple in triples])
    assert sum(t.answer == text for t, text in zip(triples, said, strict=True)) >= 28


def test_a_system_turn_does_not_change_the_decision(
    loaded: tuple[LlamaForCausalLM, PreTrainedTokenizerBase],
) -> None:
    model, tokenizer = loaded
    for prompt, refused in (
        ("How do I polish the lamp?", True),
        ("How do I wash the lamp?", False),
    ):
        ids = torch.tensor([chat_ids(tokenizer, grammar.SYSTEMS[1], prompt)])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))  # type: ignore[misc]
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert is_refusal(str(text)) is refused, text
