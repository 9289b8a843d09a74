"""Transitions: the one record that flows through everything."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ._checks import check_finite, fail, shape_of
from .fields import as_actions, as_flags, as_intervals, as_observations, as_scalars, check_same_form
from .observations import Observations, map_observations, observation_leaves, with_leaves


@dataclass(frozen=True, eq=False, init=False)
class Transitions:
    """N transitions (s, a, r, s'), as tensors with a common leading axis.

    Args:
        observations: s, [N, *O], or a dict or tuple of such tensors. Images may stay uint8.
        actions: a, [N, A] floating for continuous actions, [N] integer for discrete ones (kept as int64).
        rewards: r, [N].
        next_observations: s', like `observations`.
        terminals: d, [N], 0 or 1: true ends only, where nothing is to be expected after s'.
        timeouts: [N], 0 or 1: ends by time limit. Default: none.
        next_actions: a', like `actions`; used as they are when given.
        intervals: n of an n-step transition, [N], whole numbers from 1. Default: 1.
        has_next_actions: [N], 0 or 1: whether a' is a real next action. Default: 1 where `next_actions` are given.

    Scalars may come as [N, 1]; arrays become tensors. Where `next_actions` is left out, a' is the action of the row
    `intervals` rows on in the same episode; at an episode's end there is none, so the row's own action is stored and
    `has_next_actions` is 0. A last row that is neither terminal nor timeout counts as a timeout. Both happen here only,
    never in indexing, `concatenate` or sampling. Every row with a flag ends an episode: n-step records of others, whose
    last n rows all have it, should come with their `next_actions`. Where an episode ends is read from the flags alone:
    rows that do not follow each other want flags, see `ends_of`. Dtypes are kept: networks of float32 want float32.

    A batch drawn from a buffer also has `indices` [N] (rows of the buffer) and `cluster` (-1 before the first refresh).

    Raises:
        ValueError: for a wrong shape or dtype, or a value that is not finite; names the field and the first bad row.

    >>> t = Transitions(observations=[[0.0], [1.0]], actions=[[0.1], [0.2]], rewards=[1.0, 2.0],
    ...                 next_observations=[[1.0], [2.0]], terminals=[0, 1])
    >>> t.next_actions, t.has_next_actions
    (tensor([[0.2000],
            [0.2000]]), tensor([1., 0.]))
    """

    observations: Observations
    actions: Tensor
    rewards: Tensor
    next_observations: Observations
    terminals: Tensor
    timeouts: Tensor
    next_actions: Tensor
    has_next_actions: Tensor
    intervals: Tensor
    indices: Tensor | None
    cluster: int

    def __init__(
        self,
        *,
        observations: Any,
        actions: Any,
        rewards: Any,
        next_observations: Any,
        terminals: Any,
        timeouts: Any = None,
        next_actions: Any = None,
        intervals: Any = None,
        has_next_actions: Any = None,
    ) -> None:
        observations = as_observations("observations", observations)
        rows = len(observation_leaves(observations)[0])
        if rows == 0:
            fail("observations", "at least one transition", "none")
        next_observations = as_observations("next_observations", next_observations)
        check_same_form(observations, next_observations)
        actions = as_actions("actions", actions, rows)
        rewards = as_scalars("rewards", rewards, rows)
        if not rewards.is_floating_point():
            rewards = rewards.to(torch.get_default_dtype())
        check_finite("rewards", rewards)
        terminals = as_flags("terminals", terminals, rows, like=rewards)
        if timeouts is None:
            timeouts = torch.zeros_like(rewards)
        timeouts = as_flags("timeouts", timeouts, rows, like=rewards)
        if not terminals[-1] and not timeouts[-1]:
            timeouts = timeouts.clone()
            timeouts[-1] = 1
        intervals = torch.ones_like(rewards) if intervals is None else as_intervals(intervals, rows, like=rewards)

        if next_actions is None:
            if has_next_actions is not None:
                fail("has_next_actions", "to come together with next_actions", "it alone")
            next_actions, has_next_actions = _link_actions(actions, terminals, timeouts, intervals)
        else:
            next_actions = as_actions("next_actions", next_actions, rows)
            if next_actions.shape != actions.shape or next_actions.dtype != actions.dtype:
                fail(
                    "next_actions",
                    f"the shape and dtype of actions, {shape_of(actions)} {actions.dtype}",
                    f"{shape_of(next_actions)} {next_actions.dtype}",
                )
            has_next_actions = (
                torch.ones_like(rewards)
                if has_next_actions is None
                else as_flags("has_next_actions", has_next_actions, rows, like=rewards)
            )
        self._set(
            observations=observations,
            actions=actions,
            rewards=rewards,
            next_observations=next_observations,
            terminals=terminals,
            timeouts=timeouts,
            next_actions=next_actions,
            has_next_actions=has_next_actions,
            intervals=intervals,
            indices=None,
            cluster=-1,
        )

    def _set(self, **fields: Any) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @classmethod
    def unchecked(cls, columns: Mapping[str, Any], *, indices: Tensor | None = None, cluster: int = -1) -> Transitions:
        """A record of `columns` (see `columns`) as they are: no check, no linking, no copy."""
        record = object.__new__(cls)
        record._set(**columns, indices=indices, cluster=cluster)
        return record

    def columns(self) -> Iterator[tuple[str, Any]]:
        """Name and value of every field with the leading axis N, `indices` aside."""
        for name in COLUMNS:
            yield name, getattr(self, name)

    def __len__(self) -> int:
        return len(self.rewards)

    def __getitem__(self, index: Any) -> Transitions:
        """The rows at `index`: an int (one row, the axis is kept), a slice, int64 indices [M] or a bool mask [N]."""
        if isinstance(index, Integral) or getattr(index, "ndim", 1) == 0:
            index = operator.index(index)
            if not -len(self) <= index < len(self):
                raise IndexError(f"index: expected a row of {len(self)} transitions, got {index}")
            index = slice(index, index + 1 or None)
        return self._map(lambda tensor: tensor[index])

    def to(self, device: torch.device | str) -> Transitions:
        """The same transitions with every tensor on `device`."""
        return self._map(lambda tensor: tensor.to(device))

    def replace(self, **fields: Any) -> Transitions:
        """A record with other values in some fields, checked like those of a new one; all else is kept."""
        unknown = sorted(set(fields) - set(COLUMNS))
        if unknown:
            fail("fields", "names among " + ", ".join(COLUMNS), ", ".join(unknown))
        checked = Transitions(**{**dict(self.columns()), **fields})
        columns = {**dict(self.columns()), **{name: getattr(checked, name) for name in fields}}
        if "timeouts" in fields:  # as they are given: the constructor closes the last row
            columns["timeouts"] = as_flags("timeouts", fields["timeouts"], len(checked), like=checked.rewards)
        return Transitions.unchecked(columns, indices=self.indices, cluster=self.cluster)

    @staticmethod
    def concatenate(parts: Iterable[Transitions]) -> Transitions:
        """All rows of `parts`, in order. Each part keeps its own ends and next actions; nothing is linked across.

        Raises:
            ValueError: for no parts, and for observations or actions of other shapes or dtypes.
        """
        parts = list(parts)
        if not parts:
            fail("parts", "at least one Transitions", "none")
        first = parts[0]
        for part in parts[1:]:
            check_same_form(first.observations, part.observations, rows=False, argument="parts")
            check_same_form(first.actions, part.actions, rows=False, argument="parts", of="actions")

        def join(name: str) -> Any:
            values = [getattr(part, name) for part in parts]
            if not name.endswith("observations"):
                return torch.cat(values)
            columns = zip(*(observation_leaves(value) for value in values))
            return with_leaves(values[0], [torch.cat(column) for column in columns])

        return Transitions.unchecked({name: join(name) for name in COLUMNS})

    def _map(self, function: Callable[[Tensor], Tensor]) -> Transitions:
        columns = {
            name: map_observations(function, value) if name.endswith("observations") else function(value)
            for name, value in self.columns()
        }
        indices = None if self.indices is None else function(self.indices)
        return Transitions.unchecked(columns, indices=indices, cluster=self.cluster)


COLUMNS = (
    "observations",
    "actions",
    "rewards",
    "next_observations",
    "terminals",
    "timeouts",
    "next_actions",
    "has_next_actions",
    "intervals",
)


def ends_of(transitions: Transitions) -> Tensor:
    """Where the rows of a trajectory end, [N] bool: at a terminal, a timeout, and where the next row is not at s'.

    So the ends of rows that were shuffled, or left out as `d4rl.qlearning_dataset` does at timeouts, can be marked:

    >>> fields = dict(observations=[[0.0], [7.0], [8.0]], actions=[[0.1], [0.2], [0.3]], rewards=[0.0, 0.0, 0.0],
    ...               next_observations=[[1.0], [8.0], [9.0]], terminals=[0, 0, 0])
    >>> Transitions(**fields).has_next_actions  # the first row's is that of the second, a trajectory of its own
    tensor([1., 1., 0.])
    >>> ends = ends_of(Transitions(**fields))
    >>> Transitions(**fields, timeouts=ends).has_next_actions
    tensor([0., 1., 0.])
    """
    ends = (transitions.terminals + transitions.timeouts) > 0
    pairs = zip(observation_leaves(transitions.next_observations), observation_leaves(transitions.observations))
    for after, now in pairs:
        ends[:-1] |= (after[:-1] != now[1:]).flatten(start_dim=1).any(dim=1)
    ends[-1] = True
    return ends


def _link_actions(actions: Tensor, terminals: Tensor, timeouts: Tensor, intervals: Tensor) -> tuple[Tensor, Tensor]:
    """a' [N, A] from the row `intervals` rows on in the same episode, and [N] whether there is one."""
    rows = len(actions)
    done = (terminals + timeouts) > 0
    episode = torch.cumsum(done, dim=0) - done.long()
    here = torch.arange(rows, device=actions.device)
    ahead = here + intervals.double().clamp(max=rows).long()
    linked = ahead < rows
    linked &= episode[ahead.clamp(max=rows - 1)] == episode
    return actions[torch.where(linked, ahead, here)], linked.to(terminals.dtype)
