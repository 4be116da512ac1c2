"""Where tokens stand in a text, and the finest cut that two tokenisations share.

token i spells data[start_i, end_i); spaces before it may be spelt by no token
cut after i: any place in [end_i, start_{i+1}] between two characters
spans: the longest chain of cuts that both sides have, so that every span holds tokens of both
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

_BLANK = re.compile(
    b"|".join(re.escape(chr(code).encode()) for code in range(0x3001) if chr(code).isspace())
)


class Cut(NamedTuple):
    """The text can be cut anywhere in [low, high] bytes with `before` tokens in front."""

    low: int
    high: int
    before: int


class Spelling(Exception):
    """Token `token` does not spell the text from byte `at` on."""

    def __init__(self, at: int, token: int) -> None:
        super().__init__(at, token)
        self.at, self.token = at, token


def place(surfaces: Sequence[bytes | None], data: bytes) -> list[tuple[int, int]]:
    """Bytes [start, end) of every token; raises Spelling where they leave the text.

    Blanks that no token spells are passed over; a token of None spells nothing. A space that the
    first token spells and the text does not have (SentencePiece puts it there) has no place.
    """
    try:
        return _walk(surfaces, data)
    except Spelling:
        first = surfaces[0] if surfaces else None
        if first is None or not first.startswith(b" "):
            raise
        return _walk([first[1:], *surfaces[1:]], data)


def _walk(surfaces: Sequence[bytes | None], data: bytes) -> list[tuple[int, int]]:
    places, at = [], 0
    for n, surface in enumerate(surfaces):
        while surface is None or not data.startswith(surface, at):
            blank = _BLANK.match(data, at)
            if blank is None:
                raise Spelling(at, n)
            at = blank.end()
        places.append((at, at + len(surface)))
        at += len(surface)
    while blank := _BLANK.match(data, at):
        at = blank.end()
    if at < len(data):
        raise Spelling(at, len(surfaces))
    return places


def is_boundary(data: bytes, at: int) -> bool:
    """Whether a character ends at this byte."""
    return at == len(data) or data[at] & 0xC0 != 0x80


def cuts_of(places: Sequence[tuple[int, int]], data: bytes) -> list[Cut]:
    """Every cut between two tokens that parts no character."""
    return [
        Cut(places[n - 1][1], places[n][0], n)
        for n in range(1, len(places))
        if is_boundary(data, places[n - 1][1])
    ]


def common_cuts(
    one: Sequence[Cut], other: Sequence[Cut], length: int
) -> list[tuple[int, Cut, Cut]]:
    """(byte, cut of one, cut of the other), bytes rising within (0, length), as many as can be.

    The cut that ends first meets the first it can: any longer chain could be changed into this one.
    """
    found: list[tuple[int, Cut, Cut]] = []
    i = j = last = 0
    while i < len(one) and j < len(other):
        a, b = one[i], other[j]
        low, high = max(a.low, b.low), min(a.high, b.high)
        at = low if low > last else high
        if low <= high and last < at < length:
            found.append((at, a, b))
            last = at
            i, j = i + 1, j + 1
        elif a.high <= b.high:
            i += 1
        else:
            j += 1
    return found
