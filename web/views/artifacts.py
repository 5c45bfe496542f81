"""Artifacts as pages show them, with the commands that fetch and load them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jobs.spec.scores import Role
from jobs.tables import Artifact, ArtifactFile
from web.views import scores
from web.views.scores import Score

KINDS = {
    "merged": "merged model",
    "adapter": "PEFT adapter",
    "lora": "LoRA adapter",
}
EXPLAINED = {
    "merged": "the whole model, loads anywhere that loads the original",
    "adapter": "small files beside the original: exact DoRA for mode full, else LoRA",
    "lora": "plain LoRA of a chosen rank, with its measured error",
}


@dataclass(frozen=True)
class ArtifactView:
    """An artifact. `error` is {"reason", "message", "mend"} where it failed."""

    id: str
    href: str
    job_href: str
    trial_href: str
    label: str
    kind: str
    number: int
    rank: int | None
    state: str
    size: int | None
    error: dict[str, Any] | None
    truncation_error: float | None
    measured: dict[Role, Score]
    created_at: Any
    finished_at: Any


def view(row: Artifact) -> ArtifactView:
    """A row of the table `artifacts`."""
    measured = {role: scores.score((row.measured or {}).get(role)) for role in scores.ROLES}
    label = KINDS.get(row.kind, row.kind)
    if row.rank is not None and row.kind == "lora":
        label += f", rank {row.rank}"
    return ArtifactView(
        id=str(row.id),
        href=f"/artifacts/{row.id}",
        job_href=f"/jobs/{row.job_id}",
        trial_href=f"/jobs/{row.job_id}/trials/{row.trial_number}",
        label=label,
        kind=row.kind,
        number=row.trial_number,
        rank=row.rank,
        state=row.state,
        size=row.size,
        error=row.error,
        truncation_error=row.truncation_error,
        measured={role: found for role, found in measured.items() if found is not None},
        created_at=row.created_at,
        finished_at=row.finished_at,
    )


def download(base: str, artifact_id: str, files: Sequence[ArtifactFile]) -> str:
    """A shell loop that fetches every file, goes on where it broke off, and checks the digests."""
    # a whole file is not asked for again: the answer to that is 416, for ever
    sums = "\n".join(f"{file.sha256}  {file.name}" for file in files)
    return f"""mkdir -p nullspace-{artifact_id[:8]} && cd nullspace-{artifact_id[:8]}
while read -r sum file; do
  until printf '%s  %s\\n' "$sum" "$file" | sha256sum --check 2>/dev/null; do
    curl --fail --location --continue-at - --create-dirs --output "$file" \\
      --header "Authorization: Bearer $NULLSPACE_TOKEN" \\
      "{base}/api/v1/artifacts/{artifact_id}/files/$file" || sleep 5
  done
done <<'SUMS'
{sums}
SUMS"""


def usage(kind: str, folder: str, model: str) -> str:
    """Python that loads the artifact without Nullspace. `model` is the original's name."""
    if kind == "merged":
        return f"""from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype="auto", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained({folder!r})"""
    return f"""from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

original = AutoModelForCausalLM.from_pretrained({model!r}, dtype="auto", device_map="auto")
model = PeftModel.from_pretrained(original, {folder!r})
tokenizer = AutoTokenizer.from_pretrained({model!r})"""
