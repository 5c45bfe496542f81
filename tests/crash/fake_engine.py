"""A stand-in for `python -m engine` that speaks the protocol and computes nothing.

Scores are a hash of the candidate, so they are the same whoever computes them and in which order.
It is started by a worker through NULLSPACE_ENGINE_COMMAND. Files in `--orders DIR` make it fail:

    die            SIGKILL to itself in the middle of the next score (the file is removed first)
    die-always     the same, every time
    deaf           ignores `stop` and goes on
    refuse-OP      holds {"reason", "message", "mend"}: the answer to the request OP
    print          its text is printed to standard output

While it lives, `DIR/engines/<pid>` exists; `DIR/requests` has a line per request.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import json
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

LAYERS = 8


class Channel:
    """Line in, line out; notices end of file and `stop` while it pretends to compute."""

    def __init__(self, read: int, write: int) -> None:
        self.read, self.write = read, write
        self.pending = b""
        self.lines: list[dict[str, Any]] = []

    def send(self, **message: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(self.write, json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float | None) -> None:
        """Read what comes within `seconds` (None: until something comes)."""
        if not select.select([self.read], [], [], seconds)[0]:
            return
        chunk = os.read(self.read, 1 << 16)
        if not chunk:
            end(0)
        *lines, self.pending = (self.pending + chunk).split(b"\n")
        self.lines += [json.loads(line) for line in lines]

    def pause(self, seconds: float, deaf: bool) -> bool:
        """Pass the time; True when a `stop` came."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.receive(left)
            if self.stopped() and not deaf:
                return True
        return False

    def more(self, number: int) -> list[dict[str, Any]]:
        """What was added to the request `number`; what came for an earlier one is dropped."""
        requests = [line["request"] for line in self.lines]
        self.lines = [line for line in self.lines if line["request"]["op"] != "more"]
        return [one for one in requests if one["op"] == "more" and one["of"] == number]

    def stopped(self) -> bool:
        return any(line["request"]["op"] == "stop" for line in self.lines)


MARK: list[Path] = []


def end(status: int) -> None:
    for mark in MARK:
        mark.unlink(missing_ok=True)
    os._exit(status)


def scores_of(
    candidate: dict[str, Any], role: str, total: int, further: list[str]
) -> dict[str, Any]:
    """Refusals fall and KL grows with strength, with a little noise from the hash."""
    digest = hashlib.sha256(json.dumps([candidate, role], sort_keys=True).encode()).digest()
    if candidate["method"] == "ara":
        strength = candidate["overshoot"] / 2
    else:
        strength = min(1.0, candidate["attention"]["max_weight"] / 1.5)
    refusals = round(total * (1 - strength) * digest[0] / 255)
    return {
        "role": role,
        "refusals": refusals,
        "total": total,
        "kl_first": strength * (0.5 + digest[1] / 510),
        "kl_multi": strength * digest[2] / 255,
        "mean_tokens": 12.0,
        "values": {
            name: {"value": 2 - 4 * strength + digest[3] / 255, "low": -4, "high": 4, "n": total}
            for name in further
            if name != "judge"  # whose verdicts are no engine's
        },
    }


def scored(
    candidate: dict[str, Any], role: str, prompts: list[str], further: list[str]
) -> dict[str, Any]:
    scores = scores_of(candidate, role, len(prompts), further)
    outcomes = [
        {"refused": index < scores["refusals"], "text": f"answer to {prompt}", "tokens": 12}
        for index, prompt in enumerate(prompts)
    ]
    return {"scores": scores, "outcomes": outcomes, "seconds": 0.01}


def screened(one: dict[str, Any], finished: list[dict[str, float]]) -> dict[str, Any]:
    """The score, without the answers behind the one by which a finished trial dominates it."""
    scores, total = one["scores"], one["scores"]["total"]
    known = scores | {name: value["value"] for name, value in scores["values"].items()}
    better = [
        round(other["refusals"] * total)
        for other in finished
        if all(value <= known[name] for name, value in other.items() if name != "refusals")
    ]
    # those that are refused come first
    if not better or scores["refusals"] < min(better) or min(better) == total:
        return one
    given = min(better)
    nothing = {"refused": False, "text": "", "tokens": 0, "answered": False}
    outcomes = one["outcomes"][:given] + [nothing] * (total - given)
    counted = {**scores, "refusals": given, "total": given}
    return {**one, "scores": counted, "outcomes": outcomes, "screened": True}


