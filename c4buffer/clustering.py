"""How to cluster: embeddings [N, E] -> responsibilities [N, K]."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ._checks import check_finite, check_integer
from .mixture import Covariance, GaussianMixture, MixtureResult


class Clusterer(Protocol):
    """Anything that can be called so."""

    def __call__(self, embeddings: Tensor, previous: Tensor | None) -> Tensor:
        """Cluster the rows of embeddings.

        Args:
            embeddings: [N, E].
            previous: responsibilities [N, K] from the refresh before, None at the first; for those who start from them.

        Returns:
            Responsibilities [N, K]: not negative, rows that sum to one.
        """
        ...  # pragma: no cover


class MixtureClusterer:
    """A Gaussian mixture of the standardised embeddings (divisor N; constant columns are divided by 1).

    Args:
        n_clusters: K.
        covariance, regularization, max_iterations, tolerance, generator: as in `GaussianMixture`; the regularisation is
            in units of the standardised embeddings.
        warm_start: from the second call on (when `previous` is given), start from the mixture of the call before,
            carried over in raw units, instead of from k-means++. Good for embeddings that move little. A critic in
            training rescales its gradients between refreshes; the old mixture then fits badly, and EM from there tends
            to spend components on a handful of outliers. `ClusteredReplayBuffer` therefore starts anew each time.

    Attributes:
        mixture: the last mixture, in the units of the embeddings and in float64; None before the first call.
    """

    def __init__(
        self,
        n_clusters: int = 3,
        *,
        covariance: Covariance = "full",
        regularization: float = 1e-6,
        max_iterations: int = 10,
        tolerance: float = 1e-3,
        generator: torch.Generator | None = None,
        warm_start: bool = True,
    ) -> None:
        check_integer("n_clusters", n_clusters, minimum=1)
        self._gaussian_mixture = GaussianMixture(
            n_clusters,
            covariance=covariance,
            regularization=regularization,
            max_iterations=max_iterations,
            tolerance=tolerance,
            generator=generator,
        )
        self.warm_start = warm_start
        self.mixture: MixtureResult | None = None

    def __call__(self, embeddings: Tensor, previous: Tensor | None = None) -> Tensor:
        """Responsibilities [N, K] of the rows of embeddings [N, E]."""
        check_finite("embeddings", embeddings)
        mean, scale = (moment.to(embeddings).double() for moment in column_scaling(embeddings))  # as the rows see them
        standardised = (embeddings - mean.to(embeddings)) / scale.to(embeddings)
        initial, last = None, self.mixture
        shape = (self._gaussian_mixture.n_components, embeddings.shape[1])  # K may have been lowered the last time
        if self.warm_start and previous is not None and last is not None and last.means.shape == shape:
            initial = last.rescaled(-mean / scale, 1 / scale)
        result = self._gaussian_mixture.fit(standardised, initial=initial)
        self.mixture = result.rescaled(mean, scale)
        return result.responsibilities


def column_scaling(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Column means and standard deviations [E] in float64, divisor N; constant columns have scale 1."""
    mean = embeddings.mean(dim=0, dtype=torch.float64)
    squares = torch.zeros_like(mean)
    for part in embeddings.split(8192):
        squares += (part.double() - mean).square().sum(dim=0)
    scale = (squares / len(embeddings)).sqrt()
    # Rounding leaves a constant column with a spread of about its own size times epsilon.
    constant = scale <= torch.finfo(embeddings.dtype).eps * mean.abs()
    return mean, torch.where(constant, torch.ones_like(scale), scale)


def squared_distances_to_means(embeddings: Tensor, responsibilities: Tensor) -> Tensor:
    """Of each row to each cluster's mean, after standardising: embeddings [N, E], responsibilities [N, K] -> [N, K]."""
    mean, scale = (moment.to(embeddings) for moment in column_scaling(embeddings))
    mass = responsibilities.sum(dim=0).clamp(min=torch.finfo(responsibilities.dtype).tiny).unsqueeze(1)
    parts = list(zip(embeddings.split(8192), responsibilities.split(8192)))
    means = sum(r.T @ ((part - mean) / scale) for part, r in parts) / mass  # [K, E]
    return torch.cat([((part - mean) / scale).unsqueeze(1).sub(means).square().sum(dim=2) for part, _ in parts])
