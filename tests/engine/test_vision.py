"""Vision-language models, text only: loaded whole, surveyed, and decoded as `generate` does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedTokenizerBase,
)

from demo.vocabulary import build_tokenizer
from engine.anatomy import survey
from engine.chat import Formatter
from engine.decode import Decoder, Row
from engine.errors import EngineError
from engine.load import load, load_folder
from engine.loading.tokens import complete_ends, read_tokenizer
from engine.patch import Patch
from engine.report import Silent
from tests.engine.conftest import request
from tests.engine.families import DENSE, LAYERED, SMALL, tiny

PARTS = (
    "{% for m in messages %}{{ m.role }}:{% for part in m.content %}{{ part.text }}{% endfor %}; "
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
TEXT: dict[str, Any] = SMALL | {"vocab_size": 1024}
TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
MROPE = {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 10_000.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "clip_vision_model", **TOWER},
        "image_token_index": 5,
    },
    "gemma3": {
        "text_config": {"model_type": "gemma3_text", **TEXT, **LAYERED},
        "vision_config": {"model_type": "siglip_vision_model", **TOWER},
        "mm_tokens_per_image": 4, "image_token_index": 5,
    },
    "qwen2_5_vl": {
        "text_config": {**TEXT, **LAYERED, "rope_parameters": MROPE},
        "vision_config": {
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4,
            "out_hidden_size": 32, "fullatt_block_indexes": [1],
        },
        "image_token_id": 5, "vision_start_token_id": 6, "video_token_id": 7,
    },
}  # fmt: skip
PROMPTS = [[1, 9, 10, 11], [1, 12, 13, 14, 15, 16]]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer()


def generated(model: Any, ids: list[int], new: int) -> list[int]:
    """By the library's own loop, without the end token."""
    given = torch.tensor([ids])
    out = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=new, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    tokens: list[int] = out[0, len(ids) :].tolist()
    return tokens[: tokens.index(2)] if 2 in tokens else tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_model_is_loaded_and_answers_text(
    family: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    torch.manual_seed(3)
    factory: Any = AutoModelForImageTextToText
    true = factory.from_config(AutoConfig.for_model(family, **FAMILIES[family])).float().eval()
    true.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load(request(tmp_path), Silent())
    model = loaded.model
    assert type(model) is type(true)
    mine, theirs = dict(model.named_parameters()), dict(true.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)  # the tower among them
    assert any("vision" in name or "visual" in name for name in mine)
    assert model.config.get_text_config().num_hidden_layers == 3

    anatomy = survey(model)
    assert anatomy.coverage == 1.0
    assert not any("vision" in w.name or "visual" in w.name for w in anatomy.writers)
    decoder = Decoder(model, loaded.tokenizer, Patch(anatomy))
    decoder.batch_size = 2
    answers = decoder.answers([Row(ids) for ids in PROMPTS], [], 12, Silent(), "answers")
    again, _ = load_folder(tmp_path, torch.device("cpu"), torch.float32)
    assert [a.tokens for a in answers] == [generated(again, ids, 12) for ids in PROMPTS]
    assert len({tuple(a.tokens) for a in answers}) == 2  # and they depend on the prompt


def test_the_text_model_of_a_family_that_has_both(tmp_path: Path) -> None:
    """`architectures` decides: Qwen3.5 comes with eyes and without."""
    text = {**TEXT, "layer_types": ["full_attention"] * 3}
    config = AutoConfig.for_model("qwen3_5_text", **text)
    factory: Any = AutoModelForCausalLM
    factory.from_config(config).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    loaded = load(request(tmp_path), Silent())
    assert type(loaded.model).__name__ == "Qwen3_5ForCausalLM"


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    tiny("llama", DENSE["llama"]).save_pretrained(tmp_path)
    AutoConfig.for_model("t5", d_model=32, num_layers=1).save_pretrained(tmp_path)
    with pytest.raises(EngineError) as caught:
        load(request(tmp_path), Silent())
    assert caught.value.reason == "unsupported_architecture"
    assert "encoder-decoder" in caught.value.message


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: (folder / "chat_template.jinja").write_text(PARTS),
        lambda folder: (folder / "chat_template.json").write_text(
            json.dumps({"chat_template": PARTS})
        ),
        lambda folder: (folder / "processor_config.json").write_text(
            json.dumps({"image_seq_length": 4, "chat_template": PARTS})
        ),
    ],
    ids=["jinja", "chat_template.json", "processor_config.json"],
)
def test_the_processors_chat_template_is_found(
    write: Callable[[Path], Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    assert not read_tokenizer(tmp_path, "tiny").chat_template
    write(tmp_path)
    found = read_tokenizer(tmp_path, "tiny")
    assert Formatter(found, "Be brief.").text("Hi") == "system:Be brief.; user:Hi; assistant:"


@pytest.mark.parametrize(
    ("given", "own", "ends", "words"),
    [
        (None, "</s>", 2, None),  # no generation_config: the tokenizer's, in silence
        (2, "</s>", 2, None),
        ([2, 3], "</s>", [2, 3], None),
        (3, "</s>", [3, 2], "<pad>"),  # the base model's end token, which no chat writes
        (2, None, 2, None),
        (None, None, None, "run to the limit"),
    ],
)
def test_end_tokens(
    given: int | list[int] | None, own: str | None, ends: Any, words: str | None,
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path,
) -> None:  # fmt: skip
    tokenizer.save_pretrained(tmp_path)
    known = read_tokenizer(tmp_path, "tiny")
    known.eos_token = own
    model = tiny("llama", DENSE["llama"])
    model.generation_config.eos_token_id = given
    said: list[str] = []
    complete_ends(model, known, said.append)
    assert model.generation_config.eos_token_id == ends
    assert [words in line for line in said] == ([True] if words else [])  # type: ignore[operator]
