"""What a job would need, before it is submitted."""

from __future__ import annotations

from fastapi import APIRouter

from api.auth import Reader
from api.problems import errors
from jobs import estimate, queue
from jobs.estimate import Estimate
from jobs.spec.job import JobSpec

router = APIRouter(tags=["jobs"])


@router.post(
    "/estimate", responses=errors({422: "A field is wrong, or the model is not known or unsafe."})
)
def estimate_job(who: Reader, spec: JobSpec) -> Estimate:
    """Memory, disk, time and coverage of a job, from the model's headers; no weights are read."""
    with who.begin() as session:
        devices = [worker.device for worker in queue.live_workers(session, who.settings)]
    return estimate.estimate(spec, who.settings, devices=devices)
