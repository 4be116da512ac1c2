"""The table of mixtures holds every kind of upload against its own control, run by run."""

import math

from benchmarks.codec_mixtures import Row, table


def row(perplexity: float, size: int = 0) -> Row:
    return {"nll": {"all": math.log(perplexity)}, "bytes": size}


def test_changes_are_of_the_same_run_and_of_the_right_control() -> None:
    rows = {
        "float32": {"seed-7": row(100), "seed-8": row(200)},
        "delta-int8": {"seed-8": row(202, 3_000_000)},
        "plain": {"seed-7": row(50)},
        "logprobs": {"seed-7": row(55, 40_000_000)},
        "adapter": {"seed-9": row(120, 1_000_000)},
    }
    cells = {line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in table(rows).splitlines()}
    assert cells["float32"] == ["2", "150.00 (70.71)", "+0.00% (0.00%)", "- |"]
    assert cells["delta-int8"] == ["1", "202.00 (nan)", "+1.00% (nan%)", "3.0 |"]
    assert cells["logprobs"] == ["1", "55.00 (nan)", "+10.00% (nan%)", "40.0 |"]
    assert cells["adapter"] == ["1", "120.00 (nan)", "-", "1.0 |"], "no run in common"
