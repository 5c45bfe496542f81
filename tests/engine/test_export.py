"""Artifacts against the patched model, read back by plain transformers and plain peft."""

from __future__ import annotations

import hashlib
import json
import random
import resource
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine import export
from engine.anatomy import Anatomy, survey
from engine.change import Change, Projection, formula
from engine.directions import Directions
from engine.edit import EditBuilder
from engine.errors import EngineError
from engine.export import stream
from engine.export.adapter import Adapter
from engine.export.card import CardFacts, render
from engine.export.folder import Folder
from engine.load import Loaded, load
from engine.patch import Patch
from engine.report import Silent
from jobs.spec.candidate import Ablation, Candidate, EditMode, Kernel, constant
from jobs.spec.protocol import Export, Exported
from jobs.spec.scores import Scores
from tests.engine.conftest import Save, random_directions, request

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
MODES: tuple[EditMode, ...] = ("none", "pre", "full", "columns")


class Case:
    """A loaded model and what exporting it needs."""

    def __init__(self, folder: Path, **more: Any) -> None:
        self.folder = folder
        self.loaded: Loaded = load(request(folder, **more), Silent())
        self.anatomy: Anatomy = survey(self.loaded.model)
        self.directions: Directions = random_directions(self.anatomy.layers, self.anatomy.hidden)
        self.builder = EditBuilder(self.anatomy, self.directions)

    def write(self, directory: Path, of: Candidate, **more: Any) -> Exported:
        directory.mkdir(exist_ok=True)
        asked = Export(candidate=of, directory=str(directory), **more)
        changes = self.builder.changes(of)
        return export.write(self.loaded, self.anatomy, changes, asked, Silent())

    def patched(self, of: Candidate) -> Tensor:
        with Patch(self.anatomy) as patch:
            patch.select([self.builder.build(of)])
            return logits(self.loaded.model)

    def change(self, of: Ablation, name: str) -> Change | None:
        """What `of` does to a parameter of the checkpoint."""
        for writer, change in zip(self.anatomy.writers, self.builder.changes(of), strict=True):
            if f"{writer.name}.weight" == name:
                return change
        return None


def candidate(mode: EditMode, **more: Any) -> Ablation:
    """λ falls over the attention layers and is 0 on the first; 0.9 on every MLP."""
    fields: dict[str, Any] = {
        "mode": mode,
        "attention": Kernel(max_weight=1.3, min_weight=0.4, position=2.0, distance=1.5),
        "mlp": constant(0.9),
        **more,
    }
    return Ablation(**fields)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits.float()
    return found


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def adapted(folder: Path, adapter: Path) -> Any:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft warns of missing and of unexpected keys
        warnings.simplefilter("ignore", FutureWarning)
        return PeftModel.from_pretrained(base, adapter).eval()


FAMILIES = ["llama", "gpt2", "gpt_neox", "gemma2", "opt", "phi", "falcon"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, save: Save) -> Case:
    return Case(save(request.param, max_shard_size="60KB" if request.param == "llama" else "5GB"))


@pytest.fixture(scope="module")
def llama(save: Save) -> Case:
    return Case(save("llama", max_shard_size="60KB"))


@pytest.mark.parametrize("mode", MODES)
def test_merged_is_the_patched_model(mode: EditMode, family: Case, tmp_path: Path) -> None:
    of = candidate(mode)
    family.write(tmp_path, of)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    true = family.patched(of)
    assert (true - logits(family.loaded.model)).abs().max() > 1e-2
    assert (logits(merged) - true).abs().max() < 1e-4
    AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("mode", MODES)
