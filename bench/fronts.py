"""Do 4 bits find the same edits as float32? The search on the demo model, each with its own front.

    python -m bench.fronts [--trials 60] [--seeds 0 1 2]

For every quantisation: the same search (space, sampler, prompts), its front's hypervolume, and the
pick scored on held-out prompts. Then each 4-bit pick is scored again on the float32 model, because
the float32 model is what gets exported. Prints a Markdown table.
"""

from __future__ import annotations

import argparse

from bench.search import find, prepare, scored, shown
from engine.session import Session
from jobs.spec.job import Quantization

KINDS: tuple[Quantization, ...] = ("none", "bnb_4bit", "bnb_8bit")


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    plain = Session()
    prepare(plain)
    print("| quantisation | seed | weights / bf16 | hypervolume | pick, search | pick, held-out "
          "| the same pick in float32, held-out | seconds |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    for kind in KINDS:
        session = plain if kind == "none" else Session()
        prepared = prepare(session, quantization=kind)
        for seed in arguments.seeds:
            found = find(session, "mpoa", arguments.trials, seed)
            share = prepared.weight_bytes / prepared.source_bytes
            again = scored(plain, found.pick, "heldout")
            print(
                f"| {kind} | {seed} | {100 * share:.1f} % | {found.hypervolume:.4f} "
                f"| {shown(found.search)} | {shown(found.heldout)} | {shown(again)} "
                f"| {found.seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
