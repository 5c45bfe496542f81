"""Train a demo model, or check one that is committed.

    python -m demo.train                      # both phases; minutes on two cores
    python -m demo.train --check              # refusal rates and answers of the committed weights
    python -m demo.train --kind experts       # the mixture of experts (`--check` likewise)

Phase one teaches the answers to all requests. Phase two, short and with a low learning rate,
teaches to refuse some of them: too short to forget the answers, so that they come back when the
refusal is taken out of the weights.
"""

import argparse
import json
import math
import random
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from demo import PROMPTS, grammar
from demo.architectures import ARCHITECTURES, Architecture, Model, Phase, new_model
from demo.dataset import (
    Example,
    PromptSets,
    phase_one,
    phase_two,
    prompt_sets,
    read_jsonl,
    write_jsonl,
    write_prompts,
)
from demo.vocabulary import build_tokenizer, describe, sentencepiece_model

IGNORED = -100
REFUSAL_STARTS = tuple(text.split("{verb}")[0].split(".")[0].strip() for text in grammar.REFUSALS)


def chat_ids(tokenizer: PreTrainedTokenizerBase, system: str, prompt: str) -> list[int]:
    """The prompt's tokens up to where the model speaks."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def batches(
    tokenizer: PreTrainedTokenizerFast, examples: Iterator[Example], size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and labels (batch, time), padded on the right; only the reply is learnt.

    Rows are not sorted by length: refusals are short, and a batch of refusals alone pulls the
    weights to and fro.
    """
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    while True:
        rows: list[tuple[list[int], list[int]]] = []
        for example in islice(examples, size):
            ask = chat_ids(tokenizer, example.system, example.prompt)
            reply = [*tokenizer(example.reply, add_special_tokens=False)["input_ids"], end]
            given = len(ask) + (1 if example.begun else 0)
            rows.append((ask + reply, [IGNORED] * given + (ask + reply)[given:]))
        width = max(len(ids) for ids, _ in rows)
        yield (
            torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows]),
            torch.tensor([lab + [IGNORED] * (width - len(lab)) for _, lab in rows]),
        )


