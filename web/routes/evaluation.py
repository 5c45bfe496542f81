"""What the page of a job without a search shows besides what every job's page does."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from jobs import benchmarks, trials
from jobs.listing import JobView
from jobs.spec.job import JobSpec
from jobs.tables import Job
from web.views import results, scores
from web.views import trials as trial_views

ANSWERS = 8  # of a page


def context(
    session: Session, row: Job, job: JobView, role: str, only: str, at: int
) -> dict[str, Any]:
    """Scores, harness figures and answers of the model, beside those of an original."""
    spec = JobSpec.model_validate(row.spec)
    result = job.result
    said = trials.responses(session, row.id, trials.MODEL)
    original = trials.responses(session, row.id, trials.ORIGINAL)
    roles = [each for each in scores.ROLES if each in said]
    chosen = next((each for each in roles if each == role), next(iter(roles), None))
    figures = result.benchmark if result is not None else {}
    only = "refused" if only == "refused" else ""
    return {
        "alone": spec.original is None,
        "steps": results.steps(spec, result, benchmarks.measured(session, row.id)),
        "groups": results.groups(result),
        "figures": results.harness(figures.get("original", {}), figures.get("model", {})),
        "notes": result.warnings if result is not None else [],
        "roles": [(each, scores.ROLES[each], len(said[each])) for each in roles],
        "only": only,
        "answers": trial_views.answers(
            chosen,
            trial_views.prompts_of(row.prompts, chosen),
            original.get(chosen, []),
            said[chosen],
            only_refused=bool(only),
            page=at,
            length=ANSWERS,
        )
        if chosen
        else None,
    }
