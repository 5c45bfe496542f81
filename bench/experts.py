"""What do fused experts change? The mixture of experts of the demo, with and without its experts.

    python -m bench.experts [--trials 100] [--seeds 0]

The same search (method `mpoa`, same space, prompts and budget) twice: on all writers, and on the
attention outputs alone, which is what a tool does that finds only linear modules. Of each the pick
is scored on held-out prompts.
Prints a Markdown table, and before it the writers by component.
"""

from __future__ import annotations

import argparse

from bench.search import Found, Limit, count, find, prepare
from demo import EXPERTS
from engine.session import Session
from jobs.spec.candidate import Ablation, Candidate, constant
from jobs.spec.protocol import Prepared


def attention_alone(candidate: Candidate) -> Candidate:
    """The candidate without its edit of the experts."""
    assert isinstance(candidate, Ablation)
    return candidate.model_copy(update={"mlp": constant(0.0)})


LIMITS: dict[str, Limit] = {"attention and experts": lambda one: one, "attention": attention_alone}


def main() -> None:
    """Run and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    session = Session()
    prepared = prepare(session, model="demo-experts", path=str(EXPERTS), quantization="none")
    _anatomy(prepared)
    held = prepared.baseline["heldout"]
    print(f"\noriginal: {held.refusals}/{held.total} held-out refusals\n")
    print("| edited | seed | trials | hypervolume | refusals, search | refusals, held-out "
          "| KL, first token | KL, 16 tokens | seconds |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    for name, limit in LIMITS.items():
        for seed in arguments.seeds:
            print(
                _row(name, seed, find(session, "mpoa", arguments.trials, seed, limit)), flush=True
            )


def _anatomy(prepared: Prepared) -> None:
    print("| component | writers | shape | share of the writing parameters |")
    print("|---|---|---|---|")
    total = sum(w.parameters for w in prepared.anatomy.writers)
    shapes = dict.fromkeys((w.component, w.shape) for w in prepared.anatomy.writers)
    for component, shape in shapes:
        mine = [w for w in prepared.anatomy.writers if (w.component, w.shape) == (component, shape)]
        share = sum(w.parameters for w in mine) / total
        print(f"| {component} | {len(mine)} | {' × '.join(map(str, shape))} | {share:.0%} |")


def _row(name: str, seed: int, found: Found) -> str:
    held = found.heldout.scores
    return (
        f"| {name} | {seed} | {found.trials} | {found.hypervolume:.4f} | {count(found.search)} "
        f"| {count(found.heldout)} | {held.kl_first:.2g} | {held.kl_multi:.2g} "
        f"| {found.seconds:.0f} |"
    )


if __name__ == "__main__":
    main()
