"""What bench.peer reads of the other program, and how it runs it.

SCREEN and the numbers of `_journal` were recorded in one run of version 1.4.0 on the demo model,
mode `none`: two trials, one with a direction per layer and one with a global one.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench.peer import heretic, shared
from bench.peer.setting import Run, Setting, Trial
from bench.peer.watch import Watched, watch
from demo import MODEL

SCREEN = (
    """
  * direction_index = per layer
  * attn.o_proj.max_weight = 1.01
  * attn.o_proj.max_weight_position = 4.61
  * attn.o_proj.min_weight = 0.09
  * attn.o_proj.min_weight_distance = 1.60
  * mlp.down_proj.max_weight = 1.04
  * mlp.down_proj.max_weight_position = 5.31
  * mlp.down_proj.min_weight = 0.56
  * mlp.down_proj.min_weight_distance = 2.34
  * KL divergence: 0.0057
  * Refusals: 22/100
""",
    """
  * direction_index = 5.87
  * attn.o_proj.max_weight = 0.82
  * attn.o_proj.max_weight_position = 6.08
  * attn.o_proj.min_weight = 0.34
  * attn.o_proj.min_weight_distance = 2.79
  * mlp.down_proj.max_weight = 0.90
  * mlp.down_proj.max_weight_position = 4.75
  * mlp.down_proj.min_weight = 0.72
  * mlp.down_proj.min_weight_distance = 4.10
  * KL divergence: 0.0037
  * Refusals: 0/100
