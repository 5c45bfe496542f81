"""Jobs as pages show them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jobs.listing import JobView
from jobs.states import JOB_OVER
from jobs.tables import Event, Job
from web.views import formats, scores
from web.views.scores import Score

STATES = ("queued", "running", "paused", "completed", "failed", "cancelled")
METHODS = {"search": "search", "single_pass": "single pass"}
QUANTIZATIONS = {"none": "not quantised", "bnb_4bit": "4-bit (nf4)", "bnb_8bit": "8-bit (int8)"}


@dataclass(frozen=True)
class Badge:
    """A state in a word, and the class that colours it. The word alone says it."""

    word: str
    tone: str


@dataclass(frozen=True)
class Row:
    """One line of the job list."""

    href: str
    name: str
    model: str
    owner: str
    private: bool
    badge: Badge
    note: str
    complete: int
    budget: int
    phase: str
    baseline: Score | None
    best: Score | None
    heldout: Score | None
    eta: str
    job: JobView


@dataclass(frozen=True)
class Fact:
    """A name and a value; `note` explains."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Gap:
    """A writer that the edit does not cover."""

    name: str
    shape: str
    reason: str


@dataclass(frozen=True)
class Happening:
    """An event in a sentence."""

    seq: int
    at: Any
    kind: str
    text: str


def badge(state: str, desired: str) -> Badge:
    """The state, or what it is about to become."""
    if state == "running" and desired == "pause":
        return Badge("pausing", "paused")
    if state in ("running", "queued", "paused", "failed") and desired == "cancel":
        return Badge("cancelling", "cancelled")
    return Badge(state, state)


def is_live(job: JobView) -> bool:
    """Whether anything can still change by itself."""
    return job.state not in JOB_OVER


def phase(job: JobView) -> str:
    """What the worker is doing, '' when nobody works."""
    if job.state != "running":
        return ""
    text = str(job.progress.get("phase") or "")
    return text[:1].upper() + text[1:]


def best_score(job: JobView) -> Score | None:
    """The best trial on the search prompts."""
    return scores.score(job.best.model_dump()) if job.best is not None else None


def row(job: JobView) -> Row:
    """A line of the list."""
    note = job.waiting or ""
    if job.state == "failed" and job.error:
        note = str(job.error.get("message") or job.error.get("reason") or "")
    return Row(
        href=f"/jobs/{job.id}",
        name=job.name,
        model=job.model,
        owner=job.owner,
        private=job.private,
        badge=badge(job.state, job.desired_state),
        note=note,
        complete=job.trials.complete,
        budget=job.trials.budget,
        phase=phase(job),
        baseline=scores.score((job.baseline or {}).get("search")),
        best=best_score(job),
        heldout=scores.score(job.best.heldout) if job.best is not None else None,
        eta=formats.duration(job.eta_seconds) if job.eta_seconds is not None else "",
        job=job,
    )


