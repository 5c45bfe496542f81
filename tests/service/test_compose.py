"""docker-compose.yml without an engine: the schema, the rules of the house, and every command."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import psycopg
import pytest
import redis

from demo import MODEL
from nullspace.client import Client
from nullspace.embedded import redis_binary, start_postgres
from nullspace.guarded import Guarded, start
from nullspace.one_job import best
from tests.service.api_server import free_port, wait_for
from tests.service.compose_file import ROOT, Missing, command_of, interpolate, load

SCHEMA = Path(__file__).with_name("compose-spec.schema.json")
SECRETS = {
    "POSTGRES_PASSWORD": "3f0c9a1d7b",
    "REDIS_PASSWORD": "9b1d4e7a2c",
    "NULLSPACE_SECRET_KEY": "k" * 40,
    "NULLSPACE_ADMIN_EMAIL": "first@example.org",
    "NULLSPACE_ADMIN_PASSWORD": "a long password",
}
OURS = ("migrate", "api", "worker-cpu", "worker-all", "worker-gpu0", "worker-gpu1")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a$$b", "a$b"),
        ("${SET}", "value"),
        ("$SET-x", "value-x"),
        ("${UNSET}", ""),
        ("${UNSET:-default}", "default"),
        ("${EMPTY:-default}", "default"),
        ("${EMPTY-default}", ""),
        ("${UNSET:-${SET}/x}", "value/x"),
        ("${SET:?message}", "value"),
        ("${EMPTY?message}", ""),
        ("${SET:+other}", "other"),
        ("${UNSET:+other}", ""),
    ],
)
def test_interpolation_is_that_of_the_specification(text: str, expected: str) -> None:
    assert interpolate(text, {"SET": "value", "EMPTY": ""}) == expected


def test_the_file_is_valid() -> None:
    schema = json.loads(SCHEMA.read_text())
    validator = jsonschema.validators.validator_for(schema)
    validator(schema).validate(load(SECRETS))


@pytest.mark.parametrize("name", sorted(SECRETS))
@pytest.mark.parametrize("value", [None, ""])
def test_every_secret_is_required_by_name(name: str, value: str | None) -> None:
    env = {key: each for key, each in SECRETS.items() if key != name}
    if value is not None:
        env[name] = value
    with pytest.raises(Missing, match=f"^{name}: set {name}"):
        load(env)
    assert f"\n{name}=" in (ROOT / ".env.example").read_text()


def test_the_rules_of_the_house() -> None:
    whole = load(SECRETS)
    for name, service in whole["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["user"] not in ("root", "0"), name
        assert "privileged" not in service and "cap_add" not in service, name
        assert ("ports" in service) == (name == "api"), name
        assert name == "migrate" or "healthcheck" in service, name
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            assert source in whole["volumes"] or volume.endswith(":ro"), name
        secrets = [value for key, value in SECRETS.items() if not key.endswith("EMAIL")]
        command = json.dumps(service.get("command", "")) + json.dumps(
            service.get("healthcheck", "")
        )
        assert not any(secret in command for secret in secrets), name
    assert whole["services"]["api"]["ports"] == ["127.0.0.1:8600:8600"]
    assert whole["networks"]["inside"]["internal"] is True
    for name in ("postgres", "redis"):
        assert whole["services"][name]["networks"] == ["inside"]
    admin = {"NULLSPACE_ADMIN_EMAIL", "NULLSPACE_ADMIN_PASSWORD"}
    holders = [n for n, s in whole["services"].items() if admin & set(s.get("environment", {}))]
    assert holders == ["migrate"]


def test_each_gpu_has_one_worker_and_each_profile_does_every_kind_of_task() -> None:
    services = load(SECRETS)["services"]
    devices: list[str] = []
    for service in services.values():
        if "deploy" in service:
            (reserved,) = service["deploy"]["resources"]["reservations"]["devices"]
            devices += reserved["device_ids"]
    assert devices == ["0", "1", "2", "3"]
    for profile, gpus in {"cpu": 0, "gpu": 1, "gpus-2": 2, "gpus-4": 4}.items():
        chosen = [s for s in services.values() if profile in s.get("profiles", [])]
        kinds = {kind for s in chosen for kind in s["environment"]["NULLSPACE_ACCEPTS"].split(",")}
        assert kinds == {"search", "evaluate", "export", "chat", "benchmark"}, profile
        assert sum("deploy" in s for s in chosen) == gpus


@pytest.mark.parametrize("file", ["Dockerfile", "Dockerfile.gpu"])
def test_images_run_as_nobody_special_and_start_what_exists(file: str) -> None:
    text = (ROOT / file).read_text()
    assert text.rstrip().splitlines()[-1].startswith("CMD [")
    assert "USER 10001:10001" in text and "HEALTHCHECK" in text
    names = subprocess.run(
        [sys.executable, "-m", "nullspace", "--help"], capture_output=True, text=True, check=True
    ).stdout
    program, command, *_ = command_of(text, "CMD")
    assert program == "nullspace" and f"\n  {command} " in names
    check = command_of(text, "HEALTHCHECK")
    assert check[0] in ("nullspace", "python")
    compose = load(SECRETS)["services"]
    stage = "api" if command == "api" else "worker-cpu"
    assert compose[stage]["command"] == command_of(text, "CMD")
    assert compose[stage]["healthcheck"]["test"] == ["CMD", *check]


def test_the_image_of_the_api_has_no_torch() -> None:
    stages = (ROOT / "Dockerfile").read_text().split("\nFROM ")
    build = next(stage for stage in stages if stage.startswith("build AS build-api"))
    assert "torch" not in build and "worker" not in build
    copied = next(stage for stage in stages if stage.startswith("base AS api"))
    assert "--from=build-api" in copied


class Machine:
    """The services as local processes: other ports and folders, otherwise as in the file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.services: dict[str, Any] = load(SECRETS)["services"]
        self.port, self.redis_port = free_port(), free_port()
        self.postgres = start_postgres(folder / "postgres", port=0, durable=False)
        with psycopg.connect(self.postgres.url, autocommit=True) as connection:
            password = self.services["postgres"]["environment"]["POSTGRES_PASSWORD"]
            connection.execute(f"ALTER ROLE nullspace PASSWORD '{password}'")
        self.running: dict[str, Guarded] = {}
        binary = redis_binary()
        assert binary is not None
        for name in ("bin", "data", "cache", "models", "tmp"):
            (folder / name).mkdir()
        (folder / "bin" / "redis-server").symlink_to(binary)
        (folder / "bin" / "nullspace").symlink_to(Path(sys.executable).with_name("nullspace"))
        (folder / "bin" / "python").symlink_to(sys.executable)

    def local(self, text: str) -> str:
        """What a container finds under these names lies elsewhere here."""
        tmp = self.folder / "tmp"
        own = f"port {self.redis_port}\\nbind 127.0.0.1\\ndir {tmp}\\nrequirepass"
        moved = {
            "@postgres:5432": f"@127.0.0.1:{self.postgres.port}",
            "@redis:6379": f"@127.0.0.1:{self.redis_port}",
            "8600": str(self.port),
            "0.0.0.0": "127.0.0.1",
            "/tmp/redis.conf": str(tmp / "redis.conf"),
            "requirepass": own,
        }
        for there, here in moved.items():
            text = text.replace(there, here)
        return str(self.folder) + text if text in ("/data", "/cache", "/models") else text

    def environment(self, name: str) -> dict[str, str]:
        """What the image sets and the service adds: nothing of this process."""
        given = {key: self.local(str(v)) for key, v in self.services[name]["environment"].items()}
        image = {
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "HOME": f"{self.folder}/tmp",
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",  # three workers share this machine
        }
        return image | given

    def start(self, name: str) -> Guarded:
        command = [self.local(word) for word in self.services[name]["command"]]
        log = self.folder / f"{name}.log"
        env = self.environment(name)
        process = start(["env", *command], env=env, cwd=self.folder / "tmp", log=log, grace=40)
        self.running[name] = process
        return process

    def healthy(self, name: str) -> bool:
        """What the service's health check says."""
        _, *test = self.services[name]["healthcheck"]["test"]
        command = [self.local(word) for word in test]
        process = start(["env", *command], env=self.environment(name), log=self.folder / "health")
        return process.wait(60) == 0

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def end(self) -> None:
        for process in reversed(list(self.running.values())):
            process.ask()
        for process in self.running.values():
            process.stop()
        self.postgres.stop()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    try:
        yield made
    finally:
        made.end()


