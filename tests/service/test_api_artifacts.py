"""Artifacts over HTTP: asked for, made, downloaded and resumed, with httpx and with curl."""

from __future__ import annotations

import hashlib
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.database import Sessions
from jobs.tables import User
from tests.service.api_server import Api, api, spec
from tests.service.api_worker import export, whole_job
from tests.service.test_api_jobs import problem

__all__ = ["api"]
WEIGHTS = random.Random(7).randbytes(300_000)
FILES = {
    "model.safetensors": WEIGHTS,
    "config.json": b"{}",
    "empty.txt": b"",
    "sub/ä b.txt": b"x",
    "SHA256SUMS": b"made by the engine\n",
}
ETAG = f'"{hashlib.sha256(WEIGHTS).hexdigest()}"'


@pytest.fixture
def artifact(api: Api, member: User, sessions: Sessions) -> str:
    """The id of a ready artifact of `member`."""
    with api.as_user(member) as client:
        job = client.post("/jobs", json=spec(trials=1)).json()["id"]
        whole_job(sessions, api.settings, [0])
        path = f"/jobs/{job}/trials/0/artifacts"
        asked = client.post(path, json={"kind": "merged"})
        assert asked.status_code == 202 and asked.json()["state"] == "queued"
        assert asked.headers["location"] == f"/api/v1/artifacts/{asked.json()['id']}"
        again = client.post(path, json={"kind": "merged"})
        assert again.json()["id"] == asked.json()["id"]
        waiting = client.get(f"/artifacts/{asked.json()['id']}/files/config.json")
        assert "queued" in str(problem(waiting, 409)["detail"])
        problem(client.post(path, json={"kind": "gguf"}), 422)
        problem(client.post(path, json={"kind": "lora", "rank": 0}), 422)
        export(sessions, api.settings, asked.json()["id"], FILES)
        (listed,) = client.get(f"/jobs/{job}/artifacts").json()
        assert listed["state"] == "ready" and listed["size"] == sum(map(len, FILES.values()))
        return str(asked.json()["id"])


def test_files_and_their_checksums(api: Api, artifact: str, member: User, tmp_path: Path) -> None:
    with api.as_user(member) as client:
        shown = client.get(f"/artifacts/{artifact}").json()
        for file in shown["files"]:
            found = client.get(f"{api.url}{file['url']}")
            assert found.content == FILES[file["name"]]
            assert found.headers["etag"] == f'"{file["sha256"]}"'
            assert found.headers["content-disposition"].startswith("attachment")
            (tmp_path / file["name"]).parent.mkdir(exist_ok=True)
            (tmp_path / file["name"]).write_bytes(found.content)
        sums = client.get(f"/artifacts/{artifact}/SHA256SUMS").text
        # kept under its name, as docs/api.md does, it takes the place of the folder's own
        (tmp_path / "SHA256SUMS").write_text(sums)
        check = subprocess.run(
            ["sha256sum", "-c", "-"], cwd=tmp_path, input=sums.encode(), capture_output=True
        )
        assert check.returncode == 0, check.stderr


RANGES: list[tuple[dict[str, str], int, int, int]] = [
    ({}, 200, 0, 299_999),
    ({"Range": "bytes=0-0"}, 206, 0, 0),
    ({"Range": "bytes=100-199"}, 206, 100, 199),
    ({"Range": "bytes=299990-"}, 206, 299_990, 299_999),
    ({"Range": "bytes=-10"}, 206, 299_990, 299_999),
    ({"Range": "bytes=-400000"}, 206, 0, 299_999),
    ({"Range": "bytes=10-9999999"}, 206, 10, 299_999),
    ({"Range": "bytes=100-199", "If-Range": ETAG}, 206, 100, 199),
    ({"Range": "bytes=100-199", "If-Range": '"other"'}, 200, 0, 299_999),
    ({"Range": "bytes=100-199", "If-Range": f"W/{ETAG}"}, 200, 0, 299_999),
    ({"Range": "bytes=9-5"}, 200, 0, 299_999),  # invalid: ignored (RFC 9110, 14.2)
    ({"Range": "lines=1-2"}, 200, 0, 299_999),
    ({"Range": "bytes=abc"}, 200, 0, 299_999),
    ({"Range": "bytes=0-1,5-6"}, 200, 0, 299_999),
    ({"Range": "bytes=300000-"}, 416, 0, -1),
    ({"If-None-Match": ETAG}, 304, 0, -1),
    ({"If-None-Match": f'"x", W/{ETAG}'}, 304, 0, -1),
    ({"If-None-Match": "*"}, 304, 0, -1),
    ({"If-None-Match": '"other"'}, 200, 0, 299_999),
]


