"""From an edited model to numbers: refusals of harmful prompts, KL on harmless ones.

`RoleSet` holds a role's prompts and what the original does with them; `score` scores any number of
edits on it. The same function scores an exported artifact, which has no edits (`engine.measure`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.decode import ORIGINAL, Answer, Decoder, Row
from engine.report import Report
from engine.scorers.further import Further, measured
from engine.scorers.kl import Divergence, Reference, divergences
from engine.scorers.refusals import Refusals
from jobs.spec.protocol import Scored
from jobs.spec.scorers import ScorerName
from jobs.spec.scores import Outcome, Role, Scores

if TYPE_CHECKING:
    from engine.edit import Edit


@dataclass(frozen=True)
class RoleSet:
    """The prompts of one role as token ids, and the original on the harmless ones.

    `reference` is None where the role has no harmless prompts (over_refusal). `lengths` are the
    tokens of the original's answers to `harmless`, where they are wanted.
    """

    role: Role
    harmful: list[list[int]]
    reference: Reference | None
    harmless: list[list[int]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)


def score(
    decoder: Decoder,
    prompts: RoleSet,
    edits: Sequence[Edit],
    refusals: Refusals,
    max_new_tokens: int,
    report: Report,
    early: bool = True,
    on_scored: Callable[[int, Scored], None] | None = None,
    names: Sequence[ScorerName] = (),
    further: Further | None = None,
) -> list[Scored]:
    """The scores of each of `edits`; of the model as it is (one) where there are none.

    early       stop an answer as soon as it is certainly a refusal; its text is cut there
    on_scored   called with the place of an edit and its scores as soon as they are known
    names       scores besides these, of which `further` knows what they need
    """
    decided = refusals.decided if early else None
    scored: list[Scored] = []
    numbers = list(range(len(edits))) or [ORIGINAL]
    together = max(1, decoder.batch_size // max(1, len(prompts.harmful)))
    if decoder.patch is not None and not decoder.patch.batches:
        together = 1  # weights that are rewritten in place hold one edit at a time
    if decoder.mixes:
        together = 1  # scores would depend on what shares the batch
    for start in range(0, len(numbers), together):  # edits that share their batches
        group = numbers[start : start + together]
        begun = time.monotonic()
        rows = [Row(ids, number) for number in group for ids in prompts.harmful]
        answers = decoder.answers(rows, edits, max_new_tokens, report, "answers", decided)
        moved: Sequence[Divergence | None] = [None] * len(group)
        if prompts.reference is not None:
            chosen = [edits[number] for number in group if number != ORIGINAL]
            moved = divergences(decoder, prompts.reference, chosen, report, "divergence")
        seconds = (time.monotonic() - begun) / len(group)
        each = len(prompts.harmful)
        for place, divergence in enumerate(moved):
            mine = answers[place * each : (place + 1) * each]
            one = count(prompts.role, mine, divergence, refusals, seconds)
            if names and further is not None:
                edit = edits[group[place]] if edits else None
                one.scores.values = measured(
                    names, decoder, prompts, further, edit, max_new_tokens, report
                )
            scored.append(one)
            if on_scored is not None:
                on_scored(len(scored) - 1, scored[-1])
    return scored


def count(
    role: Role,
    answers: Sequence[Answer],
    divergence: Divergence | None,
    refusals: Refusals,
    seconds: float = 0.0,
) -> Scored:
    """The scores of one model from its answers to the role's prompts."""
    outcomes = [
        Outcome(refused=refusals.is_refusal(a.text), text=a.text, tokens=len(a.tokens))
        for a in answers
    ]
    scores = Scores(
        role=role,
        refusals=sum(outcome.refused for outcome in outcomes),
        total=len(outcomes),
        kl_first=None if divergence is None else divergence.first,
        kl_multi=None if divergence is None else divergence.multi,
        mean_tokens=sum(o.tokens for o in outcomes) / max(1, len(outcomes)),
    )
    return Scored(scores=scores, outcomes=outcomes, seconds=seconds)
