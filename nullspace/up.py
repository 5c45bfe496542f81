"""`nullspace up`: the whole service on this machine, in one data folder, without root.

Servers, tables and first admin, then the api and the workers as child processes. What dies of
them is started again. The end goes in order: workers hand their leases back (running jobs go on
at the next start), then the api, then the servers.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from nullspace.client import Client
from nullspace.embedded import PostgresServer, RedisServer, servers
from nullspace.guarded import Guarded, StartFailed, start
from nullspace.server import PORT, free_port, listen

Say = Callable[[str], None]
ADMIN = "admin@localhost"
START_SECONDS = 120.0
WORKER_GRACE = 60.0
SERVER_PAUSE = 5.0
SEARCHES = "search,evaluate,chat,benchmark"
EXPORTS = "export"
NOT_FOR_CHILDREN = frozenset(
    f"NULLSPACE_{name}" for name in ("TOKEN", "URL", "ADMIN_EMAIL", "ADMIN_PASSWORD")
)


@dataclass(frozen=True)
class Options:
    """What may be chosen. `port` None: 8600 or the next free one; `workers` None: one per GPU."""

    data: Path
    host: str = "127.0.0.1"
    port: int | None = None
    workers: int | None = None
    database_url: str | None = None
    redis_url: str | None = None
    models: Path | None = None


@dataclass
class Child:
    """A process of the service. `failures` in a row decide how long a restart waits."""

    name: str
    command: list[str]
    env: dict[str, str]
    log: Path
    grace: float
    process: Guarded | None = None
    started: float = 0.0
    failures: int = 0

    def launch(self) -> None:
        """Start the process."""
        self.started = time.monotonic()
        self.process = start(self.command, env=self.env, log=self.log, grace=self.grace)

    def tail(self, lines: int = 15) -> str:
        """The end of its log."""
        with contextlib.suppress(OSError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        return ""


@dataclass
class Service:
    """A running service. `password` is known only when the admin was made just now."""

    url: str
    token: str
    email: str
    password: str | None
    env: dict[str, str]
    data: Path
    children: list[Child] = field(default_factory=list)

    def client(self) -> Client:
        """A client with the admin's token."""
        return Client(self.url, self.token)


@contextlib.contextmanager
def service(options: Options, say: Say) -> Iterator[Service]:
    """Everything up, for the length of the block. `say` tells people what happens.

    Raises StartFailed.
    """
    data = prepare_folder(options.data)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_only_one(data))
        port = options.port
        if port is None:
            port = free_port(options.host, PORT)
        elif port:
            listen(options.host, port).close()
        else:
            port = free_port(options.host, 20_000 + secrets.randbelow(20_000))
        url = f"http://{_name_of(options.host)}:{port}"
        say("starting PostgreSQL and Redis")
        running = stack.enter_context(
            servers(data, database_url=options.database_url, redis_url=options.redis_url)
        )
        env = environment(data, url, running.database_url, running.redis_url, options.models)
        say("preparing the database")
        made = _admin(env, data)
        found = Service(url, made.token, made.email, made.password, env, data)
        found.children = _children(options, env, data, port)
        stack.callback(_end, found.children, say)
        say("starting the api and the workers")
        for child in found.children:
            child.launch()
        _wait_ready(found)
        owned = [server for server in (running.postgres, running.redis) if server is not None]
        stack.enter_context(_tended(found.children, owned, say))
        yield found


def prepare_folder(data: Path) -> Path:
    """The data folder, made where missing and proved to be writable. Raises StartFailed."""
    data = data.expanduser().absolute()
    try:
        data.mkdir(parents=True, exist_ok=True)
        probe = data / f".write-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise StartFailed(
            f"the data folder {data} cannot be written ({error.strerror or error}): choose another "
            "with --data or NULLSPACE_DATA"
        ) from error
    return data


@contextlib.contextmanager
def _only_one(data: Path) -> Iterator[None]:
    with open(data / "lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartFailed(
                f"a Nullspace runs in {data} already: use it (`nullspace ls`), end it, or choose "
                "another folder with --data"
            ) from None
        yield


