"""The decoder blocks of a model, as they are run: which, in what order, with what arguments."""

from __future__ import annotations

import inspect
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import EngineError
from engine.experiment import Call, first, tolerance
from engine.loading.placement import input_device
from engine.stream import Span, close, free_of_matrices, rows
from engine.writer import linear_width

TOKENS = 11  # a prime: no number of heads, experts or streams
FEWEST = 4  # tokens that can tell a stream
PATCHES = 13  # tokens of what stands for a picture


@dataclass(frozen=True)
class Blocks:
    """The blocks in the order of their first run, with their paths.

    calls   how each was called first, by its id; none for those that text does not run
    gaps    what was seen to write elsewhere, or blocks of another stream: path and reason
    """

    names: list[str]
    modules: list[nn.Module]
    calls: dict[int, Call]
    hidden: int
    gaps: list[tuple[str, str]]

    @property
    def streams(self) -> int | None:
        """The axis of several streams in what blocks give: 0 or 2 of four, -1 flattened."""
        call = next(iter(self.calls.values()))
        if call.stream.dim() == 4:
            return 2 if call.stream.shape[1] == call.tokens else 0
        return -1 if call.stream.shape[-1] > self.hidden else None


@dataclass(frozen=True)
class Run:
    """One call of a module, in the order of their ends."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether the model's forward takes a keyword of this name."""
    return argument in inspect.signature(model.forward).parameters


def find(model: nn.Module) -> Blocks:
    """Run the model on a few tokens and find the blocks that its stream passes.

    Blocks are the members of the outermost module lists that take a stream and give one. Raises
    `unsupported_architecture` where there are none or the model does not run on text.
    """
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    lists = dict(_lists(model))
    named = {id(block): name for name, block in reversed(lists.items())}
    inner = {id(m) for block in lists.values() for m in block.modules()}
    outer = [m for m in model.modules() if id(m) not in inner]
    runs = _record(model, text, [*outer, *lists.values()])
    hidden = _width(text, runs, named)

    calls: dict[int, Call] = {}
    gaps: list[tuple[str, str]] = []
    span: Span | None = None
    width, entered = 0, False
    newest: Tensor | None = None  # what the last block gave
    for run in runs:
        call = _call(run, hidden)
        given = rows(call.stream, call.tokens, hidden) if call else None
        given = None if isinstance(run.module, nn.Embedding) else given
        made = rows(first(run.output), call.tokens if call else TOKENS, hidden)
        if made is None or not (given is not None or isinstance(run.module, nn.Embedding)):
            continue
        if span is None or len(made) != width:  # another stream
            span, width, entered = Span(tolerance(first(run.output).dtype)), len(made), False
            for vector in _states(outer, lists, hidden):
                span.add(vector.to(made).expand(width, 1, hidden))
        if given is None:
            span.add(made)
        elif len(given) != width:
            continue
        elif id(run.module) in named:
            assert call is not None
            passed = newest is not None and close(given, newest, span.tolerance)
            if entered and not passed and not span.holds(given):
                gaps.append((named[id(run.module)], "something writes before this block"))
            span.add(given)
            span.add(made)
            entered, newest = True, made
            calls.setdefault(id(run.module), call)
        elif free_of_matrices(run.module) and span.holds(given):
            span.add(made)  # a norm or a scale between blocks
    if not calls:
        raise EngineError(
            "unsupported_architecture",
            f"{type(model).__name__}: no list of decoder blocks was found",
            "Choose a decoder-only language model.",
        )
    order = [*calls]
    ran = {named[i].rpartition(".")[0] for i in calls}
    before: int | None = None
    for name, block in lists.items():
        if id(block) not in order:
            if any(run.module is block for run in runs):
                gaps.append((name, "it runs, but on no stream of the decoder's width"))
            elif name.rpartition(".")[0] in ran:  # text does not run it; it keeps its place
                order.insert(0 if before is None else order.index(before) + 1, id(block))
        before = id(block) if id(block) in order else before
    by_id = {id(block): block for block in lists.values()}
    return Blocks([named[i] for i in order], [by_id[i] for i in order], calls, hidden, gaps)


