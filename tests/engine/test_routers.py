"""Routers with a bias: found by what they do, watched, lowered in place, and exported.

The truths are each model's own routers, heard one prompt at a time, copies of the model whose bias
is set by hand, and exported files read by plain libraries.
"""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from demo.vocabulary import build_tokenizer
from engine.anatomy import survey
from engine.decode import Decoder
from engine.edit import Edit, EditBuilder
from engine.errors import EngineError
from engine.load import load_folder
from engine.patch import Patch
from engine.report import Silent
from engine.routers import find_routers, shared_tail
from engine.samples import Samples, collect_samples
from engine.session import Session
from jobs.spec.candidate import Ablation, Router, constant, parse
from jobs.spec.protocol import Export, Prepare, Score
from tests.engine.conftest import random_directions
from tests.engine.families import FUSED, tiny
from tests.engine.fixtures_run import prepare_request, prompt_texts, tiny_folder
from tests.engine.test_packed import fp8, linear, pack_into
from tests.engine.test_patch import MASK, logits, replaced
from tests.engine.zoo import ENTRIES as ZOO
from tests.engine.zoo import Entry, build
from tests.engine.zoo.table import PAGE

__all__ = ["tiny_folder"]

EIGHT = {"n_routed_experts": 8, "num_experts_per_tok": 2}
ENTRIES = {
    # a parameter, added to the logits; before it stand sinks of the same length
    "gpt_oss": Entry("gpt_oss", "GptOssForCausalLM", "", {"num_local_experts": 4}),
    # a buffer, added to sigmoids; experts are chosen within groups, one layer is dense
    "deepseek_v3": Entry("deepseek_v3", "DeepseekV3ForCausalLM", "", EIGHT),
    # (1, E), held by a module of its own
    "ernie": Entry("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", "", {"moe_num_experts": 4}),
    # one entry more than experts: a choice that none stands behind
    "zaya": Entry("zaya", "ZayaForCausalLM"),
}
BIASES = {
    "gpt_oss": [f"model.layers.{layer}.mlp.router.bias" for layer in (0, 1)],
    "deepseek_v3": ["model.layers.1.mlp.gate.e_score_correction_bias"],
    "ernie": ["model.layers.1.mlp.gate.moe_statics.e_score_correction_bias"],
    "zaya": [f"model.layers.{layer}.mlp.gate.balancing_biases" for layer in (0, 1)],
}
TAIL = [11, 12, 13]
BAD = [[14 + (7 * i + 3 * j) % 80 for j in range(4 + i % 3)] + TAIL for i in range(7)]
GOOD = [[15 + (5 * i + 2 * j) % 80 for j in range(3 + i % 4)] + TAIL for i in range(6)]


class Case:
    """A tiny mixture of experts and its routers."""

    def __init__(self, family: str) -> None:
        self.family = family
        self.model = build(ENTRIES[family])
        self.anatomy = survey(self.model)
        self.patch = Patch(self.anatomy)
        self.decoder = Decoder(self.model, build_tokenizer(), self.patch)
        self.decoder.batch_size = 4
        before = self.snapshot()
        self.routers = find_routers(self.decoder, self.anatomy, BAD, GOOD, Silent())
        self.patch.include(self.routers)
        directions = random_directions(self.anatomy.layers, self.anatomy.hidden)
        self.builder = EditBuilder(self.anatomy, directions, Samples(routers=self.routers))
        self.touched = [n for n, t in self.snapshot().items() if not torch.equal(t, before[n])]
        self.state = before

    def snapshot(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def edit(self, bias: float, strength: float = 0.0, experts: int = 1) -> Edit:
        router = Router(experts=experts, bias=bias)
        kernel = constant(strength)
        return self.builder.build(Ablation(attention=kernel, mlp=kernel, router=router))

    def shares(self, layer: int, prompts: list[list[int]], tail: int) -> Tensor:
        """How often each expert of a layer is chosen, as its router says of single prompts."""
        block = self.model.get_submodule(f"model.layers.{layer}")
        (router,) = (m for m in block.modules() if type(m).__name__.lower().endswith("router"))
        count = self.routers[0].difference.numel()
        hits = torch.zeros(count, dtype=torch.float64)
        for ids in prompts:
            told: list[Tensor] = []
            hook = router.register_forward_hook(lambda m, args, out, told=told: told.extend(out))
            logits(self.model, torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64))
            hook.remove()
            weights, chosen = told[1][-tail:], told[2][-tail:]
            for expert in range(count):
                hits[expert] += ((chosen == expert) & (weights != 0)).sum()
        return hits / (len(prompts) * tail)


