"""Does the wide model do what the demo model does? Answers, refusals and logits side by side."""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo import MODEL, prompt_file
from demo.dataset import read_jsonl
from demo.train import chat_ids, is_refusal

ANSWER = 48  # tokens


@dataclass(frozen=True)
class Checked:
    """The comparison on `prompts` prompts of each side.

    same          answers that are equal token by token, of 2 · prompts
    refusals      (harmful, harmless) of the demo model, then of the wide one
    decisions     answers which are refusals in one and not in the other
    difference    greatest |logit − logit| in float32 over all tokens of prompt and answer
    padding       greatest logit of a padding token less the greatest of all at the same place
    """

    prompts: int
    same: int
    refusals: tuple[tuple[int, int], tuple[int, int]]
    decisions: int
    difference: float
    padding: float


def check(folder: Path, prompts: int) -> Checked:
    """Compare the wide model in `folder` with the demo model.

    Answers are greedy, in the folder's dtype for both; logits are those of its weights in float32.
    """
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rows = [
        chat_ids(tokenizer, "", text)
        for name in ("refused", "answered")
        for text in search_prompts(name, prompts)
    ]
    count = len(rows) // 2
    dtype = getattr(torch, json.loads((folder / "config.json").read_text())["dtype"])
    ids, mask = padded(rows, tokenizer.pad_token_id)
    answers: list[Tensor] = []
    for path in (MODEL, folder):
        answers.append(_answers(_load(path, dtype), ids, mask))
        gc.collect()
    said = [[is_refusal(text) for text in _texts(tokenizer, answer)] for answer in answers]
    demo, wide = answers
    whole = torch.cat([ids, demo], 1)
    heard = torch.cat([mask, (demo != tokenizer.pad_token_id).long()], 1)
    narrow_logits = list(_logits(_load(MODEL, torch.float32), whole, heard))
    gc.collect()
    difference, padding = 0.0, -torch.inf
    wide_model = _load(folder, torch.float32)
    known = narrow_logits[0].shape[-1]
    for place, logits in enumerate(_logits(wide_model, whole, heard)):
        difference = max(difference, float((logits[:, :known] - narrow_logits[place]).abs().max()))
        if logits.shape[-1] > known:
            gap = logits[:, known:].amax(-1) - logits[:, :known].amax(-1)
            padding = max(padding, float(gap.max()))
    return Checked(
        count,
        sum(torch.equal(a, b) for a, b in zip(demo, wide, strict=True)),
        (_sides(said[0], count), _sides(said[1], count)),
        sum(a != b for a, b in zip(*said, strict=True)),
        difference,
        padding,
    )


def search_prompts(name: str, count: int) -> list[str]:
    """The first `count` search prompts of the demo's file `refused` or `answered`."""
    rows = read_jsonl(prompt_file(name))
    return [row["prompt"] for row in rows if row["split"] == "search"][:count]


def padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and mask (N, T) of rows of unequal length, padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _load(folder: Path, dtype: torch.dtype) -> Any:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    factory: Any = AutoModelForCausalLM
    return factory.from_pretrained(folder, dtype=dtype).to(device).eval()


def _answers(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """The tokens of greedy answers (N, ANSWER), filled up with the padding token."""
    out: Tensor = model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device),
        max_new_tokens=ANSWER, do_sample=False,
    )  # fmt: skip
    made = out[:, ids.shape[1] :].cpu()
    missing = ANSWER - made.shape[1]
    return torch.nn.functional.pad(made, (0, missing), value=model.config.pad_token_id)


@torch.inference_mode()
def _logits(model: Any, ids: Tensor, mask: Tensor) -> Any:
    """Logits (tokens, vocabulary) of each row in turn, on the CPU."""
    for row, heard in zip(ids, mask, strict=True):
        real = row[heard.bool()][None].to(model.device)
        yield model(real).logits[0].float().cpu()


def _texts(tokenizer: Any, answers: Tensor) -> list[str]:
    decoded: list[str] = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return decoded


def _sides(refused: list[bool], count: int) -> tuple[int, int]:
    return sum(refused[:count]), sum(refused[count:])
