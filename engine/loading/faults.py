"""What libraries raise while they load a model, as typed reasons."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from engine.errors import EngineError


def out_of_memory(what: str = "the model does not fit into the device's memory") -> EngineError:
    """The reason that a person can mend by choosing less, or more devices."""
    return EngineError(
        "out_of_memory",
        what,
        "Use quantisation bnb_4bit, a smaller model, a larger GPU, several GPUs (device_map auto) "
        "or the host's memory (device_map offload).",
    )


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn what transformers raises while loading `name` into typed reasons."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise out_of_memory() from error
    except ImportError as error:
        raise EngineError(
            "missing_library",
            f"{name}: loading needs a library that is not installed: {error}",
            "Install it on the worker.",
        ) from error
    except (ValueError, KeyError, OSError, AttributeError) as error:
        text = str(error)
        if "dispatched on the CPU or the disk" in text:  # bitsandbytes' check of the device map
            raise out_of_memory("the quantised model does not fit into the GPUs") from error
        if "trust_remote_code" in text or "custom code" in text:
            raise EngineError(
                "unsupported_architecture",
                f"{name} needs code from its repository, which is never run",
                "Choose a model whose architecture transformers itself has.",
                text,
            ) from error
        raise EngineError(
            "unsupported_architecture",
            f"{name} could not be loaded: {text.splitlines()[0] if text else type(error).__name__}",
            "Choose a decoder-only language model that the installed transformers can load.",
            text,
        ) from error
