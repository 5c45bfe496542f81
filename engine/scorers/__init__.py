"""From an edited model to numbers: refusals of harmful prompts, KL on harmless ones.

`RoleSet` holds a role's prompts and what the original does with them; `score` scores any number of
edits on it. The same function scores an exported artifact, which has no edits (`engine.measure`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.decode import NOTHING, ORIGINAL, Answer, Decoder, Row
from engine.lanes import Lanes
from engine.report import Report
from engine.scorers import screen
from engine.scorers.further import Further, measured
from engine.scorers.kl import Divergence, Reference, divergences
from engine.scorers.refusals import Refusals
from jobs.spec.protocol import Scored
from jobs.spec.scorers import ScorerName
from jobs.spec.scores import Outcome, Role, Scores, Value

if TYPE_CHECKING:
    from engine.edit import Edit


@dataclass(frozen=True)
class RoleSet:
    """The prompts of one role as token ids, and the original on the harmless ones.

    `reference` is None where the role has no harmless prompts (over_refusal); `first` is that of
    the first answer token alone, for the role `search`. `lengths` are the tokens of the original's
    answers to `harmless`, where they are wanted.
    """

    role: Role
    harmful: list[list[int]]
    reference: Reference | None
    harmless: list[list[int]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    first: Reference | None = None


@dataclass(frozen=True)
class Asked:
    """What is wanted of each edit.

    new       tokens of an answer at most
    early     stop an answer as soon as it is certainly a refusal; its text is cut there
    multi     the KL over several tokens, too
    names     scores besides refusals and KL, of which `further` knows what they need
    finished  objectives of finished trials: an edit that one of them dominates whatever it answers
              is not decoded, or no longer (`engine.scorers.screen`)
    """

    new: int
    early: bool = True
    multi: bool = True
    names: Sequence[ScorerName] = ()
    further: Further = field(default_factory=Further)
    finished: Sequence[screen.Objectives] = ()


@dataclass(frozen=True)
class Share:
    """Edits that share their batches of at most `rows` rows, for a role's prompts."""

    role: Role
    edits: Sequence[Edit]
    asked: Asked
    rows: int


@dataclass(frozen=True)
class Found:
    """What scoring a share gave, and what can be learned from it for others.

    rows, answers   what was decoded, of those rows that were
    read            what else was read, in full
    limit           the decoder's, which is smaller after memory ran out
    """

    scored: list[Scored]
    rows: list[Row]
    answers: list[Answer]
    read: list[list[int]]
    limit: int | None


def score(
    decoder: Decoder,
    prompts: RoleSet,
    edits: Sequence[Edit],
    refusals: Refusals,
    asked: Asked,
    report: Report,
    on_scored: Callable[[int, Scored], None] | None = None,
    lanes: Lanes[Share, Found] | None = None,
    more: Callable[[], list[tuple[Sequence[Edit], Asked]]] = list,
) -> list[Scored]:
    """The scores of each of `edits`; of the model as it is (one) where there are none.

    on_scored   called with the place of an edit and its scores as soon as they are known
    lanes       processes of `score_share`, which tell one another what they found
    more        asked for further edits, whose places follow, before it runs out of them
    """
    scored: dict[int, Scored] = {}
    waiting = deque(_shares(decoder, prompts, edits, asked))
    begun: list[range] = []  # places of the edits of each share

    def following() -> Share | None:
        for added, wanted in more():
            waiting.extend(_shares(decoder, prompts, added, wanted))
        if not waiting:
            return None
        share = waiting.popleft()
        start = begun[-1].stop if begun else 0
        begun.append(range(start, start + max(1, len(share.edits))))
        return share

    def done(number: int, found: Found) -> None:
        decoder.shrink(found.limit)
        for place, one in zip(begun[number], found.scored, strict=True):
            if place < max(1, len(edits)):
                scored[place] = one
            if on_scored is not None:
                on_scored(place, one)

    if lanes is not None:
        lanes.run(following, report, done)
    while lanes is None and (share := following()) is not None:
        found = score_share(decoder, prompts, share, refusals, report)
        note(decoder, found)
        decoder.study_and_keep(report)
        done(len(begun) - 1, found)
    return [scored[place] for place in sorted(scored)]


