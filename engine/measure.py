"""An artifact as its user will have it: loaded from disk by plain libraries and scored.

A merged folder is loaded by transformers, an adapter by PEFT onto the original model; neither knows
of `engine.patch`. The scores must be those of the candidate, up to the rounding of the weights.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.chat import Formatter
from engine.decode import Decoder
from engine.errors import EngineError
from engine.load import load_folder
from engine.memory import free_bytes, is_out_of_memory, release
from engine.preparation import Ready
from engine.report import Report
from engine.scorers import Asked, RoleSet, score
from engine.scorers.kl import reread
from jobs.spec.protocol import Export
from jobs.spec.scores import Role, Scores

ROLES: tuple[Role, ...] = ("search", "heldout")
HEADROOM = 1.2  # free memory needed, in units of the second model's weights


def measure(folder: Path, ready: Ready, request: Export, report: Report) -> dict[Role, Scores]:
    """The scores of the artifact in `folder` on search and held-out prompts.

    Loaded in the session's dtype on its device. After a quantised search both sides of the KL are
    full models: the original is loaded in that dtype too and read again. Empty, with a warning,
    where memory does not allow a second model.
    """
    loaded = ready.loaded
    need = int(HEADROOM * loaded.source_bytes * loaded.dtype.itemsize / 2)
    free = free_bytes(loaded.device)
    if free < need:
        _skip(report, f"it takes {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free")
        return {}
    try:
        return _measure(folder, ready, request, report)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    except EngineError as error:
        if error.reason != "out_of_memory":
            raise
    release()
    _skip(report, "memory ran out")
    return {}


def _measure(folder: Path, ready: Ready, request: Export, report: Report) -> dict[Role, Scores]:
    loaded = ready.loaded
    roles = {role: ready.roles[role] for role in ROLES}
    quantised = loaded.quantization != "none"
    caching: AbstractContextManager[Any] = nullcontext()
    report.progress("measure", 0, 0, "loading the artifact")
    if request.kind == "merged":
        if quantised:
            original, tokenizer = load_folder(
                loaded.source, loaded.device, loaded.dtype, ready.request.device_map
            )
            roles = _read_again(_decoder(original, tokenizer, ready), roles, ready, report)
            del original
            release()
        model, tokenizer = load_folder(
            folder, loaded.device, loaded.dtype, ready.request.device_map
        )
    else:
        from peft import PeftModel
        from peft.helpers import DoraCaching

        base, tokenizer = load_folder(
            loaded.source, loaded.device, loaded.dtype, ready.request.device_map
        )
        if quantised:
            roles = _read_again(_decoder(base, tokenizer, ready), roles, ready, report)
        adapted = PeftModel.from_pretrained(base, folder).eval()
        model = adapted.get_base_model()  # the plain model with PEFT's layers in place
        caching = DoraCaching()  # otherwise DoRA computes its norms anew for every token
    _same_tokens(tokenizer, ready)

    decoder = _decoder(model, tokenizer, ready)
    found: dict[Role, Scores] = {}
    new = ready.request.max_new_tokens
    with caching:
        for role, prompts in roles.items():
            decoder.reserve(max(map(len, prompts.harmful)), new)
            (scored,) = score(decoder, prompts, [], ready.refusals, Asked(new), report)
            found[role] = scored.scores
    return found


def _read_again(
    decoder: Decoder, roles: dict[Role, RoleSet], ready: Ready, report: Report
) -> dict[Role, RoleSet]:
    """The roles with the states of the unquantised original, over the same answers."""
    found: dict[Role, RoleSet] = {}
    for role, prompts in roles.items():
        known = prompts.reference
        if known is None:
            continue
        decoder.reserve(max(map(len, known.inputs)), ready.request.kl_tokens)
        counts = [len(states) for states in known.states]
        found[role] = replace(prompts, reference=reread(decoder, known.inputs, counts, report))
    return found


def _decoder(model: Any, tokenizer: Any, ready: Ready) -> Decoder:
    """A decoder of the same architecture, with the shortcuts that it bears."""
    made = Decoder(model, tokenizer, None, ready.decoder.opening)
    made.pads, made.caches = ready.decoder.pads, ready.decoder.caches
    return made


def _same_tokens(tokenizer: Any, ready: Ready) -> None:
    """The artifact's tokenizer must read the prompts as the original's does."""
    formatter = Formatter(tokenizer, ready.request.system_prompt)
    formatter.prefix = ready.formatter.prefix
    texts = ready.request.prompts.search_harmful
    if [formatter.ids(text) for text in texts] != ready.roles["search"].harmful:
        raise EngineError(
            "engine_failed",
            "the artifact's tokenizer reads prompts in another way than the original's",
            "Please report this with the model's name.",
        )


def _skip(report: Report, reason: str) -> None:
    report.log(
        f"The artifact was not measured: {reason}. It is complete all the same; only the card "
        "lacks its own scores.",
        "warning",
    )
