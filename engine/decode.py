"""Greedy decoding of many prompts, each row of a batch with an edit of its own.

The slow twin is `model.generate(do_sample=False)` on really replaced weights: the same tokens, row
for row. What is faster here: rows that have ended or whose outcome is decided leave the batch and
the key-value cache, candidates share the batch, earlier answers are drafts of new ones
(`engine.drafts`), and nothing waits for the device between checks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from traceback import clear_frames
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from engine.choice import Choice, end_tokens
from engine.drafts import Drafts
from engine.errors import EngineError
from engine.lanes import MOST
from engine.loading.placement import input_device
from engine.lower import Lower, Studied
from engine.memory import (
    Shape,
    decode_row,
    fitting_rows,
    free_bytes,
    is_out_of_memory,
    release,
)
from engine.report import Report
from engine.rounds import NOTHING, Answer, Plan, Row, decode
from engine.shared import ORIGINAL

if TYPE_CHECKING:
    from engine.edit import Edit
    from engine.patch import Patch
    from engine.shared import Beginning

__all__ = ["NOTHING", "ORIGINAL", "Answer", "Decoder", "Row"]

REPLACEMENT = "\ufffd"  # what a tokenizer writes for bytes that are no character
LONGEST_CHARACTER = 4  # bytes of UTF-8
OVERHEAD = {"cpu": 64, "cuda": 512}  # cost of one forward beside its tokens, in tokens


class Decoder:
    """A loaded model that answers. `patch` is None for a model that is scored as it is.

    decoder = Decoder(model, tokenizer, patch)
    decoder.reserve(prompt=80, new=100)         # batch_size from free memory
    decoder.answers([Row(ids)], [], 100, Silent(), "answers")

    opening   tokens of the response prefix that belong to the answer's text
    limit     rows at once at most; halved for good when memory runs out
    pads      whether rows of different lengths may share a batch (`engine.shortcuts`)
    caches    whether a step reads the newest token alone; else all tokens again
    mixes     whether what a row says depends on what shares its batch: LLM.int8 picks its outliers
              over all of it, so that only plain decoding gives the same answers again
    shares    whether what prompts share may be read once, and the rest apart (`engine.shared`)
    drafts    earlier answers, of which new ones are made faster; None where the model bears none
    lower     what the original computes below an edit, kept; None where the model does not bear it
    ending    the last block's feed-forward, where it may read the head's tokens alone
    sharing   decoders that score side by side, which share the free memory
    cached_layers   layers of the cache that the model fills, as far as is known
    begun     what the last batch began with, kept for the next one; None where nothing is kept
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
        self.shares = False
        self.mixes = bool(getattr(model, "is_loaded_in_8bit", False))
        self.drafts: Drafts | None = None
        self.lower: Lower | None = None
        self.ending: nn.Module | None = None
        self.sharing = 1
        self.begun: list[Beginning] | None = None
        self.cached_layers = 0
        self.device = input_device(model)
        self.overhead = OVERHEAD.get(self.device.type, OVERHEAD["cpu"])
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
        free = free_bytes(self.device) // self.lanes
        fit = fitting_rows(free, decode_row(shape, prompt, new), self.device)
        self.batch_size = min(fit, self.limit or fit) if self.pads else 1
        return self.batch_size

    @property
    def lanes(self) -> int:
        """How many candidates may be scored side by side, a process each (`engine.lanes`): on a
        CPU, where no edit rewrites weights."""
        if self.device.type != "cpu" or self.mixes or self.patch is None or not self.patch.batches:
            return 1
        return min(MOST, torch.get_num_threads())

    def group(self, prompts: int) -> int:
        """How many candidates with so many prompts each share their batches: as many as fit; one
        where each has a lane, or answers as it does alone only if it is alone."""
        patch = self.patch
        if self.lanes > 1 or self.mixes or (patch is not None and not patch.batches):
            return 1
        return max(1, self.batch_size // max(1, prompts))

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
        on_answer: Callable[[int, Answer], None] | None = None,
        needless: Callable[[int], bool] | None = None,
    ) -> list[Answer]:
        """The answers to `rows`, in their order.

        decided(text so far)      true: the row leaves the batch, its answer is cut there
        on_text(index, text)      the text so far of row `index`, every few tokens
        on_answer(index, answer)  the answer of row `index`, as soon as it is known
        needless(index)           true: the row leaves the batch, its answer is NOTHING
        """
        found: dict[int, Answer] = {}

        def finish(index: int, answer: Answer) -> None:
            found[index] = answer
            if on_text is not None:
                on_text(index, answer.text)
            if on_answer is not None and answer is not NOTHING:
                on_answer(index, answer)

        plan = Plan(max_new_tokens, decided, on_text, finish, needless)
        order = sorted(range(len(rows)), key=lambda index: (len(rows[index].ids), index))
        while order:
            batch = order[-self.batch_size :]  # the longest first: if memory runs out, it does now
            with self.surviving(len(batch)):
                for _ in decode(self, rows, batch, edits, plan):
                    report.progress(phase, len(found), len(rows))
            order = [index for index in order if index not in found]
        report.progress(phase, len(rows), len(rows))
        self.select([], [])  # no edit stays behind
        return [found[index] for index in range(len(rows))]

    @contextmanager
    def keeping_beginnings(self) -> Iterator[None]:
        """Within the block a batch may begin with what an earlier one began with."""
        self.begun = []
        try:
            yield
        finally:
            self.begun = None
            self.select([], [])  # no edit stays behind

    def shrink(self, limit: int | None) -> None:
        """Take over the `limit` of another decoder of this model that ran out of memory."""
        if limit is not None and (self.limit is None or limit < self.limit):
            self.limit, self.batch_size = limit, min(self.batch_size, limit)
            release()  # it runs out here, too, if we keep what we do not use

    def learn(
        self,
        rows: Sequence[Row],
        answers: Sequence[Answer],
        read: Sequence[list[int]],
        report: Report,
    ) -> None:
        """Let these answers be drafts of later ones, and keep what the original computes over them
        and over what else was `read`, where both will come again."""
        self.note(rows, answers, read)
        self.study_and_keep(report)

    def study_and_keep(self, report: Report) -> None:
        """The part of `learn` that takes time."""
        for studied in self.study(report):
            self.keep(studied)
        self.keep(None)

    def note(
        self, rows: Sequence[Row], answers: Sequence[Answer], read: Sequence[list[int]]
    ) -> None:
        """The part of `learn` that takes no time."""
        known = list(read)
        if self.drafts is not None:
            for row, answer in zip(rows, answers, strict=True):
                if answer is not NOTHING:
                    known.append(row.ids + self.drafts.learn(row.ids, answer.whole))
            self.drafts.settle()
        if self.lower is not None and known:
            self.lower.note(known)

    def study(self, report: Report) -> Iterator[Studied]:
        """What the original computes over sequences that were noted and will come again."""
        return iter(()) if self.lower is None else self.lower.study(self, report)

    def keep(self, studied: Studied | None) -> None:
        """Keep what was studied of what was noted, here or in a copy that noted the same; None
        after the last."""
        if self.lower is not None:
            self.lower.keep(studied)

    def original_batches(
        self,
        inputs: Sequence[list[int]],
        read: Callable[[list[int], Tensor, Tensor], None],
        report: Report,
        phase: str,
    ) -> None:
        """Read all of `inputs` with the original, the longest first, as many at once as fit.

        read(places in `inputs`, ids, mask)   one batch; again in smaller ones if memory runs out
        """
        order = sorted(range(len(inputs)), key=lambda place: -len(inputs[place]))
        done = 0
        while done < len(order):
            batch = order[done : done + self.batch_size]
            with self.surviving(len(batch)):
                self.select([], [])
                read(batch, *self.padded([inputs[place] for place in batch]))
                done += len(batch)
            report.progress(phase, done, len(order))

    def together(self, lengths: Sequence[int], most: int) -> int:
        """How many of the rows to read at once, at most `most`, so that padding and the overhead of
        a forward cost least; `lengths` of all that wait, the longest first."""
        useful = list(accumulate(lengths[:most]))
        cost = [lengths[0] * n + self.overhead for n in range(1, len(useful) + 1)]
        return 1 + min(range(len(useful)), key=lambda k: cost[k] / useful[k])

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
            clear_frames(error.__traceback__)  # the caller's `with` holds on to the failed batch
            release()

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
        if not tokens:
            return []
        decoded = self.tokenizer.batch_decode(
            tokens, skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )
        return list(decoded)

    def stride(self, step: int) -> int:
        """Tokens between two checks: a check costs a wait for the device and a detokenisation."""
        if self.device.type == "cpu":
            return 2
        return 4 if step <= 64 else 16
