"""A job's held-out answers before its judge, trial by trial."""

from __future__ import annotations

from functools import partial

from sqlalchemy.orm import Session

from jobs import models, queue, trials
from jobs.settings import Judge
from jobs.spec.protocol import NOTHING, Prepare, PromptTexts, Respond, Responses
from jobs.spec.scores import Role, Value
from jobs.tables import Job
from worker import judge as asking
from worker.problems import EngineDied, EngineError
from worker.run import Run

ROLE: Role = "heldout"


def judge(run: Run, numbers: list[int]) -> None:
    """Let the job's judge read the held-out answers of these trials.

    -1 is the original, -2 the model of a job that searches nothing.

    A judge that cannot be reached or loaded costs the job its verdicts, not its front: the log says
    so. Nor does it wait for a mend, which is the operator's, not the job's owner's.
    """
    name = run.spec.judge or ""
    found = run.station.settings.judges.get(name)
    if found is None:
        run.log.line("warning", f"This worker knows no judge {name!r} (NULLSPACE_JUDGES).")
        return
    todo = run.lease.write(partial(_unjudged, run, numbers))
    for done, (number, questions) in enumerate(todo):
        run.lease.check()
        run.progress("judging answers", done, len(todo), f"{len(questions)} answers")
        try:
            replies = _replies(run, found, questions)
        except EngineDied:
            raise  # tried once more, as every task is
        except EngineError as refusal:
            run.station.stop_engine()
            said = f"{refusal.message} {refusal.mend}".strip()
            run.log.line("warning", f"The judge {name} could not be asked: {said}")
            return
        verdicts = [asking.verdict(reply) for reply in replies]
        value = asking.value(verdicts)
        unclear = sum(verdict is None for verdict in verdicts)
        if unclear:
            run.log.line(
                "warning",
                f"The judge {name} gave no verdict on {unclear} of {len(verdicts)} answers.",
            )
        if value is None:
            return  # it is away or speaks otherwise: the next trial would fare no better
        run.write(partial(_store, run, number, value))
    run.progress("judging answers", len(todo), len(todo))


def _replies(run: Run, judge: Judge, questions: list[str]) -> list[str]:
    if judge.url is not None:
        return asking.ask(judge, questions, run.lease.check)
    path = models.local_path(judge.model, run.station.settings)
    run.prepare_for(
        Prepare(
            model=judge.model,
            path=None if path is None else str(path),
            purpose="respond",
            quantization=judge.quantization,
            device=run.spec.device,
            prompts=NOTHING,
        )
    )
    request = Respond(prompts=questions, max_new_tokens=asking.ANSWER_TOKENS)
    return Responses.model_validate(run.ask(request, on_progress=lambda answer: None).value).texts


def _unjudged(run: Run, numbers: list[int], session: Session) -> list[tuple[int, list[str]]]:
    """The questions about each trial's answers; without those that have been judged."""
    job = session.get_one(Job, run.job.id)
    prompts = PromptTexts.model_validate(job.prompts).heldout_harmful
    found = []
    for number in dict.fromkeys(numbers):
        if "judge" in trials.values(session, job, number, ROLE):
            continue
        outcomes = trials.responses(session, job.id, number).get(ROLE, [])
        questions = [
            asking.question(prompt, outcome.text)
            for prompt, outcome in zip(prompts, outcomes, strict=False)
        ]
        if questions:
            found.append((number, questions))
    return found


def _store(run: Run, number: int, value: Value, session: Session) -> None:
    trials.store_values(session, run.task, run.token, number, ROLE, {"judge": value})
    queue.fence(session, run.task.id, run.token).crashes = 0
