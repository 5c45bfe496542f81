"""What goes through a pipe comes out the same, and nothing of it stays open."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from engine.parcel import packed, unpacked

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (5,), (2, 3)])
def test_a_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(6).to(dtype)[: torch.Size(shape).numel()].reshape(shape)
    found = unpacked(packed(tensor))
    assert found.dtype == dtype and found.shape == tensor.shape
    assert torch.equal(found, tensor)


def test_views_and_what_is_there_twice() -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    one, again, turned = unpacked(packed((whole[1:], whole[1:], whole.T)))
    assert torch.equal(one, whole[1:]) and torch.equal(turned, whole.T)
    assert torch.equal(again, one)
    first, second = unpacked(packed((whole, whole)))
    assert first is second
    assert len(packed((whole, whole))) < 1.5 * len(packed(whole))
    first += 1  # it is its own memory
    assert whole[0, 0] == 0


def test_nothing_stays_open() -> None:
    """multiprocessing's own way opens a file for each tensor."""
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("no /proc here")
    before = len(os.listdir(descriptors))
    many = [torch.ones(3) for _ in range(200)]
    parcels = [packed(one) for one in many]
    found = [unpacked(parcel) for parcel in parcels]
    assert len(found) == 200 and len(os.listdir(descriptors)) <= before + 2
