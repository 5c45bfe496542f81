"""One file of an artifact: resumed where it was cut, and checked before it gets its name."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import httpx

ATTEMPTS = 6
CHUNK = 1 << 20


class DownloadFailed(Exception):
    """The file could not be had; the text says why. What was received stays for the next try."""


def fetch(
    http: httpx.Client,
    file: dict[str, Any],
    folder: Path,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Download `file` ({name, size, sha256, url}) into `folder`; its path.

    What is there already is kept when its sha256 fits. A partial download lies beside it as
    `<name>.part` and is continued with Range and If-Range. Raises DownloadFailed.
    """
    name = PurePosixPath(str(file["name"]))
    if name.is_absolute() or not name.parts or ".." in name.parts or "\\" in str(name):
        raise DownloadFailed(f"the server named a file {str(name)!r}, which is not safe to write")
    target = folder.joinpath(*name.parts)
    part = target.with_name(target.name + ".part")
    size, sha256 = int(file["size"]), str(file["sha256"])
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_file() and target.stat().st_size == size and _digest(target) == sha256:
            return target
        for attempt in range(ATTEMPTS):
            try:
                _continue(http, str(file["url"]), part, size, sha256, progress)
            except httpx.TransportError as error:
                if attempt + 1 == ATTEMPTS:
                    raise DownloadFailed(
                        f"{name}: the connection broke ({error}); run it again"
                    ) from error
                time.sleep(0.2 * 2**attempt)
                continue
            if _digest(part) == sha256:
                part.replace(target)
                return target
            part.unlink()  # a damaged piece: once more from the beginning
    except OSError as error:
        raise DownloadFailed(f"{target} cannot be written: {error.strerror or error}") from error
    raise DownloadFailed(f"{name}: the sha256 does not fit what the server promised; ask again")


def _continue(
    http: httpx.Client,
    url: str,
    part: Path,
    size: int,
    sha256: str,
    progress: Callable[[int], None] | None,
) -> None:
    have = part.stat().st_size if part.exists() else 0
    if have >= size > 0 or (size == 0 and part.exists()):
        return
    headers = {"Accept": "*/*", "Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": f'"{sha256}"'}
    with http.stream("GET", url, headers=headers) as response:
        if response.is_error:
            response.read()
            raise DownloadFailed(f"{part.stem}: the server answered {response.status_code}")
        resumed = response.status_code == 206
        done = have if resumed else 0
        with part.open("ab" if resumed else "wb") as out:
            # as they come: a chunk that is gathered is lost when the connection breaks
            for chunk in response.iter_raw():
                out.write(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
