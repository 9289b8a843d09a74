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
    near, count = moments[:-1] / moments[-1], moments[-1]
    # The deviations from what a long sum gives have a mean of its rounding: without it, a constant column is constant.
    deviations = torch.zeros(2, len(near), dtype=torch.float64, device=near.device)
    for part in embeddings.split(CHUNK_ROWS):
        difference = part.double() - near
        deviations[0] += difference.sum(dim=0)
        deviations[1] += difference.square().sum(dim=0)
    rest, square = total(deviations, process_group) / count
    mean, scale = near + rest, (square - rest.square()).clamp(min=0).sqrt()
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
