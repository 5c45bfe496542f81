"""Sources that come quantised: which can be loaded, as what, and what can be made of them.

quant_method          needs                  in memory
bitsandbytes          bitsandbytes           as it is, 4 or 8 bits
fp8, mxfp8, mxfp4                            dequantised
gptq, awq                                    dequantised (`engine.loading.unpack`)
compressed-tensors    compressed-tensors     dequantised
any other                                    refused

Most could stay packed on some GPUs, but in modules that no edit fits, or with kernels that are
fetched from a hub at run time: code from a repository is never run.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from engine.errors import EngineError
from engine.loading.unpack import check_format
from jobs.spec.job import Quantization

OFFICIAL = "use the model's original bf16 release, with quantisation bnb_4bit if memory is short"


@dataclass(frozen=True)
class Kind:
    """A way to quantise. `needs`: module -> name of its package; `stays`: packed in memory too."""

    label: str
    needs: dict[str, str]
    stays: bool


KINDS: dict[str, Kind] = {
    "bitsandbytes": Kind("bitsandbytes", {"bitsandbytes": "bitsandbytes"}, True),
    "gptq": Kind("GPTQ", {}, False),
    "awq": Kind("AWQ", {}, False),
    "fp8": Kind("FP8", {}, False),
    "mxfp8": Kind("MXFP8", {}, False),
    "mxfp4": Kind("MXFP4", {}, False),
    "compressed-tensors": Kind(
        "compressed-tensors", {"compressed_tensors": "compressed-tensors"}, False
    ),
}


@dataclass(frozen=True)
class Packed:
    """How a source is quantised.

    label     for people: "FP8", "bitsandbytes 4 bit"
    stays     packed in memory too; else dequantised when it is loaded
    given     the quantization_config of its config.json
    """

    label: str
    stays: bool
    given: dict[str, Any]

    @property
    def quantization(self) -> Quantization:
        """What the loaded weights are, in the words of a job."""
        if self.given.get("load_in_4bit"):
            return "bnb_4bit"
        return "bnb_8bit" if self.given.get("load_in_8bit") else "none"

    @property
    def unpacked_here(self) -> bool:
        """Whether `engine.loading.unpack` dequantises it; else transformers does."""
        return self.given.get("quant_method") in ("gptq", "awq")

    @property
    def loading(self) -> dict[str, Any]:
        """The quantization_config for transformers to load with."""
        return self.given if self.stays else {**self.given, "dequantize": True}

    def statement(self, dtype: str, wanted: Quantization) -> str:
        """What is searched and what can be exported."""
        memory = (
            "the search runs on these weights as they are"
            if self.stays
            else f"it is dequantised to {dtype} when it is loaded, and the search runs on that"
        )
        ignored = (
            f" Quantisation {wanted} is not applied on top."
            if wanted not in ("none", self.quantization)
            else ""
        )
        return (
            f"The model comes quantised ({self.label}): {memory}.{ignored} What can be exported is "
            "an adapter; a merged model only from the unquantised original release."
        )


def packed_source(config: Any, name: str) -> Packed | None:
    """How the folder with `config` is quantised; None where it is not.

    Raises missing_library, and unsupported_architecture for a method that cannot be undone.
    """
    given = getattr(config, "quantization_config", None)
    if given is None:
        given = getattr(config.get_text_config(), "quantization_config", None)
    if not given:
        return None
    settings: dict[str, Any] = dict(given) if isinstance(given, dict) else given.to_dict()
    method = str(settings.get("quant_method", ""))
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        method = "bitsandbytes"
    kind = KINDS.get(method)
    if kind is None:
        raise EngineError(
            "unsupported_architecture",
            f"{name} comes quantised by {method or 'a method that it does not name'}, whose "
            "weights cannot be read",
            f"{OFFICIAL.capitalize()}. These can be read: {', '.join(sorted(KINDS))}.",
        )
    missing = [package for module, package in kind.needs.items() if find_spec(module) is None]
    if missing:
        raise EngineError(
            "missing_library",
            f"{name} comes quantised ({kind.label}); loading it needs {' and '.join(missing)}",
            f"Install on the worker: pip install {' '.join(missing)}. Or {OFFICIAL}.",
        )
    if method in ("gptq", "awq"):
        check_format(settings, name)
    label = kind.label
    if method == "bitsandbytes":
        label += " 4 bit" if settings.get("load_in_4bit") else " 8 bit"
    return Packed(label, kind.stays, settings)
