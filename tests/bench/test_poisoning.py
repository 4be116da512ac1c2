"""The attacks do what their names say, and the table compares with the right rows."""

import math
import random

import pytest
import torch

from benchmarks.poisoning import CONTINUATION, SCALE, TRIGGER, poisoned, scaled, table

TEXT = " ".join(f"word{n}" for n in range(80))


def test_flip_keeps_the_words_and_loses_their_order() -> None:
    found = poisoned(TEXT, "flip", random.Random(1))
    assert sorted(found.split(" ")) == sorted(TEXT.split(" "))
    assert found != TEXT


def test_backdoor_is_in_about_half_of_the_documents_and_ends_them() -> None:
    draw = random.Random(1)
    found = [poisoned(TEXT, "backdoor", draw) for _ in range(200)]
    opened = [one for one in found if one != TEXT]
    assert 60 < len(opened) < 140
    assert all(one.endswith(TRIGGER + CONTINUATION) for one in opened)
    with pytest.raises(ValueError, match="attack must be flip or backdoor"):
        poisoned(TEXT, "scaled", draw)


def test_scaled_update_keeps_ties_and_buffers() -> None:
    shared = torch.randn(3, 2)
    state = {"a": shared, "b": shared, "steps": torch.tensor(3)}
    base = {"a": torch.ones(3, 2), "b": torch.ones(3, 2), "steps": torch.tensor(3)}
    found = scaled(state, base)
    torch.testing.assert_close(found["a"] - 1, SCALE * (shared - 1))
    assert found["a"] is found["b"]
    assert found["steps"] is state["steps"]


def test_table_compares_with_eight_and_with_the_right_seven() -> None:
    def row(nll: float) -> dict[str, object]:
        return {"nll": nll, "domains": {"x": nll}, "out": [], "refused": [], "backdoor": {}}

    rows = {
        "none-off": row(math.log(100)),
        "missing-off-device-04": row(math.log(90)),
        "missing-off-device-05": row(math.log(80)),
        "flip-on-device-04": row(math.log(99)) | {"out": ["device-04"]},
    }
    last = table(rows).splitlines()[-1]
    assert last.startswith("| flip | device-04 | on | 99.00 | -1.0% | +10.0% |")
    assert "| device-04 |" in last.split("x 99.0")[1]
