"""A client of the REST interface: one method per address, JSON in and out.

    with Client("http://127.0.0.1:8600", token) as client:
        job = client.submit({"model": "owner/name", "trials": 100})
        for event in client.events(job["id"]):
            print(event.kind, event.payload)
        best = client.front(job["id"])[0]

Every error is a `ClientError` whose text names the field and the mend.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from nullspace.download import fetch
from nullspace.errors import (
    ClientError,
    Missing,
    Refused,
    Unreachable,
    refusal,
    sentences,
    unreachable,
)

__all__ = ["Client", "ClientError", "Event", "Json", "Refused", "Unreachable"]
Json = dict[str, Any]
API = "/api/v1"
OVER = frozenset({"completed", "failed", "cancelled"})


@dataclass(frozen=True)
class Event:
    """One event of a job. `seq` counts from 1 without gaps; kind `end` comes last, with seq 0."""

    seq: int
    kind: str
    payload: Json = field(default_factory=dict)
    at: str = ""


class Client:
    """A connection to one server. `transport` replaces the network, for tests."""

    def __init__(
        self,
        url: str,
        token: str = "",
        *,
        timeout: float = 30.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        headers = {"Accept": "application/json"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        self._http = httpx.Client(
            base_url=self.url, headers=headers, timeout=timeout, transport=transport
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def request(self, method: str, path: str, **options: Any) -> Any:
        """One request below /api/v1; its JSON, None without a body. Raises ClientError."""
        response = self._send(method, path, **options)
        if not response.content:
            return None
        try:
            return response.json()
        except ValueError as error:
            raise Unreachable(f"{self.url} does not answer like a Nullspace server") from error

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            response = self._http.request(method, API + path, **options)
        except httpx.InvalidURL as error:
            raise Unreachable(f"{self.url} is not an address: {error}") from error
        except httpx.HTTPError as error:
            raise Unreachable(unreachable(self.url, error)) from error
        if response.is_error:
            raise refusal(response)
        return response

    # --- jobs -----------------------------------------------------------------------------------

    def submit(self, spec: Json, *, idempotency_key: str | None = None) -> Json:
        """Submit a job (`jobs.spec.job.JobSpec` as JSON). Lost answers do not make two jobs."""
        key = idempotency_key or str(uuid.uuid4())
        options: Json = {"json": spec, "headers": {"Idempotency-Key": key}}
        try:
            return _object(self.request("POST", "/jobs", **options))
        except Unreachable:
            return _object(self.request("POST", "/jobs", **options))

    def estimate(self, spec: Json) -> Json:
        """Memory, disk and time that a job would need."""
        return _object(self.request("POST", "/estimate", json=spec))

    def jobs(self, **filters: Any) -> Iterator[Json]:
        """All jobs that the caller may see, newest first. Filters: state, kind, mine, q."""
        cursor: str | None = None
        while True:
            query = {key: value for key, value in filters.items() if value is not None}
            page = self.request(
                "GET", "/jobs", params=query | ({"cursor": cursor} if cursor else {})
            )
            yield from page["items"]
            cursor = page["next"]
            if not cursor:
                return

    def job(self, job: str) -> Json:
        """One job: state, reason for waiting, progress, ETA, baseline, best trial."""
        return _object(self.request("GET", f"/jobs/{job}"))

    def pause(self, job: str) -> Json:
        """Pause: the running trials are finished or handed back, the GPU is released."""
        return _object(self.request("POST", f"/jobs/{job}/pause"))

    def resume(self, job: str) -> Json:
        """Go on with a paused or failed job."""
        return _object(self.request("POST", f"/jobs/{job}/resume"))

    def cancel(self, job: str) -> Json:
        """Cancel for good. What was scored stays."""
        return _object(self.request("POST", f"/jobs/{job}/cancel"))

    def amend(self, job: str, **changes: Any) -> Json:
        """Change trials, priority, parallelism or name."""
        return _object(self.request("PATCH", f"/jobs/{job}", json=changes))

    def trials(self, job: str) -> Iterator[Json]:
        """The job's trials by number."""
        after: int | None = None
        while True:
            page = self.request(
                "GET", f"/jobs/{job}/trials", params={} if after is None else {"after": after}
            )
            yield from page["items"]
            after = page["next"]
            if after is None:
                return

    def trial(self, job: str, number: int) -> Json:
        """One trial with what the model said, next to the original's answers."""
        return _object(self.request("GET", f"/jobs/{job}/trials/{number}"))

    def front(self, job: str) -> list[Json]:
        """The Pareto-optimal trials, fewest refusals first."""
        found = self.request("GET", f"/jobs/{job}/front")["items"]
        return sorted(
            found, key=lambda trial: (trial["search"]["refusals"], trial["search"]["kl_first"])
        )

    def methods(self, job: str) -> list[Json]:
        """The job's methods side by side."""
        found: list[Json] = self.request("GET", f"/jobs/{job}/methods")["items"]
        return found

    def geometry(self, job: str) -> Json:
        """How prompts lie in the model's residual stream: figures and points by layer."""
        return _object(self.request("GET", f"/jobs/{job}/geometry"))

    def geometry_svg(self, job: str, layer: int | None = None) -> str:
        """That as an SVG file: lines over the layers, or the points of one layer."""
        name = "lines" if layer is None else str(layer)
        return self._send("GET", f"/jobs/{job}/geometry/{name}.svg").text

    def kernel_svg(self, job: str, number: int) -> str:
        """A trial's edit strength λ over the layers as an SVG file."""
        return self._send("GET", f"/jobs/{job}/trials/{number}/kernel.svg").text

    def pick(self, job: str, number: int, picked: bool = True) -> Json:
        """Pick a trial: its files are kept."""
        return _object(
            self.request("POST", f"/jobs/{job}/trials/{number}/pick", json={"picked": picked})
        )

    def answers(self, job: str) -> dict[str, list[Json]]:
        """By role, what the model of an evaluate job said, next to the original's answers."""
        found: dict[str, list[Json]] = self.request("GET", f"/jobs/{job}/answers")["responses"]
        return found

    def benchmark(self, job: str, number: int, tasks: list[str], limit: int | None = None) -> Json:
        """Run harness tasks on a trial, and on the original where that was not done."""
        body: Json = {"tasks": tasks, "limit": limit}
        return _object(self.request("POST", f"/jobs/{job}/trials/{number}/benchmarks", json=body))

    def benchmarks(self, job: str, number: int) -> list[Json]:
        """The benchmarks that were asked for of a trial, oldest first."""
        return list(self.request("GET", f"/jobs/{job}/trials/{number}/benchmarks")["items"])

    def stop_benchmark(self, job: str, benchmark: str) -> Json:
        """Call a benchmark off; what it has measured stays."""
        return _object(self.request("POST", f"/jobs/{job}/benchmarks/{benchmark}/stop"))

    def wait_benchmark(self, job: str, number: int, benchmark: str) -> Json:
        """Wait until a benchmark of a trial is done. ClientError when it failed."""
        while True:
            found = next(b for b in self.benchmarks(job, number) if b["id"] == benchmark)
            if found["state"] == "done":
                return found
            if found["state"] in ("failed", "cancelled"):
                error = found.get("error") or {}
                text = sentences(error.get("message"), error.get("mend"))
                raise ClientError(f"the benchmark {found['state']}: {text or 'see the log'}")
            time.sleep(0.5)

    def chat(self, job: str, prompt: str, *, trial: int | None = None, tokens: int = 200) -> Json:
        """Ask the original (trial None) or an edited model one question. Waits for a worker."""
        seen = int(self.job(job)["event_seq"])
        body: Json = {"prompt": prompt, "trial": trial, "max_new_tokens": tokens}
        task = str(_object(self.request("POST", f"/jobs/{job}/chat", json=body))["task"])
        for event in self.events(job, after=seen, until_over=False):
            if event.payload.get("id") != task:
                continue
            if event.kind == "chat":
                return event.payload
            if event.kind == "task" and event.payload.get("state") in ("failed", "cancelled"):
                error = event.payload.get("error") or {}
                text = sentences(error.get("message"), error.get("mend"))
                raise ClientError(text or f"the question was {event.payload['state']}")
        raise ClientError("the answer did not come")

    # --- live view ------------------------------------------------------------------------------

    def events(
        self, job: str, *, after: int = 0, until_over: bool = True, patience: float = 120.0
    ) -> Iterator[Event]:
        """The job's events from number `after` on, live, each exactly once.

        Reconnects after the last event seen, for `patience` seconds without a server at most.
        Ends with the job's end (kind `end`), or never with `until_over=False`: break out of it.
        """
        silent_since = time.monotonic()
        while True:
            try:
                for event in self._stream(job, after):
                    silent_since = time.monotonic()
                    if event.kind == "end":
                        if until_over:
                            yield event
                            return
                        break
                    if event.seq > after:
                        after = event.seq
                        yield event
                silent_since = time.monotonic()
            except Refused as error:
                if error.status not in (502, 503, 504):
                    raise
            except httpx.HTTPError as error:
                if time.monotonic() - silent_since > patience:
                    raise Unreachable(unreachable(self.url, error)) from error
            time.sleep(0.5)

    def _stream(self, job: str, after: int) -> Iterator[Event]:
        """One connection's events (the format of HTML's EventSource)."""
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        with self._http.stream(
            "GET", f"{API}/jobs/{job}/events", headers=headers, timeout=httpx.Timeout(30, read=60)
        ) as response:
            if response.is_error:
                response.read()
                raise refusal(response)
            kind, data = "message", []
            for line in response.iter_lines():
                if line.startswith("event:"):
                    kind = line[6:].strip()
                elif line.startswith("data:"):
                    data.append(line[5:].removeprefix(" "))
                elif not line and data:
                    body = json.loads("\n".join(data))
                    payload = body if kind == "end" else body["payload"]
                    seq = 0 if kind == "end" else int(body["seq"])
                    yield Event(seq, kind, payload, str(body.get("at", "")))
                    kind, data = "message", []

    def log(self, job: str, *, task: str | None = None, follow: bool = False) -> Iterator[str]:
        """Pieces of a task's log (default: of the task that wrote last), to its end or for ever."""
        offset = 0
        while True:
            query: Json = {"offset": offset} | ({"task": task} if task else {})
            page = self.request("GET", f"/jobs/{job}/log", params=query)
            if page["task"] is None and not follow:
                return
            if task is None and page["task"] is not None:
                task = page["task"]
            if page["text"]:
                yield page["text"]
            moved = page["next_offset"] > offset
            offset = page["next_offset"]
            if moved and offset < page["size"]:
                continue
            if not follow or self.job(job)["state"] in OVER:
                if not moved:
                    return
                continue
            time.sleep(1.0)

    def logs(self, job: str, task: str | None = None) -> Iterator[str]:
        """Pieces of the logs of the job's tasks, oldest first, each under a line that names it.

        `task`: only the task of this id, or the tasks of this kind ("search", "export", ...).
        """
        tasks = [row for row in self.request("GET", f"/jobs/{job}/log")["tasks"] if row["size"]]
        chosen = [row for row in tasks if task in (None, row["id"], row["kind"])]
        if task is not None and not chosen:
            known = ", ".join(dict.fromkeys(row["kind"] for row in tasks)) or "none yet"
            raise Missing(f"no task {task!r} of this job has a log; there are: {known}")
        for row in chosen:
            if len(chosen) > 1:
                yield f"== {row['kind']} {row['id']} ({row['state']})\n"
            yield from self.log(job, task=row["id"])

    # --- artifacts ------------------------------------------------------------------------------

    def export(self, job: str, number: int, kind: str = "merged", rank: int | None = None) -> Json:
        """Have files made of a trial. Kinds: merged, adapter, lora."""
        body: Json = {"kind": kind} | ({"rank": rank} if rank is not None else {})
        return _object(self.request("POST", f"/jobs/{job}/trials/{number}/artifacts", json=body))

    def artifact(self, artifact: str) -> Json:
        """An artifact: state, measured scores, files."""
        return _object(self.request("GET", f"/artifacts/{artifact}"))

    def artifacts(self, job: str) -> list[Json]:
        """The job's artifacts, newest first."""
        return list(self.request("GET", f"/jobs/{job}/artifacts"))

    def wait_artifact(self, artifact: str, *, timeout: float = 24 * 3600) -> Json:
        """Wait until the artifact's files are there. ClientError when they could not be made."""
        deadline = time.monotonic() + timeout
        while True:
            found = self.artifact(artifact)
            if found["state"] == "ready":
                return found
            if found["state"] in ("failed", "cancelled"):
                error = found.get("error") or {}
                text = sentences(error.get("message"), error.get("mend"))
                raise ClientError(f"the export {found['state']}: {text or 'see the log'}")
            if time.monotonic() > deadline:
                raise ClientError(f"the export is still {found['state']}")
            time.sleep(0.5)

    def download(
        self, artifact: str, folder: Path, *, progress: Callable[[int, int], None] | None = None
    ) -> list[Path]:
        """Download all files into `folder`, resuming what is there, each checked by its sha256.

        `progress(done, total)` counts bytes. Raises ClientError.
        """
        files = self.artifact(artifact)["files"]
        total = sum(int(file["size"]) for file in files)
        paths: list[Path] = []
        done = 0
        for file in files:

            def tell(at: int, before: int = done) -> None:
                if progress is not None:
                    progress(before + at, total)

            paths.append(fetch(self._http, file, folder, tell))
            done += int(file["size"])
        return paths

    # --- prompts, workers, people ---------------------------------------------------------------

    def prompt_sets(self) -> list[Json]:
        """All prompt sets that jobs can name."""
        return list(self.request("GET", "/prompt-sets"))

    def upload_prompts(self, name: str, file: Path, note: str = "") -> Json:
        """Upload a .txt (one a line), .jsonl, .json or .csv file as the prompt set `name`."""
        try:
            data = file.read_bytes()
        except OSError as error:
            raise ClientError(f"{file} cannot be read: {error.strerror}") from error
        return _object(
            self.request(
                "POST",
                "/prompt-sets",
                data={"name": name, "note": note},
                files={"file": (file.name, data)},
            )
        )

    def send_prompts(self, name: str, prompts: list[str], note: str = "") -> Json:
        """Make a prompt set from texts."""
        body = {"name": name, "note": note, "prompts": prompts}
        return _object(self.request("POST", "/prompt-sets", json=body))

    def workers(self) -> list[Json]:
        """Workers seen within a day, the running ones first."""
        return list(self.request("GET", "/workers"))

    def me(self) -> Json:
        """One's own account."""
        return _object(self.request("GET", "/me"))

    def tokens(self) -> list[Json]:
        """One's own tokens."""
        return list(self.request("GET", "/tokens"))

    def create_token(self, name: str, scopes: list[str], days: int | None) -> Json:
        """Make a token of one's own; `token` in the answer is shown this once."""
        return _object(
            self.request("POST", "/tokens", json={"name": name, "scopes": scopes, "days": days})
        )

    def revoke_token(self, token: str) -> None:
        """Revoke one of one's own tokens."""
        self.request("DELETE", f"/tokens/{token}")


def _object(value: Any) -> Json:
    if not isinstance(value, dict):
        raise ClientError("the server's answer is not what this client knows: same versions?")
    return value
