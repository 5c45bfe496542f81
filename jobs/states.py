"""The states of jobs, tasks, trials and artifacts, and the legal moves between them."""

from __future__ import annotations

from typing import Literal

JobState = Literal["queued", "running", "paused", "completed", "failed", "cancelled"]
Desired = Literal["run", "pause", "cancel"]
TaskState = Literal["ready", "running", "paused", "done", "failed", "cancelled"]
TaskKind = Literal["search", "evaluate", "export", "chat", "benchmark"]
TrialState = Literal["running", "complete", "failed"]
ArtifactState = Literal["queued", "running", "ready", "failed", "cancelled"]
ArtifactKind = Literal["merged", "adapter", "lora"]

# A finished job runs again when it gets more trials; a cancelled or failed one only by `resume`.
JOB_MOVES: dict[JobState, frozenset[JobState]] = {
    "queued": frozenset({"running", "paused", "cancelled", "failed"}),
    "running": frozenset({"queued", "paused", "completed", "failed", "cancelled"}),
    "paused": frozenset({"queued", "cancelled"}),
    "completed": frozenset({"queued"}),
    "failed": frozenset({"queued", "cancelled"}),
    "cancelled": frozenset(),
}
TASK_MOVES: dict[TaskState, frozenset[TaskState]] = {
    "ready": frozenset({"running", "paused", "cancelled"}),
    "running": frozenset({"ready", "paused", "done", "failed", "cancelled"}),
    "paused": frozenset({"ready", "cancelled"}),
    "done": frozenset({"ready"}),
    "failed": frozenset({"ready", "cancelled"}),
    "cancelled": frozenset(),
}
JOB_OVER: frozenset[JobState] = frozenset({"completed", "failed", "cancelled"})
TASK_OVER: frozenset[TaskState] = frozenset({"done", "failed", "cancelled"})
