"""The engine protocol: JSON lines over two dedicated pipes, one message a line.

The supervisor starts `python -m engine --read FD --write FD` and sends one request at a time.
The engine answers any number of `Progress`, `Log` and `Partial` messages and then exactly one
`Result` or `Error` with the request's id. Only `More` is sent while another request runs, and has
no answer of its own. End of file on the engine's read pipe means: stop at once.
"""

from __future__ import annotations

from math import prod
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, TypeAdapter

from jobs.spec.candidate import Candidate, Component, Recipe
from jobs.spec.job import Device, DeviceMap, Dtype, Quantization
from jobs.spec.scorers import ScorerName
from jobs.spec.scores import Outcome, Role, Scores, Value

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


Purpose = Literal["abliterate", "evaluate", "respond"]


class PromptTexts(BaseModel):
    """The prompts of a job by role, disjoint between roles."""

    direction_harmful: list[str]
    direction_harmless: list[str]
    search_harmful: list[str]
    search_harmless: list[str]
    heldout_harmful: list[str]
    heldout_harmless: list[str]
    over_refusal: list[str] = []
    texts: list[str] = []


NOTHING = PromptTexts(
    direction_harmful=[], direction_harmless=[], search_harmful=[], search_harmless=[],
    heldout_harmful=[], heldout_harmless=[],
)  # fmt: skip


class Prepare(BaseModel):
    """Load the model, find its writers, measure directions and the original's scores.

    `path` is a folder on this machine; without it `model`@`revision` comes from the hub.
    Two equal Prepare requests lead to the same prepared engine, so it may be reused.

    purpose      abliterate: all of it; evaluate: no directions, no edits; respond: the model alone
    recipes      the directions that candidates will ask for
    ara          whether candidates of method `ara` will be scored
    affine       whether affine candidates will be
    router       whether candidates that suppress experts will be
    scorers      further scorers that `Score` will be asked for
    batch_size   rows at once, pinned for reproduction; None: by free memory
    """

    op: Literal["prepare"] = "prepare"
    model: str
    revision: str | None = None
    path: str | None = None
    quantization: Quantization = "none"
    dtype: Dtype = "auto"
    device: Device = "auto"
    device_map: DeviceMap = "single"
    purpose: Purpose = "abliterate"
    recipes: list[Recipe] = [Recipe()]
    ara: bool = False
    affine: bool = False
    router: bool = False
    allow_partial: bool = False
    scorers: list[ScorerName] = []
    batch_size: int | None = None
    prompts: PromptTexts
    system_prompt: str | None = None
    max_new_tokens: int = 100
    kl_tokens: int = 16
    markers: list[str] = []
    seed: int = 0


class Score(BaseModel):
    """Score candidates on one role's prompts. `max_new_tokens` overrides the job's.

    scorers   further scores, besides refusals and KL (see `jobs.spec.scorers`)
    whole     answers are not cut where they are certainly refusals: a judge reads them
    kl_multi  the KL over several tokens as well as at the first
    finished  objectives of finished trials by name, refusals as a rate: a candidate that one of
              them dominates whatever it answers is not decoded as a whole (`Scored.screened`)
    joined    others will join the candidates while they are scored (`More`)
    """

    op: Literal["score"] = "score"
    candidates: list[Candidate]
    role: Role = "search"
    max_new_tokens: int | None = None
    scorers: list[ScorerName] = []
    whole: bool = False
    kl_multi: bool = True
    finished: list[dict[str, float]] = []
    joined: bool = False


class More(BaseModel):
    """Candidates that join the `score` with the id `of` while it runs, so that nothing waits.

    Their places follow those of the candidates before them, and `finished` counts for them alone.
    They come back as partials; the result holds the request's own candidates. There is no answer
    of its own: if that request has ended in the meantime nothing is done.
    """

    op: Literal["more"] = "more"
    of: int
    candidates: list[Candidate]
    finished: list[dict[str, float]] = []


class Select(BaseModel):
    """Choose a single-pass edit as the original paper does (Arditi et al. 2024, section 2.3, C).

    Among the directions of all `positions` and layers below 0.8 L: the one with the least
    first-token refusal log-odds after ablation, KL at most `kl_limit`, and refusal induced when
    the direction is added.
    """

    op: Literal["select"] = "select"
    positions: list[int] = [-1, -2, -3, -4, -5]
    kl_limit: float = 0.1