def compared(request: dict[str, Any], prepared: dict[str, Any]) -> dict[str, Any]:
    """Another model refuses a third of what the prepared one does."""
    found = {}
    for role, prompts in roles(prepared).items():
        if role not in request["roles"]:
            continue
        refused = len(prompts) // 3
        scores = {
            "role": role,
            "refusals": refused,
            "total": len(prompts),
            "kl_first": None if role == "over_refusal" else 0.25,
            "kl_multi": None if role == "over_refusal" else 0.125,
            "mean_tokens": 9.0,
            "values": {
                name: {"value": 1.5, "n": 9} for name in request["scorers"] if name != "judge"
            },
        }
        outcomes = [
            {"refused": index < refused, "text": f"model on {prompt}", "tokens": 9}
            for index, prompt in enumerate(prompts)
        ]
        found[role] = {"scores": scores, "outcomes": outcomes}
    return {"scored": found, "commit": "beefed", "warnings": ["read with care"]}


def benchmarked(request: dict[str, Any], prepared: dict[str, Any]) -> dict[str, Any]:
    """A figure per task that depends on the model and the edit."""
    values = {}
    for task in request["tasks"]:
        key = [prepared["model"], request["candidate"], task]
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).digest()
        share = digest[0] / 255
        figure = {"value": share, "low": share - 0.1, "high": share + 0.1}
        values[f"{task}.acc"] = {**figure, "n": request["limit"] or 100}
    return {"values": values, "seconds": 0.1}


