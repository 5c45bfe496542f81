"""Memory that really runs out while candidates are scored: batches halve, no row is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.starved import PROMPTS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS")
# Of address space. One row at once takes up to 100 MB, most of it the chunk in which divergences
# are computed; the free run takes more than 300 MB.
SPARE_MB = 180


@pytest.mark.slow
def test_scores_are_those_of_the_free_run(tmp_path: Path) -> None:
    """Two candidates of 48 prompts: 96 rows at once do not fit, and the scores stay the same."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.engine.starved", str(tmp_path), str(SPARE_MB)],
        env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=170,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    free, starved = found["limits"]
    assert 4 <= starved <= PROMPTS < free  # it ran out, and halved, no further than it must
    assert found["sent"] == [[0, 1], [0, 1]]  # each candidate's score once
    for whole, halved in zip(*found["results"], strict=True):
        assert len(halved["outcomes"]) == PROMPTS  # each row once, in its place
        assert halved["outcomes"] == whole["outcomes"]
        assert halved["scores"]["refusals"] == whole["scores"]["refusals"]
        for kind in ("kl_first", "kl_multi"):
            assert halved["scores"][kind] == pytest.approx(whole["scores"][kind], rel=1e-4)
            assert whole["scores"][kind] > 0
