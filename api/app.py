"""The application: REST under /api/v1, and the three addresses for operators.

    uvicorn --factory api.app:create_app

`app.state` holds what routes and pages share: `settings`, `sessions`, `doorbell`, `nudges`,
`streams`. Pages may set `app.state.problem_page` (see `api.problems.respond`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from importlib.metadata import version

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute

from api import openapi, problems
from api.csrf import CrossSiteGuard
from api.headers import SecurityHeaders
from api.limits import BodyLimit
from api.nudges import Nudges
from api.routes import (
    artifacts,
    benchmarks,
    chat,
    estimate,
    events,
    geometry,
    health,
    jobs,
    log,
    people,
    prompt_sets,
    trials,
    webhooks,
    workers,
)
from jobs.database import bounded, connect, session_factory
from jobs.doorbell import Doorbell
from jobs.settings import Settings
from jobs.settings import settings as process_settings

PREFIX = "/api/v1"
ROUTERS: tuple[APIRouter, ...] = (
    jobs.router,
    estimate.router,
    events.router,
    log.router,
    trials.router,
    geometry.router,
    chat.router,
    benchmarks.router,
    artifacts.router,
    prompt_sets.router,
    workers.router,
    people.router,
    webhooks.router,
)
# With SQLAlchemy's overflow 30 connections for Starlette's 40 threads: queries are short.
POOL_SIZE = 20
IDLE_SECONDS = 60.0  # a request that hangs in a transaction lets go of its locks


def create_app(settings: Settings | None = None) -> FastAPI:
    """The application, with `settings` or those of the process's environment."""
    chosen = settings or process_settings()
    app = FastAPI(
        title="Nullspace",
        version=version("nullspace"),
        description=openapi.DESCRIPTION,
        openapi_url=f"{PREFIX}/openapi.json",
        docs_url=None,  # Swagger UI loads scripts from elsewhere
        redoc_url=None,
        lifespan=_lifespan,
        generate_unique_id_function=_name_of,
    )
    app.state.settings = chosen
    app.state.streams = events.Streams()
    problems.install(app)
    for router in ROUTERS:
        app.include_router(router, prefix=PREFIX)
    app.include_router(health.router)
    openapi.install(app)
    # the last one added is the outermost
    app.add_middleware(CrossSiteGuard, public_url=chosen.public_url)
    app.add_middleware(BodyLimit, upload_bytes=chosen.upload_bytes)
    app.add_middleware(problems.LastResort)
    app.add_middleware(SecurityHeaders, public_url=chosen.public_url)
    return app


def _name_of(route: APIRoute) -> str:
    """operationId: the function's name."""
    return route.name


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings: Settings = app.state.settings
    engine = connect(bounded(settings.database_url, IDLE_SECONDS), pool_size=POOL_SIZE)
    app.state.sessions = session_factory(engine)
    app.state.doorbell = Doorbell(settings.redis_url)
    app.state.nudges = Nudges(settings.redis_url)
    listening = asyncio.create_task(app.state.nudges.listen())
    try:
        yield
    finally:
        listening.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await listening
        app.state.doorbell.close()
        engine.dispose()
