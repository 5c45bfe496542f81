"""The base of the API's own request bodies."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Body(BaseModel):
    """Unknown fields are errors, and so are near misses: `false` is no number, `"5"` neither."""

    model_config = ConfigDict(extra="forbid", strict=True)
