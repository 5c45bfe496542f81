"""Write docs/architectures.md and jobs/architectures.json: `python -m tests.engine.zoo`.

Entries that are named as arguments are shown instead:
`python -m tests.engine.zoo gpt_oss-GptOssForCausalLM` prints that entry's writers.
"""

from __future__ import annotations

import sys

from engine.anatomy import examine
from tests.engine.zoo import ENTRIES, build
from tests.engine.zoo.table import LISTING, PAGE, line, listing, page


def main(names: list[str]) -> None:
    if names:
        for entry in ENTRIES:
            if entry.id in names or entry.model_type in names:
                anatomy = examine(build(entry))
                print(line(entry, anatomy))
                for w in anatomy.report().writers:
                    print(f"  {w.component:9} {w.name} {list(w.shape)} {w.reason}")
        return
    lines = [line(entry, examine(build(entry))) for entry in ENTRIES]
    PAGE.write_text(page(lines), "utf-8")
    LISTING.write_text(listing(lines), "utf-8")
    print(f"wrote {PAGE} and {LISTING}")


if __name__ == "__main__":
    main(sys.argv[1:])
