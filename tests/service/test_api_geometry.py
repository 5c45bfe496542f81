"""Geometry and kernels over HTTP: stored once, read by who may see the job, drawn as files."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import inspect

from jobs import queue, trials
from jobs.database import Sessions
from jobs.drawing.figure import POLICY
from jobs.queue import Claim
from jobs.spec.candidate import Ara, Candidate, single_pass
from jobs.spec.protocol import AnatomyReport, Geometry, LayerGeometry, Prepared
from jobs.tables import Job, User
from nullspace import Client, ClientError
from nullspace.cli import app
from tests.service.api_server import Api, api, spec
from tests.service.api_worker import claim, score
from tests.service.test_api_jobs import problem

__all__ = ["api"]
LAYERS = 8  # as the candidates of `api_worker`
SVG = "{http://www.w3.org/2000/svg}"


def geometry(separation: float = 2.5) -> Geometry:
    """Eight layers, separation rising; two harmful points and one harmless in each."""
    figures = dict.fromkeys(LayerGeometry.model_fields, 0.5)
    return Geometry(
        layers=[
            LayerGeometry.model_validate({**figures, "layer": n, "separation": separation + n})
            for n in range(LAYERS)
        ],
        points=[[[(1.0 + n, 0.5), (2.0, -0.5)], [(-3.0, 0.0)]] for n in range(LAYERS)],
    )


def prepared(found: Geometry | None) -> Prepared:
    return Prepared(
        anatomy=AnatomyReport(
            architecture="x", layers=LAYERS, hidden=4, writers=[], coverage=1.0
        ),
        device="cpu", device_name="cpu", dtype="float32", quantization="none", weight_bytes=1,
        source_bytes=1, batch_size=1, geometry=found, baseline={}, baseline_outcomes={},
    )  # fmt: skip


def measure(sessions: Sessions, held: Claim, found: Geometry | None) -> None:
    with sessions.begin() as session:
        trials.store_baseline(session, held.task, held.token, prepared(found))


def submit(api: Api, user: User, **changes: object) -> str:
    with api.as_user(user) as client:
        made = client.post("/jobs", json=spec(**changes))
        assert made.status_code == 201, made.text
        return str(made.json()["id"])


def test_geometry_is_kept_in_a_column_that_jobs_do_not_load(
    api: Api, sessions: Sessions, member: User
) -> None:
    submit(api, member)
    held = claim(sessions, api.settings)
    measure(sessions, held, geometry())
    with sessions.begin() as session:
        job = session.get_one(Job, held.job.id)
        assert "geometry" in inspect(job).unloaded
        assert job.prepared is not None and "geometry" not in job.prepared
        assert job.geometry == geometry().model_dump(mode="json")
        assert queue.fence(session, held.task.id, held.token)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_geometry_that_is_not_finite_is_not_kept(
    api: Api, sessions: Sessions, member: User, bad: float
) -> None:
    job = submit(api, member)
    measure(sessions, claim(sessions, api.settings), geometry(bad))
    with api.as_user(member) as client:
        assert "not kept" in str(problem(client.get(f"/jobs/{job}/geometry"), 404)["detail"])


def test_geometry_as_numbers_and_figures(api: Api, sessions: Sessions, member: User) -> None:
    job = submit(api, member)
    with api.as_user(member) as client:
        for path in ("", "/lines.svg", "/0.svg"):
            missing = problem(client.get(f"/jobs/{job}/geometry{path}"), 404)
            assert "not known yet" in str(missing["detail"])
        measure(sessions, claim(sessions, api.settings), geometry())
        found = client.get(f"/jobs/{job}/geometry")
        assert Geometry.model_validate(found.json()) == geometry()
        for path, words in (("lines", "over the layers"), ("0", "layer 0"), ("7", "layer 7")):
            drawn = client.get(f"/jobs/{job}/geometry/{path}.svg")
            assert drawn.status_code == 200, drawn.text
            assert drawn.headers["content-type"] == "image/svg+xml"
            assert drawn.headers["content-security-policy"] == POLICY
            title = ET.fromstring(drawn.text).find(f"{SVG}title")
            assert title is not None and words in str(title.text)
            again = client.get(
                f"/jobs/{job}/geometry/{path}.svg", headers={"If-None-Match": drawn.headers["etag"]}
            )
            assert (again.status_code, again.content) == (304, b"")
            assert again.headers["cache-control"] == "private, no-cache"
        tags = {client.get(f"/jobs/{job}/geometry/{n}.svg").headers["etag"] for n in range(LAYERS)}
        assert len(tags) == LAYERS
        same = {"If-None-Match": found.headers["etag"]}
        assert client.get(f"/jobs/{job}/geometry", headers=same).status_code == 304
        beyond = problem(client.get(f"/jobs/{job}/geometry/8.svg"), 404)
        assert "the last one is 7" in str(beyond["detail"])
        problem(client.get(f"/jobs/{job}/geometry/-1.svg"), 422)
        problem(client.get(f"/jobs/{job}/geometry/x.svg"), 422)


def test_a_private_job_is_not_there_for_others(
    api: Api, sessions: Sessions, member: User, make_user: Any
) -> None:
    job = submit(api, member, private=True)
    held = claim(sessions, api.settings)
    measure(sessions, held, geometry())
    score(sessions, held, 1, 0.1)
    paths = ("geometry", "geometry/lines.svg", "geometry/0.svg", "trials/0/kernel.svg")
    with api.as_user(member) as client, api.as_user(make_user()) as other:
        for path in paths:
            assert client.get(f"/jobs/{job}/{path}").status_code == 200
            assert "geometry" not in str(problem(other.get(f"/jobs/{job}/{path}"), 404)["detail"])
    with api.with_token(None) as nobody:
        for path in paths:
            problem(nobody.get(f"/jobs/{job}/{path}"), 401)


ARA = Ara(start=1, end=3, preserve=0.5, steer=0.5, overshoot=0.1, neighbours=4)


@pytest.mark.parametrize("candidate", [single_pass(LAYERS), ARA], ids=["ablation", "ara"])
def test_strength_over_the_layers_of_a_trial(
    api: Api, sessions: Sessions, member: User, candidate: Candidate
) -> None:
    job = submit(api, member)
    held = claim(sessions, api.settings)
    measure(sessions, held, None)
    with sessions.begin() as session:
        (slot,) = trials.reserve(session, held.task, held.token, 1)
    path = f"/jobs/{job}/trials/{slot.number}"
    with api.as_user(member) as client:
        assert client.get(path).json()["weights"] == []
        early = problem(client.get(f"{path}/kernel.svg"), 404)
        assert "not chosen yet" in str(early["detail"])
        with sessions.begin() as session:
            trials.begin(
                session, held.task, held.token, slot.number, candidate, {}, "sampler", None
            )
        weights = client.get(path).json()["weights"]
        if isinstance(candidate, Ara):
            assert weights == []
            none = problem(client.get(f"{path}/kernel.svg"), 404)
            assert "no strength" in str(none["detail"])
            return
        assert weights == [
            {
                "layer": layer,
                "attention": candidate.attention.weight(layer),
                "mlp": candidate.mlp.weight(layer),
            }
            for layer in range(LAYERS)
        ]
        root = ET.fromstring(client.get(f"{path}/kernel.svg").text)
        knots = [g for g in root.iter(f"{SVG}g") if "data-layer" in g.attrib]
        assert len(knots) == 2 * LAYERS
        problem(client.get(f"/jobs/{job}/trials/99/kernel.svg"), 404)


def test_the_client_reads_both(api: Api, sessions: Sessions, member: User) -> None:
    job = submit(api, member)
    held = claim(sessions, api.settings)
    measure(sessions, held, geometry())
    score(sessions, held, 1, 0.1)
    with Client(api.url, api.token(member)) as client:
        assert client.geometry(job) == geometry().model_dump(mode="json")
        assert "over the layers" in client.geometry_svg(job)
        assert "layer 3" in client.geometry_svg(job, layer=3)
        assert "of trial 0" in client.kernel_svg(job, 0)


def test_the_command_line_prints_and_writes_it(
    api: Api, sessions: Sessions, member: User, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = submit(api, member)
    measure(sessions, claim(sessions, api.settings), geometry())
    server = ["--url", api.url, "--token", api.token(member)]

    def run(*arguments: str) -> str:
        app(args=["geometry", job[:8], *arguments, *server], standalone_mode=False)
        return capsys.readouterr().out

    lines = run().splitlines()
    assert len(lines) == 1 + LAYERS and "silhouette" in lines[0]
    assert lines[3].split()[:3] == ["2", "4.5", "0.500"] and "most separated" in lines[LAYERS]
    assert lines[1].split()[5] == "0.500" and lines[LAYERS].split()[5] == "-"
    assert Geometry.model_validate(json.loads(run("--json"))) == geometry()
    run("--svg", str(tmp_path / "a.svg"))
    assert "over the layers" in (tmp_path / "a.svg").read_text()
    run("--svg", str(tmp_path / "b.svg"), "--layer", "3")
    assert "layer 3" in (tmp_path / "b.svg").read_text()
    with pytest.raises(ClientError, match="the last one is 7"):
        run("--svg", str(tmp_path / "c.svg"), "--layer", "8")
    with pytest.raises(ClientError, match="cannot be written"):
        run("--svg", str(tmp_path))
    with pytest.raises(ClientError, match="--svg"):
        run("--layer", "3")
