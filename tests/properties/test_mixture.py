"""What EM promises for any data: shares that sum to one, a likelihood that never falls, no order that matters."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from c4buffer import GaussianMixture, MixtureResult

FORMS: tuple[Any, ...] = ("full", "diag", "tied")
DTYPES = (torch.float32, torch.float64)
SIZES = {torch.float32: 15, torch.float64: 140}  # powers of ten whose squares do not leave the dtype
seeds = st.integers(0, 2**31)
few, some = st.integers(1, 12), st.integers(1, 8)
hundreds = st.sampled_from([40, 127, 128, 129, 200, 512])
signs = st.sampled_from([-1.0, 1.0])
fewer = settings(max_examples=settings().max_examples // 2)
rare = settings(max_examples=max(3, settings().max_examples // 10))


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def responsibilities(seed: int, rows: int, components: int, *, sharpness: float = 2.0) -> Tensor:
    return (sharpness * normal(seed, rows, components)).softmax(dim=1)


@st.composite
def hard_data(draw: st.DrawFn, *, dimensions: st.SearchStrategy[int] = few) -> tuple[Tensor, int]:
    """Rows [N, E] that are hard on EM, and a K up to N."""
    components = draw(st.integers(1, 6))
    rows = components + draw(st.integers(0, 50))
    width, dtype = draw(dimensions), draw(st.sampled_from(DTYPES))
    X = normal(draw(seeds), rows, width)
    if draw(st.booleans()):  # blobs far apart
        X += 10.0 ** draw(st.integers(0, 4)) * normal(draw(seeds), components, width)[torch.arange(rows) % components]
    if draw(st.booleans()):  # columns of very different sizes
        X *= 10.0 ** (4 * normal(draw(seeds), width)).clamp(-4, 4)
    if draw(st.booleans()):  # duplicate rows
        X = X[torch.arange(rows) % draw(st.integers(1, rows))]
    if draw(st.booleans()):  # an outlier
        X[0] *= draw(st.sampled_from([1e3, 1e6]))
    spread = X.std(dim=0, correction=0).clamp(min=1e-3)
    X += draw(signs) * draw(st.sampled_from([0.0, 1.0, 100.0, 1e4])) * spread
    if draw(st.booleans()):  # constant columns
        X[:, : draw(st.integers(1, width))] = draw(st.sampled_from([0.0, 1.0, -1e4]))
    size = draw(st.integers(-SIZES[dtype], SIZES[dtype]) | st.sampled_from([-SIZES[dtype], SIZES[dtype]]))
    top = SIZES[dtype] - math.ceil(math.log10(1 + float(X.abs().max())))
    return (10.0 ** min(size, top) * X).to(dtype), components


@st.composite
def mild_data(
    draw: st.DrawFn, *, dimensions: st.SearchStrategy[int] = some, rows_per_column: int = 10, units: bool = True
) -> tuple[Tensor, Tensor]:
    """Overlapping blobs [N, E], float64, with rows to spare for each covariance, and responsibilities to start from."""
    components, width = draw(st.integers(1, 4)), draw(dimensions)
    sizes = [rows_per_column * width + draw(st.integers(10, 100)) for _ in range(components)]
    labels = torch.arange(components).repeat_interleave(torch.tensor(sizes))
    shapes = torch.eye(width) + 0.5 * normal(draw(seeds), components, width, width) / width**0.5
    X = torch.cat([normal(draw(seeds), size, width) @ shape for size, shape in zip(sizes, shapes)])
    X += draw(st.sampled_from([0.0, 1.0, 3.0])) * normal(draw(seeds), components, width)[labels]
    if units:
        X = 10.0 ** draw(st.integers(-6, 6)) * (X + draw(st.sampled_from([0.0, 1.0, 1e4])) * X.std(dim=0, correction=0))
    start = torch.nn.functional.one_hot(labels, components) * 2 + normal(draw(seeds), len(X), components)
    return X, start.softmax(dim=1)


def fit(mixture: GaussianMixture, X: Tensor, *, initial: Tensor | MixtureResult | None = None) -> MixtureResult:
    """As it is for rows that may be fewer than the components, when told apart."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="n_components: ", category=UserWarning)
        return mixture.fit(X, initial=initial)


