"""How to cluster: embeddings [N, E] -> responsibilities [N, K]."""

from __future__ import annotations

import math
import warnings
from dataclasses import fields
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from ._checks import check_integer, check_matrix, fail
from .collective import Group, rows_in
from .expectation import Covariance
from .memory import floats_at_once
from .mixture import GaussianMixture, MixtureResult, Start
from .scaling import CHUNK_ROWS, column_scaling


@runtime_checkable
class Clusterer(Protocol):
    """Anything that can be called so."""

    def __call__(self, embeddings: Tensor, previous: Tensor | None, /) -> Tensor:
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
        n_clusters: K. "auto": at each call the K of the lowest BIC; K = 1, 2, ... are tried until two more than the
            best were no better, up to `max_clusters`.
        covariance, regularization, max_iterations, tolerance, generator, start, process_group: as in
            `GaussianMixture`; the regularisation is in units of the standardised embeddings.
        warm_start: from the second call on (when `previous` is given), start from the mixture of the call before,
            carried over in raw units, instead of from k-means++. Good for embeddings that move little. A critic in
            training rescales its gradients between refreshes; the old mixture then fits badly, and EM from there tends
            to spend components on a handful of outliers. `ClusteredReplayBuffer` therefore starts anew each time.
        max_clusters: the largest K for "auto".

    Attributes:
        mixture: the last mixture, in the units of the embeddings and in float64; None before the first call.
    """

    def __init__(
        self,
        n_clusters: int | Literal["auto"] = 3,
        *,
        covariance: Covariance = "full",
        regularization: float = 1e-6,
        max_iterations: int = 10,
        tolerance: float = 1e-3,
        generator: torch.Generator | None = None,
        start: Start = "k-means++",
        warm_start: bool = True,
        max_clusters: int = 8,
        process_group: Group | None = None,
    ) -> None:
        if n_clusters != "auto":
            check_integer("n_clusters", n_clusters, minimum=1)
        self.n_clusters = n_clusters
        self.max_clusters = check_integer("max_clusters", max_clusters, minimum=1)
        self.process_group = process_group
        self.generator = generator
        self.warm_start = warm_start
        self.mixture: MixtureResult | None = None
        candidates = range(1, max_clusters + 1) if n_clusters == "auto" else (int(n_clusters),)
        self._candidates = [
            GaussianMixture(
                clusters,
                covariance=covariance,
                regularization=regularization,
                max_iterations=max_iterations,
                tolerance=tolerance,
                generator=generator,
                start=start,
                standardize=True,
                process_group=process_group,
            )
            for clusters in candidates
        ]

    def __call__(self, embeddings: Tensor, previous: Tensor | None = None) -> Tensor:
        """Responsibilities [N, K] of the rows of embeddings [N, E]."""
        embeddings = check_matrix("embeddings", embeddings)
        last = self.mixture if self.warm_start and previous is not None else None
        rows = rows_in(embeddings, self.process_group)
        best, lowest, worse = None, math.inf, 0
        for gaussian_mixture in self._candidates:
            if gaussian_mixture.n_components > rows and best is not None:
                break
            # K may have been lowered the last time
            fits = (
                last is not None
                and last.means.shape == (gaussian_mixture.n_components, embeddings.shape[1])
                and last.covariance == gaussian_mixture.covariance
            )
            with warnings.catch_warnings():
                if self.n_clusters == "auto":  # nobody asked for so many
                    warnings.simplefilter("ignore", UserWarning)
                result = gaussian_mixture.fit(embeddings, initial=last if fits else None)
            if result.responsibilities.shape[1] < gaussian_mixture.n_components and best is not None:
                break
            bic = -2 * rows * result.log_likelihood + result.free_parameters * math.log(rows)
            best, lowest, worse = (result, bic, 0) if bic < lowest or best is None else (best, lowest, worse + 1)
            if worse == 2:
                break
        assert best is not None
        self.mixture = best
        return best.responsibilities

    def draw_from(self, generator: torch.Generator) -> None:
        """Start from this generator's numbers from now on."""
        self.generator = generator
        for gaussian_mixture in self._candidates:
            gaussian_mixture.generator = generator

    def state_dict(self) -> dict[str, Any]:
        """The last mixture, which warm starts and `log_likelihood_of` need, and where the generator given stands."""
        mixture = self.mixture
        return {
            "mixture": None
            if mixture is None
            else {each.name: getattr(mixture, each.name) for each in fields(mixture)},
            "generator": None if self.generator is None else self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""
        mixture = None if state["mixture"] is None else MixtureResult(**state["mixture"])
        if self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"].cpu())
        self.mixture = mixture

    def log_likelihood_of(self, embeddings: Tensor) -> float:
        """Mean over rows [M, E] of their log-likelihood under the last mixture; `OnDrift` asks for it."""
        if self.mixture is None:
            fail("log_likelihood_of", "a clustering before it", "none yet")
        return self.mixture.log_likelihood_of(embeddings)


def ranks_of_means(embeddings: Tensor, responsibilities: Tensor) -> Tensor:
    """How many clusters' means are nearer to a row than each: embeddings [N, E], responsibilities [N, K] -> [N, K].

    Distances are those of standardised columns; uint8 (int16 for more than 256 clusters).
    """
    mean, scale = (moment.to(embeddings) for moment in column_scaling(embeddings))
    clusters = responsibilities.shape[1]
    mass = responsibilities.sum(dim=0).clamp(min=torch.finfo(responsibilities.dtype).tiny).unsqueeze(1)
    parts = zip(embeddings.split(CHUNK_ROWS), responsibilities.split(CHUNK_ROWS))
    means = sum(r.T.to(part) @ ((part - mean) / scale) for part, r in parts) / mass.to(mean)  # [K, E]
    dtype = torch.uint8 if clusters <= 256 else torch.int16
    ranks = torch.empty(len(embeddings), clusters, dtype=dtype, device=embeddings.device)
    columns = embeddings.shape[1]
    size = max(1, floats_at_once(embeddings.device, cached=CHUNK_ROWS * columns) // columns)
    for part, rank in zip(embeddings.split(size), ranks.split(size)):
        standardised = (part - mean) / scale
        # mean by mean: [rows, K, E] would be many times the embeddings
        distances = torch.stack([(standardised - centre).square_().sum(dim=1) for centre in means], dim=1)
        for z in range(clusters):
            rank[:, z] = (distances < distances[:, z : z + 1]).sum(dim=1)
    return ranks
