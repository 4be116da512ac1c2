"""Tokenizers of every kind, trained here on a little made text: nothing is downloaded."""

from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deepfusion.data.made import make_world

KINDS = ("byte-300", "byte-600", "unigram", "llama", "wordpiece")
EOS = "</s>"
# what WordPiece knows beside ASCII; the others know every byte
PIECES = [
    "e\u0301",
    "é",
    "ñ",
    "n\u0303",
    "🙂",
    "👩\u200d🔬",
    "🇳🇴",
    "漢",
    "字",
    "ß",
    "\u00a0",
    "\r\n",
    "\n",
]
ALPHABET = sorted({c for piece in PIECES for c in piece} | {chr(code) for code in range(33, 127)})


@cache
def words() -> list[str]:
    world = make_world(3, 12)
    made = [one.text for corpus in world.corpora.values() for one in corpus.train[:12]]
    return [*made, "café cafe\u0301 naïve 漢字 🙂👩\u200d🔬 🇳🇴\r\nnew line\n\tthe end of the day"]


@cache
def tokenizer(kind: str) -> Any:
    """A fast tokenizer of `KINDS`; its end of text is </s>, id 0."""
    made = {"unigram": _unigram, "llama": _llama, "wordpiece": _wordpiece}.get(kind)
    return wrapped(made() if made else _byte_level(int(kind.removeprefix("byte-"))))


def wrapped(made: Tokenizer, **names: str) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=EOS, **names)


def _byte_level(size: int) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(words(), trainer)
    return made


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.train_from_iterator(
        words(), trainers.UnigramTrainer(vocab_size=350, show_progress=False, unk_token=None)
    )
    import json

    pieces = [(piece, score) for piece, score in json.loads(made.to_str())["model"]["vocab"]]
    pieces = [(EOS, 0.0), *((byte, -20.0) for byte in BYTES), *pieces]
    made = Tokenizer(models.Unigram(pieces, 0, True))
    made.add_special_tokens([EOS])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return made


def _llama() -> Tokenizer:
    """BPE on characters with bytes to fall back on and spaces made by a normaliser."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    made.train_from_iterator(
        words(), trainers.BpeTrainer(vocab_size=400, show_progress=False, limit_alphabet=60)
    )
    import json

    facts = json.loads(made.to_str())["model"]
    pieces = [EOS, *BYTES, *facts["vocab"]]
    vocabulary = {piece: n for n, piece in enumerate(dict.fromkeys(pieces))}
    merges = [tuple(pair) for pair in facts["merges"]]
    made = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True))
    made.add_special_tokens([EOS])
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return made


def _wordpiece(normalizer: Any = None) -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(
        words(),
        trainers.WordPieceTrainer(
            vocab_size=500, special_tokens=[EOS, "[UNK]"], show_progress=False
        ),
    )
    known = [piece for piece, _ in sorted(made.get_vocab().items(), key=lambda pair: pair[1])]
    pieces = [*known, *ALPHABET, *(f"##{one}" for one in ALPHABET)]
    vocabulary = {piece: n for n, piece in enumerate(dict.fromkeys(pieces))}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.add_special_tokens([EOS, "[UNK]"])
    if normalizer is not None:
        made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return made


def lower_casing() -> Any:
    return wrapped(_wordpiece(normalizers.BertNormalizer(lowercase=True)), unk_token="[UNK]")
