"""What the original does: its answers, refusals, distributions and further scores."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from engine.chat import Formatter
from engine.decode import Answer, Decoder, Row
from engine.report import Report
from engine.scorers import RoleSet, count
from engine.scorers.further import Further, measured, require
from engine.scorers.kl import Divergence, Reference, measure_reference, reread
from engine.scorers.log_odds import refusal_tokens
from engine.scorers.perplexity import windows
from engine.scorers.refusals import Refusals
from engine.texts import context_of
from engine.thought import detect_prefix, spoken
from jobs.spec.protocol import Prepare, Scored
from jobs.spec.scores import Role

PREFIX_PROMPTS = 100  # per side, whose answers show what all answers begin with
PREFIX_TOKENS = 16
ROLES: tuple[Role, ...] = ("search", "heldout", "over_refusal")


@dataclass(frozen=True)
class Baseline:
    """The original's scores by role, and what scoring edits needs of it."""

    roles: dict[Role, RoleSet]
    scored: dict[Role, Scored]
    further: Further


def response_prefix(
    formatter: Formatter, decoder: Decoder, request: Prepare, report: Report
) -> str:
    """What the original's answers to some 200 prompts all begin with."""
    prompts = request.prompts
    sides = (
        prompts.direction_harmful or prompts.search_harmful,
        prompts.direction_harmless or prompts.search_harmless,
    )
    texts = [text for side in sides for text in side[:PREFIX_PROMPTS]]
    found = _common(formatter, decoder, texts, report)
    if found and not spoken(found):
        # A closed thought: what all answers say after it counts as well.
        formatter.prefix = found
        more = _common(formatter, decoder, texts, report)
        found += more if spoken(more) == more else ""
    if found:
        report.log(f"all answers begin alike; put before each answer: {found!r}")
    return found


def _common(formatter: Formatter, decoder: Decoder, texts: Sequence[str], report: Report) -> str:
    """What the answers to `texts` begin with, by `detect_prefix`."""
    rows = [Row(formatter.ids(text)) for text in texts]
    decoder.reserve(max(len(row.ids) for row in rows), PREFIX_TOKENS)
    answers = decoder.answers(rows, [], PREFIX_TOKENS, report, "response prefix")
    return detect_prefix(decoder.texts([answer.tokens for answer in answers], special=True))


def baseline(
    decoder: Decoder,
    prompts: dict[str, list[list[int]]],
    refusals: Refusals,
    request: Prepare,
    report: Report,
) -> Baseline:
    """Score the original on every role that has prompts."""
    pieces = windows(decoder.tokenizer, request.prompts.texts, context_of(decoder.model))
    further = Further(pieces=pieces)
    require(request.scorers, further)
    roles: dict[Role, RoleSet] = {}
    scored: dict[Role, Scored] = {}
    refused: list[Answer] = []
    for role in ROLES:
        harmful = prompts["over_refusal" if role == "over_refusal" else f"{role}_harmful"]
        if not harmful:
            continue
        begun = time.monotonic()
        new = request.max_new_tokens
        answers = decoder.answers([Row(ids) for ids in harmful], [], new, report, f"{role} answers")
        roles[role] = RoleSet(role, harmful, None)
        if role != "over_refusal":
            refused += [answer for answer in answers if refusals.is_refusal(answer.text)]
            roles[role] = _with_harmless(decoder, role, harmful, prompts, request, report)
        unmoved = None if role == "over_refusal" else Divergence(0.0, 0.0)
        again: list[list[int]] = []
        if role == "search" and request.purpose == "abliterate":  # weak edits answer the same
            again = [ids + answer.whole for ids, answer in zip(harmful, answers, strict=True)]
        decoder.learn([Row(ids) for ids in harmful], answers, again, report)
        scored[role] = count(role, answers, unmoved, refusals, time.monotonic() - begun)
    further = Further(refusal_tokens(refused), pieces)
    for role, found in scored.items():
        found.scores.values = measured(
            request.scorers, decoder, roles[role], further, None, request.max_new_tokens, report
        )
    return Baseline(roles, scored, further)


def _with_harmless(
    decoder: Decoder,
    role: Role,
    harmful: list[list[int]],
    prompts: dict[str, list[list[int]]],
    request: Prepare,
    report: Report,
) -> RoleSet:
    """A role with the original's own answers to its harmless prompts."""
    harmless = prompts[f"{role}_harmless"]
    whole = "length" in request.scorers
    new = max(request.kl_tokens, request.max_new_tokens) if whole else request.kl_tokens
    own = decoder.answers([Row(ids) for ids in harmless], [], new, report, f"{role} harmless")
    reference: Reference = measure_reference(decoder, harmless, own, request.kl_tokens, report)
    lengths = [min(len(answer.tokens), request.max_new_tokens) for answer in own] if whole else []
    first: Reference | None = None
    if role == "search" and request.purpose == "abliterate":  # what each candidate is compared with
        first = reread(decoder, harmless, [1] * len(harmless), report)
        decoder.note([], [], harmless * 2)  # they come again with every candidate
    return RoleSet(role, harmful, reference, harmless, lengths, first)
