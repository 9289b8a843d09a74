"""Sums and rows over the ranks of a process group; with no group, over this process alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor

Group = Any  # torch.distributed.ProcessGroup, which not every build of torch has


def total(values: Tensor, group: Group | None) -> Tensor:
    """The sum of `values` over all ranks, on each."""
    if group is not None:
        values = values.contiguous()
        torch.distributed.all_reduce(values, group=group)
    return values


def rows_in(rows: Tensor, group: Group | None) -> float:
    """How many rows all ranks have."""
    return float(total(torch.tensor(float(len(rows)), dtype=torch.float64, device=rows.device), group))


def gathered(rows: Tensor, group: Group | None) -> Tensor:
    """The rows [M, ...] of all ranks, one rank after the other, on each; M may differ."""
    if group is None:
        return rows
    ranks = torch.distributed.get_world_size(group)
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(ranks)]
    torch.distributed.all_gather(counts, counts[0].new_full((1,), len(rows)), group=group)
    most = max(int(count) for count in counts)
    padded = rows.new_zeros(most, *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    torch.distributed.all_gather(parts, padded, group=group)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts)])


def ranks_in(group: Group | None) -> int:
    """How many ranks share the work."""
    return 1 if group is None else torch.distributed.get_world_size(group)


def from_first(values: Tensor, group: Group | None) -> Tensor:
    """The first rank's values, on each."""
    if group is not None:
        values = values.contiguous()
        torch.distributed.broadcast(values, torch.distributed.get_global_rank(group, 0), group=group)
    return values
