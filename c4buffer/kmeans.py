"""k-means++ and a few Lloyd steps: where a mixture starts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHUNK_FLOATS = 1 << 18  # of [rows, K, E] differences at once
CHUNK_ROWS = 8192
LLOYD_STEPS = 5  # as in C4's published code


def kmeans(X: Tensor, n_clusters: int, *, generator: torch.Generator) -> tuple[Tensor, int]:
    """k-means++ draw and a few Lloyd steps: labels [N], and how many clusters (fewer when rows are not distinct)."""
    origin = X.mean(dim=0, dtype=torch.float64).to(X.dtype)
    centres: list[Tensor] = []
    nearest = torch.full((len(X),), math.inf, dtype=X.dtype, device=X.device)
    row = int(torch.rand((), generator=generator, dtype=torch.float64) * len(X))
    while len(centres) < n_clusters:
        centres.append(X[row] - origin)
        nearest = torch.minimum(nearest, _squared_distances(X, origin, centres[-1].unsqueeze(0))[:, 0])
        cumulative = torch.cumsum(nearest, dim=0, dtype=torch.float64)
        if float(cumulative[-1]) == 0:
            break
        drawn = torch.rand((), generator=generator, dtype=torch.float64).to(X.device) * cumulative[-1]
        row = min(int(torch.searchsorted(cumulative, drawn, right=True)), len(X) - 1)
    stacked = torch.stack(centres)
    labels = _squared_distances(X, origin, stacked).argmin(dim=1)
    for _ in range(LLOYD_STEPS):
        counts = torch.bincount(labels, minlength=len(stacked)).double()
        sums = torch.zeros(stacked.shape, dtype=torch.float64, device=X.device)
        for part, label in zip(X.split(CHUNK_ROWS), labels.split(CHUNK_ROWS)):
            sums.index_add_(0, label, (part - origin).double())
        moved = (sums / counts.clamp(min=1).unsqueeze(1)).to(X.dtype)
        stacked = torch.where(counts.unsqueeze(1) > 0, moved, stacked)
        labels = _squared_distances(X, origin, stacked).argmin(dim=1)
    return labels, len(stacked)


def _squared_distances(X: Tensor, origin: Tensor, centres: Tensor) -> Tensor:
    """[N, K] from rows of X to centres that are given from the origin."""
    size = max(256, CHUNK_FLOATS // centres.numel())
    parts = [((part - origin).unsqueeze(1) - centres).square().sum(dim=2) for part in X.split(size)]
    return torch.cat(parts)
