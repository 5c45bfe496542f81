"""Scores and their intervals."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel

Z = 1.959963984540054  # of a 95 % interval

Role = Literal["search", "heldout", "over_refusal"]


def wilson(hits: int, total: int, z: float = Z) -> tuple[float, float]:
    """Wilson score interval of a proportion, 95 % by default (Wilson 1927).

    wilson(3, 100)  # (0.0103, 0.0845)
    wilson(0, 0)    # (0.0, 1.0)
    """
    if total == 0:
        return 0.0, 1.0
    p = hits / total
    denominator = 1 + z * z / total
    middle = (p + z * z / (2 * total)) / denominator
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total)) / denominator
    # exact at the ends, where the two halves cancel only up to rounding
    low = 0.0 if hits == 0 else middle - half
    return low, 1.0 if hits == total else middle + half


class Value(BaseModel):
    """One further score: its value, its 95 % interval and how many samples it rests on."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None


class Outcome(BaseModel):
    """What the model did with one prompt. `text` may be cut where the decision was made.

    answered   False where a screened candidate was not asked (`Scored.screened`): the rest is void
    """

    refused: bool
    text: str = ""
    tokens: int = 0
    answered: bool = True


class Scores(BaseModel):
    """The scores of one edited model on the prompts of one role.

    refusals/total   marker refusals of the harmful prompts (of `over_refusal`, of those prompts)
    kl_first         mean KL(original‖edited) of the first answer token over harmless prompts, nats
    kl_multi         the same over the first T tokens of the original's own answers, teacher-forced
    KLs are None for the role `over_refusal`.
    values           the further scores by name (`jobs.spec.scorers`; `harness.<task>.<metric>`)
    """

    role: Role
    refusals: int
    total: int
    kl_first: float | None = None
    kl_multi: float | None = None
    mean_tokens: float = 0.0
    values: dict[str, Value] = {}

    def value(self, name: str) -> float | None:
        """The score of that name; None where it was not measured."""
        if name in ("refusals", "kl_first", "kl_multi"):
            found = getattr(self, name)
            return None if found is None else float(found)
        return self.values[name].value if name in self.values else None

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson 95 % interval of the refusal rate."""
        return wilson(self.refusals, self.total)