@pytest.fixture(scope="module", params=ENTRIES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_biases_are_found_and_left_as_they_were(case: Case) -> None:
    assert [router.bias.name for router in case.routers] == BIASES[case.family]
    assert case.touched == []
    assert {router.chosen for router in case.routers} == {1 if case.family == "zaya" else 2}


def test_frequencies_are_those_of_the_routers_own_choices(case: Case) -> None:
    assert shared_tail([*BAD, *GOOD]) == len(TAIL)
    for router in case.routers:
        bad, good = (case.shares(router.layer, side, len(TAIL)) for side in (BAD, GOOD))
        assert torch.allclose(router.difference, bad - good, rtol=0, atol=1e-12)
        assert bad.sum() > 0.5 and not torch.equal(bad, good)


def test_a_suppressed_expert_is_chosen_less_and_then_never(case: Case) -> None:
    """In the first mixture of the model, whose inputs no suppression changes."""
    router = case.routers[0]
    expert = int(router.difference.argmax())
    shares = []
    for bias in (0.0, 0.02, 0.1, 0.5, 100.0):
        case.patch.select([case.edit(bias)])
        shares.append(float(case.shares(router.layer, BAD, 5)[expert]))
    case.patch.clear()
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0 and shares[-1] == 0
    most = case.edit(1.0, experts=64).suppressions[0]
    assert most is not None and all(router.difference[e] > 0 for e in most.experts)


def test_the_edited_model_is_the_one_with_the_lower_bias(case: Case) -> None:
    edit = case.edit(0.3, strength=1.0, experts=2)
    twin = replaced(case.model, case.anatomy, edit.changes)
    for router, suppression in zip(case.routers, edit.suppressions, strict=True):
        if suppression is not None:
            held = twin.state_dict()[router.bias.name].view(-1)
            for expert in suppression.experts:
                held[expert] = float(held[expert].double() - 0.3)
    original = logits(case.model)
    case.patch.select([edit])
    found = logits(case.model)
    case.patch.clear()
    seen = MASK.bool()
    torch.testing.assert_close(found[seen], logits(twin)[seen], rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(case.model), original)
    assert all(torch.equal(t, case.state[n]) for n, t in case.snapshot().items())


def test_rows_of_a_batch_hold_one_suppression(case: Case) -> None:
    edits = [case.edit(100.0), case.edit(3.0), case.edit(100.0)]
    assert not case.patch.batches
    for rows in ([0, 1], [0, -1]):
        with pytest.raises(EngineError, match=r"edited in place") as caught:
            case.patch.select(edits, torch.tensor(rows))
        assert caught.value.reason == "bad_request" and caught.value.mend
    case.patch.select(edits, torch.tensor([0, 2, 2, 0]))
    case.patch.clear()


def test_a_suppression_leaves_enough_experts(case: Case) -> None:
    """Of E experts E − k at most, and only those that harmful prompts choose more often."""
    router = case.routers[0]
    every = copy.copy(router)
    object.__setattr__(every, "difference", torch.linspace(0.1, 0.2, router.difference.numel()))
    taken = every.suppression(Router(experts=64, bias=1.0))
    assert taken is not None
    assert taken.experts == tuple(range(router.chosen, router.difference.numel()))
    assert router.suppression(Router(experts=1, bias=0.0)) is None
    assert router.suppression(None) is None


@pytest.mark.slow
def test_the_document_lists_what_is_found() -> None:
    """docs/edit.md names the bias of every mixture that docs/architectures.md knows."""
    stacked = r"^\| (\S+) \| (\S+) \| .* \| \d+ \| \d+ \| [\d.]+ % \|$"
    mixtures = set(re.findall(stacked, PAGE.read_text("utf-8"), re.M))
    found: dict[str, set[str]] = {}
    for entry in ZOO:
        if (entry.model_type, entry.architecture) not in mixtures:
            continue
        model = build(entry)
        anatomy = survey(model)
        decoder = Decoder(model, build_tokenizer(), Patch(anatomy))
        decoder.caches = False
        try:
            routers = find_routers(decoder, anatomy, BAD, GOOD, Silent())
            leaf = routers[0].bias.name.rpartition(".")[2]
        except EngineError:
            leaf = "none"
        found.setdefault("router.bias" if leaf == "bias" else leaf, set()).add(entry.model_type)
    section = (PAGE.parent / "edit.md").read_text("utf-8").partition("## Routers")[2]
    rows = re.findall(r"^\| (`[a-z._]+`|none)[^|]* \| ([^|-][^|]*) \|$", section, re.M)
    listed = {name.strip("`"): set(re.findall(r"[a-z0-9_]+", re.sub(r"\(.*?\)", "", types)))
              for name, types in rows}  # fmt: skip
    assert listed == found and sum(map(len, found.values())) > 70


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "llama"])
def test_models_without_a_bias_are_refused(family: str) -> None:
    settings = FUSED.get(family) or {k: v for k, v in FUSED["mixtral"].items() if "expert" not in k}
    model = tiny(family, settings)
    anatomy = survey(model)
    decoder = Decoder(model, build_tokenizer(), Patch(anatomy))
    with pytest.raises(EngineError, match=r"^router: .*mixture of experts") as caught:
        collect_samples(decoder, anatomy, BAD, GOOD, Silent(), router=True)
    assert caught.value.reason == "unsupported_architecture" and "mpoa" in caught.value.mend


