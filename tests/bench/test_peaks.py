"""The ceilings: what is run, how often, and what is divided by what."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from bench import peaks
from bench.peaks import Ceilings, Peak

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "ROUNDS", 1)
    monkeypatch.setattr(peaks, "LEAST", {"cpu": 0.01})
    monkeypatch.setattr(peaks, "CUBES", {"cpu": (32, 256)})
    monkeypatch.setattr(peaks, "FAR", {"cpu": 1 << 24})


def test_ceilings_of_two_threads() -> None:
    kept = torch.get_num_threads()
    found = peaks.measure(CPU, torch.float32, 2, [(64, 16)])
    assert torch.get_num_threads() == kept
    x = torch.randn(256, 256)
    began, times = time.thread_time(), 20
    for _ in range(times):
        x @ x
    plain = times * 2 * 256**3 / (time.thread_time() - began)
    assert found.product.own > plain / 4, "no worse than a plain product, noise allowed"
    assert found.product.own < 2e12, "no core does more"
    for peak in (found.product, found.copy, found.read):
        assert peak.rate > 0 and peak.own > 0


def test_every_lane_runs_all_of_its_job() -> None:
    """Units are counted for all lanes, and each lane is a thread that does all of them."""
    ran: list[int] = []

    def act() -> None:
        ran.append(threading.get_ident())
        time.sleep(0.001)  # lets the other lane in; nothing waits for it

    found = peaks._timed(CPU, 1, 2, lambda: (act, 1.0), "a nap")
    assert len(set(ran)) >= 2
    counts = [ran.count(thread) for thread in set(ran)]
    assert sum(counts) % 2 == 0
    assert found.rate < 2 / 0.001, "two lanes, each at most once a millisecond"
    assert found.where == "a nap, 2 at once"


def test_shapes_are_cubes_and_the_models_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "TOKENS", {"cpu": (10, 1000)})
    monkeypatch.setattr(peaks, "LARGEST", {"cpu": 1_000_000})
    found = peaks.shapes("cpu", torch.float32, [(300, 20)])
    assert found == [(32, 32, 32), (256, 256, 256), (10, 20, 300)], "1.2 MB of result is too much"


def test_the_best_of_two_measurements() -> None:
    one, other = Peak(3.0, 1.0, "a"), Peak(2.0, 2.0, "b")
    assert one.best(other) == other.best(one) == Peak(3.0, 2.0, "a")
    ceilings = [Ceilings(torch.float32, 1, *[peak] * 3) for peak in (one, other)]
    assert ceilings[0].best(ceilings[1]).read == Peak(3.0, 2.0, "a")
