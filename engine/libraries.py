"""How torch and what is below it behave in an engine: settings that they read when they load."""

from __future__ import annotations

import os

SETTINGS = {
    "TOKENIZERS_PARALLELISM": "false",  # it warns at every fork otherwise
    "THP_MEM_ALLOC_ENABLE": "1",  # torch: large pages for large tensors
    # oneDNN makes kernels of half a megabyte for each new shape of a product in 16 bits, and keeps
    # a thousand. Making them again takes a quarter of a millisecond each (bench/memory.md).
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    # OpenMP's threads wait for one another in a loop, 300 thousand times round, before they sleep.
    # Beside other programs that keep the cores busy, preparing the demo model took minutes: half a
    # minute with this, and as long as before on a quiet machine.
    "GOMP_SPINCOUNT": "10000",
}


def settle() -> None:
    """Set them, before torch is imported; what is set already stays."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
