"""Model names, local folders and the hub (a small server that speaks its protocol)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from demo import MODEL
from jobs import models
from jobs.problems import Invalid
from jobs.settings import Settings
from tests.engine import hub_server
from tests.service.builders import write_model


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, models_folder: Path) -> Iterator[hub_server.Hub]:
    """A hub with `acme/tiny`; huggingface_hub and our own requests are pointed at it."""
    with hub_server.serve() as running:
        point_at(monkeypatch, running.url)
        running.folders["acme/tiny"] = models_folder / "tiny"
        yield running


def point_at(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        url + "/{repo_id}/resolve/{revision}/{filename}",
    )


@pytest.fixture
def asking(make_settings: Callable[..., Settings], models_folder: Path) -> Settings:
    """Settings of a service that looks models up on the hub."""
    return make_settings(models=models_folder, hub_check=True)


PATHS = [
    "../tiny",
    "/etc",
    "tiny/../tiny",
    "tiny/..",
    "a/b/c",
    "file:///etc/passwd",
    "https://example.org/x",
    "tiny\x00",
    "",
    ".",
    "..",
    "~root",
    "C:\\x",
    "./tiny",
    "-x",
    "tiny ",
    "x" * 200,
]


@pytest.mark.parametrize("name", PATHS)
def test_paths_are_not_names(asking: Settings, name: str) -> None:
    with pytest.raises(Invalid) as caught:
        models.check(name, None, asking)
    assert caught.value.field == "model" and "not a model's name" in caught.value.detail
    with pytest.raises(Invalid):
        models.local_path(name, asking)


@given(name=st.text(alphabet="./~\\a\x00-_ é", max_size=10))
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_name_leads_out_of_the_folder(models_folder: Path, name: str) -> None:
    lone = Settings.model_construct(models=models_folder)
    try:
        found = models.local_path(name, lone)
    except Invalid:
        return
    assert found is None or found.is_relative_to(models_folder.resolve())


def test_local_folders(asking: Settings, models_folder: Path) -> None:
    assert models.check("tiny", None, asking) is None
    assert models.local_path("tiny", asking) == models_folder / "tiny"
    write_model(models_folder / "acme" / "own")
    assert models.check("acme/own", None, asking) is None
    (models_folder / "same").symlink_to(models_folder / "tiny")
    assert models.local_path("same", asking) == models_folder / "tiny"
    (models_folder / "out").symlink_to(models_folder.parent)
    (models_folder / "loop").symlink_to(models_folder / "loop")
    with pytest.raises(Invalid, match="does not end inside"):
        models.check("out", None, asking)
    for name in ("loop", "missing"):
        with pytest.raises(Invalid) as caught:
            models.check(name, None, asking)
        assert caught.value.field == "model"


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["config.json", "pytorch_model.bin"], "pickle"),
        (["config.json"], "no .safetensors"),
        (["model.safetensors"], "no config.json"),
        (["adapter_config.json", "x.pt"], "no config.json"),
    ],
)
def test_what_cannot_be_loaded_safely_is_refused(
    asking: Settings, models_folder: Path, hub: hub_server.Hub, files: list[str], says: str
) -> None:
    bad = models_folder / "bad"
    bad.mkdir()
    for file in files:
        (bad / file).write_bytes(b"x")
    hub.folders["acme/bad"] = bad
    for name in ("bad", "acme/bad"):
        with pytest.raises(Invalid, match=says) as caught:
            models.check(name, None, asking)
        assert caught.value.field == "model"


def test_the_hub_tells_the_commit(asking: Settings, hub: hub_server.Hub) -> None:
    assert models.check("acme/tiny", None, asking) == hub_server.COMMIT
    assert models.check("acme/tiny", "main", asking) == hub_server.COMMIT
    assert "api/models/acme/tiny/revision/main" in hub.asked
    with pytest.raises(Invalid) as caught:
        models.check("acme/tiny", "v9", asking)
    assert caught.value.field == "revision" and "v9" in caught.value.detail
    for revision in ("../x", "a\x00", ""):
        with pytest.raises(Invalid) as caught:
            models.check("acme/tiny", revision, asking)
        assert caught.value.field == "revision"


def test_unknown_gated_and_forbidden(asking: Settings, hub: hub_server.Hub) -> None:
    hub.gated.add("acme/tiny")
    hub.statuses["acme/closed"] = (403, "")
    hub.statuses["acme/broken"] = (500, "")
    with pytest.raises(Invalid, match="knows no model acme/none"):
        models.check("acme/none", None, asking)
    with pytest.raises(Invalid, match="gated"):
        models.check("acme/tiny", None, asking)
    assert models.check("acme/tiny", None, asking, hub_token="good") == hub_server.COMMIT
    with pytest.raises(Invalid, match="403"):
        models.check("acme/closed", None, asking)
    # a hub in trouble is for the engine to report, later
    assert models.check("acme/broken", None, asking) is None


def test_our_own_token_is_never_sent_for_a_user(
    asking: Settings, hub: hub_server.Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "good")
    hub.gated.add("acme/tiny")
    with pytest.raises(Invalid, match="gated"):
        models.check("acme/tiny", None, asking)


def test_no_hub_is_no_obstacle(
    asking: Settings, farm: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_at(monkeypatch, "http://127.0.0.1:1")
    assert models.check("acme/tiny", None, asking) is None
    assert models.check("acme/tiny", None, farm) is None  # hub_check off: nobody is asked


def test_the_demo_model(asking: Settings) -> None:
    if not (MODEL / "config.json").is_file():
        pytest.skip("the demo model is not there")
    assert models.check("demo", None, asking) is None
    assert models.local_path("demo", asking) == MODEL
    assert os.path.isfile(MODEL / "model.safetensors")
