"""What a person submits: the job's specification, validated at the edge."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from jobs.spec.methods import METHODS, MethodName
from jobs.spec.scorers import OBJECTIVES, SCORERS, ScorerName

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,99}")
SET_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")

TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}")

Kind = Literal["abliterate", "evaluate", "benchmark"]
Quantization = Literal["none", "bnb_4bit", "bnb_8bit"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cuda", "cpu"]
DeviceMap = Literal["single", "auto", "offload"]
SamplerName = Literal["tpe", "nsga3", "cmaes", "qnehvi"]


# What a kind has no use for. A value of one's own there is an error, since it would be ignored.
SEARCH_ONLY = (
    "methods", "allow_partial", "trials", "startup_trials", "sampler", "screening", "warm_start",
    "objectives", "parallelism",
)  # fmt: skip
UNUSED: dict[Kind, tuple[str, ...]] = {
    "abliterate": ("original",),
    "evaluate": SEARCH_ONLY,
    "benchmark": (
        *SEARCH_ONLY, "prompts", "system_prompt", "scorers", "judge", "max_new_tokens",
        "kl_tokens", "markers",
    ),
}  # fmt: skip


class Strict(BaseModel):
    """Base of everything that comes from outside: unknown fields are errors."""

    model_config = ConfigDict(extra="forbid")


class Prompts(Strict):
    """Which prompt sets a job uses and how many prompts of each role.

    A set whose lines carry a `split` is used as split. Any other set is de-duplicated and cut, in
    this order, into `search`, `heldout` and `direction` prompts; the three never overlap.
    """

    harmful: str = Field("demo-refused", title="Prompts that the model refuses")
    harmless: str = Field("demo-answered", title="Prompts that the model answers")
    over_refusal: str | None = Field(None, title="Harmless prompts that look refusable")
    texts: str | None = Field(None, title="Texts for perplexity")
    direction: int = Field(400, ge=4, le=10_000, title="Prompts per side for the directions")
    search: int = Field(100, ge=4, le=2_000, title="Prompts per side scored in each trial")
    heldout: int = Field(100, ge=4, le=2_000, title="Prompts per side kept for the front")

    @field_validator("harmful", "harmless", "over_refusal", "texts")
    @classmethod
    def _name(cls, value: str | None) -> str | None:
        if value is not None and not SET_NAME.fullmatch(value):
            raise ValueError("a prompt set's name: lower-case letters, digits, '.', '_' and '-'")
        return value


class JobSpec(Strict):
    """One job. Every field has a default but the model.

    kind    abliterate: search for edits; evaluate: score the model as it is, and its KL from
            `original` where that is given; benchmark: run harness tasks on it, and on `original`
    Fields that a kind has no use for (UNUSED) keep their defaults.
    """

    name: str = Field("", max_length=120, title="Name")
    kind: Kind = Field("abliterate", title="Kind")
    model: str = Field(title="Model", description="owner/name on the hub, or an operator's model")
    revision: str | None = Field(None, title="Revision", description="branch, tag or commit")
    original: str | None = Field(
        None, title="Original", description="evaluate, benchmark: the model to compare with"
    )
    methods: list[MethodName] = Field(
        default_factory=lambda: list[MethodName](("mpoa",)),
        min_length=1,
        max_length=len(METHODS),
        title="Methods, compared under one budget",
    )
    allow_partial: bool = Field(False, title="Edit a model of which some writers cannot be reached")
    quantization: Quantization = Field("bnb_4bit", title="Quantisation while searching")
    dtype: Dtype = Field("auto", title="Data type")
    device: Device = Field("auto", title="Device")
    device_map: DeviceMap = Field("single", title="Spread over several GPUs, or onto the CPU")
    prompts: Prompts = Field(default_factory=lambda: Prompts.model_validate({}))
    system_prompt: str | None = Field(None, max_length=20_000, title="System prompt")
    trials: int = Field(200, ge=1, le=10_000, title="Trials")
    startup_trials: int | None = Field(None, ge=0, le=10_000, title="Random trials first")
    sampler: SamplerName = Field("tpe", title="Sampler")
    screening: bool = Field(True, title="Do not decode what a finished trial dominates anyway")
    warm_start: bool = Field(True, title="Begin with what earlier jobs on such models found")
    objectives: list[ScorerName] = Field(
        default_factory=lambda: list[ScorerName](("refusals", "kl_first")),
        min_length=2,
        max_length=3,
        title="What the search minimises",
    )
    scorers: list[ScorerName] = Field(
        default_factory=list, max_length=len(SCORERS), title="Further scores of the front"
    )
    tasks: list[str] = Field(default_factory=list, max_length=50, title="Harness tasks")
    task_limit: int | None = Field(None, ge=1, le=100_000, title="Samples per harness task")
    judge: str | None = Field(None, max_length=64, title="Judge", description="an operator's judge")
    max_new_tokens: Annotated[int, Field(ge=1, le=1000, title="Answer tokens")] = 100
    kl_tokens: Annotated[int, Field(ge=1, le=64, title="Answer tokens of the second KL")] = 16
    markers: list[str] = Field(default_factory=list, max_length=500, title="Extra refusal markers")
    seed: int = Field(0, ge=0, lt=2**31, title="Seed")
    priority: int = Field(0, ge=-10, le=10, title="Priority")
    parallelism: int = Field(1, ge=1, le=64, title="Workers at most")
    private: bool = Field(False, title="Hidden from other members")

    @field_validator("model", "original")
    @classmethod
    def _model(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if not MODEL_NAME.fullmatch(value) or ".." in value:
            raise ValueError(
                "a model is owner/name on the hub or the name of a folder in the operator's models "
                "folder; paths and addresses are not accepted"
            )
        return value

    @field_validator("revision")
    @classmethod
    def _revision(cls, value: str | None) -> str | None:
        if value is not None and (not REVISION.fullmatch(value) or ".." in value):
            raise ValueError("a revision is a branch, a tag or a commit")
        return value

    @field_validator("name", "system_prompt")
    @classmethod
    def _text(cls, value: str | None) -> str | None:
        if value is not None and "\x00" in value:
            raise ValueError("must not hold NUL characters")
        return value.strip() if value is not None else None

    @field_validator("methods", "objectives", "scorers")
    @classmethod
    def _once(cls, value: list[str]) -> list[str]:
        return list(dict.fromkeys(value))

    @field_validator("objectives")
    @classmethod
    def _objectives(cls, value: list[ScorerName]) -> list[ScorerName]:
        for name in value:
            if not SCORERS[name].objective:
                raise ValueError(
                    f"{name} cannot be minimised by a search; choose among {', '.join(OBJECTIVES)}"
                )
        if len(value) < 2:
            raise ValueError("a search needs two different objectives")
        return value

    @field_validator("tasks")
    @classmethod
    def _tasks(cls, value: list[str]) -> list[str]:
        for name in value:
            if not TASK_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not the name of a harness task")
        return list(dict.fromkeys(value))

    @model_validator(mode="after")
    def _whole(self) -> JobSpec:
        for name in UNUSED[self.kind]:
            usual = type(self).model_fields[name].get_default(call_default_factory=True)
            if getattr(self, name) != usual:
                raise ValueError(
                    f"{name}: a job of kind {self.kind} has no use for it; leave it out"
                )
        if self.startup_trials is not None and self.startup_trials > self.trials:
            raise ValueError("startup_trials: must not exceed trials")
        if self.kind == "benchmark" and not self.tasks:
            raise ValueError("tasks: a benchmark needs at least one harness task")
        if "perplexity" in self.scorers and self.prompts.texts is None:
            raise ValueError("prompts.texts: the scorer perplexity needs a prompt set with texts")
        if self.kind == "abliterate" and self.tasks and "harness" not in self.scorers:
            raise ValueError("scorers: harness is missing; add it, or leave tasks out")
        if self.kind != "benchmark" and self.judge is not None and "judge" not in self.scorers:
            raise ValueError("scorers: judge is missing; add it, or name no judge")
        if "judge" in self.scorers and self.judge is None:
            raise ValueError(
                "judge: the scorer judge needs the name of one of the operator's judges"
            )
        if "harness" in self.scorers and not self.tasks:
            raise ValueError("tasks: the scorer harness needs at least one task")
        return self
