"""What of a checkpoint is loaded, and in how many bytes: by the names and shapes of its tensors.

As transformers 5 loads and bitsandbytes quantises: `nn.Linear` and GPT-2's `Conv1D` modules are
packed, and nothing else. Embeddings, the output head (tied or not), norms and convolutions are
kept, and so are the experts of a mixture: they are one three-dimensional parameter each, stacked
while loading where the files hold one matrix per expert.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jobs.checkpoints import Checkpoint, Tensor
from jobs.spec.job import Quantization
from jobs.spec.memory import basis_bytes
from jobs.spec.shape import Shape, experts_used, text_part

# bytes per quantised parameter: nf4 keeps an absmax per 64 values, itself in 8 bits per 256
NF4_BYTES = 0.5 + (1 + 4 / 256) / 64
NF4_TABLES = (256 + 16 + 1) * 4  # of each matrix: the codes of both levels and an offset
INT8_BYTES = 1.0
PACKED: dict[Quantization, float] = {"none": 0, "bnb_8bit": INT8_BYTES, "bnb_4bit": NF4_BYTES}
FLOATS = {"F64", "F32", "F16", "BF16"}
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}

_EXPERT = re.compile(r"\.(?:local_)?experts\.")
_ONE_EXPERT = re.compile(r"\.(?:local_)?experts\.\d+\.")
_STACKED = re.compile(r"(?:down_proj|output_linear|w2|fc2)(?:\.weight|_blocks)?$")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output_layer|output)\.weight$")
_TABLE = re.compile(r"embed|(?:^|\.)(?:wte|wpe)\.|rel(?:ative)?_pos|position", re.IGNORECASE)
_ROUTER = re.compile(r"(?:router(?:\.classifier)?|\.(?:mlp|moe|block_sparse_moe)\.gate)\.weight$")
_PREDICTION = re.compile(r"(?:^|\.)mtp(?:_|\.|$)")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
_OTHER_TOWER = re.compile(r"vision|visual|image|audio|speech|encoder", re.IGNORECASE)
_WRITER = re.compile(
    r"(?:o_proj|out_proj|down_proj|c_proj|wo|w2|fc2|fc_out|o|dense|dense_4h_to_h|output_linear"
    r"|shared_mlp\.output_linear)\.weight$"
)


@dataclass(frozen=True)
class Weights:
    """A checkpoint's parameters by what becomes of them; all counts are of numbers, not bytes.

    linear       matrices that bitsandbytes packs
    experts      of fused experts, which it does not
    kept         all other numbers: embeddings, head, norms, routers, convolutions
    stored       bytes of tensors that come packed already (integers, eight-bit floats); loaded so
    idle         of a token's forward: experts that it does not pass, and the embedding table
    stacked      of the experts' numbers, those whose output is added to the residual stream
    widest       numbers of the largest matrix that bitsandbytes packs
    outputs      rows of all those matrices: eight bits keep a float32 scale for each
    matrices     how many they are: four bits keep two small tables for each
    files        bytes of all tensors in the files
    converted    bytes in the files of experts that are stacked while loading
    own_width    bytes of one number in the files, where most are floats; 0 where they are packed
    bases        bytes of the edit bases of all single writers, one kind of directions
    """

    linear: int
    experts: int
    kept: int
    stored: int
    idle: int
    stacked: int
    widest: int
    outputs: int
    matrices: int
    files: int
    converted: int
    own_width: int
    bases: int

    @property
    def parameters(self) -> int:
        """Numbers that are loaded as such."""
        return self.linear + self.experts + self.kept

    @property
    def active(self) -> int:
        """Numbers that one token's forward multiplies with."""
        return max(0, self.parameters - self.idle)

    def loaded(self, quantization: Quantization, width: int) -> int:
        """Bytes of the loaded weights; `width` bytes a number that is not packed."""
        if quantization == "none" or self.stored:
            return self.stored + width * self.parameters
        packed = round(self.linear * PACKED[quantization])
        packed += 4 * self.outputs if quantization == "bnb_8bit" else NF4_TABLES * self.matrices
        return packed + width * (self.experts + self.kept)


