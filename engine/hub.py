"""Fetching a model from the hub: safetensors, configuration and tokenizer, nothing that runs.

HF_ENDPOINT, HF_TOKEN and HF_HOME are huggingface_hub's own settings.

Answer of the hub                           reason
401, 403, gated                             gated_model
404: repository or revision                 model_not_found
5xx, no connection, time-out, offline       hub_unreachable, unless the whole model is cached
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.checkpoint import INDEX, SINGLE, open_checkpoint, shards, weight_files
from engine.errors import EngineError
from engine.report import Report

PLAIN = (".json", ".jinja", ".model", ".txt", ".tiktoken")
LICENCES = ("license", "licence", "notice", "use_policy")
SKIPPED = ("adapter_config.json", INDEX)


def is_plain(name: str) -> bool:
    """Whether a top-level file belongs beside the weights: configuration, tokenizer, licence."""
    if "/" in name or name in SKIPPED or name.endswith(".index.json"):
        return False
    return name.endswith(PLAIN) or name.lower().startswith(LICENCES)


def fetch(
    model: str, revision: str | None, report: Report, warn: Callable[[str], None]
) -> tuple[Path, str]:
    """(folder, commit) of `model`@`revision`, downloaded where it is not cached yet.

    Raises model_not_found, gated_model, hub_unreachable, unsafe_weights, disk_full.
    """
    try:
        with _explained(model, revision):
            return _fetch(model, revision, report)
    except EngineError as error:
        if error.reason != "hub_unreachable":
            raise
        cached = _cached(model, revision)
        if cached is None:
            raise
        warn(f"{error.message}; using the copy in the cache, commit {cached.name}")
        return cached, cached.name


def _fetch(model: str, revision: str | None, report: Report) -> tuple[Path, str]:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    report.progress("download", 0, 0, f"asking the hub for {model}")
    # Given by hand: parts of huggingface_hub read the variable once, when they are imported.
    endpoint = os.environ.get("HF_ENDPOINT") or None
    info = HfApi(endpoint=endpoint).model_info(
        model, revision=revision, files_metadata=True, timeout=30
    )
    sizes = {s.rfilename: s.size or 0 for s in info.siblings or []}
    entry = weight_files({name for name in sizes if "/" not in name}, model)
    wanted = [name for name in sizes if is_plain(name)]
    if entry == INDEX:
        index = hf_hub_download(model, INDEX, revision=info.sha, endpoint=endpoint)
        wanted += [INDEX, *shards(Path(index), model)]
    else:
        wanted.append(SINGLE)

    total = sum(sizes.get(name, 0) for name in wanted if name != INDEX)  # the index is here

    def get() -> str:
        return snapshot_download(model, revision=revision, allow_patterns=wanted, endpoint=endpoint)

    folder = Path(_watched(get, model, total, report))
    return folder, folder.name


def _watched(get: Callable[[], str], model: str, total: int, report: Report) -> str:
    """Run `get` in a thread and report the bytes that have arrived, twice a second.

    A stop (an exception of `report`) leaves at once; what has arrived stays for the next time.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    blobs = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=model, repo_type="model"))
    before = _bytes_in(blobs / "blobs")
    result: list[str] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(get())
        except BaseException as error:  # handed to the caller below
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True, name="download")
    thread.start()
    while thread.is_alive():
        thread.join(0.5)
        done = min(total, max(0, _bytes_in(blobs / "blobs") - before))
        report.progress("download", done, total, f"downloading {model}")
    if failure:
        raise failure[0]
    return result[0]


def _bytes_in(folder: Path) -> int:
    """Bytes of the files of a folder; they may come and go meanwhile."""
    total = 0
    if folder.is_dir():
        for path in folder.iterdir():
            try:
                total += path.stat().st_size
            except FileNotFoundError:
                continue
    return total


def _cached(model: str, revision: str | None) -> Path | None:
    """The snapshot of a model that was fetched whole earlier, or None."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=model, repo_type="model"))
    reference = folder / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else (revision or "")
    snapshot = folder / "snapshots" / commit
    if not commit or not snapshot.is_dir():
        return None
    try:
        open_checkpoint(snapshot, model)
    except EngineError:
        return None
    return snapshot


@contextmanager
def _explained(model: str, revision: str | None) -> Iterator[None]:
    """Turn the hub's and the network's failures into typed reasons."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RevisionNotFoundError,
    )

    at = f"{model}@{revision}" if revision else model
    unreachable = "Check the worker's network and HF_ENDPOINT, then resume the job."
    try:
        yield
    except EngineError:
        raise
    except HFValidationError as error:
        raise EngineError(
            "model_not_found", f"{model} is no name of a model", str(error)
        ) from error
    except RevisionNotFoundError as error:
        raise EngineError(
            "model_not_found", f"{at}: the model has no such revision", "Check the revision."
        ) from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise EngineError(
            "hub_unreachable", f"{at}: the hub could not be reached", unreachable, str(error)
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if isinstance(error, GatedRepoError) or status in (401, 403):
            raise EngineError(
                "gated_model",
                f"{at}: the hub does not give this model to this account; it is gated or private, "
                "or there is no model of that name",
                "Check the spelling, accept the model's terms on its page, and set a hub token "
                "that may read it.",
                str(error),
            ) from error
        if status == 404:
            raise EngineError(
                "model_not_found",
                f"{at}: the hub has no such model",
                "Check the spelling: owner/name, upper and lower case count.",
                str(error),
            ) from error
        raise EngineError(
            "hub_unreachable", f"{at}: the hub answered {status}", unreachable, str(error)
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EngineError(
                "disk_full",
                f"{at}: the disk of the model cache is full",
                "Free space in HF_HOME or point it to a larger disk.",
            ) from error
        raise EngineError(
            "hub_unreachable", f"{at}: the download failed: {error}", unreachable, str(error)
        ) from error
    except Exception as error:
        # The client library of the hub differs between its versions (httpx, httpx2, requests).
        if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "requests"):
            raise EngineError(
                "hub_unreachable", f"{at}: the hub could not be reached", unreachable, str(error)
            ) from error
        raise
