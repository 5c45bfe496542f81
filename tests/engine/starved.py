"""A process that scores the same candidates twice: freely, and with little address space left.

    python -m tests.engine.starved FOLDER SPARE_MB

FOLDER receives a small model with a wide vocabulary. Prints JSON, the free run first: both results,
how often each candidate's score was sent, and the largest batch that was left at the end.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from demo.vocabulary import build_tokenizer
from engine.heap import return_blocks
from engine.report import Silent
from engine.session import Session
from jobs.spec.candidate import constant, single_pass
from jobs.spec.protocol import Prepare, PromptTexts, Score, Scored, ScoredBatch

PROMPTS, VOCABULARY = 48, 24_000


class Counting(Silent):
    """Notes which candidates' scores were sent."""

    def __init__(self) -> None:
        self.sent: list[int] = []

    def partial(self, index: int, text: str = "", scored: Scored | None = None) -> None:
        self.sent.append(index)


def build(folder: Path) -> None:
    """A random Llama of 3 layers whose logits outweigh it."""
    torch.manual_seed(1)
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, head_dim=64, initializer_range=0.3,
        tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def request(folder: Path) -> Prepare:
    """A job on that model with made-up prompts, long enough for a cache that counts."""
    roles = [f"{split}_{side}" for split in ("direction", "search", "heldout")
             for side in ("harmful", "harmless")]  # fmt: skip
    counts = {role: PROMPTS if role.startswith("search") else 4 for role in roles}
    texts = {
        role: [f"How do I mend a {role} {'lamp ' * (n % 5)}{n}?" for n in range(count)]
        for role, count in counts.items()
    }
    return Prepare(
        model="starved", path=str(folder), device="cpu", dtype="float32", max_new_tokens=12,
        prompts=PromptTexts.model_validate(texts), system_prompt="Be plain. " * 60,
    )  # fmt: skip


def scored(folder: Path, spare: int | None) -> tuple[list[Any], list[int], int | None]:
    """What a new engine finds for two candidates, whose scores it sent, and its largest batch.

    spare    bytes of address space that scoring may take; None: all there is
    """
    session, report = Session(), Counting()
    session.handle(request(folder), Silent())
    return_blocks()
    if spare is not None:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + spare, resource.RLIM_INFINITY))
    half = single_pass(3).model_copy(update={"mlp": constant(0.5)})
    found = session.handle(Score(candidates=[single_pass(3), half]), report)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert isinstance(found, ScoredBatch) and session._ready is not None
    results = [one.model_dump(mode="json") for one in found.scored]
    return results, report.sent, session._ready.decoder.limit


def main() -> None:
    """Score within the limit, then freely: what a search has freed, it keeps and uses again."""
    folder, spare = Path(sys.argv[1]), int(sys.argv[2]) << 20
    torch.set_num_threads(1)
    return_blocks()
    build(folder)
    starved, free = scored(folder, spare), scored(folder, None)
    results, sent, limits = zip(free, starved, strict=True)
    print(json.dumps({"results": results, "sent": sent, "limits": limits}))


if __name__ == "__main__":
    main()
