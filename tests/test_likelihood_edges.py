"""Edges of H_D: whose best moment is kept, and what the numbers depend on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from c4buffer import Transitions, estimate_log_likelihood_target
from c4buffer.losses import likelihood

from .conftest import numbered


class Gaussian(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Linear(3, 2)

    def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
        return torch.distributions.Normal(self.mean(observations), 1.0).log_prob(actions).sum(dim=1)


def counting(best: int) -> type[Gaussian]:
    """Of a policy whose likelihood, as it acts, is highest after so many updates."""

    class Counting(Gaussian):
        updates = 0

        def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
            if self.training:
                self.updates += 1
                return super().log_prob(observations, actions)
            return torch.full((len(actions),), -abs(self.updates - best) / 4)

    return Counting


def data(rows: int) -> Transitions:
    generator = torch.Generator().manual_seed(0)
    observations, actions = (torch.randn(rows, width, generator=generator) for width in (3, 2))
    zeros = torch.zeros(rows)
    return Transitions(
        observations=observations, actions=actions, rewards=zeros, next_observations=observations, terminals=zeros
    )


@pytest.mark.parametrize(("updates", "best"), [(20, 3), (20, 0), (45, 45)])  # after the last it is looked at, too
def test_the_best_moment_is_kept_and_the_policy_fitted_in_training_mode(updates: int, best: int) -> None:
    found = estimate_log_likelihood_target(data(30), counting(best), fraction=1.0, updates=updates)
    assert found == pytest.approx(0, abs=1e-6)


def test_the_policys_start_is_of_the_seed_and_not_of_the_global_generator() -> None:
    def found(state: int, seed: int) -> float:
        torch.manual_seed(state)
        return estimate_log_likelihood_target(data(100), Gaussian, updates=1, seed=seed)

    assert found(1, 0) == found(2, 0)
    assert found(1, 0) != found(1, 1)


def test_four_fifths_of_the_way_are_the_default_of_the_fraction() -> None:
    whole = estimate_log_likelihood_target(data(100), Gaussian, fraction=1.0, updates=5)
    uniform = -2 * math.log(2)
    found = estimate_log_likelihood_target(data(100), Gaussian, method="fraction", updates=5)
    assert found == pytest.approx(uniform + 0.8 * (whole - uniform))


def test_one_row_is_left_to_fit_however_many_are_held_out() -> None:
    assert math.isfinite(estimate_log_likelihood_target(data(2), Gaussian, held_out=0.9, updates=1))


def test_rows_judged_in_chunks_are_judged_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"fraction": 1.0, "updates": 3, "held_out": 0.5}
    whole = estimate_log_likelihood_target(data(100), Gaussian, **options)
    monkeypatch.setattr(likelihood, "CHUNK_ROWS", 7)
    assert estimate_log_likelihood_target(data(100), Gaussian, **options) == pytest.approx(whole, rel=1e-6)


class Squashed(Gaussian):
    def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
        return super().log_prob(observations, actions.atanh())


@pytest.mark.parametrize(
    ("transitions", "make_policy", "message"),
    [
        ([1, 2], Gaussian, "transitions: expected a Transitions record, got list"),
        (data(20), Gaussian(), "make_policy: expected a callable that makes a policy, as .*, got Gaussian"),
        (data(20), lambda: nn.Linear(3, 2), r"make_policy: expected a module with log_prob\(.*, got Linear"),
        (
            data(20).replace(actions=torch.ones(20, 2)),
            Squashed,
            "make_policy: expected a policy with finite log-likelihoods .*none at its actions' bounds.*, got",
        ),
    ],
)
def test_likely_mistakes_are_named(transitions: Any, make_policy: Any, message: str) -> None:
    with pytest.raises(ValueError, match="^" + message):
        estimate_log_likelihood_target(transitions, make_policy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected an integer of at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate: expected a finite number above 0, got 0.0"),
    ],
)
def test_a_fit_that_learns_nothing_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message):
        estimate_log_likelihood_target(data(20), Gaussian, **options)


def test_the_fit_is_adams_with_the_batches_and_steps_asked_for() -> None:
    slopes, rows, at = [3.0, -1.0, 2.0], list[int](), list[float]()

    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.place = nn.Parameter(torch.zeros(1))

        def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
            if not self.training:
                at.append(self.place.item())
                return self.place.expand(len(actions))
            rows.append(len(actions))
            return slopes[len(rows) - 1] * self.place.expand(len(actions))

    estimate_log_likelihood_target(numbered(30), Line, updates=3, batch_size=7, learning_rate=0.25)
    place, expected = nn.Parameter(torch.zeros(1)), [0.0]
    adam = torch.optim.Adam([place], lr=0.25)
    for slope in slopes:
        place.grad = torch.tensor([-slope])
        adam.step()
        expected.append(place.item())
    assert rows == [7, 7, 7]
    assert at == pytest.approx(expected)


def test_so_many_rows_are_held_out_as_the_seed_draws_them() -> None:
    def held_out(seed: int) -> list[float]:
        judged: list[list[float]] = []

        class Recording(nn.Linear):
            def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
                if not self.training:
                    judged.append(observations[:, 0].tolist())
                return self(observations)[:, 0]

        estimate_log_likelihood_target(numbered(40), lambda: Recording(1, 1), updates=1, held_out=0.25, seed=seed)
        return judged[0]

    assert len(set(held_out(0))) == 10
    assert held_out(0) == held_out(0)
    assert set(held_out(0)) != set(held_out(1))
