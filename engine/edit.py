"""The edit of one writer as its hooks apply it: scalings, a term of rank k and a bias.

W (d, n) is a writer, V (k, d) its directions, λ the strength, N (d) the row norms, Ŵ = W/N,
u = V Ŵ, t = V W, both (k, n). Every mode of ENGINE.md's table is

    y' = s∘(W(c∘x)) + a (u x) + b + bias

so a candidate is a few vectors and no weight is touched. `engine.change.formula` is the slow twin.
Stacks of experts have no module of their own to hook: their change is made in place, and so is that
of a router's bias, which every row of a batch reads.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.anatomy import Anatomy, Writer
from engine.ara import Solution, solve, summary
from engine.change import TINY, Change, Projection, Update, norm
from engine.directions import Directions
from engine.errors import EngineError
from engine.report import Report
from engine.routers import Suppression
from engine.samples import Samples
from jobs.spec.candidate import Ablation, Ara, Recipe

REMEMBERED = 4  # candidates of ARA whose changes are kept


@dataclass(frozen=True)
class Term:
    """One writer's edit: s (d), c (n) and b (d) or None; a (d, k), u (k, n); float32."""

    s: Tensor | None
    c: Tensor | None
    a: Tensor
    u: Tensor
    b: Tensor | None = None


@dataclass(frozen=True)
class Edit:
    """One candidate's edit: an entry per writer, in the anatomy's order; None where nothing is.

    terms         for the hooks; None also where the writer is edited in place
    changes       of every edited writer, hooked or not
    suppressions  an entry per router of `Samples.routers`
    """

    terms: tuple[Term | None, ...]
    changes: tuple[Change | None, ...]
    suppressions: tuple[Suppression | None, ...] = ()


@dataclass(frozen=True)
class Basis:
    """What a writer's terms are made of, for directions R (K, d); linear in R, float32.

    N (d)  row norms         columns (n)  column norms
    u (K, n)  R Ŵ            Wu (K, d)    Ŵ u, row k for direction k         t (K, n)  R W
    """

    N: Tensor
    columns: Tensor
    u: Tensor
    Wu: Tensor
    t: Tensor


def basis(W: Tensor, R: Tensor) -> Basis:
    """The basis of a weight W (d, n) for directions R (K, d); one pass over the weight."""
    W, R = W.float(), R.to(W.device, torch.float32)
    N, columns = norm(W, 1), norm(W, 0)
    t = R @ W
    unit_rows = W / N.clamp_min(TINY)[:, None]
    u = R @ unit_rows
    return Basis(N=N, columns=columns, u=u, Wu=u @ unit_rows.T, t=t)


def term(change: Change, b: Basis | None) -> Term:
    """One writer's edit from its basis at the change's V (an Update needs none); O(k (d + n)).

    none     W' = W − λ Vᵀt
    pre      W' = W − λ (N∘Vᵀ) u
    full     W' = diag(s) W − λ (s∘N∘Vᵀ) u,
             s_i = 1/√(1 − 2λ Σ_j V_ji (Ŵ_i·u_j) + λ² Σ_jk V_ji V_ki (u_j·u_k))
    columns  W' = (I − λ VᵀV) W diag(c),  c_j = 1/√(1 − 2λ‖t̂_j‖² + λ² t̂_jᵀ(V Vᵀ)t̂_j), t̂_j = V ŵ_j
    """
    if isinstance(change, Update):
        return Term(None, None, change.B, change.A)
    if b is None:
        raise ValueError("a projection's term needs the writer's basis")
    lam, bias = change.lam, change.bias()
    V = change.V.to(b.N.device)
    shift = None if bias is None else bias.to(b.N.device)
    if change.mode == "none":
        return Term(None, None, -lam * V.T, b.t, shift)
    if change.mode == "pre":
        return Term(None, None, -lam * b.N[:, None] * V.T, b.u, shift)
    if change.mode == "full":
        # float64: near λ v_i ‖u‖ = 1 the terms cancel.
        lv, u = lam * V.double(), b.u.double()
        square = (lv * ((u @ u.T) @ lv)).sum(0) - 2 * (lv * b.Wu.double()).sum(0)
        s = (1 + square).clamp_min(TINY).rsqrt().float()
        return Term(s, None, -lam * (s * b.N)[:, None] * V.T, b.u, shift)
    cosine = b.t.double() / b.columns.double().clamp_min(TINY)
    gram = V.double() @ V.double().T
    square = (cosine * (lam * lam * gram @ cosine - 2 * lam * cosine)).sum(0)
    c = (1 + square).clamp_min(1e-12).rsqrt().float()
    return Term(None, c, -lam * V.T, c * b.t, shift)


