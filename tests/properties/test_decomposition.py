"""Theorem 2 and Eq. 10 for any gradients and any responsibilities, against sums written out in numpy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from c4buffer import SingleClusterSampler, cross_covariance, decompose_cross_covariance

seeds = st.integers(0, 2**31)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def gradients(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """g' and g [N, D], correlated or not, in any units, often far from zero; some rows of g' masked as ends are."""
    rows, dimensions = draw(st.integers(2, 50)), draw(st.integers(1, 8))
    g = normal(draw(seeds), rows, dimensions)
    target_g = normal(draw(seeds), rows, dimensions) + draw(st.sampled_from([0.0, 1.0, 10.0])) * g
    if draw(st.booleans()):  # duplicates, and perhaps no variance at all
        distinct = torch.arange(rows) % draw(st.integers(1, rows))
        target_g, g = target_g[distinct], g[distinct]
    target_g, g = (x + draw(st.sampled_from([0.0, 1.0, 1e4])) for x in (target_g, g))
    if draw(st.booleans()):
        target_g = target_g * (torch.arange(rows) % draw(st.integers(1, 5)) > 0).unsqueeze(1)
    dtype = draw(st.sampled_from([torch.float64, torch.float64, torch.float32]))
    size = st.integers(-60, 60) if dtype == torch.float64 else st.integers(-12, 12)  # whose squares do not leave it
    target_g, g = (10.0 ** draw(size) * x for x in (target_g, g))
    return target_g.to(dtype), g.to(dtype)


@st.composite
def shares(draw: st.DrawFn, like: Tensor) -> Tensor:
    """Responsibilities [N, K]: vague, sharp or hard, some clusters perhaps empty."""
    logits = draw(st.sampled_from([0.1, 3.0, 100.0])) * normal(draw(seeds), len(like), draw(st.integers(1, 6)))
    logits[:, 1 : 1 + draw(st.integers(0, 3))] = -torch.inf
    r = logits.softmax(dim=1)
    if draw(st.booleans()):
        r = nn.functional.one_hot(r.argmax(dim=1), r.shape[1]).double()
    return r.to(like.dtype)


def spread(x: Tensor) -> float:
    """sqrt(tr Sigma), divisor N."""
    return float(np.sqrt(np.asarray(x.double()).var(axis=0).sum()))


def rounding_of(target_g: Tensor, g: Tensor) -> float:
    """In an entry of their cross-covariance: epsilon of each one's size, times the spread of the other."""
    sizes = [float(x.double().abs().max()) + spread(x) for x in (target_g, g)]
    # Each is known to `least` of itself, so that no spread is less.
    least = 16 * torch.finfo(g.dtype).eps
    return least * (sizes[0] * max(spread(g), least * sizes[1]) + sizes[1] * max(spread(target_g), least * sizes[0]))


class Cluster(NamedTuple):
    p: float
    C: np.ndarray
    target_mean: np.ndarray
    mean: np.ndarray
    bound: float  # sqrt(tr Sigma'_z) sqrt(tr Sigma_z)


def by_cluster(target_g: Tensor, g: Tensor, r: Tensor) -> list[Cluster]:
    """Every cluster that has rows, written out in float64."""
    x, y = np.asarray(target_g.double()), np.asarray(g.double())
    found = []
    for share in np.asarray(r.double()).T:
        if share.sum() == 0:
            continue
        w = share / share.sum()
        mean_x, mean_y = w @ x, w @ y
        c = sum(w[i] * np.outer(x[i] - mean_x, y[i] - mean_y) for i in range(len(w)))
        spreads = [np.sqrt(w @ ((values - mean) ** 2).sum(axis=1)) for values, mean in ((x, mean_x), (y, mean_y))]
        found.append(Cluster(share.mean(), c, mean_x, mean_y, spreads[0] * spreads[1]))
    return found


@given(pair=gradients(), data=st.data())
def test_theorem_2_the_cross_covariance_is_that_within_and_that_between(
    pair: tuple[Tensor, Tensor], data: st.DataObject
) -> None:
    target_g, g = pair
    r = data.draw(shares(g))
    total, within, between = (part.double() for part in decompose_cross_covariance(target_g, g, r))
    rounding = rounding_of(target_g, g)
    torch.testing.assert_close(within + between, total, rtol=0, atol=rounding)

    x, y = np.asarray(target_g.double()), np.asarray(g.double())
    clusters = by_cluster(target_g, g, r)
    expected_within = sum(z.p * z.C for z in clusters)
    expected_between = sum(z.p * np.outer(z.target_mean - x.mean(axis=0), z.mean - y.mean(axis=0)) for z in clusters)
    expected_total = (x - x.mean(axis=0)).T @ (y - y.mean(axis=0)) / len(x)
    for found, expected in ((total, expected_total), (within, expected_within), (between, expected_between)):
        np.testing.assert_allclose(found, expected, rtol=0, atol=rounding)


@given(pair=gradients(), data=st.data())
def test_the_decomposition_depends_on_the_order_of_neither_rows_nor_clusters(
    pair: tuple[Tensor, Tensor], data: st.DataObject
) -> None:
    target_g, g = pair
    r = data.draw(shares(g))
    generator = torch.Generator().manual_seed(data.draw(seeds))
    rows, clusters = (torch.randperm(length, generator=generator) for length in r.shape)
    expected = decompose_cross_covariance(target_g, g, r)
    found = decompose_cross_covariance(target_g[rows], g[rows], r[rows][:, clusters])
    torch.testing.assert_close(found, expected, rtol=0, atol=rounding_of(target_g, g))


@given(pair=gradients(), data=st.data())
def test_eq_10_bounds_what_is_within_by_the_traces_of_the_clusters(
    pair: tuple[Tensor, Tensor], data: st.DataObject
) -> None:
    target_g, g = pair
    r = data.draw(shares(g))
    _, within, _ = decompose_cross_covariance(target_g, g, r)
    norm = float(torch.linalg.matrix_norm(within.double(), ord=2))
    rounding = g.shape[1] * rounding_of(target_g, g)
    assert norm <= sum(z.p * z.bound for z in by_cluster(target_g, g, r)) + rounding

    w_target, w = (nn.functional.normalize(normal(data.draw(seeds), 20, g.shape[1]), dim=1) for _ in range(2))
    assert float((w_target @ within.double() @ w.T).abs().max()) <= norm + rounding


@given(pair=gradients(), data=st.data())
def test_eq_10_bounds_the_cross_covariance_of_every_single_cluster_batch(
    pair: tuple[Tensor, Tensor], data: st.DataObject
) -> None:
    target_g, g = pair
    sampler = SingleClusterSampler(generator=torch.Generator().manual_seed(data.draw(seeds)))
    sampler.extend(len(g))
    sampler.assign(data.draw(shares(g)))
    rows, _ = sampler.sample(data.draw(st.integers(2, 60)))
    c = cross_covariance(target_g[rows], g[rows]).double()
    norm = float(torch.linalg.matrix_norm(c, ord=2))
    traces = [float(x[rows].double().var(dim=0).sum()) for x in pair]
    rounding = g.shape[1] * rounding_of(target_g, g)
    assert norm <= np.sqrt(traces[0]) * np.sqrt(traces[1]) + rounding

    w_target, w = (nn.functional.normalize(normal(data.draw(seeds), 20, g.shape[1]), dim=1) for _ in range(2))
    assert float((w_target @ c @ w.T).abs().max()) <= norm + rounding