@pytest.mark.timeout(420)
def test_the_demo_job_passes_through_the_composed_services(machine: Machine) -> None:
    assert MODEL.is_dir(), "the demo model is not there: demo/train.py makes it"
    # 1. redis, by its own command: the password comes from the environment
    machine.start("redis")
    address = machine.environment("api")["REDIS_URL"]
    with redis.Redis.from_url(address) as client:
        wait_for(lambda: _pings(client))
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert client.config_get("appendonly") == {"appendonly": "yes"}
    # 2. migrate runs to its end, twice without harm
    assert machine.start("migrate").wait(90) == 0, machine.said("migrate")
    assert machine.start("migrate").wait(90) == 0, machine.said("migrate")
    # 3. api and workers, each with its own environment
    for name in ("api", "worker-gpu0", "worker-cpu", "worker-all"):
        machine.start(name)
    end = time.monotonic() + 90
    while not machine.healthy("api"):
        assert time.monotonic() < end, machine.said("api")
    # 4. the first token, as docs/containers.md makes it
    made = start(
        ["nullspace", "token", "create", "--email", SECRETS["NULLSPACE_ADMIN_EMAIL"]],
        env=machine.environment("api"), log=machine.folder / "token",
    )  # fmt: skip
    assert made.wait(60) == 0
    token = (machine.folder / "token").read_text().split()[-1]
    with Client(f"http://127.0.0.1:{machine.port}", token) as client:
        wait_for(lambda: len([row for row in client.workers() if row["live"]]) == 3, 90)
        assert machine.healthy("worker-cpu")
        job = client.submit(
            {"model": "demo", "quantization": "none", "trials": 3, "max_new_tokens": 24,
             "prompts": {"search": 16, "heldout": 16, "direction": 64}}
        )["id"]  # fmt: skip
        for event in client.events(job):
            state = event.payload.get("state") if event.kind == "job" else None
            assert state not in ("failed", "paused"), client.job(job)["error"]
        found = client.job(job)
        assert found["state"] == "completed" and found["trials"]["complete"] == 3
        assert found["baseline"]["search"]["refusals"] >= 15
        pick = best(client.front(job))
        artifact = client.export(job, pick["number"])["id"]
        client.wait_artifact(artifact, timeout=120)
        files = client.download(artifact, machine.folder / "out")
    assert any(path.suffix == ".safetensors" for path in files)


def _pings(client: redis.Redis) -> bool:
    with contextlib.suppress(redis.ConnectionError):
        return bool(client.ping())
    return False
