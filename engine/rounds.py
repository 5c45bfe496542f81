"""One batch of rows, decoded round by round: read on, look at the answers, let go who is done."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.batch import Batch
from engine.choice import until
from engine.drafts import FIRST, LONGEST, worthwhile
from engine.shared import ORIGINAL

if TYPE_CHECKING:
    from engine.decode import Decoder
    from engine.edit import Edit
    from engine.lower import States

DROP_SHARE = 1 / 16  # finished rows are dropped once they are this share of the batch


@dataclass(frozen=True)
class Row:
    """One prompt to answer: its token ids, and the place of its edit in the list of edits."""

    ids: list[int]
    edit: int = ORIGINAL


@dataclass
class Answer:
    """What the model answered: tokens without the end token, and whether it ended by itself.

    whole   the tokens with the end token
    """

    tokens: list[int]
    text: str
    ended: bool
    whole: list[int] = field(default_factory=list)


NOTHING = Answer([], "", False)  # of a row whose answer is no longer needed


@dataclass(frozen=True)
class Plan:
    """What is asked of all rows alike; see `Decoder.answers`. `most`: tokens of an answer."""

    most: int
    decided: Callable[[str], bool] | None
    on_text: Callable[[int, str], None] | None
    finish: Callable[[int, Answer], None]
    needless: Callable[[int], bool] | None = None


@dataclass(eq=False)
class _Live:
    """A row that is being decoded.

    checked  the length up to which its answer was read
    trust    how long a draft it is given
    known    the earlier answers whose states are kept, and those: while its own begins like one
    """

    index: int
    row: Row
    known: list[tuple[list[int], States]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    checked: int = 0
    done: bool = False
    trust: int = FIRST

    def narrow(self) -> None:
        """Forget the answers that its own is not a beginning of."""
        here = len(self.tokens)
        self.known = [
            pair for pair in self.known if len(pair[0]) > here and pair[0][:here] == self.tokens
        ]

    def learn(self, right: int, drafted: int) -> None:
        """Twice as long a draft after one that was right, else as long as what was right."""
        if drafted:
            self.trust = min(LONGEST, 2 * self.trust) if right == drafted else max(2, right)


def decode(
    decoder: Decoder, rows: Sequence[Row], numbers: list[int], edits: Sequence[Edit], plan: Plan
) -> Iterator[None]:
    """Decode the rows numbered `numbers`, yielding after every round.

    First those of which an earlier answer and the original's states over it are known, as long as
    they give that answer; then the others.
    """
    first = FIRST if decoder.drafts is None else decoder.drafts.first
    live = [_Live(index, rows[index], trust=first) for index in numbers]
    _leave(live, plan)
    live = [one for one in live if not one.done]
    if station := _know(decoder, live, edits, plan):
        known = [one for one in live if one.known]
        yield from _rounds(decoder, known, edits, plan, station)
    yield from _rounds(decoder, [one for one in live if not one.done], edits, plan)


def _know(decoder: Decoder, live: list[_Live], edits: Sequence[Edit], plan: Plan) -> int:
    """Find earlier answers over which the original's states are kept; the block at which forwards
    over them may begin, 0 where nothing is saved."""
    if decoder.lower is None or decoder.drafts is None or plan.on_text is not None:
        return 0
    used = {one.row.edit for one in live} - {ORIGINAL}
    station = decoder.lower.station([edits[edit] for edit in used])
    for one in live if station else ():
        for answer in reversed(decoder.drafts.known(one.row.ids)):
            states = decoder.lower.states([*one.row.ids, *answer], station)
            if states is not None:
                one.known.append((answer, states))
    return station


def _rounds(
    decoder: Decoder, live: list[_Live], edits: Sequence[Edit], plan: Plan, station: int = 0
) -> Iterator[None]:
    """Decode these rows together until they are done; with a station, those whose answer is no
    longer known are left as they are."""
    if not live:
        return
    edits, numbers = _used(edits, [one.row.edit for one in live])
    decoder.select(edits, numbers)
    # Who reads along wants the text token by token.
    drafting = decoder.drafts is not None and plan.on_text is None
    prompts, tokens = [one.row.ids for one in live], [one.tokens for one in live]
    batch = Batch(decoder, prompts, tokens, plan.most, drafting, station)
    if station and not batch.drafts:
        return
    inputs = [one.row.ids + one.tokens for one in live]
    batch.read(inputs, edits, numbers, [one.known[0][1] for one in live] if station else [])
    while live:
        # 1. some tokens more
        _read_on(decoder, batch, live, plan, station)
        # 2. which rows have ended or are decided?
        for one, answer, over in _checked(decoder, live, plan):
            if over:
                one.done = True
                plan.finish(one.index, answer)
            elif plan.on_text is not None:
                plan.on_text(one.index, answer.text)
        _leave(live, plan)
        yield
        # 3. they leave the batch, the cache and the patch
        if station:
            for one in live:
                one.narrow()
        kept = [k for k, one in enumerate(live) if not one.done and (one.known or not station)]
        gone = len(live) - len(kept)
        if not kept or gone >= DROP_SHARE * len(live) or (station and gone):
            live = [live[k] for k in kept]
            if live:
                batch.keep(kept)


def _read_on(decoder: Decoder, batch: Batch, live: list[_Live], plan: Plan, station: int) -> None:
    """Give every row some tokens: what was answered earlier to its prompt, as far as it would
    answer that too; or step by step."""
    drafts = _drafts(decoder, live, plan) if batch.drafts else []
    if drafts or station:
        drafts = drafts or [[] for _ in live]
        had = [len(one.tokens) for one in live]
        batch.verify(drafts, [one.known[0][1] for one in live] if station else [])
        for one, draft, before in zip(live, drafts, had, strict=True):
            one.learn(len(one.tokens) - before - 1, len(draft))
        return
    fewest = min(len(one.tokens) for one in live if not one.done)
    steps = decoder.stride(fewest + 1) if fewest or not batch.drafts else 1
    batch.step(min(steps, plan.most - fewest))


def _drafts(decoder: Decoder, live: list[_Live], plan: Plan) -> list[list[int]]:
    """A draft for each row of the batch; none at all where plain steps are cheaper.

    None before the first token, too: it tells best which answer this will be.
    """
    if decoder.drafts is None or not any(one.tokens for one in live):
        return []
    found = []
    for one in live:
        # One token less than are missing: verifying gives one more than the draft.
        here = len(one.tokens)
        most = 0 if one.done else max(0, min(one.trust, plan.most - here - 1))
        if one.known:
            found.append(one.known[0][0][here : here + most])
        else:
            found.append(decoder.drafts.after(one.row.ids, one.tokens, most))
    longest = worthwhile(list(map(len, found)), decoder.overhead)
    return [draft[:longest] for draft in found] if longest else []


def _leave(live: list[_Live], plan: Plan) -> None:
    """Let rows go whose answers are no longer needed."""
    for one in live if plan.needless is not None else ():
        if not one.done and plan.needless is not None and plan.needless(one.index):
            one.done = True
            plan.finish(one.index, NOTHING)


def _used(edits: Sequence[Edit], rows: list[int]) -> tuple[list[Edit], list[int]]:
    """Only those of `edits` that a batch uses, each of which costs memory in every writer; and the
    place among them of each row's."""
    used = sorted(set(rows) - {ORIGINAL})
    place = {edit: number for number, edit in enumerate(used)} | {ORIGINAL: ORIGINAL}
    return [edits[edit] for edit in used], [place[row] for row in rows]


