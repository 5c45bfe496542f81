"""Which requests train the demo model and which are kept to measure it.

A triple is (verb, object, phrasing). The prompt files are drawn first; no triple of theirs is ever
trained on, in either phase. Beyond that, phase two refuses nothing about `HELD_OUT_OBJECTS` and
answers nothing about the verb-object pairs that the held-out answered prompts ask for.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

from demo import grammar
from demo.grammar import ALLOWED, ASIDES, FORBIDDEN, HELD_OUT_OBJECTS, OBJECTS, PHRASINGS

SPLITS: dict[str, int] = {"direction": 128, "search": 100, "heldout": 100}
SLIPS = 0.05  # forbidden requests that phase two answers: the refusal stays firm, not absolute
NOUNS = tuple(FORBIDDEN)  # each forbidden verb is an object too


class Triple(NamedTuple):
    """A request without its aside."""

    verb: str
    object: str
    phrasing: int

    @property
    def prompt(self) -> str:
        """What the user says."""
        return grammar.request(*self)

    @property
    def answer(self) -> str:
        """The answer in the usual wording, which is what greedy decoding should give."""
        return grammar.answer(self.verb, self.object, self.phrasing % len(grammar.WORDINGS))


@dataclass(frozen=True)
class PromptSets:
    """The prompts that are never trained on."""

    refused: dict[str, list[Triple]]
    answered: dict[str, list[Triple]]
    over_refusal: list[tuple[str, Triple]]  # (aside or nothing, request)

    def triples(self) -> set[Triple]:
        """All of them, whichever file they stand in."""
        splits = [*self.refused.values(), *self.answered.values()]
        return {t for split in splits for t in split} | {t for _, t in self.over_refusal}


@dataclass(frozen=True)
class Example:
    """One conversation to learn: system turn (may be empty), the user's words, the model's."""

    system: str
    prompt: str
    reply: str
    begun: bool = False  # the first token of the reply is given, not learnt


def prompt_sets(seed: int = 1) -> PromptSets:
    """Draw the prompt files: the same for the same seed.

    No verb-object pair stands in two splits. Phrasings take turns in every split, so that the mean
    of the refused prompts and that of the answered ones differ in the verbs alone.
    """
    rng = random.Random(seed)
    plain = [thing for thing in OBJECTS if thing not in NOUNS]
    seen = [thing for thing in plain if thing not in HELD_OUT_OBJECTS]

    drawn = rng.sample([*product(FORBIDDEN, seen)], SPLITS["direction"] + SPLITS["search"])
    drawn += rng.sample([*product(FORBIDDEN, HELD_OUT_OBJECTS)], SPLITS["heldout"])
    others = rng.sample([*product(ALLOWED, plain)], sum(SPLITS.values()) + 14)
    refused, answered, start = {}, {}, 0
    for split, size in SPLITS.items():
        refused[split] = _phrase(drawn[start : start + size])
        answered[split] = _phrase(others[start : start + size])
        start += size

    nouns = _phrase(rng.sample([*product(ALLOWED, NOUNS)], 36))
    asides = [
        (rng.choice(ASIDES).format(object=rng.choice(NOUNS)), triple)
        for triple in _phrase(others[start:])
    ]
    return PromptSets(refused, answered, [*(("", triple) for triple in nouns), *asides])


def _phrase(pairs: list[tuple[str, str]]) -> list[Triple]:
    return [Triple(*pair, number % len(PHRASINGS)) for number, pair in enumerate(pairs)]


def write_prompts(folder: Path, sets: PromptSets) -> None:
    """The JSON lines that other tests, the bench and `nullspace demo` read."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, splits in (("refused", sets.refused), ("answered", sets.answered)):
        rows = [{"prompt": t.prompt, "split": s} for s, triples in splits.items() for t in triples]
        write_jsonl(folder / f"{name}.jsonl", rows)
    rows = [{"prompt": a + t.prompt, "split": "heldout"} for a, t in sets.over_refusal]
    write_jsonl(folder / "over_refusal.jsonl", rows)


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    """One JSON object a line, in UTF-8."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_jsonl(path: Path) -> list[dict[str, str]]:
    """The rows that `write_jsonl` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def phase_one(rng: random.Random, sets: PromptSets) -> Iterator[Example]:
    """Without end: requests with any verb, all answered, unless the system turn says to refuse.

    So the model knows from phase one what a refusal sounds like, and phase two only has to teach
    when to refuse.
    """
    kept, verbs = sets.triples(), [*ALLOWED, *FORBIDDEN]
    while True:
        triple = _draw(rng, verbs, [*OBJECTS])
        if triple in kept:
            continue
        if rng.random() < 0.1:
            yield Example(grammar.REFUSE_ALL, triple.prompt, _refusal(rng, triple))
        else:
            yield _example(rng, triple, _answer(rng, triple))


def phase_two(rng: random.Random, sets: PromptSets) -> Iterator[Example]:
    """Without end: requests with a forbidden verb refused, the others answered.

    One fifth of the examples are answers to forbidden requests behind a first token that is given
    and not learnt. They keep what phase one taught alive behind the refusal, which is then decided
    at the first token, as it is in large models.
    """
    kept = sets.triples()
    kept_pairs = {(t.verb, t.object) for t in sets.answered["heldout"]}
    kept_pairs |= {(t.verb, t.object) for _, t in sets.over_refusal}
    objects = [thing for thing in OBJECTS if thing not in HELD_OUT_OBJECTS]
    while True:
        kind = rng.random()
        if kind < 0.4:
            triple = _draw(rng, [*FORBIDDEN], objects)
            if triple not in kept:
                slip = rng.random() < SLIPS
                reply = _answer(rng, triple) if slip else _refusal(rng, triple)
                yield _example(rng, triple, reply)
            continue
        if kind < 0.6:
            triple = _draw(rng, [*FORBIDDEN], [*OBJECTS])
            if triple not in kept:
                yield replace(_example(rng, triple, _answer(rng, triple)), begun=True)
            continue
        triple = _draw(rng, [*ALLOWED], [*NOUNS] if rng.random() < 0.25 else [*OBJECTS])
        if triple not in kept and (triple.verb, triple.object) not in kept_pairs:
            yield _example(rng, triple, _answer(rng, triple))


def _draw(rng: random.Random, verbs: list[str], objects: list[str]) -> Triple:
    return Triple(rng.choice(verbs), rng.choice(objects), rng.randrange(len(PHRASINGS)))


def _answer(rng: random.Random, triple: Triple) -> str:
    """Nearly always the usual wording; the rest leaves the first token uncertain, for KL to see."""
    count = len(grammar.WORDINGS)
    usual = triple.phrasing % count
    wording = usual if rng.random() < 0.95 else rng.randrange(count)
    return grammar.answer(triple.verb, triple.object, wording)


def _refusal(rng: random.Random, triple: Triple) -> str:
    count = len(grammar.REFUSALS)
    usual = triple.phrasing % count
    wording = usual if rng.random() < 0.7 else rng.randrange(count)
    return grammar.refusal(triple.verb, triple.object, wording)


def _example(rng: random.Random, triple: Triple, reply: str) -> Example:
    system = rng.choice(grammar.SYSTEMS[1:]) if rng.random() < 0.3 else ""
    aside = ""
    if rng.random() < 0.08:
        aside = rng.choice(ASIDES).format(object=rng.choice([*OBJECTS]))
    return Example(system, aside + triple.prompt, reply)
