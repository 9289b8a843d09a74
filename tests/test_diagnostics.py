"""Diagnostics: hand values, sums written out, autograd of the losses themselves, and critics left as they were."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from c4buffer import ClusteredReplayBuffer, Critics, Diagnosis, Transitions, VEnsemble, diagnose, stacked_gradients

from .conftest import MakeCritic, MakeTransitions

GAMMA = 0.9


@pytest.fixture
def batch(make_transitions: MakeTransitions) -> Transitions:
    """40 float64 transitions, every fifth terminal."""
    return make_transitions(40, dtype=torch.float64)


@pytest.fixture
def critics(make_critic: MakeCritic) -> Critics:
    """Twins and their targets, all different."""
    q, target = ([make_critic(seed=seed, dtype=torch.float64) for seed in seeds] for seeds in ((0, 1), (2, 3)))
    return Critics(q, target)


def some_responsibilities(rows: int, clusters: int = 3, seed: int = 0) -> Tensor:
    logits = 2 * torch.randn(rows, clusters, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return logits.softmax(dim=1)


def gradients_of(critics: Critics, batch: Transitions) -> tuple[np.ndarray, np.ndarray]:
    target_g, g = stacked_gradients(critics, batch).chunk(2, dim=1)
    return target_g.numpy(), g.numpy()


def covariance(x: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Row by row, with divisor N or the weights of the rows."""
    weights = np.full(len(x), 1 / len(x)) if weights is None else weights / weights.sum()
    x_mean, y_mean = weights @ x, weights @ y
    return sum(w * np.outer(a - x_mean, b - y_mean) for w, a, b in zip(weights, x, y))


# Theorem 1


def test_a_critic_with_known_gradients_by_hand() -> None:
    # Q(s, a) = s^2 / 2 and Q_target(s, a) = a^2 / 2: g = (s, 0), g' = (0, a'), terminals mask g'
    batch = Transitions(
        observations=[[1.0], [3.0]],
        actions=[[0.0], [0.0]],
        rewards=[1.0, 2.0],
        next_observations=[[0.0], [0.0]],
        terminals=[0, 1],
        next_actions=[[4.0], [7.0]],
    )
    critics = Critics(lambda s, a: (s**2 / 2).squeeze(1), lambda s, a: (a**2 / 2).squeeze(1))
    found = diagnose(critics, batch, discount=0.5, shift=2.0, next_shift=3.0)
    # g = (1, 0), (3, 0): Sigma = diag(1, 0); g' = (0, 4), (0, 0): Sigma' = diag(0, 4); C_21 = Cov((4, 0), (1, 3)) = -2
    assert found.target_term == pytest.approx(0.25 * 9 * 4 / 2)
    assert found.critic_term == pytest.approx(4 * 1 / 2)
    assert found.cross_term == 0  # the trace of C
    assert found.shift_variance == pytest.approx(4.5 + 2)
    assert found.total == found.within == found.cluster_norm == found.cluster_bound == pytest.approx(2)
    assert found.between == 0
    assert found.correlation == pytest.approx(1)
    assert found.gradient_norm == pytest.approx(math.sqrt(5))
    assert found.target_gradient_norm == pytest.approx(math.sqrt(8))
    # delta = 1 + 0.5 * 8 - 0.5 and 2 - 4.5
    assert (found.td_mean, found.td_variance) == pytest.approx((1.0, 3.5**2))
    assert math.isnan(found.variance_cosine)  # nothing is trained
    assert math.isnan(found.value_spread)
    assert found.smallest_effective_size == found.largest_effective_size == 2


def test_with_directions_the_terms_are_those_of_the_shifted_residual(critics: Critics, batch: Transitions) -> None:
    torch.manual_seed(0)
    w, target_w = (nn.functional.normalize(torch.randn(5, dtype=torch.float64), dim=0) for _ in range(2))
    found = diagnose(critics, batch, discount=GAMMA, shift=0.3, next_shift=0.7, direction=w, next_direction=target_w)
    target_g, g = gradients_of(critics, batch)
    target_change, change = GAMMA * 0.7 * target_g @ target_w.numpy(), 0.3 * g @ w.numpy()
    assert found.target_term == pytest.approx(target_change.var(), rel=1e-12)
    assert found.critic_term == pytest.approx(change.var(), rel=1e-12)
    assert found.cross_term == pytest.approx(2 * np.cov(target_change, change, ddof=0)[0, 1], rel=1e-12)
    assert found.shift_variance == pytest.approx((target_change - change).var(), rel=1e-12)


