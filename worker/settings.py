"""Settings that only workers read; the others are in jobs.settings."""

from __future__ import annotations

import sys

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class WorkerSettings(BaseSettings):
    """NULLSPACE_ENGINE_COMMAND, _STOP_SECONDS, _LINGER_SECONDS, _BATCH."""

    model_config = SettingsConfigDict(env_prefix="NULLSPACE_", extra="ignore")

    engine_command: list[str] = Field(
        default_factory=lambda: [sys.executable, "-m", "engine"],
        description="JSON list: the engine's program; --read FD --write FD is appended",
    )
    stop_seconds: float = Field(default=30.0, gt=0, description="from pause or cancel to SIGKILL")
    linger_seconds: float = Field(
        default=10.0, ge=0, description="a loaded engine waits so long for the next task"
    )
    batch: int | None = Field(default=None, ge=1, le=64, description="candidates in hand at once")
