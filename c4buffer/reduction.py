"""Clustering in fewer dimensions than the embeddings have."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from ._checks import check_choice, check_finite, check_integer, fail
from .clustering import Clusterer, MixtureClusterer
from .collective import from_first, total
from .inference import in_full_precision
from .mixture import MixtureResult
from .scaling import CHUNK_ROWS, column_scaling

Reduction = Literal["projection", "pca"]


class ReducedClusterer:
    """Another clusterer, shown at most `max_dim` linear combinations of the standardised embeddings' columns.

    Embeddings that are no wider are passed on as they are. A full covariance of E columns has E (E + 1) / 2 numbers to
    estimate and costs N E^2 in each step, which is too much of both for the features of wide networks.

    Args:
        clusterer: what clusters the reduced embeddings [N, max_dim]. If it has a `process_group`, the embeddings are
            standardised and reduced alike on all its ranks.
        max_dim: M, at least 1.
        reduction: "projection": Gaussian random directions, which keep distances to about 1 / sqrt(M); "pca": the space
            of the M directions of the largest variance, anew at each call, so that the clusterer starts anew as well.
            It is turned at random: a clusterer that standardises the columns would make principal ones equally long,
            and lose what tells the clusters apart among directions of noise.
        seed: of the random directions, and of the turn.
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
        # (mean, scale, directions) of y = (x - mean) / scale @ directions, as of the last call
        self._map: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def mixture(self) -> MixtureResult | None:
        """The inner clusterer's mixture, in the reduced dimensions where there was something to reduce; or None."""
        found = getattr(self.clusterer, "mixture", None)
        return found if isinstance(found, MixtureResult) else None  # one of another kind is the clusterer's own affair

    @in_full_precision
    def __call__(self, embeddings: Tensor, previous: Tensor | None = None) -> Tensor:
        """Responsibilities [N, K] of the rows of embeddings [N, E]."""
        if embeddings.ndim != 2 or embeddings.shape[1] <= self.max_dim:
            reduction, reduced = None, embeddings
        else:
            check_finite("embeddings", embeddings)
            embeddings = embeddings.detach()
            reduction = self._found(embeddings)
            reduced = _mapped(embeddings, *reduction)
        # Principal directions turn from call to call: what was found in the old ones says nothing in the new.
        known = previous if reduction is None or self.reduction == "projection" else None
        responsibilities = self.clusterer(reduced, known)
        self._map = reduction  # not before: a clusterer that fails keeps the mixture that it had
        return responsibilities

    @in_full_precision
    def log_likelihood_of(self, embeddings: Tensor) -> float:
        """Mean over rows [M, E], reduced as in the last call, of what the inner clusterer says of them."""
        if not hasattr(self.clusterer, "log_likelihood_of"):
            fail("clusterer", "one with log_likelihood_of(embeddings)", type(self.clusterer).__name__)
        reduced = embeddings if self._map is None else _mapped(embeddings.detach(), *self._map)
        return float(self.clusterer.log_likelihood_of(reduced))

    def draw_from(self, generator: torch.Generator, *, instead_of: torch.Generator) -> None:
        """Give the inner clusterer another generator, if it has that of the buffer."""
        if isinstance(self.clusterer, MixtureClusterer) and self.clusterer.generator is instead_of:
            self.clusterer.draw_from(generator)

    def state_dict(self) -> dict[str, Any]:
        """The map of the last call, and the inner clusterer's state where it has one."""
        inner = self.clusterer.state_dict() if hasattr(self.clusterer, "state_dict") else None
        return {"map": self._map, "clusterer": inner}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""
        if state["clusterer"] is not None and hasattr(self.clusterer, "load_state_dict"):
            self.clusterer.load_state_dict(state["clusterer"])
        self._map = state["map"]

    def _found(self, embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and scale [E], and directions [E, M], for these embeddings."""
        group = getattr(self.clusterer, "process_group", None)
        mean, scale = column_scaling(embeddings, process_group=group)
        rows = len(mean) if self.reduction == "projection" else self.max_dim
        generator = torch.Generator().manual_seed(self.seed)
        normal = torch.randn(rows, self.max_dim, generator=generator, dtype=torch.float64, device="cpu")
        if self.reduction == "projection":
            directions = normal / math.sqrt(self.max_dim)
        else:
            scatter = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=mean.device)
            for part in embeddings.split(CHUNK_ROWS):
                standardised = ((part.double() - mean) / scale).to(embeddings)
                scatter += (standardised.T @ standardised).double()
            vectors = torch.linalg.eigh(total(scatter, group))[1]  # of rising eigenvalues
            turn = torch.linalg.qr(normal)[0].to(vectors)
            directions = from_first(vectors[:, -self.max_dim :] @ turn, group)
        return mean.to(embeddings), scale.to(embeddings), directions.to(embeddings)


def reducing(
    clusterer: Clusterer | None,
    n_clusters: int | Literal["auto"],
    *,
    generator: torch.Generator,
    max_dim: int = 256,
    reduction: Reduction = "projection",
) -> ReducedClusterer:
    """What a buffer clusters by: the clusterer given, or a mixture that starts anew each time; nothing reduced twice.

    Raises:
        ValueError: for a clusterer that is neither None nor a callable.
    """
    if clusterer is not None and not callable(clusterer):
        fail("clusterer", "a callable or None", repr(clusterer))
    if isinstance(clusterer, ReducedClusterer):
        return clusterer
    chosen = clusterer or MixtureClusterer(n_clusters, generator=generator, warm_start=False)
    return ReducedClusterer(chosen, max_dim=max_dim, reduction=reduction)


def _mapped(embeddings: Tensor, mean: Tensor, scale: Tensor, directions: Tensor) -> Tensor:
    """[N, E] -> [N, M]."""
    reduced = embeddings.new_empty(len(embeddings), directions.shape[1])
    for part, target in zip(embeddings.split(CHUNK_ROWS), reduced.split(CHUNK_ROWS)):
        torch.mm((part - mean).div_(scale), directions, out=target)
    return reduced
