"""Which student token a teacher token is: the one of equal bytes, else none or the nearest.

key(token)   its bytes, a leading space included, however the tokenizer marks it
M(i)         the student id of key(i);  "min_edit": else the one of least Levenshtein distance
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..checks import expect_option
from .surfaces import Surfaces

OP = "vocabulary_map"
_Group = tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]


def vocabulary_map(student: Surfaces, teacher: Surfaces, unmatched: str = "none") -> Tensor:
    """[V_t] int64: the student id of every teacher id, -1 for none; end-of-text meets end-of-text.

    "min_edit" compares bytes; of equal distances the one of nearest length, then of lowest id.
    It takes time in proportion to V_t V_s. Source: arXiv 2401.10491, section 3.3 (MinED).
    """
    expect_option(unmatched, OP, "unmatched", ("none", "min_edit"))
    ids: dict[bytes, int] = {}
    loose: dict[bytes, int] = {}
    for token_id in range(len(student.spelt)):
        for n, key in enumerate(_keys(student, token_id)):
            (loose if n else ids).setdefault(key, token_id)
    ids = {**loose, **ids}
    groups = _by_length(ids) if unmatched == "min_edit" else {}
    found = torch.full((len(teacher.spelt),), -1, dtype=torch.int64)
    for token_id in range(len(teacher.spelt)):
        keys = _keys(teacher, token_id)
        same = [ids[key] for key in keys if key in ids]
        if same:
            found[token_id] = same[0]
        elif keys and groups:
            found[token_id] = _nearest(keys[0], groups)
    ends = student.tokenizer.eos_token_id, teacher.tokenizer.eos_token_id
    if None not in ends:
        found[ends[1]] = ends[0]
    return found


def _keys(side: Surfaces, token_id: int) -> list[bytes]:
    """The bytes of a token, likeliest first: WordPiece does not say whether a space came before."""
    spelt = side.spelt[token_id]
    if not spelt:
        return []
    if not side.starts_word(token_id):
        return [spelt]
    spaced = [b" " + spelt, spelt]
    # punctuation is a word of its own there, and seldom has a space before it
    is_word = any(character.isalnum() for character in spelt.decode(errors="ignore"))
    return spaced if is_word else spaced[::-1]


def _by_length(ids: dict[bytes, int]) -> dict[int, _Group]:
    """Candidates of each length: their ids, rising, and their bytes as rows."""
    keys: dict[int, list[bytes]] = {}
    for key in sorted(ids, key=ids.__getitem__):
        keys.setdefault(len(key), []).append(key)
    return {
        length: (
            np.array([ids[key] for key in some], np.int64),
            np.frombuffer(b"".join(some), np.uint8).reshape(len(some), length),
        )
        for length, some in keys.items()
    }


def _nearest(key: bytes, groups: dict[int, _Group]) -> int:
    best, found = len(key) + max(groups), -1
    for gap in range(max(len(key), max(groups)) + 1):
        # lengths that differ by `gap` are at least as far apart
        if gap >= best:
            break
        for length in sorted({len(key) - gap, len(key) + gap} & groups.keys()):
            ids, rows = groups[length]
            distances = _distances(key, rows)
            nearest = int(distances.argmin())
            if distances[nearest] < best:
                best, found = int(distances[nearest]), int(ids[nearest])
    return found


def _distances(key: bytes, rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Levenshtein distances of one byte string to n strings of one length, [n]."""
    count, length = rows.shape
    steps = np.arange(length + 1)
    before = np.tile(steps, (count, 1))
    for n, byte in enumerate(key, 1):
        after = before + 1
        after[:, 0] = n
        np.minimum(after[:, 1:], before[:, :-1] + (rows != byte), out=after[:, 1:])
        # insertions run along the row: a running minimum of what is left after their own cost
        before = np.minimum.accumulate(after - steps, axis=1) + steps
    return before[:, -1]