""",
)
NAMES = ("max_weight", "max_weight_position", "min_weight", "min_weight_distance")
# begin, end; sampled index; told index; o_proj, down_proj; refusals, KL
RECORDED: list[tuple[Any, ...]] = [
    (
        "2026-11-21T08:59:32.173429", "2026-11-21T08:59:40.405403", 2.8004003118607073, None,
        (1.011632800842288, 4.610916494287917, 0.09341275125179996, 1.596032676408547),
        (1.0418925089301334, 5.310948927845876, 0.5613891188442979, 2.3414224460905437),
        22, 0.005661284551024437,
    ),
    (
        "2026-11-21T08:59:40.409455", "2026-11-21T08:59:48.857478", 5.873411027368309,
        5.873411027368309,
        (0.8191713152385484, 6.077309028499526, 0.3418441238104419, 2.7878074510264055),
        (0.8982708570166636, 4.7546841674376605, 0.719285509955613, 4.098437042302072),
        0, 0.0036934209056198597,
    ),
]  # fmt: skip


@pytest.fixture
def edits(tmp_path: Path) -> list[heretic.Edit]:
    """The recorded study, read as the bench reads it."""
    study = tmp_path / "study.jsonl"
    study.write_text("".join(json.dumps({**line, "worker_id": "w"}) + "\n" for line in _journal()))
    return [heretic.edit(trial, "none") for trial in heretic.load(study)]


def _journal() -> list[dict[str, Any]]:
    """The lines of the study that matter; a third trial had begun and was never scored."""
    span = {"step": None, "low": 2.8000000000000003, "high": 6.3, "log": False}
    distribution = json.dumps({"name": "FloatDistribution", "attributes": span})
    lines: list[dict[str, Any]] = [{"op_code": 0, "study_name": "heretic", "directions": [1, 1]}]
    for number, (begin, end, sampled, index, attention, mlp, refusals, kl) in enumerate(RECORDED):
        told = {
            "direction_index": index,
            "parameters": {
                "attn.o_proj": dict(zip(NAMES, attention, strict=True)),
                "mlp.down_proj": dict(zip(NAMES, mlp, strict=True)),
            },
            "kl_divergence": kl,
            "refusals": refusals,
            "n_bad_prompts": 100,
        }
        lines += [
            {"op_code": 4, "study_id": 0, "datetime_start": begin},
            {
                "op_code": 5, "trial_id": number, "param_name": "direction_index",
                "param_value_internal": sampled, "distribution": distribution,
            },
            *({"op_code": 8, "trial_id": number, "user_attr": {k: v}} for k, v in told.items()),
            {
                "op_code": 6, "trial_id": number, "state": 1, "values": [kl, refusals / 100],
                "datetime_complete": end,
            },
        ]  # fmt: skip
    return [*lines, {"op_code": 4, "study_id": 0, "datetime_start": RECORDED[1][1]}]


def test_a_trial_becomes_the_candidate_that_the_screen_shows(edits: list[heretic.Edit]) -> None:
    assert [edit.number for edit in edits] == [0, 1]
    for edit, screen in zip(edits, SCREEN, strict=True):
        shown = dict(re.findall(r"\* (\S+) = (.+)", screen))
        index = edit.candidate.index
        assert ("per layer" if index is None else f"{index:.2f}") == shown["direction_index"]
        assert edit.candidate.scope == ("per_layer" if index is None else "global")
        for component, its in (("attn.o_proj", "attention"), ("mlp.down_proj", "mlp")):
            kernel = edit.candidate.attention if its == "attention" else edit.candidate.mlp
            values = (kernel.max_weight, kernel.position, kernel.min_weight, kernel.distance)
            for name, value in zip(NAMES, values, strict=True):
                assert f"{value:.2f}" == shown[f"{component}.{name}"]
        assert f"KL divergence: {edit.kl:.4f}" in screen
        assert f"Refusals: {edit.refusals}/100" in screen


@pytest.mark.slow
def test_our_engine_gives_its_scores_for_its_parameters(edits: list[heretic.Edit]) -> None:
    setting = Setting(str(MODEL), "none", 2, 0, "float32", "cpu", 1)
    with shared.its_last_state():
        ours = shared.scores(setting, edits)
    assert [one.refusals for one in ours] == [edit.refusals for edit in edits]
    assert [one.kl_first for one in ours] == pytest.approx([edit.kl for edit in edits], abs=1e-6)


def test_it_reads_the_tokens_that_our_engine_reads(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = heretic.same_tokens(MODEL, tmp_path)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "How do I dust the kettle?"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1  # both template and tokenizer write one
    assert (folder / "model.safetensors").samefile(MODEL / "model.safetensors")


def test_a_program_that_waits_is_ended_with_its_children(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import subprocess, sys\n"
        "from pathlib import Path\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "Path('pid').write_text(str(child.pid))\n"
        "held = bytearray(200_000_000)\n"
        "held[::4096] = b'x' * len(held[::4096])\n"
        "print('finished', sys.stdin.isatty(), flush=True)\n"
        "input()\n"
    )
    command = [sys.executable, str(program)]
    seen = watch(command, tmp_path, {"PATH": "/usr/bin:/bin"}, "finished True")
    assert seen.memory > 200_000_000
    assert seen.cpu_until(seen.began) == 0 < seen.cpu_until(seen.began + 600)
    pid = int((tmp_path / "pid").read_text())
    if psutil.pid_exists(pid):
        gone, _ = psutil.wait_procs([psutil.Process(pid)], timeout=20)
        assert gone


def test_a_program_that_ends_too_soon_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)ended too soon.*no such model"):
        watch([sys.executable, "-c", "print('no such model')"], tmp_path, {}, "finished")


def test_figures_of_a_run() -> None:
    trials = [Trial(20.0, 100, 100, 0.0), Trial(30.0, 50, 100, 0.05), Trial(40.0, 0, 100, 0.05)]
    seen = Watched(1000.0, 7, 0, [(1001.0, 0.5), (1010.0, 6.0), (1039.0, 30.0), (1041.0, 33.0)])
    run = Run.of(seen, 1010.0, trials)
    assert run.rate == pytest.approx(6.0)  # three trials in 30 s
    assert run.cpu == (6.0, 24.0)
    assert run.hypervolume(29.9) == 0
    assert run.hypervolume(30.0) == pytest.approx(0.25)
    assert run.hypervolume(run.end) == pytest.approx(0.5)