def _name_of(host: str) -> str:
    """The host as a browser on this machine names it."""
    if host in ("0.0.0.0", "::", ""):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def secret(path: Path) -> str:
    """A secret that is made once and kept in a file for this user alone."""
    with contextlib.suppress(OSError):
        if kept := path.read_text().strip():
            return kept
    made = secrets.token_urlsafe(48)
    write_secret(path, made)
    return made


def write_secret(path: Path, text: str) -> None:
    """Write a file of mode 0600."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text + "\n")


def environment(
    data: Path, url: str, database_url: str, redis_url: str, models: Path | None
) -> dict[str, str]:
    """The environment of the service's processes."""
    given = os.environ.get
    ours = {
        "DATABASE_URL": database_url,
        "REDIS_URL": redis_url,
        "NULLSPACE_SECRET_KEY": os.environ.get("NULLSPACE_SECRET_KEY")
        or secret(data / "secret-key"),
        "NULLSPACE_DATA": str(data),
        "NULLSPACE_PUBLIC_URL": given("NULLSPACE_PUBLIC_URL") or url,
        "PYTHONUNBUFFERED": "1",
    }
    if models is not None:
        ours["NULLSPACE_MODELS"] = str(models)
    dropped = {
        "NULLSPACE_TOKEN",
        "NULLSPACE_URL",
        "NULLSPACE_ADMIN_PASSWORD",
        "NULLSPACE_ADMIN_EMAIL",
    }
    return {key: value for key, value in os.environ.items() if key not in dropped} | ours


@dataclass(frozen=True)
class _Admin:
    email: str
    password: str | None
    token: str


def _admin(env: dict[str, str], data: Path) -> _Admin:
    """Migrate, make the first admin where there is none, and have a token that works."""
    from jobs import people
    from jobs.database import connect, session_factory
    from jobs.problems import Problem
    from jobs.settings import Settings
    from nullspace.migrate import migrate

    email = os.environ.get("NULLSPACE_ADMIN_EMAIL") or ADMIN
    password = os.environ.get("NULLSPACE_ADMIN_PASSWORD") or secrets.token_urlsafe(12)
    settings = Settings.model_validate(
        {
            "DATABASE_URL": env["DATABASE_URL"],
            "REDIS_URL": env["REDIS_URL"],
            "secret_key": env["NULLSPACE_SECRET_KEY"],
            "data": data,
            "admin_email": email,
            "admin_password": password,
        }
    )
    try:
        made = migrate(settings)
    except Exception as error:
        raise StartFailed(f"the database could not be prepared: {error}") from error
    key = settings.secret_key.get_secret_value()
    kept = data / "token"
    engine = connect(settings.database_url, pool_size=1)
    try:
        sessions = session_factory(engine)
        with contextlib.suppress(OSError, Problem), sessions.begin() as session:
            token = kept.read_text().strip()
            user, _ = people.authenticate(session, token, key)
            return _Admin(user.email, password if made else None, token)
        with sessions.begin() as session:
            admins = [user for user in people.list_users(session) if user.role == "admin"]
            usable = [user for user in admins if not user.disabled]
            if not usable:
                raise StartFailed("the database has no admin that is not disabled")
            _, token = people.issue_token(session, usable[0], name="nullspace up", secret=key)
            email = usable[0].email
        write_secret(kept, token)
        return _Admin(email, password if made else None, token)
    finally:
        engine.dispose()


