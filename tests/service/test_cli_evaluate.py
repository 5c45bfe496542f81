"""`nullspace evaluate` and `benchmark` on a service of their own, with a fake engine."""

from __future__ import annotations

from pathlib import Path

from tests.service.command_line import Lab
from tests.service.processes import make_model

SETS = ("--harmful", "asked.txt", "--harmless", "plain.txt")
FEW = ("--set", "prompts.search=8", "--set", "prompts.heldout=8", "--set", "prompts.direction=16")


def test_jobs_without_a_search_and_a_benchmark_of_a_trial(tmp_path: Path) -> None:
    lab = Lab.make(tmp_path)
    make_model(lab.folder / "models", "other")
    with lab.up():
        done = lab.json(
            "evaluate", "fake", "--original", "other", "--task", "sums", "--limit", "5",
            "--scorer", "length", *SETS, *FEW, "--watch",
        )  # fmt: skip
        assert done["state"] == "completed" and done["kind"] == "evaluate"
        assert done["result"]["model"]["search"]["refusals"] == 2
        assert done["result"]["benchmark"]["model"]["sums.acc"]["n"] == 5
        for shown in (lab.nullspace("show", done["id"]), lab.nullspace("watch", done["id"])):
            rows = [line.split() for line in shown.stdout.splitlines()]
            assert ["search,", "kl_first", "0", "0.25"] in rows
            assert any(row[:1] == ["sums.acc"] and row.count("±") == 2 for row in rows)
        said = lab.nullspace("watch", done["id"]).stderr
        assert "the original refuses 8/8" in said and "the model refuses 2/8" in said

        said = lab.json("chat", done["id"], "hello")["answers"][0]["text"]
        assert said == "answer to hello"
        asked = (lab.folder / "orders" / "requests").read_text().splitlines()
        last = max(n for n, line in enumerate(asked) if line.startswith("respond"))
        prepared = [line for line in asked[:last] if line.startswith("prepare")]
        assert prepared[-1] == "prepare fake", "the job's model answers, not its original"

        alone = lab.nullspace("benchmark", "fake", "-t", "sums", "-t", "words", "--watch")
        assert [line.split()[0] for line in alone.stdout.splitlines()[1:]] == [
            "sums.acc", "words.acc"
        ]  # fmt: skip
        assert [job["kind"] for job in lab.json("ls", "--kind", "benchmark")] == ["benchmark"]
        assert "benchmark" in lab.nullspace("ls").stdout

        searched = lab.json("submit", "fake", *SETS, *FEW, "--trials", "3", "--watch")["id"]
        trial = ("benchmark", "--job", searched[:8], "--trial", "1", "--task", "sums")
        figures = lab.json(*trial, "--limit", "9", "--watch")
        assert {side: values["sums.acc"]["n"] for side, values in figures.items()} == {
            "original": 9, "model": 9
        }  # fmt: skip
        table = lab.nullspace(*trial, "--limit", "9", "--watch").stdout.splitlines()
        assert table[0].split() == ["figure", "original", "trial", "1"]
        assert table[1].split()[0] == "sums.acc" and len(table) == 2

        refused = lab.nullspace("benchmark", "fake", code=1).stderr
        assert "--task" in refused
        assert "--job and --trial" in lab.nullspace("benchmark", "-t", "a", code=1).stderr
        wrong = lab.nullspace("evaluate", "fake", "--set", "trials=5", code=7).stderr
        assert "trials" in wrong and "has no use for it" in wrong
        again = lab.nullspace("amend", done["id"], "--trials", "9", code=6).stderr
        assert "searches nothing" in again
