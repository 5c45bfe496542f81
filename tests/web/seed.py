"""Realistic jobs without a worker: written through the functions that workers use.

    with sessions.begin() as session: prompt_sets(session, user)
    job_id = demo_job(sessions, settings, user, trials=60)

What an engine would have told is invented (`invented.py`).
"""

from __future__ import annotations

import hashlib
import json
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
from jobs.spec.candidate import Ablation, Candidate, constant, single_pass
from jobs.spec.job import JobSpec
from jobs.spec.methods import METHODS, turn
from jobs.spec.protocol import (
    Exported,
    ExportedFile,
    PromptTexts,
    Scored,
)
from jobs.spec.scores import Role, Scores
from jobs.tables import Task, User, Worker
from tests.web import invented

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
        trials.store_baseline(session, task, token, invented.prepared(texts, noise))
    _log(settings, task.id, hostile)
    chosen: dict[int, Candidate] = {}
    decoded: defaultdict[str, list[Scores]] = defaultdict(list)
    for number in range(trials_done):
        method, own = turn(asked.methods, number)
        candidate, params = invented.candidate(noise, method)
        if METHODS[method].kind != "ara" and own == 0:
            candidate, params = single_pass(invented.LAYERS, METHODS[method].mode), {}
        elif METHODS[method].kind != "ara" and own == 1:
            candidate, params = Ablation(attention=constant(), mlp=constant()), {}
        scores = invented.scores("search", candidate, noise, len(texts.search_harmful))
        further = scorers.of_trials(asked.objectives, asked.scorers)
        scores = scores.model_copy(update={"values": invented.further(further, scores)})
        said = invented.outcomes(texts.search_harmful, scores, noise)
        if hostile:
            said = [o.model_copy(update={"text": o.text + hostile}) for o in said]
        with sessions.begin() as session:
            (slot,) = trials.reserve(session, task, token, 1)
            origin = {0: "single_pass", 1: "plain"}.get(own, "sampler")
            trials.begin(session, task, token, slot.number, candidate, params, origin, number)
            scored = Scored(scores=scores, outcomes=said, seconds=1.1 + noise.random())
            if screened and origin == "sampler":
                scored = invented.screen(scored, decoded[method])
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
            asked = texts.heldout_harmful
            scores = invented.scores("heldout", chosen[row.number], noise, len(asked))
            scored = Scored(scores=scores, outcomes=invented.outcomes(asked, scores, noise))
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
