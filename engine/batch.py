"""Rows that are decoded together: their cache, their mask, and the tokens they have so far."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from engine.head import entering_head, head_of
from engine.shared import begin, editable_cache, leave_empty, read_apart, rest
from jobs.spec.memory import DRAFT_CHUNK

if TYPE_CHECKING:
    from engine.decode import Decoder
    from engine.edit import Edit
    from engine.lower import States


class Batch:
    """Prompts that are answered at once.

    batch = Batch(decoder, prompts, [[], []], max_new_tokens, drafts=True)
    batch.step(2)                   # two tokens for every row, nothing waits for the device
    batch.verify([[5, 6], []])      # drafts of the rows, in one forward: 1 to 3 tokens each
    batch.keep([1])                 # the other rows leave
    batch.tokens                    # of the rows that are left

    Between two calls the cache holds all tokens but each row's newest, and perhaps columns of
    rejected drafts under a mask. Where forwards begin at a station it holds nothing of the blocks
    below: then each is a `verify` with the states there.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[list[int]],
        tokens: Sequence[list[int]],
        new: int,
        drafts: bool,
        station: int = 0,
    ) -> None:
        """
        tokens  what the rows have answered already; these lists grow
        new     tokens of an answer at most
        drafts  they may be verified, if the model bears it; see the attribute
        station block at which all forwards begin (`engine.lower`); nothing is answered yet then
        """
        self._decoder = decoder
        inputs = [ids + known for ids, known in zip(prompts, tokens, strict=True)]
        self._ids, self._mask = decoder.padded(inputs)
        vocabulary = decoder.text_config.vocab_size
        self._choose = decoder.choice.start(self._ids, self._mask, vocabulary)
        self._newest: Tensor | None = None
        self._cache: Any = DynamicCache(config=decoder.text_config) if decoder.caches else None
        self.drafts = drafts and decoder.choice.plain and self._editable(new)
        self.tokens = list(tokens)
        self._station = station
        self._skipped: list[Any] = []
        self._gaps = False  # columns of rejected drafts
        self._shared = 0  # tokens at the front of all rows that are in the cache already
        self._prompts = list(map(len, prompts))

    def read(
        self, inputs: Sequence[list[int]], edits: Sequence[Edit], numbers: Sequence[int],
        states: Sequence[States] = (),
    ) -> None:  # fmt: skip
        """Read of `inputs`, the rows' tokens so far, what is cheaper to read before the rest.

        Before anything else; `numbers`: the edit of each row, `states` as in `verify`.
        """
        if not self.drafts:
            return
        decoder, station = self._decoder, self._station
        apart = read_apart(decoder, inputs, edits, numbers, station, states)
        if apart is not None:
            read, self._mask = apart
            last = [row[-1] for row in inputs]
            self._newest = torch.tensor(last, dtype=self._ids.dtype, device=self._ids.device)
        else:
            most = min(map(len, inputs)) - 1
            begun = begin(decoder, inputs, edits, numbers, most, station, states)
            if begun is None:
                return
            read, self._shared = begun, begun.held
            self._ids, self._mask = rest(self._ids, self._mask, begun.held)
        self._cache, self._skipped = read.cache, read.skipped

    def step(self, steps: int) -> None:
        """`steps` tokens for every row, one forward each, left on the device until the last."""
        fresh = []
        for _ in range(steps):
            ids = self._open()
            output = self._decoder.forward(ids, self._mask, 1, self._cache)
            self._newest = self._choose(output.logits[:, -1, :])
            fresh.append(self._newest)
        for tokens, new in zip(self.tokens, torch.stack(fresh, dim=1).tolist(), strict=True):
            tokens += new

    def verify(self, drafts: Sequence[list[int]], states: Sequence[States] = ()) -> None:
        """Every row gets the tokens of its draft that it would have chosen, and one more.

        `states`: of each row what enters the station over its prompt, its tokens and its draft at
        least, (T, d).
        """
        ids, longest = self._open(), max(map(len, drafts))
        before = self._mask
        filled = [draft + [self._decoder.pad] * (longest - len(draft)) for draft in drafts]
        behind = torch.tensor(filled, dtype=ids.dtype, device=ids.device)
        ids = torch.cat([ids, behind], dim=1)
        mask = torch.cat([before, self._first([len(draft) for draft in drafts], longest)], dim=1)
        with self._skipping(ids.shape[1], longest, drafts, states):
            chosen = self._chosen(ids, mask, 1 + longest)

        right = []
        for tokens, draft, row in zip(self.tokens, drafts, chosen, strict=True):
            agreed = [a == b for a, b in zip(draft, row, strict=False)]
            right.append(agreed.index(False) if False in agreed else len(draft))
            tokens += row[: right[-1] + 1]
        newest = [row[count] for row, count in zip(chosen, right, strict=True)]
        self._newest = torch.tensor(newest, device=ids.device)
        self._mask = torch.cat([before, self._first(right, longest)], dim=1)
        self._gaps = min(right) < longest

    def keep(self, places: list[int]) -> None:
        """Keep only the rows at `places`, in this order."""
        self.tokens = [self.tokens[place] for place in places]
        self._prompts = [self._prompts[place] for place in places]
        index = torch.tensor(places, device=self._mask.device)
        self._ids, self._mask = self._ids[index], self._mask[index]
        if self._newest is not None:
            self._newest = self._newest[index]
        if self._cache is not None:
            self._cache.reorder_cache(index)  # an index_select: good for dropping rows too
        self._choose.keep(index)
        if self._decoder.patch is not None:
            self._decoder.patch.keep(index)

    def _open(self) -> Tensor:
        """What the next forward reads: the prompts, later the newest tokens (without a cache all
        tokens), whose columns are added to the mask."""
        if self._newest is None:
            return self._ids
        if self._gaps:  # now, when those who are done have left
            self._close_gaps()
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], dim=1)
        if self._cache is None:
            self._ids = torch.cat([self._ids, self._newest[:, None]], dim=1)
            return self._ids
        return self._newest[:, None]

    @contextmanager
    def _skipping(
        self, width: int, longest: int, drafts: Sequence[list[int]], states: Sequence[States]
    ) -> Iterator[None]:
        """Within the block the forward of `width` columns, the last `longest` of which are drafts,
        begins at the station, if there is one."""
        if not self._station:
            yield
            return
        assert self._decoder.lower is not None
        rows = []
        for whole, prompt, tokens, draft in zip(
            states, self._prompts, self.tokens, drafts, strict=True
        ):
            start = self._shared if self._newest is None else prompt + len(tokens) - 1
            part = whole[start : prompt + len(tokens) + len(draft)]
            behind = longest - len(draft)
            rows.append(pad(part, (0, 0, width - len(part) - behind, behind)))
        with self._decoder.lower.skipping(self._station, torch.stack(rows)):
            yield
        if self._newest is None and not self._shared:
            self._skipped = [layer for layer in self._cache.layers if not layer.is_initialized]
        leave_empty(self._skipped, len(rows), self._mask.shape[1] + longest, self._mask.device)

    def _editable(self, new: int) -> bool:
        """Whether tokens can be taken out of the cache: it holds keys and values of all of them."""
        plain = editable_cache(self._decoder, self._mask.shape[1] + 2 * new)
        if plain is not None:
            self._cache = plain
        return plain is not None

    def _first(self, counts: list[int], width: int) -> Tensor:
        """A mask (rows, width) of the first counts[b] columns of each row."""
        column = torch.arange(width, device=self._mask.device)
        return (column < torch.tensor(counts, device=column.device)[:, None]).to(self._mask.dtype)

    def _chosen(self, ids: Tensor, mask: Tensor, keep: int) -> list[list[int]]:
        """The most likely token after each of the last `keep` columns, (rows, keep).

        The head reads a chunk of them at a time: logits of all would be the memory peak.
        """
        decoder, seen = self._decoder, list[Tensor]()
        with entering_head(decoder.model, partial(_take, seen, keep)):
            decoder.forward(ids, mask, keep, self._cache)
        head, states = head_of(decoder.model), seen[0].flatten(0, 1)
        rows = max(1, DRAFT_CHUNK // decoder.text_config.vocab_size)
        # In 16 bits a CPU takes three times as long for it.
        chosen = [head(part).float().argmax(-1) for part in torch.split(states, rows)]
        found: list[list[int]] = torch.cat(chosen).view(len(ids), keep).tolist()
        return found

    def _close_gaps(self) -> None:
        """Take the columns of rejected drafts out of the cache: each row's own to its left."""
        self._gaps = False
        width = int(self._mask.sum(1).max())
        order = self._mask.argsort(dim=1, stable=True)[:, -width:]
        self._mask = self._mask.gather(1, order)
        for layer in self._cache.layers:
            if not layer.is_initialized:
                continue
            layer.keys, layer.values = (
                held.gather(2, order.to(held.device)[:, None, :, None].expand(
                    -1, held.shape[1], -1, held.shape[3]))
                for held in (layer.keys, layer.values)
            )  # fmt: skip


def _take(seen: list[Tensor], keep: int, states: Tensor) -> Tensor:
    """Take the last `keep` states; let the head compute one position only."""
    seen.append(states[:, -keep:])
    return states[:, -1:]