def working(channel: Channel, orders: Path, number: int, delay: float) -> bool:
    """Pass the time of one piece of work, with the faults that were ordered; False when stopped."""
    if channel.pause(delay, (orders / "deaf").exists()):
        channel.send(type="error", id=number, reason="stopped", message="stopped")
        return False
    if (orders / "die-always").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    with contextlib.suppress(FileNotFoundError):
        (orders / "die").unlink()
        print("the last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return True


def prepare(request: dict[str, Any], lanes: int) -> dict[str, Any]:
    baseline, outcomes = {}, {}
    measured = {} if request["purpose"] == "respond" else roles(request)
    for role, prompts in measured.items():
        baseline[role] = {
            "role": role,
            "refusals": len(prompts),
            "total": len(prompts),
            "kl_first": None if role == "over_refusal" else 0.0,
            "kl_multi": None if role == "over_refusal" else 0.0,
            "mean_tokens": 5.0,
        }
        outcomes[role] = [{"refused": True, "text": "I cannot.", "tokens": 5} for _ in prompts]
    return {
        "commit": "c0ffee",
        "anatomy": {
            "architecture": "FakeForCausalLM",
            "layers": LAYERS,
            "hidden": 8,
            "writers": [],
            "coverage": 1.0,
        },
        "device": "cpu",
        "device_name": "none",
        "dtype": "float32",
        "quantization": request["quantization"],
        "weight_bytes": 10,
        "source_bytes": 20,
        "batch_size": 4,
        "ahead": 3 * lanes,
        "baseline": baseline,
        "baseline_outcomes": outcomes,
    }


def roles(request: dict[str, Any]) -> dict[str, list[str]]:
    texts = request["prompts"]
    found = {"search": texts["search_harmful"], "heldout": texts["heldout_harmful"]}
    if texts["over_refusal"]:
        found["over_refusal"] = texts["over_refusal"]
    return found


def selected() -> dict[str, Any]:
    """A direction of the prompt's last token but one, at layer 3, on all layers."""
    everywhere = {"max_weight": 1.0, "min_weight": 1.0, "position": 0.0, "distance": 1e9}
    candidate = {
        "method": "ablation",
        "mode": "none",
        "recipe": {"projection": "none", "position": -2},
        "scope": "global",
        "index": 3.0,
        "attention": everywhere,
        "mlp": everywhere,
        "affine": False,
    }
    choice = {"position": -2, "layer": 3, "log_odds": -4.0, "kl": 0.05, "induced": 2.0}
    return {"candidate": candidate, "choices": [{**choice, "kept": True}]}


def export(request: dict[str, Any]) -> dict[str, Any]:
    content = json.dumps(request["candidate"], sort_keys=True).encode() * 1000
    folder = Path(request["directory"])
    (folder / "weights.bin").write_bytes(content)
    (folder / "card.json").write_text(json.dumps(request["card"]))
    files = [
        {
            "name": path.name,
            "size": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.iterdir())
    ]
    return {"files": files, "measured": {}, "seconds": 0.1}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--read", type=int, required=True)
    parser.add_argument("--write", type=int, required=True)
    parser.add_argument("--orders", type=Path, required=True)
    parser.add_argument("--delay", type=float, default=0.01)
    parser.add_argument("--lanes", type=int, default=0, help="0: candidates share a batch")
    given = parser.parse_args()
    leaked = [name for name in os.environ if "DATABASE" in name or "SECRET" in name]
    if leaked:
        sys.exit(f"must not be in my environment: {leaked}")
    orders: Path = given.orders
    (orders / "engines").mkdir(parents=True, exist_ok=True)
    MARK.append(orders / "engines" / str(os.getpid()))
    MARK[0].touch()
    channel = Channel(given.read, given.write)
    prepared: dict[str, Any] = {}
    while True:
        while not channel.lines:
            channel.receive(None)
        envelope = channel.lines.pop(0)
        request, number = envelope["request"], envelope["id"]
        op = request["op"]
        if op == "more":
            continue  # its request has ended
        with (orders / "requests").open("a") as file:
            file.write(f"{op} {request.get('model') or request.get('tasks') or ''}\n")
        if (orders / "print").exists():
            print((orders / "print").read_text(), flush=True)
        refusal = orders / f"refuse-{op}"
        if op == "stop":
            channel.send(type="result", id=number)
            end(0)
        if refusal.exists():
            channel.send(type="error", id=number, **json.loads(refusal.read_text()))
        elif op == "prepare":
            prepared = request
            channel.send(type="progress", id=number, phase="loading weights", done=1, total=1)
            channel.send(type="result", id=number, value=prepare(request, given.lanes))
        elif op == "score":
            score(channel, orders, number, request, roles(prepared), given)
        elif op == "select":
            channel.send(type="result", id=number, value=selected())
        elif op == "compare":
            channel.send(type="progress", id=number, phase="loading weights", done=1, total=1)
            if working(channel, orders, number, given.delay):
                channel.send(type="result", id=number, value=compared(request, prepared))
        elif op == "benchmark":
            if working(channel, orders, number, given.delay):
                channel.send(type="result", id=number, value=benchmarked(request, prepared))
        elif op == "respond":
            texts = [f"answer to {prompt}" for prompt in request["prompts"]]
            channel.send(type="result", id=number, value={"texts": texts})
        elif op == "export":
            try:
                channel.send(type="result", id=number, value=export(request))
            except OSError as error:
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                reason = "disk_full" if full else "engine_failed"
                channel.send(type="error", id=number, reason=reason, message=str(error))


def score(
    channel: Channel,
    orders: Path,
    number: int,
    request: dict[str, Any],
    prompts: dict[str, list[str]],
    given: argparse.Namespace,
) -> None:
    """Candidates, and those that join them. With several lanes they end out of order."""
    own = len(request["candidates"])
    waiting = [(index, one, request["finished"]) for index, one in enumerate(request["candidates"])]
    done: dict[int, dict[str, Any]] = {}
    known = own
    while waiting:
        place = len(done) % max(1, given.lanes)
        index, candidate, finished = waiting.pop(min(len(waiting) - 1, place))
        if not working(channel, orders, number, given.delay):
            return
        role = request["role"]
        one = scored(candidate, role, prompts[role], request["scorers"])
        done[index] = screened(one, finished)
        channel.send(type="partial", id=number, index=index, scored=done[index])
        for more in channel.more(number):
            waiting += [
                (known + n, one, more["finished"]) for n, one in enumerate(more["candidates"])
            ]
            known += len(more["candidates"])
    channel.send(type="result", id=number, value={"scored": [done[index] for index in range(own)]})


if __name__ == "__main__":
    main()