class EditBuilder:
    """Makes edits from candidates.

    For a single direction per layer each writer's weight is read once per recipe, and a candidate
    then costs O(d + n) per writer; these bases take 4 L (d + 2n) bytes per writer. Several
    directions or biprojected ones cost one pass over the weights per candidate, ARA its
    optimisation: the changes of the last REMEMBERED candidates are kept.
    """

    def __init__(
        self, anatomy: Anatomy, directions: Directions, samples: Samples | None = None
    ) -> None:
        """`directions` and `samples` must have been measured on the model of `anatomy`."""
        if directions.layers != anatomy.layers or directions.hidden != anatomy.hidden:
            raise EngineError("bad_request", "the directions belong to another model")
        self.anatomy = anatomy
        self.directions = directions
        self.samples = samples or Samples()
        self._bases: dict[Recipe, list[Basis | None]] = {}
        self._solved: OrderedDict[Ara, tuple[Solution | None, ...]] = OrderedDict()

    def bases(self, recipe: Recipe, report: Report | None = None) -> list[Basis | None]:
        """The basis of every hooked writer; computed at the first call for this recipe."""
        if recipe not in self._bases:
            rows = self.directions.axes(recipe).vectors[:, 0]
            found: list[Basis | None] = []
            for writer in self.anatomy.writers:
                if report is not None:
                    report.progress("edit bases", len(found), len(self.anatomy.writers))
                found.append(basis(writer.weight(), rows) if writer.hooked else None)
            self._bases[recipe] = found
        return self._bases[recipe]

    def warm(self, recipes: Sequence[Recipe], report: Report | None = None) -> None:
        """Compute now the bases that many candidates will share: not those of other positions,
        each of which a selection uses once."""
        for recipe in recipes:
            if _interpolates(recipe) and recipe.position == -1:
                self.bases(recipe, report)

    def solutions(
        self, candidate: Ara, report: Report | None = None
    ) -> tuple[Solution | None, ...]:
        """ARA's change of each writer; None outside of its layers and for stacks of experts.

        The same candidate gives the same bits whatever came before. Raises `bad_request` where the
        engine was not prepared for it or the layers do not exist.
        """
        known = self.samples.ara
        if known is None:
            raise EngineError(
                "bad_request",
                "ara: the writers' inputs and outputs were not sampled",
                "Say so when preparing.",
            )
        if not candidate.start <= candidate.end <= self.anatomy.layers:
            raise EngineError(
                "bad_request",
                f"start, end: {candidate.start} to {candidate.end} is no range of the "
                f"{self.anatomy.layers} layers",
                f"Give 0 ≤ start ≤ end ≤ {self.anatomy.layers}.",
            )
        if candidate not in self._solved:
            wanted = range(candidate.start, candidate.end)
            found: list[Solution | None] = []
            for writer, sample in zip(self.anatomy.writers, known, strict=True):
                if report is not None:
                    report.progress("ara", len(found), len(known))
                if sample is None or writer.layer not in wanted:
                    found.append(None)
                else:
                    found.append(solve(sample, candidate, _device(writer)))
            self._solved[candidate] = tuple(found)
            if len(self._solved) > REMEMBERED:
                self._solved.popitem(last=False)
            if report is not None:
                report.log(*summary(found))
        self._solved.move_to_end(candidate)
        return self._solved[candidate]

    def changes(
        self, candidate: Ablation | Ara, report: Report | None = None
    ) -> tuple[Change | None, ...]:
        """What `candidate` does to each writer. Raises `bad_request` for an index beyond the
        layers and for what was not prepared: a recipe, affine's means, ARA's samples."""
        if isinstance(candidate, Ara):
            solved = self.solutions(candidate, report)
            return tuple(None if s is None or s.effective == 0 else s.update for s in solved)
        vectors = self.directions.of(candidate)
        means = self.samples.means if candidate.affine else None
        if candidate.affine and means is None:
            raise EngineError(
                "bad_request",
                "affine: the harmless means of the writers' outputs were not measured",
                "Say so when preparing.",
            )
        return tuple(
            self._projection(candidate, writer, vectors, None if means is None else means[number])
            for number, writer in enumerate(self.anatomy.writers)
        )

    def build(self, candidate: Ablation | Ara, report: Report | None = None) -> Edit:
        """The edit of `candidate`; raises what `changes` raises."""
        changes = self.changes(candidate, report)
        made: list[Term | None] = []
        for number, (writer, change) in enumerate(zip(self.anatomy.writers, changes, strict=True)):
            if change is None or not writer.hooked:
                made.append(None)
            elif isinstance(change, Update) or not isinstance(candidate, Ablation):
                made.append(term(change, None))
            else:
                made.append(term(change, self._basis(candidate, number, change)))
        return Edit(tuple(made), changes, self.samples.suppressions(candidate))

    def _projection(
        self, candidate: Ablation, writer: Writer, vectors: Tensor, mean: Tensor | None
    ) -> Projection | None:
        lam = candidate.kernel(writer.component).weight(writer.layer)
        if not lam:
            return None
        V = vectors[writer.layer]
        return Projection(V, lam, candidate.mode, None if mean is None else V @ mean)

    def _basis(self, candidate: Ablation, number: int, change: Projection) -> Basis:
        """The basis at the change's V: interpolated where that is exact."""
        writer = self.anatomy.writers[number]
        if not _interpolates(candidate.recipe):
            return basis(writer.weight(), change.V)
        mixture = self.directions.mixture(candidate)
        low, high, wa, wb = (writer.layer, writer.layer, 1.0, 0.0) if mixture is None else mixture
        whole = self.bases(candidate.recipe)[number]
        assert whole is not None
        u, Wu, t = ((wa * m[low] + wb * m[high])[None] for m in (whole.u, whole.Wu, whole.t))
        return Basis(whole.N, whole.columns, u, Wu, t)


def _interpolates(recipe: Recipe) -> bool:
    """Whether a candidate's basis is a mixture of two layers' bases: one direction, taken as is."""
    single = recipe.subspace == "single" or recipe.count == 1
    return single and recipe.projection != "biprojected"


def _device(writer: Writer) -> torch.device:
    """Where the writer's weight is; the CPU for one that is fetched when it is used."""
    device = next(writer.module.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device
