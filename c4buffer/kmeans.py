"""k-means++ and a few Lloyd steps: where a mixture starts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHUNK_FLOATS = 1 << 18  # of [rows, K, E] differences at once
LLOYD_STEPS = 5  # as in C4's published code


def kmeans(X: Tensor, n_clusters: int, *, generator: torch.Generator) -> Tensor:
    """k-means++ draw and a few Lloyd steps over rows X [N, E] whose origin is near them.

    Returns:
        Centres [K, E]; fewer than `n_clusters` when there are not so many distinct rows.
    """
    centres = draw_centres(X, n_clusters, generator=generator)
    for _ in range(LLOYD_STEPS):
        centres = centres_of(X, nearest_centres(X, centres), centres)
    return centres


def draw_centres(X: Tensor, n_clusters: int, *, generator: torch.Generator) -> Tensor:
    """Rows of X, each drawn with its squared distance to those before it: k-means++; all that differ, if fewer."""
    drawn: list[Tensor] = []
    nearest = torch.full((len(X),), math.inf, dtype=X.dtype, device=X.device)
    row = int(torch.rand((), generator=generator, dtype=torch.float64, device="cpu") * len(X))
    while len(drawn) < n_clusters:
        drawn.append(X[row])
        nearest = torch.minimum(nearest, _squared_distances(X, drawn[-1].unsqueeze(0))[:, 0])
        cumulative = nearest.cpu().double().cumsum(dim=0)  # a GPU sums in an order of its own each time
        if float(cumulative[-1]) == 0:
            break
        u = torch.rand((), generator=generator, dtype=torch.float64, device="cpu") * cumulative[-1]
        row = min(int(torch.searchsorted(cumulative, u, right=True)), len(X) - 1)
    return torch.stack(drawn)


def nearest_centres(X: Tensor, centres: Tensor) -> Tensor:
    """For each row, which of the centres [K, E] is the nearest: [N], int64."""
    return _squared_distances(X, centres).argmin(dim=1)


def centres_of(X: Tensor, labels: Tensor, previous: Tensor) -> Tensor:
    """Mean of the rows with each label, [K, E], summed in float64; the previous centre where there are none."""
    clusters = len(previous)
    counts = torch.bincount(labels, minlength=clusters).double().unsqueeze(1)
    sums = torch.zeros(previous.shape, dtype=torch.float64, device=X.device)
    size = max(256, CHUNK_FLOATS // X.shape[1])
    for part, label in zip(X.split(size), labels.split(size)):
        # A matrix product: index_add_ on a GPU sums in an order of its own each time.
        sums += torch.nn.functional.one_hot(label, clusters).double().T @ part.double()
    return torch.where(counts > 0, (sums / counts.clamp(min=1)).to(X.dtype), previous)


def _squared_distances(X: Tensor, centres: Tensor) -> Tensor:
    """[N, K]."""
    size = max(256, CHUNK_FLOATS // centres.numel())
    return torch.cat([(part.unsqueeze(1) - centres).square().sum(dim=2) for part in X.split(size)])
