"""Small jobs, models, workers and scores for the tests of the service."""

from __future__ import annotations

import json
import struct
import uuid
from pathlib import Path
from typing import Any

from sqlalchemy import text
from sqlalchemy.orm import Session

from jobs import prompts, queue, submit, workers
from jobs.database import Sessions
from jobs.settings import Settings
from jobs.spec.candidate import Candidate, single_pass
from jobs.spec.job import JobSpec
from jobs.spec.protocol import Scored
from jobs.spec.scores import Outcome, Scores
from jobs.tables import Job, User, Worker

CANDIDATE: Candidate = single_pass(8)


def write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> int:
    """A safetensors file of zeros, written by the format's description. Bytes of its tensors."""
    width, at, header = {"BF16": 2, "F32": 4}[dtype], 0, dict[str, Any]()
    for name, shape in shapes.items():
        size = width
        for count in shape:
            size *= count
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    plain = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(plain)) + plain + bytes(at))
    return at


def write_model(folder: Path, *, hidden: int = 16, layers: int = 2) -> Path:
    """A folder that looks like a Llama checkpoint; its weights are zeros."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 100,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (100, hidden)}
    for layer in range(layers):
        shapes[f"model.layers.{layer}.self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"model.layers.{layer}.mlp.down_proj.weight"] = (hidden, 4 * hidden)
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (hidden,)
    write_safetensors(folder / "model.safetensors", shapes)
    return folder


def add_prompts(session: Session, owner: User, count: int = 40) -> None:
    """The sets `asked` and `plain`, unsplit, with `count` different prompts each."""
    for name in ("asked", "plain"):
        lines: list[prompts.Line] = [
            {"prompt": f"{name} question {number}", "split": None} for number in range(count)
        ]
        prompts.create_set(session, owner, name, lines)


def make_spec(**changes: Any) -> JobSpec:
    """A job on the model `tiny` and the sets of `add_prompts`."""
    values: dict[str, Any] = {
        "model": "tiny",
        "trials": 3,
        "prompts": {"harmful": "asked", "harmless": "plain"},
    }
    return JobSpec.model_validate({**values, **changes})


def add_job(session: Session, owner: User, settings: Settings, **changes: Any) -> Job:
    """A submitted job."""
    job, created = submit.submit(session, owner, make_spec(**changes), settings)
    assert created
    return job


def add_worker(session: Session, **changes: Any) -> Worker:
    """A worker that accepts everything and has room for anything."""
    values: dict[str, Any] = {
        "name": f"worker-{uuid.uuid4().hex[:6]}",
        "host": "here",
        "pid": 1,
        "accepts": ["search", "evaluate", "export", "chat", "benchmark"],
        "device": {"kind": "cpu", "name": "test", "memory_bytes": 10**12},
        "versions": {},
    }
    return workers.register(session, **{**values, **changes})


def held(sessions: Sessions, owner: User, settings: Settings, **changes: Any) -> queue.Claim:
    """A new job's first task, claimed by a new worker."""
    with sessions.begin() as session:
        add_job(session, owner, settings, **changes)
    with sessions.begin() as session:
        claim = queue.claim(session, add_worker(session), settings)
        assert claim is not None
        return claim


def scored(refusals: int = 1, kl: float = 0.5, role: str = "search", total: int = 4) -> Scored:
    """A score with one outcome per prompt."""
    outcomes = [Outcome(refused=i < refusals, text=f"answer {i}", tokens=3) for i in range(total)]
    scores = Scores.model_validate(
        {"role": role, "refusals": refusals, "total": total, "kl_first": kl, "kl_multi": kl / 2}
    )
    return Scored(scores=scores, outcomes=outcomes, seconds=0.25)


def lapse(session: Session, task_id: uuid.UUID) -> None:
    """Let a lease end now, as if its worker had not been heard of for long enough."""
    session.execute(
        text("UPDATE tasks SET lease_expires_at = now() - interval '1 second' WHERE id = :id"),
        {"id": task_id},
    )
