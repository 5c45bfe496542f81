"""From a `Prepare` request to a model that can be scored: the phases in their order."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from engine import directions, residuals
from engine.anatomy import Anatomy, survey
from engine.baseline import Baseline, baseline, response_prefix
from engine.chat import Formatter
from engine.choice import ignored_settings
from engine.decode import Decoder
from engine.directions import Directions
from engine.edit import EditBuilder
from engine.errors import EngineError
from engine.geometry import geometry
from engine.load import Loaded, load
from engine.machine import driver_versions
from engine.patch import Patch
from engine.report import Report
from engine.samples import collect_samples
from engine.scorers import RoleSet
from engine.scorers.further import Further
from engine.scorers.refusals import Refusals
from engine.shortcuts import choose_lower, choose_shortcuts
from engine.texts import check_texts, context_of, tokenised
from jobs.spec.memory import AHEAD
from jobs.spec.protocol import AnatomyReport, Geometry, Prepare, Prepared
from jobs.spec.scores import Role

FEW_REFUSALS = 0.2  # share of baseline refusals below which there is little to remove
SIDES = ("direction_harmful", "direction_harmless")


@dataclass(frozen=True)
class Editing:
    """What a model needs to be edited; a model that is only evaluated has none of it."""

    anatomy: Anatomy
    directions: Directions
    builder: EditBuilder
    geometry: Geometry


@dataclass
class Ready:
    """A prepared model and everything that scoring, answering and exporting need."""

    request: Prepare
    loaded: Loaded
    formatter: Formatter
    decoder: Decoder
    refusals: Refusals
    prepared: Prepared
    editing_or_none: Editing | None = None
    baseline: Baseline = field(default_factory=lambda: Baseline({}, {}, Further()))

    @property
    def editing(self) -> Editing:
        """What edits need. Raises `bad_request` for a model prepared for another purpose."""
        if self.editing_or_none is None:
            raise EngineError(
                "bad_request",
                f"this model was prepared to {self.request.purpose}, not to be edited",
            )
        return self.editing_or_none

    @property
    def anatomy(self) -> Anatomy:
        """The model's writers."""
        return self.editing.anatomy

    @property
    def directions(self) -> Directions:
        """The directions of all recipes."""
        return self.editing.directions

    @property
    def builder(self) -> EditBuilder:
        """What makes edits of candidates."""
        return self.editing.builder

    @property
    def roles(self) -> dict[Role, RoleSet]:
        """The prompts by role."""
        return self.baseline.roles

    @property
    def ran_out(self) -> bool:
        """Whether memory has run out since it was known how many rows fit."""
        limit = self.decoder.limit
        return limit is not None and limit < self.prepared.batch_size

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

    # 1. the model and, if it is to be edited, its writers
    with clock.phase("load"):
        loaded = load(request, report)
    anatomy: Anatomy | None = None
    if request.purpose == "abliterate":
        with clock.phase("anatomy"):
            anatomy = survey(loaded.model, request.allow_partial)

    # 2. prompts as tokens; what all answers begin with
    formatter = Formatter(loaded.tokenizer, request.system_prompt)
    patch = None if anatomy is None else Patch(anatomy)
    decoder = Decoder(loaded.model, loaded.tokenizer, patch, limit=request.batch_size)
    with clock.phase("shortcuts"):
        example = formatter.ids("How do I mop the floor?")
        slow = choose_shortcuts(decoder, example)
        if anatomy is not None:
            choose_lower(decoder, anatomy, loaded.weight_bytes, example)
    if request.purpose != "respond":
        with clock.phase("response prefix"):
            formatter.prefix = response_prefix(formatter, decoder, request, report)
            decoder.opening = formatter.opening()
    prompts = tokenised(formatter, request, context_of(loaded.model))
    longest = max((len(ids) for role in prompts.values() for ids in role), default=1)
    batch_size = decoder.reserve(longest, request.max_new_tokens)
    decoder.limit = batch_size  # the same rows share a batch from now on, whatever memory is free
    report.log(f"up to {batch_size} prompts at once, the longest has {longest} tokens")

    # 3. directions of refusal
    editing: Editing | None = None
    if anatomy is not None:
        editing = _editing(loaded, anatomy, decoder, prompts, request, clock, report)

    # 4. what the original does
    refusals = Refusals(request.markers)
    found = Baseline({}, {}, Further())
    if request.purpose != "respond":
        with clock.phase("baseline"):
            found = baseline(decoder, prompts, refusals, request, report)

    warnings = [*loaded.warnings, *formatter.warnings, *slow, *_warnings(loaded, found)]
    for warning in warnings:
        report.log(warning, "warning")
    prepared = Prepared(
        commit=loaded.commit,
        anatomy=_nothing_edited(loaded) if anatomy is None else anatomy.report(),
        device=str(loaded.device),
        device_name=loaded.device_name,
        dtype=str(loaded.dtype).removeprefix("torch."),
        quantization=request.quantization,
        weight_bytes=loaded.weight_bytes,
        source_bytes=loaded.source_bytes,
        batch_size=batch_size,
        ahead=AHEAD * decoder.lanes if decoder.group(len(prompts["search_harmful"])) == 1 else 0,
        response_prefix=formatter.prefix,
        geometry=None if editing is None else editing.geometry,
        baseline={role: scored.scores for role, scored in found.scored.items()},
        baseline_outcomes={role: scored.outcomes for role, scored in found.scored.items()},
        seconds=clock.seconds,
        versions={**loaded.versions, **driver_versions(loaded.device)},
        warnings=warnings,
    )
    return Ready(request, loaded, formatter, decoder, refusals, prepared, editing, found)


