"""Column means and deviations, against NumPy in float64, whatever the columns are measured in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import c4buffer.scaling
from c4buffer.scaling import column_scaling, column_sums

few_examples = settings(max_examples=50, deadline=None, derandomize=True, database=None)


def columns(rows: int, width: int, *, seed: int = 0) -> Tensor:
    """[N, E], float64, each column elsewhere and with another spread."""
    normal = torch.randn(rows + 2, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 10 * normal[0] + normal[1].exp() * normal[2:]


def test_by_hand() -> None:
    X = torch.tensor([[1.0, 3.7, 0.0, 1e6], [3.0, 3.7, 0.0, 1e6 + 2], [5.0, 3.7, 0.0, 1e6], [7.0, 3.7, 0.0, 1e6 + 2]])
    mean, scale = column_scaling(X)
    assert mean.dtype == scale.dtype == torch.float64
    torch.testing.assert_close(mean, torch.tensor([4.0, X[0, 1].item(), 0.0, 1e6 + 1]).double(), rtol=1e-15, atol=0)
    torch.testing.assert_close(scale, torch.tensor([5.0**0.5, 1.0, 1.0, 1.0]).double())


@few_examples
@given(
    rows=st.integers(1, 200),
    width=st.integers(1, 5),
    seed=st.integers(0, 2**31),
    exponent=st.integers(-18, 18),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_they_are_numpys_in_float64(rows: int, width: int, seed: int, exponent: int, dtype: torch.dtype) -> None:
    X = (10.0**exponent * columns(rows, width, seed=seed)).to(dtype)
    mean, scale = column_scaling(X)
    exact = X.double().numpy()
    np.testing.assert_allclose(mean, exact.mean(axis=0), rtol=1e-12, atol=1e-14 * np.abs(exact).max())
    np.testing.assert_allclose(scale, np.ones(width) if rows == 1 else exact.std(axis=0), rtol=1e-10)
    np.testing.assert_allclose(column_sums(X), exact.sum(axis=0), rtol=1e-12, atol=1e-12 * np.abs(exact).max())


@pytest.mark.parametrize("rows", [1, 7, 100, 1000])
def test_the_size_of_the_chunks_does_not_matter(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    X = columns(100, 3)
    mean, scale = column_scaling(X)
    monkeypatch.setattr(c4buffer.scaling, "CHUNK_ROWS", rows)
    for found, expected in zip(column_scaling(X), (mean, scale)):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6])
def test_deviations_are_exact_far_from_zero(offset: float) -> None:
    X = (offset + torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).float()
    np.testing.assert_allclose(column_scaling(X)[1], X.double().numpy().std(axis=0), rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, -1 / 3, 1e9, 3e37, -1e-30])
def test_a_constant_column_is_divided_by_one(value: float, dtype: torch.dtype) -> None:
    X = torch.full((1001, 1), value, dtype=dtype)
    mean, scale = column_scaling(X)
    assert scale.tolist() == [1.0]
    assert mean.item() == pytest.approx(X[0].item(), rel=1e-12)


def test_squares_of_float32_neither_overflow_nor_vanish() -> None:
    X = torch.tensor([[-3e38, -1e-30], [3e38, 1e-30]])
    torch.testing.assert_close(column_scaling(X)[1], X[1].double())


def test_what_is_no_longer_a_number_to_divide_by_counts_as_constant() -> None:
    X = torch.zeros(100, 1)
    X[0] = 1e-45  # the smallest float32; the deviation is a tenth of it
    mean, scale = column_scaling(X)
    assert scale.tolist() == [1.0]
    assert bool(torch.isfinite((X - mean.float()) / scale.float()).all())


@pytest.mark.parametrize("rows", [1, 3])
def test_a_single_row_is_its_own_mean(rows: int) -> None:
    X = columns(1, 4).repeat(rows, 1)
    mean, scale = column_scaling(X)
    torch.testing.assert_close(mean, X[0])
    assert scale.tolist() == [1.0] * 4


def test_rows_are_not_written_to() -> None:
    X = columns(50, 3)
    column_scaling(X)
    assert torch.equal(X, columns(50, 3))
