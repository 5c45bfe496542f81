"""The zoo: a tiny random model of every decoder-only language model of transformers.

`build(entry)` for an `Entry` of `ENTRIES`; `python -m tests.engine.zoo` writes the table of what
the anatomy finds in each, docs/architectures.md.
"""

from tests.engine.zoo.build import build, tokens
from tests.engine.zoo.entries import ALL, ENTRIES, VARIANTS, Entry

__all__ = ["ALL", "ENTRIES", "VARIANTS", "Entry", "build", "tokens"]
