"""The folder of an artifact: each file hashed while it is written, synced, and renamed last."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from engine.errors import EngineError
from engine.export.stream import Chunk, write_hashed
from jobs.spec.protocol import ExportedFile

CHUNK = 8 << 20
SUMS = "SHA256SUMS"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # EFBIG: the limit of the process


class Folder:
    """What has been written into `path`; nothing stays of it when the context ends in an error.

    with Folder(path) as folder:
        folder.write("README.md", [b"..."])
        folder.seal()  # SHA256SUMS of everything above
    """

    def __init__(self, path: Path, kept: Iterable[ExportedFile] = ()) -> None:
        """`kept`: files that an earlier context has written."""
        self.path = path
        self.files: dict[str, ExportedFile] = {f.name: f for f in kept}
        self._own: list[Path] = []

    def __enter__(self) -> Folder:
        """Check that the folder is there."""
        if not self.path.is_dir():
            raise EngineError("bad_request", "directory: it does not exist", "Create it first.")
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Remove what was written if the context failed; name a full disk."""
        if error is None:
            return
        for path in self._own:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in FULL:
            raise EngineError(
                "disk_full",
                "the disk is full: the artifact could not be written, nothing of it was kept",
                "Free space in the artifacts folder, then export again.",
            ) from error

    def need(self, size: int) -> None:
        """Raise disk_full before the work where `size` bytes cannot fit."""
        free = shutil.disk_usage(self.path).free
        if free < size:
            raise EngineError(
                "disk_full",
                f"the artifact needs {size / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB left",
                "Free space in the artifacts folder, then export again.",
            )

    def write(self, name: str, chunks: Iterable[Chunk]) -> ExportedFile:
        """Write one file: temporary name, hash on the way, sync, rename."""
        temporary, final = self.path / f".{name}.part", self.path / name
        fresh = not final.exists()
        self._own.append(temporary)
        size, sha256 = write_hashed(temporary, chunks)
        os.replace(temporary, final)
        if fresh:
            self._own.append(final)
        self._sync()
        self.files[name] = ExportedFile(name=name, size=size, sha256=sha256)
        return self.files[name]

    def copy(self, source: Path) -> ExportedFile:
        """Copy a file byte for byte under its own name."""
        return self.write(source.name, read_chunks(source))

    def seal(self) -> list[ExportedFile]:
        """Write SHA256SUMS (`sha256sum -c` reads it) and return all files by name."""
        lines = [f"{f.sha256}  {f.name}\n" for n, f in sorted(self.files.items()) if n != SUMS]
        self.write(SUMS, ["".join(lines).encode()])
        return [self.files[name] for name in sorted(self.files)]

    def _sync(self) -> None:
        """Make the rename itself durable."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_chunks(path: Path, begin: int = 0, end: int | None = None) -> Iterator[memoryview]:
    """The bytes [begin, end) of a file in pieces."""
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        left = (path.stat().st_size if end is None else end) - begin
        while left > 0:
            piece = file.read(min(CHUNK, left))
            if not piece:
                raise EngineError("model_not_found", f"{path.name} is cut short", "Fetch it anew.")
            left -= len(piece)
            yield memoryview(piece)
