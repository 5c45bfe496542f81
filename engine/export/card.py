"""The model card, README.md of an artifact.

`Export.card` may hold, all optional:
    baseline, scores, measured   role -> scores (jobs.spec.scores.Scores or its JSON)
    the keys of `FACTS`          further rows of the table of parameters
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from engine.export.adapter import Adapter
from jobs.spec.candidate import COMPONENTS, Ablation, Ara
from jobs.spec.scores import Scores

ROLES = (
    ("search", "search prompts"),
    ("heldout", "held-out prompts"),
    ("over_refusal", "harmless prompts that look refusable"),
)
FACTS = {
    "method": "method",
    "trial": "trial",
    "trials": "trials of the search",
    "seed": "seed",
    "max_new_tokens": "answer tokens",
    "architecture": "architecture",
    "coverage": "share of the writing parameters that edits reach",
    "job": "job",
}
PIPELINES = {"AutoModelForImageTextToText": "image-text-to-text"}
COLUMNS = (("baseline", "original"), ("scores", "edited, searched"), ("measured", "artifact"))


@dataclass(frozen=True)
class CardFacts:
    """What the card says besides `Export.card`.

    commit   None for a model that is no hub's
    edited   how many of the writers, in words
    factory  the class of transformers that loads the model
    """

    base: str
    commit: str | None
    kind: str
    candidate: Ablation | Ara
    quantization: str
    dtype: str
    versions: dict[str, str]
    adapter: Adapter | None = None
    edited: str = ""
    factory: str = "AutoModelForCausalLM"


def render(card: dict[str, Any], facts: CardFacts) -> str:
    """README.md: YAML front matter, then Markdown."""
    base = facts.base
    parts = [
        _front_matter(base, facts),
        f"# {_text(base.split('/')[-1])}, abliterated",
        f"This is [{_text(base)}](https://huggingface.co/{base}) with its refusal behaviour "
        "removed by directional ablation (Arditi et al. 2024, arXiv 2406.11717)."
        if facts.commit
        else f"This is {_text(base)} with its refusal behaviour removed by directional ablation "
        "(Arditi et al. 2024, arXiv 2406.11717).",
        _what(facts),
        "## Scores",
        _scores(card),
        "## The edit",
        _parameters(card, facts),
        "## Use",
        _use(base, facts),
        "## Licence and care",
        "The licence and the terms of use of the base model hold for this artifact too. The model "
        "answers requests that the original declines: whoever runs it answers for its use.",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(base: str, facts: CardFacts) -> str:
    """YAML; every value is a JSON string, which YAML reads as it stands."""
    adapter = facts.adapter
    lines = [
        "---",
        f"base_model: {json.dumps(base)}",
        f"base_model_relation: {'adapter' if adapter else 'finetune'}",
        f"library_name: {'peft' if adapter else 'transformers'}",
        f"pipeline_tag: {PIPELINES.get(facts.factory, 'text-generation')}",
        "tags:",
        *(f"- {tag}" for tag in ("abliterated", "uncensored", "nullspace")),
        *((f"- {'dora' if adapter.dora else 'lora'}",) if adapter else ()),
        "---",
    ]
    return "\n".join(lines)


def _what(facts: CardFacts) -> str:
    adapter = facts.adapter
    if adapter is None:
        return (
            "The folder holds the whole model. Edited weights were computed in float64 from the "
            "original safetensors and rounded once; all other tensors are byte-identical to them. "
            "`sha256sum -c SHA256SUMS` checks the files."
        )
    if adapter.worst_error == 0:
        name = "DoRA" if adapter.dora else "LoRA"
        most = "up to " if isinstance(facts.candidate, Ara) else ""
        kind = f"a {name} adapter of rank {most}{adapter.rank}, which is the edit exactly"
    else:
        kind = (
            f"a LoRA adapter of rank {adapter.rank}, which leaves out "
            f"{adapter.mean_error:.2%} of the edit (mean over the edited matrices; worst "
            f"{adapter.worst_error:.2%}; relative Frobenius norm)"
        )
    return f"The folder holds {kind}. `sha256sum -c SHA256SUMS` checks the files."


def _scores(card: dict[str, Any]) -> str:
    """One table: a row per role and score, a column per model that was measured."""
    columns = [(label, _roles(card.get(key))) for key, label in COLUMNS]
    columns = [(label, roles) for label, roles in columns if roles]
    if not columns:
        return "No scores were recorded with this export."
    rows = []
    for role, prompts in ROLES:
        found = [roles.get(role) for _, roles in columns]
        if not any(found):
            continue
        rows.append((f"refusals, {prompts}", [_refusals(s) for s in found]))
        for key, label in (("kl_first", "KL, first token"), ("kl_multi", "KL, several tokens")):
            values = [getattr(s, key) if s else None for s in found]
            if any(v is not None for v in values):
                rows.append((f"{label}, {prompts}", [_number(v) for v in values]))
    lines = [
        "| | " + " | ".join(label for label, _ in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
        *(f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows),
    ]
    note = (
        "Refusals are counted by marker phrases; in brackets the Wilson 95 % interval. The search "
        "saw the search prompts; neither it nor the directions saw the held-out prompts. KL is "
        "KL(original‖edited) in nats over harmless prompts."
    )
    if any(label == "artifact" for label, _ in columns):
        note += " The last column was measured on this artifact, loaded from disk."
    return "\n".join(lines) + "\n\n" + note


def _roles(value: Any) -> dict[str, Scores]:
    """Scores by role from JSON or models."""
    if not isinstance(value, dict):
        return {}
    return {str(k): Scores.model_validate(v) for k, v in value.items() if v}


def _refusals(s: Scores | None) -> str:
    if s is None:
        return "–"
    low, high = s.interval
    return f"{s.refusals}/{s.total} ({100 * low:.1f}–{100 * high:.1f} %)"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _ablation(candidate: Ablation) -> list[tuple[str, str]]:
    recipe = candidate.recipe
    direction = "per layer"
    if candidate.scope == "global":
        direction = f"for all layers, at layer {candidate.index:.4g}"
    count = "one direction" if recipe.count == 1 else f"up to {recipe.count} directions"
    if recipe.projection != "none":
        direction += f", {recipe.projection} off the harmless mean"
    source = f"{recipe.center} of each side" if recipe.subspace == "single" else recipe.subspace
    if recipe.position != -1:
        source += f", prompt token {recipe.position}"
    if recipe.winsorize is not None:
        source += f", states clamped at quantile {recipe.winsorize:g}"
    rows = [("mode", candidate.mode), ("direction", f"{count} {direction}"), ("taken from", source)]
    if candidate.affine:
        rows.append(("affine", "the component becomes its harmless mean instead of 0"))
    if candidate.router is not None:
        few = candidate.router.experts
        text = f"bias lowered by {candidate.router.bias:.4g} for "
        text += "the expert" if few == 1 else f"the {few} experts"
        rows.append(("routers", f"{text} of a layer that harmful prompts choose more often"))
    for component in COMPONENTS:
        k = candidate.kernel(component)
        text = f"{k.max_weight:.4g} everywhere"
        if k.max_weight != k.min_weight or k.distance < 1e6:
            text = (
                f"{k.max_weight:.4g} at layer {k.position:.4g}, falling to {k.min_weight:.4g} at "
                f"distance {k.distance:.4g}, 0 beyond"
            )
        rows.append((f"strength, {component} output", text))
    return rows


def _ara(candidate: Ara) -> list[tuple[str, str]]:
    rank = "whole" if candidate.rank is None else f"at most {candidate.rank}"
    return [
        ("method", "arbitrary-rank ablation"),
        ("layers", f"{candidate.start} to {candidate.end - 1}"),
        ("weight of harmless outputs kept", f"{candidate.preserve:.4g}"),
        ("weight of harmful outputs moved", f"{candidate.steer:.4g}"),
        ("overshoot", f"{candidate.overshoot:.4g}"),
        ("nearest neighbours", str(candidate.neighbours)),
        ("rank of each change", rank),
    ]


def _parameters(card: dict[str, Any], facts: CardFacts) -> str:
    candidate = facts.candidate
    rows = _ablation(candidate) if isinstance(candidate, Ablation) else _ara(candidate)
    if facts.edited:
        rows.append(("edited", facts.edited))
    rows.append(("searched with", f"{facts.quantization} quantisation, {facts.dtype}"))
    if facts.commit:
        rows.append(("commit of the base model", facts.commit))
    rows += [(label, str(card[key])) for key, label in FACTS.items() if card.get(key) is not None]
    rows += [(f"version of {name}", number) for name, number in facts.versions.items()]
    table = "| | |\n|---|---|\n" + "\n".join(f"| {_text(k)} | {_text(v)} |" for k, v in rows)
    exact = json.dumps(candidate.model_dump(mode="json"), indent=2)
    return f"{table}\n\nThe candidate, to make the edit again:\n\n```json\n{exact}\n```"


def _use(base: str, facts: CardFacts) -> str:
    prompt = 'chat = [{"role": "user", "content": "Hello!"}]'
    run = (
        "inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, "
        'return_tensors="pt", return_dict=True)\n'
        "answer = model.generate(**inputs.to(model.device), max_new_tokens=200)\n"
        'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], '
        "skip_special_tokens=True))"
    )
    load = f'model = {facts.factory}.from_pretrained("PATH", dtype="auto")'
    tokens, head = '"PATH"', f"from transformers import {facts.factory}, AutoTokenizer"
    if facts.adapter is not None:
        # the adapter belongs to these very weights, not to what the hub has tomorrow
        pinned = f"{json.dumps(base)}, revision={json.dumps(facts.commit)}"
        tokens = pinned if facts.commit else '"BASE"'
        head = f"from peft import PeftModel\n{head}"
        load = (
            f'base = {facts.factory}.from_pretrained({tokens}, dtype="auto")\n'
            'model = PeftModel.from_pretrained(base, "PATH")'
        )
    code = f"{head}\n\n{load}\ntokenizer = AutoTokenizer.from_pretrained({tokens})\n{prompt}\n{run}"
    more = "`PATH` is this folder or its name on the hub."
    if facts.adapter is not None and not facts.commit:
        more += f" `BASE` is the folder of the base model, {_text(base)}."
    if facts.adapter is not None and facts.adapter.dora:
        more += (
            " DoRA recomputes a norm at every step: call `model = model.merge_and_unload()` before "
            "generating, unless the base is quantised."
        )
    return f"```python\n{code}\n```\n\n{more}"


def _text(value: str) -> str:
    """A value as plain Markdown text on one line."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(value.split()))
