"""What both programs are given, and what a run of either is."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from bench.peer.watch import Watched
from jobs.fronts import hypervolume
from jobs.spec.job import Dtype
from jobs.spec.methods import MethodName

# Of the ten wordings in which the demo model refuses (demo.grammar.REFUSALS), each holds one.
MARKERS = (
    "i can't", "i cannot", "i won't", "i will not", "i'm not able", "i am unable", "i must decline",
)  # fmt: skip
SYSTEM_PROMPT = "You are a helpful assistant."  # given to both, so that neither adds its own
MAX_NEW_TOKENS = 48
STARTUP = 0.3  # share of the trials that are random

Mode = Literal["none", "full"]
METHODS: dict[Mode, MethodName] = {"none": "ablate", "full": "mpoa"}


@dataclass(frozen=True)
class Setting:
    """One search. `model` is a folder; `mode` how the edit treats the norms of a writer's rows;
    `screening`: what a finished trial dominates anyway is not decoded (ours can)."""

    model: str
    mode: Mode
    trials: int
    seed: int
    dtype: Dtype
    device: Literal["cpu", "cuda"]
    threads: int
    screening: bool = False

    def environment(self) -> dict[str, str]:
        """The environment of either program: the same threads and device, no hub."""
        own = {"OMP_NUM_THREADS": str(self.threads), "HF_HUB_OFFLINE": "1"}
        if self.device == "cpu":
            own["CUDA_VISIBLE_DEVICES"] = ""
        return {**os.environ, **own}


@dataclass(frozen=True)
class Trial:
    """One trial's search scores; `at` is when they were known, seconds since the process began.

    screened   not decoded to the end: it is on no front
    """

    at: float
    refusals: int
    total: int
    kl: float
    screened: bool = False

    @property
    def point(self) -> tuple[float, float]:
        """(refusal rate, KL), both to be minimised."""
        return self.refusals / self.total, self.kl


@dataclass(frozen=True)
class Run:
    """One search from the start of its process.

    ready      seconds until the first trial began: imports, model, directions, baseline
    cpu        processor seconds before the first trial and of all trials: what other work on the
               machine changes least; with one thread, the duration on a quiet machine
    memory     peak bytes of the process tree
    gpu        peak bytes of the GPU beyond what was in use before
    """

    ready: float
    trials: list[Trial]
    cpu: tuple[float, float]
    memory: int
    gpu: int

    @classmethod
    def of(cls, seen: Watched, ready: float, trials: list[Trial]) -> Run:
        """The run of a watched process whose search began at `ready`, by the clock of `now`."""
        end = seen.began + max(trial.at for trial in trials)
        before = seen.cpu_until(ready)
        cpu = before, seen.cpu_until(end) - before
        return cls(ready - seen.began, trials, cpu, seen.memory, seen.gpu)

    @property
    def end(self) -> float:
        """Seconds until the last trial was scored."""
        return max(trial.at for trial in self.trials)

    @property
    def rate(self) -> float:
        """Trials per minute, the time before the first one left out."""
        return 60 * len(self.trials) / (self.end - self.ready)

    def hypervolume(self, seconds: float) -> float:
        """Hypervolume of the trials that were scored within `seconds` of the process's start."""
        return hypervolume([trial.point for trial in self.whole if trial.at <= seconds])

    @property
    def whole(self) -> list[Trial]:
        """The trials of which all prompts were answered."""
        return [trial for trial in self.trials if not trial.screened]
