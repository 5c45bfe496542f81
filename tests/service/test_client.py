"""The Python client against the real API: jobs, live events, downloads that break."""

from __future__ import annotations

import hashlib
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from jobs.database import Sessions
from jobs.tables import User
from nullspace import Client, ClientError
from nullspace.client import Refused, Unreachable
from nullspace.download import DownloadFailed, fetch
from tests.service.api_server import Api, api, free_port, spec
from tests.service.api_worker import claim, export, finish, score, whole_job

__all__ = ["api"]
WEIGHTS = random.Random(3).randbytes(3_000_000)
FILES = {"model.safetensors": WEIGHTS, "config.json": b"{}", "empty": b"", "sub/a b.txt": b"x"}


@pytest.fixture
def client(api: Api, member: User) -> Iterator[Client]:
    with Client(api.url, api.token(member)) as made:
        yield made


def test_a_job_from_submit_to_files(
    client: Client, api: Api, sessions: Sessions, tmp_path: Path
) -> None:
    job = client.submit(spec(trials=3, name="first"), idempotency_key="k")
    assert client.submit(spec(trials=3, name="first"), idempotency_key="k")["id"] == job["id"]
    assert [found["id"] for found in client.jobs(mine=True)] == [job["id"]]
    assert list(client.jobs(q="nothing like it")) == []
    whole_job(sessions, api.settings, [5, 2, 7])
    assert client.job(job["id"])["state"] == "completed"
    assert [trial["number"] for trial in client.trials(job["id"])] == [0, 1, 2]
    assert [trial["number"] for trial in client.front(job["id"])] == [1, 0]
    assert client.pick(job["id"], 1)["picked"] is True
    assert len(client.trial(job["id"], 1)["responses"]["search"]) == 8

    events = list(client.events(job["id"]))
    assert [event.seq for event in events[:-1]] == list(range(1, len(events)))
    assert events[-1].kind == "end" and events[-1].payload["state"] == "completed"
    assert [e.payload["refusals"] for e in events if e.kind == "trial"][:3] == [5, 2, 7]

    artifact = client.export(job["id"], 1)["id"]
    export(sessions, api.settings, artifact, FILES)
    assert client.wait_artifact(artifact, timeout=10)["state"] == "ready"
    seen: list[tuple[int, int]] = []
    paths = client.download(artifact, tmp_path / "out", progress=lambda *at: seen.append(at))
    assert {str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in paths} == FILES
    assert seen[-1][0] <= seen[-1][1] == 3_000_003
    assert not list((tmp_path / "out").rglob("*.part"))


def test_control(client: Client) -> None:
    job = client.submit(spec(trials=3))["id"]
    assert client.pause(job)["state"] == "paused"
    assert client.resume(job)["state"] == "queued"
    assert client.amend(job, trials=5)["trials"]["budget"] == 5
    assert client.cancel(job)["state"] == "cancelled"
    with pytest.raises(Refused) as refused:
        client.resume(job)
    assert refused.value.status == 409 and refused.value.exit_code == 6


def test_events_arrive_while_they_happen(client: Client, api: Api, sessions: Sessions) -> None:
    job = client.submit(spec(trials=2))["id"]
    held = claim(sessions, api.settings)
    refusals: list[int] = []
    got_one = threading.Event()

    def listen() -> None:
        for event in client.events(job):
            if event.kind == "trial" and event.payload["state"] == "complete":
                refusals.append(event.payload["refusals"])
                got_one.set()

    listener = threading.Thread(target=listen)
    listener.start()
    score(sessions, held, 4, 0.1)
    assert got_one.wait(10)
    score(sessions, held, 1, 0.2)
    finish(sessions, held)
    finish(sessions, claim(sessions, api.settings))
    listener.join(20)
    assert not listener.is_alive() and refusals == [4, 1]


