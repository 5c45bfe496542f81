"""The chat task: answers of a trial's model, or of the job's own, to a few prompts."""

from __future__ import annotations

from sqlalchemy.orm import Session

from jobs import events, queue, trials
from jobs.spec.candidate import parse
from jobs.spec.protocol import Respond, Responses
from worker.run import Run


def chat(run: Run) -> None:
    """Payload {"prompts", "number": int or None, "max_new_tokens"}; the answers go to an event."""
    payload = run.task.payload
    number, prompts = payload.get("number"), list(payload["prompts"])
    candidate = None
    if number is not None:
        row = run.lease.write(lambda session: trials.get(session, run.job.id, int(number)))
        candidate = parse(row.candidate)
    if run.spec.kind == "abliterate":
        run.prepare()
    else:
        run.prepare_for(run.request_for("model", "respond"))
    request = Respond(
        prompts=prompts,
        candidate=candidate,
        max_new_tokens=int(payload.get("max_new_tokens", 200)),
    )
    texts = Responses.model_validate(run.ask(request).value).texts
    answers = [
        # PostgreSQL's text holds no NUL
        {"prompt": prompt, "text": text.replace("\x00", "\ufffd")}
        for prompt, text in zip(prompts, texts, strict=True)
    ]

    def tell(session: Session) -> None:
        queue.fence(session, run.task.id, run.token)
        events.append(
            session,
            run.job.id,
            "chat",
            {"id": str(run.task.id), "number": number, "answers": answers},
        )

    run.write(tell)