def _editing(
    loaded: Loaded,
    anatomy: Anatomy,
    decoder: Decoder,
    prompts: dict[str, list[list[int]]],
    request: Prepare,
    clock: Clock,
    report: Report,
) -> Editing:
    if request.router and loaded.packed:  # before anything is measured in vain
        raise EngineError(
            "unsupported_architecture",
            f"router: {loaded.name} comes quantised ({loaded.packed}), so that no merged model can "
            "be exported, and an adapter cannot hold the bias of a router",
            "Search with the model's unquantised release, or choose methods other than router.",
        )
    positions = sorted({-1} | {recipe.position for recipe in request.recipes})
    with clock.phase("residuals"):
        harmful, harmless = (
            residuals.collect(
                loaded.model, anatomy, prompts[side], decoder.pad, report, decoder.batch_size,
                positions,
            )
            for side in SIDES
        )  # fmt: skip
    with clock.phase("directions"):
        found = directions.measure(harmful, harmless, request.recipes, report)
        seen = geometry(harmful[positions[-1]], harmless[positions[-1]], report)
        del harmful, harmless
    with clock.phase("samples"):
        samples = collect_samples(
            decoder, anatomy, prompts[SIDES[0]], prompts[SIDES[1]], report, request.affine,
            request.ara, request.allow_partial, request.router,
        )  # fmt: skip
        if decoder.patch is not None and samples.routers is not None:
            decoder.patch.include(samples.routers)
    with clock.phase("edit bases"):
        builder = EditBuilder(anatomy, found, samples)
        builder.warm(request.recipes, report)
    return Editing(anatomy, found, builder, seen)


def _nothing_edited(loaded: Loaded) -> AnatomyReport:
    """The report of a model that is evaluated as it is: its size, no writers."""
    text = loaded.model.config.get_text_config(decoder=True)
    return AnatomyReport(
        architecture=type(loaded.model).__name__,
        layers=int(getattr(text, "num_hidden_layers", 0) or 0),
        hidden=int(getattr(text, "hidden_size", 0) or 0),
        writers=[],
        coverage=0.0,
    )


def _warnings(loaded: Loaded, found: Baseline) -> list[str]:
    warnings = []
    if "search" in found.scored:
        search = found.scored["search"].scores
        if search.refusals == 0:
            warnings.append(
                f"The original refuses none of the {search.total} search prompts: there is nothing "
                "to remove. Check that the harmful prompts are ones that this model refuses."
            )
        elif search.refusals < FEW_REFUSALS * search.total:
            warnings.append(
                f"The original refuses only {search.refusals} of {search.total} search prompts: "
                "there is little to remove."
            )
    if ignored := ignored_settings(loaded.model.generation_config):
        warnings.append(
            f"generation_config.json sets {', '.join(ignored)}, which scoring does not apply."
        )
    return warnings