def test_without_directions_the_terms_are_means_over_any_shared_orthonormal_basis(
    critics: Critics, batch: Transitions
) -> None:
    torch.manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    each = [diagnose(critics, batch, discount=GAMMA, direction=w, next_direction=w) for w in basis.T]
    found = diagnose(critics, batch, discount=GAMMA)
    for name in ("target_term", "critic_term", "cross_term", "shift_variance"):
        mean = sum(getattr(one, name) for one in each) / 5
        assert getattr(found, name) == pytest.approx(mean, rel=1e-12), name


def test_the_first_order_terms_are_what_a_small_shift_does_to_the_residual(
    critics: Critics, batch: Transitions
) -> None:
    step, w = 1e-6, torch.eye(5, dtype=torch.float64)[0]
    found = diagnose(critics, batch, discount=GAMMA, shift=step, next_shift=step, direction=w, next_direction=w)
    moved = batch.replace(
        observations=batch.observations + step * w[:3], next_observations=batch.next_observations + step * w[:3]
    )
    change = td_errors(critics, moved) - td_errors(critics, batch)
    assert found.shift_variance == pytest.approx(float(change.var(correction=0)), rel=1e-4)


def test_steps_of_several_rewards_are_discounted_as_often(critics: Critics, batch: Transitions) -> None:
    several = batch.replace(intervals=torch.arange(40) % 3 + 1)
    found = diagnose(critics, several, discount=GAMMA)
    target_g, g = gradients_of(critics, batch)
    discounted = (GAMMA ** several.intervals.numpy())[:, None] * target_g
    assert found.target_term == pytest.approx(np.trace(covariance(discounted, discounted)) / 5, rel=1e-12)
    assert found.cross_term == pytest.approx(2 * np.trace(covariance(discounted, g)) / 5, rel=1e-12)
    delta = td_errors(critics, several)
    assert (found.td_mean, found.td_variance) == pytest.approx((float(delta.mean()), float(delta.var(correction=0))))


# Theorem 2 and Eq. 10


def test_clusters_against_sums_written_out(critics: Critics, batch: Transitions) -> None:
    r = some_responsibilities(40)
    found = diagnose(critics, batch, responsibilities=r)
    target_g, g = gradients_of(critics, batch)
    p = r.numpy().mean(axis=0)
    inside = [covariance(target_g, g, weights) for weights in r.numpy().T]
    means = [(weights @ target_g / weights.sum(), weights @ g / weights.sum()) for weights in r.numpy().T]
    between = covariance(np.array([mean for mean, _ in means]), np.array([mean for _, mean in means]), p)
    assert found.total == pytest.approx(np.linalg.norm(covariance(target_g, g)), rel=1e-12)
    assert found.within == pytest.approx(np.linalg.norm(sum(share * c for share, c in zip(p, inside))), rel=1e-12)
    assert found.between == pytest.approx(np.linalg.norm(between), rel=1e-10)
    assert found.cluster_norm == pytest.approx(sum(s * np.linalg.norm(c, 2) for s, c in zip(p, inside)), rel=1e-12)
    assert found.cluster_cross == pytest.approx(sum(s * abs(np.trace(c)) / 5 for s, c in zip(p, inside)), rel=1e-12)
    traces = [
        math.sqrt(np.trace(covariance(target_g, target_g, weights)) * np.trace(covariance(g, g, weights)))
        for weights in r.numpy().T
    ]
    assert found.cluster_bound == pytest.approx(float(p @ traces), rel=1e-12)
    sizes = r.sum(dim=0) ** 2 / (r**2).sum(dim=0)
    assert found.smallest_effective_size == pytest.approx(float(sizes.min()))
    assert found.largest_effective_size == pytest.approx(float(sizes.max()))