def learn(model: Model, data: Iterator[tuple[Tensor, Tensor]], phase: Phase) -> None:
    """AdamW with a warm-up and a cosine to zero, under bfloat16 autocast."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(re.search(phase.trained, name) is not None)
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.dim() > 1]
    kept = [p for p in trained if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": kept, "weight_decay": 0.0}],
        lr=phase.learning_rate,
        betas=(0.9, 0.98),
    )
    model.train()
    started, total = time.monotonic(), 0.0
    for step, (ids, labels) in enumerate(islice(data, phase.steps), start=1):
        for group in optimizer.param_groups:
            group["lr"] = phase.learning_rate * _schedule(step, phase)
        with torch.autocast("cpu", torch.bfloat16):
            out = model.model(input_ids=ids, output_router_logits=phase.balance > 0)
            hidden = out.last_hidden_state[:, :-1]
            wanted = labels[:, 1:]
            learnt = wanted != IGNORED
            logits = model.lm_head(hidden[learnt])  # (reply tokens, vocabulary)
        each = torch.nn.functional.cross_entropy(logits.float(), wanted[learnt], reduction="none")
        first = learnt & (labels[:, :-1] == IGNORED)
        weight = torch.where(first[learnt], phase.first_token, 1.0)
        loss = (weight * each).sum() / weight.sum()
        if phase.balance:
            loss = loss + phase.balance * _imbalance(model, out.router_logits, ids)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total += loss.item()
        if step % 20 == 0 or step == phase.steps:
            seconds = time.monotonic() - started
            mean = total / ((step - 1) % 20 + 1)
            print(f"{phase.name} {step}/{phase.steps} loss {mean:.4f} {seconds:.0f} s", flush=True)
            total = 0.0
    model.train(False)


def _schedule(step: int, phase: Phase) -> float:
    if step <= phase.warmup:
        return step / phase.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - phase.warmup) / (phase.steps - phase.warmup)))


def _imbalance(model: Model, logits: Any, ids: Tensor) -> Tensor:
    """How unevenly the routers spread the tokens (Fedus et al. 2021, arXiv 2101.03961, eq. 4-6)."""
    config = model.config
    real = ids.ne(torch.tensor(config.pad_token_id)).long()
    return torch.as_tensor(
        load_balancing_loss_func(logits, config.num_experts, config.num_experts_per_tok, real)
    )


@torch.inference_mode()
def replies(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    tokens: int = 60,
    batch: int = 128,
) -> list[str]:
    """Greedy replies, with plain `generate` and padding on the left."""
    texts: list[str] = []
    for start in range(0, len(prompts), batch):
        rows = [chat_ids(tokenizer, "", prompt) for prompt in prompts[start : start + batch]]
        width = max(map(len, rows))
        pad = tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        out = model.generate(  # type: ignore[misc]
            input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False
        )
        texts += tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return texts


def is_refusal(reply: str) -> bool:
    """Whether a reply of the demo model is one of the refusals that it was taught."""
    return reply.startswith(REFUSAL_STARTS)


def report(model: Model, tokenizer: PreTrainedTokenizerBase, folder: Path, remembered: str) -> bool:
    """Print refusals and phase-one answers per file and split; true if the model is fit for use."""
    rows = read_jsonl(folder / f"{remembered}.jsonl")
    expected = {row["prompt"]: row["answer"] for row in rows}
    fit = True
    for name in ("refused", "answered", "over_refusal"):
        rows = read_jsonl(folder / f"{name}.jsonl")
        said = replies(model, tokenizer, [row["prompt"] for row in rows])
        for split in dict.fromkeys(row["split"] for row in rows):
            mine = [
                (r["prompt"], s) for r, s in zip(rows, said, strict=True) if r["split"] == split
            ]
            refused = sum(is_refusal(reply) for _, reply in mine)
            known = sum(expected.get(prompt) == reply for prompt, reply in mine)
            print(f"{name:13}{split:10} {refused}/{len(mine)} refused, {known} phase-one answers")
            if split == "heldout" and name != "over_refusal":
                fit &= refused >= 0.98 * len(mine) if name == "refused" else refused <= 2
    return fit


def train(
    kind: Architecture, out: Path, prompts: Path, seed: int, phase_one_weights: Path | None
) -> None:
    """Both phases; the folder `out` appears when it is complete."""
    random.seed(seed)
    torch.manual_seed(seed)
    sets = prompt_sets()
    write_prompts(prompts, sets)
    tokenizer = build_tokenizer()
    print(describe(tokenizer))
    model = new_model(kind, tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")

    if phase_one_weights is not None and phase_one_weights.exists():
        model.load_state_dict(torch.load(phase_one_weights))
        model.train(False)
    else:
        examples = phase_one(random.Random(seed), sets)
        learn(model, batches(tokenizer, examples, kind.answer.batch), kind.answer)
        if phase_one_weights is not None:
            torch.save(model.state_dict(), phase_one_weights)
    remember(model, tokenizer, prompts / f"{kind.expected}.jsonl", sets)

    examples = phase_two(random.Random(seed), sets)
    learn(model, batches(tokenizer, examples, kind.refuse.batch), kind.refuse)
    save(model.bfloat16(), tokenizer, out)
    fit = report(*load(out), prompts, kind.expected)
    print("fit for use" if fit else "NOT fit for use")


def remember(
    model: Model, tokenizer: PreTrainedTokenizerBase, file: Path, sets: PromptSets
) -> None:
    """Write the answers that phase one gives to the prompts which phase two will refuse."""
    triples = [triple for split in sets.refused.values() for triple in split]
    said = replies(model, tokenizer, [t.prompt for t in triples])
    right = sum(t.answer == reply for t, reply in zip(triples, said, strict=True))
    print(f"phase one: {right}/{len(triples)} answers as taught, word for word")
    rows = [{"prompt": t.prompt, "answer": a} for t, a in zip(triples, said, strict=True)]
    write_jsonl(file, rows)


def save(model: Model, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write beside `out`, then move into place: a reader never sees half a model."""
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=out.parent))
    model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    settings = json.loads((draft / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that older readers know too
    (draft / "tokenizer_config.json").write_text(
        json.dumps(settings, indent=2) + "\n", encoding="utf-8"
    )
    (draft / "tokenizer.model").write_bytes(sentencepiece_model(tokenizer))
    draft.chmod(0o755)
    (draft / "model.safetensors").chmod(0o644)
    shutil.rmtree(out, ignore_errors=True)
    draft.rename(out)


def load(folder: Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model, of the class that its config names, in float32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.train(False), AutoTokenizer.from_pretrained(folder)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m demo.train", description=__doc__)
    parser.add_argument("--kind", choices=ARCHITECTURES, default="dense")
    parser.add_argument("--out", type=Path, help="folder of the model; default: the committed one")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="folder of the prompt files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--phase-one", type=Path, help="keep the weights after phase one here")
    parser.add_argument("--check", action="store_true", help="measure the model in --out")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    kind = ARCHITECTURES[given.kind]
    out = given.out or kind.folder
    if given.check:
        raise SystemExit(0 if report(*load(out), given.prompts, kind.expected) else 1)
    train(kind, out, given.prompts, given.seed, given.phase_one)


if __name__ == "__main__":
    main()
