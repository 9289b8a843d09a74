"""MixtureClusterer: its standardising, its warm start, and the mixture that it leaves in raw units."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import c4buffer.clustering
from c4buffer import Clusterer, Every, GaussianMixture, MixtureClusterer, RefreshPolicy
from c4buffer.clustering import ranks_of_means
from c4buffer.scaling import column_scaling

few_examples = settings(max_examples=30, deadline=None, derandomize=True, database=None)


def blobs(rows: int = 300, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Three overlapping blobs [N, 4]."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(3, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
    return (centres[torch.arange(rows) % 3] + noise * torch.tensor([1.0, 0.5, 2.0, 1.0])).to(dtype)


def assert_shares(responsibilities: Tensor, shape: tuple[int, int]) -> None:
    assert responsibilities.shape == shape
    assert bool((responsibilities >= 0).all())
    torch.testing.assert_close(responsibilities.sum(dim=1), torch.ones(shape[0]).to(responsibilities))


@few_examples
@given(
    shift=st.lists(st.floats(-100, 100), min_size=4, max_size=4),
    exponents=st.lists(st.integers(-8, 8), min_size=4, max_size=4),
    covariance=st.sampled_from(["full", "diag", "tied"]),
)
def test_responsibilities_do_not_depend_on_where_columns_lie_or_what_they_are_measured_in(
    shift: list[float], exponents: list[int], covariance: Any
) -> None:
    X = blobs(120)
    scale = 10.0 ** torch.tensor(exponents, dtype=torch.float64)
    moved = (X + torch.tensor(shift, dtype=torch.float64)) * scale
    expected = MixtureClusterer(3, covariance=covariance)(X)
    torch.testing.assert_close(MixtureClusterer(3, covariance=covariance)(moved), expected, rtol=0, atol=1e-6)


def test_it_is_the_mixture_of_the_standardised_embeddings() -> None:
    X = blobs()
    standardised = (X - X.mean(dim=0)) / X.std(dim=0, correction=0)
    expected = GaussianMixture(3).fit(standardised)
    clusterer = MixtureClusterer(3)
    torch.testing.assert_close(clusterer(X), expected.responsibilities)
    assert clusterer.mixture is not None
    assert clusterer.mixture.iterations == expected.iterations
    raw = clusterer.mixture
    torch.testing.assert_close(raw.means, X.mean(dim=0) + X.std(dim=0, correction=0) * expected.means)
    assert raw.log_likelihood == pytest.approx(expected.log_likelihood - X.std(dim=0, correction=0).log().sum().item())


def test_columns_are_scaled_with_divisor_n_and_constant_ones_by_one() -> None:
    X = torch.tensor([[1.0, 3.7, 0.0], [3.0, 3.7, 0.0], [5.0, 3.7, 0.0], [7.0, 3.7, 0.0]])
    mean, scale = column_scaling(X)
    torch.testing.assert_close(mean, torch.tensor([4.0, 3.7, 0.0]).double())
    torch.testing.assert_close(scale, torch.tensor([5.0**0.5, 1.0, 1.0]).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, -3.7e5, 1e20, 1e-30])
def test_a_constant_column_is_recognised_whatever_its_size_and_changes_nothing(
    value: float, dtype: torch.dtype
) -> None:
    X = blobs(dtype=dtype)
    X[:, 1] = value
    _, scale = column_scaling(X)
    assert scale[1] == 1
    expected = MixtureClusterer(3)(X[:, [0, 2, 3]])
    torch.testing.assert_close(MixtureClusterer(3)(X), expected, rtol=0, atol=1e-3 if dtype == torch.float32 else 1e-8)


def test_scaling_does_not_depend_on_how_rows_are_split() -> None:
    X = 1e4 + torch.randn(20000, 2, generator=torch.Generator().manual_seed(0))
    mean, scale = column_scaling(X)
    torch.testing.assert_close(mean, X.double().mean(dim=0))
    torch.testing.assert_close(scale, X.double().std(dim=0, correction=0))


@pytest.mark.parametrize("regularization", [0.0, 1e-6])
@pytest.mark.parametrize("covariance", ["full", "diag", "tied"])
def test_embeddings_that_are_all_the_same_form_one_cluster(covariance: Any, regularization: float) -> None:
    X = torch.full((20, 3), 0.1)
    with pytest.warns(UserWarning, match="3 components for 1 distinct rows"):
        responsibilities = MixtureClusterer(3, covariance=covariance, regularization=regularization)(X)
    assert torch.equal(responsibilities, torch.ones(20, 1))


def test_a_single_cluster_takes_everything() -> None:
    clusterer = MixtureClusterer(1)
    assert torch.equal(clusterer(blobs()), torch.ones(300, 1, dtype=torch.float64))
    assert clusterer.mixture is not None
    torch.testing.assert_close(clusterer.mixture.means[0], blobs().mean(dim=0))


@pytest.mark.parametrize("covariance", ["full", "diag", "tied"])
@pytest.mark.parametrize(
    ("dtype", "offset", "tolerance"),
    [
        (torch.float64, 0.0, 1e-9),
        (torch.float32, 0.0, 1e-4),
        (torch.float32, 1e4, 1e-4),
    ],
)
def test_the_mixture_in_raw_units_explains_the_embeddings_as_returned(
    dtype: torch.dtype, offset: float, tolerance: float, covariance: Any
) -> None:
    X = (100 * (blobs() + offset)).to(dtype)
    clusterer = MixtureClusterer(3, covariance=covariance)
    responsibilities = clusterer(X)
    assert_shares(responsibilities, (300, 3))
    assert responsibilities.dtype == dtype
    mixture = clusterer.mixture
    assert mixture is not None
    assert mixture.means.dtype == torch.float64
    found = mixture.responsibilities_of(X)
    torch.testing.assert_close(found, responsibilities.double(), rtol=0, atol=tolerance)
    assert mixture.log_likelihood_of(X) == pytest.approx(mixture.log_likelihood, abs=tolerance)


@pytest.mark.parametrize("covariance", ["full", "diag", "tied"])
def test_the_second_call_starts_from_the_mixture_of_the_first(covariance: Any) -> None:
    first, second = blobs(), 3 + 5 * blobs(seed=0)[:250] + 0.1 * blobs(250, seed=1)
    still = MixtureClusterer(3, covariance=covariance, max_iterations=0)
    previous = still(first)
    assert still.mixture is not None
    # Without a step, what is returned is the old mixture's view of the new rows.
    expected = still.mixture.responsibilities_of(second)
    torch.testing.assert_close(still(second, previous), expected, rtol=0, atol=1e-8)
    assert still.mixture.iterations == 0

    cold = MixtureClusterer(3, covariance=covariance, warm_start=False)
    cold(first)
    assert torch.equal(cold(second, previous), MixtureClusterer(3, covariance=covariance)(second))


def test_a_warm_start_on_the_same_rows_goes_on_where_the_first_call_ended() -> None:
    X = blobs()
    options: dict[str, Any] = {"tolerance": 0.0}
    in_parts, at_once = (
        MixtureClusterer(3, max_iterations=4, **options),
        MixtureClusterer(3, max_iterations=8, **options),
    )
    in_parts(X, in_parts(X))
    at_once(X)
    assert in_parts.mixture is not None
    assert at_once.mixture is not None
    torch.testing.assert_close(in_parts.mixture.means, at_once.mixture.means)
    torch.testing.assert_close(in_parts.mixture.covariances, at_once.mixture.covariances)


def test_it_starts_anew_without_a_previous_or_when_the_embeddings_have_another_width() -> None:
    X = blobs()
    clusterer = MixtureClusterer(3)
    first = clusterer(X)
    clusterer(10 * blobs(seed=7))
    assert torch.equal(clusterer(X), first)
    narrow = clusterer(X[:, :2], first)
    assert torch.equal(narrow, MixtureClusterer(3)(X[:, :2]))


def test_a_warm_start_does_not_keep_a_number_of_clusters_that_was_lowered() -> None:
    clusterer = MixtureClusterer(3)
    with pytest.warns(UserWarning, match="3 components for 1 distinct rows"):
        previous = clusterer(torch.zeros(300, 4, dtype=torch.float64))
    assert torch.equal(clusterer(blobs(), previous), MixtureClusterer(3)(blobs()))


@pytest.mark.parametrize("growth", [1e-20, 1e-6, 1e6, 1e20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_warm_start_survives_embeddings_of_another_order_of_magnitude(growth: float, dtype: torch.dtype) -> None:
    clusterer = MixtureClusterer(3)
    previous = clusterer(blobs(dtype=dtype))
    for _ in range(3):
        previous = clusterer(growth * blobs(dtype=dtype, seed=1), previous)
        assert_shares(previous, (300, 3))


def test_the_generator_decides_the_start_and_the_global_one_is_left_alone() -> None:
    X = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()

    def cluster(seed: int) -> Tensor:
        return MixtureClusterer(5, generator=torch.Generator().manual_seed(seed))(X)

    assert torch.equal(cluster(1), cluster(1))
    assert not torch.equal(cluster(1), cluster(2))
    assert torch.equal(MixtureClusterer(5)(X), MixtureClusterer(5)(X))
    assert torch.equal(torch.get_rng_state(), state)


def test_embeddings_are_not_written_to() -> None:
    X = blobs()
    MixtureClusterer(3)(X)
    assert torch.equal(X, blobs())


def test_embeddings_that_are_not_finite_are_refused_and_the_mixture_stays() -> None:
    clusterer = MixtureClusterer(2)
    clusterer(blobs())
    mixture, bad = clusterer.mixture, blobs()
    bad[7, 1] = torch.inf
    message = "embeddings: expected finite values, got inf in row 7 (1 of 300 rows are bad)"
    with pytest.raises(ValueError, match=re.escape(message)):
        clusterer(bad)
    assert clusterer.mixture is mixture
    with pytest.raises(ValueError, match=r"^embeddings: expected a floating tensor \[N, E\] .*, got ndarray$"):
        clusterer(blobs().numpy())


@pytest.mark.parametrize("n_clusters", [0, -1, 2.0, True, "Auto"])
def test_the_number_of_clusters_is_checked_by_name(n_clusters: Any) -> None:
    message = f"n_clusters: expected an integer of at least 1, got {n_clusters!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        MixtureClusterer(n_clusters)


# As many clusters as the BIC says


def separate(clusters: int, rows: int = 300, *, seed: int = 0) -> Tensor:
    """Round blobs [N, 4] far apart, float64."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
    return 30 * torch.eye(4)[torch.arange(rows) % clusters] + noise


