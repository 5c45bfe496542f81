"""Six shortcuts of decoding that some architectures do not bear: tried before all else.

padding   rows of different lengths share a batch, filled up on the left under a mask. Recurrent
          models without a mask (RWKV, xLSTM) read the padding, as does DeepSeek V4's compression.
cache     a step reads the newest token alone, the others' keys and values are kept. Some models
          keep nothing (OpenAI GPT), or in a way of their own (RWKV, MiniMax).
drafts    earlier answers are verified in one forward, and what was wrong is taken out of the cache
          again: only where it holds the keys and values of all tokens and nothing else.
shares    what all prompts begin with is read once, and prompts of unlike lengths apart: padding
          stands between tokens of a row.
lower     forwards begin behind the blocks that an edit leaves as they were: only where each block
          runs once and passes one stream to the next.
ending    the last block's feed-forward reads only the tokens whose logits are wanted.

All would give wrong answers in silence, so each is compared with slow twins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from engine.anatomy import Anatomy
from engine.batch import Batch
from engine.decode import ORIGINAL, Decoder
from engine.drafts import Drafts
from engine.ending import feed_forward, only_last
from engine.lower import Lower
from engine.memory import is_out_of_memory
from engine.shared import begin, editable_cache, padded, read_apart, rest

CUTS = (0, 1, 3, 6)  # tokens left out at the front of each row that is tried
FEWEST = 4  # tokens of a row
DRAFTED = 8  # tokens of the answers that are compared
EXACT, ROUNDED = 0.01, 0.05  # relative errors of the logits, in float32 and in narrower types


@torch.inference_mode()
def choose_shortcuts(decoder: Decoder, ids: Sequence[int]) -> list[str]:
    """Set the decoder's `pads` and `caches` from some forwards of `ids`; what a person should know.

    The median over the rows decides: in 16 bits a router may send one row to another expert.
    """
    rows = _rows(ids)
    truth = torch.cat([_last_logits(decoder, [row]) for row in rows])
    warnings = []
    decoder.pads = _alike(decoder, _last_logits(decoder, rows), truth)
    if not decoder.pads:
        decoder.batch_size = 1
        warnings.append(
            f"{type(decoder.model).__name__} reads the padding of shorter prompts: prompts are "
            "read one at a time, which takes longer."
        )
    decoder.caches = _caches(decoder, rows)
    if not decoder.caches:
        warnings.append(
            f"{type(decoder.model).__name__} does not decode from a cache of keys and values: "
            "every token reads the whole answer again, which takes longer."
        )
    decoder.drafts = _drafts(decoder, rows)
    decoder.shares = decoder.drafts is not None and _shares(decoder, rows)
    return warnings


def _shares(decoder: Decoder, rows: list[list[int]]) -> bool:
    """Whether rows that begin alike give the same when that beginning is read once for all."""
    whole, numbers = [rows[0][:FEWEST] + row for row in rows], [ORIGINAL] * len(rows)
    if editable_cache(decoder, max(map(len, whole))) is None:
        return False
    saved = decoder.overhead, decoder.shares
    decoder.overhead, decoder.shares = 0, True  # so that all of it pays here
    found = []
    try:
        begun = begin(decoder, whole, [], numbers, FEWEST)
        if begun is not None:
            ids, mask = rest(*decoder.padded(whole), begun.held)
            found.append(decoder.forward(ids, mask, 1, begun.cache).logits[:, -1])
        apart = read_apart(decoder, whole, [], numbers)
        if apart is not None:
            ids, mask = decoder.padded([row[-1:] for row in whole])
            mask = torch.cat([apart[1], mask], dim=1)
            found.append(decoder.forward(ids, mask, 1, apart[0].cache).logits[:, -1])
    except Exception as error:  # what a model says to a cache that is not its own, we cannot list
        if is_out_of_memory(error):
            raise
        return False
    finally:
        decoder.overhead, decoder.shares = saved
    truth = _last_logits(decoder, whole)
    return len(found) == 2 and all(_alike(decoder, one, truth) for one in found)


def _drafts(decoder: Decoder, rows: list[list[int]]) -> Drafts | None:
    """Drafts where the model gives the same tokens with them, right and wrong ones, as without."""
    if not (decoder.pads and decoder.caches) or decoder.mixes:
        return None
    try:
        plain = Batch(decoder, rows, [[] for _ in rows], DRAFTED, drafts=False)
        plain.step(DRAFTED)
        batch = Batch(decoder, rows, [[] for _ in rows], DRAFTED, drafts=True)
        if not batch.drafts:
            return None
        while (had := min(map(len, batch.tokens))) < DRAFTED:
            right = [
                truth[len(own) :] for truth, own in zip(plain.tokens, batch.tokens, strict=True)
            ]
            wrong = [[*rest[:cut], decoder.pad] for cut, rest in enumerate(right, start=had)]
            batch.verify([draft[: DRAFTED - had] for draft in wrong])
    except Exception as error:  # what a model says to such a cache, we cannot list
        if is_out_of_memory(error):
            raise
        return None
    same = [own[:DRAFTED] == truth for own, truth in zip(batch.tokens, plain.tokens, strict=True)]
    return Drafts() if sum(same) > len(rows) // 2 else None


@torch.inference_mode()
def choose_lower(decoder: Decoder, anatomy: Anatomy, weight_bytes: int, ids: Sequence[int]) -> None:
    """Set the decoder's `lower` where forwards from every station give what whole ones give."""
    if not decoder.pads or decoder.mixes:
        return
    rows = _rows(ids)
    front = rows[0][:FEWEST] if decoder.shares else []
    rows = [front + row for row in rows]
    lower = Lower(anatomy, weight_bytes, decoder.lanes)
    truth = _last_logits(decoder, rows)
    saved, decoder.overhead = decoder.overhead, 0  # so that the front is read once here
    try:
        states = lower.read(decoder, rows, len(front))
        if front:
            (before,) = lower.read(decoder, [front])
            states = [torch.cat([before, one], dim=1) for one in states]
        for place, station in enumerate(lower.stations):
            with lower.skipping(station, padded([one[place] for one in states])):
                if not _alike(decoder, _last_logits(decoder, rows), truth):
                    return
    except Exception as error:  # what a model says to blocks that are left out, we cannot list
        if is_out_of_memory(error):
            raise
        return
    finally:
        decoder.overhead = saved
    decoder.lower = lower
    decoder.ending = _ending(decoder, anatomy, rows, truth)