class Compare(BaseModel):
    """Score another model (an artifact, a fine-tune) against the prepared one as the original."""

    op: Literal["compare"] = "compare"
    model: str
    revision: str | None = None
    path: str | None = None
    roles: list[Role] = ["search", "heldout", "over_refusal"]
    scorers: list[ScorerName] = []


class Benchmark(BaseModel):
    """Run lm-evaluation-harness tasks on a candidate, or on the original where it is None.

    `task_folder` holds task files of the operator's own; `limit` is samples per task. `planned`
    tasks will be asked for later: they must be known as well, so that a misspelt one costs nothing.
    """

    op: Literal["benchmark"] = "benchmark"
    tasks: list[str]
    planned: list[str] = []
    candidate: Candidate | None = None
    limit: int | None = None
    task_folder: str | None = None


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


Request = Annotated[
    Prepare | Score | More | Select | Compare | Benchmark | Respond | Export | Stop,
    Field(discriminator="op"),
]


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

    @property
    def parameters(self) -> int:
        """Number of elements; a stack of experts counts all of them."""
        return prod(self.shape) if self.shape else 0


class AnatomyReport(BaseModel):
    """Which matrices write to the residual stream, and the share that edits cover."""

    architecture: str
    layers: int
    hidden: int
    writers: list[WriterReport]
    coverage: float = Field(description="covered share of the writing parameters, 0..1")
    shares: dict[str, float] = Field(
        default={}, description="share of attention, mlp, experts and missed in them, 0..1"
    )


class LayerGeometry(BaseModel):
    """How the two sides lie after one block; states of the last prompt token.

    norm_*                     mean ‖h‖ of each side, ‖difference of means‖
    cosine_means               between the means of both sides
    cosine_direction_harmless  between the difference of means and the harmless mean
    cosine_next                between this layer's difference of means and the next layer's
    separation                 d′ along the difference: (m_b − m_g)/√((s_b² + s_g²)/2)
    silhouette                 of the two sides as clusters, −1..1 (Rousseeuw 1987)
    """

    layer: int
    norm_harmful: float
    norm_harmless: float
    norm_difference: float
    cosine_means: float
    cosine_direction_harmless: float
    cosine_next: float
    separation: float
    silhouette: float


class Geometry(BaseModel):
    """Figures per layer, and per layer the 2-D points of [harmful, harmless] prompts."""

    layers: list[LayerGeometry]
    points: list[list[list[tuple[float, float]]]]


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
    ahead: int = Field(
        default=0,
        description="candidates to have in hand where each is scored by itself, so that the engine "
        "never waits for the next; 0: they come in batches",
    )
    response_prefix: str = ""
    geometry: Geometry | None = None
    baseline: dict[Role, Scores]
    baseline_outcomes: dict[Role, list[Outcome]]
    seconds: dict[str, float] = {}
    versions: dict[str, str] = {}
    warnings: list[str] = []


class Scored(BaseModel):
    """One candidate's scores on one role, with the outcome of every harmful prompt.

    screened   dominated by a finished trial whatever it answers: not all prompts were answered, and
               `scores.refusals` of `scores.total` is what the answered ones gave
    """

    scores: Scores
    outcomes: list[Outcome]
    seconds: float = 0.0
    screened: bool = False


class ScoredBatch(BaseModel):
    """Result of `score`, in the order of the request's own candidates."""

    scored: list[Scored]


class Choice(BaseModel):
    """One direction that `select` looked at. KL in nats, log-odds in nats."""

    position: int
    layer: int
    log_odds: float
    kl: float
    induced: float
    kept: bool


class Selected(BaseModel):
    """Result of `select`: the candidate, and all that was looked at, best first."""

    candidate: Candidate
    choices: list[Choice]


class Compared(BaseModel):
    """Result of `compare`, by role."""

    scored: dict[Role, Scored]
    commit: str | None = None
    warnings: list[str] = []


class Benchmarked(BaseModel):
    """Result of `benchmark`: `<task>.<metric>` -> value with its standard error's interval."""

    values: dict[str, Value]
    versions: dict[str, str] = {}
    seconds: float = 0.0


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

    `index` is the prompt's (or candidate's) place in the request, those that joined behind it.
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
