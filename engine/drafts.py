"""Answers of earlier candidates as drafts of the next ones.

Most candidates answer a prompt as some earlier one did, for a while at least. What it answered is
put behind the prompt and read in one forward, and the longest part that greedy decoding would have
written as well is kept: speculative decoding (Leviathan et al. 2023, arXiv 2211.17192) whose draft
costs nothing. The tokens are those of decoding one by one; only the number of forwards is smaller.
"""

from __future__ import annotations

from collections.abc import Sequence

KEPT = 8  # answers remembered per prompt
TAIL = 3  # tokens by which a place is found again in an answer that began otherwise
FIRST = 4  # tokens of a row's first draft, as long as nothing is known of how right drafts are
LONGEST = 64

Prompt = tuple[int, ...]


class Drafts:
    """The latest different answers to each prompt.

    drafts.learn([5, 6, 7], [1, 2, 3, 4])
    drafts.settle()
    drafts.after([5, 6, 7], [1, 2], most=8)     # [3, 4]

    first   tokens of a row's first draft: half of what was right in a row of late
    """

    def __init__(self) -> None:
        self._known: dict[Prompt, list[list[int]]] = {}
        self._right = self._wrong = 0
        self.first = FIRST

    def learn(self, prompt: Sequence[int], answer: list[int]) -> list[int]:
        """Remember an answer, its end token included where it ended by itself.

        Gives it back, or the longer one that is known and begins with it.
        """
        known = self._known.setdefault(tuple(prompt), [])
        right = max((_alike(one, answer) for one in known), default=0)
        self._right += right
        self._wrong += right < len(answer)
        longer = [one for one in known if one[: len(answer)] == answer]
        # One that begins like this answer says no more than it.
        known[:] = [one for one in known if one not in longer and one != answer[: len(one)]]
        known.append(longer[-1] if longer else answer)
        del known[:-KEPT]
        return known[-1]

    def settle(self) -> None:
        """Say that all answers of some candidates have been learned."""
        self.first = max(FIRST, min(LONGEST, self._right // (2 * (self._wrong + 1))))
        self._right = self._wrong = 0

    def known(self, prompt: Sequence[int]) -> list[list[int]]:
        """The remembered answers, the latest last."""
        return self._known.get(tuple(prompt), [])

    def after(self, prompt: Sequence[int], answer: list[int], most: int) -> list[int]:
        """What probably follows `answer` so far: at most `most` tokens, perhaps none.

        The latest answer that begins alike counts; else what stood behind the same few tokens.
        """
        known = self.known(prompt)
        here = len(answer)
        for one in reversed(known):
            if len(one) > here and one[:here] == answer:
                return one[here : here + most]
        tail = answer[-TAIL:]
        for one in reversed(known) if len(tail) == TAIL else ():
            for place in range(len(one) - TAIL):
                if one[place : place + TAIL] == tail:
                    return one[place + TAIL : place + TAIL + most]
        return []


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two answers have in common before they differ."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def worthwhile(lengths: Sequence[int], overhead: int) -> int:
    """How many drafted tokens to read at once, if rows have drafts of `lengths` tokens.

    One forward of 1 + k tokens a row costs rows·(1 + k) + overhead, and brings each row its own
    draft and one token more, if the drafts are right: k with the most tokens for the cost. 0 means
    plain steps.

    overhead   what a forward costs beside its tokens, in tokens
    """

    def gain(k: int) -> float:
        brought = sum(min(length, k) + 1 for length in lengths)
        return brought / (len(lengths) * (1 + k) + overhead)

    return max([0, *sorted(set(lengths))], key=gain)