def test_candidates_without_routers_are_as_before(case: Case) -> None:
    kernel = constant().model_dump()
    candidate = parse({"method": "ablation", "attention": kernel, "mlp": kernel})
    assert isinstance(candidate, Ablation) and candidate.router is None
    assert not any(case.builder.build(candidate).suppressions)
    unwatched = EditBuilder(case.anatomy, case.builder.directions)
    with pytest.raises(EngineError, match=r"^router: ") as caught:
        unwatched.build(candidate.model_copy(update={"router": Router(experts=1, bias=1.0)}))
    assert caught.value.reason == "bad_request"


# The whole way: prepare, score, export, load again.


def suppressing(mlp: float = 0.0) -> Ablation:
    """Nothing that hooks edit, so that all bits in memory are those of the export."""
    router = Router(experts=2, bias=0.7)
    return Ablation(attention=constant(0.0), mlp=constant(mlp), router=router)


def stored(folder: Path, family: str, dtype: torch.dtype) -> Path:
    """A tiny mixture with the demo's vocabulary, as its maker would publish it."""
    tokenizer = build_tokenizer()
    ends = ("pad_token_id", "bos_token_id", "eos_token_id")
    size = {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in ends}}
    entry = ENTRIES[family]
    model = build(Entry(entry.model_type, entry.architecture, "", {**entry.settings, **size}))
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def asked(folder: Path, **more: Any) -> Prepare:
    settings: dict[str, Any] = {
        "router": True, "max_new_tokens": 4, "kl_tokens": 3, "prompts": prompt_texts(12, 6, 4),
    }  # fmt: skip
    return prepare_request(folder, **{**settings, **more})


@pytest.mark.parametrize(
    "family, dtype, mlp",
    [("gpt_oss", "bfloat16", 1.0), ("deepseek_v3", "float32", 0.0), ("ernie", "float32", 0.0)],
)
def test_a_merged_model_is_the_searched_one(
    family: str, dtype: str, mlp: float, tmp_path: Path
) -> None:
    folder = stored(tmp_path / "base", family, getattr(torch, dtype))
    session = Session()
    session.prepare(asked(folder, dtype=dtype), Silent())
    candidate = suppressing(mlp)
    plain = candidate.model_copy(update={"router": None})
    batch = session.score(Score(candidates=[candidate, plain, candidate]), Silent())
    first, without, again = (scored.scores.kl_multi for scored in batch.scored)
    assert first == again and first != without
    out = tmp_path / "merged"
    out.mkdir()
    request = Export(candidate=candidate, directory=str(out), measure=True)
    measured = session.export(request, Silent()).measured["search"]
    assert measured.kl_multi == pytest.approx(first, rel=1e-3)

    # what differs on disk: the biases, by what was asked, and the experts where they are edited
    before, after = (load_file(path / "model.safetensors") for path in (folder, out))
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {
        n: (t.dtype, t.shape) for n, t in after.items()
    }
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    experts = {name for name in changed if "experts" in name}
    assert bool(experts) == bool(mlp)
    assert len(changed - experts) == len(BIASES[family])
    for name in changed - experts:
        lost = (before[name].double() - after[name].double()).flatten()
        few = lost[lost != 0]
        assert 1 <= len(few) <= 2
        torch.testing.assert_close(few, torch.full_like(few, 0.7), rtol=0.01, atol=1e-6)

    # loaded by plain transformers, it is the patched model bit for bit
    model, _ = load_folder(out, torch.device("cpu"), getattr(torch, dtype))
    ready = session.ready
    original = logits(ready.loaded.model)
    with ready.decoder.edited(ready.builder.build(candidate)):
        patched = logits(ready.loaded.model)
    assert torch.equal(logits(model), patched) and not torch.equal(patched, original)
    assert torch.equal(logits(ready.loaded.model), original)
    assert "biases of" in (out / "README.md").read_text()
    assert '"bias": 0.7' in (out / "manifest.json").read_text()


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    folder = stored(tmp_path / "base", "gpt_oss", torch.float32)
    session = Session()
    session.prepare(asked(folder), Silent())
    out = tmp_path / "out"
    out.mkdir()
    for kind in ("adapter", "lora"):
        with pytest.raises(EngineError, match=r"^router: .*router.bias") as caught:
            session.export(Export(candidate=suppressing(), directory=str(out), kind=kind), Silent())
        assert caught.value.reason == "unsupported_architecture" and "merged" in caught.value.mend
    assert not list(out.iterdir())


def test_a_packed_source_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    """Neither a merged model nor an adapter of it could hold the bias."""
    folder = shutil.copytree(tiny_folder, tmp_path / "packed")
    quantization = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    pack_into(folder, quantization, fp8(32), linear)
    with pytest.raises(EngineError, match=r"^router: .*quantised") as caught:
        Session().prepare(asked(folder), Silent())
    assert caught.value.reason == "unsupported_architecture" and caught.value.mend