def assert_shares(r: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert r.shape == shape
    assert r.dtype == dtype
    assert bool((r >= 0).all()), "or it is NaN"
    torch.testing.assert_close(r.sum(dim=1), torch.ones(len(r), dtype=dtype), rtol=0, atol=16 * torch.finfo(dtype).eps)


def assert_sound(result: MixtureResult, X: Tensor) -> None:
    k, (rows, dimensions), precision = len(result.weights), X.shape, torch.finfo(X.dtype)
    for name in ("weights", "means", "covariances"):
        assert bool(torch.isfinite(getattr(result, name)).all()), name
    assert math.isfinite(result.log_likelihood)
    assert_shares(result.responsibilities, (rows, k), X.dtype)
    assert bool((result.weights >= 0).all())
    assert result.weights.sum().item() == pytest.approx(1, abs=16 * precision.eps)
    assert result.means.shape == (k, dimensions)
    if result.covariance == "diag":
        assert result.covariances.shape == (k, dimensions)
        assert bool((result.covariances >= 0).all())
        return
    assert result.covariances.shape == (
        (dimensions,) * 2 if result.covariance == "tied" else (k, dimensions, dimensions)
    )


def assert_covariances(result: MixtureResult, X: Tensor) -> None:
    """Symmetric and positive semi-definite, to the rounding of products: relative to the two columns of each entry."""
    dimensions, eps = X.shape[1], torch.finfo(X.dtype).eps
    rounding = 16 * dimensions * eps
    covariances = result.covariances.double().reshape(-1, dimensions, dimensions)
    # What spreads by less than the rounding of the rows is known to that only.
    least = 4 * eps * X.abs().amax(dim=0).double() + torch.finfo(X.dtype).tiny ** 0.5
    units = torch.maximum(covariances.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt(), least)
    unitless = covariances / units.unsqueeze(1) / units.unsqueeze(2)
    torch.testing.assert_close(unitless, unitless.mT, rtol=0, atol=rounding)
    assert float(torch.linalg.eigvalsh(unitless).min()) >= -rounding


# Any data


@pytest.mark.parametrize("covariance", FORMS)
@given(data=hard_data(), regularization=st.sampled_from([0.0, 1e-6]), seed=seeds, iterations=st.integers(0, 10))
def test_a_fit_is_sound_and_never_nan(
    covariance: Any, data: tuple[Tensor, int], regularization: float, seed: int, iterations: int
) -> None:
    X, components = data
    mixture = GaussianMixture(
        components,
        covariance=covariance,
        regularization=regularization,
        max_iterations=iterations,
        generator=torch.Generator().manual_seed(seed),
    )
    result = fit(mixture, X)
    assert_sound(result, X)
    assert result.iterations <= iterations
    assert_sound(mixture.fit(X, initial=result), X)
    assert_sound(mixture.fit(-2 * X.flip(0), initial=result), X)


@pytest.mark.parametrize("covariance", FORMS)
@given(
    data=hard_data(),
    regularization=st.sampled_from([0.0, 1e-6]),
    seed=seeds,
    sharpness=st.sampled_from([1.0, 10.0, 1e4]),
)
def test_a_fit_from_any_responsibilities_is_sound(
    covariance: Any, data: tuple[Tensor, int], regularization: float, seed: int, sharpness: float
) -> None:
    X, components = data
    start = responsibilities(seed, len(X), components, sharpness=sharpness)  # sharp ones leave components empty
    mixture = GaussianMixture(components, covariance=covariance, regularization=regularization, max_iterations=3)
    assert_sound(mixture.fit(X, initial=start.to(X.dtype)), X)


@pytest.mark.parametrize("covariance", ["full", "tied"])
@given(
    data=hard_data(), regularization=st.sampled_from([0.0, 1e-6]), seed=st.none() | seeds, iterations=st.integers(0, 10)
)
def test_covariances_are_symmetric_and_positive_semi_definite(
    covariance: Any, data: tuple[Tensor, int], regularization: float, seed: int | None, iterations: int
) -> None:
    X, components = data
    mixture = GaussianMixture(
        components, covariance=covariance, regularization=regularization, max_iterations=iterations
    )
    start = None if seed is None else responsibilities(seed, len(X), components).to(X.dtype)
    result = fit(mixture, X, initial=start)
    assert_covariances(result, X)
    assert_covariances(mixture.fit(-2 * X, initial=result), 2 * X)


@pytest.mark.parametrize("covariance", FORMS)
@rare
@given(data=hard_data(dimensions=hundreds))
def test_hundreds_of_dimensions_are_no_trouble(covariance: Any, data: tuple[Tensor, int]) -> None:
    X, components = data
    mixture = GaussianMixture(components, covariance=covariance, max_iterations=3)
    result = fit(mixture, X)
    assert_sound(result, X)
    assert_sound(mixture.fit(X, initial=result), X)
    assert_shares(result.responsibilities_of(-2 * X), tuple(result.responsibilities.shape), X.dtype)


@pytest.mark.parametrize("covariance", FORMS)
@given(
    data=hard_data(), exponent=st.floats(0, 1) | st.just(1.0), seed=seeds, regularization=st.sampled_from([0.0, 1e-6])
)
def test_rows_however_far_away_have_shares_that_sum_to_one(
    covariance: Any, data: tuple[Tensor, int], exponent: float, seed: int, regularization: float
) -> None:
    X, components = data
    result = fit(GaussianMixture(components, covariance=covariance, regularization=regularization), X)
    farthest = math.log10(torch.finfo(X.dtype).max) - 2
    away = 10.0 ** (-SIZES[X.dtype] + exponent * (farthest + SIZES[X.dtype])) * normal(seed, 7, X.shape[1])
    for rows in (away.to(X.dtype), X[:7] + away[: len(X)].to(X.dtype)):
        assert_shares(result.responsibilities_of(rows), (len(rows), len(result.weights)), X.dtype)
        assert math.isfinite(result.log_likelihood_of(rows))


@pytest.mark.parametrize("covariance", FORMS)
@fewer
@given(
    distinct=st.integers(1, 5),
    extra=st.integers(1, 4),
    repeats=st.integers(1, 8),
    dimensions=st.integers(1, 6),
    dtype=st.sampled_from(DTYPES),
    offset=st.sampled_from([0.0, 1.0, 1e4]),
    size=st.integers(-12, 12),
    seed=seeds,
)
def test_as_many_components_as_distinct_rows_and_no_more(
    covariance: Any,
    distinct: int,
    extra: int,
    repeats: int,
    dimensions: int,
    dtype: torch.dtype,
    offset: float,
    size: int,
    seed: int,
) -> None:
    X = (10.0**size * (normal(seed, distinct, dimensions) + offset)).to(dtype).repeat(repeats, 1)
    distinct = len(X.unique(dim=0))  # far from zero, float32 may not tell them apart
    enough = GaussianMixture(distinct, covariance=covariance).fit(X)
    assert len(enough.weights) == distinct
    message = f"n_components: {distinct + extra} components for {distinct} distinct rows; the mixture has {distinct}."
    with pytest.warns(UserWarning, match=message):
        lowered = GaussianMixture(distinct + extra, covariance=covariance).fit(X)
    assert len(lowered.weights) == distinct
    assert_sound(lowered, X)


@pytest.mark.parametrize("covariance", FORMS)
@fewer
@given(data=hard_data(), seed=st.none() | seeds)
def test_the_same_seed_gives_the_same_mixture(covariance: Any, data: tuple[Tensor, int], seed: int | None) -> None:
    X, components = data
    state = torch.get_rng_state()

    def found() -> MixtureResult:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return fit(GaussianMixture(components, covariance=covariance, generator=generator), X.clone())

    one, other = found(), found()
    for name in ("weights", "means", "covariances", "responsibilities"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.log_likelihood == other.log_likelihood
    assert torch.equal(torch.get_rng_state(), state), "the global generator was read"


# Data that no component can collapse on: what EM does between its steps


def assume_well_conditioned(result: MixtureResult, X: Tensor) -> None:
    """No component is nearly empty, none nearly flat: nothing is re-seeded, and no covariance needs a jitter."""
    assume(float(result.weights.min()) * len(X) > 2 * X.shape[1] + 2)
    covariances = result.covariances
    if result.covariance == "diag":
        covariances = covariances.diag_embed()
    assume(float(torch.linalg.cond(covariances).max()) < 1e8)


@pytest.mark.parametrize("covariance", FORMS)
@given(data=mild_data(), steps=st.integers(1, 15))
def test_the_log_likelihood_never_falls_from_step_to_step(
    covariance: Any, data: tuple[Tensor, Tensor], steps: int
) -> None:
    X, start = data

    def mixture(iterations: int) -> GaussianMixture:
        return GaussianMixture(
            start.shape[1], covariance=covariance, regularization=0, max_iterations=iterations, tolerance=0
        )

    result = mixture(0).fit(X, initial=start)
    rounding = 1e-11 * (1 + abs(result.log_likelihood))
    for _ in range(steps):
        assume_well_conditioned(result, X)
        before, result = result.log_likelihood, mixture(1).fit(X, initial=result)
        assert result.log_likelihood >= before - rounding
    assume_well_conditioned(result, X)
    at_once = mixture(steps).fit(X, initial=start)
    assert at_once.log_likelihood == pytest.approx(result.log_likelihood, abs=1e-8)
    torch.testing.assert_close(at_once.responsibilities, result.responsibilities, rtol=0, atol=1e-7)


@pytest.mark.parametrize("covariance", FORMS)
@given(data=mild_data(), seed=seeds)
def test_neither_the_order_of_rows_nor_that_of_components_matters(
    covariance: Any, data: tuple[Tensor, Tensor], seed: int
) -> None:
    X, start = data
    generator = torch.Generator().manual_seed(seed)
    rows, components = (torch.randperm(length, generator=generator) for length in start.shape)
    mixture = GaussianMixture(start.shape[1], covariance=covariance, regularization=0, max_iterations=5, tolerance=0)
    expected = mixture.fit(X, initial=start)
    assume_well_conditioned(expected, X)

    shuffled = mixture.fit(X[rows], initial=start[rows])
    torch.testing.assert_close(shuffled.responsibilities, expected.responsibilities[rows], rtol=0, atol=1e-7)
    torch.testing.assert_close(shuffled.weights, expected.weights, rtol=0, atol=1e-8)
    assert shuffled.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-8)

    relabelled = mixture.fit(X, initial=start[:, components])
    torch.testing.assert_close(relabelled.responsibilities, expected.responsibilities[:, components], rtol=0, atol=1e-7)
    torch.testing.assert_close(relabelled.weights, expected.weights[components], rtol=0, atol=1e-8)
    assert relabelled.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-8)


