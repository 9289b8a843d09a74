"""ReducedClusterer: what it passes on, what its maps keep, and that they do not depend on units."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import adjusted_rand_score
from torch import Tensor, nn

import c4buffer.reduction
from c4buffer import (
    ClusteredReplayBuffer,
    Critics,
    GaussianMixture,
    MixtureClusterer,
    ReducedClusterer,
    Transitions,
    stacked_features,
)

few_examples = settings(max_examples=25, deadline=None, derandomize=True, database=None)
REDUCTIONS: tuple[Any, ...] = ("projection", "pca")


class Recorder:
    """A clusterer that keeps what it was shown."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.previous: list[Tensor | None] = []

    def __call__(self, embeddings: Tensor, previous: Tensor | None) -> Tensor:
        self.seen.append(embeddings)
        self.previous.append(previous)
        return torch.ones(len(embeddings), 1)


def blobs(rows: int = 200, width: int = 12, *, clusters: int = 3, seed: int = 0, apart: float = 3.0) -> Tensor:
    """Overlapping blobs [N, E], float64, whose columns correlate."""
    generator = torch.Generator().manual_seed(seed)
    centres = apart * torch.randn(clusters, width, generator=generator, dtype=torch.float64)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    noise = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return centres[torch.arange(rows) % clusters] + noise @ mixing / width**0.5


def standardised(X: Tensor) -> Tensor:
    return (X - X.mean(dim=0)) / X.std(dim=0, correction=0)


def reduced(X: Tensor, **options: Any) -> Tensor:
    """What an inner clusterer is shown."""
    recorder = Recorder()
    ReducedClusterer(recorder, **options)(X)
    return recorder.seen[0]


# What is passed on


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("max_dim", [12, 13, 256])
def test_narrow_embeddings_are_passed_on_untouched(reduction: Any, max_dim: int) -> None:
    recorder, X, previous = Recorder(), blobs(), torch.ones(200, 1)
    clusterer = ReducedClusterer(recorder, max_dim=max_dim, reduction=reduction)
    assert torch.equal(clusterer(X, previous), torch.ones(200, 1))
    assert recorder.seen[0] is X
    assert recorder.previous[0] is previous
    inner = MixtureClusterer(3)
    outer = ReducedClusterer(MixtureClusterer(3), max_dim=max_dim, reduction=reduction)
    assert torch.equal(outer(X), inner(X))
    assert outer.log_likelihood_of(X) == inner.log_likelihood_of(X)
    assert outer.mixture is not None
    assert inner.mixture is not None
    assert torch.equal(outer.mixture.means, inner.mixture.means)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_embeddings_are_shown_in_max_dim_columns_and_not_written_to(reduction: Any, dtype: torch.dtype) -> None:
    recorder, X, previous = Recorder(), blobs().to(dtype), torch.ones(200, 1)
    ReducedClusterer(recorder, max_dim=11, reduction=reduction)(X, previous)
    assert recorder.seen[0].shape == (200, 11)
    assert recorder.seen[0].dtype == dtype
    # principal directions turn, so that what was found before says nothing
    assert recorder.previous[0] is (previous if reduction == "projection" else None)
    assert torch.equal(X, blobs().to(dtype))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("max_dim", [1, 5, 11])
