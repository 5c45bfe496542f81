"""What an engine would tell, from a seeded formula with the shape of a real search: strong edits
remove refusals and cost divergence, so the points form a front."""

from __future__ import annotations

import math
import random
from typing import Any

from demo import grammar
from jobs.spec.candidate import Ablation, Ara, Candidate, Kernel
from jobs.spec.methods import METHODS, MethodName
from jobs.spec.protocol import (
    AnatomyReport,
    Geometry,
    LayerGeometry,
    Prepared,
    PromptTexts,
    Scored,
    WriterReport,
)
from jobs.spec.scorers import ScorerName
from jobs.spec.scores import Outcome, Role, Scores, Value

LAYERS = 8


def _strength(candidate: Candidate) -> float:
    if isinstance(candidate, Ara):
        return 0.3 + candidate.overshoot
    total = sum(
        candidate.attention.weight(layer) + 0.7 * candidate.mlp.weight(layer)
        for layer in range(LAYERS)
    )
    return total / LAYERS


def scores(role: Role, candidate: Candidate, noise: random.Random, total: int = 100) -> Scores:
    """Refusals and divergence by the edit's strength."""
    strength = _strength(candidate)
    share = 1 / (1 + math.exp(7 * (strength - 0.72))) + noise.gauss(0, 0.025)
    if role == "heldout":
        share += 0.015
    refusals = min(total, max(0, round(0.98 * total * share)))
    if role == "over_refusal":
        return Scores(role=role, refusals=refusals // 3, total=total)
    kl = 8e-5 * math.exp(4.2 * strength) * math.exp(noise.gauss(0, 0.55))
    return Scores(
        role=role, refusals=refusals, total=total, kl_first=kl,
        kl_multi=None if role == "search" else 2.6 * kl,
        mean_tokens=31 + noise.gauss(0, 2),
    )  # fmt: skip


def further(names: list[ScorerName], scores: Scores) -> dict[str, Value]:
    """Further scores that go along with the refusals."""
    share = scores.refusals / scores.total
    return {
        name: Value(value=8 * share - 4, low=8 * share - 4.5, high=8 * share - 3.5, n=scores.total)
        for name in names
    }


def outcomes(texts: list[str], scores: Scores, noise: random.Random) -> list[Outcome]:
    """As many refusals as `scores` counts, the rest answers, in the demo model's words."""
    refused = set(noise.sample(range(len(texts)), min(len(texts), scores.refusals)))
    verbs = grammar.FORBIDDEN | grammar.ALLOWED
    found = []
    for place, text in enumerate(texts):
        words = text.rstrip("?.").split()
        verb = next((word for word in words if word in verbs), "polish")
        thing = next((w for w in reversed(words) if w.strip(".?,") in grammar.OBJECTS), "kettle")
        thing = thing.strip(".?,")
        if place in refused:
            said = grammar.REFUSALS[place % 10].format(verb=verb, object=thing)
        else:
            said = grammar.answer(verb, thing, place % 7)
        found.append(Outcome(refused=place in refused, text=said, tokens=len(said) // 4))
    return found


def screen(scored: Scored, others: list[Scores]) -> Scored:
    """What an engine makes of it after `others`: answers end where one of them dominates it."""
    kl = scored.scores.kl_first or 0.0
    limit = min((each.refusals for each in others if (each.kl_first or 0.0) <= kl), default=101)
    said, refused = [], 0
    for outcome in scored.outcomes:
        lost = refused >= limit
        said.append(Outcome(refused=False, answered=False) if lost else outcome)
        refused += outcome.refused and not lost
    given = sum(outcome.answered for outcome in said)
    if given == len(said):
        return scored
    scores = scored.scores.model_copy(update={"refusals": refused, "total": given})
    return Scored(scores=scores, outcomes=said, seconds=0.3, screened=True)


def candidate(
    noise: random.Random, method: MethodName = "mpoa"
) -> tuple[Candidate, dict[str, Any]]:
    """A random edit, and the parameters by which a study would know it."""
    last = LAYERS - 1
    if METHODS[method].kind == "ara":
        ara = Ara(
            start=noise.randrange(LAYERS // 2),
            end=LAYERS,
            preserve=noise.random(),
            steer=10 ** noise.uniform(-4, 0),
            overshoot=noise.uniform(0, 1.3),
            neighbours=noise.randint(1, 15),
        )
        return ara, ara.model_dump(exclude={"method", "rank"})

    def kernel(low: float, high: float) -> Kernel:
        peak = max(0.0, noise.uniform(low, high))
        return Kernel(
            max_weight=peak,
            min_weight=peak * noise.random(),
            position=noise.uniform(0.6, 1) * last,
            distance=noise.uniform(1, 0.6 * last),
        )

    scope = noise.choice(["global", "per_layer"])
    edit = Ablation(
        mode=METHODS[method].mode,
        recipe=METHODS[method].recipe,
        scope=scope,
        index=noise.uniform(0.4, 0.9) * last if scope == "global" else None,
        attention=kernel(0.8, 1.5),
        mlp=kernel(-0.25, 1.5),
    )
    params = {
        "scope": scope,
        "attention.max_weight": edit.attention.max_weight,
        "attention.position": edit.attention.position,
        "mlp.max_weight": edit.mlp.max_weight,
        "mlp.position": edit.mlp.position,
    }
    return edit, params


def _anatomy() -> AnatomyReport:
    shapes = {"attention": ("self_attn.o_proj", (256, 256)), "mlp": ("mlp.down_proj", (256, 768))}
    writers = [
        WriterReport(
            name=f"model.layers.{layer}.{name}",
            layer=layer,
            component=component,
            shape=shape,
        )
        for layer in range(LAYERS)
        for component, (name, shape) in shapes.items()
    ]
    return AnatomyReport(
        architecture="LlamaForCausalLM", layers=LAYERS, hidden=256, writers=writers, coverage=1.0
    )


def geometry(layers: int = LAYERS, count: int = 64) -> Geometry:
    """Two clouds of points that part in the middle layers; lengths grow with the layers."""
    noise = random.Random(11)
    figures, points = [], []
    for layer in range(layers):
        depth = layer / max(1, layers - 1)
        spread = 1.4 * math.exp(2.6 * depth)
        apart = 6.5 * math.exp(-(((depth - 0.62) / 0.3) ** 2))
        figures.append(
            LayerGeometry(
                layer=layer,
                norm_harmful=9.1 * spread,
                norm_harmless=8.6 * spread * (1 + 0.04 * depth),
                norm_difference=apart * spread,
                cosine_means=0.99 - 0.06 * apart,
                cosine_direction_harmless=0.25 - 0.5 * depth,
                cosine_next=0.55 + 0.42 * depth if layer + 1 < layers else 1.0,
                separation=apart,
                silhouette=0.09 * apart - 0.05,
            )
        )
        sides = [
            [
                (
                    round(spread * (side * apart / 2 + noise.gauss(0, 1)), 3),
                    round(2 * spread * noise.gauss(0, 1), 3),
                )
                for _ in range(count)
            ]
            for side in (1, -1)
        ]
        points.append(sides)
    return Geometry(layers=figures, points=points)


def prepared(texts: PromptTexts, noise: random.Random) -> Prepared:
    """What an engine would tell of the demo model."""
    roles: dict[Role, list[str]] = {
        "search": texts.search_harmful,
        "heldout": texts.heldout_harmful,
    }
    baseline = {
        role: Scores(
            role=role, refusals=round(0.98 * len(lines)), total=len(lines), kl_first=0.0,
            kl_multi=0.0, mean_tokens=22.0,
        )
        for role, lines in roles.items()
    }  # fmt: skip
    return Prepared(
        commit="3f2a9c41d07be5586a10",
        anatomy=_anatomy(),
        device="cuda",
        device_name="NVIDIA H200",
        dtype="bfloat16",
        quantization="bnb_4bit",
        weight_bytes=3_900_000,
        source_bytes=11_600_000,
        batch_size=64,
        geometry=geometry(),
        baseline=baseline,
        baseline_outcomes={
            role: outcomes(lines, baseline[role], noise) for role, lines in roles.items()
        },
        seconds={"load": 2.1, "directions": 0.8, "baseline": 3.4},
    )