def test_adapter_is_the_merged_model(mode: EditMode, family: Case, tmp_path: Path) -> None:
    of = candidate(mode)
    family.write(tmp_path / "merged", of)
    exact = mode != "columns"
    done = family.write(tmp_path / "adapter", of, kind="adapter", rank=32)
    assert done.truncation_error == 0 if exact else (done.truncation_error or 1) < 1e-5
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    model = adapted(family.folder, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["use_dora"] == (mode == "full")
    assert config["r"] == (1 if exact else 32)
    assert len(config["target_modules"]) == 5  # λ = 0 on the first attention writer
    assert (logits(model) - logits(merged)).abs().max() < 1e-4
    assert (logits(model.merge_and_unload()) - logits(merged)).abs().max() < 1e-4


def test_unedited_tensors_are_byte_identical(llama: Case, tmp_path: Path) -> None:
    of = candidate("full", scope="global", index=1.3)
    llama.write(tmp_path, of)
    edited = {
        f"{w.name}.weight" for w in llama.anatomy.writers if of.kernel(w.component).weight(w.layer)
    }
    before, after = tensors(llama.folder), tensors(tmp_path)
    assert before.keys() == after.keys() and len(edited) == 5
    for name, tensor in before.items():
        if name not in edited:
            assert tensor.numpy().tobytes() == after[name].numpy().tobytes()
            continue
        change = llama.change(of, name)
        assert change is not None
        true = formula(tensor, change)
        assert torch.equal(after[name], true.float()) or torch.allclose(
            after[name].double(), true, rtol=1e-6, atol=1e-9
        )
    for path in llama.folder.iterdir():
        if path.suffix != ".safetensors":
            assert (tmp_path / path.name).read_bytes() == path.read_bytes()
        else:  # same header: same names, order, dtypes, metadata
            with safe_open(path, "pt") as a, safe_open(tmp_path / path.name, "pt") as b:
                assert list(a.keys()) == list(b.keys()) and a.metadata() == b.metadata()
    assert len(list(tmp_path.glob("*.safetensors"))) > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_of_the_checkpoint_is_kept(dtype: torch.dtype, save: Save, tmp_path: Path) -> None:
    case = Case(save("llama", dtype=dtype))
    of = candidate("full")
    case.write(tmp_path, of)
    before, after = tensors(case.folder), tensors(tmp_path)
    assert all(t.dtype == dtype for t in after.values())
    name = "model.layers.2.mlp.down_proj.weight"
    true = formula(before[name], Projection(case.directions.of(of)[2], 0.9, "full"))
    assert (after[name] != true.to(dtype)).float().mean() < 1e-3  # float64, rounded once
    assert not torch.equal(after[name], before[name])


def test_tied_embeddings(save: Save, tmp_path: Path) -> None:
    case = Case(save("llama", tie_word_embeddings=True))
    assert "lm_head.weight" not in tensors(case.folder)
    of = candidate("none")
    case.write(tmp_path, of)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert (logits(merged) - case.patched(of)).abs().max() < 1e-4


def test_export_of_a_quantised_search_uses_the_original(save: Save, tmp_path: Path) -> None:
    folder = save("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    quantised, plain = Case(folder, quantization="bnb_4bit"), Case(folder)
    of = candidate("full")
    for kind in ("merged", "adapter"):
        quantised.write(tmp_path / f"q-{kind}", of, kind=kind)
        plain.write(tmp_path / f"p-{kind}", of, kind=kind)
        for name, tensor in tensors(tmp_path / f"p-{kind}").items():
            assert torch.equal(tensor, tensors(tmp_path / f"q-{kind}")[name])
    model = adapted(folder, tmp_path / "q-adapter")
    assert (logits(model) - plain.patched(of)).abs().max() < 1e-4


def test_plain_lora_states_its_error(llama: Case, tmp_path: Path) -> None:
    of = candidate("full")
    errors = []
    for rank in (1, 4, 16):
        folder = tmp_path / str(rank)
        done = llama.write(folder, of, kind="lora", rank=rank)
        found = load_file(folder / "adapter_model.safetensors")
        own = []
        for w in llama.anatomy.writers:
            lam = of.kernel(w.component).weight(w.layer)
            if not lam:
                continue
            key = f"base_model.model.{w.name}"
            A, B = (found[f"{key}.lora_{k}.weight"] for k in "AB")
            assert A.shape == (rank, w.n) and B.shape == (w.d, rank)
            W = w.weight()
            V = llama.directions.of(of)[w.layer]
            delta = formula(W, Projection(V, lam, "full")) - W.double()
            own.append(float((delta - B.double() @ A.double()).norm() / delta.norm()))
        assert done.truncation_error == pytest.approx(max(own), rel=1e-3)
        errors.append(max(own))
        card = (folder / "README.md").read_text()
        assert f"rank {rank}" in card and f"{max(own):.2%}" in card
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["use_dora"] is False and config["r"] == config["lora_alpha"] == rank
    assert 0.5 > errors[0] > errors[1] > errors[2]
    logits(adapted(llama.folder, tmp_path / "16"))


def test_randomised_svd_is_near_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.export import adapter

    torch.manual_seed(0)
    W, v = torch.randn(96, 160), torch.nn.functional.normalize(torch.randn(96), dim=0)
    change = Projection(v[None], 1.1, "full")
    best = adapter.truncated(W, change, 4).error
    monkeypatch.setattr(adapter, "EXACT_SVD", 8)
    assert adapter.truncated(W, change, 4).error < 1.05 * best


def test_sums_card_and_file_list(llama: Case, tmp_path: Path) -> None:
    scores = {r: Scores(role=r, refusals=3, total=100, kl_first=0.012) for r in ("search",)}
    baseline = {"search": {"role": "search", "refusals": 97, "total": 100, "interval": [0, 1]}}
    card = {"baseline": baseline, "scores": scores, "trial": 12, "job": "a|b\n# no heading"}
    asked = Export(
        candidate=candidate("full", scope="global", index=1.5),
        directory=str(tmp_path),
        card=json.loads(json.dumps(card, default=lambda s: s.model_dump())),
    )
    seen: list[Path] = []

    def measure(folder: Path) -> dict[Any, Scores]:
        seen.append(folder)
        assert (folder / "config.json").is_file()
        return {"search": Scores(role="search", refusals=4, total=100, kl_first=0.013)}

    changes = llama.builder.changes(asked.candidate)
    done = export.write(llama.loaded, llama.anatomy, changes, asked, Silent(), measure)
    assert seen == [tmp_path] and done.measured["search"].refusals == 4
    assert {f.name for f in done.files} == {p.name for p in tmp_path.iterdir()}
    for file in done.files:
        data = (tmp_path / file.name).read_bytes()
        assert (file.size, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    listed = (tmp_path / "SHA256SUMS").read_text().splitlines()
    assert len(listed) == len(done.files) - 1
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=tmp_path, check=True)
    text = (tmp_path / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    matter = yaml.safe_load(front)
    assert matter["base_model"] == "owner/tiny" and "abliterated" in matter["tags"]
    assert "3/100 (1.0–8.5 %)" in body and "4/100" in body and "97/100" in body
    assert "0.012" in body and "0.013" in body and "\n# no heading" not in body
    assert '"index": 1.5' in body and "| trial | 12 |" in body


@pytest.mark.parametrize("commit", ["c0ffee", None])
def test_the_card_names_the_base_that_the_adapter_belongs_to(commit: str | None) -> None:
    """A model of the operator's folder is not on the hub, whatever its name looks like."""
    adapter = Adapter(dora=True, rank=1, worst_error=0.0, mean_error=0.0)
    facts = CardFacts(
        "owner/tiny", commit, "adapter", candidate("full"), "none", "float32", {}, adapter
    )
    text = render({}, facts)
    code = text.split("```python\n")[1].split("```")[0]
    assert ("https://huggingface.co/owner/tiny" in text) is (commit is not None)
    base = '"owner/tiny", revision="c0ffee"' if commit else '"BASE"'
    assert f'AutoModelForCausalLM.from_pretrained({base}, dtype="auto")' in code
    assert f"AutoTokenizer.from_pretrained({base})" in code
    assert ("`BASE` is the folder of the base model, owner/tiny." in text) is (commit is None)


def test_the_card_s_program_runs(llama: Case, tmp_path: Path) -> None:
    """What the card tells people to type, typed."""
    llama.write(tmp_path / "merged", candidate("full"))
    code = (tmp_path / "merged" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace("PATH", str(tmp_path / "merged")).replace("200", "3")
    # The model's vocabulary is smaller than the tokenizer's.
    code = code.replace("answer =", 'inputs["input_ids"] %= 90\nanswer =')
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_a_full_disk(kind: str, llama: Case, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: writing fails in the middle of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(EngineError) as caught:
            llama.write(tmp_path, candidate("full"), kind=kind)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.reason == "disk_full" and caught.value.mend
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("direct", [stream.DIRECT, 0])
@pytest.mark.parametrize("size", [0, 1, 8191, 8192, 8193, 3 * 8192, 50_001])
def test_files_are_written_whole(
    size: int, direct: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of any length, blocks that end where the data ends, with and without O_DIRECT."""
    monkeypatch.setattr(stream, "BLOCK", 8192)
    monkeypatch.setattr(stream, "DIRECT", direct)
    data = random.Random(size).randbytes(size)
    for step in (1000, 8192, 20_000):
        chunks = (data[k : k + step] for k in range(0, size, step))
        found = stream.write_hashed(tmp_path / "file", chunks)
        assert found == (size, hashlib.sha256(data).hexdigest())
        assert (tmp_path / "file").read_bytes() == data


def test_a_device_with_large_sectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a block does not suit the device the rest goes through the page cache."""
    monkeypatch.setattr(stream, "BLOCK", 100)  # no device takes that past the cache
    data = random.Random(1).randbytes(1050)
    found = stream.write_hashed(tmp_path / "file", [data])
    assert found == (1050, hashlib.sha256(data).hexdigest())
    assert (tmp_path / "file").read_bytes() == data


def test_too_small_a_disk_is_seen_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="needs 1000000000") as caught, Folder(tmp_path) as folder:
        folder.need(10**18)
    assert caught.value.reason == "disk_full"


def test_a_failure_leaves_nothing(llama: Case, tmp_path: Path) -> None:
    def measure(folder: Path) -> dict[Any, Scores]:
        raise OSError(28, "No space left on device")

    asked = Export(candidate=candidate("full"), directory=str(tmp_path))
    changes = llama.builder.changes(asked.candidate)
    with pytest.raises(EngineError) as caught:
        export.write(llama.loaded, llama.anatomy, changes, asked, Silent(), measure)
    assert caught.value.reason == "disk_full" and caught.value.mend
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_is_not_the_writer_s_is_refused(save: Save, tmp_path: Path) -> None:
    case = Case(save("llama"))
    weights = case.folder / "model.safetensors"
    found = load_file(weights)
    name = "model.layers.2.self_attn.o_proj.weight"
    save_file({**found, name: found[name].T.contiguous()}, weights, {"format": "pt"})
    with pytest.raises(EngineError, match="other values") as caught:
        case.write(tmp_path / "a", candidate("full"))
    assert caught.value.reason == "unsupported_architecture"
    assert not list((tmp_path / "a").iterdir())
    del found[name]
    save_file(found, weights, {"format": "pt"})
    with pytest.raises(EngineError, match="hold no tensor"):
        case.write(tmp_path / "b", candidate("full"))


def test_an_edit_of_nothing(llama: Case, tmp_path: Path) -> None:
    nothing = candidate("full", attention=constant(0.0), mlp=constant(0.0))
    llama.write(tmp_path / "merged", nothing)
    for name, tensor in tensors(llama.folder).items():
        assert torch.equal(tensor, tensors(tmp_path / "merged")[name])
    with pytest.raises(EngineError, match="no layer"):
        llama.write(tmp_path / "adapter", nothing, kind="adapter")
