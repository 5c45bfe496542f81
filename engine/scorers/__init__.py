"""From an edited model to numbers: refusals of harmful prompts, KL on harmless ones.

`RoleSet` holds a role's prompts and what the original does with them; `score` scores any number of
edits on it. The same function scores an exported artifact, which has no edits (`engine.measure`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.decode import NOTHING, ORIGINAL, Answer, Decoder, Row
from engine.lanes import side_by_side
from engine.report import Report
from engine.scorers import screen
from engine.scorers.further import Further, measured
from engine.scorers.kl import Divergence, Reference, divergences
from engine.scorers.refusals import Refusals
from jobs.spec.memory import CANDIDATES
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


def score(
    decoder: Decoder,
    prompts: RoleSet,
    edits: Sequence[Edit],
    refusals: Refusals,
    asked: Asked,
    report: Report,
    on_scored: Callable[[int, Scored], None] | None = None,
) -> list[Scored]:
    """The scores of each of `edits`; of the model as it is (one) where there are none.

    on_scored   called with the place of an edit and its scores as soon as they are known
    """
    numbers = list(range(len(edits))) or [ORIGINAL]
    lanes = min(decoder.lanes, len(numbers))
    together = max(1, decoder.batch_size // max(1, len(prompts.harmful)))
    together = min(together, -(-len(numbers) // lanes))
    if decoder.patch is not None and not decoder.patch.batches:
        together = 1  # weights that are rewritten in place hold one edit at a time
    if decoder.mixes:
        together = 1  # scores would depend on what shares the batch
    # edits of a group share their batches
    groups = [numbers[at : at + together] for at in range(0, len(numbers), together)]

    def work(group: list[int], report: Report) -> _Scored:
        own = decoder.beside(lanes)
        try:
            return _score(own, prompts, edits, group, refusals, asked, report)
        finally:
            own.select([], [])  # also after an error: this thread ends

    def skipped(group: list[int]) -> int:
        """Blocks that its forwards leave out."""
        own = [edits[number] for number in group if number != ORIGINAL]
        return 0 if decoder.lower is None or not own else decoder.lower.station(own)

    def send(group: _Scored) -> None:
        for number, one in zip(group.numbers, group.scored, strict=True):
            if on_scored is not None:
                on_scored(max(0, number), one)

    found: list[Scored] = []
    # several for each lane, so that they end at about the same time
    wave = CANDIDATES["cpu"] if lanes > 1 else 1
    for at in range(0, len(groups), wave):
        longest_first = sorted(groups[at : at + wave], key=skipped)  # the lanes end together
        scored = side_by_side(work, longest_first, report, send, lanes)
        for group in sorted(scored, key=lambda group: group.numbers):  # whoever was faster
            found += group.scored
            decoder.shrink(group.limit)
            decoder.learn(group.rows, group.answers, group.read)
    return found


@dataclass(frozen=True)
class _Scored:
    """What scoring some edits gave, and what can be learned from it for others."""

    numbers: list[int]
    scored: list[Scored]
    rows: list[Row]
    answers: list[Answer]
    read: list[list[int]]
    limit: int | None


def _score(
    decoder: Decoder,
    prompts: RoleSet,
    edits: Sequence[Edit],
    group: list[int],
    refusals: Refusals,
    asked: Asked,
    report: Report,
) -> _Scored:
    """Score edits that share their batches: first what one forward gives, then the answers."""
    begun = time.monotonic()
    reference = prompts.reference if asked.multi else prompts.first or prompts.reference
    moved: Sequence[Divergence | None] = [None] * len(group)
    if reference is not None:
        chosen = [edits[number] for number in group if number != ORIGINAL]
        moved = divergences(decoder, reference, chosen, report, "divergence")

    values: list[dict[str, Value]] = []
    for number in group:
        edit = edits[number] if edits else None
        values.append(
            measured(asked.names, decoder, prompts, asked.further, edit, asked.new, report)
        )

    each = len(prompts.harmful)
    bounds: list[int | None] = [None] * len(group)
    for place, divergence in enumerate(moved if asked.finished else ()):
        cheap = {name: value.value for name, value in values[place].items()}
        if divergence is not None:
            cheap |= {"kl_first": divergence.first, "kl_multi": divergence.multi}
        bounds[place] = screen.bound(cheap, asked.finished, each)
    race = screen.Race(bounds, each)
    rows = [Row(ids, number) for number in group for ids in prompts.harmful]
    answers = decoder.answers(
        rows, edits, asked.new, report, "answers", refusals.decided if asked.early else None,
        on_answer=lambda row, answer: race.count(row, refusals.is_refusal(answer.text)),
        needless=race.lost if asked.finished else None,
    )  # fmt: skip

    seconds = (time.monotonic() - begun) / len(group)
    scored = []
    for place, divergence in enumerate(moved):
        mine = answers[place * each : (place + 1) * each]
        one = count(prompts.role, mine, divergence, refusals, seconds)
        one.scores.values = values[place]
        if not asked.multi:
            one.scores.kl_multi = None
        scored.append(one)
    read = [] if reference is None or not edits else reference.inputs
    return _Scored(group, scored, rows, answers, read, decoder.limit)


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