@given(seed=st.integers(0, 2**31), rows=st.integers(2, 30), clusters=st.integers(1, 4), given_directions=st.booleans())
def test_the_bounds_hold_for_any_critic_any_clusters_and_any_directions(
    seed: int, rows: int, clusters: int, given_directions: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    batch = Transitions(
        observations=normal(rows, 2),
        actions=normal(rows, 1),
        rewards=normal(rows),
        next_observations=normal(rows, 2),
        terminals=normal(rows) > 0.5,
        next_actions=normal(rows, 1),
    )
    weights, target_weights = normal(3, 3), normal(3, 3)
    critics = Critics(
        lambda s, a: (torch.cat([s, a], 1) @ weights).tanh().sum(1),
        lambda s, a: (torch.cat([s, a], 1) @ target_weights).tanh().sum(1),
    )
    options: dict[str, Any] = {}
    if given_directions:
        options = {name: nn.functional.normalize(normal(3), dim=0) for name in ("direction", "next_direction")}
    r = some_responsibilities(rows, clusters, seed=seed)
    found = diagnose(critics, batch, responsibilities=r, **options)
    slack = 1 + 1e-9
    assert found.cluster_cross <= slack * found.cluster_norm + 1e-300
    assert found.cluster_norm <= slack * found.cluster_bound + 1e-300
    assert found.correlation <= slack
    assert abs(found.cross_term) <= slack * (found.target_term + found.critic_term)
    assert found.total <= slack * (found.within + found.between)


def test_an_empty_cluster_counts_for_nothing(critics: Critics, batch: Transitions) -> None:
    r = some_responsibilities(40)
    with_empty = torch.cat([r, torch.zeros(40, 1, dtype=torch.float64)], dim=1)
    one, other = (dataclasses.asdict(diagnose(critics, batch, responsibilities=each)) for each in (r, with_empty))
    assert other.pop("smallest_effective_size") == 0
    one.pop("smallest_effective_size")
    assert other == pytest.approx(one, rel=1e-12, nan_ok=True)


# Observation 1


def td_errors(critics: Critics, batch: Transitions, *, graph: bool = False) -> Tensor:
    """r + gamma^n (1 - d) mean Q_target(s', a') - mean Q(s, a), written out."""
    with torch.set_grad_enabled(graph):
        q = sum(member(batch.observations, batch.actions) for member in critics.critic).squeeze(1) / 2
    with torch.no_grad():
        ahead = sum(member(batch.next_observations, batch.next_actions) for member in critics.target).squeeze(1) / 2
    return batch.rewards + GAMMA**batch.intervals * (1 - batch.terminals) * ahead - q


def test_observation_1_against_autograd_of_the_three_losses(critics: Critics, batch: Transitions) -> None:
    found = diagnose(critics, batch, discount=GAMMA)
    delta = td_errors(critics, batch, graph=True)
    parameters = [p for member in critics.critic for p in member.parameters()]

    def gradient(loss: Tensor) -> Tensor:
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters, retain_graph=True)])

    second_moment, variance, squared_mean = map(
        gradient, ((delta**2).mean(), delta.var(correction=0), delta.mean() ** 2)
    )
    torch.testing.assert_close(second_moment, variance + squared_mean)
    cosine = nn.functional.cosine_similarity
    assert found.variance_cosine == pytest.approx(float(cosine(second_moment, variance, dim=0)), rel=1e-10)
    assert found.mean_cosine == pytest.approx(float(cosine(second_moment, squared_mean, dim=0)), rel=1e-10)


def test_frozen_critics_have_no_cosines(critics: Critics, batch: Transitions) -> None:
    for member in critics.critic:
        member.requires_grad_(False)
    found = diagnose(critics, batch)
    assert math.isnan(found.variance_cosine)
    assert math.isnan(found.mean_cosine)


# What it takes


def test_a_buffer_is_diagnosed_with_all_its_rows_and_its_clusters(critics: Critics, batch: Transitions) -> None:
    buffer = ClusteredReplayBuffer.from_transitions(batch, n_clusters=2, seed=0)
    before = diagnose(critics, buffer)
    assert dataclasses.asdict(before) == pytest.approx(dataclasses.asdict(diagnose(critics, batch)), nan_ok=True)
    report = buffer.refresh(critics)
    found = diagnose(critics, buffer)
    assert (found.total, found.within, found.between) == pytest.approx((report.total, report.within, report.between))
    by_hand = diagnose(critics, batch, responsibilities=buffer.responsibilities)
    assert dataclasses.asdict(found) == pytest.approx(dataclasses.asdict(by_hand), nan_ok=True)
    assert found.within < before.within


