"""H_D from the data: what a cloning policy reaches on rows that it has not seen."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from c4buffer import Transitions, estimate_log_likelihood_target


class Gaussian(nn.Module):
    """Of mean w s + b and a spread that does not depend on the state."""

    def __init__(self, actions: int = 2) -> None:
        super().__init__()
        self.mean = nn.Linear(3, actions)
        self.log_std = nn.Parameter(torch.zeros(actions))

    def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
        return torch.distributions.Normal(self.mean(observations), self.log_std.exp()).log_prob(actions).sum(dim=1)


class Broken(Gaussian):
    def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
        return super().log_prob(observations, actions) / 0


class ByDimension(Gaussian):
    """As those whose author forgot to sum."""

    def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
        return torch.distributions.Normal(self.mean(observations), self.log_std.exp()).log_prob(actions)


class OneNumber(Gaussian):
    def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
        return super().log_prob(observations, actions).mean()


def data(rows: int = 4000, std: float = 0.1, discrete: bool = False) -> Transitions:
    generator = torch.Generator().manual_seed(0)
    observations = torch.randn(rows, 3, generator=generator)
    actions = 0.2 * observations[:, :2] + std * torch.randn(rows, 2, generator=generator)
    return Transitions(
        observations=observations,
        actions=torch.randint(3, (rows,), generator=generator) if discrete else actions,
        rewards=torch.zeros(rows),
        next_observations=observations,
        terminals=torch.zeros(rows),
    )


ENTROPY = 2 * (-0.5 * math.log(2 * math.pi * math.e) - math.log(0.1))  # E[log p(a | s)] of what made the data


def test_the_whole_way_from_uniform_is_the_datas_own_likelihood() -> None:
    found = estimate_log_likelihood_target(data(), Gaussian, fraction=1.0, learning_rate=1e-2)
    assert found == pytest.approx(ENTROPY, abs=0.15)


def test_no_way_from_uniform_is_the_uniform_policys() -> None:
    assert estimate_log_likelihood_target(data(), Gaussian, fraction=0.0, updates=1) == -2 * math.log(2)
    narrow = estimate_log_likelihood_target(data(), Gaussian, fraction=0.0, updates=1, action_bounds=(0.0, 1.0))
    assert narrow == 0


def test_the_fraction_is_linear_and_the_same_each_time() -> None:
    ends = [estimate_log_likelihood_target(data(), Gaussian, fraction=f, updates=300) for f in (0.0, 0.5, 1.0)]
    assert ends[1] == pytest.approx((ends[0] + ends[2]) / 2)
    assert estimate_log_likelihood_target(data(), Gaussian, fraction=1.0, updates=300) == ends[2]


def test_the_quantile_is_one_of_the_likelihoods_by_row() -> None:
    options: dict[str, Any] = {"method": "quantile", "learning_rate": 1e-2}
    assert estimate_log_likelihood_target(data(), Gaussian) == estimate_log_likelihood_target(
        data(), Gaussian, method="quantile", quantile=0.5
    )
    low, middle = (estimate_log_likelihood_target(data(), Gaussian, quantile=c, **options) for c in (0.25, 0.5))
    assert low < middle
    # log p of a row: its mode's less chi^2 of two degrees / 2, whose quantile is -log(1 - c)
    mode = -math.log(2 * math.pi) - 2 * math.log(0.1)
    assert middle == pytest.approx(mode + math.log(0.5), abs=0.15)
    assert low == pytest.approx(mode + math.log(0.25), abs=0.2)


def test_likelihood_on_what_was_seen_does_not_count() -> None:
    class Memory(nn.Module):
        """A net that can learn 60 rows by heart."""

        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2))
            self.log_std = nn.Parameter(torch.zeros(2))

        def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
            density = torch.distributions.Normal(self.body(observations), self.log_std.exp().clamp(min=1e-3))
            return density.log_prob(actions).sum(dim=1)

    found = estimate_log_likelihood_target(data(60), Memory, fraction=1.0, held_out=0.4, learning_rate=1e-2)
    assert found < ENTROPY


def test_the_policy_is_judged_as_it_acts() -> None:
    class Dropping(Gaussian):
        def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
            kept = 0.0 if self.training else 1.0
            return kept * super().log_prob(observations, actions)

    assert estimate_log_likelihood_target(data(100), Dropping, fraction=1.0, updates=2) < -1


def test_global_random_numbers_are_left_as_they_are() -> None:
    state = torch.get_rng_state()
    estimate_log_likelihood_target(data(100), Gaussian, updates=3)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_is_the_same_where_the_caller_keeps_no_graphs(mode: Any) -> None:
    expected = estimate_log_likelihood_target(data(100), Gaussian, updates=20)
    with mode():
        assert estimate_log_likelihood_target(data(100), Gaussian, updates=20) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "mean"}, "method: expected one of 'quantile', 'fraction', got 'mean'"),
        ({"fraction": 1.5}, "fraction: expected a number from 0 to 1, got 1.5"),
        ({"fraction": 0.5, "quantile": 0.5}, "quantile: expected None where the method is 'fraction', got 0.5"),
        ({"method": "quantile", "fraction": 0.5}, "fraction: expected None where the method is 'quantile', got 0.5"),
        ({"quantile": -1}, "quantile: expected a finite number at least 0"),
        ({"held_out": 1.0}, "held_out: expected a number above 0 and below 1, got 1.0"),
        ({"updates": 0}, "updates: expected an integer of at least 1"),
        ({"action_bounds": (1.0, 1.0)}, r"action_bounds: expected \(low, high\), finite, with low below high"),
        ({"action_bounds": (-math.inf, 1.0)}, r"action_bounds: expected \(low, high\), finite"),
        ({"action_bounds": 1.0}, r"action_bounds: expected \(low, high\), finite, .*, got 1.0"),
        ({"action_bounds": (-1, 0, 1)}, r"action_bounds: expected \(low, high\), finite, .*, got \(-1, 0, 1\)"),
        ({"seed": None}, "seed: expected an integer of at least 0, got None"),
        ({"make_policy": ByDimension}, r"make_policy: .* \[B\], B = 2, summed over action dimensions, got \[2, 2\]"),
        ({"make_policy": OneNumber}, r"make_policy: .* summed over action dimensions, got \[\]"),
        ({"make_policy": Broken}, "make_policy: expected a policy with finite log-likelihoods"),
        ({"transitions": data(10, discrete=True)}, "transitions: expected continuous actions, .* got discrete"),
        ({"transitions": data(1)}, "transitions: expected at least two"),
    ],
)
def test_wrong_input_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate_log_likelihood_target(**{"transitions": data(20), "make_policy": Gaussian, **options})
