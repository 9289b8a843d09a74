"""ACTIVE's value losses, target and advantage: each equation against an independent computation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import expectile, norm
from torch import Tensor, nn

from c4buffer import VEnsemble, VEnsembleAdvantage, cloning_policy_loss, expectile_value_loss, sparse_value_loss
from c4buffer.losses import value_ensemble
from c4buffer.losses.value_ensemble import ensemble_quantile

Q, V = torch.zeros(3), torch.zeros(2, 3)
some_examples = settings(max_examples=30, deadline=None, derandomize=True, database=None)


def values(rows: int, members: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, generator=generator, dtype=torch.float64),
        torch.randn(members, rows, generator=generator, dtype=torch.float64),
    )


def test_expectile_loss_by_hand() -> None:
    q = torch.tensor([1.0, 2.0])
    v = torch.tensor([[0.0, 4.0], [1.0, 1.0]])
    # u = [[1, -2], [0, 1]], weights [[0.9, 0.1], [0.9, 0.9]]
    assert expectile_value_loss(q, v, tau=0.9).item() == pytest.approx((0.9 * 1 + 0.1 * 4 + 0 + 0.9) / 4)


def test_sparse_loss_by_hand() -> None:
    q, v = torch.tensor([1.0, -5.0]), torch.tensor([[3.0, 0.0]])
    # y = (q - v) / (2 * 0.5) + 1 = [-1, -4]: only v / alpha is left
    assert sparse_value_loss(q, v, alpha=0.5).item() == pytest.approx((6 + 0) / 2)
    # y = (1 - 0.5) / 4 + 1 = 1.125
    one = sparse_value_loss(torch.tensor([1.0]), torch.tensor([[0.5]]), alpha=2.0).item()
    assert one == pytest.approx(1.125**2 + 0.25)


@some_examples
@given(tau=st.floats(0.05, 0.95), seed=st.integers(0, 1000))
def test_the_expectile_losss_minimiser_is_the_expectile(tau: float, seed: int) -> None:
    q = np.random.default_rng(seed).normal(size=40)

    def loss(v: float) -> float:
        return expectile_value_loss(torch.tensor(q), torch.full((1, 40), v, dtype=torch.float64), tau=tau).item()

    found = minimize_scalar(loss, bounds=(q.min(), q.max()), method="bounded", options={"xatol": 1e-10}).x
    assert found == pytest.approx(expectile(q, alpha=tau), abs=1e-6)


@some_examples
@given(alpha=st.floats(0.1, 5.0), seed=st.integers(0, 1000))
def test_the_sparse_losss_minimiser_makes_the_weights_sum_to_one(alpha: float, seed: int) -> None:
    q = np.random.default_rng(seed).normal(size=40)

    def loss(v: float) -> float:
        return sparse_value_loss(torch.tensor(q), torch.full((1, 40), v, dtype=torch.float64), alpha=alpha).item()

    found = minimize_scalar(
        loss, bounds=(q.min() - 3 * alpha, q.max() + 3 * alpha), method="bounded", options={"xatol": 1e-10}
    ).x
    # SQL: at the optimum E[max(0, 1 + (Q - V) / (2 alpha))] = 1, the density ratio of the implicit policy
    assert np.maximum(0, 1 + (q - found) / (2 * alpha)).mean() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    "loss", [lambda q, v: expectile_value_loss(q, v, tau=0.8), lambda q, v: sparse_value_loss(q, v, alpha=0.7)]
)
def test_every_member_fits_the_same_detached_values_and_the_mean_is_taken(loss: Any) -> None:
    q, v = values(30, 5)
    q.requires_grad_(), v.requires_grad_()
    by_v = torch.autograd.grad(loss(q, v), v)[0]
    alone = [torch.autograd.grad(loss(q, v[i : i + 1]), v)[0][i] for i in range(5)]
    torch.testing.assert_close(by_v, torch.stack(alone) / 5)
    assert torch.autograd.grad(loss(q, v), q, allow_unused=True)[0] is None
    assert torch.autograd.gradcheck(lambda v: loss(q.detach(), v), v)


def test_the_target_is_the_least_member_with_terminals_and_intervals() -> None:
    v_next = torch.tensor([[4.0, 1.0, 7.0], [2.0, 5.0, 9.0]], requires_grad=True)
    target = VEnsembleAdvantage(quantile=0.5).target(v_next)
    assert not target.requires_grad
    rewards, terminals, intervals = (
        torch.tensor([1.0, 1.0, 1.0]),
        torch.tensor([0.0, 1.0, 0.0]),
        torch.tensor([1, 1, 3]),
    )
    y = rewards + 0.5**intervals * (1 - terminals) * target
    assert y.tolist() == [2.0, 1.0, 1 + 7 / 8]


@pytest.mark.parametrize("members", [1, 2, 3, 4, 7, 20])
@pytest.mark.parametrize("c", [0.0, 0.1, 0.25, 0.5, 0.77, 1.0])
def test_the_advantage_subtracts_numpys_quantile(c: float, members: int) -> None:
    q, v = values(50, members)
    advantage = VEnsembleAdvantage(quantile=c).advantage(q, v)
    np.testing.assert_allclose(advantage, q.numpy() - np.quantile(v.numpy(), c, axis=0), rtol=1e-12, atol=1e-12)


def test_the_advantage_keeps_the_graph_of_both() -> None:
    q, v = values(6, 3)
    q.requires_grad_(), v.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, v: VEnsembleAdvantage(quantile=0.3).advantage(q, v), (q, v))


def test_weights_are_exponential_clipped_and_detached() -> None:
    q, v = torch.tensor([1.0, 2.0, 9.0, 1e4], requires_grad=True), torch.zeros(1, 4, requires_grad=True)
    advantage = VEnsembleAdvantage(quantile=0.5, temperature=0.5, max_weight=60.0)
    weights = advantage.weights(q, v)
    assert not weights.requires_grad
    torch.testing.assert_close(weights, torch.tensor([math.e**2, math.e**4, 60.0, 60.0]))
    assert advantage.weights(-q, v).min() == 0


@pytest.mark.parametrize("members", range(2, 21))
def test_the_expected_minimum_is_about_that_of_normal_members(members: int) -> None:
    generator = torch.Generator().manual_seed(members)
    v = 3 + 2 * torch.randn(members, 400_000, generator=generator, dtype=torch.float64)
    least = float(v.amin(dim=0).mean())
    distance = norm.ppf((members - math.pi / 8) / (members - math.pi / 4 + 1))
    assert 3 - 2 * distance == pytest.approx(least, abs=0.07 * (3 - least))
    # of the members' own mean and spread, whose expectation is sigma less a little for few members
    advantage = VEnsembleAdvantage(quantile=0.5)
    mean, spread = v.mean(dim=0), v.std(dim=0)
    torch.testing.assert_close(advantage.expected_minimum(v), mean - distance * spread)
    torch.testing.assert_close(advantage.uncertainty(v), spread)


def test_a_member_that_is_no_number_is_not_passed_over() -> None:
    v = torch.tensor([[1.0, 1.0], [2.0, math.nan], [3.0, 0.0]])
    advantage = VEnsembleAdvantage(quantile=0.5)
    q = torch.zeros(2)
    for found in (advantage.target(v), advantage.advantage(q, v), advantage.weights(q, v), advantage.uncertainty(v)):
        assert found.isnan().tolist() == [False, True]


def test_what_is_read_off_the_ensemble_compiles_without_a_break() -> None:
    advantage = VEnsembleAdvantage(quantile=0.3)
    q, v = torch.randn(5), torch.randn(4, 5)
    for read, values in [
        (advantage.target, (v,)),
        (advantage.weights, (q, v)),
        (advantage.uncertainty, (v,)),
        (advantage.expected_minimum, (v,)),
    ]:
        compiled = torch.compile(read, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(*values), read(*values))


def test_one_member_has_no_spread_and_is_its_own_minimum() -> None:
    v = torch.tensor([[1.0, -2.0]], requires_grad=True)
    advantage = VEnsembleAdvantage(quantile=0.9)
    assert advantage.uncertainty(v).tolist() == [0, 0]
    torch.testing.assert_close(advantage.expected_minimum(v), v[0].detach())
    assert advantage.advantage(torch.zeros(2), v).tolist() == [-1, 2]
    assert not advantage.uncertainty(v).requires_grad
    assert not advantage.expected_minimum(v).requires_grad


def test_the_policy_loss_by_hand_and_where_its_gradients_stop() -> None:
    q = torch.tensor([1.0, 3.0], requires_grad=True)
    log_prob = torch.tensor([-1.0, -2.0], requires_grad=True)
    weights = torch.tensor([2.0, 0.5], requires_grad=True)
    beta = torch.tensor(0.5, requires_grad=True)
    assert cloning_policy_loss(q, log_prob, weights, beta.reshape(1)).shape == ()
    loss = cloning_policy_loss(q, log_prob, weights, beta)
    assert loss.item() == pytest.approx(-2 - 0.5 * (-2 - 1) / 2)
    loss.backward()
    assert q.grad is not None
    assert q.grad.tolist() == [-0.5, -0.5]
    assert log_prob.grad is not None
    assert log_prob.grad.tolist() == [-0.5, -0.125]
    assert weights.grad is None
    assert beta.grad is None


def test_with_one_member_they_are_the_losses_of_iql() -> None:
    q, v = values(64, 1)
    v.requires_grad_()
    diff = q - v[0]
    weight = (0.7 - (diff < 0.0).to(diff)).abs().detach()
    torch.testing.assert_close(expectile_value_loss(q, v, tau=0.7), (weight * diff**2).mean())
    weights = VEnsembleAdvantage(quantile=0.5, temperature=1 / 3).weights(q, v)
    torch.testing.assert_close(weights, (3 * diff).exp().clamp(max=100.0).detach())


class Loop(nn.Module):
    """The ensemble as m separate networks of torch's own layers, with the weights of `ensemble`."""

    def __init__(self, ensemble: VEnsemble) -> None:
        super().__init__()
        self.members = nn.ModuleList()
        for i in range(ensemble.n_members):
            layers: list[nn.Module] = []
            for place, (weight, bias) in enumerate(zip(ensemble.weights, ensemble.biases)):
                linear = nn.Linear(weight.shape[1], weight.shape[2], dtype=weight.dtype)
                linear.weight.data.copy_(weight[i].T)
                linear.bias.data.copy_(bias[i, 0])
                layers.append(linear)
                if place < len(ensemble.weights) - 1:
                    if len(ensemble.scales):
                        norm = nn.LayerNorm(linear.out_features, dtype=weight.dtype)
                        norm.weight.data.copy_(ensemble.scales[place][i, 0])
                        norm.bias.data.copy_(ensemble.shifts[place][i, 0])
                        layers.append(norm)
                    layers.append(nn.ReLU())
            self.members.append(nn.Sequential(*layers))

    def forward(self, observations: Tensor) -> Tensor:
        return torch.stack([member(observations).squeeze(1) for member in self.members])


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("hidden", [(8,), (16, 16), (64, 32, 16)])
def test_the_ensemble_equals_separate_networks(hidden: tuple[int, ...], layer_norm: bool) -> None:
    torch.manual_seed(0)
    ensemble = VEnsemble(5, n_members=3, hidden=hidden, layer_norm=layer_norm).double()
    for parameter in ensemble.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    loop = Loop(ensemble)
    observations = torch.randn(20, 5, dtype=torch.float64)
    torch.testing.assert_close(ensemble(observations), loop(observations))
    ensemble(observations).square().sum().backward()
    loop(observations).square().sum().backward()
    for i, member in enumerate(loop.members):
        linears = [layer for layer in member if isinstance(layer, nn.Linear)]
        for weight, bias, linear in zip(ensemble.weights, ensemble.biases, linears):
            torch.testing.assert_close(weight.grad[i], linear.weight.grad.T)
            torch.testing.assert_close(bias.grad[i, 0], linear.bias.grad)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_all_members_at_once_are_what_they_are_one_by_one(layer_norm: bool) -> None:
    torch.manual_seed(0)
    ensemble = VEnsemble(5, n_members=3, hidden=(16, 8), layer_norm=layer_norm).double()
    observations = torch.randn(20, 5, dtype=torch.float64)
    kinds = (ensemble.weights, ensemble.biases, ensemble.scales, ensemble.shifts)
    together = value_ensemble._perceptron(observations.expand(3, 20, 5), *map(list, kinds))
    torch.testing.assert_close(together, ensemble(observations))


