"""ARA in the span of the inputs against the same objective over the whole weight, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.anatomy import survey
from engine.ara import FARTHEST, SMOOTH, Sample, condense, objective, solve, summary
from engine.change import Update, formula
from engine.decode import Decoder
from engine.edit import EditBuilder
from engine.errors import EngineError
from engine.load import load
from engine.patch import Patch
from engine.report import Silent
from engine.samples import collect_samples, reached
from engine.writer import Writer
from jobs.spec.candidate import Ablation, Ara, constant
from tests.engine.conftest import Save, random_directions, request
from tests.engine.families import DENSE, FUSED, tiny

CPU = torch.device("cpu")
D, N = 6, 40  # W is wide: more inputs than samples


class Problem:
    """A small writer with a bias, its samples, and the objective over the whole W'."""

    def __init__(self, rows: int = 9, d: int = D, n: int = N, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.W, self.bias = normal(d, n) / n**0.5, normal(d)
        self.X_good, self.X_bad = normal(rows, n), normal(rows + 2, n) + 1
        self.Y_good, self.Y_bad = (X @ self.W.T + self.bias for X in (self.X_good, self.X_bad))
        self.sample = condense(self.X_good, self.Y_good, self.X_bad, self.Y_bad, CPU, torch.float64)
        both = torch.cat([self.Y_good, self.Y_bad])
        self.smooth = SMOOTH * float((both - both.mean(0)).square().sum(1).mean().sqrt())

    def loss(self, W: Tensor, c: Ara) -> Tensor:
        """ENGINE.md's formula, word for word, with every distance and a full sort."""

        def knn(A: Tensor, B: Tensor) -> Tensor:
            squares = (A[:, None] - B[None]).square().sum(-1) + self.smooth**2
            mean: Tensor = squares.sqrt().sort(dim=1).values[:, : c.neighbours].mean()
            return mean

        good, bad = (X @ W.T + self.bias for X in (self.X_good, self.X_bad))
        kept = (good - self.Y_good).square().mean()
        turned = knn(bad, self.Y_good) - c.overshoot * knn(bad, self.Y_bad)
        total: Tensor = c.preserve * kept + c.steer * turned
        return total

    def minimise(self, c: Ara, steps: int = 600) -> tuple[Tensor, float]:
        """W' and the loss by LBFGS over all of W', from W."""
        W = self.W.clone().requires_grad_()
        search = torch.optim.LBFGS(
            [W], max_iter=steps, tolerance_grad=1e-10, tolerance_change=1e-14,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure() -> Tensor:
            search.zero_grad()
            loss = self.loss(W, c)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        search.step(closure)  # type: ignore[no-untyped-call]
        return W.detach(), float(self.loss(W.detach(), c))


def ara(**more: Any) -> Ara:
    fields = {"start": 0, "end": 2, "preserve": 0.5, "steer": 0.3, "overshoot": 0.4,
              "neighbours": 3}  # fmt: skip
    return Ara.model_validate(fields | more)


CASES = [ara(), ara(preserve=0), ara(neighbours=64), ara(overshoot=0), ara(overshoot=1.2)]


@pytest.mark.parametrize("c", CASES)
def test_loss_and_gradient_are_those_of_the_whole_weight(c: Ara) -> None:
    problem = Problem()
    s, of = problem.sample, objective(problem.sample, c)
    assert s.Q.shape == (20, N) and s.P.shape == (D, D)
    torch.manual_seed(1)
    for size in (0.0, 0.01, 1.0):
        K = size * torch.randn(len(s.P), len(s.Q), dtype=torch.float64)
        W = (problem.W + s.P.T @ K @ s.Q).requires_grad_()
        true = problem.loss(W, c)
        (slope,) = torch.autograd.grad(true, W)
        loss, gradient = of(K)
        assert float(loss) == pytest.approx(true.item(), rel=1e-6)
        # The gradient over the whole weight lies in the span, and is this one.
        assert torch.allclose(s.P.T @ gradient @ s.Q, slope, atol=1e-6 * float(slope.norm()))


@pytest.mark.parametrize("c", [ara(overshoot=0, neighbours=64), ara(preserve=2e-1, overshoot=0)])
def test_optimum_is_that_of_the_whole_weight(c: Ara, monkeypatch: pytest.MonkeyPatch) -> None:
    """A convex objective (all neighbours, no repulsion) and one that is nearly so."""
    problem = Problem(rows=14, n=12)
    W, least = problem.minimise(c)
    monkeypatch.setattr("engine.ara.OUTER", 30)
    monkeypatch.setattr("engine.ara.STEADY", 1e-12)
    found = solve(problem.sample, c)
    before = float(problem.loss(problem.W, c))
    assert found.before == pytest.approx(before, rel=1e-6) and found.bounded
    assert found.after - least < 2e-3 * (before - least)
    if c.neighbours == 64:
        assert (formula(problem.W, found.update) - W).norm() < 0.05 * (W - problem.W).norm()


def test_solution_of_the_whole_weight_lies_in_the_span() -> None:
    problem = Problem()
    W, _ = problem.minimise(ara(overshoot=0, neighbours=64))
    s, change = problem.sample, W - problem.W
    inside = s.P.T @ s.P @ change @ s.Q.T @ s.Q
    assert change.norm() > 0.1
    assert torch.allclose(inside, change, atol=1e-8 * float(change.norm()))


@pytest.mark.parametrize("c", CASES[:4])
def test_few_steps_bring_most_of_the_fall(c: Ara) -> None:
    problem = Problem(rows=30, d=20, n=25)
    _, least = problem.minimise(c, steps=300)
    single = problem.sample.to(CPU, torch.float32)
    found = solve(single, c)
    assert found.bounded
    assert found.before - found.after > 0.8 * (found.before - least)
    W = formula(problem.W, found.update)
    assert float(problem.loss(W, c)) == pytest.approx(found.after, rel=1e-3, abs=1e-4)


def test_truncation_is_the_best_of_its_rank_and_its_error_is_told() -> None:
    problem = Problem(rows=30, d=20, n=25)
    whole = solve(problem.sample, ara())
    change = (whole.update.B @ whole.update.A).double().numpy()
    left, values, right = np.linalg.svd(change)
    energy = np.cumsum(values**2) / np.sum(values**2)
    assert whole.effective == 1 + int(np.sum(energy < 0.99))
    assert whole.error < 1e-5
    for rank in (1, 4):
        cut = solve(problem.sample, ara(rank=rank))
        assert cut.update.B.shape == (20, rank) and cut.update.A.shape == (rank, 25)
        best = (left[:, :rank] * values[:rank]) @ right[:rank]
        assert np.allclose(cut.update.B @ cut.update.A, best, atol=1e-5)
        error = np.linalg.norm(change - best) / np.linalg.norm(change)
        assert cut.error == pytest.approx(error, rel=1e-3)
        assert cut.effective == whole.effective


def degenerate() -> dict[str, Sample]:
    """Samples at the edges: nothing to learn from, no spread, one row, twins, huge, tiny."""
    p = Problem()
    one, zero = torch.ones(4, N), torch.zeros(4, D)
    pairs = {
        "zero inputs": (torch.zeros(4, N), zero, torch.zeros(4, N), zero),
        "zero outputs": (p.X_good, 0 * p.Y_good, p.X_bad, 0 * p.Y_bad),
        "equal rows": (one, zero + 1, one, zero + 1),
        "one row a side": (p.X_good[:1], p.Y_good[:1], p.X_bad[:1], p.Y_bad[:1]),
        "both sides alike": (p.X_good, p.Y_good, p.X_good, p.Y_good),
        "huge": (1e4 * p.X_good, 1e4 * p.Y_good, 1e4 * p.X_bad, 1e4 * p.Y_bad),
        "tiny": (1e-6 * p.X_good, 1e-6 * p.Y_good, 1e-6 * p.X_bad, 1e-6 * p.Y_bad),
    }
    return {name: condense(*parts, CPU) for name, parts in pairs.items()}


@pytest.mark.parametrize("name", degenerate())
def test_never_nan(name: str) -> None:
    sample = degenerate()[name]
    for p, omega, k in ((0.0, 1.3, 1), (1.0, 1.3, 15), (0.5, 0.0, 1), (0.0, 2.0, 3)):
        found = solve(sample, ara(preserve=p, steer=1, overshoot=omega, neighbours=k))
        change = found.update.B @ found.update.A
        assert change.isfinite().all() and found.after <= found.before
        moved = sample.Z_bad @ (sample.Q @ change.T)
        spread = torch.cat([sample.T_good, sample.T_bad]).square().sum(1).mean().sqrt()
        assert float(moved.norm()) <= 1.001 * FARTHEST * float(spread) * len(moved) ** 0.5


def test_an_objective_without_a_minimum_is_told() -> None:
    found = solve(Problem().sample, ara(preserve=0, steer=1, overshoot=2))
    assert not found.bounded and found.after < found.before
    assert summary([found, None])[1] == "warning"
    assert summary([solve(Problem().sample, ara())])[1] == "info"


# --- on models ------------------------------------------------------------------------------------

BAD = [[5, 6, 7], [9, 8, 7, 6, 5, 4], [11, 3], [3, 4, 5, 6], [40, 41, 42]]
GOOD = [[15, 16, 17], [19, 18, 17, 16, 15], [21, 13], [13, 14, 15, 16]]


class Tokenizer:
    """What a decoder asks of a tokenizer before it decodes."""

    pad_token_id, eos_token_id = 0, 2


def decoder(model: Any) -> Decoder:
    made = Decoder(model, Tokenizer(), None)
    made.batch_size = 3
    return made


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "phi"])
def test_samples_are_what_single_prompts_give(family: str) -> None:
    model = tiny(family, DENSE[family])
    anatomy = survey(model)
    samples = collect_samples(decoder(model), anatomy, BAD, GOOD, Silent(), affine=True, ara=True)
    assert samples.ara is not None and samples.means is not None
    for writer, sample, mean in zip(anatomy.writers, samples.ara, samples.means, strict=True):
        assert sample is not None and mean is not None
        rows: list[tuple[Tensor, Tensor]] = []
        hook = writer.module.register_forward_hook(
            lambda module, args, out, rows=rows: rows.append(
                (args[0].flatten(0, -2)[-1], out.flatten(0, -2)[-1])
            )
        )
        with torch.no_grad():
            for ids in (*GOOD, *BAD):
                model(torch.tensor([ids]))
        hook.remove()
        X, Y = (torch.stack(parts) for parts in zip(*rows, strict=True))
        assert torch.allclose(torch.cat([sample.Z_good, sample.Z_bad]) @ sample.Q, X, atol=1e-4)
        outputs = torch.cat([sample.T_good, sample.T_bad]) @ sample.P
        assert torch.allclose(outputs, Y - Y.mean(0), atol=1e-4)
        assert torch.allclose(sample.Q @ sample.Q.T, torch.eye(len(sample.Q)), atol=1e-5)
        assert torch.allclose(sample.P @ sample.P.T, torch.eye(len(sample.P)), atol=1e-5)
        assert torch.allclose(mean, (X[: len(GOOD)] @ writer.weight().T).mean(0), atol=1e-4)