def _ending(
    decoder: Decoder, anatomy: Anatomy, rows: list[list[int]], truth: Tensor
) -> nn.Module | None:
    """The last block's feed-forward where the head's tokens alone give the same logits."""
    module = feed_forward(anatomy)
    if module is None:
        return None
    try:
        with only_last(module, FEWEST // 2):
            same = _alike(decoder, _last_logits(decoder, rows), truth)
    except Exception as error:  # what a module says to fewer tokens, we cannot list
        if is_out_of_memory(error):
            raise
        return None
    return module if same else None


def _rows(ids: Sequence[int]) -> list[list[int]]:
    """Rows of different lengths, made of the tokens `ids`."""
    known = [*ids] * -(-(max(CUTS) + FEWEST) // len(ids))
    return [known[cut:] for cut in CUTS]


def _caches(decoder: Decoder, rows: list[list[int]]) -> bool:
    """Whether steps from the cache give what `generate` or a plain forward does, also after a row
    has left. Where a prompt's tokens see one another (PaliGemma) it is the first, where generating
    needs more than text (Kosmos) the second."""
    if not decoder.pads:
        rows = [row[-min(map(len, rows)) :] for row in rows]
    answers, logits = zip(*(_answer(decoder, row) for row in rows), strict=True)
    whole = [[*row, *answer] for row, answer in zip(rows, answers, strict=True)]
    ids, mask = decoder.padded(whole)
    places: Any = torch.arange(1, len(rows), device=ids.device)
    try:
        cache = DynamicCache(config=decoder.text_config)
        decoder.forward(ids[:, :-2], mask[:, :-2], 1, cache)
        decoder.forward(ids[:, -2:-1], mask[:, :-1], 1, cache)
        cache.reorder_cache(places)
        found = decoder.forward(ids[places, -1:], mask[places], 1, cache).logits[:, -1]
    except Exception as error:  # what a model says to a cache, we cannot list
        if is_out_of_memory(error):
            raise
        return False
    plain = torch.cat([_last_logits(decoder, [row]) for row in whole[1:]])
    return _alike(decoder, found, torch.cat(logits[1:])) or _alike(decoder, found, plain)


def _answer(decoder: Decoder, row: list[int]) -> tuple[list[int], Tensor]:
    """Two answer tokens of a prompt and the logits (1, V) after them, by the model's `generate`.

    Where it does not generate: the prompt's last two tokens again and a plain forward of all.
    """
    ids, mask = decoder.padded([row])
    try:
        made = decoder.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3,
            do_sample=False, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        return made.sequences[0, len(row) : len(row) + 2].tolist(), made.logits[2]
    except Exception as error:  # what a model says to generate's arguments, we cannot list
        if is_out_of_memory(error):
            raise
    return row[-2:], _last_logits(decoder, [row + row[-2:]])


def _last_logits(decoder: Decoder, rows: list[list[int]]) -> Tensor:
    """The next token's logits (rows, V) by one forward without a cache."""
    ids, mask = decoder.padded(rows)
    logits: Tensor = decoder.forward(ids, mask, 1).logits[:, -1]
    return logits


def _alike(decoder: Decoder, found: Tensor, truth: Tensor) -> bool:
    """Whether most rows (·, V) are equal up to rounding; a constant in a row means nothing."""
    one, other = (side.float() - side.float().mean(-1, keepdim=True) for side in (found, truth))
    errors = (one - other).norm(dim=-1) / other.norm(dim=-1).clamp_min(1e-30)
    packed = getattr(decoder.model, "is_quantized", False)
    exact = decoder.model.dtype in (torch.float32, torch.float64) and not packed
    return bool(errors.nan_to_num(torch.inf).median() <= (EXACT if exact else ROUNDED))
