"""Jobs as pages show them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jobs.listing import JobView, RoleScores
from jobs.spec.methods import METHODS
from jobs.spec.scorers import SCORERS
from jobs.states import JOB_OVER
from jobs.tables import Event
from web.views import formats, scores
from web.views.facts import Fact
from web.views.scores import Score

STATES = ("queued", "running", "paused", "completed", "failed", "cancelled")
DEVICE_MAPS = {"auto": "over all GPUs of the worker", "offload": "over GPUs and memory"}
QUANTIZATIONS = {"none": "not quantised", "bnb_4bit": "4-bit (nf4)", "bnb_8bit": "8-bit (int8)"}


#: What a job may be: its word, and what it does.
KINDS: dict[str, tuple[str, str]] = {
    "abliterate": ("Abliterate", "search for edits that remove refusals"),
    "evaluate": ("Evaluate", "score a model as it is, or against its original"),
    "benchmark": ("Benchmark", "run lm-evaluation-harness tasks on a model"),
}


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
    eta: str
    figures: list[tuple[str, Score | str]]
    job: JobView


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
        eta=formats.duration(job.eta_seconds) if job.eta_seconds is not None else "",
        figures=figures(job),
        job=job,
    )


def figures(job: JobView) -> list[tuple[str, Score | str]]:
    """What the list says of a job's outcome: at most four figures with their names."""
    if job.kind == "benchmark":
        found = job.result.benchmark.get("model", {}) if job.result else {}
        return [(name, f"{value.value:.3g}") for name, value in list(found.items())[:4]]
    if job.kind == "evaluate":
        sides = (
            [("Original", job.result.original), ("Model", job.result.model)] if job.result else []
        )
        said = [(name, _score(side.get("search"))) for name, side in sides if side]
        moved = job.result.model.get("search") if job.result and job.result.original else None
        return [*said, *([("KL", formats.divergence(moved.kl_first))] if moved else [])]
    return [
        ("Original", scores.score((job.baseline or {}).get("search")) or formats.DASH),
        ("Best", best_score(job) or formats.DASH),
        ("Held-out", (scores.score(job.best.heldout) if job.best else None) or formats.DASH),
        ("KL", formats.divergence(job.best.kl_first) if job.best else formats.DASH),
    ]


def _score(found: RoleScores | None) -> Score | str:
    return (scores.score(found.model_dump()) if found else None) or formats.DASH


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
    methods = [METHODS[name] for name in spec.get("methods") or [] if name in METHODS]
    if job.kind != "abliterate":
        return _evaluation_facts(job)
    facts = [
        Fact(
            "Methods" if len(methods) > 1 else "Method",
            ", ".join(method.title for method in methods),
            methods[0].about if len(methods) == 1 else "",
        ),
        Fact("Minimised", _scorers(spec.get("objectives"))),
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
    if spec.get("scorers"):
        facts.insert(2, Fact("Further scores", _scorers(spec["scorers"]), spec.get("judge") or ""))
    if str(spec.get("device_map")) in DEVICE_MAPS:
        facts.append(Fact("Spread", DEVICE_MAPS[str(spec["device_map"])]))
    if spec.get("allow_partial"):
        facts.append(Fact("Partial edits", "allowed", "writers that no edit reaches are left"))
    if spec.get("system_prompt"):
        facts.append(Fact("System prompt", str(spec["system_prompt"])))
    return facts


def _evaluation_facts(job: JobView) -> list[Fact]:
    """What was submitted with a job that searches nothing."""
    spec: Mapping[str, Any] = job.spec
    prompts = spec.get("prompts") or {}
    quantization = str(spec.get("quantization"))
    facts = [Fact("Kind", KINDS[job.kind][0], KINDS[job.kind][1])]
    if spec.get("original"):
        facts.append(Fact("Original", str(spec["original"])))
    facts.append(Fact("Quantisation", QUANTIZATIONS.get(quantization, quantization)))
    if spec.get("tasks"):
        limit = spec.get("task_limit")
        samples = f"at most {limit} samples each" if limit else "all samples"
        facts.append(Fact("Harness tasks", ", ".join(spec["tasks"]), samples))
    if job.kind == "evaluate":
        sets = f"{prompts.get('harmful')} against {prompts.get('harmless')}"
        facts.append(Fact("Prompts", sets))
        if prompts.get("over_refusal"):
            facts.append(Fact("Over-refusal prompts", str(prompts["over_refusal"])))
        if spec.get("scorers"):
            facts.append(Fact("Further scores", _scorers(spec["scorers"]), spec.get("judge") or ""))
        facts.append(Fact("Answer tokens", f"{spec.get('max_new_tokens')}"))
        if spec.get("system_prompt"):
            facts.append(Fact("System prompt", str(spec["system_prompt"])))
    if str(spec.get("device_map")) in DEVICE_MAPS:
        facts.append(Fact("Spread", DEVICE_MAPS[str(spec["device_map"])]))
    return [*facts, Fact("Priority", f"{job.priority}")]


def _scorers(names: Iterable[str] | None) -> str:
    """Titles of scorers, as a list in a sentence."""
    return "; ".join(SCORERS[name].title for name in SCORERS if name in (names or ()))


KIND_WORDS: dict[str, str] = {
    "search": "search",
    "evaluate": "evaluation",
    "export": "export",
    "chat": "answer",
    "benchmark": "benchmark",
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
        if get("result"):
            said = [
                f"the {side} refuses {found.refusals} of {found.total}"
                for side in ("original", "model")
                if (found := scores.score(payload["result"].get(side)))
            ]
            return f"measured: {', '.join(said)}"
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
            refused = f"{payload['refusals']}/{get('total')} refused"
            return f"trial {number}: {'not decoded' if get('screened') else refused}, KL {kl}"
        reason = f": {payload['reason']}" if get("reason") else ""
        return f"trial {number} {get('state')}{reason}"
    if kind == "artifact":
        return f"{get('kind')} of trial {get('number')}: {get('state')}"
    if kind == "chat":
        number = get("number")
        who = "the original" if number is None else f"trial {number}"
        return f"{who} answered"
    return str(get("text") or kind)