@pytest.mark.parametrize("covariance", FORMS)
@rare
@given(data=mild_data(), iterations=st.integers(0, 3))
def test_rows_that_come_many_times_over_give_the_same_mixture(
    covariance: Any, data: tuple[Tensor, Tensor], iterations: int
) -> None:
    X, start = data
    mixture = GaussianMixture(
        start.shape[1], covariance=covariance, regularization=0, max_iterations=iterations, tolerance=0
    )
    expected = mixture.fit(X, initial=start)
    assume_well_conditioned(expected, X)
    copies = 2 + 600_000 // (X.numel() * start.shape[1])  # more than one chunk
    found = mixture.fit(X.repeat(copies, 1), initial=start.repeat(copies, 1))
    torch.testing.assert_close(found.weights, expected.weights, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.responsibilities, expected.responsibilities.repeat(copies, 1), rtol=0, atol=1e-7)
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-8)


def assert_columns_in_any_order(data: tuple[Tensor, Tensor], covariance: Any, seed: int) -> None:
    X, start = data
    columns = torch.randperm(X.shape[1], generator=torch.Generator().manual_seed(seed))
    mixture = GaussianMixture(start.shape[1], covariance=covariance, regularization=0, max_iterations=3, tolerance=0)
    expected = mixture.fit(X, initial=start)
    assume_well_conditioned(expected, X)
    if covariance != "diag":
        assert_covariances(expected, X)
    found = mixture.fit(X[:, columns], initial=start)
    torch.testing.assert_close(found.responsibilities, expected.responsibilities, rtol=0, atol=1e-7)
    torch.testing.assert_close(found.means, expected.means[:, columns], rtol=1e-7, atol=1e-7 * float(X.abs().max()))
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-7)


