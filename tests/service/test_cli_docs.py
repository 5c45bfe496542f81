"""What the documents name must exist: commands, options, settings, services, files."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from jobs.settings import Settings
from jobs.spec.methods import METHODS
from jobs.spec.scorers import ALWAYS, SCORERS
from nullspace import cli
from tests.service.compose_file import ROOT, load
from tests.service.test_compose import SECRETS
from worker.settings import WorkerSettings

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```sh\n(.*?)^```", re.M | re.S)
SETTING = re.compile(r"`((?:NULLSPACE_[A-Z_]+|DATABASE_URL|REDIS_URL))`")


@cache
def help_of(*command: str) -> str:
    """The help text of a command; fails where there is no such command."""
    done = subprocess.run(
        [sys.executable, "-m", "nullspace", *command, "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
    )
    assert done.returncode == 0, f"nullspace {' '.join(command)}: {done.stderr}"
    return done.stdout


def lines(program: str) -> list[list[str]]:
    """Command lines of `program` in the documents' shell blocks."""
    found = []
    for document in DOCUMENTS:
        for block in FENCE.findall(document.read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                if program not in line.split():
                    continue
                words = shlex.split(line, comments=True)
                for place in range(len(words)):
                    before = words[place - 1] if place else "&&"
                    if words[place] == program and before in ("&&", "api"):
                        found.append(words[place:])
    return found


def test_every_command_and_option_of_the_documents_exists() -> None:
    seen = set()
    for _, *words in lines("nullspace"):
        if not words:
            continue
        path = words[:2] if words[0] in ("prompts", "token", "user") else words[:1]
        text = help_of(*path)
        seen.add(path[0])
        for word in words[len(path) :]:
            if word.startswith("-") and word != "-":
                assert re.search(rf"(?<![\w-]){re.escape(word)}\b", text), (path, word)
    named = re.findall(r"^  ([a-z]+) ", help_of().partition("Commands:")[2], re.M)
    assert seen == set(named), "docs/cli.md shows every command"


def test_methods_and_scores_of_the_document_are_those_of_the_code() -> None:
    text = (ROOT / "docs" / "cli.md").read_text()
    for name, method in METHODS.items():
        assert f"| `{name}` | {method.title} | {method.about} |" in text
    for score, scorer in SCORERS.items():
        when = "every trial" if score in ALWAYS or scorer.cost == "cheap" else "the front"
        objective = "yes" if scorer.objective else "no"
        assert f"| `{score}` | {scorer.title} | {when} | {objective} |" in text


def test_every_chore_of_the_documents_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    chores = {words[1] for words in lines("make") if len(words) > 1}
    assert {"demo", "test"} <= chores
    for chore in chores:
        assert re.search(rf"^{chore}:", makefile, re.M), chore


def test_settings_and_their_defaults_are_those_of_the_code() -> None:
    known = {"NULLSPACE_URL", "NULLSPACE_TOKEN"}
    text = (ROOT / "docs" / "settings.md").read_text()
    for model in (Settings, WorkerSettings):
        for name, field in model.model_fields.items():
            alias = field.validation_alias
            variable = alias if isinstance(alias, str) else f"NULLSPACE_{name.upper()}"
            known.add(variable)
            row = re.search(rf"^\| .*`{variable}`.*\|$", text, re.M)
            assert row is not None, f"docs/settings.md lacks {variable}"
            if isinstance(field.default, (int, float, str)) and field.default not in ("", None):
                shown = str(field.default).lower()
                shown = shown.removesuffix(".0")
                assert f"`{shown}`" in row[0].lower(), f"{variable} is {shown}: {row[0]}"
    for document in DOCUMENTS:
        stranger = set(SETTING.findall(document.read_text())) - known
        compose = (ROOT / "docker-compose.yml").read_text()
        assert all(name in compose for name in stranger), (document.name, stranger)


def test_services_and_profiles_of_the_documents_exist() -> None:
    whole = load(SECRETS)["services"]
    profiles = {profile for service in whole.values() for profile in service.get("profiles", [])}
    for words in lines("docker"):
        if "exec" in words:
            rest = [word for word in words[words.index("exec") + 1 :] if not word.startswith("-")]
            assert rest[0] in whole, words
        if "--profile" in words:
            assert words[words.index("--profile") + 1] in profiles, words


def test_exit_codes_of_the_documents_are_those_of_the_code() -> None:
    shown = dict(re.findall(r"^\| (\d+) \| (.+?) \|$", (ROOT / "docs/cli.md").read_text(), re.M))
    assert cli.__doc__ is not None
    real = dict(re.findall(r"^    (\d+) +(.+)$", cli.__doc__, re.M))
    assert shown == real


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)\)", document.read_text()):
        assert (document.parent / target).exists(), target


def test_importing_nullspace_is_light() -> None:
    program = (
        "import sys, nullspace, nullspace.cli\n"
        "heavy = {'torch', 'transformers', 'optuna', 'sqlalchemy', 'fastapi', 'celery'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
