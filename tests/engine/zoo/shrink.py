"""A tiny configuration of any architecture, shrunk from the defaults of its config class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from tests.engine.zoo.overrides import OVERRIDES
from tests.engine.zoo.sizes import ALWAYS, LAYERS, SIZES

FEWEST_LAYERS, MOST_LAYERS = 2, 6


def shrink(model_type: str, settings: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """The tiny configuration of a model type; sub-configurations are shrunk alike."""
    return _shrink(CONFIG_MAPPING[model_type], settings or {})


def _shrink(kind: type[PretrainedConfig], settings: Mapping[str, Any]) -> PretrainedConfig:
    """A config of class `kind` with its known sizes made small and one layer of each kind kept."""
    full = kind()
    # Read what is stored: attributes that vary over layers refuse to be read from the whole.
    alias = full.attribute_map
    stored = {f.name: vars(full).get(alias.get(f.name, f.name)) for f in fields(kind)}
    given = {n: small for n, v in stored.items() if (small := _small(n, v)) is not None}
    given |= _layers(stored)
    if stored.get("kv_lora_rank"):  # latent attention: a key per head, and head_dim is the rotary's
        given["num_key_value_heads"] = SIZES["num_attention_heads"]
        if stored.get("head_dim") and stored["head_dim"] == stored["qk_rope_head_dim"]:
            given["head_dim"] = SIZES["qk_rope_head_dim"]
    return kind(**{**given, **OVERRIDES.get(kind.model_type, {}), **settings})


def _small(name: str, value: Any) -> Any:
    """The small value of a field, None where it is left as it is. Sizes of 0 and 1 stay."""
    if isinstance(value, PretrainedConfig):
        return _shrink(type(value), {})
    if name not in SIZES or isinstance(value, bool):
        return None
    if name in ALWAYS or (isinstance(value, (int, float)) and value not in (0, 1)):
        return SIZES[name]
    if isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value):
        return [SIZES[name]] * len(value)
    return None


def _layers(stored: dict[str, Any]) -> dict[str, Any]:
    """The layer count, and per-layer lists cut to the first layer of each kind.

    A kind is what all lists of the config together say of a layer: its mixer, dense or experts.
    Lists that name every layer by its index go on doing so.
    """
    count_name = next((name for name in LAYERS if isinstance(stored.get(name), int)), None)
    if count_name is None:
        return {}
    count = stored[count_name]
    lists = {
        name: [SIZES.get(name, v) for v in value]
        for name, value in stored.items()
        if isinstance(value, (list, tuple)) and len(value) == count
    }
    indices = {name for name, value in lists.items() if value == list(range(count))}
    kinds = [
        tuple(str(value[k]) for name, value in lists.items() if name not in indices)
        for k in range(count)
    ]
    kept = [k for k in range(count) if kinds.index(kinds[k]) == k][:MOST_LAYERS]
    others = [k for k in range(count) if k not in kept]
    kept = sorted(kept + others[: max(0, FEWEST_LAYERS - len(kept))])
    cut = {
        name: list(range(len(kept))) if name in indices else [value[k] for k in kept]
        for name, value in lists.items()
    }
    return {count_name: len(kept), **cut}
