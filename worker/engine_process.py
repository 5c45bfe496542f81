"""One engine process: started apart, spoken to over two pipes, never left behind.

Rules that keep it so:
- own session, so its whole process group can be killed;
- its group is killed *before* the process is waited for, so its id cannot have been reused;
- PDEATHSIG (worker/launch.py) and end of file on its pipe end it when this process dies;
- an allow-list of environment variables: no database address and no secret reaches it.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from jobs.spec.candidate import Candidate
from jobs.spec.protocol import (
    Envelope,
    Error,
    Log,
    More,
    Partial,
    Progress,
    Request,
    Result,
    Stop,
    answers,
)
from worker.problems import EngineDied, EngineError, Interrupted
from worker.task_log import TaskLog

ENVIRONMENT = (
    "PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV",
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "LD_LIBRARY_PATH", "OMP_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF", "HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE",
    "HF_TOKEN", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
)  # fmt: skip
SECRET = ("HF_TOKEN",)  # never written to a log
TICK = 0.2  # seconds between two looks at what is wanted of the task
LAST_LINES = 20
LAUNCH = Path(__file__).with_name("launch.py")

Answer = Progress | Log | Partial | Result


def environment(gpu: str = "") -> dict[str, str]:
    """The engine's environment: the allow-list, and the one GPU of this worker."""
    kept = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    if gpu:
        kept["CUDA_VISIBLE_DEVICES"] = gpu
    kept["PYTHONUNBUFFERED"] = "1"
    return kept


