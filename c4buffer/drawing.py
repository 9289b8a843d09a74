"""Rows of clusters, drawn with replacement: proposed uniformly and accepted, or looked up in a table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .partition import ROUNDING, Partition

PROPOSALS = 1 << 18  # rows drawn at once, to be given to clusters
POOL_ROWS = 1 << 14  # kept for each cluster beyond what was asked for
SMALLEST_SHARE_BY_PROPOSAL = 1 / 16  # below it, a table of cumulative weights where that pays


def uniforms(count: int, generator: torch.Generator) -> Tensor:
    """[count], from 0 to below 1, of 53 bits."""
    return torch.rand(count, generator=generator, dtype=torch.float64, device="cpu")


def uniform_rows(count: int, size: int, generator: torch.Generator) -> Tensor:
    """[count] of `size` rows, all equally likely."""
    return (uniforms(count, generator) * size).long().clamp_(max=size - 1)


def rows_of_clusters(
    partition: Partition,
    counts: list[int],
    pools: list[Tensor],
    *,
    size: int,
    generator: torch.Generator,
    settled: bool = True,
    overlapping: bool = False,
) -> list[Tensor]:
    """So many rows of each cluster, with P(i) = r_iz / sum_j r_jz.

    Of a cluster with a small share most proposals are refused. A table refuses none, but takes a pass over all rows,
    again after each change.

    Args:
        partition: of K clusters.
        counts: how many of each, K.
        pools: of each cluster, rows that were drawn with it and not yet given out; changed in place. Empty at first.
        size: rows held.
        generator: on the CPU.
        settled: whether enough has been drawn since the last change that a table will pay.
        overlapping: whether responsibilities sum to more than one, as a row can be in several clusters at once.
    """
    if len(partition.ids) == 1:
        return [uniform_rows(counts[0], size, generator)]
    p = partition.p.tolist()
    small = [share < SMALLEST_SHARE_BY_PROPOSAL for share in p]
    by_table = [few and (settled or count > share * size) for few, count, share in zip(small, counts, p)]
    if len(pools) != len(p):
        pools[:] = (torch.empty(0, dtype=torch.int64, device="cpu") for _ in p)
    while True:
        missing = [
            0 if table else (count - len(pool)) / share if len(pool) < count else 0
            for table, count, pool, share in zip(by_table, counts, pools, p)
        ]
        if not any(missing):
            break
        proposed = uniform_rows(min(PROPOSALS, int(1.02 * max(missing)) + 64), size, generator)
        z = missing.index(max(missing))
        if overlapping or small[z]:
            _accept(partition, [z], proposed, pools, size, generator)
        else:
            _accept(partition, range(len(p)), proposed, pools, size, generator)
    rows = []
    for z, count in enumerate(counts):
        if by_table[z] and count:
            rows.append(_rows_by_table(partition, z, count, size, generator))
        else:
            rows.append(pools[z][:count])
            pools[z] = pools[z][count : count + POOL_ROWS]
    return rows


def _rows_by_table(partition: Partition, z: int, count: int, size: int, generator: torch.Generator) -> Tensor:
    table = partition.table(z, size)
    rows = torch.searchsorted(table, uniforms(count, generator) * table[-1], right=True)
    return rows.clamp_(max=size - 1)


def _accept(
    partition: Partition,
    clusters: Sequence[int],
    rows: Tensor,
    pools: list[Tensor],
    size: int,
    generator: torch.Generator,
) -> None:
    """Each of the rows, drawn uniformly, goes to the pool of z with probability r_iz: one uniform decides.

    Small clusters' pools are filled one at a time, large ones' together.
    """
    left = uniforms(len(rows), generator).mul_(1 + ROUNDING)
    homeless = left >= 0
    for z in clusters:
        weights = partition.r[z].index_select(0, rows)
        if partition.assigned < size:
            weights = torch.where(weights < 0, partition.p[z].to(weights), weights)
        before, homeless = homeless, left.sub_(weights) >= 0
        if len(clusters) > 1 and float(partition.p[z]) < SMALLEST_SHARE_BY_PROPOSAL:
            continue  # of these few nobody would be in need
        # numpy's nonzero knows no branches: three times as fast as torch's, eight times as masked_select
        inside = torch.from_numpy(np.flatnonzero((before ^ homeless).numpy()))
        pools[z] = torch.cat([pools[z], rows.index_select(0, inside)])
