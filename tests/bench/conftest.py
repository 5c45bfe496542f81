"""What the tests of the measurements share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from unittest.mock import patch

import pytest


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """Whole programs run in this process and set what libraries read: not for later tests."""
    with patch.dict(os.environ):
        yield
