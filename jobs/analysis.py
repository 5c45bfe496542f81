"""How prompts lie in the residual stream of a job's model, and how strongly a trial edits it."""

from __future__ import annotations

import math
import uuid
from typing import Any

from pydantic import BaseModel, Field
from sqlalchemy import select
from sqlalchemy.orm import Session

from jobs.drawing import kernel, lines, points
from jobs.drawing.figure import Figure
from jobs.problems import NotFound
from jobs.spec.candidate import Ablation, parse
from jobs.spec.protocol import Geometry
from jobs.tables import Job, Trial


class LayerWeight(BaseModel):
    """Edit strength λ of one layer, by component."""

    layer: int = Field(description="from 0")
    attention: float
    mlp: float


def stored(found: Geometry | None) -> dict[str, Any] | None:
    """What is kept of a geometry: all of it, or nothing where a figure is not a number."""
    if found is None:
        return None
    figures = [value for layer in found.layers for value in layer.model_dump().values()]
    places = [v for layer in found.points for side in layer for point in side for v in point]
    finite = all(math.isfinite(value) for value in (*figures, *places))
    return found.model_dump(mode="json") if finite else None


def has_geometry(session: Session, job_id: uuid.UUID) -> bool:
    """Whether the job's geometry is known."""
    query = select(Job.geometry.is_not(None)).where(Job.id == job_id)
    return bool(session.scalar(query))


def geometry(session: Session, job: Job) -> Geometry:
    """The job's geometry. NotFound, with the reason, while there is none."""
    found = session.scalar(select(Job.geometry).where(Job.id == job.id))
    if found is not None:
        return Geometry.model_validate(found)
    if job.spec.get("kind", "abliterate") != "abliterate":
        raise NotFound(f"A job of kind {job.spec['kind']} measures no directions, so no geometry.")
    if job.prepared is not None:
        raise NotFound(
            "The job's geometry was not kept: it was prepared by an earlier version, or the "
            "model's states hold infinities. Submit it again to have it measured."
        )
    raise NotFound("The geometry is not known yet: a worker measures it when it loads the model.")


def over_layers(found: Geometry) -> Figure:
    """Cosines, norms and separation over the layers."""
    return lines.over_layers(found.layers)


def projection(found: Geometry, layer: int) -> Figure:
    """One layer's points. NotFound for a layer that the model does not have."""
    if not 0 <= layer < len(found.points):
        raise NotFound(f"There is no layer {layer}; the last one is {len(found.points) - 1}.")
    return points.projection(layer, *found.points[layer])


def strength(job: Job, trial: Trial) -> tuple[Ablation, int]:
    """A trial's edit and the number of layers. NotFound where it has no λ, or none yet."""
    candidate = parse(trial.candidate) if trial.candidate else None
    layers = int(((job.prepared or {}).get("anatomy") or {}).get("layers") or 0)
    if candidate is None or not layers:
        raise NotFound("The trial's parameters are not chosen yet.")
    if not isinstance(candidate, Ablation):
        raise NotFound(f"Edits of the method {trial.method} have no strength λ over the layers.")
    return candidate, layers


def weights(job: Job, trial: Trial) -> list[LayerWeight]:
    """λ of every layer; empty where the trial has none."""
    try:
        candidate, layers = strength(job, trial)
    except NotFound:
        return []
    return [
        LayerWeight(layer=layer, attention=attention, mlp=mlp)
        for layer, attention, mlp in kernel.weights(candidate, layers)
    ]


def strength_figure(job: Job, trial: Trial) -> Figure:
    """λ over the layers. NotFound as `strength`."""
    candidate, layers = strength(job, trial)
    return kernel.plot(candidate, layers, f" of trial {trial.number}")
