"""For orchestrators and Prometheus: /healthz, /readyz, /metrics."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal

import redis
from fastapi import APIRouter, Depends, Request, Response
from fastapi.security import HTTPAuthorizationCredentials
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from pydantic import BaseModel

from api.auth import bearer, caller
from api.problems import errors
from api.schema import at_head
from jobs import figures, listing
from jobs.database import Sessions
from jobs.problems import Forbidden
from jobs.settings import Settings

router = APIRouter(tags=["operation"])


class Health(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """Whether requests can be served. Redis is only the doorbell: without it all is slower."""

    status: Literal["ready", "degraded"]
    database: Literal["ok"] = "ok"
    migrations: Literal["ok"] = "ok"
    redis: Literal["ok", "unreachable"]


@router.get("/healthz")
def healthz() -> Health:
    """The process is alive. Restart it when this fails."""
    return Health()


@router.get(
    "/readyz",
    responses=errors({503: "PostgreSQL is away, or the tables are not those of this version."}),
)
def readyz(request: Request) -> Readiness:
    """PostgreSQL answers and is migrated. Send no traffic while this fails."""
    state = request.app.state
    with state.sessions.begin() as session:
        at_head(session)
    try:
        with redis.Redis.from_url(
            state.settings.redis_url, socket_connect_timeout=1, socket_timeout=1
        ) as client:
            client.ping()
    except (redis.RedisError, OSError):
        return Readiness(status="degraded", redis="unreachable")
    return Readiness(status="ready", redis="ok")


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
        **errors(
            {
                401: "Neither a loopback client nor a valid token.",
                403: "A token without the scope `read`.",
            }
        ),
    },
)
def metrics(
    request: Request, token: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]
) -> Response:
    """Prometheus figures, computed now. For loopback clients, or with a token of scope `read`."""
    if not _from_loopback(request) and "read" not in caller(request, token, None).scopes:
        raise Forbidden("This token lacks the scope `read`. Make one that has it.")
    state = request.app.state
    registry = CollectorRegistry()
    registry.register(_Snapshot(collect(state.sessions, state.settings, state.streams.open)))
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


def _from_loopback(request: Request) -> bool:
    """Whether the peer is this machine itself, and not a proxy speaking for somebody else."""
    forwarded = {"forwarded", "x-forwarded-for", "x-real-ip", "via"} & set(request.headers.keys())
    if request.client is None or forwarded:
        return False
    try:
        return ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False


class _Snapshot:
    """Figures that were just read, in the form that prometheus_client collects."""

    def __init__(self, found: list[Metric]) -> None:
        self.found = found

    def collect(self) -> list[Metric]:
        return self.found


def collect(sessions: Sessions, settings: Settings, streams: int) -> list[Metric]:
    """The figures; docs/api.md lists them."""
    depth = GaugeMetricFamily("nullspace_queue_depth", "Tasks to be claimed.", labels=["kind"])
    age = GaugeMetricFamily(
        "nullspace_queue_oldest_seconds", "Age of the oldest of them.", labels=["kind"]
    )
    by_state = GaugeMetricFamily("nullspace_jobs", "Jobs by state.", labels=["state"])
    running = GaugeMetricFamily("nullspace_tasks_running", "Tasks under a lease.", labels=["kind"])
    live = GaugeMetricFamily(
        "nullspace_workers_live", "Workers heard of lately.", labels=["device", "name"]
    )
    with sessions.begin() as session:
        for each in figures.waiting(session):
            depth.add_metric([each.kind], each.depth)
            age.add_metric([each.kind], each.oldest_seconds)
        for state, count in listing.count_by_state(session).items():
            by_state.add_metric([state], count)
        for kind, count in figures.running_tasks(session).items():
            running.add_metric([kind], count)
        for (device, name), count in figures.workers_live(session, settings).items():
            live.add_metric([device, name], count)
        trials = CounterMetricFamily(
            "nullspace_trials", "Trials scored.", value=figures.trials_complete(session)
        )
        expiries = CounterMetricFamily(
            "nullspace_lease_expiries",
            "Leases that lapsed unrenewed.",
            value=figures.lease_expiries(session),
        )
        stored = GaugeMetricFamily(
            "nullspace_artifact_bytes", "Bytes of artifacts.", value=figures.artifact_bytes(session)
        )
    open_streams = GaugeMetricFamily(
        "nullspace_event_streams", "Event streams open in this process.", value=streams
    )
    return [depth, age, by_state, running, live, trials, expiries, stored, open_streams]
