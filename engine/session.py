"""What one engine process does between its start and its end: one prepared model, many requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from engine import export
from engine.compare import compare
from engine.decode import ORIGINAL, Row
from engine.edit import Edit
from engine.errors import EngineError
from engine.heap import return_blocks, reuse_blocks
from engine.lanes import Lanes
from engine.manifest import manifest
from engine.measure import measure
from engine.memory import release
from engine.preparation import Ready, prepare
from engine.report import Report
from engine.scorers import Asked, Found, Share, note, score, score_share
from engine.scorers.harness import benchmark
from engine.selection import select
from engine.texts import check_length, context_of
from jobs.spec.protocol import (
    Benchmark,
    Benchmarked,
    Compare,
    Compared,
    Export,
    Exported,
    ExportedFile,
    More,
    Prepare,
    Prepared,
    Request,
    Respond,
    Responses,
    Score,
    Scored,
    ScoredBatch,
    Select,
    Selected,
    Stop,
)
from jobs.spec.scores import Role, Scores


def nothing() -> list[More]:
    """No candidates are added."""
    return []


class Session:
    """Answers the protocol's requests.

    session = Session()
    session.handle(Prepare(...), report)        # Prepared
    session.handle(Score(...), report)          # ScoredBatch; a second Prepare is needed only
    session.handle(Prepare(...), report)        # if it differs from the first
    """

    def __init__(self) -> None:
        self._ready: Ready | None = None
        self._lanes: Lanes[Share, Found] | None = None

    def handle(
        self, request: Request, report: Report, added: Callable[[], list[More]] = nothing
    ) -> Prepared | ScoredBatch | Selected | Compared | Benchmarked | Responses | Exported:
        """The result of one request, to which candidates are added if it scores some. Raises
        EngineError."""
        if isinstance(request, Score):
            if not self.ready.ran_out:
                reuse_blocks()
        else:
            self.close_lanes()
            return_blocks()
        match request:
            case Prepare():
                return self.prepare(request, report)
            case Score():
                return self.score(request, report, added)
            case Respond():
                return self.respond(request, report)
            case Export():
                return self.export(request, report)
            case Stop():
                raise EngineError("stopped", "the session ends")
            case More():
                raise EngineError("bad_request", f"of: no request {request.of} runs")
            case Compare():
                return self.compare(request, report)
            case Benchmark():
                return self.benchmark(request, report)
            case Select():
                return select(self.ready, request, report)

    @property
    def ready(self) -> Ready:
        """The prepared model. Raises `bad_request` before the first `prepare`."""
        if self._ready is None:
            raise EngineError(
                "bad_request", "no model is prepared", "Send a prepare request first."
            )
        return self._ready

    def prepare(self, request: Prepare, report: Report) -> Prepared:
        """Prepare a model, or say again what was found if it is prepared already."""
        if self._ready is not None and self._ready.request == request:
            report.log("this model is prepared already")
            return self._ready.prepared
        if self._ready is not None:
            self.close_lanes()  # which have copies of this model
            self._ready.close()
            self._ready = None  # the memory goes to the next model
            release()
        self._ready = prepare(request, report)
        return self._ready.prepared

    def score(
        self, request: Score, report: Report, added: Callable[[], list[More]] = nothing
    ) -> ScoredBatch:
        """Score candidates, and those that are added before the last of them is scored; each is
        sent as a partial as soon as it is known."""
        ready = self.ready
        role = ready.roles.get(request.role)
        if role is None:
            raise EngineError(
                "bad_request",
                f"role: this job has no prompts for {request.role}",
                "Choose a prompt set for that role when submitting the job.",
            )
        new = request.max_new_tokens or ready.request.max_new_tokens
        longest = max(role.harmful, key=len)
        check_length("the longest prompt", longest, new, context_of(ready.loaded.model))
        edits = self._edits(request, report)
        if not edits:
            return ScoredBatch(scored=[])
        own: dict[int, Scored] = {}

        def send(index: int, scored: Scored) -> None:
            report.partial(index, scored=scored)
            if index < len(edits):
                own[index] = scored

        def more() -> list[tuple[Sequence[Edit], Asked]]:
            return [
                (self._edits(one, report), replace(asked, finished=one.finished)) for one in added()
            ]

        ready.decoder.reserve(len(longest), new)
        several = request.joined or len(edits) > 1 or self._lanes is not None
        asked = Asked(
            new, not request.whole, request.kl_multi, request.scorers, ready.baseline.further,
            request.finished,
        )  # fmt: skip
        score(
            ready.decoder, role, edits, ready.refusals, asked, report, send,
            self._beside() if several else None, more,
        )  # fmt: skip
        return ScoredBatch(scored=[own[index] for index in range(len(edits))])

    def _edits(self, request: Score | More, report: Report) -> list[Edit]:
        """What its candidates do to the model."""
        return [self.ready.builder.build(candidate, report) for candidate in request.candidates]

    def _beside(self) -> Lanes[Share, Found] | None:
        """Processes that score side by side, until something else is asked for; None where the
        model or the machine has no use for them."""
        ready, count = self.ready, self.ready.decoder.lanes
        if count < 2:
            return None
        if self._lanes is None or not self._lanes.alive:

            def work(share: Share, report: Report) -> Found:
                ready.decoder.sharing = count
                return score_share(
                    ready.decoder, ready.roles[share.role], share, ready.refusals, report
                )

            decoder = ready.decoder
            self._lanes = Lanes(count, work, partial(note, decoder), decoder.study, decoder.keep)
        return self._lanes

    def close_lanes(self) -> None:
        """End the processes that score side by side."""
        if self._lanes is not None:
            self._lanes.close()
            self._lanes = None

    def respond(self, request: Respond, report: Report) -> Responses:
        """Whole answers, streamed: each partial is a piece that follows the pieces before it."""
        ready = self.ready
        inputs = [ready.formatter.ids(prompt) for prompt in request.prompts]
        if not inputs:
            return Responses(texts=[])
        for number, ids in enumerate(inputs, start=1):
            name, context = f"prompt {number}", context_of(ready.loaded.model)
            check_length(name, ids, request.max_new_tokens, context)
        edits = (
            [] if request.candidate is None else [ready.builder.build(request.candidate, report)]
        )
        edit = 0 if edits else ORIGINAL
        sent = [""] * len(inputs)

        def send(index: int, text: str) -> None:
            if len(text) > len(sent[index]) and text.startswith(sent[index]):
                report.partial(index, text=text[len(sent[index]) :])
                sent[index] = text

        ready.decoder.reserve(max(map(len, inputs)), request.max_new_tokens)
        answers = ready.decoder.answers(
            [Row(ids, edit) for ids in inputs], edits, request.max_new_tokens, report, "answers",
            on_text=send,
        )  # fmt: skip
        return Responses(texts=[answer.text for answer in answers])

    def compare(self, request: Compare, report: Report) -> Compared:
        """Score another model against the prepared one; nothing of it stays in memory."""
        try:
            return compare(self.ready, request, report)
        finally:
            release()

    def benchmark(self, request: Benchmark, report: Report) -> Benchmarked:
        """Run harness tasks on a candidate, or on the original."""
        ready = self.ready
        edit = None if request.candidate is None else ready.builder.build(request.candidate, report)
        with ready.decoder.edited(edit):
            return benchmark(
                ready.decoder, request.tasks, request.limit, request.task_folder, report,
                request.planned,
            )  # fmt: skip

    def export(self, request: Export, report: Report) -> Exported:
        """Write an artifact; with `measure`, load it from disk and score it before the card."""
        ready = self.ready

        def scores(folder: Path) -> dict[Role, Scores]:
            return measure(folder, ready, request, report)

        def describe(files: list[ExportedFile], measured: dict[Role, Scores]) -> bytes:
            written = manifest(ready, request, files, measured, report)
            return (written.model_dump_json(indent=2) + "\n").encode()

        changes = ready.builder.changes(request.candidate, report)
        return export.write(
            ready.loaded, ready.anatomy, changes, request, report,
            scores if request.measure else None, describe,
            ready.builder.samples.lowered(request.candidate),
        )  # fmt: skip
