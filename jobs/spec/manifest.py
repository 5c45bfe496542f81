"""The manifest of an artifact: what its bytes depend on, so that it can be made again."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel

from jobs.spec.candidate import Candidate
from jobs.spec.job import Prompts
from jobs.spec.protocol import ExportedFile, Prepare, PromptTexts
from jobs.spec.scores import Role, Scores

NAME = "manifest.json"


class PromptsHash(BaseModel):
    """The prompts of one role: how many, and the SHA-256 of their JSON list. No text."""

    count: int
    sha256: str


class Machine(BaseModel):
    """What computed it. `driver` and `cuda` are empty without a GPU."""

    device: str
    device_name: str
    driver: str = ""
    cuda: str = ""
    threads: int
    platform: str


class Source(BaseModel):
    """The model that was edited: its commit on the hub, and its weight files."""

    model: str
    commit: str | None
    files: list[ExportedFile]


class Manifest(BaseModel):
    """Settings, versions, machine, hashes and scores of one artifact.

    settings   the `prepare` request without prompts and path; its batch size is the one used
    template   how the chat template was asked: switches, date
    sets       the prompt sets by name and how many of each were wanted
    dtype      what the weights were computed in
    files      of the artifact, but for this manifest, the card and the checksums
    """

    format: Literal[1] = 1
    nullspace: str
    source: Source
    settings: Prepare
    dtype: str
    response_prefix: str
    template: dict[str, Any] = {}
    prompts: dict[str, PromptsHash]
    sets: Prompts | None = None
    candidate: Candidate
    kind: Literal["merged", "adapter", "lora"]
    rank: int
    versions: dict[str, str]
    machine: Machine
    measured: dict[Role, Scores]
    files: list[ExportedFile]


def hashes(prompts: PromptTexts) -> dict[str, PromptsHash]:
    """The hash of each role's prompts, in their order."""
    return {role: PromptsHash(count=len(texts), sha256=digest(texts)) for role, texts in prompts}


def digest(texts: list[str]) -> str:
    """SHA-256 of a list of texts as compact JSON in UTF-8."""
    plain = json.dumps(texts, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(plain.encode()).hexdigest()


def without_prompts(request: Prepare, batch_size: int) -> Prepare:
    """A request's settings as a manifest keeps them."""
    empty = PromptTexts.model_validate({role: [] for role in PromptTexts.model_fields})
    return request.model_copy(update={"prompts": empty, "path": None, "batch_size": batch_size})