def announcement(job: JobView) -> str:
    """What a screen reader is told: coarse, so that it speaks ten times a job and not hundreds."""
    tenth = 10 * (10 * job.trials.complete // max(1, job.trials.budget))
    words = [badge(job.state, job.desired_state).word]
    if job.state == "running":
        words.append(f"{tenth} % of the trials done" if job.trials.complete else phase(job))
    return f"Job {', '.join(word for word in words if word)}"


def settings_facts(job: JobView) -> list[Fact]:
    """What was submitted."""
    spec: Mapping[str, Any] = job.spec
    prompts = spec.get("prompts") or {}
    modes = ", ".join(spec.get("modes") or [])
    facts = [
        Fact("Method", METHODS.get(str(spec.get("method")), str(spec.get("method")))),
        Fact("Edit modes", modes + (", projected" if spec.get("projected") else "")),
        Fact(
            "Quantisation",
            QUANTIZATIONS.get(str(spec.get("quantization")), str(spec.get("quantization"))),
            "while searching; exports are made from the original weights",
        ),
        Fact(
            "Prompts",
            f"{prompts.get('harmful')} against {prompts.get('harmless')}",
            f"{prompts.get('direction')} for directions, {prompts.get('search')} scored per "
            f"trial, {prompts.get('heldout')} held out",
        ),
        Fact("Answer tokens", f"{spec.get('max_new_tokens')}"),
        Fact("Priority, workers", f"{job.priority}, at most {job.parallelism}"),
        Fact("Seed", f"{spec.get('seed')}"),
    ]
    if prompts.get("over_refusal"):
        facts.insert(4, Fact("Over-refusal prompts", str(prompts["over_refusal"])))
    if spec.get("system_prompt"):
        facts.append(Fact("System prompt", str(spec["system_prompt"])))
    return facts


def anatomy_facts(prepared: Mapping[str, Any] | None) -> list[Fact]:
    """What `prepare` found out about the model and the machine."""
    if not prepared:
        return []
    anatomy = prepared.get("anatomy") or {}
    writers = anatomy.get("writers") or []
    count = len(writers) if isinstance(writers, list) else int(writers)
    weight, source = prepared.get("weight_bytes"), prepared.get("source_bytes")
    against = f"{100 * weight / source:.0f} % of bf16" if weight and source else ""
    coverage = anatomy.get("coverage")
    facts = [
        Fact("Architecture", str(anatomy.get("architecture", formats.DASH))),
        Fact("Layers × hidden", f"{anatomy.get('layers')} × {anatomy.get('hidden')}"),
        Fact(
            "Edit covers",
            formats.share(coverage),
            f"of the parameters that write to the residual stream, in {count} matrices",
        ),
        Fact("Device", str(prepared.get("device_name") or prepared.get("device") or "")),
        Fact("Weights in memory", formats.size(weight), against),
        Fact("Data type, batch", f"{prepared.get('dtype')}, {prepared.get('batch_size')} prompts"),
    ]
    if prepared.get("response_prefix"):
        facts.append(Fact("Answers begin with", repr(prepared["response_prefix"])))
    return facts


def gaps(job: Job) -> list[Gap]:
    """Writers that the edit leaves alone, with the reason."""
    anatomy = (job.prepared or {}).get("anatomy") or {}
    writers = anatomy.get("writers")
    if not isinstance(writers, list):
        return []
    return [
        Gap(
            str(writer.get("name")),
            " × ".join(str(side) for side in writer.get("shape") or []),
            str(writer.get("reason") or "not named"),
        )
        for writer in writers
        if not writer.get("covered", True)
    ]


def warnings(job: Job) -> list[str]:
    """What the engine warned of."""
    return [str(text) for text in (job.prepared or {}).get("warnings") or []]


KIND_WORDS: dict[str, str] = {
    "search": "search",
    "evaluate": "held-out check",
    "export": "export",
    "chat": "answer",
}


def happening(event: Event) -> Happening:
    """One event in a sentence."""
    return Happening(event.seq, event.at, event.kind, sentence(event.kind, event.payload))


def sentence(kind: str, payload: Mapping[str, Any]) -> str:
    """An event's payload in words; unknown kinds are shown by their name."""
    get = payload.get
    if kind == "job":
        if get("changed"):
            changed = ", ".join(f"{key} {value}" for key, value in payload["changed"].items())
            return f"changed: {changed}"
        if get("baseline"):
            found = scores.score(payload["baseline"].get("search"))
            return (
                f"original measured: refuses {found.refusals} of {found.total}"
                if found
                else "original measured"
            )
        desired = get("desired_state")
        if desired in ("pause", "cancel") and get("state") not in ("paused", "cancelled"):
            return f"asked to {desired}"
        return f"{get('state')}"
    if kind == "task":
        task = str(get("task"))
        name = KIND_WORDS.get(task, task)
        text = f"{name}: {get('text') or get('state')}"
        return f"{text} on {payload['worker']}" if get("worker") else text
    if kind == "trial":
        number = get("number")
        for role in ("heldout", "over_refusal"):
            if (found := scores.score(get(role))) is not None:
                label = scores.ROLES[role].lower()
                return f"trial {number}, {label}: {found.refusals}/{found.total} refused"
        if "picked" in payload:
            return f"trial {number} {'picked' if payload['picked'] else 'no longer picked'}"
        if get("state") == "complete" and get("refusals") is not None:
            kl = formats.divergence(get("kl_first"))
            return f"trial {number}: {payload['refusals']}/{get('total')} refused, KL {kl}"
        reason = f": {payload['reason']}" if get("reason") else ""
        return f"trial {number} {get('state')}{reason}"
    if kind == "artifact":
        return f"{get('kind')} of trial {get('number')}: {get('state')}"
    if kind == "chat":
        number = get("number")
        who = "the original" if number is None else f"trial {number}"
        return f"{who} answered"
    return str(get("text") or kind)
