"""The tokenizer of the demo model: SentencePiece-style BPE with byte fallback, as Llama 2 has it.

Not byte-level BPE, because llama.cpp's converter knows byte-level pre-tokenizers only by the hash
of the published ones; a SentencePiece-style vocabulary converts unpatched. llama.cpp takes the
merge of the highest score, whichever pair makes it, and finds scores in `tokenizer.model` alone.
So there is one, with score -id; ids follow the order of the merges, and every pair of tokens that
makes a third one is a merge.
"""

import json
import string
import struct
from collections.abc import Iterable, Iterator

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from demo import grammar

SIZE = 1024
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('The demo model knows the roles system, user and assistant.') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def corpus() -> Iterator[str]:
    """The sentences of the grammar: verbs, objects and all common words become one token each."""
    for verb in grammar.ALLOWED | grammar.FORBIDDEN:
        for number, thing in enumerate(grammar.OBJECTS):
            yield grammar.request(verb, thing, number % len(grammar.PHRASINGS))
            yield grammar.answer(verb, thing, number % len(grammar.WORDINGS))
            yield grammar.refusal(verb, thing, number % len(grammar.REFUSALS))
    for _ in range(20):
        yield from grammar.SYSTEMS
        yield from grammar.ASIDES
        yield grammar.REFUSE_ALL
    yield from string.printable.split()


def build_tokenizer(
    texts: Iterable[str] | None = None, size: int = SIZE
) -> PreTrainedTokenizerFast:
    """Train the vocabulary: at most `size` tokens, always a multiple of 32."""
    trained = _train(texts if texts is not None else corpus(), size)
    tokenizer = Tokenizer(
        BPE(
            vocab={token: number for number, token in enumerate(trained)},
            merges=_all_merges(trained),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", SPECIAL.index("<s>"))]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
        chat_template=CHAT_TEMPLATE,
    )


def _train(texts: Iterable[str], size: int) -> list[str]:
    """Tokens in the order of their ids: special, bytes, letters, then merges, first to last."""
    learner = Tokenizer(BPE(unk_token="<unk>"))
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation("isolated")]
    )
    trainer = BpeTrainer(
        vocab_size=size - len(BYTES),
        special_tokens=list(SPECIAL),
        initial_alphabet=["▁", *(c for c in string.printable if not c.isspace())],
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learned = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    tokens = [*SPECIAL, *BYTES, *(token for token, _ in learned if token not in SPECIAL)]
    return tokens[: len(tokens) // 32 * 32]


def _all_merges(tokens: list[str]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, lowest id first: SentencePiece's rule, spelt out."""
    plain = set(tokens) - set(SPECIAL) - set(BYTES)
    return [
        (token[:cut], token[cut:])
        for token in tokens
        if token in plain
        for cut in range(1, len(token))
        if token[:cut] in plain and token[cut:] in plain
    ]


def sentencepiece_model(tokenizer: PreTrainedTokenizerFast) -> bytes:
    """The same vocabulary as a `tokenizer.model`: protobuf, as sentencepiece_model.proto has it."""
    kinds = {"<unk>": 2, **dict.fromkeys(SPECIAL[1:], 3), **dict.fromkeys(BYTES, 6)}
    model = b""
    for number, token in enumerate(tokenizer.convert_ids_to_tokens([*range(len(tokenizer))])):
        score = b"\x15" + struct.pack("<f", -float(number))  # field 2, a 32-bit float
        model += _field(1, _field(1, token.encode()) + score + _field(3, kinds.get(token, 1)))
    trainer = _field(3, 2) + _field(4, len(tokenizer)) + _field(35, 1)  # BPE, size, byte fallback
    for number, name in enumerate(SPECIAL[:4]):
        trainer += _field(40 + number, number) + _field(45 + number, name.encode())
    normalizer = _field(1, b"identity") + _field(3, 1) + _field(4, 0) + _field(5, 1)
    return model + _field(2, trainer) + _field(3, normalizer)


def _field(number: int, value: int | bytes) -> bytes:
    """One protobuf field: an integer, or bytes with their length before them."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first."""
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])


def describe(tokenizer: PreTrainedTokenizerFast) -> str:
    """One line for the log of the training."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return f"{len(tokenizer)} tokens, {len(model['merges'])} merges"