@pytest.mark.parametrize("quantization", ["bnb_4bit", "bnb_8bit"])
def test_quantised_models_need_no_weight(quantization: str, save: Save) -> None:
    folder = save("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    loaded = load(request(folder, quantization=quantization, dtype="float32"), Silent())
    anatomy = survey(loaded.model)
    samples = collect_samples(decoder(loaded.model), anatomy, BAD, GOOD, Silent(), ara=True)
    builder = EditBuilder(anatomy, random_directions(anatomy.layers, 64), samples)
    edit = builder.build(ara(start=0, end=3))
    assert samples.ara is not None
    with Patch(anatomy) as patch:
        original = [writer_output(loaded.model, w, BAD[1]) for w in anatomy.writers]
        patch.select([edit])
        # The first writer sees the same input: its output moves as the objective was told.
        writer, sample, change = anatomy.writers[0], samples.ara[0], edit.changes[0]
        assert sample is not None and isinstance(change, Update)
        moved = writer_output(loaded.model, writer, BAD[1]) - original[0]
        true = change.B @ (change.A @ (sample.Z_bad[1] @ sample.Q))
        assert moved.norm() > 0.01 and (moved - true).norm() < 1e-3 * true.norm()


def writer_output(model: Any, writer: Writer, ids: list[int]) -> Tensor:
    """(d) at the last token, after all other hooks."""
    seen: list[Tensor] = []
    hook = writer.module.register_forward_hook(lambda module, args, out: seen.append(out[0, -1]))
    with torch.no_grad():
        model(torch.tensor([ids]))
    hook.remove()
    return seen[0].float()


def test_builder_gives_the_same_bits_whatever_came_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("engine.edit.REMEMBERED", 1)
    model = tiny("llama", DENSE["llama"])
    anatomy = survey(model)
    samples = collect_samples(decoder(model), anatomy, BAD, GOOD, Silent(), ara=True)
    directions = random_directions(3, 32)
    chosen = ara(start=1, end=3, rank=4)
    fresh = EditBuilder(anatomy, directions, samples).changes(chosen)
    builder = EditBuilder(anatomy, directions, samples)
    others = [ara(start=0, end=1, neighbours=k) for k in (1, 2)]
    again = []
    for other in (*others, chosen, *others, chosen):
        changes = builder.changes(other)
        if other is chosen:
            again.append(changes)
    for changes in again:
        for writer, one, two in zip(anatomy.writers, fresh, changes, strict=True):
            assert (one is None) == (writer.layer < 1) == (two is None)
            if isinstance(one, Update) and isinstance(two, Update):
                assert torch.equal(one.A, two.A) and torch.equal(one.B, two.B)
    terms = builder.build(chosen).terms
    assert [t is None for t in terms] == [c is None for c in fresh]


def test_what_was_not_prepared_or_does_not_exist_is_refused() -> None:
    model = tiny("llama", DENSE["llama"])
    anatomy, directions = survey(model), random_directions(3, 32)
    with pytest.raises(EngineError, match="ara"):
        EditBuilder(anatomy, directions).build(ara())
    samples = collect_samples(decoder(model), anatomy, BAD, GOOD, Silent(), ara=True)
    for start, end in ((0, 4), (2, 1)):
        with pytest.raises(EngineError, match="start, end"):
            EditBuilder(anatomy, directions, samples).build(ara(start=start, end=end))


def test_stacks_of_experts_are_not_reached() -> None:
    model = tiny("qwen3_moe", FUSED["qwen3_moe"])
    anatomy = survey(model)
    stacks = [w for w in anatomy.writers if not w.hooked]
    assert stacks
    held = {w.name: w.d * w.n * max(1, w.experts) for w in anatomy.writers}
    share = 1 - sum(held[w.name] for w in stacks) / sum(held.values())
    assert reached(anatomy, ara()) == pytest.approx(share)
    plain = Ablation(attention=constant(), mlp=constant())
    assert reached(anatomy, plain) == 1
    assert reached(anatomy, replace_affine(plain)) == pytest.approx(share)
    with pytest.raises(EngineError, match="stacks of experts") as caught:
        collect_samples(decoder(model), anatomy, BAD, GOOD, Silent(), ara=True)
    assert caught.value.reason == "unsupported_architecture"
    with pytest.raises(EngineError, match="affine"):
        collect_samples(decoder(model), anatomy, BAD, GOOD, Silent(), affine=True,
                        allow_partial=True)  # fmt: skip
    samples = collect_samples(decoder(model), anatomy, BAD, GOOD, Silent(), ara=True,
                              allow_partial=True)  # fmt: skip
    changes = EditBuilder(anatomy, random_directions(3, 32), samples).changes(ara(end=3))
    for writer, change in zip(anatomy.writers, changes, strict=True):
        assert (change is not None) == writer.hooked


def replace_affine(candidate: Ablation) -> Ablation:
    return candidate.model_copy(update={"affine": True})


def test_sample_says_what_it_takes() -> None:
    sample = Problem().sample
    half = replace(sample, Q=sample.Q.float())
    assert sample.bytes - half.bytes == 4 * sample.Q.numel()
