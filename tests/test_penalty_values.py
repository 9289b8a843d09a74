"""The penalty from values that the TD loss has computed."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from c4buffer import CovariancePenalty, Critics, Transitions

MakeTransitions = Callable[..., Transitions]
MakeCritic = Callable[..., nn.Module]


def differentiable(batch: Transitions, *names: str) -> Transitions:
    """The batch with copies of some fields that require gradients."""
    taken = {name: getattr(batch, name).clone().requires_grad_() for name in names}
    return Transitions.unchecked({**dict(batch.columns()), **taken})


def gradients_of(penalty: Tensor, members: list[nn.Module]) -> list[Tensor | None]:
    parameters = [parameter for member in members for parameter in member.parameters()]
    return list(torch.autograd.grad(penalty, parameters, allow_unused=True))


@pytest.mark.parametrize("scale", ["raw", "relative", "correlation"])
@pytest.mark.parametrize("column", [False, True])
def test_known_values_give_the_penalty_and_its_gradients(
    column: bool, scale: Any, make_transitions: MakeTransitions, make_critic: MakeCritic
) -> None:
    members, targets = ([make_critic(seed=s, dtype=torch.float64) for s in seeds] for seeds in ((1, 2), (3, 4)))
    batch = make_transitions(16, dtype=torch.float64)
    critics, penalty = Critics(members, targets), CovariancePenalty(0.3, scale=scale)

    def loss(values: list[Tensor], term: Tensor) -> Tensor:
        return term + sum((value[:, 0] - batch.rewards).square().mean() for value in values)

    expected = loss([member(batch.observations, batch.actions) for member in members], penalty(critics, batch))
    given = differentiable(batch, "observations", "actions")
    values = [member(given.observations, given.actions) for member in members]
    found = loss(values, penalty(critics, given, values=values if column else [value[:, 0] for value in values]))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients_of(found, members), gradients_of(expected, members))


def test_known_values_of_discrete_actions_are_differentiated_by_the_observations(
    make_transitions: MakeTransitions, make_critic: MakeCritic
) -> None:
    batch = make_transitions(16, 3, 4, dtype=torch.float64, discrete=True)
    q, target = (make_critic(3, outputs=4, seed=seed, dtype=torch.float64) for seed in (1, 2))
    given = differentiable(batch, "observations")
    value = q(given.observations).gather(1, given.actions.unsqueeze(1))
    expected = CovariancePenalty(1.0)(Critics(q, target), batch)
    torch.testing.assert_close(CovariancePenalty(1.0)(Critics(q, target), given, values=[value]), expected)


def test_values_that_can_not_be_used_are_refused(make_transitions: MakeTransitions, make_critic: MakeCritic) -> None:
    q = make_critic(dtype=torch.float64)
    batch = make_transitions(16, dtype=torch.float64)
    half = differentiable(batch, "actions")
    value = q(half.observations, half.actions)
    message = "values: expected observations and actions that require gradients, from which they were computed, got"
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        CovariancePenalty(1.0)(Critics(q, q), half, values=[value])
    whole = differentiable(batch, "observations", "actions")
    with pytest.raises(ValueError, match="^values: expected values that can be differentiated by observations and"):
        CovariancePenalty(1.0)(Critics(q, q), whole, values=[value.detach()])
    twice = [q(whole.observations, whole.actions)] * 2
    with pytest.raises(ValueError, match="^target: expected as many members as the critic has, 2, got 1$"):
        CovariancePenalty(1.0)(Critics(q, q), whole, values=twice)


def test_a_batch_of_another_kind_is_named(make_critic: MakeCritic) -> None:
    q = make_critic()
    with pytest.raises(
        ValueError, match="^batch: expected Transitions, as the buffer's `sample` gives them, got tuple$"
    ):
        CovariancePenalty(1.0)(Critics(q, q), (1, 2))  # type: ignore[arg-type]


def test_a_feature_penalty_takes_no_values(make_transitions: MakeTransitions, make_critic: MakeCritic) -> None:
    q, batch = make_critic(), make_transitions(16)
    with pytest.raises(ValueError, match="^values: expected None for kind='feature', which does not use them, got"):
        CovariancePenalty(1.0, kind="feature")(Critics(q, q), batch, values=[q(batch.observations, batch.actions)])