@pytest.mark.parametrize("covariance", ["full", "diag", "tied"])
@pytest.mark.parametrize("clusters", [1, 2, 4])
def test_auto_finds_as_many_clusters_as_there_are_blobs(clusters: int, covariance: Any) -> None:
    X = separate(clusters)
    clusterer = MixtureClusterer("auto", covariance=covariance)
    responsibilities = clusterer(X)
    assert_shares(responsibilities, (300, clusters))
    pairs = set(zip((torch.arange(300) % clusters).tolist(), responsibilities.argmax(dim=1).tolist()))
    assert len(pairs) == clusters
    assert clusterer.mixture is not None
    assert torch.equal(clusterer.mixture.responsibilities, responsibilities)


@pytest.mark.parametrize("covariance", ["full", "diag", "tied"])
@pytest.mark.parametrize("seed", range(3))
def test_auto_is_the_lowest_bic_of_all_until_two_more_are_no_better(seed: int, covariance: Any) -> None:
    X = blobs(200, seed=seed)
    each = []
    for clusters in range(1, 9):
        clusterer = MixtureClusterer(clusters, covariance=covariance)
        clusterer(X)
        assert clusterer.mixture is not None
        each.append(clusterer.mixture)
    bics = [mixture.bic(X) for mixture in each]
    best = 0
    for place in range(8):
        best = place if bics[place] < bics[best] else best
        if place == best + 2:
            break
    auto = MixtureClusterer("auto", covariance=covariance)
    assert torch.equal(auto(X), each[best].responsibilities)
    assert auto.mixture is not None
    assert auto.mixture.log_likelihood == each[best].log_likelihood
    rows, k = len(X), best + 1
    matrices = {"full": k * 10, "diag": k * 4, "tied": 10}[covariance]
    by_hand = -2 * rows * auto.mixture.log_likelihood + (k - 1 + 4 * k + matrices) * math.log(rows)
    assert bics[best] == pytest.approx(by_hand, rel=1e-9)


