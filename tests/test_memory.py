"""How many rows at once, by hand; and that what is taken in chunks does not depend on their size."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import c4buffer.losses.covariance
import c4buffer.memory
from c4buffer import decompose_cross_covariance
from c4buffer._checks import check_finite
from c4buffer.memory import floats_at_once, free_bytes, rows_at_once

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def with_free(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(c4buffer.memory, "free_bytes", lambda device: count)


# What is free


def test_some_memory_is_free_and_not_more_than_there_is() -> None:
    assert 1 << 20 < free_bytes(CPU) < 1 << 50


def test_what_the_file_cache_would_give_back_is_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = tmp_path / "meminfo"
    table.write_text("MemTotal:  24000 kB\nMemFree:  100 kB\nMemAvailable:   20000 kB\nCached:  19000 kB\n")
    monkeypatch.setattr(c4buffer.memory, "MEMINFO", str(table))
    assert free_bytes(CPU) == 20000 * 1024


@pytest.mark.parametrize("table", ["", None])
def test_where_the_system_has_no_such_table_its_free_pages_count(
    table: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if table is not None:
        (tmp_path / "meminfo").write_text(table)
    monkeypatch.setattr(c4buffer.memory, "MEMINFO", str(tmp_path / "meminfo"))
    pages = {"SC_AVPHYS_PAGES": 30, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__, raising=False)
    assert free_bytes(CPU) == 30 * 4096


@pytest.mark.parametrize("error", [OSError, ValueError, AttributeError])
def test_where_the_system_does_not_tell_a_fixed_number_is_taken(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(name: str) -> int:
        raise error(name)

    monkeypatch.setattr(c4buffer.memory, "MEMINFO", str(tmp_path / "nothing"))
    monkeypatch.setattr(os, "sysconf", fails, raising=False)
    assert free_bytes(CPU) is None
    assert rows_at_once(c4buffer.memory.UNKNOWN >> 7, CPU, cached=1000) == 16


def test_on_a_gpu_what_torch_holds_and_does_not_use_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    assert free_bytes(GPU) == 1200


# What is taken


@pytest.mark.parametrize(
    ("device", "free", "bytes_per_row", "expected"),
    [
        (CPU, 8000, 10, 64),  # of 100, the power of two below
        (CPU, 8192, 16, 64),
        (CPU, 8000, 1001, 1),  # not even one fits
        (CPU, 0, 10, 1),
        (CPU, 1 << 40, 10, 4096),
        (GPU, 8000, 10, 64),
        (GPU, 1 << 40, 10, 1 << 18),
    ],
)
def test_rows_are_what_an_eighth_of_the_free_memory_holds(
    device: torch.device, free: int, bytes_per_row: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(monkeypatch, free)
    assert rows_at_once(bytes_per_row, device, cached=4096) == expected


@pytest.mark.parametrize(
    ("device", "free", "expected"),
    [(CPU, 1 << 40, 500), (CPU, 0, 500), (GPU, 0, 500), (GPU, 32 * 600, 512), (GPU, 1 << 40, 1 << 27)],
)
def test_floats_are_what_the_cache_or_a_share_of_a_gpu_holds(
    device: torch.device, free: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(monkeypatch, free)
    assert floats_at_once(device, cached=500) == expected


# Theorem 2 in chunks


def pairs(rows: int, width: int, *, offset: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """g', g [N, D] that correlate, and responsibilities [N, 3] that depend on them; float64."""
    generator = torch.Generator().manual_seed(seed)
    target_g, noise = torch.randn(2, rows, width, generator=generator, dtype=torch.float64).unbind()
    r = (2 * target_g[:, :3] + noise[:, :3]).softmax(dim=1)
    return target_g + offset, 0.5 * target_g + noise + offset, r


@pytest.mark.parametrize("rows", [1, 7, 64, 100, 1000])
def test_the_decomposition_does_not_depend_on_the_size_of_the_chunks(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pairs(100, 4)
    expected = decompose_cross_covariance(*data)
    monkeypatch.setattr(c4buffer.losses.covariance, "CHUNK_ROWS", rows)
    torch.testing.assert_close(decompose_cross_covariance(*data), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(("dtype", "offset", "accuracy"), [(torch.float64, 1e6, 1e-8), (torch.float32, 1e3, 1e-3)])
@pytest.mark.parametrize("rows", [37, 8192])
def test_the_decomposition_is_exact_far_from_zero_in_any_chunks(
    dtype: torch.dtype, offset: float, accuracy: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(c4buffer.losses.covariance, "CHUNK_ROWS", rows)
    target_g, g, r = (part.to(dtype) for part in pairs(3000, 4, offset=offset))
    total, within, between = decompose_cross_covariance(target_g, g, r)
    torch.testing.assert_close(within + between, total, rtol=0, atol=accuracy / 100)
    exact = [part.double().numpy() for part in (target_g, g, r)]
    both = np.concatenate(exact[:2], axis=1)
    np.testing.assert_allclose(total, np.cov(both, rowvar=False, ddof=0)[:4, 4:], rtol=0, atol=accuracy)
    covariances = [np.cov(both, rowvar=False, ddof=0, aweights=weights)[:4, 4:] for weights in exact[2].T]
    expected = sum(p * covariance for p, covariance in zip(exact[2].mean(axis=0), covariances))
    np.testing.assert_allclose(within, expected, rtol=0, atol=accuracy)


# Finite values


@pytest.mark.parametrize("shape", [(1000,), (1000, 3), (1000, 2, 2)])
def test_finite_values_whose_sum_is_not_are_fine(shape: tuple[int, ...]) -> None:
    check_finite("x", torch.full(shape, 3e38))
    check_finite("x", torch.tensor([3e38, 3e38, -3e38, -3e38]).repeat(250))  # inf - inf
    check_finite("x", torch.full(shape, 6e4, dtype=torch.float16))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("row", [0, 65_535, 65_536, 65_537, 199_999])
def test_the_first_bad_row_is_named_wherever_it_is(row: int, bad: float) -> None:
    values = torch.full((200_000, 2), 3e38)  # the sum says nothing
    values[row, 1] = bad
    values[-1, 0] = bad
    count = 1 if row == 199_999 else 2
    message = f"x: expected finite values, got {bad} in row {row} ({count} of 200000 rows are bad); why?"
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        check_finite("x", values, hint="; why?")


def test_of_values_that_cancel_none_is_overlooked() -> None:
    with pytest.raises(
        ValueError, match=re.escape("x: expected finite values, got inf in row 1 (2 of 4 rows are bad)")
    ):
        check_finite("x", torch.tensor([1.0, float("inf"), -float("inf"), 2.0]))


@pytest.mark.parametrize("values", [torch.empty(0, 3), torch.tensor([2**62, 2**62]), torch.tensor([True])])
def test_what_can_not_be_bad_is_not(values: Any) -> None:
    check_finite("x", values)
    check_finite("x", values.float().requires_grad_())