def test_they_are_linear_combinations_of_the_standardised_columns(reduction: Any, max_dim: int) -> None:
    X = blobs()
    Y = reduced(X, max_dim=max_dim, reduction=reduction)
    directions, *_ = np.linalg.lstsq(standardised(X).numpy(), Y.numpy(), rcond=None)
    np.testing.assert_allclose(standardised(X).numpy() @ directions, Y, rtol=0, atol=1e-10)
    assert np.linalg.matrix_rank(directions) == max_dim


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rows", [1, 7, 200])
def test_the_size_of_the_chunks_does_not_matter(reduction: Any, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    X = blobs()
    expected = reduced(X, max_dim=4, reduction=reduction)
    monkeypatch.setattr(c4buffer.reduction, "CHUNK_ROWS", rows)
    found = reduced(X, max_dim=4, reduction=reduction)
    # an eigenvector may come back with the other sign
    torch.testing.assert_close(found * (found * expected).sum(dim=0).sign(), expected, rtol=0, atol=1e-10)


@few_examples
@given(
    shift=st.floats(-100, 100),
    exponents=st.lists(st.integers(-8, 8), min_size=12, max_size=12),
    reduction=st.sampled_from(REDUCTIONS),
)
def test_where_columns_lie_and_what_they_are_measured_in_does_not_matter(
    shift: float, exponents: list[int], reduction: Any
) -> None:
    X = blobs()
    moved = (X + shift) * 10.0 ** torch.tensor(exponents, dtype=torch.float64)
    expected, found = (reduced(x, max_dim=5, reduction=reduction) for x in (X, moved))
    torch.testing.assert_close(found * (found * expected).sum(dim=0).sign(), expected, rtol=0, atol=1e-8)
    clusterers = [ReducedClusterer(MixtureClusterer(3), max_dim=5, reduction=reduction) for _ in range(2)]
    torch.testing.assert_close(clusterers[0](X), clusterers[1](moved), rtol=0, atol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("unit", [1e-45, 1e-40, 1e-38, 1e-30, 1e30, 3e37])
def test_no_unit_of_a_float32_column_makes_anything_infinite(reduction: Any, unit: float) -> None:
    X = blobs().float()
    X[:, 1] = unit * (torch.arange(200) % 2)
    X[:, 2] = 0
    X[0, 2] = unit
    X[:, 3] = 0.1
    Y = reduced(X, max_dim=5, reduction=reduction)
    assert bool(torch.isfinite(Y).all())
    # standardised columns are never larger than the root of N, nor are five of twelve directions of them
    assert float(Y.abs().max()) < 10 * 200**0.5


# Random directions


def test_the_same_seed_gives_the_same_map_and_another_another() -> None:
    def map_of(X: Tensor, seed: int) -> np.ndarray:
        Y = reduced(X, max_dim=5, seed=seed)
        directions: np.ndarray = np.linalg.lstsq(standardised(X).numpy(), Y.numpy(), rcond=None)[0]
        return directions

    state = torch.get_rng_state()
    np.testing.assert_allclose(map_of(blobs(), 3), map_of(blobs(150, seed=1), 3), rtol=0, atol=1e-10)
    assert np.abs(map_of(blobs(), 3) - map_of(blobs(), 4)).max() > 0.1
    assert torch.equal(reduced(blobs(), max_dim=5), reduced(blobs(), max_dim=5, seed=0))
    assert torch.equal(torch.get_rng_state(), state)


def test_squared_distances_are_kept_in_expectation() -> None:
    # |W^T d|^2 M / |d|^2 is chi-square with M degrees of freedom, independently for each seed.
    X, rows, max_dim = blobs(), torch.tensor([0, 5, 17]), 6
    exact = (standardised(X)[rows] - standardised(X)[rows + 1]).square().sum(dim=1)
    draws = []
    for seed in range(300):
        Y = reduced(X, max_dim=max_dim, seed=seed)
        draws.append(max_dim * (Y[rows] - Y[rows + 1]).square().sum(dim=1) / exact)
    for pair in torch.stack(draws, dim=1):
        assert stats.kstest(pair.numpy(), stats.chi2(max_dim).cdf).pvalue > 0.001
        assert pair.mean().item() / max_dim == pytest.approx(1, abs=0.1)


# Principal directions


@pytest.mark.parametrize("max_dim", [1, 3, 11])
def test_pca_spans_the_leading_eigenvectors_of_the_correlation(max_dim: int) -> None:
    X = blobs() * 10.0 ** torch.arange(-6, 6).double()
    values, vectors = np.linalg.eigh(np.corrcoef(X.numpy(), rowvar=False))
    leading = vectors[:, -max_dim:]
    Y = reduced(X, max_dim=max_dim, reduction="pca").numpy()
    back = standardised(X).numpy() @ leading @ leading.T
    np.testing.assert_allclose(Y @ Y.T, back @ back.T, rtol=0, atol=1e-9)  # the same up to a rotation
    kept = np.linalg.eigvalsh(np.atleast_2d(np.cov(Y, rowvar=False, ddof=0)))
    np.testing.assert_allclose(kept, values[-max_dim:], rtol=0, atol=1e-9)


def test_with_as_many_directions_as_there_are_ranks_pca_changes_no_responsibility() -> None:
    # A full covariance is invariant under orthogonal maps, and what is left out is zero.
    X = standardised(blobs(300, 4) @ blobs(4, 12, clusters=1, seed=1))
    start = (X[:, :3] * 2).softmax(dim=1)
    mixture = GaussianMixture(3, max_iterations=8, tolerance=0)
    clusterer = ReducedClusterer(
        lambda embeddings, previous: mixture.fit(embeddings, initial=start).responsibilities,
        max_dim=4,
        reduction="pca",
    )
    torch.testing.assert_close(clusterer(X, None), mixture.fit(X, initial=start).responsibilities, rtol=0, atol=1e-6)


# The likelihood


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_likelihood_is_that_of_rows_reduced_as_in_the_last_call(reduction: Any) -> None:
    X, other = blobs(), blobs(50, seed=1)
    clusterer = ReducedClusterer(MixtureClusterer(3), max_dim=5, reduction=reduction)
    clusterer(other)
    clusterer(X)
    mixture = clusterer.mixture
    assert mixture is not None
    assert mixture.means.shape == (3, 5)
    assert clusterer.log_likelihood_of(X) == pytest.approx(mixture.log_likelihood, abs=1e-9)

    Y = reduced(X, max_dim=5, reduction=reduction)
    directions = np.linalg.lstsq(standardised(X).numpy(), Y.numpy(), rcond=None)[0]
    by_hand = (other - X.mean(dim=0)) / X.std(dim=0, correction=0) @ torch.from_numpy(directions)
    expected = MixtureClusterer(3)
    expected(Y)
    assert clusterer.log_likelihood_of(other) == pytest.approx(expected.log_likelihood_of(by_hand), rel=1e-8)
    assert clusterer.log_likelihood_of(100 * X) < clusterer.log_likelihood_of(X) - 10


def test_narrow_embeddings_after_wide_ones_are_as_they_are_again() -> None:
    clusterer = ReducedClusterer(MixtureClusterer(3), max_dim=5)
    clusterer(blobs())
    clusterer(blobs(width=4))
    assert clusterer.mixture is not None
    assert clusterer.log_likelihood_of(blobs(width=4)) == pytest.approx(clusterer.mixture.log_likelihood, abs=1e-9)


def test_a_clusterer_that_fails_leaves_map_and_mixture_as_they_were() -> None:
    fails: list[bool] = []

    class Failing(MixtureClusterer):
        def __call__(self, embeddings: Tensor, previous: Tensor | None = None) -> Tensor:
            if fails:
                raise RuntimeError("no")
            return super().__call__(embeddings, previous)

    clusterer = ReducedClusterer(Failing(3), max_dim=5)
    clusterer(blobs())
    expected = clusterer.log_likelihood_of(blobs(seed=2))
    fails.append(True)
    for other in (7 + 10 * blobs(seed=1), blobs(width=4)):
        with pytest.raises(RuntimeError, match="no"):
            clusterer(other)
        assert clusterer.log_likelihood_of(blobs(seed=2)) == expected


def test_a_clusterer_without_mixture_or_likelihood_says_so() -> None:
    clusterer = ReducedClusterer(Recorder(), max_dim=5)
    clusterer(blobs())
    assert clusterer.mixture is None
    message = "clusterer: expected one with log_likelihood_of(embeddings), got Recorder"
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        clusterer.log_likelihood_of(blobs())
    before = ReducedClusterer(MixtureClusterer(3), max_dim=5)
    assert before.mixture is None
    with pytest.raises(ValueError, match="^log_likelihood_of: expected a clustering before it, got none yet"):
        before.log_likelihood_of(blobs())


# In a buffer


class Wide(nn.Module):
    """A critic of one hidden layer, 300 units wide."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.hidden, self.last = nn.Linear(5, 300), nn.Linear(300, 1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed))

    def features(self, observations: Tensor, actions: Tensor) -> Tensor:
        hidden: Tensor = self.hidden(torch.cat([observations, actions], dim=1))
        return torch.tanh(hidden)

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        value: Tensor = self.last(self.features(observations, actions))
        return value


@pytest.mark.parametrize(
    ("options", "columns"), [({}, 256), ({"max_dim": 20}, 20), ({"max_dim": 20, "reduction": "pca"}, 20)]
)
def test_a_buffer_reduces_wide_features(
    options: dict[str, Any], columns: int, make_transitions: Callable[..., Transitions]
) -> None:
    batch, critics = make_transitions(400), Critics(Wide(1), Wide(2))
    buffer = ClusteredReplayBuffer.from_transitions(batch, embedding="features", n_clusters=2, seed=0, **options)
    buffer.attach(critics)
    report = buffer.refresh()
    assert buffer.mixture is not None
    assert buffer.mixture.means.shape == (2, columns)
    assert sum(report.sizes) == pytest.approx(400)
    assert buffer.sample(8).cluster in (0, 1)

    # the norms are those of the features themselves
    pair = stacked_features(critics, batch).double().numpy()
    total = np.cov(pair, rowvar=False, ddof=0)[:300, 300:]
    assert report.total == pytest.approx(np.linalg.norm(total), rel=1e-4)
    assert buffer.log_likelihood_of(torch.arange(400)) == pytest.approx(report.log_likelihood, rel=1e-4)


def test_a_buffer_does_not_reduce_what_is_narrow(
    make_transitions: Callable[..., Transitions], make_critic: Callable[..., nn.Module]
) -> None:
    critics = Critics(make_critic(hidden=6, seed=1), make_critic(hidden=6, seed=2))
    buffers = [
        ClusteredReplayBuffer.from_transitions(make_transitions(100), embedding="features", seed=0, max_dim=max_dim)
        for max_dim in (12, 256, 11)
    ]
    for buffer in buffers:
        buffer.refresh(critics)
    assert torch.equal(buffers[0].responsibilities, buffers[1].responsibilities)
    assert not torch.equal(buffers[0].responsibilities, buffers[2].responsibilities)


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusterer": "kmeans"}, "clusterer: expected a callable, got 'kmeans'"),
        ({"max_dim": 0}, "max_dim: expected an integer of at least 1, got 0"),
        ({"max_dim": 2.0}, "max_dim: expected an integer of at least 1, got 2.0"),
        ({"reduction": "PCA"}, "reduction: expected one of 'projection', 'pca', got 'PCA'"),
        ({"seed": -1}, "seed: expected an integer of at least 0, got -1"),
    ],
)
def test_wrong_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        ReducedClusterer(**{"clusterer": MixtureClusterer(2), **options})
    if "clusterer" not in options and "seed" not in options:
        with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
            ClusteredReplayBuffer(10, **options)


@pytest.mark.parametrize("max_dim", [5, 256])
def test_embeddings_that_are_not_finite_are_refused(max_dim: int) -> None:
    X = blobs()
    X[7, 1] = torch.nan
    with pytest.raises(ValueError, match=re.escape("embeddings: expected finite values, got nan in row 7 (1 of 200")):
        ReducedClusterer(MixtureClusterer(2), max_dim=max_dim)(X)


@pytest.mark.parametrize("dimensions", [(512, 3, 0.3, 64), (400, 2, 0.7, 20)])
def test_clusters_among_many_directions_of_noise_are_found_in_the_principal_ones(
    dimensions: tuple[int, int, float, int],
) -> None:
    width, clusters, apart, kept = dimensions
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(clusters, (3000,), generator=g)
    X = torch.randn(3000, width, generator=g) + apart * torch.randn(clusters, width, generator=g)[labels]
    clusterer = ReducedClusterer(MixtureClusterer(clusters), max_dim=kept, reduction="pca")
    assert adjusted_rand_score(labels, clusterer(X).argmax(dim=1)) > 0.9


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_embeddings_may_have_a_graph(reduction: Any) -> None:
    X = blobs().requires_grad_()
    clusterer = ReducedClusterer(MixtureClusterer(2), max_dim=3, reduction=reduction)
    assert clusterer(X).shape == (len(X), 2)
    assert isinstance(clusterer.log_likelihood_of(X), float)


@pytest.mark.parametrize("reduction", ["projection", "pca"])
def test_wide_embeddings_are_reduced_in_full_precision_under_autocast(reduction: Any) -> None:
    X = torch.randn(300, 12, generator=torch.Generator().manual_seed(0))
    plain, found = (ReducedClusterer(MixtureClusterer(2), max_dim=4, reduction=reduction) for _ in range(2))
    expected = plain(X), plain.log_likelihood_of(X)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        responsibilities = found(X)
        likelihood = found.log_likelihood_of(X)
    assert torch.equal(responsibilities, expected[0])
    assert likelihood == expected[1]


def test_a_clusterer_that_reduces_is_not_wrapped_again() -> None:
    rows = torch.zeros(4, 1)
    data = Transitions(observations=rows, actions=rows, rewards=rows, next_observations=rows, terminals=rows)
    own = ReducedClusterer(MixtureClusterer(1), max_dim=3, reduction="pca")
    buffer = ClusteredReplayBuffer.from_transitions(data, clusterer=own)
    assert buffer._rows.clusterer is own


def test_a_state_brings_the_map_along() -> None:
    X = torch.randn(60, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, other = (ReducedClusterer(MixtureClusterer(2), max_dim=4) for _ in range(2))
    one(X)
    other.load_state_dict(one.state_dict())
    assert other.log_likelihood_of(X[:7]) == one.log_likelihood_of(X[:7])
