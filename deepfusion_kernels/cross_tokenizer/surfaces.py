"""What every id of a tokenizer spells, as bytes.

byte-level      each character of a token stands for one byte                  Ġworld -> " world"
sentencepiece   a mark stands for the space; <0xNN> for one byte               ▁world -> " world"
wordpiece       ## continues a word; spaces are in no token                    ##ing  -> "ing"
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..checks import expect_that

OP = "CrossTokenizer"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes are themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    shifted = {chr(0x100 + n): byte for n, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted


_ALPHABET = _byte_alphabet()


def _parts(facts: Any) -> Iterator[Mapping[str, Any]]:
    """Every step of a decoder or pre-tokenizer, sequences opened."""
    if isinstance(facts, dict):
        yield facts
        for inner in (*facts.get("decoders", ()), *facts.get("pretokenizers", ())):
            yield from _parts(inner)


class Surfaces:
    """The vocabulary of a fast Hugging Face tokenizer, as bytes by id.

    `spelt[id]` is None for special and unknown tokens, which spell nothing; `specials` holds the
    ids that stand between texts. Raises ValueError for a tokenizer of no known kind.
    """

    def __init__(self, tokenizer: Any, side: str) -> None:
        fast = hasattr(tokenizer, "backend_tokenizer")
        expect_that(fast, OP, side, "a fast Hugging Face tokenizer", type(tokenizer).__name__)
        self.tokenizer, self.side = tokenizer, side
        facts = json.loads(tokenizer.backend_tokenizer.to_str())
        self._model = facts["model"]
        steps = [*_parts(facts["pre_tokenizer"]), *_parts(facts["decoder"])]
        self.kind, self._space = _kind(self._model, steps, side)
        added = tokenizer.added_tokens_decoder
        special = {token_id for token_id, token in added.items() if token.special}
        self._unknown = _unknown_id(self._model)
        silent = special | set(tokenizer.all_special_ids) | {self._unknown}
        self.specials = frozenset(silent - {self._unknown})
        literal = {i: token.content.encode() for i, token in added.items() if i not in silent}
        tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self.tokens: list[str | None] = list(tokens)
        self.spelt = [literal.get(n, self._spell(n, token)) for n, token in enumerate(tokens)]
        # such a tokenizer spells a space in front of its text that the text need not have
        first = self.encode("a")[:1]
        self.prepends = bool(first) and (self.spelt[first[0]] or b"").startswith(b" ")

    def encode(self, text: str) -> list[int]:
        """Ids without special tokens in front or behind."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def starts_word(self, token_id: int) -> bool:
        """Whether a space belongs before the token where it does not spell one itself."""
        prefix = self._model.get("continuing_subword_prefix", "##")
        return self.kind == "wordpiece" and not str(self.tokens[token_id]).startswith(prefix)

    def joined(self, ids: Sequence[int]) -> bytes:
        """The bytes that ids spell, WordPiece's words apart; ValueError for an unknown token."""
        pieces: list[bytes] = []
        for place, token_id in enumerate(ids):
            spelt = self.spelt[token_id] if 0 <= token_id < len(self.spelt) else None
            if spelt is None:
                raise ValueError(
                    f"{OP}: {self.side} ids must spell text, got id {token_id}, which spells "
                    f"nothing, at place {place}"
                )
            pieces.append(b" " + spelt if pieces and self.starts_word(token_id) else spelt)
        whole = b"".join(pieces)
        return whole[1:] if self.prepends and whole.startswith(b" ") else whole

    def _spell(self, token_id: int, token: str | None) -> bytes | None:
        if token is None or token_id in self.specials or token_id == self._unknown:
            return None
        if self.kind == "byte-level":
            codes = [_ALPHABET.get(character) for character in token]
            return None if None in codes else bytes(code for code in codes if code is not None)
        if self.kind == "wordpiece":
            return token.removeprefix(self._model["continuing_subword_prefix"]).encode()
        byte = _BYTE_TOKEN.fullmatch(token) if self._model.get("byte_fallback") else None
        return bytes([int(byte[1], 16)]) if byte else token.replace(self._space, " ").encode()


def _kind(model: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], side: str) -> Any:
    """(kind, mark of the space)."""
    types = {step["type"] for step in steps}
    if "ByteLevel" in types:
        return "byte-level", ""
    if model["type"] == "WordPiece":
        return "wordpiece", ""
    for step in steps:
        if step["type"] == "Metaspace":
            return "sentencepiece", step["replacement"]
        if step["type"] == "Replace" and step.get("content") == " ":
            return "sentencepiece", step["pattern"].get("String", "▁")
    raise ValueError(
        f"{OP}: {side} must be byte-level BPE, SentencePiece or WordPiece, got a {model['type']} "
        f"model with steps {sorted(types)}"
    )


def _unknown_id(model: Mapping[str, Any]) -> int | None:
    if model["type"] == "Unigram":
        # with byte fallback nothing is unknown, and the id may be any token's
        return None if model.get("byte_fallback") else model.get("unk_id")
    found: int | None = model["vocab"].get(model.get("unk_token"))
    return found
