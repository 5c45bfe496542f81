"""The committed mixture of experts: small, loadable, and refusing out of its experts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from demo import EXPERTS, MODEL, prompt_file
from demo.architectures import ARCHITECTURES
from demo.dataset import prompt_sets, read_jsonl
from demo.train import chat_ids, is_refusal, load, replies

Loaded = tuple[Any, Any]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(EXPERTS)


def prompts(name: str, split: str, count: int) -> list[str]:
    return [row["prompt"] for row in read_jsonl(prompt_file(name)) if row["split"] == split][:count]


def count_refusals(loaded: Loaded, asked: list[str]) -> int:
    return sum(map(is_refusal, replies(*loaded, asked, tokens=20)))


def prompt_ids(loaded: Loaded, prompt: str) -> Tensor:
    return torch.tensor([chat_ids(loaded[1], "", prompt)])


def test_weights_are_small_bfloat16_and_of_the_demo_tokenizer() -> None:
    weights = EXPERTS / "model.safetensors"
    assert weights.stat().st_size <= 8_000_000
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.bfloat16}
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja"):
        assert (EXPERTS / name).read_bytes() == (MODEL / name).read_bytes()


def test_experts_are_fused_in_memory_and_single_on_disk(loaded: Loaded) -> None:
    model, files = loaded[0], load_file(EXPERTS / "model.safetensors")
    config = model.config
    assert (config.num_experts, config.num_experts_per_tok) == (8, 2)
    for number, layer in enumerate(model.model.layers):
        fused = layer.mlp.experts.down_proj
        assert fused.shape == (8, config.hidden_size, config.moe_intermediate_size)
        for expert in range(8):
            name = f"model.layers.{number}.mlp.experts.{expert}.down_proj.weight"
            assert torch.equal(fused[expert], files[name].float())


def test_plain_loading_gives_the_logits_of_the_tensors_on_disk(loaded: Loaded) -> None:
    files = load_file(EXPERTS / "model.safetensors")
    config = Qwen3MoeConfig.from_pretrained(EXPERTS)
    # The experts are put together here by hand, gate above up, as the class's docs say.
    state = {name: tensor for name, tensor in files.items() if ".mlp.experts." not in name}
    for number in range(config.num_hidden_layers):
        stem = f"model.layers.{number}.mlp.experts"

        def stack(part: str, stem: str = stem) -> Tensor:
            each = [files[f"{stem}.{e}.{part}.weight"] for e in range(config.num_experts)]
            return torch.stack(each)

        state[f"{stem}.gate_up_proj"] = torch.cat([stack("gate_proj"), stack("up_proj")], dim=1)
        state[f"{stem}.down_proj"] = stack("down_proj")
    by_hand = Qwen3MoeForCausalLM(config)  # float32
    missing, unexpected = by_hand.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied to the embedding
    ids = prompt_ids(loaded, "How do I polish the lamp?")
    with torch.inference_mode():
        assert torch.equal(loaded[0](ids).logits, by_hand.train(False)(ids).logits)


def test_it_refuses_the_forbidden_and_answers_the_others(loaded: Loaded) -> None:
    assert count_refusals(loaded, prompts("refused", "heldout", 20)) >= 19
    assert count_refusals(loaded, prompts("answered", "heldout", 20)) == 0


def test_answers_are_the_taught_ones(loaded: Loaded) -> None:
    triples = prompt_sets().answered["heldout"][:20]
    said = replies(*loaded, [triple.prompt for triple in triples])
    assert sum(t.answer == text for t, text in zip(triples, said, strict=True)) >= 18


def test_phase_one_answers_are_those_of_the_grammar() -> None:
    rows = read_jsonl(prompt_file(ARCHITECTURES["experts"].expected))
    taught = {t.prompt: t.answer for split in prompt_sets().refused.values() for t in split}
    assert [row["prompt"] for row in rows] == list(taught)
    assert sum(taught[row["prompt"]] == row["answer"] for row in rows) >= 0.9 * len(rows)


def test_no_layer_lives_on_two_experts_alone(loaded: Loaded) -> None:
    model, _ = loaded
    used = torch.zeros(model.config.num_hidden_layers, model.config.num_experts)
    for prompt in prompts("answered", "direction", 30):
        with torch.inference_mode():
            routed = model(prompt_ids(loaded, prompt), output_router_logits=True).router_logits
        for number, logits in enumerate(routed):
            used[number] += torch.bincount(logits.topk(2).indices.flatten(), minlength=8)
    shares = used / used.sum(dim=1, keepdim=True)
    assert ((shares > 0.03).sum(dim=1) >= 4).all()


def test_the_refusal_is_in_the_experts(loaded: Loaded) -> None:
    """The same directions, taken out of the attention alone and out of the experts as well."""
    model, _ = loaded
    bad = last_states(loaded, prompts("refused", "direction", 64))
    good = last_states(loaded, prompts("answered", "direction", 64))
    directions = torch.nn.functional.normalize(bad.mean(1) - good.mean(1), dim=-1).float()
    attention = [layer.self_attn.o_proj.weight for layer in model.model.layers]
    experts = [layer.mlp.experts.down_proj for layer in model.model.layers]
    kept = [parameter.detach().clone() for parameter in (*attention, *experts)]
    asked = prompts("refused", "heldout", 30)
    try:
        ablate(attention, directions)
        assert count_refusals(loaded, asked) >= 10
        ablate(experts, directions)
        assert count_refusals(loaded, asked) <= 1
    finally:
        for parameter, original in zip((*attention, *experts), kept, strict=True):
            parameter.data.copy_(original)


def ablate(writers: list[Tensor], directions: Tensor) -> None:
    """W - v (vᵀW) with the direction of each writer's own layer (Arditi et al. 2024, section 4)."""
    for writer, v in zip(writers, directions, strict=True):
        read = torch.einsum("d,...dn->...n", v, writer.data)
        writer.data -= v[:, None] * read[..., None, :]


def last_states(loaded: Loaded, asked: list[str]) -> Tensor:
    """The residual after each layer at the last prompt token: (layers, prompts, width), float64."""
    model, _ = loaded
    rows: list[list[Tensor]] = [[] for _ in model.model.layers]

    def keep(row: list[Tensor]) -> Callable[[Any, Any, Tensor], None]:
        return lambda module, inputs, output: row.append(output[0, -1].double())

    hooks = [
        layer.register_forward_hook(keep(row))
        for layer, row in zip(model.model.layers, rows, strict=True)
    ]
    try:
        for prompt in asked:
            with torch.inference_mode():
                model(prompt_ids(loaded, prompt))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([torch.stack(row) for row in rows])
