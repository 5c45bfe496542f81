"""What does each lever of speed bring, alone and with the others?

    python -m bench.levers [--trials 40] [--seed 0] [--model PATH] [--threads 2]

The same candidates, those that a search asks for, are scored by the engine with one lever after the
other, and at last by all. The first row is the slow twin: `generate` of transformers for the
answers, whole, and the same forward for the divergence. All must give the same refusals and
divergences; the script ends with an error where they do not.

Prints a Markdown table: processor seconds a trial (of one thread: the duration on a quiet machine),
forwards, and tokens that went through a whole model (a block passed by one of L is 1/L of it). A
second one, of seconds a trial: what more threads bring to one candidate after the other, and to
several side by side, with all levers.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench.search import prepare, scored, study_of
from demo import MODEL
from engine.drafts import Drafts
from engine.lower import Lower
from engine.report import Silent
from engine.scorers.kl import divergences
from engine.session import Session
from jobs.spec.candidate import Candidate
from jobs.spec.protocol import Score, ScoredBatch
from worker.space import candidate_from, space

Found = tuple[int, float]  # refusals, KL at the first token
NEAR = 1e-3  # relative difference of two divergences


@dataclass
class Work:
    """What was computed: forwards, and tokens through each attention writer."""

    forwards: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Levers:
    """Which levers are used.

    early    answers stop when they are decided
    drafts   earlier answers are verified (`engine.drafts`)
    shares   what all prompts begin with is read once, the rest apart (`engine.shared`)
    lower    the original's states below the edit are kept (`engine.lower`)
    ending   the end of the last block is for the last tokens alone (`engine.ending`)
    """

    name: str
    early: bool = False
    drafts: bool = False
    shares: bool = False
    lower: bool = False
    ending: bool = False


TABLE = (
    Levers("decode loop"),
    Levers("stop when decided", early=True),
    Levers("the ending", ending=True),
    Levers("drafts", drafts=True),
    Levers("drafts, shared beginnings", drafts=True, shares=True),
    Levers("drafts, kept states", drafts=True, lower=True),
    Levers("all", early=True, drafts=True, shares=True, lower=True, ending=True),
)
DTYPES = ("float32", "bfloat16")


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    session = Session()
    prepare(session, path=given.model, dtype="float32")
    candidates = asked(session, given.trials, given.seed)
    print("| levers | seconds a trial | against `generate` | forwards | tokens |")
    print("|---|---|---|---|---|")
    with using(session, Levers("none")):
        truth, slow, work = timed(session, lambda one: generated(session, one), candidates)
    print(_line("`generate`", slow, slow, work, given.trials), flush=True)
    for levers in TABLE:
        with using(session, levers):
            score = partial(by_engine, session, levers.early)
            found, seconds, work = timed(session, score, candidates)
        print(_line(levers.name, seconds, slow, work, given.trials), flush=True)
        if not all(_same(one, other) for one, other in zip(found, truth, strict=True)):
            sys.exit(f"{levers.name}: other scores than those of generate")
    print(f"\n| dtype | one thread | {given.threads} threads | {given.threads} threads, lanes |")
    print("|---|---|---|---|")
    for dtype in DTYPES:
        cells = [f"{span:.3f}" for span in spans(given.model, dtype, candidates, given.threads)]
        print(f"| {dtype} | {' | '.join(cells)} |", flush=True)


def spans(model: str, dtype: str, candidates: list[Candidate], threads: int) -> list[float]:
    """Seconds a trial: of one thread, of several threads, and of as many as they may have lanes."""
    found = []
    for count, together in ((1, 1), (threads, 1), (threads, len(candidates))):
        torch.set_num_threads(count)
        session = Session()
        prepare(session, path=model, dtype=dtype)
        began = time.monotonic()
        for at in range(0, len(candidates), together):
            some = candidates[at : at + together]
            session.handle(Score(candidates=some, kl_multi=False), Silent())
        found.append((time.monotonic() - began) / len(candidates))
        session.close_lanes()
    return found


def asked(session: Session, trials: int, seed: int) -> list[Candidate]:
    """The candidates that a search asks for, random ones first."""
    layers = session.ready.anatomy.layers
    study = study_of(trials, seed)
    found: list[Candidate] = []
    for _ in range(trials):
        trial = study.ask(space(layers, "mpoa"))
        found.append(candidate_from(trial.params, layers, "mpoa"))
        scores = scored(session, found[-1]).scores
        study.tell(trial, [float(scores.refusals), float(scores.kl_first or 0)])
    return found


def by_engine(session: Session, early: bool, candidate: Candidate) -> Found:
    """Scores by the engine."""
    request = Score(candidates=[candidate], whole=not early, kl_multi=False)
    result = session.handle(request, Silent())
    assert isinstance(result, ScoredBatch)
    scores = result.scored[0].scores
    return scores.refusals, float(scores.kl_first or 0)


def generated(session: Session, candidate: Candidate) -> Found:
    """Scores by `generate`, all prompts in one batch, and one forward of the harmless ones."""
    ready = session.ready
    decoder, role = ready.decoder, ready.roles["search"]
    assert role.first is not None
    edit = ready.builder.build(candidate)
    with decoder.edited(edit), torch.inference_mode():
        ids, mask = decoder.padded(role.harmful)
        made = ready.loaded.model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False,
            max_new_tokens=ready.request.max_new_tokens, pad_token_id=decoder.pad,
        )  # fmt: skip
    texts = decoder.texts(made[:, ids.shape[1] :].tolist())
    (moved,) = divergences(decoder, role.first, [edit], Silent(), "divergence")
    return sum(map(ready.refusals.is_refusal, texts)), moved.first


@contextmanager
def using(session: Session, levers: Levers) -> Iterator[None]:
    """Within the block the engine has these levers, and remembers nothing from before."""
    decoder = session.ready.decoder
    saved = decoder.drafts, decoder.shares, decoder.lower, decoder.ending
    decoder.drafts = Drafts() if levers.drafts else None
    decoder.shares = levers.shares
    decoder.lower = Lower(session.ready.anatomy, 0) if levers.lower else None
    decoder.ending = saved[-1] if levers.ending else None
    try:
        yield
    finally:
        decoder.drafts, decoder.shares, decoder.lower, decoder.ending = saved


def timed(
    session: Session, score: Callable[[Candidate], Found], candidates: list[Candidate]
) -> tuple[list[Found], float, Work]:
    """The scores of all candidates, the processor seconds, and what was computed."""
    work, writers = Work(), [w for w in session.ready.anatomy.writers if w.component == "attention"]

    def count(module: Any, args: Any, output: Any) -> None:
        work.tokens += args[0].numel() // args[0].shape[-1]

    def run(module: Any, args: Any, output: Any) -> None:
        work.forwards += 1

    hooks = [writer.module.register_forward_hook(count) for writer in writers]
    hooks.append(session.ready.loaded.model.register_forward_hook(run))
    began = time.process_time()
    try:
        found = [score(candidate) for candidate in candidates]
    finally:
        for hook in hooks:
            hook.remove()
    seconds = time.process_time() - began
    work.tokens //= len(writers)
    return found, seconds, work


def _same(one: Found, other: Found) -> bool:
    pairs = zip(one[1:], other[1:], strict=True)
    return one[0] == other[0] and all(abs(a - b) <= NEAR * max(a, b) + 1e-7 for a, b in pairs)


def _line(name: str, seconds: float, slow: float, work: Work, trials: int) -> str:
    return (
        f"| {name} | {seconds / trials:.3f} | {slow / seconds:.2f} × "
        f"| {work.forwards / trials:.1f} | {work.tokens / trials:.0f} |"
    )


if __name__ == "__main__":
    main()
