"""How prompts lie in the residual stream, and how strongly a trial edits it: numbers and figures.

Figures are SVG files that stand alone. All answers can be asked for again with If-None-Match.
"""

from __future__ import annotations

import hashlib
import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response

from api.auth import Reader
from api.problems import errors
from api.ranges import not_modified
from api.routes.jobs import MISSING
from api.routes.trials import NO_TRIAL, Number
from jobs import analysis, control, trials
from jobs.drawing.figure import POLICY, Figure
from jobs.spec.protocol import Geometry

router = APIRouter(tags=["geometry"])
Layer = Annotated[int, Path(ge=0, lt=2**31, description="the layer, from 0")]
NONE_YET = f"{MISSING} Or one without a geometry; `detail` says why."
UNCHANGED: dict[int | str, dict[str, Any]] = {
    304: {"description": "The client has this already (If-None-Match)."}
}
DRAWN: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The figure; light or dark as the reader's system is.",
        "content": {"image/svg+xml": {"schema": {"type": "string"}}},
    },
    **UNCHANGED,
}


def _send(request: Request, body: str, media_type: str, headers: dict[str, str]) -> Response:
    """`body`, or 304 where the client has it."""
    etag = f'"{hashlib.sha256(body.encode()).hexdigest()}"'
    kept = {"ETag": etag, "Cache-Control": "private, no-cache"}
    if not_modified(request, etag):
        return Response(status_code=304, headers=kept)
    return Response(body, media_type=media_type, headers={**kept, **headers})


def _draw(request: Request, figure: Figure) -> Response:
    policy = {"Content-Security-Policy": POLICY}
    return _send(request, figure.document(), "image/svg+xml", policy)


@router.get(
    "/jobs/{job_id}/geometry",
    response_model=Geometry,
    responses={**UNCHANGED, **errors({404: NONE_YET})},
)
def show_geometry(who: Reader, job_id: uuid.UUID, request: Request) -> Response:
    """Per layer: norms, cosines, separation, silhouette, and the points of a projection."""
    with who.begin() as session:
        found = analysis.geometry(session, control.visible(session, who.user, job_id))
    return _send(request, found.model_dump_json(), "application/json", {})


# before the layer's route, whose pattern it fits
@router.get(
    "/jobs/{job_id}/geometry/lines.svg",
    response_class=Response,
    responses={**DRAWN, **errors({404: NONE_YET})},
)
def draw_layers(who: Reader, job_id: uuid.UUID, request: Request) -> Response:
    """Cosines, norms, separation and silhouette as lines over the layers."""
    with who.begin() as session:
        found = analysis.geometry(session, control.visible(session, who.user, job_id))
    return _draw(request, analysis.over_layers(found))


@router.get(
    "/jobs/{job_id}/geometry/{layer}.svg",
    response_class=Response,
    responses={**DRAWN, **errors({404: NONE_YET + " Or no such layer."})},
)
def draw_layer(who: Reader, job_id: uuid.UUID, layer: Layer, request: Request) -> Response:
    """The prompts of one layer in the plane: along the direction, and across."""
    with who.begin() as session:
        found = analysis.geometry(session, control.visible(session, who.user, job_id))
    return _draw(request, analysis.projection(found, layer))


@router.get(
    "/jobs/{job_id}/trials/{number}/kernel.svg",
    response_class=Response,
    responses={**DRAWN, **errors({404: NO_TRIAL + " Or one whose edit has no strength λ."})},
)
def draw_kernel(who: Reader, job_id: uuid.UUID, number: Number, request: Request) -> Response:
    """A trial's edit strength λ over the layers, by component."""
    with who.begin() as session:
        job = control.visible(session, who.user, job_id)
        figure = analysis.strength_figure(job, trials.get(session, job_id, number))
    return _draw(request, figure)
