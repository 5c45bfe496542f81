"""From a `Prepare` request to a model that can be scored: the phases in their order."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from engine import directions, residuals
from engine.anatomy import Anatomy, survey
from engine.chat import Formatter, detect_prefix
from engine.choice import ignored_settings
from engine.decode import Decoder, Row
from engine.directions import Directions
from engine.edit import EditBuilder
from engine.errors import EngineError
from engine.load import Loaded, load
from engine.patch import Patch
from engine.report import Report
from engine.scorers import RoleSet, count
from engine.scorers.kl import Divergence, Reference, measure_reference
from engine.scorers.refusals import Refusals
from jobs.spec.protocol import Prepare, Prepared, Scored
from jobs.spec.scores import Role

PREFIX_PROMPTS = 100  # per side, whose answers show what all answers begin with
PREFIX_TOKENS = 16
FEW_REFUSALS = 0.2  # share of baseline refusals below which there is little to remove
ROLES: tuple[Role, ...] = ("search", "heldout", "over_refusal")


@dataclass
class Ready:
    """A prepared model and everything that scoring, answering and exporting need."""

    request: Prepare
    loaded: Loaded
    anatomy: Anatomy
    directions: Directions
    builder: EditBuilder
    formatter: Formatter
    decoder: Decoder
    refusals: Refusals
    roles: dict[Role, RoleSet]
    prepared: Prepared

    def close(self) -> None:
        """Take the hooks off the model."""
        if self.decoder.patch is not None:
            self.decoder.patch.close()


class Clock:
    """Seconds per phase, in the order in which the phases began."""

    def __init__(self, report: Report) -> None:
        self.seconds: dict[str, float] = {}
        self._report = report

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase and say that it begins and ends."""
        begun = time.monotonic()
        self._report.progress(name)
        yield
        self.seconds[name] = round(time.monotonic() - begun, 3)
        self._report.log(f"{name}: {self.seconds[name]:.1f} s", "debug")


def prepare(request: Prepare, report: Report) -> Ready:
    """Load, survey, measure directions and the original's own scores.

    Raises EngineError with the reasons of `load` and `survey`, and `bad_prompts` for prompts that
    are missing, blank or longer than the model's context.
    """
    torch.manual_seed(request.seed)
    clock = Clock(report)
    check_texts(request)

    # 1. the model and its writers
    with clock.phase("load"):
        loaded = load(request, report)
    with clock.phase("anatomy"):
        anatomy = survey(loaded.model)

    # 2. prompts as tokens; what all answers begin with
    formatter = Formatter(loaded.tokenizer, request.system_prompt)
    decoder = Decoder(loaded.model, loaded.tokenizer, Patch(anatomy))
    with clock.phase("response prefix"):
        formatter.prefix = _prefix(formatter, decoder, request, report)
        decoder.opening = formatter.opening()
    prompts = tokenised(formatter, request, context_of(loaded))
    longest = max(len(ids) for role in prompts.values() for ids in role)
    batch_size = decoder.reserve(longest, request.max_new_tokens)
    report.log(f"up to {batch_size} prompts at once, the longest has {longest} tokens")

    # 3. directions of refusal
    with clock.phase("residuals"):
        states = [
            residuals.collect(loaded.model, anatomy, prompts[side], decoder.pad, report, batch_size)
            for side in ("direction_harmful", "direction_harmless")
        ]
    with clock.phase("directions"):
        found = directions.measure(*states)
        del states

    # 4. what the original does
    with clock.phase("baseline"):
        refusals = Refusals(request.markers)
        roles, baseline = _baseline(decoder, prompts, refusals, request, report)
    with clock.phase("edit bases"):
        builder = EditBuilder(anatomy, found)
        builder.bases(projected=True)

    warnings = [*loaded.warnings, *formatter.warnings, *_warnings(loaded, baseline)]
    for warning in warnings:
        report.log(warning, "warning")
    prepared = Prepared(
        commit=loaded.commit,
        anatomy=anatomy.report(),
        device=str(loaded.device),
        device_name=loaded.device_name,
        dtype=str(loaded.dtype).removeprefix("torch."),
        quantization=request.quantization,
        weight_bytes=loaded.weight_bytes,
        source_bytes=loaded.source_bytes,
        batch_size=batch_size,
        response_prefix=formatter.prefix,
        baseline={role: scored.scores for role, scored in baseline.items()},
        baseline_outcomes={role: scored.outcomes for role, scored in baseline.items()},
        seconds=clock.seconds,
        versions=loaded.versions,
        warnings=warnings,
    )
    return Ready(
        request, loaded, anatomy, found, builder, formatter, decoder, refusals, roles, prepared
    )