@pytest.mark.parametrize(
    ("bics", "best"),
    [
        ([10, 11, 9, 12, 13, 1], 3),  # the last is not tried
        ([10, 11, 12, 1], 1),
        ([10, 11, 9, 10, 8, 7], 6),
        ([10, 10, 10, 1], 1),
        ([10], 1),
    ],
)
def test_auto_stops_after_two_that_are_no_better(bics: list[float], best: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Told:
        """A mixture with one free parameter and the BIC that it is told to have."""

        def __init__(self, n_components: int, **options: Any) -> None:
            self.n_components = n_components

        def fit(self, X: Tensor, *, initial: Any) -> SimpleNamespace:
            likelihood = (math.log(len(X)) - bics[self.n_components - 1]) / (2 * len(X))
            responsibilities = torch.full((len(X), self.n_components), 1 / self.n_components)
            return SimpleNamespace(log_likelihood=likelihood, free_parameters=1, responsibilities=responsibilities)

    monkeypatch.setattr(c4buffer.clustering, "GaussianMixture", Told)
    assert MixtureClusterer("auto", max_clusters=len(bics))(blobs()).shape == (300, best)


@pytest.mark.parametrize("max_clusters", [1, 2, 3])
def test_auto_finds_no_more_than_max_clusters(max_clusters: int) -> None:
    assert MixtureClusterer("auto", max_clusters=max_clusters)(separate(4)).shape == (300, max_clusters)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_auto_tries_no_more_clusters_than_rows(rows: int) -> None:
    clusterer = MixtureClusterer("auto", max_clusters=50)
    responsibilities = clusterer(torch.arange(float(rows)).unsqueeze(1) ** 2)
    assert 1 <= responsibilities.shape[1] <= rows


def test_auto_does_not_warn_of_clusters_that_nobody_asked_for() -> None:
    X = torch.tensor([[0.0], [1.0]]).repeat(20, 1)
    assert MixtureClusterer("auto")(X).shape == (40, 2)


def test_auto_does_not_depend_on_units_and_looks_for_k_each_time() -> None:
    clusterer = MixtureClusterer("auto")
    previous = clusterer(separate(2))
    assert previous.shape == (300, 2)
    assert torch.equal(clusterer(separate(2), previous).argmax(dim=1), previous.argmax(dim=1))
    previous = clusterer(separate(4, seed=1), previous)
    assert previous.shape == (300, 4)
    scale = torch.tensor([1e-6, 1.0, 1e3, 1e9], dtype=torch.float64)
    assert MixtureClusterer("auto")(5 + scale * separate(4)).shape == (300, 4)
    assert clusterer(separate(1), previous).shape == (300, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_clusters": "bic"}, "n_clusters: expected an integer of at least 1, got 'bic'"),
        ({"n_clusters": None}, "n_clusters: expected an integer of at least 1, got None"),
        ({"max_clusters": 0}, "max_clusters: expected an integer of at least 1, got 0"),
        ({"max_clusters": 2.0}, "max_clusters: expected an integer of at least 1, got 2.0"),
        ({"start": "random"}, "start: expected one of 'k-means++', 'faiss', got 'random'"),
        ({"covariance": "round"}, "covariance: expected one of 'full', 'diag', 'tied', got 'round'"),
        ({"tolerance": -1}, "tolerance: expected a finite number at least 0, got -1"),
    ],
)
def test_wrong_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        MixtureClusterer(**{"n_clusters": "auto", **options})


