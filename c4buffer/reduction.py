"""Clustering in fewer dimensions than the embeddings have."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from ._checks import check_choice, check_finite, check_integer, fail
from .clustering import Clusterer
from .scaling import CHUNK_ROWS, column_scaling

Reduction = Literal["projection", "pca"]


class ReducedClusterer:
    """Another clusterer, shown at most `max_dim` linear combinations of the standardised embeddings' columns.

    Embeddings that are no wider are passed on as they are. A full covariance of E columns has E (E + 1) / 2 numbers to
    estimate and costs N E^2 in each step, which is too much of both for the features of wide networks.

    Args:
        clusterer: what clusters the reduced embeddings [N, max_dim].
        max_dim: M, at least 1.
        reduction: "projection": Gaussian random directions, which keep distances to about 1 / sqrt(M); "pca": the M
            directions of the largest variance.
        seed: of the random directions.
    """

    def __init__(
        self, clusterer: Clusterer, *, max_dim: int = 256, reduction: Reduction = "projection", seed: int = 0
    ) -> None:
        if not callable(clusterer):
            fail("clusterer", "a callable", repr(clusterer))
        self.clusterer = clusterer
        self.max_dim = check_integer("max_dim", max_dim, minimum=1)
        check_choice("reduction", reduction, ("projection", "pca"))
        self.reduction: Reduction = reduction
        self.seed = check_integer("seed", seed, minimum=0)
        self._map: tuple[Tensor, Tensor] | None = None  # y = (x - origin) @ directions, as of the last call

    @property
    def mixture(self) -> Any:
        """The inner clusterer's mixture, in the reduced dimensions where there was something to reduce; or None."""
        return getattr(self.clusterer, "mixture", None)

    def __call__(self, embeddings: Tensor, previous: Tensor | None = None) -> Tensor:
        """Responsibilities [N, K] of the rows of embeddings [N, E]."""
        if embeddings.ndim != 2 or embeddings.shape[1] <= self.max_dim:
            self._map = None
            return self.clusterer(embeddings, previous)
        check_finite("embeddings", embeddings)
        mean, scale = column_scaling(embeddings)
        directions = (self._random if self.reduction == "projection" else self._principal)(embeddings, mean, scale)
        self._map = (mean.to(embeddings), (directions / scale.unsqueeze(1)).to(embeddings))
        return self.clusterer(self._reduced(embeddings), previous)

    def log_likelihood_of(self, embeddings: Tensor) -> float:
        """Mean over rows [M, E], reduced as in the last call, of what the inner clusterer says of them."""
        if not hasattr(self.clusterer, "log_likelihood_of"):
            fail("clusterer", "one with log_likelihood_of(embeddings)", type(self.clusterer).__name__)
        return float(self.clusterer.log_likelihood_of(self._reduced(embeddings)))

    def _reduced(self, embeddings: Tensor) -> Tensor:
        if self._map is None:
            return embeddings
        origin, directions = self._map
        reduced = embeddings.new_empty(len(embeddings), self.max_dim)
        for part, target in zip(embeddings.split(CHUNK_ROWS), reduced.split(CHUNK_ROWS)):
            torch.mm(part - origin, directions, out=target)
        return reduced

    def _random(self, embeddings: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        directions = torch.randn(len(mean), self.max_dim, generator=generator, dtype=torch.float64)
        return directions.to(mean.device) / math.sqrt(self.max_dim)

    def _principal(self, embeddings: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        correlation = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=mean.device)
        for part in embeddings.split(CHUNK_ROWS):
            standardised = ((part.double() - mean) / scale).to(embeddings)
            correlation += (standardised.T @ standardised).double()
        vectors: Tensor = torch.linalg.eigh(correlation / len(embeddings))[1]
        return vectors[:, -self.max_dim :]
