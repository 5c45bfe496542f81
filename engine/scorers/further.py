"""Scores besides refusals and KL: a table of functions of one edit each (`jobs.spec.scorers`).

What needs more than the model, such as a judge, is scored elsewhere; what takes minutes, such as
the harness, is a request of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.decode import ORIGINAL, Row
from engine.errors import EngineError
from engine.report import Report
from engine.scorers import length, log_odds, perplexity
from jobs.spec.scorers import ScorerName
from jobs.spec.scores import Value

if TYPE_CHECKING:
    from engine.decode import Decoder
    from engine.edit import Edit
    from engine.scorers import RoleSet


@dataclass(frozen=True)
class Further:
    """What the table's functions need besides a role's prompts.

    openings   token ids with which the original's refusals begin
    pieces     token ids of the texts for perplexity
    """

    openings: Sequence[int] = ()
    pieces: Sequence[list[int]] = ()


Measure = Callable[["Decoder", "RoleSet", Further, "Edit | None", int, Report], Value | None]


def _log_odds(
    decoder: Decoder, prompts: RoleSet, further: Further, edit: Edit | None, new: int,
    report: Report,
) -> Value | None:  # fmt: skip
    if not further.openings:
        return None  # the original refuses nothing: there is no refusal token
    return log_odds.value(decoder, prompts.harmful, further.openings, edit, report)


def _length(
    decoder: Decoder, prompts: RoleSet, further: Further, edit: Edit | None, new: int,
    report: Report,
) -> Value | None:  # fmt: skip
    if not prompts.lengths:
        return None  # a role without harmless prompts
    edits, place = ([], ORIGINAL) if edit is None else ([edit], 0)
    rows = [Row(ids, place) for ids in prompts.harmless]
    answers = decoder.answers(rows, edits, new, report, "answer lengths")
    return length.drift([len(answer.tokens) for answer in answers], prompts.lengths)


def _perplexity(
    decoder: Decoder, prompts: RoleSet, further: Further, edit: Edit | None, new: int,
    report: Report,
) -> Value | None:  # fmt: skip
    if not further.pieces:
        return None
    with decoder.edited(edit):
        return perplexity.perplexity(decoder, further.pieces, report)


MEASURES: dict[ScorerName, Measure] = {
    "log_odds": _log_odds,
    "length": _length,
    "perplexity": _perplexity,
}


def measured(
    names: Sequence[ScorerName],
    decoder: Decoder,
    prompts: RoleSet,
    further: Further,
    edit: Edit | None,
    new: int,
    report: Report,
) -> dict[str, Value]:
    """The scores `names` of one edit (None: the model as it is); those without a value left out."""
    found: dict[str, Value] = {}
    for name in names:
        if name in MEASURES:
            value = MEASURES[name](decoder, prompts, further, edit, new, report)
            if value is not None:
                found[name] = value
    return found


def require(names: Sequence[ScorerName], further: Further) -> None:
    """Raise `bad_prompts` for a score that lacks what it is measured on."""
    if "perplexity" in names and not further.pieces:
        raise EngineError(
            "bad_prompts",
            "scorers: perplexity needs texts, and this job has none",
            "Name a prompt set with texts (prompts.texts), or leave perplexity out.",
        )
