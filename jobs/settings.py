"""Settings from the environment, in one place. Every variable is documented in docs/settings.md."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class Judge(BaseModel):
    """A model that judges answers: behind an OpenAI-compatible `url`, or loaded here without one.

    {"url": "http://127.0.0.1:8080/v1", "model": "judge", "key": "..."}   an endpoint
    {"model": "owner/name"}                                               from the hub or the models
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    url: str | None = None
    key: SecretStr | None = None
    parallel: int = Field(8, ge=1, le=64, description="requests at once")
    quantization: Literal["none", "bnb_4bit", "bnb_8bit"] = "bnb_4bit"

    @model_validator(mode="after")
    def _addressed(self) -> Judge:
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError("url: must begin with http:// or https://")
        return self


class Settings(BaseSettings):
    """DATABASE_URL, REDIS_URL and NULLSPACE_*; nothing else configures the service."""

    # an error at the start is logged: it must not repeat a secret that was mistyped
    model_config = SettingsConfigDict(
        env_prefix="NULLSPACE_", extra="ignore", hide_input_in_errors=True
    )

    database_url: str = Field(validation_alias="DATABASE_URL")
    redis_url: str = Field(validation_alias="REDIS_URL")
    secret_key: SecretStr = Field(min_length=32, description="signs tokens; keep it for ever")
    data: Path = Field(description="artifacts, logs, spool; shared by api and workers")
    models: Path | None = Field(None, description="operator's folder of models, one folder each")
    public_url: str = "http://127.0.0.1:8600"
    admin_email: str | None = None
    admin_password: SecretStr | None = None
    lease_seconds: float = Field(30.0, gt=0.1)
    beat_seconds: float = Field(10.0, gt=0.05)
    reconcile_seconds: float = Field(10.0, gt=0.05)
    poll_seconds: float = Field(2.0, gt=0.01, description="event streams look at the table")
    session_hours: float = 24 * 14
    disk_reserve_bytes: int = Field(2_000_000_000, ge=0, description="submits are refused below")
    max_running: int = Field(8, ge=1, description="running and queued jobs per member")
    upload_bytes: int = Field(16_000_000, ge=1)
    max_trials: int = Field(10_000, ge=1)
    accepts: str = "search,evaluate,export,chat,benchmark"
    gpu: str = Field("", description="CUDA device of this worker, e.g. 0; empty: as visible")
    judges: dict[str, Judge] = Field(default_factory=dict, description="JSON: name -> judge")
    tasks: Path | None = Field(None, description="operator's folder of harness task files")
    hub_check: bool = Field(True, description="look models up on the hub at submit")

    @property
    def artifacts(self) -> Path:
        """Folder of finished artifacts."""
        return self.data / "artifacts"

    @property
    def logs(self) -> Path:
        """Folder of task logs, `<task id>.log`."""
        return self.data / "logs"

    @property
    def spool(self) -> Path:
        """Folder where workers keep scores that could not be written yet."""
        return self.data / "spool"


@lru_cache(maxsize=1)
def settings() -> Settings:
    """The process's settings, read once. Raises pydantic's ValidationError naming what lacks."""
    return Settings()