def test_ranges_and_conditions(api: Api, artifact: str, member: User) -> None:
    path = f"/artifacts/{artifact}/files/model.safetensors"
    with api.as_user(member) as client:
        for headers, status, first, last in RANGES:
            found = client.get(path, headers=headers)
            assert found.status_code == status, headers
            assert found.content == (WEIGHTS[first : last + 1] if status < 300 else b""), headers
            if status != 416:
                assert found.headers["etag"] == ETAG
            if status == 206:
                assert found.headers["content-range"] == f"bytes {first}-{last}/300000"
            if status == 416:
                assert found.headers["content-range"] == "bytes */300000"
            head = client.head(path, headers=headers)
            assert head.status_code == status and head.content == b"", headers
            for name in ("etag", "content-range", "content-length"):
                assert head.headers.get(name) == found.headers.get(name), headers


def test_curl_resumes(api: Api, artifact: str, member: User, tmp_path: Path) -> None:
    part = tmp_path / "model.safetensors"
    part.write_bytes(WEIGHTS[:123_456])
    url = f"{api.url}/api/v1/artifacts/{artifact}/files/model.safetensors"
    token = api.token(member)
    command = ["curl", "-fsS", "-C", "-", "-o", str(part), "-H", f"Authorization: Bearer {token}"]
    subprocess.run([*command, url], check=True, timeout=30)
    assert part.read_bytes() == WEIGHTS


def test_no_other_file_can_be_had(api: Api, artifact: str, member: User) -> None:
    with api.as_user(member) as client:
        for name in ("none.bin", "%2e%2e/%2e%2e/x", "..%2f..%2fx", "/etc/passwd", "a%00b"):
            problem(client.get(f"{api.url}/api/v1/artifacts/{artifact}/files/{name}"), 404)


def test_a_file_that_is_gone_or_cut(api: Api, artifact: str, member: User) -> None:
    path = api.settings.artifacts / artifact / "config.json"
    with api.as_user(member) as client:
        path.write_bytes(b"{")
        assert "gone" in str(
            problem(client.get(f"/artifacts/{artifact}/files/config.json"), 404)["detail"]
        )
        path.unlink()
        problem(client.get(f"/artifacts/{artifact}/files/config.json"), 404)


def test_artifacts_of_private_jobs_are_hidden(
    api: Api, member: User, make_user: Callable[..., User], sessions: Sessions
) -> None:
    with api.as_user(member) as mine, api.as_user(make_user()) as theirs:
        job = mine.post("/jobs", json=spec(trials=1, private=True)).json()["id"]
        whole_job(sessions, api.settings, [0])
        made = mine.post(f"/jobs/{job}/trials/0/artifacts").json()["id"]
        export(sessions, api.settings, made, {"config.json": b"{}"})
        for path in ("", "/SHA256SUMS", "/files/config.json"):
            problem(theirs.get(f"/artifacts/{made}{path}"), 404)
            assert mine.get(f"/artifacts/{made}{path}").status_code == 200


def test_log_by_offset(api: Api, member: User, sessions: Sessions) -> None:
    with api.as_user(member) as client:
        job = client.post("/jobs", json=spec(trials=1)).json()["id"]
        empty = client.get(f"/jobs/{job}/log").json()
        assert empty["task"] is None and empty["text"] == "" and empty["next_offset"] == 0
        task = empty["tasks"][0]["id"]
        lines = [f"line {n} \x1b[31mred\x1b[0m é\u202e\r\n" for n in range(200)]
        api.settings.logs.mkdir(parents=True, exist_ok=True)
        file = api.settings.logs / f"{task}.log"
        file.write_bytes("".join(lines).encode() + "é".encode()[:1])
        whole, offset = "", 0
        while True:
            page = client.get(f"/jobs/{job}/log", params={"offset": offset, "limit": 97}).json()
            if page["next_offset"] == offset:
                break
            whole, offset = whole + page["text"], page["next_offset"]
        # the last byte is half a character: it waits for the other half
        assert offset == file.stat().st_size - 1
        assert whole == "".join(f"line {n} red é\\u202e\n" for n in range(200))
        with file.open("ab") as more:
            more.write("é".encode()[1:])
        accept = {"Accept": "text/plain"}
        text = client.get(f"/jobs/{job}/log", params={"offset": offset}, headers=accept)
        assert text.text == "é" and text.headers["content-type"].startswith("text/plain")
        assert int(text.headers["x-next-offset"]) == file.stat().st_size
        problem(client.get(f"/jobs/{job}/log", params={"task": job}), 404)
        problem(client.get(f"/jobs/{job}/log", params={"offset": -1}), 422)
