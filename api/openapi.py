"""The OpenAPI document, completed with what every route shares, and its snapshot.

python -m api.openapi          # rewrite docs/openapi.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from api.problems import MEDIA_TYPE, ProblemDocument, errors

SNAPSHOT = Path(__file__).parent.parent / "docs" / "openapi.json"
DESCRIPTION = (
    "Submit, watch and control abliteration jobs, and download what they made. Errors are "
    "RFC 9457 problem documents. Authenticate with `Authorization: Bearer <token>`."
)
SHARED = errors(
    {
        400: "The body cannot be read at all.",
        401: "No token, or one that is unknown, expired or revoked.",
        413: "The body is larger than is accepted.",
        422: "A field is wrong; `errors` names each with its mend.",
        503: "The database is away. Retry after the seconds in Retry-After.",
    }
)


def install(app: FastAPI) -> None:
    """Let `app.openapi()` give the completed document."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _complete(app)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _complete(app: FastAPI) -> dict[str, Any]:
    found = get_openapi(
        title=app.title,
        version=app.version,
        description=app.description,
        routes=app.routes,
    )
    schemas = found["components"]["schemas"]
    reference = "#/components/schemas/{model}"
    problem = ProblemDocument.model_json_schema(ref_template=reference)
    schemas.update(problem.pop("$defs", {}))
    schemas["ProblemDocument"] = problem
    schemas.pop("HTTPValidationError", None)
    schemas.pop("ValidationError", None)
    for path, operations in found["paths"].items():
        for operation in operations.values():
            responses = operation["responses"]
            if path == "/metrics":
                operation["security"] = [{}, {"token": []}]  # loopback needs no token
            if MEDIA_TYPE not in responses.get("422", {}).get("content", {}):
                responses.pop("422", None)  # FastAPI's own shape, which is not ours
            if not path.startswith("/api/"):
                continue
            for status, response in SHARED.items():
                if status in (400, 413) and "requestBody" not in operation:
                    continue
                if status == 422 and not _takes_input(operation):
                    continue
                responses.setdefault(str(status), response)
            operation["responses"] = dict(sorted(responses.items()))
    return found


def _takes_input(operation: dict[str, Any]) -> bool:
    return bool(operation.get("parameters") or operation.get("requestBody"))


def text() -> str:
    """The snapshot's text. It depends on the code alone, so placeholder settings do."""
    from api.app import create_app
    from jobs.settings import Settings

    settings = Settings.model_validate(
        {
            "DATABASE_URL": "postgresql://localhost/none",
            "REDIS_URL": "redis://localhost",
            "secret_key": "0" * 32,
            "data": "data",
        }
    )
    document = create_app(settings).openapi()
    return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SNAPSHOT.write_text(text(), encoding="utf-8")
    print(f"wrote {SNAPSHOT.name}")
