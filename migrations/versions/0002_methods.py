"""Trials know their method and further scores; specifications name methods.

Before, a job had one `method` (search, single_pass), edit `modes` and a switch `projected`.
A pair of mode and switch is a method now; the one pair that is none (`none`, not projected) becomes
`ablate`. What was scored keeps its candidate, with its recipe as it was.

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

METHODS = {"columns": "mpoa_columns", "pre": "pre", "none": "ablate"}  # by mode
MODES = {method: mode for mode, method in METHODS.items()}
BY_CANDIDATE = """CASE
    WHEN candidate->>'mode' = 'columns' THEN 'mpoa_columns'
    WHEN candidate->>'mode' = 'pre' THEN 'pre'
    WHEN candidate->>'mode' = 'none' THEN 'ablate'
    WHEN candidate->>'projected' = 'false' THEN 'raw'
    ELSE 'mpoa' END"""
FORWARD = f"""UPDATE trials SET method = {BY_CANDIDATE},
    candidate = (candidate - 'projected') || jsonb_build_object(
        'method', 'ablation', 'affine', false, 'recipe', jsonb_build_object('projection',
            CASE WHEN candidate->>'projected' = 'false' THEN 'none' ELSE 'projected' END))
    WHERE jsonb_exists(candidate, 'mode')"""
BACK = """UPDATE trials SET candidate = (candidate - '{method,affine,recipe}'::text[])
    || jsonb_build_object('projected', candidate#>>'{recipe,projection}' IS DISTINCT FROM 'none')
    WHERE candidate->>'method' = 'ablation'"""
# A search over several modes had the mode among its parameters.
MODE_BACK = """UPDATE trials SET params = params || jsonb_build_object('mode', candidate->>'mode')
    FROM jobs WHERE jobs.id = job_id AND jsonb_array_length(jobs.spec->'modes') > 1
    AND params <> '{}' AND jsonb_exists(candidate, 'mode')"""
# One study per method. Optuna makes its tables itself, so they may not be there yet.
STUDIES = """DO $$ BEGIN IF to_regclass('optuna.studies') IS NOT NULL THEN {} END IF; END $$"""


def upgrade() -> None:
    op.add_column("trials", sa.Column("method", sa.String(), nullable=False, server_default="mpoa"))
    op.add_column(
        "trials", sa.Column("values", JSONB(), nullable=False, server_default=sa.text("'{}'"))
    )
    op.alter_column("trials", "method", server_default=None)
    op.alter_column("trials", "values", server_default=None)
    # Slots that were reserved and not begun hold nothing; their numbers are given out again, by
    # the turn of the methods.
    op.execute("DELETE FROM trials WHERE candidate = '{}' AND state <> 'complete'")
    # Optuna refuses a parameter that its space does not have
    op.execute("UPDATE trials SET params = params - 'mode'")
    op.execute(FORWARD)
    op.execute(
        "UPDATE trials SET method = 'deccp' FROM jobs "
        "WHERE jobs.id = job_id AND jobs.spec->>'method' = 'single_pass'"
    )
    for job, spec in _specs():
        _write(job, forward(spec))
    # the study of a job becomes that of its first method; other methods begin their own
    rename = """UPDATE optuna.studies SET study_name = study_name || '-' || (spec->'methods'->>0)
        FROM jobs WHERE study_name = 'job-' || jobs.id::text;"""
    op.execute(STUDIES.format(rename))
    op.execute(
        "UPDATE trials SET optuna_number = NULL FROM jobs "
        "WHERE jobs.id = job_id AND trials.method <> jobs.spec->'methods'->>0"
    )


def downgrade() -> None:
    """Back to one method a job: the first. Candidates of ARA are left, and cannot be read."""
    rename = """UPDATE optuna.studies SET study_name = 'job-' || jobs.id::text
        FROM jobs WHERE study_name = 'job-' || jobs.id::text || '-' || (spec->'methods'->>0);"""
    op.execute(STUDIES.format(rename))
    op.execute(BACK)
    for job, spec in _specs():
        _write(job, back(spec))
    op.execute(MODE_BACK)
    op.drop_column("trials", "values")
    op.drop_column("trials", "method")


def forward(spec: dict[str, Any]) -> dict[str, Any]:
    """A specification of today from one of 0001."""
    kept = dict(spec)
    how, modes = kept.pop("method", "search"), kept.pop("modes", ["full"])
    full = "mpoa" if kept.pop("projected", True) else "raw"
    methods = ["deccp"] if how == "single_pass" else [METHODS.get(mode, full) for mode in modes]
    return {**kept, "methods": list(dict.fromkeys(methods))}


def back(spec: dict[str, Any]) -> dict[str, Any]:
    """A specification of 0001, without the fields that it had no word for."""
    new = ("kind", "original", "allow_partial", "device_map", "objectives", "scorers", "tasks",
           "task_limit", "judge")  # fmt: skip
    kept = {name: value for name, value in spec.items() if name not in new}
    methods = kept.pop("methods", ["mpoa"])
    if "prompts" in kept:
        kept["prompts"] = {role: it for role, it in kept["prompts"].items() if role != "texts"}
    return {
        **kept,
        "method": "single_pass" if methods == ["deccp"] else "search",
        "modes": list(dict.fromkeys(MODES.get(method, "full") for method in methods)),
        "projected": "raw" not in methods,
    }


def _specs() -> list[tuple[Any, dict[str, Any]]]:
    rows = op.get_bind().execute(sa.text("SELECT id, spec FROM jobs"))
    return [(row.id, row.spec) for row in rows]


def _write(job: Any, spec: dict[str, Any]) -> None:
    op.get_bind().execute(
        sa.text("UPDATE jobs SET spec = CAST(:spec AS jsonb) WHERE id = :id"),
        {"id": job, "spec": json.dumps(spec)},
    )
