"""The other side: `heretic-llm` from the package index, run as a program.

It is under the AGPL: nothing of it is imported or copied. What is known of it here comes from its
`--help`, from what it prints and from the study that it saves: an Optuna journal, with the exact
parameters and scores of which it prints the first decimals.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from bench.peer.setting import (
    MARKERS,
    MAX_NEW_TOKENS,
    STARTUP,
    SYSTEM_PROMPT,
    Mode,
    Run,
    Setting,
    Trial,
)
from bench.peer.watch import watch
from bench.search import texts
from jobs.spec.candidate import Ablation, Component, Kernel, Recipe

PACKAGE, VERSION = "heretic-llm", "1.4.0"
FINISHED = "Optimization finished"  # after it, a menu waits for a key
AUTOMATIC = 0  # batch size: benchmarked by the program itself
ROLES = {
    "good-prompts": "direction_harmless",
    "bad-prompts": "direction_harmful",
    "good-evaluation-prompts": "search_harmless",
    "bad-evaluation-prompts": "search_harmful",
}
COMPONENTS: dict[Component, str] = {"attention": "attn.o_proj", "mlp": "mlp.down_proj"}


@dataclass(frozen=True)
class Edit:
    """One of its trials: number (from 0), our candidate of the same parameters, its scores."""

    number: int
    candidate: Ablation
    refusals: int
    kl: float


def cache() -> Path:
    """Where its virtual environment is made unless told otherwise."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "nullspace" / f"{PACKAGE}-{VERSION}"


def install(venv: Path) -> dict[str, str]:
    """Make the virtual environment unless it is there, with our version of torch; its versions."""
    python = venv / "bin" / "python"
    if not (venv / "bin" / "heretic").exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        # the same torch: as a range, it would be the newest build for CUDA
        pins = [f"{PACKAGE}=={VERSION}", f"torch=={version('torch').split('+')[0]}"]
        subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", *pins], check=True, stdout=sys.stderr
        )
    names = (PACKAGE, "torch", "transformers", "optuna")
    code = "import importlib.metadata as m, json, sys; "
    code += "print(json.dumps({name: m.version(name) for name in sys.argv[1:]}))"
    done = subprocess.run([str(python), "-c", code, *names], check=True, capture_output=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def run(setting: Setting, folder: Path, venv: Path, batch: int) -> tuple[Run, list[Edit]]:
    """Search in its own process; `batch` prompts at once. `folder` takes prompts and study."""
    command = [str(venv / "bin" / "heretic"), *arguments(setting, folder, batch)]
    seen = watch(command, folder, setting.environment(), FINISHED)
    (study,) = (folder / "study").glob("*.jsonl")
    trials = load(study)
    ready = _stamp(trials[0].datetime_start)
    scored = [
        Trial(
            _stamp(trial.datetime_complete) - seen.began,
            trial.user_attrs["refusals"],
            trial.user_attrs["n_bad_prompts"],
            trial.user_attrs["kl_divergence"],
        )
        for trial in trials
    ]
    return Run.of(seen, ready, scored), [edit(one, setting.mode) for one in trials]


def arguments(setting: Setting, folder: Path, batch: int) -> list[str]:
    """Its command line; the prompts are written into `folder`, one a line."""
    given = {
        "model": str(same_tokens(Path(setting.model), folder)),
        "dtypes": json.dumps([setting.dtype]),
        "batch-size": batch,
        "max-response-length": MAX_NEW_TOKENS,
        "row-normalization": setting.mode,
        "n-trials": setting.trials,
        "n-startup-trials": math.ceil(STARTUP * setting.trials),
        "seed": setting.seed,
        "study-checkpoint-dir": str(folder / "study"),
        "refusal-markers": json.dumps(MARKERS),
        "system-prompt": SYSTEM_PROMPT,
    }
    prompts = texts()
    for option, role in ROLES.items():
        path = folder / f"{role}.txt"
        path.write_text("".join(f"{text}\n" for text in getattr(prompts, role)), encoding="utf-8")
        given[f"{option}.dataset"] = str(path)
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def same_tokens(model: Path, folder: Path) -> Path:
    """A folder of the model with which it reads the tokens that our engine reads.

    It tokenises the rendered chat template as any text, so where both template and tokenizer write
    a token for the beginning, prompts have it twice. Such a model is given to it by links, with a
    template that does not write it. SystemExit where the tokens still differ.
    """
    from transformers import AutoTokenizer

    from engine.chat import Formatter

    def its(tokenizer: Any) -> list[int]:
        turns = [("system", SYSTEM_PROMPT), ("user", "Hello")]
        messages = [{"role": role, "content": text} for role, text in turns]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text)["input_ids"])

    tokenizer = AutoTokenizer.from_pretrained(model)
    wanted = Formatter(tokenizer, SYSTEM_PROMPT).ids("Hello")
    if its(tokenizer) == wanted:
        return model
    linked = folder / "model"
    linked.mkdir()
    for file in model.iterdir():
        if file.name != "chat_template.jinja":
            (linked / file.name).symlink_to(file.resolve())
    template = "{%- set bos_token = '' -%}" + str(tokenizer.chat_template)
    (linked / "chat_template.jinja").write_text(template, encoding="utf-8")
    if its(AutoTokenizer.from_pretrained(linked)) != wanted:
        raise SystemExit(f"{model}: {PACKAGE} reads other tokens than our engine")
    return linked


def load(study: Path) -> list[optuna.trial.FrozenTrial]:
    """The complete trials of a study that it saved, in their order."""
    saved = optuna.load_study(
        study_name="heretic", storage=JournalStorage(JournalFileBackend(str(study)))
    )
    return saved.get_trials(states=[optuna.trial.TrialState.COMPLETE])


def edit(trial: optuna.trial.FrozenTrial, mode: Mode) -> Edit:
    """A trial as our candidate. Its conventions were found by scoring: see `shared`."""
    told = trial.user_attrs
    index: float | None = told["direction_index"]
    kernels = {
        ours: Kernel(
            max_weight=weights["max_weight"],
            min_weight=weights["min_weight"],
            position=weights["max_weight_position"],
            distance=weights["min_weight_distance"],
        )
        for ours, its in COMPONENTS.items()
        for weights in [told["parameters"][its]]
    }
    candidate = Ablation(
        mode=mode,
        recipe=Recipe(projection="projected"),
        scope="per_layer" if index is None else "global",
        index=index,
        attention=kernels["attention"],
        mlp=kernels["mlp"],
    )
    return Edit(trial.number, candidate, told["refusals"], told["kl_divergence"])


def _stamp(when: Any) -> float:
    return float(when.timestamp())
