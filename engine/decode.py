"""Greedy decoding of many prompts, each row of a batch with an edit of its own.

The slow twin is `model.generate(do_sample=False)` on really replaced weights: the same tokens, row
for row. What is faster here: rows that have ended or whose outcome is decided leave the batch and
the key-value cache, candidates share the batch, and nothing waits for the device between checks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from engine.choice import Choice, end_tokens, until
from engine.errors import EngineError
from engine.loading.placement import input_device
from engine.memory import (
    Shape,
    decode_row,
    fitting_rows,
    free_bytes,
    is_out_of_memory,
    release,
)
from engine.report import Report

if TYPE_CHECKING:
    from engine.edit import Edit
    from engine.patch import Patch

ORIGINAL = -1  # a row's edit: none
DROP_SHARE = 1 / 16  # finished rows are dropped once they are this share of the batch
REPLACEMENT = "\ufffd"  # what a tokenizer writes for bytes that are no character
LONGEST_CHARACTER = 4  # bytes of UTF-8


@dataclass(frozen=True)
class Row:
    """One prompt to answer: its token ids, and the place of its edit in the list of edits."""

    ids: list[int]
    edit: int = ORIGINAL


@dataclass
class Answer:
    """What the model answered: tokens without the end token, and whether it ended by itself."""

    tokens: list[int]
    text: str
    ended: bool


class Decoder:
    """A loaded model that answers. `patch` is None for a model that is scored as it is.

    decoder = Decoder(model, tokenizer, patch)
    decoder.reserve(prompt=80, new=100)         # batch_size from free memory
    decoder.answers([Row(ids)], [], 100, Silent(), "answers")

    opening   tokens of the response prefix that belong to the answer's text
    limit     rows at once at most; halved for good when memory runs out
    pads      whether rows of different lengths may share a batch (`engine.shortcuts`)
    caches    whether a step reads the newest token alone; else all tokens again
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        patch: Patch | None,
        opening: Sequence[int] = (),
        limit: int | None = None,
    ) -> None:
        self.model, self.tokenizer, self.patch = model, tokenizer, patch
        self.opening = list(opening)
        self.batch_size = 1
        self.limit = limit
        self.pads = self.caches = True
        self.device = input_device(model)
        known = inspect.signature(model.forward).parameters
        self._takes = {n for n in ("position_ids", "logits_to_keep") if n in known}
        self._cache_name = "cache_params" if "cache_params" in known else "past_key_values"
        self.text_config = model.config.get_text_config(decoder=True)
        self.choice = Choice.of(model.generation_config)
        self.ends = end_tokens(model, tokenizer)
        pad = tokenizer.pad_token_id
        self.pad = int(pad) if pad is not None else min(self.ends, default=0)

    def reserve(self, prompt: int, new: int) -> int:
        """Set `batch_size` for prompts of up to `prompt` tokens and `new` tokens of answer."""
        shape = Shape.of(self.model.config, self.model.dtype.itemsize)
        fit = fitting_rows(free_bytes(self.device), decode_row(shape, prompt, new), self.device)
        self.batch_size = min(fit, self.limit or fit) if self.pads else 1
        return self.batch_size

    @torch.inference_mode()
    def answers(
        self,
        rows: Sequence[Row],
        edits: Sequence[Edit],
        max_new_tokens: int,
        report: Report,
        phase: str,
        decided: Callable[[str], bool] | None = None,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Answer]:
        """The answers to `rows`, in their order.

        decided(text so far)   true: the row leaves the batch, its answer is cut there
        on_text(index, text)   the text so far of row `index`, every few tokens
        """
        found: dict[int, Answer] = {}

        def finish(index: int, answer: Answer) -> None:
            found[index] = answer
            if on_text is not None:
                on_text(index, answer.text)

        order = sorted(range(len(rows)), key=lambda index: (len(rows[index].ids), index))
        while order:
            batch = order[-self.batch_size :]  # the longest first: if memory runs out, it does now
            with self.surviving(len(batch)):
                steps = self._batch(rows, batch, edits, max_new_tokens, decided, on_text, finish)
                for _ in steps:
                    report.progress(phase, len(found), len(rows))
            order = [index for index in order if index not in found]
        report.progress(phase, len(rows), len(rows))
        self.select([], [])  # no edit stays behind
        return [found[index] for index in range(len(rows))]

    @contextmanager
    def surviving(self, rows: int) -> Iterator[None]:
        """Halve the batch size when memory runs out over `rows` rows; the caller tries again.

        Raises EngineError("out_of_memory") when not even one row fits.
        """
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if rows <= 1:
                raise EngineError(
                    "out_of_memory",
                    f"not even one prompt fits into memory beside the model: {error}",
                    "Choose bnb_4bit, fewer answer tokens or shorter prompts.",
                ) from error
            self.batch_size = self.limit = max(1, rows // 2)
        else:
            return
        release()  # outside of the handler: the traceback held the tensors of the failed batch

    def select(self, edits: Sequence[Edit], rows: list[int]) -> None:
        """Let the next forwards use `edits[rows[b]]` for batch row b; no rows: the original."""
        if self.patch is None:
            return
        if all(row == ORIGINAL for row in rows):
            self.patch.clear()
        elif len(edits) == 1 and ORIGINAL not in rows:
            self.patch.select(list(edits), None)
        else:
            self.patch.select(list(edits), torch.tensor(rows, device=self.device))

    @contextmanager
    def edited(self, edit: Edit | None) -> Iterator[None]:
        """Within the block every row of all forwards uses `edit`; None: the original."""
        self.select([] if edit is None else [edit], [ORIGINAL if edit is None else 0])
        try:
            yield
        finally:
            self.select([], [])  # no edit stays behind

    def padded(self, inputs: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, (rows, longest), int64, padded on the left, on the model's device."""
        width = max(map(len, inputs))
        ids = torch.tensor([[self.pad] * (width - len(row)) + row for row in inputs])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in inputs])
        return ids.to(self.device), mask.to(self.device)

    def forward(self, ids: Tensor, mask: Tensor, keep: int, cache: Any = None) -> Any:
        """One forward of `ids` (rows, t) under `mask` (rows, t and what the cache holds).

        Logits of the last `keep` positions where the model can be asked for them, else of all.
        """
        more: dict[str, Any] = {"use_cache": cache is not None}
        if cache is not None:
            more[self._cache_name] = cache
        # Mamba's own kind of cache wants the mask of the new tokens alone.
        seen = mask if self._cache_name == "past_key_values" else mask[:, -ids.shape[1] :]
        if "position_ids" in self._takes:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            more["position_ids"] = positions[:, -ids.shape[1] :]
        if "logits_to_keep" in self._takes:
            more["logits_to_keep"] = keep
        return self.model(input_ids=ids, attention_mask=seen, **more)

    def _batch(
        self,
        rows: Sequence[Row],
        batch: list[int],
        edits: Sequence[Edit],
        max_new_tokens: int,
        decided: Callable[[str], bool] | None,
        on_text: Callable[[int, str], None] | None,
        finish: Callable[[int, Answer], None],
    ) -> Iterator[None]:
        """Decode the rows numbered `batch`, yielding after every check."""
        # 1. the prompts: one forward fills the cache and gives the first token's logits
        live, done = list(batch), set[int]()
        ids, mask = self.padded([rows[index].ids for index in live])
        self._select_used(edits, [rows[index].edit for index in live])
        choose = self.choice.start(ids, mask, self.text_config.vocab_size)
        cache: Any = DynamicCache(config=self.text_config) if self.caches else None
        output = self.forward(ids, mask, 1, cache)

        tokens: dict[int, list[int]] = {index: [] for index in live}
        fresh: list[Tensor] = []
        for step in range(1, max_new_tokens + 1):
            # 2. the next token of every row, left on the device
            newest = choose(output.logits[:, -1, :])
            fresh.append(newest)
            last = step == max_new_tokens
            if last or step % self._stride(step) == 0:
                # 3. every few tokens: which rows have ended or are decided?
                for index, new in zip(live, torch.stack(fresh, dim=1).tolist(), strict=True):
                    tokens[index] += new
                fresh = []
                for index, answer in self._read(live, done, tokens):
                    if answer.ended or last or (decided is not None and decided(answer.text)):
                        done.add(index)
                        finish(index, answer)
                    elif on_text is not None:
                        on_text(index, answer.text)
                yield
                # 4. finished rows leave the batch, the cache and the patch
                kept = [b for b, index in enumerate(live) if index not in done]
                if not kept:
                    return
                if len(live) - len(kept) >= DROP_SHARE * len(live):
                    live = [live[b] for b in kept]
                    places = torch.tensor(kept, device=self.device)
                    ids, newest, mask = ids[places], newest[places], mask[places]
                    if cache is not None:
                        cache.reorder_cache(places)  # an index_select: good for dropping rows too
                    choose.keep(places)
                    if self.patch is not None:
                        self.patch.keep(places)
            # 5. one forward of one token a row
            mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
            ids = newest[:, None] if self.caches else torch.cat([ids, newest[:, None]], dim=1)
            output = self.forward(ids, mask, 1, cache)

    def _select_used(self, edits: Sequence[Edit], rows: list[int]) -> None:
        """Select only those of `edits` that a batch uses: each costs memory in every writer."""
        used = sorted(set(rows) - {ORIGINAL})
        place = {edit: number for number, edit in enumerate(used)} | {ORIGINAL: ORIGINAL}
        self.select([edits[edit] for edit in used], [place[row] for row in rows])

    def _read(
        self, live: list[int], done: set[int], tokens: dict[int, list[int]]
    ) -> Iterator[tuple[int, Answer]]:
        """The answers so far of the rows that are not done, in one detokenisation."""
        open_rows = [index for index in live if index not in done]
        cut = [until(tokens[index], self.ends) for index in open_rows]
        texts = self.texts([self.opening + answer for answer, _ in cut])
        for index, (answer, ended), text in zip(open_rows, cut, texts, strict=True):
            yield index, Answer(answer, text, ended)

    def texts(self, tokens: list[list[int]], special: bool = False) -> list[str]:
        """The texts of several answers; `special` keeps special tokens in them.

        A character that is cut in two at the end is left out: a byte-fallback tokenizer turns the
        whole run of bytes before it into replacement characters, in Chinese the whole answer.
        """
        found = self._decoded(tokens, special)
        for place, text in enumerate(found):
            if text.endswith(REPLACEMENT):
                cuts = [tokens[place][:-cut] for cut in range(1, LONGEST_CHARACTER)]
                whole = [t for t in self._decoded(cuts, special) if not t.endswith(REPLACEMENT)]
                found[place] = whole[0] if whole else text
        return found

    def _decoded(self, tokens: list[list[int]], special: bool) -> list[str]:
        decoded = self.tokenizer.batch_decode(
            tokens, skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )
        return list(decoded)

    def _stride(self, step: int) -> int:
        """Tokens between two checks: a check costs a wait for the device and a detokenisation."""
        if self.device.type == "cpu":
            return 2
        return 4 if step <= 64 else 16
