"""One step of one or of several environments, as rows whose next actions are not known yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._checks import fail, shape_of
from .fields import as_tensor
from .observations import Observations
from .transitions import Transitions


def step_of(
    observations: Any, actions: Any, rewards: Any, next_observations: Any, terminals: Any, timeouts: Any = None
) -> Transitions:
    """Rows [1] of one environment, where the reward is a scalar, or [E] of E environments; no episode is closed.

    What is float64 and no tensor comes in torch's default dtype. The next actions are the rows' own, and
    `has_next_actions` is 0.
    """
    environments = as_tensor("rewards", rewards).shape[:1]  # [] of one, whose reward is a scalar

    def rows(name: str, value: Any) -> Tensor:
        tensor = as_tensor(name, value)
        if tensor.dtype == torch.float64 and not isinstance(value, Tensor):
            tensor = tensor.to(torch.get_default_dtype())  # environments give float64, networks take float32
        if tensor.shape[: len(environments)] != environments:
            expected = f"an axis of {environments[0]} first, like rewards (a scalar is one environment's)"
            fail(name, expected, shape_of(tensor))
        return tensor if environments else tensor.unsqueeze(0)

    actions, rewards = rows("actions", actions), rows("rewards", rewards)
    timeouts = rewards.new_zeros(len(rewards)) if timeouts is None else rows("timeouts", timeouts)
    step = Transitions(
        observations=_map_parts(partial(rows, "observations"), observations),
        actions=actions,
        rewards=rewards,
        next_observations=_map_parts(partial(rows, "next_observations"), next_observations),
        terminals=rows("terminals", terminals),
        timeouts=timeouts,
        next_actions=actions,
        has_next_actions=torch.zeros_like(rewards),
    )
    # The constructor closes a last row that is still open; here its episode goes on.
    return Transitions.unchecked({**dict(step.columns()), "timeouts": timeouts.reshape(-1).to(step.timeouts)})


def _map_parts(function: Callable[[Any], Tensor], observations: Any) -> Observations:
    """`function` applied to an observation, or to every part of a dict or tuple of them."""
    if isinstance(observations, Mapping):
        return {key: function(value) for key, value in observations.items()}
    if isinstance(observations, tuple):
        return tuple(function(value) for value in observations)
    return function(observations)