class EngineProcess:
    """A running engine.

    engine = EngineProcess([sys.executable, "-m", "engine"], log)
    for answer in engine.request(Score(...), check):   # Progress, Log, Partial ... Result
        ...
    engine.stop(30)                                    # in good order, else SIGKILL

    Start it from a thread that outlives it: PDEATHSIG belongs to the starting thread.
    """

    def __init__(
        self, command: Sequence[str], log: TaskLog | None = None, *, gpu: str = ""
    ) -> None:
        requests_read, self._requests = os.pipe()
        self._answers, answers_write = os.pipe()
        os.set_blocking(self._requests, False)
        os.set_blocking(self._answers, False)
        self.log = log
        env = environment(gpu)
        self._secrets = [env[name].strip().encode() for name in SECRET if env.get(name, "").strip()]
        pipe_arguments = ["--read", str(requests_read), "--write", str(answers_write)]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(LAUNCH), str(os.getpid()), *command, *pipe_arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(requests_read, answers_write),
                env=env,
                start_new_session=True,
            )
        finally:
            os.close(requests_read)
            os.close(answers_write)
        self._pending = b""
        self._outgoing = memoryview(b"")
        self._next = self._asked = 0
        self._ended = threading.Lock()
        self._struck = False
        self.alive = True
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self._pump = threading.Thread(target=self._pump_output, name="engine-output", daemon=True)
        self._pump.start()

    @property
    def usable(self) -> bool:
        """Whether it may be asked again: not ended, and not struck."""
        return self.alive and not self._struck

    @property
    def pid(self) -> int:
        """The engine's process id, which is also its process group."""
        return self._process.pid

    def request(self, request: Request, check: Callable[[], None]) -> Iterator[Answer]:
        """Send a request and yield its answers; the last is the `Result`.

        Raises EngineError for the engine's typed refusal and EngineDied when it ends. `check` is
        called a few times a second; what it raises ends the iteration, and the engine, which is in
        the middle of something then, must be stopped.
        """
        number = self._asked = self._send(request)
        for answer in self._listen(check, deadline=None):
            if isinstance(answer, Log):
                self._note(answer)
            if answer.id != number:
                continue  # a late word of an earlier request
            if isinstance(answer, Error):
                if answer.reason == "engine_died":  # a process of its own
                    raise EngineDied(answer.message, list(self.last_lines))
                raise EngineError.of(answer)
            yield answer
            if isinstance(answer, Result):
                return
        raise self._death()

    def add(self, candidates: Sequence[Candidate], finished: list[dict[str, float]]) -> None:
        """Candidates for the `score` that runs; see `protocol.More`."""
        self._send(More(of=self._asked, candidates=list(candidates), finished=finished))

    def stop(self, seconds: float) -> Iterator[Partial]:
        """End the engine: `Stop`, then SIGKILL to its group after `seconds`.

        Yields what it still finished of the running request. It is dead when the iteration ends
        (use `end` when nothing of it is wanted).
        """
        try:
            if not self.alive:
                return
            self._send(Stop())
            for answer in self._listen(lambda: None, deadline=time.monotonic() + seconds):
                if isinstance(answer, Log):
                    self._note(answer)
                elif isinstance(answer, Partial):
                    yield answer
        except EngineError:
            return
        finally:
            self.kill()

    def end(self, seconds: float) -> None:
        """`stop`, dropping whatever it still says."""
        for _ in self.stop(seconds):
            pass

    def strike(self) -> None:
        """SIGKILL to the process group from another thread; `request` then raises "lost"."""
        with self._ended:
            if self.alive:
                self._struck = True
                self._kill_group()

    def kill(self) -> None:
        """SIGKILL to the process group, wait for it, close the pipes. Any number of times."""
        with self._ended:
            if not self.alive:
                return
            self.alive = False
            self._kill_group()
            self._process.wait()
        self._pump.join(timeout=2)
        os.close(self._requests)
        os.close(self._answers)

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _send(self, request: Request) -> int:
        self._next += 1
        line = Envelope(id=self._next, request=request).model_dump_json().encode() + b"\n"
        # a stop may come while the request before it is still being written
        self._outgoing = memoryview(bytes(self._outgoing) + line)
        return self._next

    def _listen(
        self, check: Callable[[], None], deadline: float | None
    ) -> Iterator[Progress | Log | Partial | Result | Error]:
        """Answers until end of file or `deadline`; what is to be sent is written meanwhile."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            writing = False
            while deadline is None or time.monotonic() < deadline:
                if self._outgoing and not writing:
                    selector.register(self._requests, selectors.EVENT_WRITE)
                    writing = True
                for key, _ in selector.select(TICK):
                    if key.fd == self._requests:
                        self._write_some()
                        if not self._outgoing:
                            selector.unregister(self._requests)
                            writing = False
                    else:
                        chunk = _read_some(self._answers)
                        if chunk == b"":
                            return
                        yield from self._parse(chunk or b"")
                check()

    def _write_some(self) -> None:
        """Write a piece of what is to be sent."""
        try:
            self._outgoing = self._outgoing[os.write(self._requests, self._outgoing) :]
        except BlockingIOError:
            return
        except OSError:
            self._outgoing = memoryview(b"")  # it is dying; end of file follows on the other pipe

    def _parse(self, chunk: bytes) -> Iterator[Progress | Log | Partial | Result | Error]:
        *lines, self._pending = (self._pending + chunk).split(b"\n")
        for line in lines:
            try:
                yield answers.validate_json(self._redacted(line))
            except ValidationError as fault:
                raise EngineError(
                    "engine_failed",
                    "the engine sent a line that is not of the protocol",
                    "Engine and worker must be of the same version.",
                    str(fault),
                ) from fault

    def _redacted(self, line: bytes) -> bytes:
        """`line` without the secrets: a library's error may quote the header that it sent."""
        for secret in self._secrets:
            line = line.replace(secret, b"***")
        return line

    def _note(self, answer: Log) -> None:
        if self.log is not None:
            self.log.line(answer.level, answer.text)

    def _death(self) -> EngineError | Interrupted:
        self.kill()
        if self._struck:
            return Interrupted("lost")
        code = self._process.returncode
        how = f"status {code}" if code >= 0 else _signal_name(-code)
        return EngineDied(how, list(self.last_lines))

    def _pump_output(self) -> None:
        """Copy what libraries print to the log of the task that runs now."""
        output = self._process.stdout
        assert output is not None
        with output:
            for line in iter(lambda: output.readline(65536), b""):
                line = self._redacted(line)
                self.last_lines.append(line.decode(errors="replace").rstrip())
                if self.log is not None:
                    self.log.raw(line)


def _read_some(descriptor: int) -> bytes | None:
    """What can be read now: b"" at the end of file, None when nothing is there."""
    try:
        return os.read(descriptor, 1 << 16)
    except BlockingIOError:
        return None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
