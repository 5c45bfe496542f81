"""`python -m engine --read FD --write FD`: one engine process, driven over two pipes.

Standard output and error belong to the libraries that print there; the protocol has its own pipes.
The exit status is 0 after `stop` and after end of file, 1 when a computation had to be cut off.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from functools import partial
from typing import TYPE_CHECKING

from engine.channel import Channel, ChannelReport
from engine.errors import EngineError
from engine.heap import return_blocks
from engine.libraries import settle
from jobs.spec.protocol import Envelope, Error, Log, Result, Stop

if TYPE_CHECKING:
    from engine.session import Session


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m engine", description=__doc__)
    parser.add_argument("--read", type=_descriptor, required=True, help="requests come from here")
    parser.add_argument("--write", type=_descriptor, required=True, help="answers go here")
    given = parser.parse_args()
    settle()
    return_blocks()  # before the first thread has a heap of its own

    channel = Channel(given.read, given.write)
    try:
        channel.send(Log(text=f"engine ready, process {os.getpid()}"))
        channel.start()
        return serve(channel)
    except EngineError:
        return 0  # the supervisor is gone


def serve(channel: Channel) -> int:
    """Answer requests one at a time until `stop` or end of file."""
    from engine.session import Session  # torch is loaded here: wrong arguments fail at once

    session = Session()
    for envelope in channel.requests():
        if isinstance(envelope.request, Stop):
            channel.send(Result(id=envelope.id))
            return 0
        channel.send(answer(session, channel, envelope))
    return 0


def answer(session: Session, channel: Channel, envelope: Envelope) -> Result | Error:
    """Carry out one request; whatever goes wrong becomes a typed error."""
    from engine.memory import is_out_of_memory, release

    report = ChannelReport(channel, envelope.id)
    try:
        added = partial(channel.added, envelope.id)
        value = session.handle(envelope.request, report, added)
        return Result(id=envelope.id, value=value.model_dump(mode="json"))
    except EngineError as error:
        return Error(
            id=envelope.id, reason=error.reason, message=error.message, mend=error.mend,
            detail=error.detail,
        )  # fmt: skip
    except Exception as error:
        detail = traceback.format_exc()
        if is_out_of_memory(error):
            release()
            return Error(
                id=envelope.id, reason="out_of_memory", message=f"out of memory: {error}",
                mend="Choose bnb_4bit, a smaller model or a device with more memory.",
                detail=detail,
            )  # fmt: skip
        return Error(
            id=envelope.id, reason="engine_failed", message=f"{type(error).__name__}: {error}",
            mend="This is a fault of the engine; please report it with the detail.", detail=detail,
        )  # fmt: skip


def _descriptor(text: str) -> int:
    try:
        number = int(text)
        os.fstat(number)
    except (ValueError, OSError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not an open file descriptor") from None
    return number


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the reading thread may be blocked in read(2); nothing is left to tidy up
