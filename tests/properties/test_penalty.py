"""The penalty on the cross-covariance: never negative, blind to order and shifts, of the right degree in its units."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from c4buffer import CovariancePenalty, Critics, Transitions, covariance_penalty, cross_covariance

SCALES: tuple[Any, ...] = ("raw", "relative", "correlation")
seeds = st.integers(0, 2**31)
betas = st.sampled_from([0.0, 1.0]) | st.floats(0, 10)
factors = st.floats(-3, 3).map(lambda exponent: 10.0**exponent)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """g' and g, [B, D] in float64, correlated or not."""
    rows, dimensions = draw(st.integers(2, 40)), draw(st.integers(1, 8))
    g = normal(draw(seeds), rows, dimensions)
    mixing = normal(draw(seeds), dimensions, dimensions)
    return normal(draw(seeds), rows, dimensions) + draw(st.sampled_from([0.0, 1.0, 10.0])) * g @ mixing, g


def size_of(target_g: Tensor, g: Tensor, beta: float) -> float:
    """What the penalty is at most, by Cauchy and Schwarz."""
    return float((1 + beta) * target_g.var(dim=0).sum() * g.var(dim=0).sum())


def written_out(target_g: Tensor, g: Tensor, beta: float) -> Tensor:
    """sum_kl C_kl^2 + beta (sum_k C_kk)^2 by pairs of rows: C = sum_ij (g'_i - g'_j) (g_i - g_j)^T / (2 B (B - 1))."""
    rows = len(g)
    between_rows = [x.unsqueeze(0) - x.unsqueeze(1) for x in (target_g, g)]
    c = torch.einsum("ijk,ijl->kl", *between_rows) / (2 * rows * (rows - 1))
    return (c * c).sum() + beta * torch.einsum("kk->", c) ** 2


@given(pair=pairs(), beta=betas)
def test_it_is_the_formula_and_never_negative_nor_beyond_its_bound(pair: tuple[Tensor, Tensor], beta: float) -> None:
    penalty, size = covariance_penalty(*pair, trace_weight=beta), size_of(*pair, beta)
    assert 0 <= float(penalty) <= size * (1 + 1e-12)
    torch.testing.assert_close(penalty, written_out(*pair, beta), rtol=0, atol=1e-12 * size)


@given(pair=pairs(), beta=betas)
def test_its_gradient_is_that_of_the_formula_and_that_by_hand(pair: tuple[Tensor, Tensor], beta: float) -> None:
    target_g, g = pair[0], pair[1].clone().requires_grad_()
    gradient = torch.autograd.grad(covariance_penalty(target_g, g, trace_weight=beta), g)[0]
    expected = torch.autograd.grad(written_out(target_g, g, beta), g)[0]
    atol = 1e-12 * (1 + beta) * float(target_g.var(dim=0).sum() * g.detach().var(dim=0).sum().sqrt())
    torch.testing.assert_close(gradient, expected, rtol=0, atol=atol)

    # dP/dg = 2 / (B - 1) (g' - mean g') (C + beta tr C I)
    c = cross_covariance(target_g, g.detach())
    slope = c + beta * c.trace() * torch.eye(len(c), dtype=torch.float64)
    by_hand = 2 / (len(g) - 1) * (target_g - target_g.mean(dim=0)) @ slope
    torch.testing.assert_close(gradient, by_hand, rtol=0, atol=atol)
    torch.testing.assert_close(gradient.sum(dim=0), torch.zeros_like(gradient[0]), rtol=0, atol=len(g) * atol)


@given(pair=pairs(), beta=betas, order=seeds, shift=st.sampled_from([1.0, 100.0, 1e4]), seed=seeds)
def test_neither_the_order_of_rows_nor_a_shift_matters(
    pair: tuple[Tensor, Tensor], beta: float, order: int, shift: float, seed: int
) -> None:
    target_g, g = pair
    expected, size = covariance_penalty(target_g, g, trace_weight=beta), size_of(*pair, beta)
    rows = torch.randperm(len(g), generator=torch.Generator().manual_seed(order))
    shuffled = covariance_penalty(target_g[rows], g[rows], trace_weight=beta)
    torch.testing.assert_close(shuffled, expected, rtol=0, atol=1e-12 * size)

    shifts = shift * normal(seed, 2, g.shape[1])
    moved = covariance_penalty(target_g + shifts[0], g + shifts[1], trace_weight=beta)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-12 * (1 + shift) ** 2 * size + 1e-20)


@given(pair=pairs(), beta=betas, factor=factors, target_factor=factors, signs=st.sampled_from([-1, 1]), seed=seeds)
def test_it_grows_with_the_fourth_power_and_turns_with_the_axes(
    pair: tuple[Tensor, Tensor], beta: float, factor: float, target_factor: float, signs: int, seed: int
) -> None:
    target_g, g = pair
    expected, size = covariance_penalty(target_g, g, trace_weight=beta), size_of(*pair, beta)

    def assert_close(found: Tensor, times: float) -> None:
        torch.testing.assert_close(found / times, expected, rtol=0, atol=1e-12 * size)

    assert_close(covariance_penalty(factor * target_g, factor * g, trace_weight=beta), factor**4)
    assert_close(
        covariance_penalty(target_factor * target_g, signs * factor * g, trace_weight=beta),
        (target_factor * factor) ** 2,
    )
    assert_close(covariance_penalty(g, target_g, trace_weight=beta), 1)
    rotation = torch.linalg.qr(normal(seed, g.shape[1], g.shape[1])).Q
    assert_close(covariance_penalty(target_g @ rotation, g @ rotation, trace_weight=beta), 1)


# As a term of the loss


