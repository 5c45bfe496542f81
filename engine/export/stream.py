"""Writing a large file: past the page cache, and hashed on the way.

A file of gigabytes would push everything else out of the page cache and be copied by the kernel
once more; O_DIRECT spares both, where the file system knows it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

BLOCK = 8 << 20  # a multiple of every device's sector
DIRECT: int = getattr(os, "O_DIRECT", 0)
Chunk = bytes | memoryview


def write_hashed(path: Path, chunks: Iterable[Chunk]) -> tuple[int, str]:
    """Write `chunks` into a new file and sync it; its size and sha256.

    A block is written and hashed while the next one is made. OSError as of `write`; the file may
    be there in part then.
    """
    blocks = [memoryview(mmap.mmap(-1, BLOCK)) for _ in range(2)]  # page-aligned, as O_DIRECT asks
    digest, size, filled = hashlib.sha256(), 0, 0
    running: list[Future[None]] = []
    descriptor = _open(path)
    try:
        with ThreadPoolExecutor(2) as pool:
            for chunk in chunks:
                left = memoryview(chunk)
                while left:
                    count = min(len(left), BLOCK - filled)
                    blocks[0][filled : filled + count] = left[:count]
                    left, filled = left[count:], filled + count
                    if filled == BLOCK:
                        _wait(running)
                        running = [
                            pool.submit(_put, descriptor, blocks[0]),
                            pool.submit(digest.update, blocks[0]),
                        ]
                        size, filled = size + BLOCK, 0
                        blocks.reverse()
            _wait(running)
        _buffered(descriptor)  # the end is no whole number of sectors
        _put(descriptor, blocks[0][:filled])
        digest.update(blocks[0][:filled])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return size + filled, digest.hexdigest()


def _open(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        return os.open(path, flags | DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:  # the file system knows no O_DIRECT
            raise
    return os.open(path, flags, 0o666)


def _put(descriptor: int, data: memoryview) -> None:
    """Write all of `data` at the file's position."""
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except OSError as error:
            if error.errno != errno.EINVAL or not _buffered(descriptor):
                raise


def _buffered(descriptor: int) -> bool:
    """Go on through the page cache; False where the file is written so already."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~DIRECT)
    return bool(flags & DIRECT)


def _wait(running: list[Future[None]]) -> None:
    for step in running:
        step.result()