def test_widths_may_come_one_by_one() -> None:
    ensemble = VEnsemble(3, n_members=2, hidden=map(int, ("8", "6")), layer_norm=True)
    assert [list(weight.shape) for weight in ensemble.weights] == [[2, 3, 8], [2, 8, 6], [2, 6, 1]]
    assert [scale.shape[-1] for scale in ensemble.scales] == [8, 6]


def test_members_start_apart_and_as_torchs_layers_do() -> None:
    torch.manual_seed(0)
    ensemble = VEnsemble(10, n_members=3)
    observations = torch.randn(500, 10)
    v = ensemble(observations).detach()
    assert v.shape == (3, 500)
    correlations = torch.corrcoef(v)[torch.triu_indices(3, 3, offset=1).unbind()]
    assert correlations.abs().max() < 0.9
    for weight in ensemble.weights:
        bound = 1 / math.sqrt(weight.shape[1])
        assert weight.detach().abs().max() <= bound
        assert float(weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.2)
    loaded = VEnsemble(10, n_members=3)
    loaded.load_state_dict(ensemble.state_dict())
    assert torch.equal(loaded(observations), v)


def test_a_compiled_ensemble_is_the_same() -> None:
    ensemble = VEnsemble(4, n_members=2)
    observations = torch.randn(9, 4)
    compiled = torch.compile(ensemble, backend="aot_eager")
    torch.testing.assert_close(compiled(observations), ensemble(observations))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: expectile_value_loss(Q, V, tau=0.0),
            "tau: expected a finite number above 0",
        ),
        (
            lambda: expectile_value_loss(Q, V, tau=1.0),
            "tau: expected a number above 0 and below 1",
        ),
        (lambda: expectile_value_loss(Q, Q, tau=0.5), r"v: expected \[m, B\] .*, got \[3\]"),
        (
            lambda: expectile_value_loss(Q[:, None], V, tau=0.5),
            r"q: expected \[B\] with B = 3.*, got \[3, 1\]",
        ),
        (
            lambda: sparse_value_loss(Q, V, alpha=0.0),
            "alpha: expected a finite number above 0",
        ),
        (lambda: VEnsembleAdvantage(quantile=1.1), "quantile: expected a number from 0 to 1, got 1.1"),
        (lambda: VEnsembleAdvantage(quantile=-0.1), "quantile: expected a finite number at least 0, got -0.1"),
        (
            lambda: VEnsembleAdvantage(quantile=0.5, temperature=0),
            "temperature: expected a finite number above 0, got 0",
        ),
        (lambda: VEnsembleAdvantage(quantile=0.5, max_weight=math.inf), "max_weight: expected a finite number"),
        (lambda: VEnsembleAdvantage(quantile=0.5).target(torch.zeros(4)), r"v: expected \[m, B\]"),
        (lambda: ensemble_quantile(torch.zeros(0, 4), quantile=0.5), r"v: expected \[m, B\] with at least one member"),
        (lambda: VEnsemble(3, n_members=0), "n_members: expected an integer of at least 1, got 0"),
        (lambda: VEnsemble(0, n_members=1), "observation_dim: expected an integer of at least 1, got 0"),
        (lambda: VEnsemble(3, n_members=1, hidden=()), "hidden: expected at least one width"),
        (lambda: VEnsemble(3, n_members=1, hidden=256), r"hidden: expected widths, as \(256, 256\), got 256"),
        (lambda: VEnsemble(3, n_members=1, hidden=(8, 0)), "hidden: expected an integer of at least 1, got 0"),
        (lambda: VEnsemble(3, n_members=1)(torch.zeros(5, 4)), r"observations: expected \[B, 3\], got \[5, 4\]"),
        (
            lambda: cloning_policy_loss(torch.zeros(3), torch.zeros(3, 1), torch.zeros(3), 1.0),
            r"q, log_prob and weights: expected one shape \[B\], got \[3\], \[3, 1\], \[3\]",
        ),
        (lambda: cloning_policy_loss(*torch.zeros(3, 4), torch.ones(4)), r"beta: expected one number, got \[4\]"),
    ],
)
def test_wrong_input_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