def check_texts(request: Prepare) -> None:
    """Every role but over_refusal has prompts, and none is blank."""
    for role, texts in request.prompts:
        if not texts and role != "over_refusal":
            raise EngineError(
                "bad_prompts", f"{role}: there is no prompt", "Choose a prompt set with more lines."
            )
        for number, text in enumerate(texts, start=1):
            if not text.strip():
                raise EngineError(
                    "bad_prompts", f"{role}: prompt {number} is blank", "Remove blank prompts."
                )


def tokenised(
    formatter: Formatter, request: Prepare, context: int | None
) -> dict[str, list[list[int]]]:
    """The token ids of every role's prompts; `bad_prompts` for one without room to answer."""
    found = {role: [formatter.ids(text) for text in texts] for role, texts in request.prompts}
    for role, inputs in found.items():
        for number, ids in enumerate(inputs, start=1):
            check_length(f"{role}: prompt {number}", ids, request.max_new_tokens, context)
    return found


def check_length(name: str, ids: Sequence[int], new: int, context: int | None) -> None:
    """Raise `bad_prompts` where prompt and answer exceed the model's context (None: unknown)."""
    if context is not None and len(ids) + new > context:
        raise EngineError(
            "bad_prompts",
            f"{name} has {len(ids)} tokens; with {new} answer tokens that is more than the "
            f"model's context of {context}",
            "Shorten or remove the prompt, or ask for fewer answer tokens.",
        )


def context_of(loaded: Loaded) -> int | None:
    """The longest sequence that the model was made for, in tokens."""
    text = loaded.model.config.get_text_config()
    given = getattr(text, "max_position_embeddings", None)
    return int(given) if given else None


def _prefix(formatter: Formatter, decoder: Decoder, request: Prepare, report: Report) -> str:
    """What the original's answers to some 200 direction prompts all begin with."""
    texts = (
        request.prompts.direction_harmful[:PREFIX_PROMPTS]
        + request.prompts.direction_harmless[:PREFIX_PROMPTS]
    )
    rows = [Row(formatter.ids(text)) for text in texts]
    decoder.reserve(max(len(row.ids) for row in rows), PREFIX_TOKENS)
    answers = decoder.answers(rows, [], PREFIX_TOKENS, report, "response prefix")
    found = detect_prefix(decoder.texts([answer.tokens for answer in answers], special=True))
    if found:
        report.log(f"all answers begin alike; put before each answer: {found!r}")
    return found


def _baseline(
    decoder: Decoder,
    prompts: dict[str, list[list[int]]],
    refusals: Refusals,
    request: Prepare,
    report: Report,
) -> tuple[dict[Role, RoleSet], dict[Role, Scored]]:
    """The original's whole answers, its refusals, and its distributions on harmless prompts."""
    roles: dict[Role, RoleSet] = {}
    scored: dict[Role, Scored] = {}
    for role in ROLES:
        harmful = prompts["over_refusal" if role == "over_refusal" else f"{role}_harmful"]
        if not harmful:
            continue
        begun = time.monotonic()
        new = request.max_new_tokens
        answers = decoder.answers([Row(ids) for ids in harmful], [], new, report, f"{role} answers")
        reference: Reference | None = None
        if role != "over_refusal":
            harmless = prompts[f"{role}_harmless"]
            new = request.kl_tokens
            own = decoder.answers([Row(i) for i in harmless], [], new, report, f"{role} harmless")
            reference = measure_reference(decoder, harmless, own, new, report)
        unmoved = None if reference is None else Divergence(0.0, 0.0)
        roles[role] = RoleSet(role, harmful, reference)
        scored[role] = count(role, answers, unmoved, refusals, time.monotonic() - begun)
    return roles, scored


def _warnings(loaded: Loaded, baseline: dict[Role, Scored]) -> list[str]:
    found = []
    search = baseline["search"].scores
    if search.refusals == 0:
        found.append(
            f"The original refuses none of the {search.total} search prompts: there is nothing to "
            "remove. Check that the harmful prompts are ones that this model refuses."
        )
    elif search.refusals < FEW_REFUSALS * search.total:
        found.append(
            f"The original refuses only {search.refusals} of {search.total} search prompts: there "
            "is little to remove."
        )
    if ignored := ignored_settings(loaded.model.generation_config):
        found.append(
            f"generation_config.json sets {', '.join(ignored)}, which scoring does not apply."
        )
    return found
