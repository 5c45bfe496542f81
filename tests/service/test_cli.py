"""The command line on a service of its own (`nullspace up`), with a fake engine."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.service.api_server import free_port, wait_for
from tests.service.command_line import Lab, Up

JOB = ("--harmful", "asked.txt", "--harmless", "plain.txt", "--set", "prompts.search=8",
       "--set", "prompts.heldout=8", "--set", "prompts.direction=16")  # fmt: skip


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab.make(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def up(lab: Lab) -> Iterator[Up]:
    with lab.up() as running:
        yield running


def test_up_tells_how_to_sign_in_and_a_second_terminal_works(lab: Lab, up: Up) -> None:
    said = up.said()
    assert "admin@localhost, password " in said and "token:   ns_" in said
    kept = lab.folder / "home" / ".config" / "nullspace" / "connection.json"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    for name in ("secret-key", "token"):
        assert stat.S_IMODE((lab.data / name).stat().st_mode) == 0o600
    assert lab.json("ls") == []
    workers = lab.json("workers")
    assert sorted(" ".join(row["accepts"]) for row in workers) == [
        "export",
        "search evaluate chat benchmark",
    ]
    assert all(row["live"] for row in workers)
    page = httpx.get(up.url, follow_redirects=True, headers={"Accept": "text/html"})
    assert page.status_code == 200 and "text/html" in page.headers["content-type"]


def test_a_job_from_submit_to_files(lab: Lab, up: Up) -> None:
    done = lab.json("submit", "fake", *JOB, "--trials", "6", "--name", "cli", "--watch")
    job = done["id"]
    assert done["state"] == "completed" and done["trials"]["complete"] == 6
    assert {row["name"].rpartition("-")[0] for row in lab.json("prompts", "list")} >= {
        "asked",
        "plain",
    }
    assert lab.json("show", job[:8])["id"] == job
    assert "fake" in lab.nullspace("show", job).stdout
    assert job[:8] in lab.nullspace("ls", "--grep", "cli").stdout
    assert [trial["number"] for trial in lab.json("trials", job)] == list(range(6))
    front = lab.json("trials", job, "--front")
    assert front and all(trial["heldout"] for trial in front)
    best = str(front[0]["number"])
    assert "answer to asked" in lab.nullspace("trials", job, best).stdout
    assert lab.json("pick", job, best)["picked"] is True
    events = [
        json.loads(line) for line in lab.nullspace("watch", job, "--json").stdout.splitlines()
    ]
    assert [event["seq"] for event in events[:-1]] == list(range(1, len(events)))
    assert (
        lab.json("chat", job, "hello", "--trial", best)["answers"][0]["text"] == "answer to hello"
    )
    assert lab.nullspace("chat", job, text="one\ntwo\n\n").stdout.split("\n")[:2] == [
        "answer to one",
        "answer to two",
    ]
    artifact = lab.nullspace("export", job, best).stdout.strip()
    assert artifact in lab.nullspace("show", job).stdout
    pulled = lab.json("pull", artifact, "--output", "out")
    assert {Path(file).name for file in pulled["files"]} == {"weights.bin", "card.json"}
    whole = lab.nullspace("log", job).stdout
    assert [line.split()[1] for line in whole.split("\n") if line.startswith("== ")][:2] == [
        "search",
        "evaluate",
    ]
    assert "trial 0" in whole and "trial 0" in lab.nullspace("log", job, "--task", "search").stdout
    assert "there are: search" in lab.nullspace("log", job, "--task", "nap", code=5).stderr


def test_methods_are_compared(lab: Lab, up: Up) -> None:
    done = lab.json(
        "submit", "fake", *JOB, "--trials", "5", "--method", "mpoa", "-m", "ara", "-m", "deccp",
        "--objective", "refusals", "--objective", "kl_multi", "--scorer", "log_odds", "--watch",
    )  # fmt: skip
    asked = done["spec"]
    assert asked["methods"] == ["mpoa", "ara", "deccp"]
    assert (asked["objectives"], asked["scorers"]) == (["refusals", "kl_multi"], ["log_odds"])
    said = lab.nullspace("show", done["id"]).stdout
    table = [line.split() for line in said.splitlines() if line.split()[1:2] == ["2/2"]]
    assert [row[0] for row in table] == ["mpoa", "ara"] and "hypervolume" in said
    assert "deccp" in lab.nullspace("trials", done["id"], "--front").stdout + said
    wrong = lab.nullspace("submit", "fake", *JOB, "--method", "magic", code=7).stderr
    assert "methods.0" in wrong and "'mpoa'" in wrong
    wrong = lab.nullspace("submit", "fake", *JOB, "--objective", "judge", code=7).stderr
    assert "objectives" in wrong


def test_how_a_job_searches(lab: Lab, up: Up) -> None:
    """The second job begins with what the first one found."""
    first = lab.json("submit", "fake", *JOB, "--trials", "20", "--name", "first", "--watch")
    asked = first["spec"]
    assert (asked["sampler"], asked["screening"], asked["warm_start"]) == ("tpe", True, True)
    cold = lab.json("submit", "fake", *JOB, "--trials", "20", "--cold-start", "--no-screening",
                    "--sampler", "tpe", "--watch")  # fmt: skip
    asked = cold["spec"]
    assert (asked["screening"], asked["warm_start"]) == (False, False)
    assert {trial["warm_start"] for trial in lab.json("trials", cold["id"])} == {None}
    warm = lab.json("submit", "fake", *JOB, "--trials", "20", "--warm-start", "--watch")["id"]
    found = lab.json("trials", warm)[2]
    assert found["origin"] == "warm_start"
    source = lab.json("trials", found["warm_start"]["job"], str(found["warm_start"]["trial"]))
    assert source["params"] == found["params"]
    said = " ".join(lab.nullspace("trials", warm, "2").stdout.split())
    assert f"warm_start, trial {source['number']} of job" in said
    wrong = lab.nullspace("submit", "fake", *JOB, "--sampler", "dice", code=7).stderr
    assert "sampler" in wrong and "'nsga3'" in wrong


def test_control(lab: Lab, up: Up) -> None:
    job = lab.nullspace("submit", "fake", *JOB, "--trials", "400").stdout.strip()
    lab.nullspace("pause", job)
    wait_for(lambda: lab.json("show", job)["state"] == "paused")
    assert lab.json("amend", job, "--trials", "300", "--priority", "3")["priority"] == 3
    lab.nullspace("resume", job)
    lab.nullspace("cancel", job)
    wait_for(lambda: lab.json("show", job)["state"] == "cancelled")
    assert "cancelled" in lab.nullspace("resume", job, code=6).stderr
    assert "cancelled" in lab.nullspace("watch", job, code=10).stderr


def test_wrong_input_has_a_clear_message_and_a_code_of_its_own(lab: Lab, up: Up) -> None:
    assert "trials" in lab.nullspace("submit", "fake", "--trials", "0", code=7).stderr
    assert "trials" in lab.nullspace("submit", "fake", "--trials", "1000000000", code=7).stderr
    assert "no model named nosuch" in lab.nullspace("submit", "nosuch", code=7).stderr
    assert "paths" in lab.nullspace("submit", "../fake", code=7).stderr
    assert "colour" in lab.nullspace("submit", "fake", "--set", "colour=1", code=7).stderr
    assert "seed" in lab.nullspace("submit", "fake", "--set", "seed=red", code=7).stderr
    assert "FIELD=VALUE" in lab.nullspace("submit", "fake", "--set", "seed", code=1).stderr
    assert "no such file" in lab.nullspace("submit", "fake", "--harmful", "no.txt", code=1).stderr
    (lab.folder / "latin.txt").write_bytes(b"caf\xe9\n" * 20)
    assert "UTF-8" in lab.nullspace("prompts", "upload", "latin", "latin.txt", code=7).stderr
    (lab.folder / "one.txt").write_text("only one line\n")
    assert "8" in lab.nullspace("prompts", "upload", "one", "one.txt", code=7).stderr
    said = lab.nullspace("submit", "fake", *JOB, "--harmless", "one.txt", code=7).stderr
    assert said.startswith("one.txt: ") and "8" in said
    assert "equal to 1. Send" in lab.nullspace("submit", "fake", "--trials", "0", code=7).stderr
    (lab.folder / "spec.json").write_text('{"prompts": 3}')
    spec = ("submit", "fake", "--spec", "spec.json", "--harmful", "asked.txt")
    assert "prompts: write an object" in lab.nullspace(*spec, code=1).stderr
    missing = "00000000-0000-0000-0000-000000000000"
    lab.nullspace("show", missing, code=5)
    assert "no job begins" in lab.nullspace("show", "zzz", code=5).stderr
    lab.nullspace("ls", code=4, NULLSPACE_TOKEN="ns_wrong")
    lab.nullspace("nonsense", code=2)
    elsewhere = f"http://127.0.0.1:{free_port()}"
    said = lab.nullspace("ls", "--url", elsewhere, "--token", "x", code=3).stderr
    assert "nullspace up" in said
    # the remembered token is only for its own server
    assert "no token" in lab.nullspace("ls", "--url", elsewhere, code=4).stderr
    assert "http" in lab.nullspace("ls", "--url", "nonsense", code=1).stderr


def test_people_over_rest(lab: Lab, up: Up) -> None:
    lab.nullspace("user", "add", "a@example.org", "--password-stdin", text="a long password\n")
    assert "a@example.org" in {row["email"] for row in lab.json("user", "list")}
    lab.nullspace("user", "password", "a@example.org", text="short\n", code=7)
    lab.nullspace("user", "password", "a@example.org", text="another password\n")
    lab.nullspace("user", "disable", "a@example.org")
    token = lab.json("token", "create", "reader", "--scope", "read")
    assert lab.json("ls", NULLSPACE_TOKEN=token["token"]) is not None
    lab.nullspace("submit", "fake", *JOB, code=4, NULLSPACE_TOKEN=token["token"])
    lab.nullspace("token", "revoke", token["id"])
    said = lab.nullspace("ls", code=4, NULLSPACE_TOKEN=token["token"]).stderr
    assert "revoked" in said


def test_one_up_per_folder(lab: Lab, up: Up) -> None:
    said = lab.nullspace("up", "--data", str(lab.data), code=1).stderr
    assert "runs in" in said and "--data" in said


def test_a_killed_api_and_a_killed_worker_come_back(lab: Lab, up: Up) -> None:
    job = lab.nullspace("submit", "fake", *JOB, "--trials", "40").stdout.strip()
    api = up.child("api", "--host")
    worker = next(p for p in up.tree() if p.cmdline()[-1:] == ["worker"])
    os.kill(api.pid, signal.SIGKILL)
    os.kill(worker.pid, signal.SIGKILL)
    done = lab.nullspace("watch", job, "--json", seconds=160)
    assert json.loads(done.stdout.splitlines()[-1])["kind"] == "end"
    found = lab.json("show", job)
    assert found["state"] == "completed" and found["trials"]["complete"] == 40
    assert up.said().count("starts again") >= 2


def test_killed_servers_come_back_at_their_addresses(lab: Lab, up: Up) -> None:
    job = lab.nullspace("submit", "fake", *JOB, "--trials", "40").stdout.strip()
    postgres = next(p for p in up.tree() if p.name() == "postgres" and "-D" in p.cmdline())
    redis = next(p for p in up.tree() if p.name() in ("redis-server", "valkey-server"))
    os.kill(postgres.pid, signal.SIGKILL)
    os.kill(redis.pid, signal.SIGKILL)
    up.until("PostgreSQL ended, starts again")
    up.until("Redis ended, starts again")
    wait_for(lambda: httpx.get(f"{up.url}/readyz").json().get("status") == "ready", 60)
    lab.nullspace("watch", job, "--json", seconds=160)
    assert sorted(row["number"] for row in lab.json("trials", job)) == list(range(40))


def test_the_end_leaves_nothing_and_the_next_start_finds_everything(tmp_path: Path) -> None:
    lab = Lab.make(tmp_path)
    with lab.up() as first:
        job = lab.nullspace("submit", "fake", *JOB, "--trials", "2000").stdout.strip()
        wait_for(lambda: lab.json("show", job)["trials"]["complete"] > 0, 60)
        processes = first.tree()
        assert len(processes) > 8
        assert first.end(signal.SIGINT) == 130
        assert not [p for p in processes if _alive(p)]
        token = (lab.data / "token").read_text()
    with lab.up() as second:
        assert "password " not in second.said() and token == (lab.data / "token").read_text()
        assert lab.json("show", job)["state"] in ("queued", "running")
        before = lab.json("show", job)["trials"]["complete"]
        wait_for(lambda: lab.json("show", job)["trials"]["complete"] > before, 60)
        # and whoever kills it without warning leaves nothing behind either
        processes = second.tree()
        second.end(signal.SIGKILL)
        wait_for(lambda: not [p for p in processes if _alive(p)], 60)


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_run_without_a_server(tmp_path: Path) -> None:
    lab = Lab.make(tmp_path)
    del lab.env["NULLSPACE_MODELS"]  # the folder is named on the command line
    found = lab.json("run", "models/fake", *JOB, "-n", "4", "--pick", "best", "-o", "out", "-k",
                     "merged", "-k", "adapter", "--data", str(lab.data))  # fmt: skip
    assert [artifact["kind"] for artifact in found["artifacts"]] == ["merged", "adapter"]
    for artifact in found["artifacts"]:
        assert (Path(artifact["path"]) / "weights.bin").is_file()
    ranked = sorted(
        found["front"],
        key=lambda t: (t["heldout"]["refusals"], t["heldout"]["kl_first"], t["number"]),
    )
    assert found["pick"]["number"] == ranked[0]["number"]
    assert {"start", "prepare", "search", "export", "download"} <= set(found["seconds"])
    said = lab.nullspace("run", "models/fake", "-o", "out", code=1).stderr
    assert "not empty" in said
    assert "config.json" in lab.nullspace("run", "./nowhere", code=1).stderr


def test_what_up_says_of_places_it_cannot_use(tmp_path: Path) -> None:
    lab = Lab.make(tmp_path)
    (tmp_path / "file").write_text("")
    said = lab.nullspace("up", "--data", str(tmp_path / "file" / "data"), code=1).stderr
    assert "cannot be written" in said and "--data" in said
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = lab.nullspace("up", "--data", str(tmp_path / "d"), "--port", port, code=1).stderr
        assert f"port {port}" in said and "--port" in said


def test_services_name_the_settings_that_they_lack(tmp_path: Path) -> None:
    lab = Lab.make(tmp_path)
    for command in ("api", "worker", "migrate"):
        said = lab.nullspace(command, code=1).stderr
        assert all(name in said for name in ("DATABASE_URL", "REDIS_URL", "NULLSPACE_SECRET_KEY"))


def test_doctor(tmp_path: Path) -> None:
    found = {row["name"]: row for row in Lab.make(tmp_path).json("doctor")}
    assert found["python"]["state"] == found["database"]["state"] == found["redis"]["state"] == "ok"
    broken = Lab.make(tmp_path)
    address = f"127.0.0.1:{free_port()}"
    broken.env |= {"DATABASE_URL": f"postgresql://{address}/x", "REDIS_URL": f"redis://{address}"}
    said = broken.nullspace("doctor", code=1).stdout
    assert "is DATABASE_URL right" in said and "is REDIS_URL right" in said
