"""The mixture clusterer does not see where embeddings lie, what they are measured in or in what order they come."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from c4buffer import MixtureClusterer, MixtureResult

FORMS: tuple[Any, ...] = ("full", "diag", "tied")
seeds = st.integers(0, 2**31)
fewer = settings(max_examples=settings().max_examples // 2)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def embeddings(draw: st.DrawFn, *, constant: bool = True) -> Tensor:
    """Three overlapping blobs [N, E], float64, rows to spare for each covariance; sometimes with a constant column."""
    dimensions = draw(st.integers(1, 6))
    rows = 60 * dimensions + draw(st.integers(0, 60))
    X = normal(draw(seeds), rows, dimensions) @ normal(draw(seeds), dimensions, dimensions)
    X = X + draw(st.sampled_from([0.0, 2.0, 5.0])) * normal(draw(seeds), 3, dimensions)[torch.arange(rows) % 3]
    if constant and draw(st.booleans()):
        X = torch.cat([X, torch.full((rows, 1), draw(st.sampled_from([0.0, 0.1, -3e4])), dtype=torch.float64)], dim=1)
    return X


def factors_of(seed: int, width: int, *, decades: float) -> Tensor:
    """Of both signs, [E], over so many powers of ten on either side of one."""
    sign, exponent = normal(seed, 2, width)
    return sign.sign() * 10 ** (decades * exponent / 2).clamp(-decades, decades)


def well_conditioned(clusterer: MixtureClusterer, X: Tensor) -> bool:
    """No component on so few rows, or so flat, that rounding is no longer small against it."""
    mixture = clusterer.mixture
    assert mixture is not None
    covariances = mixture.covariances.diag_embed() if mixture.covariance == "diag" else mixture.covariances
    spread = X.std(dim=0, correction=0)
    varies = spread > 1e-9 * X.abs().amax(dim=0)
    columns = varies.nonzero().squeeze(1)
    unitless = (covariances[..., : len(spread), : len(spread)] / spread / spread.unsqueeze(1))[..., columns, :][
        ..., columns
    ]
    return float(mixture.weights.min()) * len(X) > 2 * X.shape[1] + 2 and float(torch.linalg.cond(unitless).max()) < 1e6


@pytest.mark.parametrize("covariance", FORMS)
@given(X=embeddings(), n_clusters=st.integers(1, 4), decades=st.sampled_from([0.0, 1.0, 8.0]), seed=seeds)
def test_neither_where_columns_lie_nor_what_they_are_measured_in_matters(
    covariance: Any, X: Tensor, n_clusters: int, decades: float, seed: int
) -> None:
    factors, shift = factors_of(seed, X.shape[1], decades=decades), factors_of(seed + 1, X.shape[1], decades=4)
    clusterer = MixtureClusterer(n_clusters, covariance=covariance)
    expected = clusterer(X)
    assume(well_conditioned(clusterer, X))
    found = MixtureClusterer(n_clusters, covariance=covariance)((X + shift * X.std(dim=0).clamp(min=0.1)) * factors)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("covariance", FORMS)
@given(X=embeddings(), n_clusters=st.integers(1, 4), decades=st.sampled_from([0.0, 1.0, 8.0]), seed=seeds)
def test_its_mixture_explains_the_embeddings_in_their_own_units_as_returned(
    covariance: Any, X: Tensor, n_clusters: int, decades: float, seed: int
) -> None:
    X = X * factors_of(seed, X.shape[1], decades=decades)
    clusterer = MixtureClusterer(n_clusters, covariance=covariance)
    responsibilities = clusterer(X)
    assume(well_conditioned(clusterer, X))
    assert clusterer.mixture is not None
    torch.testing.assert_close(clusterer.mixture.responsibilities_of(X), responsibilities, rtol=0, atol=1e-6)
    assert clusterer.mixture.log_likelihood_of(X) == pytest.approx(clusterer.mixture.log_likelihood, abs=1e-6)


@pytest.mark.parametrize("covariance", FORMS)
@fewer
@given(X=embeddings(), n_clusters=st.integers(1, 4), drift=st.sampled_from([0.0, 0.1, 1.0]), seed=seeds)
def test_the_order_of_rows_does_not_matter_to_a_warm_start(
    covariance: Any, X: Tensor, n_clusters: int, drift: float, seed: int
) -> None:
    clusterer = MixtureClusterer(n_clusters, covariance=covariance)
    previous = clusterer(X)
    # A constant column stays: a jump of millions of its deviations (it has the regularisation's) leaves no digits.
    moved = X + drift * (X + X.std(dim=0)) * (X.std(dim=0) > 0)
    rows = torch.randperm(len(X), generator=torch.Generator().manual_seed(seed))
    shuffled = copy.deepcopy(clusterer)
    expected = clusterer(moved, previous)
    assume(well_conditioned(clusterer, moved))
    torch.testing.assert_close(shuffled(moved[rows], previous[rows]), expected[rows], rtol=0, atol=1e-6)


@pytest.mark.parametrize("covariance", FORMS)
@given(
    rows=st.integers(1, 40),
    dimensions=st.integers(1, 12),
    n_clusters=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    decades=st.sampled_from([0.0, 4.0, 25.0]),
    offset=st.sampled_from([0.0, 1.0, 1e4]),
    distinct=st.integers(1, 40),
    growth=st.integers(-4, 4),
    seed=seeds,
)
def test_shares_sum_to_one_and_are_never_nan(
    covariance: Any,
    rows: int,
    dimensions: int,
    n_clusters: int,
    dtype: torch.dtype,
    decades: float,
    offset: float,
    distinct: int,
    growth: int,
    seed: int,
) -> None:
    X = (normal(seed, rows, dimensions)[torch.arange(rows) % distinct] + offset).to(dtype)
    X = X * factors_of(seed + 1, dimensions, decades=decades).to(dtype)
    clusterer, previous = MixtureClusterer(n_clusters, covariance=covariance), None
    for embedded in (X, 10.0**growth * X, X.flip(0)):  # the second and third start from the mixture before
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="n_components: ", category=UserWarning)
            previous = clusterer(embedded, previous)
        assert previous.dtype == dtype
        assert previous.shape[0] == rows
        assert 1 <= previous.shape[1] <= n_clusters
        assert bool((previous >= 0).all()), "or it is NaN"
        torch.testing.assert_close(
            previous.sum(dim=1), torch.ones(rows, dtype=dtype), rtol=0, atol=16 * torch.finfo(dtype).eps
        )


@pytest.mark.parametrize("covariance", FORMS)
@given(
    X=embeddings(constant=False),
    value=st.floats(1e-3, 1e6),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    n_clusters=st.integers(1, 4),
)
def test_a_constant_column_is_divided_by_one_whatever_its_value(
    covariance: Any, X: Tensor, value: float, dtype: torch.dtype, n_clusters: int
) -> None:
    def clustered(constant: float) -> tuple[Tensor, MixtureResult]:
        clusterer = MixtureClusterer(n_clusters, covariance=covariance)
        column = torch.full((len(X), 1), constant, dtype=torch.float64)
        responsibilities = clusterer(torch.cat([X, column], dim=1).to(dtype))
        assume(well_conditioned(clusterer, X))
        assert clusterer.mixture is not None
        return responsibilities, clusterer.mixture

    (expected, at_zero), (found, mixture) = clustered(0.0), clustered(value)
    tolerance = 1e-2 if dtype == torch.float32 else 1e-6
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert mixture.log_likelihood == pytest.approx(at_zero.log_likelihood, abs=tolerance)
    torch.testing.assert_close(mixture.means[:, -1], torch.full_like(mixture.means[:, -1], value), rtol=1e-6, atol=0)
