"""Column means and standard deviations: what standardises embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from .collective import Group, total

CHUNK_ROWS = 8192


def column_scaling(embeddings: Tensor, *, process_group: Group | None = None) -> tuple[Tensor, Tensor]:
    """Column means and standard deviations [E] in float64, divisor N; constant columns have scale 1.

    With a process group, those of all its ranks' rows together.
    """
    summed = column_sums(embeddings)
    rows = summed.new_full((1,), len(embeddings))
    moments = total(torch.cat([summed, rows]), process_group)
    mean = moments[:-1] / moments[-1]
    squares = torch.zeros_like(mean)
    for part in embeddings.split(CHUNK_ROWS):
        squares += (part.double() - mean).square().sum(dim=0)
    scale = (total(squares, process_group) / moments[-1]).sqrt()
    # Rounding leaves a constant column with a spread of about its own size times epsilon.
    constant = scale <= torch.finfo(embeddings.dtype).eps * mean.abs()
    constant |= scale.to(embeddings.dtype) == 0  # or nothing could be divided by it
    return mean, torch.where(constant, torch.ones_like(scale), scale)


def column_sums(values: Tensor) -> Tensor:
    """[N, E] -> [E], in float64; in chunks, as torch would make a float64 copy of it all."""
    sums = torch.zeros(values.shape[1], dtype=torch.float64, device=values.device)
    for part in values.split(CHUNK_ROWS):
        sums += part.sum(dim=0, dtype=torch.float64)
    return sums
