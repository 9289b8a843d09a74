"""Clusterers that other libraries do the work of: FAISS, and whatever scikit-learn has."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._checks import check_finite, check_integer, check_matrix, fail, shape_of
from .faiss_kmeans import faiss_kmeans
from .scaling import column_scaling

CHUNK_ROWS = 8192
NOISE = -1  # scikit-learn's label for what belongs to no cluster


class FaissClusterer:
    """k-means of the standardised embeddings by FAISS, hard: each row is in one cluster.

    Needs `pip install "c4buffer[faiss]"`, or `"c4buffer[gpu]"` to cluster CUDA embeddings on their GPU. The columns are
    standardised as in `MixtureClusterer`; see `faiss_kmeans` for the rest. Each call starts anew.

    Args:
        n_clusters: K.
        iterations: Lloyd steps at most.
        seed: of the draw of the first centres, the same at each call.

    >>> embeddings = torch.tensor([[0.0], [0.1], [5.0], [5.1]])
    >>> FaissClusterer(2)(embeddings).sum(dim=0)
    tensor([2., 2.])
    """

    def __init__(self, n_clusters: int = 3, *, iterations: int = 20, seed: int = 0) -> None:
        self.n_clusters = check_integer("n_clusters", n_clusters, minimum=1)
        self.iterations = check_integer("iterations", iterations, minimum=1)
        self.seed = check_integer("seed", seed, minimum=0)

    def __call__(self, embeddings: Tensor, previous: Tensor | None = None) -> Tensor:
        """Responsibilities [N, K] of the rows of embeddings [N, E]: one 1 in each row.

        Warns:
            UserWarning: when there are fewer distinct rows than clusters; K is lowered to their number.
        """
        rows = _standardised(embeddings, torch.float32)
        labels, clusters = faiss_kmeans(rows, self.n_clusters, seed=self.seed, iterations=self.iterations)
        if clusters < self.n_clusters:
            warnings.warn(
                f"n_clusters: {self.n_clusters} clusters for {clusters} distinct rows; there are {clusters}.",
                stacklevel=2,
            )
        return torch.nn.functional.one_hot(labels, clusters).to(embeddings.dtype)


class SklearnClusterer:
    """Any mixture or clusterer of scikit-learn, or with its methods, on the standardised embeddings.

    The columns are standardised as in `MixtureClusterer` and handed over as a NumPy array in float64, in which
    scikit-learn's mixtures do not break down on embeddings of low rank. Responsibilities are, of the fitted estimator,
    whichever comes first:

    - `predict_proba(X)`: soft; below 0 counts as 0, and rows are divided by their sums;
    - `labels_`, or else `predict(X)`: one 1 in each row, columns in the order of the labels. Rows of noise (label -1)
      get the mean of the others' responsibilities, r_i = p: they are drawn with every cluster in their share.

    Each call fits a fresh copy; `estimator` is never touched. A `random_state` of None is 0 in that copy: scikit-learn
    would draw from NumPy's global generator, which is not touched either.

    Args:
        estimator: such as `sklearn.mixture.BayesianGaussianMixture(n_components=10)` or `sklearn.cluster.HDBSCAN()`.

    Attributes:
        estimator_: the fitted copy of the last call; None before the first.

    >>> from sklearn.cluster import KMeans
    >>> embeddings = torch.tensor([[0.0], [0.1], [5.0], [5.1]])
    >>> SklearnClusterer(KMeans(2, random_state=0))(embeddings).sum(dim=0)
    tensor([2., 2.])
    """

    def __init__(self, estimator: Any) -> None:
        if isinstance(estimator, type) or not callable(getattr(estimator, "fit", None)):
            got = f"the class {estimator.__name__}" if isinstance(estimator, type) else type(estimator).__name__
            fail("estimator", "an object with a method fit, such as KMeans(3)", got)
        self.estimator = estimator
        self.estimator_: Any = None

    def __call__(self, embeddings: Tensor, previous: Tensor | None = None) -> Tensor:
        """Responsibilities [N, K] of the rows of embeddings [N, E].

        Raises:
            ValueError: for embeddings, probabilities or labels that are not as they should be. What the estimator
                raises comes through.
        """
        X = _standardised(embeddings, torch.float64).cpu().numpy()
        estimator = _unfitted(self.estimator)
        estimator.fit(X)
        responsibilities = _responsibilities(estimator, X)
        self.estimator_ = estimator
        return responsibilities.to(embeddings)


def _standardised(embeddings: Tensor, dtype: torch.dtype) -> Tensor:
    """(x - mean) / scale, [N, E], computed in float64."""
    embeddings = check_matrix("embeddings", embeddings).detach()
    mean, scale = column_scaling(embeddings)
    return torch.cat([((part - mean) / scale).to(dtype) for part in embeddings.split(CHUNK_ROWS)])


def _unfitted(estimator: Any) -> Any:
    """A copy that can be fitted without a trace in the original."""
    if hasattr(estimator, "get_params"):
        try:
            from sklearn.base import clone
        except ImportError:
            pass
        else:
            fresh = clone(estimator)
            unseeded = [name for name, value in fresh.get_params().items() if value is None and _is_seed(name)]
            return fresh.set_params(**dict.fromkeys(unseeded, 0))
    return copy.deepcopy(estimator)


def _is_seed(name: str) -> bool:
    """A parameter by that name is an estimator's seed, or that of one inside it."""
    return name.split("__")[-1] == "random_state"


def _responsibilities(estimator: Any, X: np.ndarray) -> Tensor:
    """[N, K], float64, of a fitted estimator."""
    if callable(getattr(estimator, "predict_proba", None)):
        return _shares(estimator.predict_proba(X), len(X))
    if hasattr(estimator, "labels_"):
        return _memberships("estimator.labels_", estimator.labels_, len(X))
    if not callable(getattr(estimator, "predict", None)):
        fail("estimator", "predict_proba, labels_ or predict, once fitted", type(estimator).__name__)
    return _memberships("estimator.predict", estimator.predict(X), len(X))


def _shares(probabilities: Any, rows: int) -> Tensor:
    """Probabilities [N, K] made not negative, with rows that sum to one."""
    shares = torch.as_tensor(np.asarray(probabilities, dtype=np.float64), device="cpu")
    if shares.ndim != 2 or len(shares) != rows or shares.shape[1] == 0:
        fail("estimator.predict_proba", f"probabilities [N, K] with N = {rows}", shape_of(shares))
    check_finite("estimator.predict_proba", shares)
    shares = shares.clamp(min=0)
    sums = shares.sum(dim=1, keepdim=True)
    if bool((sums == 0).any()):
        fail("estimator.predict_proba", "a positive probability in each row", f"none in row {int(sums.argmin())}")
    return shares / sums


def _memberships(source: str, labels: Any, rows: int) -> Tensor:
    """One column for each label [N], one 1 in each row; for noise, the mean over the other rows."""
    labels = np.asarray(labels)
    if labels.shape != (rows,) or not np.issubdtype(labels.dtype, np.integer):
        fail(source, f"an integer label for each of {rows} rows", f"{labels.dtype} {list(labels.shape)}")
    clustered = labels != NOISE
    if not clustered.any():
        fail(source, "at least one cluster", f"noise ({NOISE}) in all {rows} rows")
    names, columns = np.unique(labels[clustered], return_inverse=True)
    members = torch.nn.functional.one_hot(torch.from_numpy(columns), len(names)).double()
    responsibilities = members.mean(dim=0).repeat(rows, 1)
    responsibilities[torch.from_numpy(clustered)] = members
    return responsibilities
