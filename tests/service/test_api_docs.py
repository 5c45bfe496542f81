"""docs/api.md is true: its table is the document's paths, its commands run, its metrics exist."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx

from api import openapi
from jobs import prompts
from jobs.database import Sessions
from jobs.settings import Settings
from jobs.tables import User
from tests.service.api_server import serve, wait_for
from tests.service.api_worker import claim, export, score

TEXT = (openapi.SNAPSHOT.parent / "api.md").read_text(encoding="utf-8")


def test_table_holds_every_address() -> None:
    written = re.findall(r"^\| `([A-Z]+ /[^`]*)` \|", TEXT, re.M)
    paths = json.loads(openapi.text())["paths"]
    served = [
        f"{method.upper()} {path.removeprefix('/api/v1')}"
        for path, operations in paths.items()
        for method in operations
        if path.startswith("/api/")
    ]
    assert sorted(written) == sorted(served)


def test_commands_run(
    make_settings: Callable[..., Settings], sessions: Sessions, member: User, tmp_path: Path
) -> None:
    model = tmp_path / "models" / "demo"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"")
    with sessions.begin() as session:
        session.add(member)
        for name in ("demo-refused", "demo-answered"):
            lines = prompts.parse("\n".join(f"{name} {n}" for n in range(40)).encode(), "a.txt")
            prompts.create_set(session, member, name, lines)
    first, second = re.findall(r"```sh\n(.*?)```", TEXT, re.S)
    settings = make_settings(models=tmp_path / "models")
    with serve(settings, sessions) as api:
        found = httpx.get(f"{api.url}/metrics").text
        for name in re.findall(r"`(nullspace_[a-z_]+)", TEXT):
            assert f" {name} " in found, name
        variables = {**os.environ, "NULLSPACE_URL": api.url, "NULLSPACE_TOKEN": api.token(member)}
        pulled = tmp_path / "pulled"
        pulled.mkdir()
        shell = ["bash", "-euo", "pipefail", "-c"]
        begun = subprocess.run(
            [*shell, f"{first}\necho job=$job"],
            env=variables,
            cwd=pulled,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert begun.returncode == 0, begun.stderr
        assert begun.stdout.startswith("queued") and "event: job" in begun.stdout
        score(sessions, claim(sessions, settings), 0, 0.01)
        # the same Idempotency-Key: the same job, which has a trial by now
        whole = subprocess.Popen([*shell, first + second], env=variables, cwd=pulled)
        try:
            with api.as_user(member) as client:
                job = begun.stdout.rsplit("job=", 1)[1].strip()
                path = f"/jobs/{job}/artifacts"
                wait_for(lambda: client.get(path).json(), 60)
                files = {"model.safetensors": b"weights" * 1000, "config.json": b"{}"}
                export(sessions, settings, client.get(path).json()[0]["id"], files)
            assert whole.wait(60) == 0
        finally:
            whole.kill()
            whole.wait(10)
        for name, data in files.items():
            assert (pulled / name).read_bytes() == data