def test_chunks_change_nothing(
    critics: Critics, make_transitions: MakeTransitions, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_transitions(100, dtype=torch.float64)
    whole = diagnose(critics, batch)
    monkeypatch.setattr("c4buffer.diagnostics.rows_for", lambda critics, rows: 7)
    assert dataclasses.asdict(diagnose(critics, batch)) == pytest.approx(dataclasses.asdict(whole), nan_ok=True)


def test_gradients_wider_than_the_rows_are_taken_in_their_span(make_critic: MakeCritic) -> None:
    # 6 rows of 20 + 3 columns; 12 < 23
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    torch.manual_seed(0)
    batch = Transitions(
        observations=normal(6, 20),
        actions=normal(6, 3),
        rewards=normal(6),
        next_observations=normal(6, 20),
        terminals=torch.zeros(6),
    )
    critics = Critics(make_critic(23, dtype=torch.float64), make_critic(23, seed=1, dtype=torch.float64))
    w, target_w = (nn.functional.normalize(normal(23), dim=0) for _ in range(2))
    target_g, g = gradients_of(critics, batch)
    found = diagnose(critics, batch, discount=1.0)
    c = covariance(target_g, g)
    assert found.cross_term == pytest.approx(2 * np.trace(c) / 23, rel=1e-10)
    assert found.total == pytest.approx(np.linalg.norm(c), rel=1e-10)
    assert found.cluster_norm == pytest.approx(np.linalg.norm(c, 2), rel=1e-10)
    along = diagnose(critics, batch, discount=1.0, direction=w, next_direction=target_w)
    assert along.cross_term == pytest.approx(2 * float(target_w.numpy() @ c @ w.numpy()), rel=1e-10)


def test_discrete_actions_have_gradients_by_the_observations(
    make_transitions: MakeTransitions, make_critic: MakeCritic
) -> None:
    batch = make_transitions(20, dtype=torch.float64, discrete=True)
    critics = Critics(
        make_critic(3, outputs=2, dtype=torch.float64), make_critic(3, outputs=2, seed=1, dtype=torch.float64)
    )
    found = diagnose(critics, batch)
    target_g, g = gradients_of(critics, batch)
    assert g.shape == (20, 3)
    assert found.total == pytest.approx(np.linalg.norm(covariance(target_g, g)))
    assert -1 <= found.variance_cosine <= 1


def test_the_spread_of_a_v_ensemble_is_the_mean_over_rows(critics: Critics, make_transitions: MakeTransitions) -> None:
    batch = make_transitions(20)
    ensemble = VEnsemble(3, n_members=4, hidden=(8,))
    small = Critics([lambda s, a: s[:, 0] ** 2], [lambda s, a: s[:, 0] ** 2])
    found = diagnose(small, batch, value_ensemble=ensemble)
    spread = ensemble(batch.observations).detach().std(dim=0)
    assert found.value_spread == pytest.approx(float(spread.mean()))


def test_networks_gradients_modes_and_generators_stay_as_they_were(
    make_critic: MakeCritic, make_transitions: MakeTransitions
) -> None:
    critic = nn.Sequential(nn.Dropout(0.5), make_critic(3, outputs=1))
    target = nn.Sequential(nn.Dropout(0.5), make_critic(3, outputs=1, seed=1))
    critic[1].last.weight.grad = torch.ones_like(critic[1].last.weight)
    critic[0].train()
    target.eval()
    critics = Critics(lambda s, a: critic(s), lambda s, a: target(s))
    state = torch.get_rng_state()
    first, second = (dataclasses.asdict(diagnose(critics, make_transitions(30))) for _ in range(2))
    assert first == pytest.approx(second, rel=0, nan_ok=True)  # no dropout
    assert torch.equal(torch.get_rng_state(), state)
    assert critic.training
    assert not target.training
    assert torch.equal(critic[1].last.weight.grad, torch.ones_like(critic[1].last.weight))
    assert critic[1].first.weight.grad is None


def test_a_policy_that_draws_gives_the_same_each_time_and_moves_no_generator(
    critics: Critics, batch: Transitions
) -> None:
    drawn: list[Tensor] = []

    def policy(observations: Tensor) -> Tensor:
        drawn.append(observations[:, :2] + torch.randn(len(observations), 2, dtype=observations.dtype))
        return drawn[-1]

    noisy = Critics(critics.critic, critics.target, policy=policy)
    state = torch.get_rng_state()
    first, second = (dataclasses.asdict(diagnose(noisy, batch)) for _ in range(2))
    assert first == pytest.approx(second, rel=0, nan_ok=True)
    assert torch.equal(torch.get_rng_state(), state)
    of_all_rows = [actions for actions in drawn if len(actions) == len(batch)]  # of g' and of delta
    assert len(of_all_rows) == 4
    assert all(torch.equal(actions, of_all_rows[0]) for actions in of_all_rows)


def test_it_measures_the_same_in_inference_mode(critics: Critics, batch: Transitions) -> None:
    expected = dataclasses.asdict(diagnose(critics, batch))
    with torch.inference_mode():
        assert dataclasses.asdict(diagnose(critics, batch)) == pytest.approx(expected, nan_ok=True)
        assert not stacked_gradients(critics, batch).is_inference()


def test_every_field_is_a_float_that_a_logger_takes(critics: Critics, batch: Transitions) -> None:
    found = dataclasses.asdict(diagnose(critics, batch))
    assert all(type(value) is float for value in found.values())
    with pytest.raises(dataclasses.FrozenInstanceError):
        diagnose(critics, batch).total = 0.0  # type: ignore[misc]
    assert set(found) == {field.name for field in dataclasses.fields(Diagnosis)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"discount": 1.5}, r"discount: expected a number from 0 to 1, got 1.5"),
        ({"shift": -1.0}, r"shift: expected a finite number at least 0, got -1.0"),
        ({"next_shift": math.nan}, r"next_shift: expected a finite number at least 0, got nan"),
        ({"direction": torch.ones(5)}, r"next_direction: expected a unit vector \[5\].* got None"),
        ({"direction": torch.ones(5), "next_direction": torch.eye(5)[0]}, r"direction: .* got one of length 2.23607"),
        ({"direction": torch.ones(4), "next_direction": torch.eye(5)[0]}, r"direction: .* got \[4\]"),
        ({"direction": [1.0] + 4 * [0.0], "next_direction": torch.eye(5)[0]}, r"direction: .* got list"),
        ({"responsibilities": torch.ones(3, 1)}, r"responsibilities: expected"),
        ({"responsibilities": torch.ones(40, 2)}, r"responsibilities: expected"),
        (
            {"value_ensemble": lambda s: s[:, :2]},
            r"value_ensemble: expected values \[m, B\] with B = 40, got \[40, 2\]",
        ),
        ({"value_ensemble": lambda s: s[:, 0]}, r"value_ensemble: .* got \[40\]"),
        ({"value_ensemble": lambda s: [s]}, r"value_ensemble: .* got list"),
        ({"value_ensemble": lambda s: s.T / 0}, r"value_ensemble: expected finite values"),
    ],
)
def test_wrong_options_are_named(critics: Critics, batch: Transitions, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        diagnose(critics, batch, **options)


def test_wrong_data_and_critics_are_named(critics: Critics, batch: Transitions) -> None:
    with pytest.raises(ValueError, match=r"data: expected Transitions or a ClusteredReplayBuffer, got dict"):
        diagnose(critics, {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"data: expected at least two transitions, .* got 1"):
        diagnose(critics, batch[:1])
    with pytest.raises(ValueError, match=r"data: expected at least two transitions, .* got 0"):
        diagnose(critics, ClusteredReplayBuffer(5))
    with pytest.raises(ValueError, match=r"critics: expected a Critics record, got list"):
        diagnose([], batch)  # type: ignore[arg-type]


def test_critics_of_bare_parameters_beside_a_network_they_do_not_use_have_no_observation_1(batch: Transitions) -> None:
    weight = nn.Parameter(torch.ones(batch.observations.shape[1], dtype=torch.float64))

    class Bare:
        def __init__(self) -> None:
            self.unused = nn.Linear(2, 2)

        def __call__(self, observations: Tensor, actions: Tensor) -> Tensor:
            return (observations * weight).sum(dim=1) * actions.sum(dim=1)

    found = diagnose(Critics(Bare(), Bare()), batch)
    assert math.isnan(found.variance_cosine)
    assert math.isfinite(found.total)


def test_directions_given_are_not_written_to(make_transitions: MakeTransitions, make_critic: MakeCritic) -> None:
    w = torch.tensor([1.0005, 0, 0, 0, 0], dtype=torch.float64)
    critic = make_critic()
    diagnose(Critics(critic, critic), make_transitions(10), direction=w, next_direction=w)
    assert w[0] == 1.0005


def test_inside_clusters_w_prime_stands_to_the_left(
    make_transitions: MakeTransitions, pair: tuple[nn.Module, nn.Module]
) -> None:
    batch, critics = make_transitions(40, dtype=torch.float64), Critics(*pair)
    target_w, w = torch.eye(5, dtype=torch.float64)[:2]
    r = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(dim=1)
    found = diagnose(critics, batch, responsibilities=r, direction=w, next_direction=target_w)
    target_g, g = stacked_gradients(critics, batch).numpy().reshape(40, 2, 5).transpose(1, 0, 2)
    inside = [np.cov(target_g[:, 0], g[:, 1], aweights=s, ddof=0)[0, 1] for s in r.T.numpy()]
    assert found.cluster_cross == pytest.approx(float(r.mean(dim=0) @ torch.tensor(inside).abs()), rel=1e-12)
