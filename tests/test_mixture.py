"""EM against recorded numbers, scikit-learn and closed forms; and what it makes of data that are hard on it."""

from __future__ import annotations

import itertools
import math
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.mixture
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

import c4buffer.expectation
import c4buffer.kmeans
import c4buffer.mixture
from c4buffer import GaussianMixture, MixtureResult
from c4buffer.kmeans import draw_centres

GOLDEN = Path(__file__).parent / "golden" / "official_c4.npz"
FORMS: tuple[Any, ...] = ("full", "diag", "tied")
few_examples = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def blobs(
    rows: int = 300, *, dimensions: int = 3, clusters: int = 3, seed: int = 0, apart: float = 3.0
) -> tuple[Tensor, Tensor]:
    """Overlapping blobs of different shapes [N, E], float64, and soft responsibilities [N, K] to start from."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    centres, shapes = apart * normal(clusters, dimensions), normal(clusters, dimensions, dimensions)
    labels = torch.arange(rows) % clusters
    X = centres[labels] + (normal(rows, 1, dimensions) @ shapes[labels]).squeeze(1)
    return X, (torch.nn.functional.one_hot(labels, clusters) * 2 + normal(rows, clusters)).softmax(dim=1)


def assert_mixtures_close(found: MixtureResult, expected: MixtureResult, *, rtol: float, atol: float) -> None:
    for name in ("weights", "means", "covariances", "responsibilities"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=rtol, atol=atol, msg=name)
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=rtol, abs=atol)


# The published code


@pytest.mark.parametrize(
    ("jitter", "tolerance", "responsibilities_tolerance"), [(0.0, 1e-5, 1e-3), (1e-6, 1e-10, 1e-10)]
)
@pytest.mark.parametrize("case", ["em0", "em1", "em2"])
def test_em_is_that_recorded_from_the_published_code_and_exactly_so_with_its_jitter(
    case: str, jitter: float, tolerance: float, responsibilities_tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    with np.load(GOLDEN) as archive:
        recorded = {key.split("/")[1]: torch.from_numpy(archive[key]) for key in archive.files if key.startswith(case)}
    cholesky = c4buffer.expectation.cholesky
    monkeypatch.setattr(
        c4buffer.expectation,
        "cholesky",
        lambda covariances: cholesky(covariances + jitter * torch.eye(covariances.shape[1])),
    )
    mixture = GaussianMixture(
        len(recorded["weights"]),
        regularization=recorded["reg_covar"].item(),
        max_iterations=int(recorded["iterations"]),
        tolerance=0,
    )
    result = mixture.fit(recorded["X"], initial=torch.nn.functional.one_hot(recorded["init_labels"]).double())
    assert result.iterations == recorded["iterations"]
    for name in ("weights", "means", "covariances"):
        torch.testing.assert_close(getattr(result, name), recorded[name], rtol=tolerance, atol=tolerance, msg=name)
    limit = responsibilities_tolerance
    torch.testing.assert_close(result.responsibilities, recorded["responsibilities"], rtol=0, atol=limit)


# scikit-learn


class SklearnFrom(sklearn.mixture.GaussianMixture):
    """scikit-learn's, started by an M-step from given responsibilities."""

    start: np.ndarray

    def _initialize_parameters(self, X: np.ndarray, random_state: Any, **options: Any) -> None:
        self._initialize(X, self.start)


def sklearn_fit(X: Tensor, start: Tensor, covariance: str, *, iterations: int, regularization: float) -> SklearnFrom:
    oracle = SklearnFrom(
        start.shape[1], covariance_type=covariance, tol=0, reg_covar=regularization, max_iter=iterations
    )
    oracle.start = start.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return oracle.fit(X.numpy())


@pytest.mark.parametrize("regularization", [0.0, 1e-3])
@pytest.mark.parametrize("iterations", [1, 20])
@pytest.mark.parametrize("covariance", FORMS)
def test_fit_agrees_with_scikit_learn_from_the_same_start(
    covariance: Any, iterations: int, regularization: float
) -> None:
    X, start = blobs()
    oracle = sklearn_fit(X, start, covariance, iterations=iterations, regularization=regularization)
    mixture = GaussianMixture(
        3, covariance=covariance, regularization=regularization, max_iterations=iterations, tolerance=0
    )
    result = mixture.fit(X, initial=start)
    np.testing.assert_allclose(result.weights, oracle.weights_, atol=1e-8)
    np.testing.assert_allclose(result.means, oracle.means_, atol=1e-8)
    np.testing.assert_allclose(result.covariances, oracle.covariances_, atol=1e-8)
    np.testing.assert_allclose(result.responsibilities, oracle.predict_proba(X.numpy()), atol=1e-8)
    assert result.log_likelihood == pytest.approx(oracle.score(X.numpy()), abs=1e-8)
    assert result.iterations == iterations


@pytest.mark.parametrize("covariance", FORMS)
def test_a_result_explains_new_rows_as_scikit_learn_does(covariance: Any) -> None:
    X, start = blobs()
    oracle = sklearn_fit(X, start, covariance, iterations=5, regularization=1e-6)
    result = GaussianMixture(3, covariance=covariance, max_iterations=5, tolerance=0).fit(X, initial=start)
    new, _ = blobs(97, seed=5)
    np.testing.assert_allclose(result.responsibilities_of(new), oracle.predict_proba(new.numpy()), atol=1e-8)
    assert result.log_likelihood_of(new) == pytest.approx(oracle.score(new.numpy()), abs=1e-8)
    assert result.bic(new) == pytest.approx(oracle.bic(new.numpy()), rel=1e-10)
    torch.testing.assert_close(result.responsibilities_of(X), result.responsibilities)
    assert result.log_likelihood_of(X) == pytest.approx(result.log_likelihood)


# The course of EM