class Quadratic(nn.Module):
    """Q(x) = factor (x^T M x + b^T x)."""

    def __init__(self, dimensions: int, seed: int) -> None:
        super().__init__()
        self.M = nn.Parameter(normal(seed, dimensions, dimensions))
        self.b = nn.Parameter(normal(seed + 1, dimensions))
        self.factor = 1.0

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        x = torch.cat([observations, actions], dim=1)
        return self.factor * (((x @ self.M) * x).sum(dim=1) + x @ self.b)

    def features(self, observations: Tensor, actions: Tensor) -> Tensor:
        return self.factor * torch.cat([observations, actions], dim=1) @ self.M


@st.composite
def losses(draw: st.DrawFn) -> tuple[list[Quadratic], list[Quadratic], Transitions]:
    """Critics, their targets and a batch, in float64."""
    rows, observation_dim, action_dim = draw(st.integers(2, 30)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    members, seed, width = draw(st.integers(1, 3)), draw(seeds), observation_dim + action_dim
    batch = Transitions(
        observations=normal(seed, rows, observation_dim),
        actions=normal(seed + 1, rows, action_dim),
        rewards=torch.zeros(rows, dtype=torch.float64),
        next_observations=normal(seed + 2, rows, observation_dim),
        terminals=torch.arange(rows) % draw(st.integers(2, 6)) == 1,
        next_actions=normal(seed + 3, rows, action_dim),
    )
    critics, targets = ([Quadratic(width, seed + 10 * i + first) for i in range(members)] for first in (4, 6))
    return critics, targets, batch


def gradients_of(value: Tensor, members: list[Quadratic]) -> list[Tensor]:
    parameters = [parameter for member in members for parameter in member.parameters()]
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return [torch.zeros_like(p) if gradient is None else gradient for p, gradient in zip(parameters, found)]


@pytest.mark.parametrize("scale", SCALES)
@given(loss=losses(), beta=betas, order=seeds)
def test_the_term_is_never_negative_and_blind_to_the_order_of_transitions(
    scale: Any, loss: tuple[list[Quadratic], list[Quadratic], Transitions], beta: float, order: int
) -> None:
    critics, targets, batch = loss
    penalty = CovariancePenalty(1.0, trace_weight=beta, scale=scale)
    expected = penalty(Critics(critics, targets), batch)
    assert expected.item() >= 0
    rows = torch.randperm(len(batch), generator=torch.Generator().manual_seed(order))
    found = penalty(Critics(critics, targets), batch[rows])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(gradients_of(found, critics), gradients_of(expected, critics), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("scale", SCALES)
@given(loss=losses(), beta=betas, weight=st.floats(0, 10))
def test_the_term_is_the_sum_over_members_of_the_penalty_in_its_units(
    scale: Any, loss: tuple[list[Quadratic], list[Quadratic], Transitions], beta: float, weight: float
) -> None:
    critics, targets, batch = loss
    expected = torch.zeros((), dtype=torch.float64)
    for critic, target in zip(critics, targets):
        x, next_x = (
            torch.cat(pair, dim=1)
            for pair in ((batch.observations, batch.actions), (batch.next_observations, batch.next_actions))
        )
        g = x @ (critic.M + critic.M.T) + critic.b
        target_g = (next_x @ (target.M + target.M.T) + target.b).detach() * (1 - batch.terminals).unsqueeze(1)
        term = written_out(target_g, g, beta)
        if scale != "raw":
            trace = g.var(dim=0).sum()
            next_q = target(batch.next_observations, batch.next_actions).detach()
            term = (
                term / target_g.var(dim=0).sum() / (trace if scale == "correlation" else trace.detach()) * next_q.var()
            )
            assert term.item() <= (1 + beta) * next_q.var().item() * (1 + 1e-9), "Eq. 10"
        expected = expected + weight * term
    found = CovariancePenalty(weight, trace_weight=beta, scale=scale)(Critics(critics, targets), batch)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradients_of(found, critics), gradients_of(expected, critics), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("scale", SCALES)
@given(loss=losses(), beta=betas, factor=factors, target_factor=factors)
def test_the_term_scales_with_critic_and_target_as_it_should(
    scale: Any,
    loss: tuple[list[Quadratic], list[Quadratic], Transitions],
    beta: float,
    factor: float,
    target_factor: float,
) -> None:
    critics, targets, batch = loss
    penalty = CovariancePenalty(1.0, trace_weight=beta, scale=scale)
    expected = penalty(Critics(critics, targets), batch)
    for members, times in ((critics, factor), (targets, target_factor)):
        for member in members:
            member.factor = times
    found = penalty(Critics(critics, targets), batch)
    # Raw is in units of g'^2 g^2; the others in those of Q_target^2, whatever the size of the critic.
    times = target_factor**2 * (factor**2 if scale == "raw" else 1)
    torch.testing.assert_close(found / times, expected, rtol=1e-9, atol=1e-15)


@given(loss=losses(), weight=st.floats(0, 10), factor=factors)
def test_the_feature_term_is_the_mean_inner_product_and_linear_in_both(
    loss: tuple[list[Quadratic], list[Quadratic], Transitions], weight: float, factor: float
) -> None:
    critics, targets, batch = loss
    expected = torch.zeros((), dtype=torch.float64)
    for critic, target in zip(critics, targets):
        f = critic.features(batch.observations, batch.actions)
        target_f = target.features(batch.next_observations, batch.next_actions).detach()
        expected = expected + weight * torch.einsum("bf,bf->", f, target_f) / len(batch)
    penalty = CovariancePenalty(weight, kind="feature")
    found = penalty(Critics(critics, targets), batch)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    for member in critics:
        member.factor = factor
    torch.testing.assert_close(penalty(Critics(critics, targets), batch) / factor, expected, rtol=1e-9, atol=1e-11)
