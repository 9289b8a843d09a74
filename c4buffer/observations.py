"""An observation: a tensor, or a dict or tuple of tensors, with a leading axis of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Union

from torch import Tensor

Observations = Union[Tensor, Mapping[str, Tensor], tuple[Tensor, ...]]


def observation_leaves(observations: Observations) -> list[Tensor]:
    """The tensors of an observation, in a fixed order (a dict's keys sorted)."""
    if isinstance(observations, Tensor):
        return [observations]
    if isinstance(observations, Mapping):
        return [observations[key] for key in sorted(observations)]
    return list(observations)


def with_leaves(observations: Observations, leaves: Sequence[Tensor]) -> Observations:
    """`leaves`, in the order of `observation_leaves`, in the structure of `observations`."""
    if isinstance(observations, Tensor):
        return leaves[0]
    if isinstance(observations, Mapping):
        return dict(zip(sorted(observations), leaves))
    return tuple(leaves)


def map_observations(function: Callable[[Tensor], Tensor], observations: Observations) -> Observations:
    """`function` applied to every tensor of an observation."""
    return with_leaves(observations, [function(leaf) for leaf in observation_leaves(observations)])
