"""Edges of the diagnostics: clusters that do not quite sum to one, shared networks, images and modes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from c4buffer import Critics, Transitions, diagnose

MakeTransitions = Callable[..., Transitions]
MakeCritic = Callable[..., nn.Module]


def test_responsibilities_count_by_their_shares(make_transitions: MakeTransitions, make_critic: MakeCritic) -> None:
    batch = make_transitions(40, dtype=torch.float64)
    critics = Critics(*(make_critic(seed=seed, dtype=torch.float64) for seed in (1, 2)))
    generator = torch.Generator().manual_seed(0)
    r = torch.randn(40, 3, generator=generator, dtype=torch.float64).softmax(dim=1)
    sums = 1 + 8e-4 * (2 * torch.rand(40, 1, generator=generator, dtype=torch.float64) - 1)
    one, other = (dataclasses.asdict(diagnose(critics, batch, responsibilities=each)) for each in (r, r * sums))
    assert other == pytest.approx(one, rel=1e-10, nan_ok=True)


class Head(nn.Module):
    def __init__(self, body: nn.Module, seed: int) -> None:
        super().__init__()
        self.body, self.last = body, nn.Linear(8, 1, dtype=torch.float64)
        nn.init.normal_(self.last.weight, generator=torch.Generator().manual_seed(seed))

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        value: Tensor = self.last(torch.tanh(self.body(torch.cat([observations, actions], dim=1))))
        return value


def test_parameters_that_members_share_count_once(make_transitions: MakeTransitions) -> None:
    torch.manual_seed(0)
    batch = make_transitions(30, dtype=torch.float64)
    body = nn.Linear(5, 8, dtype=torch.float64)
    heads = [Head(body, seed) for seed in (1, 2)]
    found = diagnose(Critics(heads, heads), batch, discount=0.9)
    q = sum(head(batch.observations, batch.actions) for head in heads).squeeze(1) / 2
    ahead = sum(head(batch.next_observations, batch.next_actions) for head in heads).squeeze(1) / 2
    delta = batch.rewards + 0.9 * (1 - batch.terminals) * ahead.detach() - q
    parameters = [*body.parameters(), *heads[0].last.parameters(), *heads[1].last.parameters()]
    moment, variance = (
        torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters, retain_graph=True)])
        for loss in ((delta**2).mean(), delta.var(correction=0))
    )
    cosine = float(nn.functional.cosine_similarity(moment, variance, dim=0))
    assert found.variance_cosine == pytest.approx(cosine, rel=1e-9)


def test_images_of_bytes_are_read_as_numbers() -> None:
    images = torch.randint(0, 256, (12, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    q, target = (nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)) for _ in range(2))

    def found(observations: Tensor) -> dict[str, float]:
        batch = Transitions(
            observations=observations,
            actions=torch.arange(12) % 3,
            rewards=torch.zeros(12),
            next_observations=observations.flip(0),
            terminals=torch.zeros(12),
        )
        return dataclasses.asdict(diagnose(Critics(q, target), batch))

    assert found(images) == pytest.approx(found(images.float()), nan_ok=True)


def test_directions_that_are_nearly_of_unit_length_keep_the_bounds_of_eq_10(make_transitions: MakeTransitions) -> None:
    batch = make_transitions(40, 1, 1, dtype=torch.float64)
    w = torch.tensor([0.6, 0.8], dtype=torch.float64)

    def q(observations: Tensor, actions: Tensor) -> Tensor:
        return (torch.cat([observations, actions], dim=1) @ w).pow(2)  # gradients along w alone

    one, other = (diagnose(Critics(q, q), batch, next_direction=a * w, direction=a * w) for a in (1.0, 1.0009))
    assert dataclasses.asdict(other) == pytest.approx(dataclasses.asdict(one), rel=1e-12, nan_ok=True)
    assert other.cluster_cross <= other.cluster_norm * (1 + 1e-12)


def test_a_v_ensemble_is_read_in_eval_mode_and_left_as_it_was(make_transitions: MakeTransitions) -> None:
    network = nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5), nn.Linear(64, 4))
    batch = make_transitions(20)
    critics = Critics(lambda s, a: s[:, 0] ** 2, lambda s, a: s[:, 0] ** 2)
    spread = diagnose(critics, batch, value_ensemble=lambda s: network(s).T).value_spread
    assert network.training
    expected = network.eval()(batch.observations).detach().std(dim=1).mean()
    assert spread == pytest.approx(float(expected), rel=1e-6)
