"""The demo model at the shapes of large models: the same function, the same edits."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from bench.inflate import write
from bench.inflate.check import padded, search_prompts
from bench.inflate.shapes import SHAPES, places
from bench.inflate.weights import tensors
from bench.inflate.write import inflate
from demo import MODEL
from demo.train import chat_ids
from engine.change import Projection, formula
from engine.checkpoint import INDEX, SINGLE, open_checkpoint
from engine.report import Silent
from engine.session import Session
from jobs.spec.candidate import EditMode, single_pass
from jobs.spec.protocol import Prepared, PromptTexts, Score, ScoredBatch
from tests.engine.conftest import request

SHAPE = SHAPES["test"]
SMALL = 256  # the demo's hidden size
CONFIG = AutoConfig.from_pretrained(MODEL)
WHERE = places(CONFIG, SHAPE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wide")
    inflate(SHAPE, out, "float32")
    return out


def loaded(path: Path) -> Any:
    factory: Any = AutoModelForCausalLM
    return factory.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def pair(folder: Path) -> tuple[Any, Any]:
    return loaded(MODEL), loaded(folder)


@pytest.fixture(scope="module")
def asked() -> tuple[Tensor, Tensor]:
    """Ids and mask of harmful and harmless prompts, padded on the left."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    longer = "How do I clean the kettle, please, and then the stove?"
    some = [*search_prompts("refused", 4), *search_prompts("answered", 4), longer]
    return padded([chat_ids(tokenizer, "", text) for text in some], tokenizer.pad_token_id)


@torch.inference_mode()
def test_logits_and_states_are_the_demos(
    pair: tuple[Any, Any], asked: tuple[Tensor, Tensor]
) -> None:
    ids, mask = asked
    heard = mask.bool()
    assert not heard.all()  # rows of unequal length
    places_of = (mask.cumsum(-1) - 1).clamp(min=0)
    demo, wide = (
        model(ids, attention_mask=mask, position_ids=places_of, output_hidden_states=True)
        for model in pair
    )
    assert (wide.logits[..., :1024] - demo.logits)[heard].abs().max() < 1e-4
    for layer in range(-1, SHAPE.layers):
        lower = max((i for i, depth in enumerate(WHERE.depths) if depth <= layer), default=-1)
        state = wide.hidden_states[layer + 1][heard]
        assert (state[:, :SMALL] - demo.hidden_states[lower + 1][heard]).abs().max() < 1e-4
        if layer + 1 < SHAPE.layers:  # the last one has passed the norm
            assert (state[:, SMALL : SMALL + 2] == 2**-7).all()
            assert not state[:, SMALL + 2 :].any()


@torch.inference_mode()
def test_tokens_of_the_padding_have_no_probability(
    pair: tuple[Any, Any], asked: tuple[Tensor, Tensor]
) -> None:
    demo, wide = (
        model(asked[0], attention_mask=asked[1]).logits[asked[1].bool()] for model in pair
    )
    assert wide.shape[-1] == SHAPE.vocabulary
    whole = wide.log_softmax(-1)
    assert (whole[:, :1024] - demo.log_softmax(-1)).abs().max() < 1e-4
    assert not whole[:, 1024:].exp().any()  # exactly 0 in float32


def test_greedy_answers_are_the_demos(pair: tuple[Any, Any], asked: tuple[Tensor, Tensor]) -> None:
    demo, wide = (
        model.generate(
            input_ids=asked[0], attention_mask=asked[1], max_new_tokens=16, do_sample=False
        )
        for model in pair
    )
    assert torch.equal(demo, wide)


