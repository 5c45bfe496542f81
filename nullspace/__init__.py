"""Nullspace: the Python client and the command line.

    from nullspace import Client

`Client` is loaded at its first use, so that `import nullspace` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nullspace.client import Client, ClientError

__all__ = ["Client", "ClientError"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from nullspace import client

        return getattr(client, name)
    raise AttributeError(f"module 'nullspace' has no attribute {name!r}")