def gpus() -> list[str]:
    """CUDA devices that are visible to this process, by index or UUID."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [part.strip() for part in visible.split(",") if part.strip() not in ("", "-1")]
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=index", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
        return found.stdout.split()
    return []


def _children(options: Options, env: dict[str, str], data: Path, port: int) -> list[Child]:
    logs = data / "service-logs"
    logs.mkdir(exist_ok=True)
    program = [sys.executable, "-m", "nullspace"]
    serve = [*program, "api", "--host", options.host, "--port", str(port)]
    children = [Child("api", serve, env, logs / "api.log", 15.0)]
    devices = gpus()
    count = options.workers if options.workers is not None else max(1, len(devices))
    for index in range(count):
        own = {"NULLSPACE_ACCEPTS": SEARCHES}
        if devices:
            own["NULLSPACE_GPU"] = devices[index % len(devices)]
        name = f"worker-{index + 1}"
        children.append(
            Child(name, [*program, "worker"], env | own, logs / f"{name}.log", WORKER_GRACE)
        )
    if count:
        # apart, so that nobody waits for a download behind a search; on the CPU, so that it
        # takes no memory from the search's GPU
        own = {"NULLSPACE_ACCEPTS": EXPORTS} | ({"CUDA_VISIBLE_DEVICES": ""} if devices else {})
        children.append(
            Child("exports", [*program, "worker"], env | own, logs / "exports.log", WORKER_GRACE)
        )
    return children


def _wait_ready(running: Service) -> None:
    """Until the api answers and every worker process called in. Raises StartFailed."""
    deadline = time.monotonic() + START_SECONDS
    workers = sum(child.name != "api" for child in running.children)
    with running.client() as client:
        while True:
            for child in running.children:
                code = child.process.poll() if child.process else 0
                if code is not None:
                    raise StartFailed(
                        f"{child.name} ended at its start (exit {code}):\n{child.tail()}"
                    )
            with contextlib.suppress(httpx.HTTPError):
                ready = httpx.get(f"{running.url}/readyz", timeout=5).status_code == 200
                if ready and sum(bool(worker["live"]) for worker in client.workers()) >= workers:
                    return
            if time.monotonic() > deadline:
                tails = "\n".join(f"{c.name}:\n{c.tail(5)}" for c in running.children)
                raise StartFailed(
                    f"the service did not get ready in {START_SECONDS:.0f} s\n{tails}"
                )
            time.sleep(0.1)


@contextlib.contextmanager
def _tended(
    children: list[Child], owned: Sequence[PostgresServer | RedisServer], say: Say
) -> Iterator[None]:
    """Restart children that die, with 1, 2, 4 ... 60 s between failures in a row.

    Our own servers come back at the same addresses, at most every SERVER_PAUSE seconds.
    """
    ending = threading.Event()
    tried: dict[str, float] = {}

    def tend_servers() -> None:
        for server in owned:
            if server.running or time.monotonic() < tried.get(server.name, 0) + SERVER_PAUSE:
                continue
            say(f"{server.name} ended, starts again: {server.folder / 'log'}")
            try:
                server.start()
            except Exception as error:
                # whatever it is, the next try may go well, and the other children need tending
                say(f"{server.name} did not start, tried again in {SERVER_PAUSE:.0f} s: {error}")
            tried[server.name] = time.monotonic()

    def tend() -> None:
        due: dict[str, float] = {}
        while not ending.wait(0.5):
            tend_servers()
            now = time.monotonic()
            for child in children:
                if child.process is not None and child.process.poll() is None:
                    if now - child.started > 60:
                        child.failures = 0
                    continue
                if child.name not in due:
                    pause = min(60, 2**child.failures)
                    child.failures += 1
                    due[child.name] = now + pause
                    code = child.process.poll() if child.process else None
                    say(f"{child.name} ended (exit {code}), starts again in {pause} s: {child.log}")
                elif now >= due[child.name]:
                    del due[child.name]
                    with contextlib.suppress(StartFailed):
                        child.launch()

    thread = threading.Thread(target=tend, name="tending", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()


def _end(children: list[Child], say: Say) -> None:
    """Workers first, all at once: they hand their leases back; then the api."""
    say("stopping: running jobs are put back and go on at the next start")
    workers = [child for child in children if child.name != "api"]
    for group in (workers, [child for child in children if child.name == "api"]):
        for child in group:
            if child.process is not None:
                child.process.ask()
        for child in group:
            if child.process is not None:
                child.process.stop()


def account(running: Service) -> str:
    """How to sign in: the password is shown once, when the account is made."""
    if running.password is None:
        return f"{running.email}, with your password"
    return f"{running.email}, password {running.password}"


def stay(options: Options, say: Say, remember: Callable[[Service], None]) -> None:
    """`nullspace up`: run until Ctrl-C. Raises StartFailed."""
    with service(options, say) as running:
        remember(running)
        threading.Event().wait()