def weights_of(checkpoint: Checkpoint, shape: Shape) -> Weights:
    """Sort a checkpoint's tensors. Those that no causal language model loads are left out."""
    tensors = list(_loaded(checkpoint, shape.layers))
    # the output of torch's own multi-head attention is a subclass of nn.Linear: not packed
    plain = {
        tensor.name.replace("in_proj_weight", "out_proj.weight")
        for tensor in tensors
        if tensor.name.endswith("in_proj_weight")
    }
    count: Counter[str] = Counter()
    widest = table = bases = 0
    for tensor in tensors:
        numbers = tensor.parameters
        if tensor.dtype not in FLOATS:
            count["stored"] += tensor.size
        elif _EXPERT.search(tensor.name):
            count["experts"] += numbers
            count["converted"] += tensor.size if _ONE_EXPERT.search(tensor.name) else 0
            count["stacked"] += numbers if _STACKED.search(tensor.name) else 0
        elif is_linear(tensor, shape) and tensor.name not in plain:
            count.update(linear=numbers, outputs=tensor.shape[0], matrices=1)
            widest = max(widest, numbers)
        else:
            count["kept"] += numbers
            table = max(table, numbers if is_table(tensor, shape) else 0)
        if is_writer(tensor, shape):
            bases += basis_bytes(shape.layers, shape.hidden, numbers // shape.hidden)
    floats = [tensor for tensor in tensors if tensor.dtype in FLOATS]
    most = max(floats, key=lambda t: t.parameters, default=None)
    two_tables = sum(is_table(tensor, shape) for tensor in tensors) > 1
    return Weights(
        linear=count["linear"],
        experts=count["experts"],
        kept=count["kept"],
        stored=count["stored"],
        idle=_idle(checkpoint.config, count["experts"]) + (table if two_tables else 0),
        stacked=count["stacked"],
        widest=widest,
        outputs=count["outputs"],
        matrices=count["matrices"],
        files=sum(tensor.size for tensor in checkpoint.tensors),
        converted=count["converted"],
        own_width=0 if most is None or count["stored"] else WIDTHS[most.dtype],
        bases=bases,
    )


def is_linear(tensor: Tensor, shape: Shape) -> bool:
    """Whether the tensor is the weight of a linear module that bitsandbytes packs."""
    name = tensor.name
    if len(tensor.shape) != 2 or not name.endswith(".weight"):
        return False
    if is_table(tensor, shape):
        return False
    return not (_HEAD.search(name) or _TABLE.search(name) or _ROUTER.search(name))


def is_table(tensor: Tensor, shape: Shape) -> bool:
    """Whether the tensor has a row for each token: the embedding or the head, whatever its name."""
    return (
        len(tensor.shape) == 2
        and tensor.shape[0] >= shape.vocabulary > 0
        and _LAYER.search(tensor.name) is None
    )


def is_writer(tensor: Tensor, shape: Shape) -> bool:
    """Whether the tensor is a text decoder's single matrix that writes to the residual stream."""
    return (
        len(tensor.shape) == 2
        and shape.hidden in tensor.shape
        and _WRITER.search(tensor.name) is not None
        and _LAYER.search(tensor.name) is not None
        and not _EXPERT.search(tensor.name)
        and not _OTHER_TOWER.search(tensor.name)
    )


def _loaded(checkpoint: Checkpoint, layers: int) -> Iterable[Tensor]:
    """Without a tied head's second copy and without layers that predict further tokens."""
    config = checkpoint.config
    tied = bool(config.get("tie_word_embeddings") or text_part(config).get("tie_word_embeddings"))
    for tensor in checkpoint.tensors:
        if tied and _HEAD.search(tensor.name):
            continue
        found = _LAYER.search(tensor.name)
        beyond = found is not None and int(found.group(1)) >= layers > 0
        if _PREDICTION.search(tensor.name) or (beyond and not _OTHER_TOWER.search(tensor.name)):
            continue
        yield tensor


def _idle(config: dict[str, Any], experts: int) -> int:
    """Numbers of the experts that one token does not pass."""
    text = text_part(config)
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    count = next((int(text[name]) for name in names if isinstance(text.get(name), int)), 0)
    used = experts_used(text)
    return experts * (count - used) // count if 0 < used < count else 0
