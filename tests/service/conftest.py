"""Fixtures of the service's tests: settings and models, a user with prompt sets, a worker."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.database import Sessions
from jobs.settings import Settings
from jobs.tables import User, Worker
from tests.service import builders


@pytest.fixture
def models_folder(tmp_path: Path) -> Path:
    """An operator's models folder with the model `tiny`."""
    folder = tmp_path / "models"
    builders.write_model(folder / "tiny")
    return folder


@pytest.fixture
def farm(make_settings: Callable[..., Settings], models_folder: Path) -> Settings:
    """Settings with that folder and a wide quota."""
    return make_settings(models=models_folder, max_running=1000)


@pytest.fixture
def owner(sessions: Sessions, make_user: Callable[..., User]) -> User:
    """A member; the prompt sets of the builders exist."""
    user = make_user("owner@example.org")
    with sessions.begin() as session:
        builders.add_prompts(session, user)
    return user


@pytest.fixture
def worker(sessions: Sessions) -> Worker:
    """A worker that takes any task."""
    with sessions.begin() as session:
        return builders.add_worker(session)
