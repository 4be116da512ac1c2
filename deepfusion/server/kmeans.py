"""Spherical k-means on unit vectors.

    maximise  sum_n e_n . c_a(n)      |c_i| = 1
    c_i = l2(sum of the e_n of cell i)      a(n) = argmax_i e_n . c_i

k-means++ starts, several restarts, best objective; no cell is ever empty. Of many points a random
part chooses the best restart, and all of them only finish it.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_ROUNDS = 100
# points that choose among restarts; more cells take more of them
CHOOSING_POINTS, CHOOSING_POINTS_PER_CELL = 16384, 64


def unit(vectors: Tensor) -> Tensor:
    """Rows scaled to length 1; a zero row stays zero."""
    return torch.nn.functional.normalize(vectors, dim=-1, eps=1e-12)


def spherical_kmeans(
    points: Tensor, num_cells: int, restarts: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, float]:
    """Cells of unit `points` [N, r]: (assignment [N] int64, centres [K, r], objective).

    Raises ValueError unless 1 <= num_cells <= N.
    """
    num_points = points.shape[0]
    if not 1 <= num_cells <= num_points:
        raise ValueError(
            f"cluster: num_cells must be between 1 and {num_points} points, got {num_cells}"
        )
    chosen = points
    if num_points > (some := max(CHOOSING_POINTS, CHOOSING_POINTS_PER_CELL * num_cells)):
        chosen = points[torch.randperm(num_points, generator=generator)[:some]]
    best: tuple[Tensor, Tensor, float] | None = None
    for _ in range(max(1, restarts)):
        found = _descend(chosen, _plus_plus(chosen, num_cells, generator))
        # strictly better: of equal restarts the first stays, whatever the machine
        if best is None or found[2] > best[2] + 1e-9:
            best = found
    assert best is not None, "at least one restart runs"
    return best if chosen is points else _descend(points, best[1])


def _plus_plus(points: Tensor, num_cells: int, generator: torch.Generator) -> Tensor:
    """k-means++ seeds: each next one drawn with probability proportional to 1 - best cosine."""
    num_points = points.shape[0]
    chosen = [int(torch.randint(num_points, (1,), generator=generator))]
    gaps = torch.full((num_points,), 2.0, dtype=points.dtype)
    while len(chosen) < num_cells:
        # the gap to the nearest seed so far: one seed more can only make it smaller
        gaps = torch.minimum(gaps, (1 - points @ points[chosen[-1]]).clamp(min=0))
        gaps[chosen] = 0
        drawn = gaps
        if gaps.sum() <= 1e-12:
            # every point left coincides with a seed: any of them serves
            drawn = torch.ones_like(gaps)
            drawn[chosen] = 0
        chosen.append(int(torch.multinomial(drawn, 1, generator=generator)))
    return points[chosen]


def _descend(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor, float]:
    cells = torch.full((points.shape[0],), -1, dtype=torch.int64)
    for _ in range(MAX_ROUNDS):
        # argmax takes the first of equals: ties go to the lowest cell
        following = _fill_empty((points @ centres.T), centres.shape[0])
        if torch.equal(following, cells):
            break
        cells = following
        centres = unit(torch.zeros_like(centres).index_add(0, cells, points))
    objective = float((points * centres[cells]).sum())
    return cells, centres, objective


def _fill_empty(cosines: Tensor, num_cells: int) -> Tensor:
    """Assignment by best cosine; an empty cell takes the worst-placed point of a cell that has
    two."""
    cells = cosines.argmax(dim=1)
    counts = torch.bincount(cells, minlength=num_cells)
    # asked again for each: filling one cell may not empty another, but it changes who has two
    for cell in (counts == 0).nonzero().flatten().tolist():
        counts = torch.bincount(cells, minlength=num_cells)
        own = cosines.gather(1, cells[:, None])[:, 0]
        own = own.masked_fill(counts[cells] < 2, torch.inf)
        cells[own.argmin()] = cell
    return cells