@pytest.mark.parametrize("covariance", FORMS)
@pytest.mark.parametrize("seed", range(3))
def test_the_log_likelihood_never_falls(covariance: Any, seed: int) -> None:
    X, start = blobs(200, seed=seed, apart=1.5)
    step = GaussianMixture(3, covariance=covariance, regularization=0, max_iterations=1)
    result = GaussianMixture(3, covariance=covariance, regularization=0, max_iterations=0).fit(X, initial=start)
    course = [result.log_likelihood]
    for _ in range(40):
        result = step.fit(X, initial=result)
        course.append(result.log_likelihood)
    assert min(after - before for before, after in itertools.pairwise(course)) > -1e-12
    assert course[-1] > course[0] + 0.01
    at_once = GaussianMixture(3, covariance=covariance, regularization=0, max_iterations=40, tolerance=0)
    assert at_once.fit(X, initial=start).log_likelihood == pytest.approx(course[-1], abs=1e-10)


def test_without_a_step_the_result_is_the_m_step_of_the_initial_responsibilities() -> None:
    X, start = blobs(50)
    result = GaussianMixture(3, max_iterations=0, regularization=1e-3).fit(X, initial=start)
    for z in range(3):
        covariance = np.cov(X.numpy(), rowvar=False, ddof=0, aweights=start[:, z].numpy()) + 1e-3 * np.eye(3)
        np.testing.assert_allclose(result.weights[z], start[:, z].mean(), rtol=1e-12)
        np.testing.assert_allclose(result.means[z], np.average(X, axis=0, weights=start[:, z]), rtol=1e-12)
        np.testing.assert_allclose(result.covariances[z], covariance, rtol=1e-12)
    assert (result.iterations, result.converged) == (0, False)


