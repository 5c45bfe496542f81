"""The same parameters in both programs: do they give the same scores?

Found by trying our settings against its trials (version 1.4.0): its KL is KL(original‖edited) in
nats at the first answer token, mean over prompts, as our `kl_first`; its directions are our
`projected`; a direction index i lies between the directions behind blocks ⌊i⌋ and ⌊i⌋ + 1; the
kernels are ours. One thing differs: behind the last block it takes what transformers calls the last
hidden state, which has passed the final norm, so the last layer's direction is another one.
`its_last_state` makes our engine do the same, to tell this from other differences. In mode `full`
its edit is a low-rank approximation (rank 3 by default) of the one that ours makes exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from bench.peer.heretic import Edit
from bench.peer.ours import prepare
from bench.peer.setting import Setting
from engine import residuals
from engine.loading.placement import input_device
from engine.report import Silent
from engine.session import Session
from jobs.spec.protocol import Score, ScoredBatch
from jobs.spec.scores import Scores


def scores(setting: Setting, edits: Sequence[Edit]) -> list[Scores]:
    """Our scores of its trials."""
    session = Session()
    prepare(session, setting)
    found = session.handle(Score(candidates=[edit.candidate for edit in edits]), Silent())
    assert isinstance(found, ScoredBatch)
    return [one.scores for one in found.scored]


@contextmanager
def its_last_state() -> Iterator[None]:
    """Directions of the last layer as it has them: of states behind the model's final norm."""
    collect = residuals.collect

    @torch.no_grad()
    def normed(
        model: nn.Module, anatomy: Any, inputs: list[list[int]], *more: Any
    ) -> dict[int, Tensor]:
        found = collect(model, anatomy, inputs, *more)
        for row, ids in enumerate(inputs):
            given = torch.tensor([ids], device=input_device(model))
            states = model(input_ids=given, output_hidden_states=True).hidden_states
            found[-1][row, -1] = states[-1][0, -1].float().cpu()
        return found

    with patch.object(residuals, "collect", normed):
        yield


def table(setting: Setting, edits: Sequence[Edit]) -> list[str]:
    """Its scores beside ours, trial by trial; a last line with the greatest differences."""
    ours = scores(setting, edits)
    with its_last_state():
        alike = scores(setting, edits)
    lines = [
        "| trial | direction | refusals: its, ours, ours with its last state | its KL | ours − its "
        "| with its last state |",
        "|---" * 6 + "|",
    ]
    for edit, one, same in zip(edits, ours, alike, strict=True):
        index = edit.candidate.index
        lines.append(
            f"| {edit.number + 1} | {'per layer' if index is None else f'{index:.2f}'} "
            f"| {edit.refusals}, {one.refusals}, {same.refusals} | {edit.kl:.6f} "
            f"| {_kl(one) - edit.kl:+.1e} | {_kl(same) - edit.kl:+.1e} |"
        )
    return [*lines, "", f"Mode `{setting.mode}`: {_said(edits, ours)}; with its last state, "
            f"{_said(edits, alike)}."]  # fmt: skip


def _said(edits: Sequence[Edit], ours: Sequence[Scores]) -> str:
    pairs = list(zip(edits, ours, strict=True))
    apart = [abs(edit.refusals - one.refusals) for edit, one in pairs]
    kl = max(abs(edit.kl - _kl(one)) for edit, one in pairs)
    same = sum(not difference for difference in apart)
    return (
        f"{same} of {len(pairs)} refusal counts are equal (difference at most {max(apart)}), "
        f"KL differs by at most {kl:.1e}"
    )


def _kl(one: Scores) -> float:
    assert one.kl_first is not None
    return one.kl_first