# Starts and likelihoods


def test_a_start_by_faiss_finds_separate_blobs() -> None:
    X = separate(4)
    pairs = set(zip((torch.arange(300) % 4).tolist(), MixtureClusterer(4, start="faiss")(X).argmax(dim=1).tolist()))
    assert len(pairs) == 4
    assert torch.equal(MixtureClusterer(4, start="faiss")(X), MixtureClusterer(4, start="faiss")(X))


def test_the_likelihood_is_that_of_the_last_mixture() -> None:
    clusterer = MixtureClusterer(3)
    with pytest.raises(ValueError, match="^log_likelihood_of: expected a clustering before it, got none yet$"):
        clusterer.log_likelihood_of(blobs())
    clusterer(blobs())
    assert clusterer.mixture is not None
    assert clusterer.log_likelihood_of(blobs()) == pytest.approx(clusterer.mixture.log_likelihood, abs=1e-9)
    other = blobs(50, seed=3)
    assert clusterer.log_likelihood_of(other) == clusterer.mixture.log_likelihood_of(other)
    assert clusterer.log_likelihood_of(3 * blobs()) < clusterer.log_likelihood_of(blobs()) - 1


def test_ranks_of_means_are_the_order_of_their_distances_after_standardising() -> None:
    # the second column counts as much as the first, which is a thousand times wider
    X = torch.tensor([[0.0, 0.0], [2000.0, 1.0], [4000.0, 2.0], [6000.0, 9.0]], dtype=torch.float64)
    r = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    standardised = (X - X.mean(dim=0)) / X.std(dim=0, correction=0)
    means = (r.T @ standardised) / r.sum(dim=0).unsqueeze(1)
    ranks = ranks_of_means(X, r)
    assert ranks.dtype == torch.uint8
    assert torch.equal(ranks.long(), torch.cdist(standardised, means).argsort(dim=1).argsort(dim=1))
    empty = torch.cat([torch.ones(4, 1), torch.zeros(4, 1)], dim=1).double()
    assert ranks_of_means(X, empty).shape == (4, 2)
    assert ranks_of_means(X.float(), torch.full((4, 300), 1 / 300)).dtype == torch.int16


def test_ranks_of_means_take_responsibilities_of_another_precision() -> None:
    X, r = blobs(20), torch.eye(2)[torch.arange(20) % 2]
    assert torch.equal(ranks_of_means(X, r), ranks_of_means(X, r.double()))


def test_the_protocols_can_be_asked_for() -> None:
    assert isinstance(MixtureClusterer(3), Clusterer)
    assert isinstance(Every(3), RefreshPolicy)
    assert not isinstance(3, Clusterer)
