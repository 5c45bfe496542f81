"""The demo model: a small Llama that refuses on purpose. Nothing here loads torch.

Importing `demo` only tells where the committed files are::

    from demo import MODEL, prompt_file

    AutoModelForCausalLM.from_pretrained(MODEL)
    prompt_file("refused")      # .../demo/prompts/refused.jsonl
"""

from pathlib import Path

MODEL: Path = Path(__file__).parent / "model"
EXPERTS: Path = Path(__file__).parent / "experts"  # a mixture of experts that refuses the same
PROMPTS: Path = Path(__file__).parent / "prompts"

__all__ = ["EXPERTS", "MODEL", "PROMPTS", "prompt_file"]


def prompt_file(name: str) -> Path:
    """The committed prompt file: refused, answered, over_refusal, expected or expected_experts."""
    path = PROMPTS / f"{name}.jsonl"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in PROMPTS.glob("*.jsonl")))
        raise FileNotFoundError(f"no demo prompt file {name!r}; there are: {known}")
    return path