def test_errors_name_field_and_mend(client: Client, api: Api, member: User) -> None:
    with pytest.raises(Refused, match="trials") as refused:
        client.submit(spec(trials=0))
    assert refused.value.exit_code == 7
    with pytest.raises(Refused, match="paths and addresses are not accepted"):
        client.submit(spec(model="../secret"))
    with pytest.raises(Refused) as missing:
        client.job("00000000-0000-0000-0000-000000000000")
    assert missing.value.exit_code == 5
    with Client(api.url, "ns_wrong") as stranger, pytest.raises(Refused) as unknown:
        stranger.me()
    assert unknown.value.exit_code == 4
    with pytest.raises(ClientError, match="cannot be read"):
        client.upload_prompts("mine", Path("/no/such/file.txt"))
    nobody = Client(f"http://127.0.0.1:{free_port()}", "x")
    with nobody, pytest.raises(Unreachable, match="nullspace up"):
        nobody.me()


def test_prompts_and_tokens(client: Client, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("\n".join(f"question {n}" for n in range(9)))
    assert client.upload_prompts("mine", tmp_path / "mine.txt")["count"] == 9
    assert client.send_prompts("other", [f"text {n}" for n in range(8)])["count"] == 8
    assert {"mine", "other"} <= {found["name"] for found in client.prompt_sets()}
    made = client.create_token("ci", ["read"], 1)
    assert made["token"].startswith("ns_")
    client.revoke_token(made["id"])
    assert [t["revoked_at"] for t in client.tokens() if t["id"] == made["id"]] != [None]


class Cut:
    """A server that breaks off its first answers, and says which ranges it was asked for."""

    def __init__(self, data: bytes, cuts: list[int]) -> None:
        self.data, self.cuts = data, cuts
        self.ranges: list[str] = []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            with connection:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += connection.recv(4096)
                asked = [line for line in head.decode().split("\r\n") if line.startswith("Range")]
                self.ranges.append(asked[0].partition("=")[2] if asked else "")
                first = int(self.ranges[-1].rstrip("-")) if asked else 0
                rest = self.data[first:]
                status = "206 Partial Content" if asked else "200 OK"
                connection.sendall(
                    f"HTTP/1.1 {status}\r\nContent-Length: {len(rest)}\r\n"
                    "Connection: close\r\n\r\n".encode()
                )
                connection.sendall(rest[: self.cuts.pop(0)] if self.cuts else rest)

    def close(self) -> None:
        self.socket.close()


def described(data: bytes, name: str = "w.bin") -> dict[str, object]:
    digest = hashlib.sha256(data).hexdigest()
    return {"name": name, "size": len(data), "sha256": digest, "url": f"/{name}"}


def test_a_broken_download_is_resumed(tmp_path: Path) -> None:
    server = Cut(WEIGHTS, [1_000_000, 500_000])
    with httpx.Client(base_url=server.url) as http:
        path = fetch(http, described(WEIGHTS), tmp_path)
    server.close()
    assert path.read_bytes() == WEIGHTS
    starts = [int(asked.rstrip("-") or 0) for asked in server.ranges]
    assert starts[0] == 0 and 0 < starts[1] < starts[2] <= 1_500_000


def test_a_partial_file_of_an_earlier_run(tmp_path: Path) -> None:
    (tmp_path / "w.bin.part").write_bytes(WEIGHTS[:2_000_000])
    server = Cut(WEIGHTS, [])
    with httpx.Client(base_url=server.url) as http:
        fetch(http, described(WEIGHTS), tmp_path)
        assert server.ranges == ["2000000-"]
        fetch(http, described(WEIGHTS), tmp_path)  # there already: nothing is asked
    server.close()
    assert len(server.ranges) == 1


def test_a_damaged_part_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / "w.bin.part").write_bytes(b"\0" * 1000)
    server = Cut(WEIGHTS, [])
    with httpx.Client(base_url=server.url) as http:
        assert fetch(http, described(WEIGHTS), tmp_path).read_bytes() == WEIGHTS
    server.close()
    assert server.ranges == ["1000-", ""]


def test_wrong_bytes_never_get_the_name(tmp_path: Path) -> None:
    server = Cut(b"other" * 10, [])
    with httpx.Client(base_url=server.url) as http, pytest.raises(DownloadFailed, match="sha256"):
        fetch(http, described(b"right" * 10), tmp_path)
    server.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "..", "a\\..\\x"])
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    with httpx.Client() as http, pytest.raises(DownloadFailed, match="not safe"):
        fetch(http, described(b"", name), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with httpx.Client() as http, pytest.raises(DownloadFailed, match="cannot be written"):
        fetch(http, described(b"x"), tmp_path / "file")
