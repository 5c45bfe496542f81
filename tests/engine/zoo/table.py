"""docs/architectures.md and jobs/architectures.json: what is found in every entry, or why not."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import transformers
from torch import nn

from engine.anatomy import Anatomy
from tests.engine.zoo.entries import ALL, UNREACHED, Entry

PAGE = Path(__file__).parents[3] / "docs" / "architectures.md"
LISTING = Path(__file__).parents[3] / "jobs" / "architectures.json"

_TEXT = """# Architectures

Every (model type, class) of transformers {version}'s causal-LM and image-text-to-text mappings:
**{inside} decoder-only entries, {whole} of them with every writer found** (coverage 100 %), and
{out} entries that are out, each with its reason. Written by `python -m tests.engine.zoo`; the tests
check each line on a tiny random model that holds every kind of layer of its family, and that with
all writers ablated none of them writes along the direction (`tests/engine/test_zoo.py`).

A *writer* is a matrix whose output is added to the residual stream; a *stack* is a writer that
holds one matrix per expert. Coverage is the share of the writing parameters that edits reach.

| model type | class | layers of the tiny model | writers | stacks | coverage |
|---|---|---|--:|--:|--:|
{lines}

## Not reached

Settings of entries above that hold writers which no edit reaches. The pre-flight names them and
refuses the model unless `allow_partial` is set.

| model type | class | setting | what writes |
|---|---|---|---|
{unreached_lines}

## Out

| model type | class | why |
|---|---|---|
{out_lines}
"""


def line(entry: Entry, anatomy: Anatomy) -> str:
    """The table's line of an entry."""
    stacks = sum(w.experts > 0 for w in anatomy.writers)
    cells = [
        entry.model_type, entry.architecture, kinds(anatomy), str(len(anatomy.writers)),
        str(stacks or ""), f"{100 * anatomy.coverage:.4g} %",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def kinds(anatomy: Anatomy) -> str:
    """The layers by what writes in them: "2 × Attention + MLP, 1 × Attention + SparseMoeBlock"."""
    counts: dict[str, int] = {}
    for layer, block in enumerate(anatomy.blocks):
        parts = {id(w.module) for w in anatomy.writers if w.layer == layer}
        found: dict[str, None] = {}
        for child in block.children():
            if any(id(module) in parts for module in child.modules()):
                found[_short(block, child)] = None
        kind = " + ".join(found) or "none"
        counts[kind] = counts.get(kind, 0) + 1
    return ", ".join(f"{count} × {kind}" for kind, count in counts.items())


def _short(block: nn.Module, child: nn.Module) -> str:
    """A class name without the family's: "MLP" of LlamaMLP in a LlamaDecoderLayer."""
    family, name = type(block).__name__, type(child).__name__
    start = next((k for k, (a, b) in enumerate(zip(family, name, strict=False)) if a != b), 0)
    while start and not (name[start].isupper() and not name[start - 1].isupper()):
        start -= 1
    return name[start:]


def listing(lines: Iterable[str]) -> str:
    """jobs/architectures.json, which the estimate reads: classes covered whole, and those out."""
    covered = [text.split(" | ")[1] for text in lines if text.endswith("| 100 % |")]
    out = {entry.architecture: entry.out for entry in ALL if entry.out}
    found = {
        "transformers": transformers.__version__,
        "covered": sorted(set(covered)),
        "out": {name: out[name] for name in sorted(out.keys() - set(covered))},
    }
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def page(lines: Iterable[str]) -> str:
    """The whole page from the lines of the entries that are in."""
    lines = list(lines)
    out = [entry for entry in ALL if entry.out]
    return _TEXT.format(
        version=transformers.__version__,
        inside=len(lines),
        whole=sum(text.endswith("| 100 % |") for text in lines),
        out=len(out),
        lines="\n".join(lines),
        unreached_lines="\n".join(
            f"| {e.model_type} | {e.architecture} | {next(iter(e.settings))} | {what} |"
            for what, e in UNREACHED.items()
        ),
        out_lines="\n".join(f"| {e.model_type} | {e.architecture} | {e.out} |" for e in out),
    )
