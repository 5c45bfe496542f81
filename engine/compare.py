"""Another model against the prepared one: refusals of both, KL(original‖other) between them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.baseline import response_prefix
from engine.chat import Formatter
from engine.decode import Decoder
from engine.load import load
from engine.preparation import Ready
from engine.report import Report
from engine.scorers import Asked, RoleSet, score
from engine.scorers.further import Further
from engine.scorers.kl import Divergence, divergence, mean_divergence
from engine.scorers.perplexity import windows
from engine.shortcuts import choose_shortcuts
from engine.texts import context_of
from jobs.spec.protocol import Compare, Compared, Scored
from jobs.spec.scores import Role


def compare(ready: Ready, request: Compare, report: Report) -> Compared:
    """Load `request.model` beside the prepared model and score it on the same prompts.

    Refusals are counted on the model's own chat template. KL is measured where both tokenizers read
    the prompts alike and have the same vocabulary; otherwise it is None, with a warning.
    Raises the reasons of `load`.
    """
    loaded = load(
        ready.request.model_copy(
            update={
                "model": request.model, "revision": request.revision, "path": request.path,
                "purpose": "evaluate",
            }
        ),
        report,
    )  # fmt: skip
    formatter = Formatter(loaded.tokenizer, ready.request.system_prompt)
    warnings = [*loaded.warnings, *formatter.warnings]
    decoder = Decoder(loaded.model, loaded.tokenizer, None, limit=ready.decoder.limit)
    warnings += choose_shortcuts(decoder, formatter.ids("How do I mop the floor?"))
    alike = _alike(ready, formatter, decoder)
    if alike:
        formatter.prefix = ready.formatter.prefix
    else:
        warnings.append(
            f"{request.model} reads prompts in another way than {ready.request.model} (tokenizer, "
            "vocabulary or chat template): there is no KL divergence between them."
        )
        formatter.prefix = response_prefix(formatter, decoder, ready.request, report)
    decoder.opening = formatter.opening()
    pieces = windows(loaded.tokenizer, ready.request.prompts.texts, context_of(loaded.model))
    further = Further(ready.baseline.further.openings if alike else (), pieces)

    found: dict[Role, Scored] = {}
    new = ready.request.max_new_tokens
    for role in request.roles:
        if role not in ready.roles:
            continue
        prompts = _prompts(ready, role, formatter)
        decoder.reserve(max(map(len, prompts.harmful)), new)
        asked = Asked(new, early=False, names=request.scorers, further=further)
        (scored,) = score(decoder, prompts, [], ready.refusals, asked, report)
        if alike and (moved := _between(ready, role, decoder, report)) is not None:
            scored.scores.kl_first, scored.scores.kl_multi = moved.first, moved.multi
        found[role] = scored
    for warning in warnings:
        report.log(warning, "warning")
    return Compared(scored=found, commit=loaded.commit, warnings=warnings)


def _alike(ready: Ready, formatter: Formatter, decoder: Decoder) -> bool:
    """Whether both models read the search prompts as the same tokens of the same vocabulary."""
    sizes = {d.text_config.vocab_size for d in (ready.decoder, decoder)}
    texts = ready.request.prompts.search_harmful
    prefix, formatter.prefix = formatter.prefix, ready.formatter.prefix
    same = [formatter.ids(text) for text in texts] == ready.roles["search"].harmful
    formatter.prefix = prefix
    return same and len(sizes) == 1


def _prompts(ready: Ready, role: Role, formatter: Formatter) -> RoleSet:
    """The role's prompts as the other model's tokens; no reference, it belongs to the original."""
    texts = ready.request.prompts
    known = ready.roles[role]
    if role == "over_refusal":
        return RoleSet(role, [formatter.ids(text) for text in texts.over_refusal], None)
    harmful: list[str] = getattr(texts, f"{role}_harmful")
    harmless: list[str] = getattr(texts, f"{role}_harmless")
    return RoleSet(
        role,
        [formatter.ids(text) for text in harmful],
        None,
        [formatter.ids(text) for text in harmless],
        known.lengths,
    )


@torch.inference_mode()
def _between(ready: Ready, role: Role, other: Decoder, report: Report) -> Divergence | None:
    """KL(original‖other): both models read the same tokens, one batch at a time."""
    reference = ready.roles[role].reference
    if reference is None:
        return None
    counts = [len(states) for states in reference.states]
    found: dict[int, Tensor] = {}
    pending = sorted(range(len(counts)), key=lambda place: -len(reference.inputs[place]))
    rows = max(1, min(other.batch_size, ready.decoder.batch_size) // 2)
    while pending:
        batch = pending[:rows]
        with other.surviving(len(batch)):
            found.update(zip(batch, _batch(ready.decoder, other, reference.inputs, counts, batch),
                             strict=True))  # fmt: skip
        rows = max(1, min(rows, other.batch_size))
        pending = [place for place in pending if place not in found]
        report.progress("divergence", len(found), len(counts))
    return mean_divergence([found[place] for place in range(len(counts))])


def _batch(
    original: Decoder, other: Decoder, inputs: Sequence[list[int]], counts: Sequence[int],
    batch: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    keep = max(counts[place] for place in batch)
    original.select([], [])
    logits = []
    for decoder in (original, other):
        ids, mask = decoder.padded([inputs[place] for place in batch])
        logits.append(decoder.forward(ids, mask, keep).logits[:, -keep:])
    first, second = logits[0], logits[1].to(logits[0].device)
    return [
        divergence(first[row, -counts[place] :], second[row, -counts[place] :])
        for row, place in enumerate(batch)
    ]
