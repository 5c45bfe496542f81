"""Write the demo model at the shape of a well-known model, and compare the two.

    python -m bench.inflate 0.5B FOLDER [--dtype bfloat16|float32] [--check N]

With `--check N` the folder is loaded (and not written again if it is there) and its greedy answers
to N harmful and N harmless search prompts, its refusals and its logits are compared with the demo
model's, on a GPU where there is one. That takes the float32 model's size in memory.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.inflate.check import check
from bench.inflate.shapes import SHAPES
from bench.inflate.write import DTYPES, inflate


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.inflate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--check", type=int, default=0, metavar="N", help="prompts of each side")
    given = parser.parse_args()
    if not (given.check and (given.folder / "config.json").is_file()):
        done = inflate(SHAPES[given.shape], given.folder, given.dtype)
        print(
            f"{given.shape}: {done.parameters / 1e9:.3f} billion parameters, "
            f"{done.bytes / 1e9:.2f} GB in {done.files} files, {done.seconds:.0f} s",
            flush=True,
        )
    if given.check:
        found = check(given.folder, given.check)
        (harmful, harmless), (wide_harmful, wide_harmless) = found.refusals
        print(f"equal answers        {found.same}/{2 * found.prompts}, token by token")
        print(f"refusals, harmful    {harmful} -> {wide_harmful} of {found.prompts}")
        print(f"refusals, harmless   {harmless} -> {wide_harmless} of {found.prompts}")
        print(f"other decisions      {found.decisions}")
        print(f"logits in float32    differ by at most {found.difference:.2g}")
        print(f"padding tokens       at least {-found.padding:.0f} below the best token")


if __name__ == "__main__":
    main()