def test_more_components_than_rows_keep_the_moments_of_what_little_they_explain() -> None:
    X = torch.tensor([[0.0, 0.0], [1.0, 3.0]], dtype=torch.float64)
    start = torch.full((2, 5), 0.2, dtype=torch.float64)
    result = GaussianMixture(5, max_iterations=0, regularization=0).fit(X, initial=start)
    covariance = torch.tensor([[0.25, 0.75], [0.75, 2.25]], dtype=torch.float64)
    torch.testing.assert_close(result.means, torch.tensor([0.5, 1.5], dtype=torch.float64).expand(5, 2))
    torch.testing.assert_close(result.covariances, covariance.expand(5, 2, 2))
    seeded = GaussianMixture(5).fit(X, initial=torch.eye(5, dtype=torch.float64)[:2])
    torch.testing.assert_close(seeded.responsibilities.sum(dim=1), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("covariance", FORMS)
def test_a_warm_start_begins_with_an_e_step(covariance: Any) -> None:
    X, start = blobs()
    moved = X + 0.3
    options: dict[str, Any] = {"covariance": covariance, "tolerance": 0}
    first = GaussianMixture(3, max_iterations=3, **options).fit(X, initial=start)
    kept = GaussianMixture(3, max_iterations=0, **options).fit(moved, initial=first)
    for name in ("weights", "means", "covariances"):
        torch.testing.assert_close(getattr(kept, name), getattr(first, name))
    torch.testing.assert_close(kept.responsibilities, first.responsibilities_of(moved))
    assert kept.log_likelihood == pytest.approx(first.log_likelihood_of(moved))
    assert kept.iterations == 0

    one = GaussianMixture(3, max_iterations=1, **options).fit(moved, initial=first)
    by_hand = GaussianMixture(3, max_iterations=0, **options).fit(moved, initial=kept.responsibilities)
    assert_mixtures_close(one, by_hand, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("far", [1e3, 1e6, 1e12])
def test_a_warm_start_from_far_away_takes_exact_moments_in_float32(far: float) -> None:
    X, start = blobs()
    X = X.float()
    first = GaussianMixture(2, max_iterations=0).fit(X, initial=start[:, :2].float().softmax(dim=1))
    away = first.rescaled(torch.full((3,), far), torch.full((3,), far))
    result = GaussianMixture(2, max_iterations=1, regularization=0).fit(X, initial=away)
    expected = GaussianMixture(2, max_iterations=0, regularization=0).fit(
        X, initial=away.responsibilities_of(X).float()
    )
    assert_mixtures_close(result, expected, rtol=1e-4, atol=1e-5)


def test_it_stops_when_the_log_likelihood_moves_by_less_than_the_tolerance() -> None:
    X, start = blobs()
    result = GaussianMixture(3, max_iterations=100, tolerance=1e-4).fit(X, initial=start)
    assert result.converged
    course = [
        GaussianMixture(3, max_iterations=n, tolerance=0).fit(X, initial=start).log_likelihood
        for n in range(result.iterations)
    ]
    steps = [abs(after - before) for before, after in itertools.pairwise(course)]
    assert steps[-1] < 1e-4 <= min(steps[:-1])
    exhausted = GaussianMixture(3, max_iterations=2, tolerance=0).fit(X, initial=start)
    assert (exhausted.iterations, exhausted.converged) == (2, False)


@pytest.mark.parametrize("covariance", FORMS)
def test_the_order_of_rows_components_and_columns_does_not_matter(covariance: Any) -> None:
    X, start = blobs()
    mixture = GaussianMixture(3, covariance=covariance, max_iterations=5, tolerance=0)
    expected = mixture.fit(X, initial=start)
    close = {"rtol": 1e-9, "atol": 1e-11}

    rows = torch.randperm(len(X), generator=torch.Generator().manual_seed(0))
    shuffled = mixture.fit(X[rows], initial=start[rows])
    torch.testing.assert_close(shuffled.responsibilities, expected.responsibilities[rows], **close)
    torch.testing.assert_close(shuffled.covariances, expected.covariances, **close)

    components = torch.tensor([2, 0, 1])
    relabelled = mixture.fit(X, initial=start[:, components])
    torch.testing.assert_close(relabelled.responsibilities, expected.responsibilities[:, components], **close)
    torch.testing.assert_close(relabelled.means, expected.means[components], **close)

    columns = torch.tensor([1, 2, 0])
    turned = mixture.fit(X[:, columns], initial=start)
    torch.testing.assert_close(turned.responsibilities, expected.responsibilities, **close)
    torch.testing.assert_close(turned.means, expected.means[:, columns], **close)


@pytest.mark.parametrize("covariance", FORMS)
def test_the_size_of_the_chunks_does_not_matter(covariance: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    X, _ = blobs(1100)
    mixture = GaussianMixture(3, covariance=covariance)
    expected = mixture.fit(X)
    monkeypatch.setattr(c4buffer.expectation, "CHUNK_FLOATS", 1)
    monkeypatch.setattr(c4buffer.kmeans, "CHUNK_FLOATS", 1)
    assert_mixtures_close(mixture.fit(X), expected, rtol=1e-10, atol=1e-12)


# The start


def test_separate_blobs_are_found_from_k_means() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    X = 10 * torch.eye(4)[labels] + 0.3 * torch.randn(400, 4, generator=generator)
    result = GaussianMixture(4).fit(X)
    found = result.responsibilities.argmax(dim=1)
    assert len({(int(a), int(b)) for a, b in zip(labels, found)}) == 4
    torch.testing.assert_close(result.weights, torch.full((4,), 0.25))
    assert result.converged
    assert result.weights.dtype == result.responsibilities.dtype == X.dtype


def test_without_a_generator_fits_repeat_and_global_generators_are_left_alone() -> None:
    X, _ = blobs()
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, second = GaussianMixture(3).fit(X), GaussianMixture(3).fit(X)
    assert_mixtures_close(first, second, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_a_generator_decides_the_start_and_moves_on() -> None:
    X, _ = blobs(apart=0.0)

    def fits(seed: int) -> list[MixtureResult]:
        mixture = GaussianMixture(4, generator=torch.Generator().manual_seed(seed))
        return [mixture.fit(X), mixture.fit(X)]

    (one, two), (again, _), (other, _) = fits(1), fits(1), fits(2)
    assert_mixtures_close(one, again, rtol=0, atol=0)
    assert not torch.equal(one.responsibilities, two.responsibilities)
    assert not torch.equal(one.responsibilities, other.responsibilities)


@pytest.mark.parametrize(("distinct", "covariance"), [(1, "full"), (2, "full"), (2, "diag"), (3, "tied")])
@pytest.mark.parametrize("regularization", [0.0, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fewer_distinct_rows_than_components_lower_k_with_a_warning(
    distinct: int, covariance: Any, regularization: float, dtype: torch.dtype
) -> None:
    X = torch.arange(distinct, dtype=dtype).unsqueeze(1).repeat(6, 2)
    mixture = GaussianMixture(5, covariance=covariance, regularization=regularization)
    message = f"n_components: 5 components for {distinct} distinct rows; the mixture has {distinct}."
    with pytest.warns(UserWarning, match=message) as caught:
        result = mixture.fit(X)
    assert caught[0].filename == __file__
    assert result.weights.shape == (distinct,)
    assert sorted(result.means[:, 0].tolist()) == pytest.approx(list(range(distinct)), abs=1e-6)
    assert math.isfinite(result.log_likelihood)


# Empty components


def test_an_empty_component_starts_again_at_the_row_farthest_out() -> None:
    X, _ = blobs(60)
    X[17] = 30.0
    start = torch.eye(2, dtype=torch.float64)[torch.zeros(60, dtype=torch.int64)]
    for covariance in FORMS:
        result = GaussianMixture(2, covariance=covariance, max_iterations=0).fit(X, initial=start)
        torch.testing.assert_close(result.means[1], X[17])
        assert result.weights[1] > 0.3
        assert (GaussianMixture(2, covariance=covariance).fit(X, initial=start).weights > 0).all()


@pytest.mark.parametrize("covariance", FORMS)
def test_a_component_that_loses_all_rows_starts_again_at_the_worst_explained_row(covariance: Any) -> None:
    X, start = blobs(60)
    X[17] += 50.0
    settled = GaussianMixture(2, covariance=covariance).fit(X.clone(), initial=start[:, :2].softmax(dim=1))
    lost = MixtureResult(
        weights=torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64),
        means=torch.cat([settled.means, torch.full((1, 3), -1e4, dtype=torch.float64)]),
        covariances=settled.covariances
        if covariance == "tied"
        else torch.cat([settled.covariances, settled.covariances[:1]]),
        responsibilities=settled.responsibilities,
        log_likelihood=0.0,
        iterations=0,
        converged=False,
        covariance=covariance,
    )
    worst = min(range(60), key=lambda row: lost.log_likelihood_of(X[row : row + 1]))
    result = GaussianMixture(3, covariance=covariance, max_iterations=1).fit(X, initial=lost)
    torch.testing.assert_close(result.means[2], X[worst])
    assert result.weights[2] > 0.2


# Hard data


@st.composite
def hard_data(draw: st.DrawFn) -> Tensor:
    rows, dimensions = draw(st.integers(1, 60)), draw(st.integers(1, 6))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    X = torch.randn(rows, dimensions, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
    if draw(st.booleans()):  # duplicates
        X = X[: draw(st.integers(1, 4))].repeat(-(-rows // 4), 1)
    if draw(st.booleans()):  # a constant column
        X[:, 0] = draw(st.sampled_from([0.0, 1.0, 1e6]))
    if draw(st.booleans()):  # columns that are copies
        X[:, -1] = X[:, 0]
    if draw(st.booleans()):  # an outlier
        X[0] = draw(st.sampled_from([1e3, 1e6, -1e10]))
    if draw(st.booleans()):  # columns of very different sizes
        X[:, 0] *= 1e4
    return (10.0 ** draw(st.integers(-12, 4))) * (X.to(dtype) + draw(st.sampled_from([0.0, 1.0, 1e4])))


def assert_sound(result: MixtureResult, X: Tensor) -> None:
    for name in ("weights", "means", "covariances", "responsibilities"):
        assert bool(torch.isfinite(getattr(result, name)).all()), name
    assert math.isfinite(result.log_likelihood)
    assert result.weights.sum().item() == pytest.approx(1, abs=1e-5)
    assert_shares(result.responsibilities, len(X))


def assert_shares(responsibilities: Tensor, rows: int) -> None:
    assert len(responsibilities) == rows
    assert bool((responsibilities >= 0).all())
    torch.testing.assert_close(
        responsibilities.sum(dim=1), torch.ones(rows, dtype=responsibilities.dtype), rtol=0, atol=1e-5
    )


@few_examples
@given(
    X=hard_data(),
    components=st.integers(1, 6),
    covariance=st.sampled_from(FORMS),
    regularization=st.sampled_from([0.0, 1e-6]),
)
@example(X=torch.zeros(10, 3), components=3, covariance="full", regularization=0.0)
@example(X=torch.zeros(10, 3), components=1, covariance="diag", regularization=0.0)
@example(X=torch.arange(15.0).sin().reshape(5, 3).repeat(4, 1), components=3, covariance="diag", regularization=0.0)
@example(X=torch.tensor([[0.0], [1.0], [1e12]]), components=3, covariance="tied", regularization=0.0)
def test_responsibilities_are_shares_and_nothing_is_ever_nan(
    X: Tensor, components: int, covariance: Any, regularization: float
) -> None:
    mixture = GaussianMixture(components, covariance=covariance, regularization=regularization)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="n_components: ", category=UserWarning)
        result = mixture.fit(X)
        assert_sound(result, X)
        assert_sound(mixture.fit(X, initial=result), X)
        assert_sound(mixture.fit(X.flip(0) * 3 + 1, initial=result), X)
    for far in (1e8 * X + 1e10, X + 1e30):
        assert_shares(result.responsibilities_of(far), len(X))
        assert math.isfinite(result.log_likelihood_of(far))


@pytest.mark.parametrize("distance", [1e2, 1e4, 1e6, 1e12, 1e25])
def test_the_shares_of_rows_far_from_all_components_sum_to_one(distance: float) -> None:
    X = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    start = torch.full((100, 4), 0.25)
    same = GaussianMixture(4, max_iterations=0).fit(X, initial=start)
    r = same.responsibilities_of(X + distance)
    torch.testing.assert_close(r, torch.full_like(r, 0.25))


@pytest.mark.parametrize("covariance", FORMS)
def test_float32_data_far_from_zero_are_no_trouble(covariance: Any) -> None:
    X, start = blobs()
    X = (X + 1e4 * X.std()).float()
    mixture = GaussianMixture(3, covariance=covariance, max_iterations=10, tolerance=0)
    found, exact = mixture.fit(X, initial=start.float()), mixture.fit(X.double(), initial=start)
    torch.testing.assert_close(found.weights.double(), exact.weights, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.covariances.double(), exact.covariances, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.responsibilities.double(), exact.responsibilities, rtol=0, atol=1e-3)
    assert found.log_likelihood == pytest.approx(exact.log_likelihood, abs=1e-3)


def test_a_covariance_that_is_not_positive_definite_gets_no_more_jitter_than_it_needs() -> None:
    good = torch.tensor([[4.0, 2.0], [2.0, 3.0]], dtype=torch.float64)
    flat = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    lower = c4buffer.expectation.cholesky(torch.stack([good, flat, torch.zeros_like(flat)]))
    assert torch.equal(lower[0], torch.linalg.cholesky(good))
    torch.testing.assert_close(lower[1] @ lower[1].T, flat, rtol=0, atol=1e-11)
    assert bool(torch.isfinite(lower).all())
    with pytest.raises(ValueError, match="covariances: expected finite values, got nan in row 0"):
        c4buffer.expectation.cholesky(torch.full((1, 2, 2), float("nan")))


# Standardised


def own_units(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Blobs whose columns lie elsewhere and are measured in units of their own."""
    X, start = blobs(dimensions=4)
    moved = X * torch.tensor([1e-3, 1.0, 50.0, 1e3]) + torch.tensor([1.0, -30.0, 5.0, 0.0])
    return moved.to(dtype), start.to(dtype)


@pytest.mark.parametrize("covariance", FORMS)
@pytest.mark.parametrize("begin", ["k-means", "responsibilities", "mixture"])
def test_standardised_is_the_fit_of_the_standardised_copy_carried_back(covariance: Any, begin: str) -> None:
    X, start = own_units()
    mean, scale = X.mean(dim=0), X.std(dim=0, correction=0)
    copy = (X - mean) / scale
    options: dict[str, Any] = {"covariance": covariance, "regularization": 1e-3, "max_iterations": 6, "tolerance": 0}
    plain, standardised = GaussianMixture(3, **options), GaussianMixture(3, standardize=True, **options)
    if begin == "mixture":
        before = GaussianMixture(3, **{**options, "max_iterations": 1}).fit(copy, initial=start)
        expected = plain.fit(copy, initial=before)
        found = standardised.fit(X, initial=before.rescaled(mean, scale))
    else:
        initial = start if begin == "responsibilities" else None
        expected, found = plain.fit(copy, initial=initial), standardised.fit(X, initial=initial)
    assert_mixtures_close(found, expected.rescaled(mean, scale), rtol=1e-10, atol=1e-10)
    assert (found.iterations, found.converged) == (expected.iterations, expected.converged)
    torch.testing.assert_close(found.responsibilities_of(X), found.responsibilities, rtol=0, atol=1e-9)
    assert found.log_likelihood_of(X) == pytest.approx(found.log_likelihood, abs=1e-9)


@pytest.mark.parametrize("covariance", FORMS)
def test_standardised_float32_gives_float64_parameters_and_float32_responsibilities(covariance: Any) -> None:
    X, start = own_units(torch.float32)
    mixture = GaussianMixture(3, covariance=covariance, standardize=True, max_iterations=6, tolerance=0)
    found, exact = mixture.fit(X, initial=start), mixture.fit(X.double(), initial=start.double())
    assert found.responsibilities.dtype == torch.float32
    assert {found.weights.dtype, found.means.dtype, found.covariances.dtype} == {torch.float64}
    torch.testing.assert_close(found.weights, exact.weights, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.responsibilities.double(), exact.responsibilities, rtol=0, atol=1e-3)
    assert found.log_likelihood == pytest.approx(exact.log_likelihood, abs=1e-4)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    shift=st.floats(-100, 100),
    exponents=st.lists(st.integers(-8, 8), min_size=4, max_size=4),
    covariance=st.sampled_from(FORMS),
)
def test_standardised_fits_do_not_see_where_columns_lie_or_what_they_are_measured_in(
    shift: float, exponents: list[int], covariance: Any
) -> None:
    X, _ = blobs(120, dimensions=4)
    scale = 10.0 ** torch.tensor(exponents, dtype=torch.float64)
    mixture = GaussianMixture(3, covariance=covariance, standardize=True)
    expected, found = mixture.fit(X), mixture.fit((X + shift) * scale)
    torch.testing.assert_close(found.responsibilities, expected.responsibilities, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.means / scale - shift, expected.means, rtol=0, atol=1e-6)
    assert found.log_likelihood == pytest.approx(expected.log_likelihood - scale.log().sum().item(), abs=1e-6)


@pytest.mark.parametrize("covariance", FORMS)
@pytest.mark.parametrize("value", [0.0, 0.1, -3e4])
def test_a_constant_column_of_a_standardised_fit_keeps_its_value_and_the_regularisation(
    value: float, covariance: Any
) -> None:
    X, start = own_units()
    X[:, 1] = value
    others = [0, 2, 3]
    mixture = GaussianMixture(3, covariance=covariance, standardize=True, max_iterations=4, tolerance=0)
    found, without = mixture.fit(X, initial=start), mixture.fit(X[:, others], initial=start)
    torch.testing.assert_close(found.responsibilities, without.responsibilities, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.means[:, 1], X[:3, 1])
    variance = found.covariances[..., 1] if covariance == "diag" else found.covariances[..., 1, 1]
    torch.testing.assert_close(variance, torch.full_like(variance, 1e-6), rtol=1e-6, atol=1e-16)


@pytest.mark.parametrize("covariance", FORMS)
@pytest.mark.parametrize(
    ("dtype", "unit"),
    [
        (torch.float32, 1e-42),
        (torch.float32, 1e-37),
        (torch.float32, 6e36),
        (torch.float64, 1e-140),
        (torch.float64, 1e140),
    ],
)
def test_a_standardised_fit_takes_any_unit_whose_numbers_the_dtype_holds(
    dtype: torch.dtype, unit: float, covariance: Any
) -> None:
    X, start = blobs(60)
    mixture = GaussianMixture(3, covariance=covariance, standardize=True, max_iterations=3, tolerance=0)
    moved = (X.double() * unit).to(dtype)
    found = mixture.fit(moved, initial=start.to(dtype))
    exact = mixture.fit(moved.double() / unit, initial=start)
    accuracy = 1e-3 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(found.responsibilities.double(), exact.responsibilities, rtol=0, atol=accuracy)
    torch.testing.assert_close(found.means / unit, exact.means, rtol=0, atol=10 * accuracy)
    assert found.log_likelihood == pytest.approx(exact.log_likelihood - 3 * math.log(unit), abs=accuracy)
    with_k_means = mixture.fit(moved)
    assert math.isfinite(with_k_means.log_likelihood)
    assert bool(torch.isfinite(with_k_means.responsibilities).all())


def test_a_column_that_float32_can_not_divide_by_its_deviation_is_left_alone() -> None:
    X, start = own_units(torch.float32)
    X[:, 1] = 0
    X[0, 1] = 1e-45
    assert_sound(GaussianMixture(3, standardize=True).fit(X), X)
    assert_sound(GaussianMixture(3, standardize=True).fit(X, initial=start), X)


@pytest.mark.parametrize(
    ("X", "standardize", "span"),
    [
        (torch.tensor([[-3e38], [0.0], [3e38]]), True, "8.50706e+37"),
        (torch.tensor([[0.0], [1e38]]), True, "8.50706e+37"),
        (torch.tensor([[0.0], [1e30]]), False, "1.30438e+19"),
        (torch.tensor([[0.0], [1e200]], dtype=torch.float64), True, "9.48075e+153"),
    ],
)
def test_columns_that_span_more_than_can_be_worked_with_are_refused(X: Tensor, standardize: bool, span: str) -> None:
    message = f"X: expected columns that span at most {span}"
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        GaussianMixture(2, standardize=standardize).fit(X)


def test_large_columns_far_apart_span_no_more_than_each_alone() -> None:
    X = torch.tensor([[0.0, 1e38], [1.0, 1e38], [8.0, 1e38], [9.0, 1e38]])  # all values together span too much
    weights = GaussianMixture(2, standardize=True).fit(X).weights
    torch.testing.assert_close(weights, torch.tensor([0.5, 0.5], dtype=torch.float64))


# Many columns


def wide_blobs(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Two blobs of different shapes that overlap in spite of their many columns [N, E]; soft responsibilities."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shapes = torch.eye(columns) + 0.2 * normal(2, columns, columns) / columns**0.5
    halves = [normal(rows // 2, columns) @ shape for shape in shapes]
    halves[1] += 2 / columns**0.5
    return torch.cat(halves), normal(rows, 2).softmax(dim=1)


@pytest.mark.parametrize("covariance", ["full", "tied"])
@pytest.mark.parametrize(("columns", "rows"), [(130, 500), (200, 800), (512, 1200)])
def test_products_in_blocks_agree_with_scikit_learn(columns: int, rows: int, covariance: Any) -> None:
    X, start = wide_blobs(rows, columns)
    assert columns >= c4buffer.expectation.BLOCKS_FROM
    oracle = sklearn_fit(X, start, covariance, iterations=2, regularization=0.1)
    mixture = GaussianMixture(2, covariance=covariance, regularization=0.1, max_iterations=2, tolerance=0)
    result = mixture.fit(X, initial=start)
    np.testing.assert_allclose(result.weights, oracle.weights_, atol=1e-8)
    np.testing.assert_allclose(result.means, oracle.means_, atol=1e-8)
    np.testing.assert_allclose(result.covariances, oracle.covariances_, atol=1e-8)
    np.testing.assert_allclose(result.responsibilities, oracle.predict_proba(X.numpy()), atol=1e-8)
    assert result.log_likelihood == pytest.approx(oracle.score(X.numpy()), abs=1e-8)
    matrices = result.covariances.reshape(-1, columns, columns)
    assert torch.equal(matrices, matrices.mT)


@pytest.mark.parametrize("covariance", ["full", "tied"])
@pytest.mark.parametrize("columns", [5, 64, 65, 128, 131])
def test_blocks_change_nothing_but_rounding(columns: int, covariance: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    X, start = wide_blobs(300, columns)
    mixture = GaussianMixture(2, covariance=covariance, regularization=0.1, max_iterations=3, tolerance=0)
    X[5] += 100
    empty = torch.eye(2, dtype=torch.float64)[torch.zeros(300, dtype=torch.int64)]
    for initial in (start, empty):
        monkeypatch.setattr(c4buffer.expectation, "BLOCKS_FROM", 10_000)
        expected = mixture.fit(X, initial=initial)
        monkeypatch.setattr(c4buffer.expectation, "BLOCKS_FROM", 1)
        found = mixture.fit(X, initial=initial)
        assert_mixtures_close(found, expected, rtol=1e-9, atol=1e-9)
        matrices = found.covariances.reshape(-1, columns, columns)
        assert torch.equal(matrices, matrices.mT)


@pytest.mark.parametrize("covariance", ["full", "tied"])
@pytest.mark.parametrize(("columns", "rows", "offset"), [(130, 600, 0.0), (512, 1200, 1e4)])
def test_blocks_in_float32_are_close_to_float64_even_far_from_zero(
    columns: int, rows: int, offset: float, covariance: Any
) -> None:
    X, start = wide_blobs(rows, columns)
    X = (X + offset * X.std()).float()
    mixture = GaussianMixture(2, covariance=covariance, regularization=0.1, max_iterations=2, tolerance=0)
    found, exact = mixture.fit(X, initial=start.float()), mixture.fit(X.double(), initial=start)
    assert_sound(found, X)
    torch.testing.assert_close(found.weights.double(), exact.weights, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.responsibilities.double(), exact.responsibilities, rtol=0, atol=1e-2)
    size = exact.covariances.abs().max().item()
    torch.testing.assert_close(found.covariances.double(), exact.covariances, rtol=0, atol=1e-3 * size)
    assert found.log_likelihood == pytest.approx(exact.log_likelihood, rel=1e-4)


# The start, of many rows and by FAISS


def corners(rows: int, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Four blobs far apart [N, 4], in no order, and their labels."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(4, (rows,), generator=generator)
    return (20 * torch.eye(4)[labels] + torch.randn(rows, 4, generator=generator)).to(dtype), labels


def assert_found(result: MixtureResult, labels: Tensor) -> None:
    pairs = set(zip(labels.tolist(), result.responsibilities.argmax(dim=1).tolist()))
    assert len(pairs) == len(labels.unique()) == len(result.weights)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("start", ["k-means++", "faiss"])
def test_of_many_rows_the_start_looks_at_some(start: Any, standardize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    X, labels = corners(600)
    looked_at: list[int] = []
    for name in ("kmeans", "faiss_kmeans"):
        original = getattr(c4buffer.mixture, name)

        def watched(rows: Tensor, *given: Any, original: Any = original, **options: Any) -> Any:
            looked_at.append(len(rows))
            return original(rows, *given, **options)

        monkeypatch.setattr(c4buffer.mixture, name, watched)
    monkeypatch.setattr(c4buffer.mixture, "START_ROWS", 60)
    first, again = (GaussianMixture(4, start=start, standardize=standardize).fit(X) for _ in range(2))
    assert_found(first, labels)
    assert_mixtures_close(first, again, rtol=0, atol=0)
    assert len(looked_at) == 2
    assert 30 < looked_at[0] <= 60

    def seeded(seed: int) -> MixtureResult:
        generator = torch.Generator().manual_seed(seed)
        return GaussianMixture(4, start=start, generator=generator, max_iterations=0).fit(X[:, :1])

    assert_mixtures_close(seeded(3), seeded(3), rtol=0, atol=0)
    assert not torch.equal(seeded(3).means, seeded(4).means)


@pytest.mark.parametrize("covariance", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_separate_blobs_are_found_from_faiss_each_time_alike(dtype: torch.dtype, covariance: Any) -> None:
    X, labels = corners(400, dtype=dtype)
    state = torch.get_rng_state()
    mixture = GaussianMixture(4, covariance=covariance, start="faiss")
    first, again = mixture.fit(X), mixture.fit(X)
    assert_found(first, labels)
    assert_mixtures_close(first, again, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    # from such blobs, where it started does not matter
    weights = GaussianMixture(4, covariance=covariance).fit(X).weights
    torch.testing.assert_close(first.weights.sort().values, weights.sort().values, rtol=1e-4, atol=1e-5)


def test_faiss_lowers_k_to_the_distinct_rows_too() -> None:
    X = torch.arange(2.0).unsqueeze(1).repeat(6, 2)
    with pytest.warns(UserWarning, match="n_components: 5 components for 2 distinct rows; the mixture has 2."):
        result = GaussianMixture(5, start="faiss").fit(X)
    assert sorted(result.means[:, 0].tolist()) == pytest.approx([0, 1])


@pytest.mark.parametrize("start", ["k-means++", "faiss"])
def test_rows_that_the_start_does_not_draw_count_as_distinct(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c4buffer.mixture, "START_ROWS", 50)
    X = torch.zeros(2000, 2)
    X[777], X[1999] = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    result = GaussianMixture(3, start=start).fit(X)
    assert sorted(result.means.round(decimals=3).tolist()) == [[0, 0], [0, 1], [1, 0]]
    with pytest.warns(UserWarning, match="n_components: 4 components for 3 distinct rows; the mixture has 3."):
        GaussianMixture(4, start=start).fit(X)


def test_only_the_start_by_faiss_needs_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    X, labels = corners(60)
    assert_found(GaussianMixture(4).fit(X), labels)
    mixture = GaussianMixture(4, start="faiss")
    message = 'k-means by FAISS needs FAISS: pip install "c4buffer[faiss]", or "c4buffer[gpu]" for CUDA'
    with pytest.raises(ImportError, match=re.escape(message)):
        mixture.fit(X)
    start = torch.nn.functional.one_hot(labels).float()
    assert_found(mixture.fit(X, initial=start), labels)  # of given responsibilities there is nothing to start


# The number of parameters


@pytest.mark.parametrize(
    ("covariance", "components", "columns", "expected"),
    [
        ("full", 1, 1, 0 + 1 + 1),
        ("full", 3, 4, 2 + 12 + 3 * 10),
        ("diag", 3, 4, 2 + 12 + 3 * 4),
        ("tied", 3, 4, 2 + 12 + 10),
        ("tied", 1, 2, 0 + 2 + 3),
        ("diag", 2, 1, 1 + 2 + 2),
    ],
)
def test_free_parameters_by_hand(covariance: Any, components: int, columns: int, expected: int) -> None:
    X, _ = blobs(60, dimensions=columns)
    result = GaussianMixture(components, covariance=covariance, max_iterations=1).fit(X)
    assert result.free_parameters == expected
    bic = -2 * 60 * result.log_likelihood + expected * math.log(60)
    assert result.bic(X) == pytest.approx(bic)


# Other units


@pytest.mark.parametrize("covariance", FORMS)
def test_a_rescaled_mixture_explains_rescaled_rows_alike(covariance: Any) -> None:
    X, start = blobs()
    shift, scale = torch.tensor([5.0, -1e3, 0.1]), torch.tensor([1e-3, 20.0, 1.0])
    result = GaussianMixture(3, covariance=covariance).fit(X, initial=start)
    rescaled, there = result.rescaled(shift, scale), shift + scale * X
    torch.testing.assert_close(rescaled.responsibilities_of(there), result.responsibilities, rtol=0, atol=1e-9)
    torch.testing.assert_close(rescaled.responsibilities, result.responsibilities)
    expected = result.log_likelihood - scale.double().log().sum().item()
    assert rescaled.log_likelihood == pytest.approx(expected, abs=1e-9)
    assert rescaled.log_likelihood_of(there) == pytest.approx(expected, abs=1e-9)
    back = rescaled.rescaled(-shift.double() / scale, 1 / scale.double())
    torch.testing.assert_close(back.covariances, result.covariances)
    torch.testing.assert_close(back.means, result.means)
    assert rescaled.means.dtype == torch.float64


# Errors

GOOD = torch.arange(12.0).reshape(6, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_components": 0}, "n_components: expected an integer of at least 1, got 0"),
        ({"n_components": 2.0}, "n_components: expected an integer of at least 1, got 2.0"),
        ({"covariance": "spherical"}, "covariance: expected one of 'full', 'diag', 'tied', got 'spherical'"),
        ({"regularization": -1e-6}, "regularization: expected a finite number at least 0, got -1e-06"),
        ({"max_iterations": -1}, "max_iterations: expected an integer of at least 0, got -1"),
        ({"tolerance": float("nan")}, "tolerance: expected a finite number at least 0, got nan"),
        ({"start": "kmeans"}, "start: expected one of 'k-means++', 'faiss', got 'kmeans'"),
    ],
)
def test_wrong_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        GaussianMixture(**{"n_components": 2, **options})


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (GOOD.tolist(), "X: expected a floating tensor [N, E] with at least one row and column, got list"),
        (GOOD.int(), "X: expected a floating tensor [N, E] with at least one row and column, got torch.int32 [6, 2]"),
        (GOOD[0], "X: expected a floating tensor [N, E] with at least one row and column, got torch.float32 [2]"),
        (GOOD[:0], "X: expected a floating tensor [N, E] with at least one row and column, got torch.float32 [0, 2]"),
        (GOOD / torch.tensor([1.0, 0.0]), "X: expected finite values, got inf in row 0 (6 of 6 rows are bad)"),
        (
            GOOD * 1e30,
            "X: expected columns that span at most 5.32512e+18, so that torch.float32 holds their squares, got 1e+31",
        ),
    ],
)
def test_wrong_rows_are_refused(X: Any, message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        GaussianMixture(2).fit(X)


def fitted(**options: Any) -> MixtureResult:
    return GaussianMixture(2, max_iterations=1, **options).fit(GOOD)


@pytest.mark.parametrize(
    ("initial", "message"),
    [
        (lambda: torch.ones(6, 3) / 3, "initial: expected responsibilities [6, 2], got [6, 3]"),
        (lambda: torch.ones(5, 2) / 2, "initial: expected responsibilities [6, 2], got [5, 2]"),
        (lambda: torch.full((6, 2), float("nan")), "initial: expected finite values, got nan in row 0"),
        (
            lambda: torch.ones(6, 2),
            "initial: expected responsibilities: not negative, rows that sum to one, got rows that miss it by 1",
        ),
        (
            lambda: torch.tensor([1.5, -0.5]).repeat(6, 1),
            "initial: expected responsibilities: not negative, rows that sum to one, got",
        ),
        (
            lambda: fitted(covariance="diag"),
            "initial: expected a 'full' mixture in 2 dimensions, got a 'diag' one in 2",
        ),
        (lambda: fitted().rescaled(torch.zeros(1), torch.ones(1)), None),
    ],
)
def test_an_initial_that_does_not_fit_is_refused(initial: Callable[[], Any], message: str | None) -> None:
    if message is None:  # a mixture of the right form is welcome, in whatever precision
        assert GaussianMixture(2).fit(GOOD, initial=initial()).means.dtype == GOOD.dtype
        return
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        GaussianMixture(2).fit(GOOD, initial=initial())


def test_a_mixture_refuses_rows_of_another_width() -> None:
    for ask in (fitted().responsibilities_of, fitted().log_likelihood_of, fitted().bic):
        with pytest.raises(ValueError, match="X: expected 2 columns, as many as the mixture has, got 3"):
            ask(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="initial: expected a 'full' mixture in 3 dimensions, got a 'full' one in 2"):
        GaussianMixture(2).fit(torch.zeros(4, 3), initial=fitted())


@pytest.mark.parametrize(
    "matrix",
    [
        [[1.0, 1e200], [1e200, 1.0]],
        [[1e-300, 1e300], [1e300, 1e-300]],
        [[0.0, 1e9], [1e9, 0.0]],
        [[-1.0, 0.0], [0.0, 1.0]],
    ],
)
def test_what_no_jitter_makes_positive_definite_keeps_its_variances_alone(matrix: list[list[float]]) -> None:
    given = torch.tensor([matrix], dtype=torch.float64)
    lower = c4buffer.expectation.cholesky(given)
    found = (lower @ lower.mT).diagonal(dim1=1, dim2=2)
    variances = given.diagonal(dim1=1, dim2=2).abs()
    expected = torch.where(variances > 0, variances, torch.ones_like(variances))
    assert bool((found >= expected * (1 - 1e-12)).all())
    assert bool((found <= expected * 100).all())
    assert bool(torch.isfinite(lower).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_fitted_in_float32(dtype: torch.dtype) -> None:
    X = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = GaussianMixture(2).fit(X)
    assert found.responsibilities.dtype == torch.float32
    assert torch.equal(found.responsibilities, GaussianMixture(2).fit(X.float()).responsibilities)


def test_a_start_of_more_components_is_refused_and_one_of_fewer_keeps_them() -> None:
    X = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    found = GaussianMixture(4).fit(X)
    with pytest.raises(ValueError, match="^initial: expected at most 2 components, got 4$"):
        GaussianMixture(2).fit(X, initial=found)
    assert GaussianMixture(6).fit(X, initial=found).weights.shape == (4,)


def test_autocast_changes_nothing() -> None:
    X = 1e5 * torch.randn(3000, 6, generator=torch.Generator().manual_seed(0))
    plain = GaussianMixture(3).fit(X)
    with torch.autocast("cpu", dtype=torch.float16):
        found = GaussianMixture(3).fit(X)
        assert torch.equal(found.responsibilities_of(X), plain.responsibilities_of(X))
    assert torch.equal(found.responsibilities, plain.responsibilities)
    assert torch.equal(found.covariances, plain.covariances)


def test_responsibilities_to_start_from_may_have_a_graph_and_are_a_tensor() -> None:
    X, start = blobs()
    found = GaussianMixture(3).fit(X, initial=start.clone().requires_grad_())
    assert torch.equal(found.responsibilities, GaussianMixture(3).fit(X, initial=start).responsibilities)
    with pytest.raises(ValueError, match=r"initial: expected responsibilities \[300, 3\], got ndarray"):
        GaussianMixture(3).fit(X, initial=start.numpy())


@pytest.mark.parametrize("covariance", FORMS)
def test_components_that_start_again_do_so_at_rows_that_differ(covariance: Any) -> None:
    g = torch.Generator().manual_seed(0)
    X = torch.cat([torch.randn(300, 2, generator=g), torch.tensor([[40.0, 40.0]]).repeat(5, 1)])
    start = torch.zeros(len(X), 3)
    start[:, 0] = 1
    found = GaussianMixture(3, covariance=covariance, max_iterations=5).fit(X, initial=start)
    assert float((found.responsibilities[:, 1] - found.responsibilities[:, 2]).abs().max()) > 0.1


def test_without_a_generator_a_fit_is_that_of_seed_zero() -> None:
    X = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    found, expected = (
        GaussianMixture(4, generator=generator).fit(X) for generator in (None, torch.Generator().manual_seed(0))
    )
    assert torch.equal(found.responsibilities, expected.responsibilities)
    assert not torch.equal(
        found.responsibilities, GaussianMixture(4, generator=torch.Generator().manual_seed(1)).fit(X).responsibilities
    )


@pytest.mark.parametrize(("mass", "empty"), [(0.4, True), (0.6, False)])
def test_a_component_of_less_than_half_a_row_is_empty(mass: float, empty: bool) -> None:
    X = torch.randn(60, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    X[17] = 30.0
    start = torch.zeros(60, 2, dtype=torch.float64)
    start[3, 1] = mass
    start[:, 0] = 1 - start[:, 1]
    result = GaussianMixture(2, max_iterations=0).fit(X, initial=start)
    torch.testing.assert_close(result.means[1], X[17] if empty else X[3])


@pytest.mark.parametrize("covariance", ["full", "diag"])
def test_a_component_that_starts_again_is_regularised(covariance: Any) -> None:
    X = torch.randn(60, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    X[:, 1] = 5.0
    start = torch.eye(2, dtype=torch.float64)[torch.zeros(60, dtype=torch.int64)]
    result = GaussianMixture(2, covariance=covariance, regularization=0.25, max_iterations=0).fit(X, initial=start)
    variances = result.covariances if covariance == "diag" else result.covariances.diagonal(dim1=1, dim2=2)
    expected = torch.tensor([float(X[:, 0].var(correction=0)) + 0.25, 0.25], dtype=torch.float64)
    torch.testing.assert_close(variances[1], expected)


def test_a_start_that_misses_one_by_more_than_a_thousandth_is_refused() -> None:
    X, start = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), torch.full((6, 2), 0.5)
    start[4, 0] = 0.502
    with pytest.raises(ValueError, match="^initial: expected responsibilities: .*, got rows that miss it by 0.00"):
        GaussianMixture(2).fit(X, initial=start)


@pytest.mark.parametrize("covariance", ["full", "diag", "tied"])
def test_weights_sum_to_one_after_a_component_starts_again(covariance: Any) -> None:
    X = torch.randn(60, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = torch.eye(3, dtype=torch.float64)[torch.arange(60) % 2]
    result = GaussianMixture(3, covariance=covariance, max_iterations=0).fit(X, initial=start)
    torch.testing.assert_close(result.weights, torch.tensor([3, 3, 2], dtype=torch.float64) / 8)


def test_rows_so_far_out_that_their_products_overflow_have_shares_that_sum_to_one() -> None:
    generator = torch.Generator().manual_seed(0)
    column = 1e-6 * torch.randn(200, 1, generator=generator)
    X = torch.cat([column, column + 1e-7 * torch.randn(200, 1, generator=generator)], dim=1)  # whitening is 1e7
    result = GaussianMixture(2, regularization=0).fit(X)
    far = torch.tensor([[1e37, 1e37], [-1e37, -1e37], [1e37, -1e37]])
    torch.testing.assert_close(result.responsibilities_of(far).sum(dim=1), torch.ones(3))


def test_a_mirrored_mixture_explains_mirrored_rows() -> None:
    X = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shift, scale = torch.tensor([1.0, -2.0]), torch.tensor([-3.0, 0.5])
    mirrored = GaussianMixture(2).fit(X).rescaled(shift, scale)
    assert mirrored.log_likelihood == pytest.approx(mirrored.log_likelihood_of(shift + scale * X), rel=1e-9)


def test_the_first_centre_is_any_row_alike() -> None:
    X, generator = torch.arange(4.0).unsqueeze(1), torch.Generator().manual_seed(0)
    drawn = torch.cat([draw_centres(X, 1, generator=generator) for _ in range(400)])
    assert int(torch.bincount(drawn[:, 0].long(), minlength=4).min()) > 70
