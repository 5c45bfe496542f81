"""The engine's end of the protocol: JSON lines in from one descriptor, out to another.

A thread reads, so that end of file, `stop` and what is added to a request (`more`) are seen while
it is being computed. The first two make every further `Report` call raise
`EngineError("stopped")`; a computation that never reports is ended by `os._exit` after a grace
period: a dead supervisor must not leave a GPU occupied.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from collections.abc import Iterator

from pydantic import ValidationError

from engine.errors import EngineError
from jobs.spec.protocol import Envelope, Error, Log, More, Partial, Progress, Result, Scored, Stop

EOF_GRACE = 3.0  # seconds from end of file to the hard exit
STOP_GRACE = 30.0  # seconds from a `stop` request to the hard exit
PROGRESS_INTERVAL = 0.5  # seconds between two progress messages of one phase
LEVELS = ("debug", "info", "warning", "error")


class Channel:
    """Two pipe descriptors; the channel owns them.

    channel = Channel(read, write)
    channel.start()
    for envelope in channel.requests(): ...     # ends at end of file
    """

    def __init__(
        self, read: int, write: int, eof_grace: float = EOF_GRACE, stop_grace: float = STOP_GRACE
    ) -> None:
        self._read, self._write = read, write
        self._eof_grace, self._stop_grace = eof_grace, stop_grace
        for descriptor in (read, write):  # a child of the engine must not keep the pipes open
            os.set_inheritable(descriptor, False)
        self._queue: queue.Queue[Envelope | None] = queue.Queue()
        self._added: queue.SimpleQueue[More] = queue.SimpleQueue()
        self._sending = threading.Lock()
        self.stopping = threading.Event()

    def start(self) -> None:
        """Read from now on."""
        threading.Thread(target=self._read_lines, name="channel", daemon=True).start()

    def requests(self) -> Iterator[Envelope]:
        """The requests in order of arrival, until end of file."""
        while (envelope := self._queue.get()) is not None:
            yield envelope

    def added(self, id: int) -> list[More]:
        """What was added to the request `id` since the last call; what came too late for the
        request that it names is dropped."""
        found = [self._added.get() for _ in range(self._added.qsize())]
        return [more for more in found if more.of == id]

    def send(self, answer: Progress | Log | Partial | Result | Error) -> None:
        """One message. A closed pipe counts as a stop and raises `EngineError("stopped")`."""
        line = answer.model_dump_json().encode() + b"\n"
        view = memoryview(line)
        try:
            with self._sending:
                while view:
                    view = view[os.write(self._write, view) :]
        except OSError as error:
            self._stop_within(self._eof_grace)
            raise EngineError("stopped", "the supervisor has closed its pipe") from error

    def _read_lines(self) -> None:
        pending = bytearray()
        while chunk := self._read_some():
            pending += chunk
            if b"\n" not in chunk:
                continue
            *lines, rest = bytes(pending).split(b"\n")
            pending = bytearray(rest)
            for line in filter(None, map(bytes.strip, lines)):
                self._accept(line)
        self._stop_within(self._eof_grace)
        self._queue.put(None)

    def _read_some(self) -> bytes:
        try:
            return os.read(self._read, 1 << 20)
        except OSError:
            return b""

    def _accept(self, line: bytes) -> None:
        try:
            envelope = Envelope.model_validate_json(line)
        except ValidationError as error:
            self._refuse(line, error)
            return
        if isinstance(envelope.request, Stop):
            self._stop_within(self._stop_grace)
        if isinstance(envelope.request, More):
            self._added.put(envelope.request)
        else:
            self._queue.put(envelope)

    def _refuse(self, line: bytes, error: ValidationError) -> None:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"])) or "request"
        answer = Error(
            id=_id_of(line), reason="bad_request", message=f"{field}: {first['msg']}",
            mend="Send a request of jobs/spec/protocol.py, one JSON object a line.",
        )  # fmt: skip
        try:
            self.send(answer)
        except EngineError:
            return  # nobody listens; end of file follows

    def _stop_within(self, seconds: float) -> None:
        """Ask the computation to stop, and end the process if it has not stopped in time."""
        self.stopping.set()
        guard = threading.Timer(seconds, os._exit, args=(1,))
        guard.daemon = True
        guard.start()


class ChannelReport:
    """`Report` for the request `id`: sends at most two progress messages a second."""

    def __init__(self, channel: Channel, id: int) -> None:
        self._channel, self._id = channel, id
        self._phase, self._sent = "", 0.0

    def progress(self, phase: str, done: float = 0, total: float = 0, text: str = "") -> None:
        """`done` of `total` units of `phase`. A new phase and its end are always sent."""
        self._check()
        now = time.monotonic()
        ended = bool(total) and done >= total
        if phase == self._phase and not ended and now - self._sent < PROGRESS_INTERVAL:
            return
        self._phase, self._sent = phase, now
        self._channel.send(Progress(id=self._id, phase=phase, done=done, total=total, text=text))

    def log(self, text: str, level: str = "info") -> None:
        """A line for the task's log."""
        self._check()
        known = level if level in LEVELS else "info"
        self._channel.send(Log.model_validate({"id": self._id, "level": known, "text": text}))

    def partial(self, index: int, text: str = "", scored: Scored | None = None) -> None:
        """A piece of an answer, or one candidate's finished score."""
        self._check()
        self._channel.send(Partial(id=self._id, index=index, text=text, scored=scored))

    def _check(self) -> None:
        if self._channel.stopping.is_set():
            raise EngineError("stopped", "the request was stopped")


def _id_of(line: bytes) -> int:
    """The id of a request that is otherwise unreadable; 0 if that cannot be read either."""
    try:
        found = json.loads(line)
    except ValueError:
        return 0
    given = found.get("id") if isinstance(found, dict) else None
    return given if isinstance(given, int) else 0
