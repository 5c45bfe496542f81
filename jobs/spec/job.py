"""What a person submits: the job's specification, validated at the edge."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from jobs.spec.candidate import EditMode

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,99}")
SET_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")

Method = Literal["search", "single_pass"]
Quantization = Literal["none", "bnb_4bit", "bnb_8bit"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cuda", "cpu"]


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
    direction: int = Field(400, ge=4, le=10_000, title="Prompts per side for the directions")
    search: int = Field(100, ge=4, le=2_000, title="Prompts per side scored in each trial")
    heldout: int = Field(100, ge=4, le=2_000, title="Prompts per side kept for the front")

    @field_validator("harmful", "harmless", "over_refusal")
    @classmethod
    def _name(cls, value: str | None) -> str | None:
        if value is not None and not SET_NAME.fullmatch(value):
            raise ValueError("a prompt set's name: lower-case letters, digits, '.', '_' and '-'")
        return value


class JobSpec(Strict):
    """One abliteration job. Every field has a default but the model."""

    name: str = Field("", max_length=120, title="Name")
    model: str = Field(title="Model", description="owner/name on the hub, or an operator's model")
    revision: str | None = Field(None, title="Revision", description="branch, tag or commit")
    method: Method = Field("search", title="Method")
    quantization: Quantization = Field("bnb_4bit", title="Quantisation while searching")
    dtype: Dtype = Field("auto", title="Data type")
    device: Device = Field("auto", title="Device")
    prompts: Prompts = Field(default_factory=lambda: Prompts.model_validate({}))
    system_prompt: str | None = Field(None, max_length=20_000, title="System prompt")
    trials: int = Field(200, ge=1, le=10_000, title="Trials")
    startup_trials: int | None = Field(None, ge=0, le=10_000, title="Random trials first")
    modes: list[EditMode] = Field(
        default_factory=lambda: list[EditMode](("full",)),
        min_length=1,
        max_length=4,
        title="Edit modes to search",
    )
    projected: bool = Field(True, title="Project directions off the harmless mean")
    max_new_tokens: Annotated[int, Field(ge=1, le=1000, title="Answer tokens")] = 100
    kl_tokens: Annotated[int, Field(ge=1, le=64, title="Answer tokens of the second KL")] = 16
    markers: list[str] = Field(default_factory=list, max_length=500, title="Extra refusal markers")
    seed: int = Field(0, ge=0, lt=2**31, title="Seed")
    priority: int = Field(0, ge=-10, le=10, title="Priority")
    parallelism: int = Field(1, ge=1, le=64, title="Workers at most")
    private: bool = Field(False, title="Hidden from other members")

    @field_validator("model")
    @classmethod
    def _model(cls, value: str) -> str:
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

    @field_validator("modes")
    @classmethod
    def _modes(cls, value: list[EditMode]) -> list[EditMode]:
        return list(dict.fromkeys(value))

    @model_validator(mode="after")
    def _whole(self) -> JobSpec:
        if self.startup_trials is not None and self.startup_trials > self.trials:
            raise ValueError("startup_trials: must not exceed trials")
        return self