@pytest.mark.parametrize("covariance", FORMS)
@fewer
@given(data=mild_data(), seed=seeds)
def test_the_order_of_columns_does_not_matter(covariance: Any, data: tuple[Tensor, Tensor], seed: int) -> None:
    assert_columns_in_any_order(data, covariance, seed)


@pytest.mark.parametrize("covariance", FORMS)
@rare
@given(data=mild_data(dimensions=st.sampled_from([127, 128, 129, 160]), rows_per_column=2), seed=seeds)
def test_the_order_of_a_hundred_columns_does_not_matter_either(
    covariance: Any, data: tuple[Tensor, Tensor], seed: int
) -> None:
    assert_columns_in_any_order(data, covariance, seed)


@pytest.mark.parametrize("covariance", FORMS)
@given(data=mild_data())
def test_the_responsibilities_are_a_last_e_step(covariance: Any, data: tuple[Tensor, Tensor]) -> None:
    X, start = data
    result = GaussianMixture(start.shape[1], covariance=covariance, regularization=0).fit(X, initial=start)
    assume_well_conditioned(result, X)
    torch.testing.assert_close(result.responsibilities_of(X), result.responsibilities, rtol=0, atol=1e-7)
    assert result.log_likelihood_of(X) == pytest.approx(result.log_likelihood, abs=1e-8)


@pytest.mark.parametrize("covariance", FORMS)
@fewer
@given(data=mild_data(units=False))
def test_a_warm_start_from_a_converged_mixture_stays_put(covariance: Any, data: tuple[Tensor, Tensor]) -> None:
    X, start = data
    tolerance = 1e-10
    mixture = GaussianMixture(
        start.shape[1], covariance=covariance, regularization=0, max_iterations=1000, tolerance=tolerance
    )
    settled = mixture.fit(X, initial=start)
    assume(settled.converged)
    assume_well_conditioned(settled, X)
    again = GaussianMixture(
        start.shape[1], covariance=covariance, regularization=0, max_iterations=5, tolerance=tolerance
    ).fit(X, initial=settled)
    assert again.converged
    assert again.log_likelihood == pytest.approx(settled.log_likelihood, abs=10 * tolerance)
    torch.testing.assert_close(again.responsibilities, settled.responsibilities, rtol=0, atol=1e-2)
