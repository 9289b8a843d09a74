"""Products of batches of matrices, whichever library makes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import c4buffer.products
from c4buffer.products import product


def batches(components: int, rows: int, summed: int, columns: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(components, rows, summed, generator=generator)
    return left, torch.randn(components, summed, columns, generator=generator)


@pytest.mark.parametrize(
    "shape", [(3, 28, 28, 3120), (3, 46, 1899, 46), (2, 64, 256, 512), (1, 5, 7, 3), (3, 1, 5000, 2)]
)
@pytest.mark.parametrize("form", ["contiguous", "transposed", "strided", "columns"])
def test_products_are_those_in_double_precision(shape: tuple[int, int, int, int], form: str) -> None:
    left, right = batches(*shape)
    if form == "transposed":
        right = right.mT.contiguous().mT
    elif form == "strided":
        right = torch.stack([right, right], dim=3)[..., 0]
        left = torch.cat([left, left], dim=2)[:, :, : left.shape[2]]
    elif form == "columns":
        left = torch.cat([left, left], dim=1)[:, : left.shape[1]]
    expected = left.double() @ right.double()
    error = shape[2] ** 0.5 * 1e-6
    torch.testing.assert_close(product(left, right).double(), expected, rtol=1e-5, atol=5 * error)
    out = torch.full(expected.shape, torch.nan)
    assert product(left, right, out=out) is out
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=5 * error)


def test_without_onednn_torch_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = batches(3, 64, 64, 4096)
    monkeypatch.setattr(c4buffer.products, "_linear", None)
    assert torch.equal(product(left, right), left @ right)


@pytest.mark.skipif(c4buffer.products._linear is None, reason="torch makes all products here")
def test_only_large_float32_products_of_dense_matrices_go_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.Size] = []

    def linear(x: Tensor, w: Tensor) -> Tensor:
        asked.append(x.shape)
        return x @ w.T

    monkeypatch.setattr(c4buffer.products, "_linear", linear)
    left, right = batches(3, 64, 64, 4096)
    product(left.double(), right.double())
    product(left, torch.stack([right, right], dim=3)[..., 0])
    product(*batches(3, 28, 28, 512))
    product(*batches(1, 16, 5000, 16))
    assert not asked
    product(left, right)
    product(left, right.mT.contiguous().mT)
    assert asked == [torch.Size([64, 64])] * 6


def test_threads_do_not_change_a_bit() -> None:
    before = torch.get_num_threads()
    left, right = batches(3, 46, 2374, 46)
    try:
        torch.set_num_threads(1)
        one = product(left, right)
        torch.set_num_threads(2)
        assert torch.equal(product(left, right), one)
    finally:
        torch.set_num_threads(before)
