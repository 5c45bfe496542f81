"""The engine protocol: JSON lines over two dedicated pipes, one message a line.

The supervisor starts `python -m engine --read FD --write FD` and sends one request at a time.
The engine answers any number of `Progress` and `Log` messages and then exactly one `Result` or
`Error` with the request's id. End of file on the engine's read pipe means: stop at once.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, TypeAdapter

from jobs.spec.candidate import Candidate, Component
from jobs.spec.job import Device, Dtype, Quantization
from jobs.spec.scores import Outcome, Role, Scores

Reason = Literal[
    "out_of_memory",
    "model_not_found",
    "gated_model",
    "hub_unreachable",
    "unsafe_weights",
    "unsupported_architecture",
    "missing_library",
    "disk_full",
    "bad_prompts",
    "bad_request",
    "stopped",
    "engine_failed",
    "engine_died",
]


class PromptTexts(BaseModel):
    """The prompts of a job by role, disjoint between roles."""

    direction_harmful: list[str]
    direction_harmless: list[str]
    search_harmful: list[str]
    search_harmless: list[str]
    heldout_harmful: list[str]
    heldout_harmless: list[str]
    over_refusal: list[str] = []


class Prepare(BaseModel):
    """Load the model, find its writers, measure directions and the original's scores.

    `path` is a folder on this machine; without it `model`@`revision` comes from the hub.
    Two equal Prepare requests lead to the same prepared engine, so it may be reused.
    """

    op: Literal["prepare"] = "prepare"
    model: str
    revision: str | None = None
    path: str | None = None
    quantization: Quantization = "none"
    dtype: Dtype = "auto"
    device: Device = "auto"
    prompts: PromptTexts
    system_prompt: str | None = None
    max_new_tokens: int = 100
    kl_tokens: int = 16
    markers: list[str] = []
    seed: int = 0


class Score(BaseModel):
    """Score candidates on one role's prompts. `max_new_tokens` overrides the job's."""

    op: Literal["score"] = "score"
    candidates: list[Candidate]
    role: Role = "search"
    max_new_tokens: int | None = None


class Respond(BaseModel):
    """Whole answers to prompts: of a candidate, or of the original where it is None."""

    op: Literal["respond"] = "respond"
    prompts: list[str]
    candidate: Candidate | None = None
    max_new_tokens: int = 200


class Export(BaseModel):
    """Write an artifact into `directory`, which exists and is empty.

    kind `merged`: whole model, from the original safetensors tensor by tensor.
    kind `adapter`: PEFT; DoRA rank 1 (exact) for mode `full`, else LoRA of `rank`.
    kind `lora`: plain LoRA of `rank` with its measured truncation error, for any mode.
    With `measure` the artifact is loaded from disk and scored like the original was.
    """

    op: Literal["export"] = "export"
    candidate: Candidate
    kind: Literal["merged", "adapter", "lora"] = "merged"
    directory: str
    rank: int = 8
    measure: bool = True
    card: dict[str, Any] = {}


class Stop(BaseModel):
    """End the process in good order."""

    op: Literal["stop"] = "stop"


Request = Annotated[Prepare | Score | Respond | Export | Stop, Field(discriminator="op")]


class Envelope(BaseModel):
    """A request on the wire."""

    id: int
    request: Request


# --- answers ------------------------------------------------------------------------------------


class WriterReport(BaseModel):
    """One writer matrix and whether the edit covers it."""

    name: str
    layer: int
    component: Component
    shape: tuple[int, ...]
    covered: bool = True
    reason: str = ""


class AnatomyReport(BaseModel):
    """Which matrices write to the residual stream, and the share that edits cover."""

    architecture: str
    layers: int
    hidden: int
    writers: list[WriterReport]
    coverage: float = Field(description="covered share of the writing parameters, 0..1")


class Prepared(BaseModel):
    """Result of `prepare`."""

    commit: str | None = None
    anatomy: AnatomyReport
    device: str
    device_name: str
    dtype: str
    quantization: Quantization
    weight_bytes: int = Field(description="bytes of the loaded weights")
    source_bytes: int = Field(description="bytes of the same weights in bf16")
    batch_size: int
    response_prefix: str = ""
    baseline: dict[Role, Scores]
    baseline_outcomes: dict[Role, list[Outcome]]
    seconds: dict[str, float] = {}
    versions: dict[str, str] = {}
    warnings: list[str] = []


class Scored(BaseModel):
    """One candidate's scores on one role, with the outcome of every harmful prompt."""

    scores: Scores
    outcomes: list[Outcome]
    seconds: float = 0.0


class ScoredBatch(BaseModel):
    """Result of `score`, in the order of the request's candidates."""

    scored: list[Scored]


class Responses(BaseModel):
    """Result of `respond`."""

    texts: list[str]


class ExportedFile(BaseModel):
    """A file of an artifact; `name` is relative to its directory."""

    name: str
    size: int
    sha256: str


class Exported(BaseModel):
    """Result of `export`. `measured` holds the scores of the artifact as loaded from disk."""

    files: list[ExportedFile]
    truncation_error: float | None = None
    measured: dict[Role, Scores] = {}
    seconds: float = 0.0


class Progress(BaseModel):
    """How far a request is: `done` of `total` units of `phase`."""

    type: Literal["progress"] = "progress"
    id: int
    phase: str
    done: float = 0
    total: float = 0
    text: str = ""


class Log(BaseModel):
    """A line for the task's log."""

    type: Literal["log"] = "log"
    id: int = 0
    level: Literal["debug", "info", "warning", "error"] = "info"
    text: str


class Partial(BaseModel):
    """A piece of a streamed answer to `respond`, or one candidate's finished score.

    `index` is the prompt's (or candidate's) place in the request.
    """

    type: Literal["partial"] = "partial"
    id: int
    index: int
    text: str = ""
    scored: Scored | None = None


class Result(BaseModel):
    """The last message of a request that succeeded; `value` is the op's result as JSON."""

    type: Literal["result"] = "result"
    id: int
    value: dict[str, Any] = {}


class Error(BaseModel):
    """The last message of a request that failed. `mend` says what a person can do."""

    type: Literal["error"] = "error"
    id: int
    reason: Reason
    message: str
    mend: str = ""
    detail: str = ""


Answer = Annotated[Progress | Log | Partial | Result | Error, Field(discriminator="type")]
answers: TypeAdapter[Progress | Log | Partial | Result | Error] = TypeAdapter(Answer)
