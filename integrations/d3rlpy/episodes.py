"""Transitions as a d3rlpy dataset."""

from typing import Any

import numpy as np
import torch
from d3rlpy.constants import ActionSpace
from d3rlpy.dataset import Episode, InfiniteBuffer, ReplayBuffer
from torch import Tensor

from c4buffer import Transitions
from c4buffer._checks import check_integer, fail
from c4buffer.observations import observation_leaves
from c4buffer.transitions import ends_of


def dataset_of(transitions: Transitions, *, action_size: int | None = None) -> ReplayBuffer:
    """A d3rlpy dataset that gives these transitions: `transitions_of(dataset_of(t))` is t, in t's order.

    d3rlpy keeps episodes, each next observation being the following row's. An episode ends at a terminal or a timeout,
    and where a row's next observation and action are not those of the row behind it. One that was not terminated gets a
    last step with the next observation and action, which d3rlpy itself never takes for a transition. A terminal's next
    observation and action become zeros, as d3rlpy has them; a row where an episode was cut counts as a timeout, and at
    timeouts a' counts as a real next action.

    Args:
        transitions: in the order of time; single steps, observations as a tensor or a tuple of tensors.
        action_size: the number of discrete actions. None: the largest in the data + 1.

    Raises:
        ValueError: for intervals above 1, observations in a dict, and an action beyond `action_size`.
    """
    if not isinstance(transitions, Transitions):
        fail("transitions", "Transitions", type(transitions).__name__)
    if bool((transitions.intervals != 1).any()):
        fail("transitions", "single steps (d3rlpy's MultiStepTransitionPicker makes more of them)", "intervals above 1")
    if isinstance(transitions.observations, dict):
        fail("transitions", "observations as a tensor or a tuple, as d3rlpy has them", "a dict")
    discrete = not transitions.actions.is_floating_point()
    size = int(transitions.actions.max()) + 1 if discrete else transitions.actions.shape[1]
    if action_size is not None and check_integer("action_size", action_size, minimum=1) != size:
        if not discrete or action_size < size:
            fail("action_size", f"{'at least ' if discrete else ''}{size}, as the actions have it", action_size)
        size = action_size
    transitions = transitions.to("cpu")
    ends = (_ends(transitions).nonzero().squeeze(1) + 1).tolist()
    return ReplayBuffer(
        InfiniteBuffer(),
        episodes=[_episode(transitions[start:end]) for start, end in zip([0, *ends], ends)],
        action_space=ActionSpace.DISCRETE if discrete else ActionSpace.CONTINUOUS,
        action_size=size,
    )


def _ends(transitions: Transitions) -> Tensor:
    """Whether an episode ends with a row, [N] bool."""
    ends = ends_of(transitions)
    differ = transitions.next_actions[:-1] != transitions.actions[1:]
    ends[:-1] |= differ if differ.ndim == 1 else differ.any(dim=1)
    return ends


def _episode(rows: Transitions) -> Episode:
    terminated = bool(rows.terminals[-1])
    observations: list[Any] = []
    for now, after in zip(observation_leaves(rows.observations), observation_leaves(rows.next_observations)):
        observations.append((now.clone() if terminated else torch.cat([now, after[-1:]])).numpy())
    actions = rows.actions.clone() if terminated else torch.cat([rows.actions, rows.next_actions[-1:]])
    rewards = rows.rewards if terminated else torch.cat([rows.rewards, torch.zeros_like(rows.rewards[:1])])
    return Episode(
        observations=observations if isinstance(rows.observations, tuple) else observations[0],
        actions=actions.reshape(len(actions), -1).numpy(),
        rewards=rewards.reshape(-1, 1).numpy().astype(np.float32),
        terminated=terminated,
    )
