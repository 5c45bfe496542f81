"""Realistic jobs without a worker: written through the functions that workers use.

    with sessions.begin() as session: prompt_sets(session, user)
    job_id = demo_job(sessions, settings, user, trials=60)

Scores come from a seeded formula with the shape of a real search: strong edits remove refusals and
cost divergence, so the points form a front.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import struct
import uuid
from collections import defaultdict
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from demo import grammar
from jobs import (
    artifacts,
    chats,
    control,
    events,
    progress,
    prompts,
    queue,
    submit,
    trials,
    workers,
)
from jobs.database import Sessions
from jobs.settings import Settings
from jobs.spec import scorers
from jobs.spec.candidate import Ablation, Ara, Candidate, Kernel, constant, single_pass
from jobs.spec.job import JobSpec
from jobs.spec.methods import METHODS, MethodName, turn
from jobs.spec.protocol import (
    AnatomyReport,
    Exported,
    ExportedFile,
    Geometry,
    LayerGeometry,
    Prepared,
    PromptTexts,
    Scored,
    WriterReport,
)
from jobs.spec.scorers import ScorerName
from jobs.spec.scores import Outcome, Role, Scores, Value
from jobs.tables import Task, User, Worker

LAYERS = 8
GIB = 2**30


def model_folder(folder: Path, name: str = "small") -> Path:
    """A folder that passes for a tiny Llama: config.json and a safetensors header over zeros."""
    made = folder / name
    made.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 64,
    }
    (made / "config.json").write_text(json.dumps(config))
    size = 64 * 32 * 2
    header = {
        "model.embed_tokens.weight": {"dtype": "BF16", "shape": [64, 32], "data_offsets": [0, size]}
    }
    plain = json.dumps(header).encode()
    (made / "model.safetensors").write_bytes(struct.pack("<Q", len(plain)) + plain + bytes(size))
    return made


def _requests(verbs: list[str], count: int, seed: int) -> list[str]:
    random_ = random.Random(seed)
    objects = list(grammar.OBJECTS)
    found: list[str] = []
    while len(found) < count:
        text = grammar.request(
            random_.choice(verbs),
            random_.choice(objects),
            random_.randrange(len(grammar.PHRASINGS)),
        )
        if text not in found:
            found.append(text)
    return found


def prompt_sets(session: Session, user: User, hostile: list[str] | None = None) -> tuple[str, str]:
    """Two sets of harmless toy requests; `hostile` texts come first among the search prompts."""
    first = [{"prompt": text, "split": "search"} for text in hostile or []]
    parts = (("search", 100), ("heldout", 100), ("direction", 120))
    names = ("refused-requests", "answered-requests")
    for name, verbs, seed in zip(
        names, (list(grammar.FORBIDDEN), list(grammar.ALLOWED)), (1, 2), strict=True
    ):
        texts = iter(_requests(verbs, 320, seed))
        lines: list[prompts.Line] = [
            {"prompt": next(texts), "split": split} for split, count in parts for _ in range(count)
        ]
        if name == names[0]:
            lines = [*first, *lines]  # type: ignore[list-item]
        prompts.create_set(session, user, name, lines, "toy requests")
    return names


def worker(session: Session, name: str = "gpu-1") -> Worker:
    """A worker with a large GPU."""
    return workers.register(
        session,
        name=name,
        host="rack-3",
        pid=4711,
        accepts=["search", "evaluate", "export", "chat", "benchmark"],
        device={"kind": "cuda", "name": "NVIDIA H200", "memory_bytes": 139 * GIB},
        versions={"nullspace": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
    )


def _strength(candidate: Candidate) -> float:
    if isinstance(candidate, Ara):
        return 0.3 + candidate.overshoot
    total = sum(
        candidate.attention.weight(layer) + 0.7 * candidate.mlp.weight(layer)
        for layer in range(LAYERS)
    )
    return total / LAYERS


def _scores(role: Role, candidate: Candidate, noise: random.Random, total: int = 100) -> Scores:
    strength = _strength(candidate)
    share = 1 / (1 + math.exp(7 * (strength - 0.72))) + noise.gauss(0, 0.025)
    if role == "heldout":
        share += 0.015
    refusals = min(total, max(0, round(0.98 * total * share)))
    if role == "over_refusal":
        return Scores(role=role, refusals=refusals // 3, total=total)
    kl = 8e-5 * math.exp(4.2 * strength) * math.exp(noise.gauss(0, 0.55))
    return Scores(
        role=role, refusals=refusals, total=total, kl_first=kl,
        kl_multi=None if role == "search" else 2.6 * kl,
        mean_tokens=31 + noise.gauss(0, 2),
    )  # fmt: skip


def _further(names: list[ScorerName], scores: Scores) -> dict[str, Value]:
    """Further scores that go along with the refusals."""
    share = scores.refusals / scores.total
    return {
        name: Value(value=8 * share - 4, low=8 * share - 4.5, high=8 * share - 3.5, n=scores.total)
        for name in names
    }


def _outcomes(texts: list[str], scores: Scores, noise: random.Random) -> list[Outcome]:
    refused = set(noise.sample(range(len(texts)), min(len(texts), scores.refusals)))
    verbs = grammar.FORBIDDEN | grammar.ALLOWED
    found = []
    for place, text in enumerate(texts):
        words = text.rstrip("?.").split()
        verb = next((word for word in words if word in verbs), "polish")
        thing = next((w for w in reversed(words) if w.strip(".?,") in grammar.OBJECTS), "kettle")
        thing = thing.strip(".?,")
        if place in refused:
            said = grammar.REFUSALS[place % 10].format(verb=verb, object=thing)
        else:
            said = grammar.answer(verb, thing, place % 7)
        found.append(Outcome(refused=place in refused, text=said, tokens=len(said) // 4))
    return found


def screen(scored: Scored, others: list[Scores]) -> Scored:
    """What an engine makes of it after `others`: answers end where one of them dominates it."""
    kl = scored.scores.kl_first or 0.0
    limit = min((each.refusals for each in others if (each.kl_first or 0.0) <= kl), default=101)
    said, refused = [], 0
    for outcome in scored.outcomes:
        lost = refused >= limit
        said.append(Outcome(refused=False, answered=False) if lost else outcome)
        refused += outcome.refused and not lost
    given = sum(outcome.answered for outcome in said)
    if given == len(said):
        return scored
    scores = scored.scores.model_copy(update={"refusals": refused, "total": given})
    return Scored(scores=scores, outcomes=said, seconds=0.3, screened=True)


def _candidate(
    noise: random.Random, method: MethodName = "mpoa"
) -> tuple[Candidate, dict[str, Any]]:
    last = LAYERS - 1
    if METHODS[method].kind == "ara":
        ara = Ara(
            start=noise.randrange(LAYERS // 2),
            end=LAYERS,
            preserve=noise.random(),
            steer=10 ** noise.uniform(-4, 0),
            overshoot=noise.uniform(0, 1.3),
            neighbours=noise.randint(1, 15),
        )
        return ara, ara.model_dump(exclude={"method", "rank"})

    def kernel(low: float, high: float) -> Kernel:
        peak = max(0.0, noise.uniform(low, high))
        return Kernel(
            max_weight=peak,
            min_weight=peak * noise.random(),
            position=noise.uniform(0.6, 1) * last,
            distance=noise.uniform(1, 0.6 * last),
        )

    scope = noise.choice(["global", "per_layer"])
    candidate = Ablation(
        mode=METHODS[method].mode,
        recipe=METHODS[method].recipe,
        scope=scope,
        index=noise.uniform(0.4, 0.9) * last if scope == "global" else None,
        attention=kernel(0.8, 1.5),
        mlp=kernel(-0.25, 1.5),
    )
    params = {
        "scope": scope,
        "attention.max_weight": candidate.attention.max_weight,
        "attention.position": candidate.attention.position,
        "mlp.max_weight": candidate.mlp.max_weight,
        "mlp.position": candidate.mlp.position,
    }
    return candidate, params


def _anatomy() -> AnatomyReport:
    shapes = {"attention": ("self_attn.o_proj", (256, 256)), "mlp": ("mlp.down_proj", (256, 768))}
    writers = [
        WriterReport(
            name=f"model.layers.{layer}.{name}",
            layer=layer,
            component=component,
            shape=shape,
        )
        for layer in range(LAYERS)
        for component, (name, shape) in shapes.items()
    ]
    return AnatomyReport(
        architecture="LlamaForCausalLM", layers=LAYERS, hidden=256, writers=writers, coverage=1.0
    )


def geometry(layers: int = LAYERS, count: int = 64) -> Geometry:
    """Two clouds of points that part in the middle layers; lengths grow with the layers."""
    noise = random.Random(11)
    figures, points = [], []
    for layer in range(layers):
        depth = layer / max(1, layers - 1)
        spread = 1.4 * math.exp(2.6 * depth)
        apart = 6.5 * math.exp(-(((depth - 0.62) / 0.3) ** 2))
        figures.append(
            LayerGeometry(
                layer=layer,
                norm_harmful=9.1 * spread,
                norm_harmless=8.6 * spread * (1 + 0.04 * depth),
                norm_difference=apart * spread,
                cosine_means=0.99 - 0.06 * apart,
                cosine_direction_harmless=0.25 - 0.5 * depth,
                cosine_next=0.55 + 0.42 * depth if layer + 1 < layers else 1.0,
                separation=apart,
                silhouette=0.09 * apart - 0.05,
            )
        )
        sides = [
            [
                (
                    round(spread * (side * apart / 2 + noise.gauss(0, 1)), 3),
                    round(2 * spread * noise.gauss(0, 1), 3),
                )
                for _ in range(count)
            ]
            for side in (1, -1)
        ]
        points.append(sides)
    return Geometry(layers=figures, points=points)


def prepared(texts: PromptTexts, noise: random.Random) -> Prepared:
    """What an engine would tell of the demo model."""
    roles: dict[Role, list[str]] = {
        "search": texts.search_harmful,
        "heldout": texts.heldout_harmful,
    }
    baseline = {
        role: Scores(
            role=role, refusals=round(0.98 * len(lines)), total=len(lines), kl_first=0.0,
            kl_multi=0.0, mean_tokens=22.0,
        )
        for role, lines in roles.items()
    }  # fmt: skip
    return Prepared(
        commit="3f2a9c41d07be5586a10",
        anatomy=_anatomy(),
        device="cuda",
        device_name="NVIDIA H200",
        dtype="bfloat16",
        quantization="bnb_4bit",
        weight_bytes=3_900_000,
        source_bytes=11_600_000,
        batch_size=64,
        geometry=geometry(),
        baseline=baseline,
        baseline_outcomes={
            role: _outcomes(lines, baseline[role], noise) for role, lines in roles.items()
        },
        seconds={"load": 2.1, "directions": 0.8, "baseline": 3.4},
    )


def submit_job(session: Session, settings: Settings, user: User, **spec: Any) -> uuid.UUID:
    """A queued job on the seeded prompt sets."""
    values: dict[str, Any] = {
        "name": "Demo model, 4-bit search",
        "model": "small",
        "prompts": {"harmful": "refused-requests", "harmless": "answered-requests"},
    }
    job, _ = submit.submit(session, user, JobSpec.model_validate({**values, **spec}), settings)
    return job.id


def demo_job(
    sessions: Sessions,
    settings: Settings,
    user: User,
    *,
    trials_done: int = 60,
    budget: int = 60,
    finish: bool = True,
    seed: int = 7,
    hostile: str = "",
    screened: bool = False,
    **spec: Any,
) -> uuid.UUID:
    """A job with scored trials. `finish`: held-out scores, a pick, an artifact and a chat too.

    `screened`: what a finished trial dominates is not decoded.

    Without `finish` it is left running, in the middle of its search. `hostile` is appended to
    answers, log lines and progress texts.
    """
    noise = random.Random(seed)
    with sessions.begin() as session:
        job_id = submit_job(session, settings, user, trials=budget, **spec)
        here = worker(session)
    with sessions.begin() as session:
        claim = queue.claim(session, here, settings)
        assert claim is not None and claim.job.id == job_id
        task, token = claim.task, claim.token
        texts = PromptTexts.model_validate(claim.job.prompts)
        asked = JobSpec.model_validate(claim.job.spec)
        trials.store_baseline(session, task, token, prepared(texts, noise))
    _log(settings, task.id, hostile)
    chosen: dict[int, Candidate] = {}
    decoded: defaultdict[str, list[Scores]] = defaultdict(list)
    for number in range(trials_done):
        method, own = turn(asked.methods, number)
        candidate, params = _candidate(noise, method)
        if METHODS[method].kind != "ara" and own == 0:
            candidate, params = single_pass(LAYERS, METHODS[method].mode), {}
        elif METHODS[method].kind != "ara" and own == 1:
            candidate, params = Ablation(attention=constant(), mlp=constant()), {}
        scores = _scores("search", candidate, noise, len(texts.search_harmful))
        further = scorers.of_trials(asked.objectives, asked.scorers)
        scores = scores.model_copy(update={"values": _further(further, scores)})
        said = _outcomes(texts.search_harmful, scores, noise)
        if hostile:
            said = [o.model_copy(update={"text": o.text + hostile}) for o in said]
        with sessions.begin() as session:
            (slot,) = trials.reserve(session, task, token, 1)
            origin = {0: "single_pass", 1: "plain"}.get(own, "sampler")
            trials.begin(session, task, token, slot.number, candidate, params, origin, number)
            scored = Scored(scores=scores, outcomes=said, seconds=1.1 + noise.random())
            if screened and origin == "sampler":
                scored = screen(scored, decoded[method])
            if not scored.screened:
                decoded[method].append(scores)
            trials.complete(session, task, token, slot.number, scored)
            progress.report(
                session, task, token, "searching", number + 1, budget, "scoring 3/4" + hostile
            )
        chosen[slot.number] = candidate
    if finish:
        _finish(sessions, settings, user, here, job_id, task, token, chosen, noise)
    return job_id


def _log(settings: Settings, task_id: uuid.UUID, hostile: str) -> None:
    settings.logs.mkdir(parents=True, exist_ok=True)
    stamp = "2026-01-31T12:0"
    lines = [
        f"{stamp}0:01Z info loading small, nf4 with double quantisation",
        f"{stamp}0:03Z info 16 writers in 8 layers, coverage 100 %",
        f"{stamp}0:04Z info directions of 240 prompts, batch size 64",
        f"\x1b[32m{stamp}0:08Z info\x1b[0m baseline: 98/100 search, 98/100 held-out{hostile}",
        *(f"{stamp}1:{n:02d}Z info trial {n} scored" for n in range(20)),
    ]
    (settings.logs / f"{task_id}.log").write_text("\n".join(lines) + "\n")


def _finish(
    sessions: Sessions,
    settings: Settings,
    user: User,
    here: Worker,
    job_id: uuid.UUID,
    search: Task,
    token: int,
    chosen: dict[int, Candidate],
    noise: random.Random,
) -> None:
    with sessions.begin() as session:
        queue.release(session, search.id, token, state="done")
    with sessions.begin() as session:
        claim = queue.claim(session, here, settings)
        assert claim is not None and claim.task.kind == "evaluate"
        front = trials.front(session, job_id)
        texts = PromptTexts.model_validate(claim.job.prompts)
        for row in trials.to_check(session, job_id):
            scores = _scores("heldout", chosen[row.number], noise, len(texts.heldout_harmful))
            scored = Scored(scores=scores, outcomes=_outcomes(texts.heldout_harmful, scores, noise))
            trials.store_rescored(session, claim.task, claim.token, row.number, "heldout", scored)
        queue.release(session, claim.task.id, claim.token, state="done")
    best = front[min(1, len(front) - 1)]
    with sessions.begin() as session:
        job = control.editable(session, user, job_id)
        control.pick(session, user, job, best.number)
        artifact = artifacts.request(session, user, job, best.number, "merged")
        waiting = artifacts.request(session, user, job, best.number, "lora", 8)
        chat = chats.request(session, user, job, "How do I polish the lamp?", number=best.number)
        ids = (artifact.id, artifact.task_id, chat.id)
        del waiting
    _serve(sessions, settings, here, ids)


def _serve(sessions: Sessions, settings: Settings, here: Worker, ids: tuple[Any, Any, Any]) -> None:
    artifact_id, export_id, chat_id = ids
    for _ in range(3):
        with sessions.begin() as session:
            claim = queue.claim(session, here, settings)
            assert claim is not None
            task, token = claim.task, claim.token
            if task.id == export_id:
                artifacts.mark_running(session, task, token, artifact_id)
                artifacts.mark_ready(
                    session, task, token, artifact_id, _exported(settings, artifact_id)
                )
                queue.release(session, task.id, token, state="done")
            elif task.id == chat_id:
                said = grammar.answer("polish", "lamp", 0)
                answers = [{"prompt": task.payload["prompts"][0], "text": said}]
                payload = {"id": str(task.id), "number": task.payload["number"], "answers": answers}
                events.append(session, task.job_id, "chat", payload)
                queue.release(session, task.id, token, state="done")
            else:
                mine = uuid.UUID(task.payload["artifact"])
                artifacts.mark_running(session, task, token, mine)


def _exported(settings: Settings, artifact_id: uuid.UUID) -> Exported:
    folder = artifacts.folder(settings, artifact_id)
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "README.md": b"# small, abliterated\n",
        "config.json": b'{"architectures": ["LlamaForCausalLM"]}\n',
        "model.safetensors": bytes(1_000_000),
        "tokenizer.json": b"{}\n" * 400,
    }
    files = []
    for name, data in contents.items():
        (folder / name).write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        files.append(ExportedFile(name=name, size=len(data), sha256=digest))
    measured: dict[Role, Scores] = {
        "search": Scores(role="search", refusals=1, total=100, kl_first=0.0021, kl_multi=0.0057),
        "heldout": Scores(role="heldout", refusals=2, total=100, kl_first=0.0023, kl_multi=0.006),
    }
    return Exported(files=files, measured=measured, seconds=3.2)