def _lists(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The members of the outermost module lists, linear modules and norms left out."""
    inside: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or id(module) in inside:
            continue
        inside |= {id(m) for m in module.modules()}
        for k, block in enumerate(module):
            if linear_width(block) is None and not free_of_matrices(block):
                yield f"{name}.{k}", block


def _states(outer: list[nn.Module], lists: dict[str, nn.Module], d: int) -> list[Tensor]:
    """Vectors (1, 1, d) that a module around the blocks may start its stream with."""
    blocks = {id(block) for block in lists.values()}
    around = [m for m in outer if any(id(part) in blocks for part in m.modules())]
    held = [p for m in around for p in m.parameters(recurse=False)]
    return [p.detach().reshape(1, 1, d) for p in held if p.numel() == d]


def _record(model: nn.Module, text: Any, modules: list[nn.Module]) -> list[Run]:
    """Run the model on a few tokens; where it wants more than text, its decoder alone."""
    whole: Any = model
    decoder: Any = whole.get_decoder() if hasattr(model, "get_decoder") else model
    runs: list[Run] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        runs.append(Run(module, args, dict(kwargs), _kept(first(out))))

    hooks = [m.register_forward_hook(keep, with_kwargs=True) for m in modules]
    try:
        if getattr(model.config, "is_encoder_decoder", False):
            raise EngineError(
                "unsupported_architecture",
                f"{type(model).__name__} is an encoder-decoder",
                "Choose a decoder-only language model.",
            )
        for target in (model, decoder):
            for pictures in (True, False):
                runs.clear()
                try:
                    target(**_arguments(target, text, pictures))
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # what a model says to arguments, we cannot list
                    refusal = error
                else:
                    return runs
        raise EngineError(
            "unsupported_architecture",
            f"{type(model).__name__} does not run on text alone: {refusal}",
            "Choose a decoder-only language model.",
        ) from refusal
    finally:
        for hook in hooks:
            hook.remove()


def _kept(value: Any) -> Any:
    """A copy, because what follows may add to a tensor in place."""
    return value.clone() if isinstance(value, Tensor) else value


def _arguments(model: Any, text: Any, pictures: bool) -> dict[str, Any]:
    """Some tokens, and what stands for pictures where blocks attend to them.

    What is named here only makes modules run; one that never runs is reported as such.
    """
    embedding: Tensor = model.get_input_embeddings().weight
    vocab = min(getattr(text, "vocab_size", None) or len(embedding), len(embedding))
    device = input_device(model)
    ids = (torch.arange(1, TOKENS + 1, device=device) % vocab)[None]
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    named = inspect.signature(model.forward).parameters
    if "use_cache" in named or any(p.kind is p.VAR_KEYWORD for p in named.values()):
        given["use_cache"] = False
    if not pictures:
        return given

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=model.dtype)

    if "cross_attention_states" in named:  # Mllama
        given["cross_attention_states"] = drawn(1, PATCHES, text.hidden_size)
    if "encoder_hidden_states" in named:  # Bart and its kin
        given["encoder_hidden_states"] = drawn(1, PATCHES, text.hidden_size)
    if "image_encoder_embeddings" in named:  # Idefics
        width = model.config.vision_config.embed_dim
        given["image_encoder_embeddings"] = drawn(1, 1, PATCHES, width)
        given["image_attention_mask"] = torch.ones_like(ids)[..., None]
    if "moe_mm_token_type_ids" in named:  # Ernie: experts of their own for pictures
        given["moe_mm_token_type_ids"] = torch.arange(TOKENS, device=device)[None] % 2
    return given


def _width(text: Any, runs: list[Run], blocks: Container[int]) -> int:
    """The width d of the stream."""
    if isinstance(width := getattr(text, "hidden_size", None), int):
        return width
    for run in runs:
        for value in [*run.args, *run.kwargs.values()]:
            if id(run.module) in blocks and isinstance(value, Tensor) and value.is_floating_point():
                return value.shape[-1]
    return 0


def _call(run: Run, d: int) -> Call | None:
    """A block's call, where it takes a stream of width d and gives one."""
    if not isinstance(run.output, Tensor):
        return None
    places: list[tuple[int | str, Any]] = [*enumerate(run.args), *run.kwargs.items()]
    for place, value in places:
        if not isinstance(value, Tensor) or value.dim() < 3:
            continue
        tokens = TOKENS if TOKENS in value.shape[:-1] else value.shape[-2]
        fits = rows(value, tokens, d) is not None and rows(run.output, tokens, d) is not None
        if fits and tokens >= FEWEST:
            return Call(run.args, run.kwargs, place, value, tokens)
    return None