def _checked(
    decoder: Decoder, live: list[_Live], plan: Plan
) -> Iterator[tuple[_Live, Answer, bool]]:
    """The rows that have come to a check: their answers so far, and whether they are over.

    An answer is checked at the same lengths however many tokens came at once, and cut at the first
    of them where it was over.
    """
    seen: list[tuple[_Live, list[int]]] = []
    for one in live:
        now = min(len(one.tokens), plan.most)
        checks = [] if one.done else _checks(decoder, one.checked, now, plan.most)
        if not one.done and checks[-1:] != [now] and one.tokens[now - 1] in decoder.ends:
            checks.append(now)  # nothing follows: the next check would see the same
        if checks:
            one.checked = checks[-1]
            seen.append((one, checks))
    last = _answers(decoder, [one.tokens[: checks[-1]] for one, checks in seen])
    for (one, checks), answer in zip(seen, last, strict=True):
        over = answer.ended or checks[-1] == plan.most
        if plan.decided is not None and plan.decided(answer.text):
            answer, over = _first(decoder, one.tokens, checks, plan.decided), True
        yield one, answer, over


def _first(
    decoder: Decoder, tokens: list[int], checks: list[int], decided: Callable[[str], bool]
) -> Answer:
    """The answer at the first of `checks` at which it was decided; at the last one it was, and what
    is decided stays so."""

    def at(check: int) -> Answer:
        return _answers(decoder, [tokens[:check]])[0]

    return at(checks[bisect_left(checks, True, key=lambda check: decided(at(check).text))])


def _checks(decoder: Decoder, before: int, now: int, most: int) -> list[int]:
    """The lengths after `before`, up to `now`, at which an answer of up to `most` is read."""
    return [n for n in range(before + 1, now + 1) if n == most or n % decoder.stride(n) == 0]


def _answers(decoder: Decoder, tokens: list[list[int]]) -> list[Answer]:
    """Tokens as answers, up to their end token, in one detokenisation."""
    cut = [until(one, decoder.ends) for one in tokens]
    texts = decoder.texts([decoder.opening + answer for answer, _ in cut])
    return [
        Answer(answer, text, ended, whole[: len(answer) + ended])
        for whole, (answer, ended), text in zip(tokens, cut, texts, strict=True)
    ]
