"""Fixtures of the model side: tiny random models in memory and on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from demo.vocabulary import build_tokenizer
from engine.directions import Directions, measure
from jobs.spec.candidate import Recipe
from jobs.spec.protocol import Prepare, PromptTexts
from tests.engine.families import DENSE, tiny

torch.set_num_threads(1)

Save = Callable[..., Path]


@pytest.fixture(scope="session")
def save(tmp_path_factory: pytest.TempPathFactory) -> Save:
    """save("llama", max_shard_size="100KB", hidden_size=64): a model and a tokenizer on disk."""

    def write(
        family: str, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB", **more: Any
    ) -> Path:
        folder = tmp_path_factory.mktemp(family)
        model = tiny(family, DENSE[family], **more).to(dtype)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        build_tokenizer().save_pretrained(folder)
        return folder

    return write


def request(folder: Path, **more: Any) -> Prepare:
    """A prepare request for a folder on the CPU; the model side reads no prompts."""
    none: list[str] = []
    roles = {name: none for name in PromptTexts.model_fields}
    fields: dict[str, Any] = {
        "model": "owner/tiny",
        "path": str(folder),
        "device": "cpu",
        "prompts": PromptTexts(**roles),
    }
    return Prepare.model_validate({**fields, **more})


RECIPES = (Recipe(), Recipe(projection="none"))


def random_directions(
    layers: int, hidden: int, seed: int = 7, recipes: Sequence[Recipe] = RECIPES
) -> Directions:
    """Directions of random states, with a harmless mean that matters."""
    torch.manual_seed(seed)
    shape = (6, layers + 1, hidden)
    harmful, harmless = torch.randn(shape) + 0.5, torch.randn(shape) + 1
    return measure({-1: harmful}, {-1: harmless}, recipes)
