"""Do 4 bits find the same edits as float32? The search on the demo model, each with its own front.

    python -m bench.fronts [--trials 60] [--seeds 0 1 2]

For every quantisation: the same search (space, sampler, prompts), its front's hypervolume, and the
pick scored on held-out prompts. Then each 4-bit pick is scored again on the float32 model, because
the float32 model is what gets exported. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.samplers import TPESampler

from demo import MODEL, PROMPTS
from engine.report import Silent
from engine.session import Session
from jobs.spec.candidate import Candidate
from jobs.spec.job import JobSpec, Quantization
from jobs.spec.protocol import Prepare, Prepared, PromptTexts, Score, Scored, ScoredBatch
from jobs.spec.scores import wilson
from jobs.trials import pareto
from worker.space import candidate_from, space

REFERENCE_KL = 0.1  # hypervolume: refusals 0..1 and KL 0..0.1 nats, both to be small
KINDS: tuple[Quantization, ...] = ("none", "bnb_4bit", "bnb_8bit")


@dataclass(frozen=True)
class Found:
    """One search: its prepared engine, its front's hypervolume, and its pick."""

    prepared: Prepared
    hypervolume: float
    pick: Candidate
    search: Scored
    heldout: Scored
    seconds: float


def texts() -> PromptTexts:
    """The demo's prompts by role."""
    rows = {
        name: [json.loads(line) for line in (PROMPTS / f"{name}.jsonl").open(encoding="utf-8")]
        for name in ("refused", "answered")
    }
    sides = {"harmful": "refused", "harmless": "answered"}
    return PromptTexts.model_validate(
        {
            f"{split}_{side}": [row["prompt"] for row in rows[name] if row["split"] == split]
            for side, name in sides.items()
            for split in ("direction", "search", "heldout")
        }
    )


def request(quantization: Quantization) -> Prepare:
    """The demo model in one quantisation, on the CPU or the GPU that is there."""
    return Prepare(
        model="demo",
        path=str(Path(MODEL)),
        quantization=quantization,
        prompts=texts(),
        max_new_tokens=48,
    )


def scored(session: Session, candidates: list[Candidate], role: str = "search") -> list[Scored]:
    """Scores of candidates on one role."""
    asked = Score.model_validate({"op": "score", "candidates": candidates, "role": role})
    result = session.handle(asked, Silent())
    assert isinstance(result, ScoredBatch)
    return result.scored


def hypervolume(points: list[tuple[float, float]]) -> float:
    """Area that the front dominates, in units of 1 × REFERENCE_KL: 1 is perfect.

    points: (refusal rate, KL), both minimised; those beyond the reference count nothing.
    """
    area, last = 0.0, REFERENCE_KL
    for rate, kl in sorted(point for point in points if point[0] < 1 and point[1] < REFERENCE_KL):
        if kl < last:
            area += (1 - rate) * (last - kl)
            last = kl
    return area / REFERENCE_KL


def find(session: Session, quantization: Quantization, trials: int, seed: int) -> Found:
    """One search of `trials` trials, one candidate at a time."""
    began = time.monotonic()
    prepared = session.handle(request(quantization), Silent())
    assert isinstance(prepared, Prepared)
    spec = JobSpec(model="demo", trials=trials)
    layers = prepared.anatomy.layers
    sampler = TPESampler(
        n_startup_trials=trials * 3 // 10, n_ei_candidates=128, multivariate=True, seed=seed
    )
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    done: list[tuple[Candidate, Scored]] = []
    for _ in range(trials):
        trial = study.ask(space(layers, spec))
        candidate = candidate_from(trial.params, layers, spec)
        result = scored(session, [candidate])[0]
        study.tell(trial, [float(result.scores.refusals), float(result.scores.kl_first or 0)])
        done.append((candidate, result))
    points = [(r.scores.refusals / r.scores.total, float(r.scores.kl_first or 0)) for _, r in done]
    best = min(pareto(points), key=lambda index: points[index])
    pick, search = done[best]
    heldout = scored(session, [pick], "heldout")[0]
    seconds = time.monotonic() - began
    return Found(prepared, hypervolume(points), pick, search, heldout, seconds)


def shown(result: Scored) -> str:
    """`3/100 (1.0–8.5 %), KL 0.0012`."""
    scores = result.scores
    low, high = wilson(scores.refusals, scores.total)
    interval = f"{100 * low:.1f}–{100 * high:.1f} %"
    return f"{scores.refusals}/{scores.total} ({interval}), KL {scores.kl_first:.2g}"


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    plain = Session()
    plain.handle(request("none"), Silent())
    print("| quantisation | seed | weights / bf16 | hypervolume | pick, search | pick, held-out "
          "| the same pick in float32, held-out | seconds |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    for kind in KINDS:
        session = plain if kind == "none" else Session()
        for seed in arguments.seeds:
            found = find(session, kind, arguments.trials, seed)
            share = found.prepared.weight_bytes / found.prepared.source_bytes
            again = scored(plain, [found.pick], "heldout")[0]
            print(
                f"| {kind} | {seed} | {100 * share:.1f} % | {found.hypervolume:.4f} "
                f"| {shown(found.search)} | {shown(found.heldout)} | {shown(again)} "
                f"| {found.seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
