"""Model names: what a job may name, where it lies, and which commit it is.

A name is a folder in the operator's models folder, one of `DEMOS`, or `owner/name` on the hub. It
is never a path: names are matched against a pattern, and links that lead out are refused.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from demo import EXPERTS, MODEL
from jobs.problems import Invalid
from jobs.settings import Settings
from jobs.spec.job import MODEL_NAME, REVISION

DEMOS = {"demo": MODEL, "demo-experts": EXPERTS}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
HUB_SECONDS = 5.0
# The hub's client is built on httpx or httpx2, depending on its version; its own error derives
# from that library's base class (and from OSError), which is what a dead connection raises.
UNREACHABLE: tuple[type[Exception], ...] = (
    *HfHubHTTPError.__bases__,
    OfflineModeIsEnabled,
)


def check(
    name: str, revision: str | None, settings: Settings, *, hub_token: str | None = None
) -> str | None:
    """Accept a model's name; the commit that `revision` means, where the hub could tell.

    None for a local model, and for a hub that is unreachable (the engine will say so later).
    Invalid(field="model" or "revision"): a path, a link that leads out, unknown, gated, or weights
    that are only there as pickles.
    """
    if "\x00" in name or ".." in name or not MODEL_NAME.fullmatch(name):
        raise _bad(
            f"{_shown(name)} is not a model's name. Give owner/name on the hub or the name of a "
            "folder in the operator's models folder; paths and addresses are not accepted."
        )
    if revision is not None and (".." in revision or not REVISION.fullmatch(revision)):
        raise Invalid("A revision is a branch, a tag or a commit.", field="revision")
    folder = local_path(name, settings)
    if folder is not None:
        _check_files(name, [file.name for file in folder.iterdir()])
        return None
    if "/" not in name:
        raise _bad(
            f"There is no model named {name} in the operator's models folder, and a model on the "
            "hub is named owner/name."
        )
    if not settings.hub_check:
        return None
    return _ask_hub(name, revision, hub_token)


def local_path(name: str, settings: Settings) -> Path | None:
    """The folder of a local model; None for a model that must come from the hub.

    Invalid for a name that a symbolic link leads out of the models folder.
    """
    if not MODEL_NAME.fullmatch(name) or ".." in name:
        raise _bad(f"{_shown(name)} is not a model's name.")
    if settings.models is not None:
        base = settings.models.resolve()
        folder = base / name
        try:
            inside = folder.resolve().is_relative_to(base)
        except (OSError, RuntimeError):  # links in a circle
            inside = False
        if not inside:
            raise _bad(f"{name} is a link that does not end inside the operator's models folder.")
        if folder.is_dir():
            return folder.resolve()
    if name in DEMOS and DEMOS[name].is_dir():
        return DEMOS[name]
    return None


def _check_files(name: str, files: list[str]) -> None:
    if "config.json" not in files:
        raise _bad(f"{name} has no config.json, so it is not a transformers model.")
    if any(file.endswith(".safetensors") for file in files):
        return
    if any(file.endswith(PICKLES) for file in files):
        raise _bad(
            f"{name} has its weights only as pickle files, which can run code when they are read. "
            "Convert it to safetensors, or choose a repository that has them."
        )
    raise _bad(f"{name} has no .safetensors file.")


def _ask_hub(name: str, revision: str | None, hub_token: str | None) -> str | None:
    # without the user's token none is sent: the service's own must not open doors for users
    api = HfApi(token=hub_token or False)
    try:
        info = api.model_info(name, revision=revision, timeout=HUB_SECONDS)
    except GatedRepoError:
        raise _bad(
            f"{name} is gated: its licence must be accepted on the hub, and a hub token given."
        ) from None
    except RevisionNotFoundError:
        raise Invalid(f"{name} has no revision {revision}.", field="revision") from None
    except RepositoryNotFoundError:
        raise _bad(
            f"The hub knows no model {name}, or it is private. Check the spelling."
        ) from None
    except HFValidationError as error:
        raise _bad(f"{name} is not a model's name: {error}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise _bad(f"The hub does not let us see {name} (HTTP {status}).") from None
        return None
    except UNREACHABLE:
        return None
    if info.siblings is not None:
        _check_files(name, [file.rfilename for file in info.siblings])
    return info.sha


def _bad(detail: str) -> Invalid:
    return Invalid(detail, field="model")


def _shown(name: str) -> str:
    return repr(name if len(name) <= 80 else name[:80] + "…")