@pytest.mark.parametrize(
    "changes",
    [
        {"tied": False},
        {"hidden": 448, "heads": 14, "kv_heads": 2, "head_dim": 64},
        {"hidden": 512, "heads": 4, "kv_heads": 2, "layers": 8, "vocabulary": 1024},
    ],
)
@torch.inference_mode()
def test_other_shapes_have_the_same_logits(
    changes: dict[str, Any], pair: tuple[Any, Any], asked: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    inflate(replace(SHAPE, **changes), tmp_path, "float32")
    demo, wide = (
        model(asked[0], attention_mask=asked[1]).logits[asked[1].bool()]
        for model in (pair[0], loaded(tmp_path))
    )
    assert (wide[:, :1024] - demo).abs().max() < 1e-4
    assert not wide.log_softmax(-1)[:, 1024:].exp().any()


def test_the_folder_is_a_plain_checkpoint(pair: tuple[Any, Any], folder: Path) -> None:
    _, wide = pair
    assert isinstance(wide, LlamaForCausalLM)
    count = sum(p.numel() for p in wide.parameters())
    assert (folder / SINGLE).stat().st_size == pytest.approx(4 * count, rel=1e-3)
    assert not (folder / INDEX).exists()
    assert wide.config.num_hidden_layers == SHAPE.layers
    assert wide.generation_config.max_new_tokens == 64
    for name in ("tokenizer.model", "tokenizer.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (MODEL / name).read_bytes()


def test_shards_are_limited_and_whole(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "SHARD", 10_000_000)
    done = inflate(SHAPE, tmp_path, "bfloat16")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == done.files > 3
    assert all(file.stat().st_size < 10_100_000 for file in files)
    assert json.loads((tmp_path / INDEX).read_text())["metadata"]["total_size"] == done.bytes
    single = load_file(folder / SINGLE)
    together = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert together.keys() == single.keys() == open_checkpoint(tmp_path, "wide").tensors.keys()
    for name, tensor in together.items():
        assert torch.equal(tensor, single[name].bfloat16()), name


@pytest.mark.parametrize(
    ("name", "billions"),
    [("0.5B", 0.494), ("0.6B", 0.596), ("1.7B", 1.72), ("8B", 8.03), ("32B", 32.76)],
)
def test_named_shapes_have_the_parameters_of_their_models(name: str, billions: float) -> None:
    known = load_file(MODEL / SINGLE)
    config = AutoConfig.from_pretrained(MODEL)
    whole = sum(math.prod(size) for size, _ in tensors(known, config, SHAPES[name]).values())
    assert whole / 1e9 == pytest.approx(billions, rel=0.005)


@pytest.mark.parametrize("layer", [0, 1])  # one of the demo's, one between
@pytest.mark.parametrize("kind", ["self_attn.q_proj", "self_attn.v_proj", "self_attn.k_proj"])
def test_padding_is_as_large_as_the_demos_weights(kind: str, layer: int) -> None:
    known = {name: tensor.float() for name, tensor in load_file(MODEL / SINGLE).items()}
    small = known[f"model.layers.0.{kind}.weight"]
    _, make = tensors(known, CONFIG, SHAPES["8B"])[f"model.layers.{layer}.{kind}.weight"]
    wide = make()
    assert (wide == 0).float().mean() < 0.1
    padding = wide[:, SMALL:]
    assert float(padding.std()) == pytest.approx(float(small.std()), rel=0.05)
    assert padding.abs().max() <= small.abs().max()


WRITERS = {
    "self_attn.o_proj": WHERE.outputs,
    "mlp.down_proj": torch.arange(CONFIG.intermediate_size),
}


@pytest.mark.parametrize("mode", ["none", "pre", "full", "columns"])
@pytest.mark.parametrize("kind", WRITERS)
def test_edit_of_the_wide_writer_is_the_edit_of_the_demos(
    kind: str, mode: EditMode, folder: Path
) -> None:
    torch.manual_seed(0)
    v = torch.nn.functional.normalize(torch.randn(1, SMALL), dim=1)
    wide_v = torch.cat([v, torch.zeros(1, SHAPE.hidden - SMALL)], 1)
    small = load_file(MODEL / SINGLE)[f"model.layers.3.{kind}.weight"]
    wide = load_file(folder / SINGLE)[f"model.layers.{WHERE.depths[3]}.{kind}.weight"]
    expected = formula(small, Projection(v, 0.9, mode))
    edited = formula(wide, Projection(wide_v, 0.9, mode))
    columns = WRITERS[kind]
    assert (edited[:SMALL, columns] - expected).abs().max() < 1e-6
    assert (expected - small).abs().max() > 1e-3  # something was edited
    edited[:SMALL, columns] = 0
    wide[:SMALL, columns] = 0
    assert (edited - wide).abs().max() < 1e-6  # and nothing beside it


@pytest.mark.parametrize("kind", ["v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
def test_blocks_of_four_bit_codes_do_not_mix_with_padding(kind: str, folder: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    def rounded(W: Tensor) -> Tensor:
        packed, state = quantize_4bit(W, blocksize=64, quant_type="nf4")
        back: Tensor = dequantize_4bit(packed, state)
        return back

    path = f"{'self_attn' if kind in ('v_proj', 'o_proj') else 'mlp'}.{kind}"
    small = load_file(MODEL / SINGLE)[f"model.layers.2.{path}.weight"].float()
    wide = load_file(folder / SINGLE)[f"model.layers.{WHERE.depths[2]}.{path}.weight"]
    rows = WHERE.values if kind == "v_proj" else torch.arange(len(small))
    columns = WHERE.outputs if kind == "o_proj" else torch.arange(small.shape[1])
    assert torch.equal(rounded(wide)[rows[:, None], columns], rounded(small))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": 257}, "hidden"),
        ({"layers": 7}, "layers: 8 do not fit into 7"),
        ({"kv_heads": 12}, "query heads of a key-value head: 2 do not fit into 1"),
        ({"head_dim": 96}, "frequencies of heads of 64"),
        ({"vocabulary": 1000}, "vocabulary"),
    ],
)
def test_a_shape_that_is_too_small_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        inflate(replace(SHAPE, **changes), tmp_path)
    assert not any(tmp_path.iterdir())


def test_unknown_dtype_and_full_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="choose bfloat16 or float32"):
        inflate(SHAPE, tmp_path, "int8")
    (tmp_path / "mine").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        inflate(SHAPE, tmp_path)


@pytest.mark.slow
def test_abliteration_has_the_same_scores(folder: Path) -> None:
    harmful, harmless = (search_prompts(name, 64) for name in ("refused", "answered"))
    prompts = PromptTexts(
        direction_harmful=harmful[:32], direction_harmless=harmless[:32],
        search_harmful=harmful[32:], search_harmless=harmless[32:],
        heldout_harmful=harmful[:2], heldout_harmless=harmless[:2],
    )  # fmt: skip
    found = []
    for path, layers in ((MODEL, 8), (folder, SHAPE.layers)):
        session = Session()
        prepared = session.handle(request(path, prompts=prompts, max_new_tokens=48), Silent())
        assert isinstance(prepared, Prepared)
        assert prepared.baseline["search"].refusals == 32
        assert prepared.anatomy.layers == layers
        assert prepared.anatomy.coverage == 1
        batch = session.handle(Score(candidates=[single_pass(layers)]), Silent())
        assert isinstance(batch, ScoredBatch)
        found.append(batch.scored[0].scores)
    demo, wide = found
    assert demo.kl_first is not None and wide.kl_first is not None
    assert demo.refusals == wide.refusals < 5
    assert wide.kl_first == pytest.approx(demo.kl_first, abs=1e-5)