def _shares(decoder: Decoder, prompts: RoleSet, edits: Sequence[Edit], asked: Asked) -> list[Share]:
    """Edits by what shares batches."""
    size = decoder.group(len(prompts.harmful))
    return [
        Share(prompts.role, edits[at : at + size], asked, decoder.batch_size)
        for at in range(0, max(1, len(edits)), size)
    ]


def note(decoder: Decoder, found: Found) -> None:
    """Let later shares of this decoder be faster by what was found for one: the part of it that
    takes no time, before `Decoder.study_and_keep`."""
    decoder.shrink(found.limit)
    decoder.note(found.rows, found.answers, found.read)


def score_share(
    decoder: Decoder, prompts: RoleSet, share: Share, refusals: Refusals, report: Report
) -> Found:
    """Score edits that share their batches: first what one forward gives, then the answers."""
    begun = time.monotonic()
    edits, asked = share.edits, share.asked
    decoder.batch_size = min(share.rows, decoder.limit or share.rows)
    with decoder.keeping_beginnings():
        reference = prompts.reference if asked.multi else prompts.first or prompts.reference
        moved: Sequence[Divergence | None] = [None] * max(1, len(edits))
        if reference is not None:
            moved = divergences(decoder, reference, edits, report, "divergence")

        each_edit: Sequence[Edit | None] = edits or [None]
        values: list[dict[str, Value]] = [
            measured(asked.names, decoder, prompts, asked.further, edit, asked.new, report)
            for edit in each_edit
        ]
        each = len(prompts.harmful)
        bounds: list[int | None] = [None] * len(moved)
        for place, divergence in enumerate(moved if asked.finished else ()):
            cheap = {name: value.value for name, value in values[place].items()}
            if divergence is not None:
                cheap |= {"kl_first": divergence.first, "kl_multi": divergence.multi}
            bounds[place] = screen.bound(cheap, asked.finished, each)
        race = screen.Race(bounds, each)
        numbers = range(len(edits)) if edits else [ORIGINAL]
        rows = [Row(ids, number) for number in numbers for ids in prompts.harmful]
        answers = decoder.answers(
            rows, edits, asked.new, report, "answers", refusals.decided if asked.early else None,
            on_answer=lambda row, answer: race.count(row, refusals.is_refusal(answer.text)),
            needless=race.lost if asked.finished else None,
        )  # fmt: skip

    seconds = (time.monotonic() - begun) / len(moved)
    scored = []
    for place, divergence in enumerate(moved):
        mine = answers[place * each : (place + 1) * each]
        one = count(prompts.role, mine, divergence, refusals, seconds)
        one.scores.values = values[place]
        if not asked.multi:
            one.scores.kl_multi = None
        scored.append(one)
    read = [] if reference is None or not edits else reference.inputs
    given = [place for place, answer in enumerate(answers) if answer is not NOTHING]
    return Found(
        scored, [rows[place] for place in given], [answers[place] for place in given], read,
        decoder.limit,
    )  # fmt: skip


def count(
    role: Role,
    answers: Sequence[Answer],
    divergence: Divergence | None,
    refusals: Refusals,
    seconds: float = 0.0,
) -> Scored:
    """The scores of one model from its answers to the role's prompts, those that were given."""
    outcomes = [
        Outcome(
            refused=answer is not NOTHING and refusals.is_refusal(answer.text),
            text=answer.text,
            tokens=len(answer.tokens),
            answered=answer is not NOTHING,
        )
        for answer in answers
    ]
    given = [outcome for outcome in outcomes if outcome.answered]
    scores = Scores(
        role=role,
        refusals=sum(outcome.refused for outcome in given),
        total=len(given),
        kl_first=None if divergence is None else divergence.first,
        kl_multi=None if divergence is None else divergence.multi,
        mean_tokens=sum(outcome.tokens for outcome in given) / max(1, len(given)),
    )
    screened = len(given) < len(outcomes)
    return Scored(scores=scores, outcomes=outcomes, seconds=seconds, screened=screened)