ADVANTAGE = VEnsembleAdvantage(quantile=0.5)


def test_biases_start_as_torchs_do_and_layer_norms_as_no_change() -> None:
    torch.manual_seed(0)
    ensemble = VEnsemble(10, n_members=3, layer_norm=True)
    for weight, bias in zip(ensemble.weights, ensemble.biases):
        bound = 1 / math.sqrt(weight.shape[1])
        assert 0 < bias.detach().abs().max() <= bound
        if bias.numel() > 100:
            assert float(bias.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.2)
    assert all(bool((scale == 1).all()) for scale in ensemble.scales)
    assert all(bool((shift == 0).all()) for shift in ensemble.shifts)


@pytest.mark.parametrize(
    "ask", [lambda q, v: sparse_value_loss(q, v, alpha=1.0), ADVANTAGE.advantage, ADVANTAGE.weights]
)
def test_a_column_of_values_is_refused_and_not_broadcast(ask: Any) -> None:
    with pytest.raises(ValueError, match=r"^q: expected \[B\] with B = 3, as v has it, got \[3, 1\]$"):
        ask(torch.zeros(3, 1), torch.zeros(2, 3))


@pytest.mark.parametrize("ask", [ADVANTAGE.uncertainty, ADVANTAGE.expected_minimum, ADVANTAGE.target])
def test_one_vector_is_no_ensemble(ask: Any) -> None:
    with pytest.raises(ValueError, match=r"^v: expected \[m, B\] with at least one member, got \[4\]$"):
        ask(torch.zeros(4))


def test_columns_in_the_policy_loss_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^q, log_prob and weights: expected one shape \[B\], got \[3, 1\]"):
        cloning_policy_loss(*torch.zeros(3, 3, 1), 1.0)


def test_weights_clipped_to_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="^max_weight: expected a finite number above 0, got 0"):
        VEnsembleAdvantage(quantile=0.5, max_weight=0)
