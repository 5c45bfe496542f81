"""Which server the command line talks to.

In this order: the options --url and --token, NULLSPACE_URL and NULLSPACE_TOKEN, the file that
`nullspace up` writes (so that a second terminal just works), http://127.0.0.1:8600.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from nullspace.client import Client, ClientError

DEFAULT_URL = "http://127.0.0.1:8600"


@dataclass(frozen=True)
class Connection:
    """An address and a token for it."""

    url: str
    token: str

    def client(self) -> Client:
        """A client of this server."""
        if not self.token:
            raise NoToken(
                f"no token for {self.url}: set NULLSPACE_TOKEN (`nullspace up` prints one) or "
                "pass --token"
            )
        return Client(self.url, self.token)


class NoToken(ClientError):
    """Nothing says who is asking."""

    exit_code = 4


def config_file() -> Path:
    """Where `up` leaves address and token for this user."""
    base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "nullspace" / "connection.json"


def data_folder() -> Path:
    """Where `up` keeps everything, unless --data or NULLSPACE_DATA say otherwise."""
    if given := os.environ.get("NULLSPACE_DATA"):
        return Path(given).expanduser()
    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "nullspace"


def remember(connection: Connection, path: Path | None = None) -> bool:
    """Write the connection where later commands find it, readable by this user alone.

    False where the file cannot be written: the commands then need the variables.
    """
    path = path or config_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w") as file:
            json.dump({"url": connection.url, "token": connection.token}, file)
        fresh.replace(path)
    except OSError:
        return False
    return True


def remembered(path: Path | None = None) -> Connection | None:
    """What `remember` wrote, None where there is nothing usable."""
    try:
        kept = json.loads((path or config_file()).read_text())
        return Connection(str(kept["url"]), str(kept["token"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def resolve(url: str | None = None, token: str | None = None) -> Connection:
    """The server to talk to. A remembered token is only ever sent to its own address."""
    url = url or os.environ.get("NULLSPACE_URL") or None
    token = token or os.environ.get("NULLSPACE_TOKEN") or None
    kept = remembered()
    chosen = (url or (kept.url if kept else DEFAULT_URL)).rstrip("/")
    if not chosen.startswith(("http://", "https://")):
        raise ClientError(f"{chosen} is not an address: it begins with http:// or https://")
    if token is None and kept is not None and kept.url.rstrip("/") == chosen:
        token = kept.token
    return Connection(chosen, token or "")
