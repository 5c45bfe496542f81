"""`nullspace reproduce manifest.json`: make an artifact again and compare it byte for byte.

An engine of its own computes directions and weights anew from the model and the prompts; nothing of
the artifact but its manifest is used. What differs from the first time is named with how severe it
is, whether or not the bytes come out the same:

    fatal     another model or other prompts: it is another experiment, and is not begun
    numeric   device, driver, threads or a numerical library: the last bits may differ
    harmless  everything else
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from jobs.spec.manifest import Manifest, hashes
from jobs.spec.protocol import Export, Exported, Prepared, PromptTexts, Request, Result
from nullspace.client import ClientError

Severity = Literal["fatal", "numeric", "harmless"]
NUMERIC = ("torch", "transformers", "bitsandbytes", "peft", "safetensors", "cuda", "nvidia-driver")


@dataclass(frozen=True)
class Difference:
    """Something that is not as it was: what, then and now."""

    what: str
    severity: Severity
    then: str
    now: str


@dataclass(frozen=True)
class FileResult:
    """One file of the artifact: whether its hash came out the same."""

    name: str
    then: str
    now: str | None

    @property
    def same(self) -> bool:
        """Whether the bytes are the same."""
        return self.then == self.now


@dataclass(frozen=True)
class Outcome:
    """What came of it. `identical`: every file has its old hash."""

    files: list[FileResult]
    differences: list[Difference]
    scores_differ: list[str]

    @property
    def identical(self) -> bool:
        """Whether every file came out byte for byte."""
        return all(file.same for file in self.files)


def read(path: Path) -> Manifest:
    """The manifest in a file, or in an artifact's folder. ClientError with the mend."""
    file = path / "manifest.json" if path.is_dir() else path
    try:
        return Manifest.model_validate_json(file.read_bytes())
    except OSError as error:
        raise ClientError(f"{file} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "it"
        raise ClientError(
            f"{file} is no manifest of Nullspace: {field}: {first['msg']}. Name the manifest.json "
            "of an artifact."
        ) from error


def prompts_for(manifest: Manifest, files: dict[str, Path]) -> PromptTexts:
    """The prompts of every role: from `files` by role of the set, else the demo's own sets.

    They are divided as the job divided them. ClientError where the hashes are not the manifest's.
    """
    from jobs import prompts as prompt_sets  # loads sqlalchemy
    from jobs.problems import Problem

    if manifest.sets is None:
        raise ClientError("the manifest does not say how the prompt sets were divided")
    lines: dict[str, list[prompt_sets.Line]] = {}
    for role in prompt_sets.SETS:
        name = getattr(manifest.sets, role)
        if role in files:
            try:
                lines[role] = prompt_sets.parse(files[role].read_bytes(), files[role].name)
            except OSError as error:
                raise ClientError(f"{files[role]} cannot be read: {error.strerror}") from error
            except Problem as error:
                raise ClientError(f"{files[role]}: {error.detail}") from error
        elif name is not None:
            found = prompt_sets.builtin(name)
            if found is None:
                option = "--" + role.replace("_", "-")
                raise ClientError(
                    f"the job's prompt set {name} is not here: name its file with {option}"
                )
            lines[role] = found
    try:
        texts = prompt_sets.arranged(lines, manifest.sets)
    except Problem as error:
        raise ClientError(error.detail) from error
    now = hashes(texts)
    wrong = [role for role, then in manifest.prompts.items() if now[role] != then]
    if wrong:
        raise ClientError(
            f"these are not the prompts of the manifest: {', '.join(wrong)} differ. Give the files "
            "that the sets were made from."
        )
    return texts


def differences(manifest: Manifest, prepared: Prepared, threads: int) -> list[Difference]:
    """What is not as it was, most severe first."""
    machine = manifest.machine
    pairs: list[tuple[str, Severity, str, str]] = [
        ("device", "numeric", machine.device, prepared.device.split(":")[0]),
        ("device name", "numeric", machine.device_name, prepared.device_name),
        ("threads", "numeric", str(machine.threads), str(threads)),
        ("data type", "numeric", manifest.dtype, prepared.dtype),
        ("rows at once", "numeric", str(manifest.settings.batch_size), str(prepared.batch_size)),
        ("response prefix", "fatal", manifest.response_prefix, prepared.response_prefix),
        ("platform", "numeric", machine.platform, f"{platform.system()} {platform.machine()}"),
        ("nullspace", "harmless", manifest.nullspace, _version("nullspace")),
    ]
    for name in sorted(manifest.versions.keys() | prepared.versions.keys()):
        then, now = manifest.versions.get(name, "absent"), prepared.versions.get(name, "absent")
        pairs.append((name, "numeric" if name in NUMERIC else "harmless", then, now))
    order: list[Severity] = ["fatal", "numeric", "harmless"]
    found = [Difference(*pair) for pair in pairs if pair[2] != pair[3]]
    return sorted(found, key=lambda each: order.index(each.severity))


def reproduce(
    manifest: Manifest,
    texts: PromptTexts,
    model: Path | None,
    output: Path,
    say: Callable[[str], None],
) -> Outcome:
    """Make the artifact again in `output`, which must be empty. ClientError with the mend."""
    from worker.engine_process import EngineProcess
    from worker.problems import EngineError

    if model is not None:
        _same_source(manifest, model)
    output.mkdir(parents=True, exist_ok=True)
    if any(output.iterdir()):
        raise ClientError(f"{output} is not empty: choose another folder with --output")
    os.environ["OMP_NUM_THREADS"] = str(manifest.machine.threads)
    os.environ["MKL_NUM_THREADS"] = str(manifest.machine.threads)
    engine = EngineProcess([sys.executable, "-m", "engine"])
    prepare = manifest.settings.model_copy(
        update={
            "prompts": texts,
            "path": None if model is None else str(model),
            "revision": manifest.source.commit or manifest.settings.revision,
        }
    )
    export = Export(
        candidate=manifest.candidate,
        kind=manifest.kind,
        rank=manifest.rank,
        directory=str(output),
        measure=bool(manifest.measured),
    )

    def ask(request: Request) -> Result:
        for answer in engine.request(request, lambda: None):
            if answer.type == "progress" and answer.text:
                say(f"{answer.phase}: {answer.text}")
            if isinstance(answer, Result):
                return answer
        raise ClientError("the engine ended without an answer")

    try:
        prepared = Prepared.model_validate(ask(prepare).value)
        exported = Exported.model_validate(ask(export).value)
    except EngineError as error:
        raise ClientError(f"{error.message}. {error.mend}") from error
    finally:
        engine.end(5)
    made = {file.name: file.sha256 for file in exported.files}
    files = [FileResult(f.name, f.sha256, made.get(f.name)) for f in manifest.files]
    return Outcome(
        files,
        differences(manifest, prepared, manifest.machine.threads),
        list(_scores(manifest, exported)),
    )


def _scores(manifest: Manifest, exported: Exported) -> Iterator[str]:
    """Lines that name the scores of the artifact which came out otherwise."""
    for role, then in manifest.measured.items():
        now = exported.measured.get(role)
        if now is None:
            yield f"{role}: not measured this time"
            continue
        if then.refusals != now.refusals:
            yield f"{role}: {then.refusals} refusals then, {now.refusals} now"
        for name in ("kl_first", "kl_multi"):
            a, b = getattr(then, name), getattr(now, name)
            if a is not None and b is not None and a != b:
                yield f"{role}: {name} {a:.6g} then, {b:.6g} now"


def _same_source(manifest: Manifest, model: Path) -> None:
    """ClientError where the folder's weight files are not those of the manifest."""
    for file in manifest.source.files:
        path = model / file.name
        if not path.is_file():
            raise ClientError(f"{model} lacks {file.name}: it is not the model of the manifest")
        if _sha256(path) != file.sha256:
            raise ClientError(
                f"{path} has other bytes than the manifest's model: it is another experiment. "
                "Name the folder of the same revision."
            )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def as_json(outcome: Outcome) -> str:
    """The outcome for programs."""
    return json.dumps(
        {
            "identical": outcome.identical,
            "files": [{"name": f.name, "same": f.same} for f in outcome.files],
            "differences": [vars(each) for each in outcome.differences],
            "scores": outcome.scores_differ,
        },
        indent=2,
    )
