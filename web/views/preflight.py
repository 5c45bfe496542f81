"""What the pre-flight found: the model, the writers by component, and what no edit reaches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.spec.candidate import COMPONENTS
from jobs.spec.methods import METHODS, MethodName
from jobs.spec.protocol import WriterReport
from web.views import formats
from web.views.facts import Fact

COMPONENT_WORDS = {"attention": "Attention", "mlp": "MLP"}


@dataclass(frozen=True)
class Part:
    """The writers of one component.

    stacks: how many hold several experts in one parameter; share: of the writing parameters, 0..1;
    covered: of this component's, 0..1.
    """

    name: str
    writers: int
    stacks: int
    share: float
    covered: float


@dataclass(frozen=True)
class Gap:
    """A writer that an edit leaves alone."""

    name: str
    shape: str
    reason: str


@dataclass(frozen=True)
class Missed:
    """Writers that are left alone, and the share of the parameters that is edited, 0..1."""

    title: str
    covered: float
    gaps: list[Gap]


def facts(prepared: Mapping[str, Any] | None) -> list[Fact]:
    """What `prepare` found out about the model and the machine."""
    if not prepared:
        return []
    anatomy = prepared.get("anatomy") or {}
    writers = anatomy.get("writers") or []
    count = len(writers) if isinstance(writers, list) else int(writers)
    weight, source = prepared.get("weight_bytes"), prepared.get("source_bytes")
    against = f"{100 * weight / source:.0f} % of bf16" if weight and source else ""
    found = [
        Fact("Architecture", str(anatomy.get("architecture", formats.DASH))),
        Fact("Layers × hidden", f"{anatomy.get('layers')} × {anatomy.get('hidden')}"),
        Fact("Device", str(prepared.get("device_name") or prepared.get("device") or "")),
        Fact("Weights in memory", formats.size(weight), against),
        Fact("Data type, batch", f"{prepared.get('dtype')}, {prepared.get('batch_size')} prompts"),
    ]
    if count:  # a model that is only evaluated is not searched for writers
        note = f"of the parameters that write to the residual stream, in {count} matrices"
        found.insert(2, Fact("Edit covers", formats.share(anatomy.get("coverage")), note))
    if prepared.get("response_prefix"):
        found.append(Fact("Answers begin with", repr(prepared["response_prefix"])))
    return found


def warnings(prepared: Mapping[str, Any] | None) -> list[str]:
    """What the engine warned of."""
    return [str(text) for text in (prepared or {}).get("warnings") or []]


def parts(prepared: Mapping[str, Any] | None) -> list[Part]:
    """A row per component that has writers."""
    writers = _writers(prepared)
    whole = sum(writer.parameters for writer in writers)
    found = []
    for component in COMPONENTS:
        mine = [writer for writer in writers if writer.component == component]
        size = sum(writer.parameters for writer in mine)
        if not mine:
            continue
        found.append(
            Part(
                COMPONENT_WORDS[component],
                len(mine),
                sum(is_stack(writer) for writer in mine),
                size / whole if whole else 0.0,
                _share([writer for writer in mine if writer.covered], mine),
            )
        )
    return found


def missed(prepared: Mapping[str, Any] | None, methods: Sequence[MethodName]) -> list[Missed]:
    """What is left alone: by every method, and further by the job's methods that reach less."""
    writers = _writers(prepared)
    reached = [writer for writer in writers if writer.covered]
    found = []
    if len(reached) < len(writers):
        left = [_gap(each, each.reason or "not named") for each in writers if not each.covered]
        found.append(Missed("Reached by no method", _share(reached, writers), left))
    ara = [METHODS[name].title for name in methods if METHODS[name].kind == "ara"]
    stacks = [writer for writer in reached if is_stack(writer)]
    if ara and stacks:
        plain = [writer for writer in reached if not is_stack(writer)]
        left = [_gap(writer, "a stack of experts") for writer in stacks]
        found.append(Missed(f"Not reached by {' and '.join(ara)}", _share(plain, writers), left))
    return found


def is_stack(writer: WriterReport) -> bool:
    """Whether a writer is a stack of experts: experts × rows × columns."""
    return len(writer.shape) == 3


def _share(some: Sequence[WriterReport], of: Sequence[WriterReport]) -> float:
    whole = sum(writer.parameters for writer in of)
    return sum(writer.parameters for writer in some) / whole if whole else 0.0


def _gap(writer: WriterReport, reason: str) -> Gap:
    return Gap(writer.name, " × ".join(str(side) for side in writer.shape), reason)


def _writers(prepared: Mapping[str, Any] | None) -> list[WriterReport]:
    found = ((prepared or {}).get("anatomy") or {}).get("writers")
    return [WriterReport.model_validate(each) for each in found] if isinstance(found, list) else []
