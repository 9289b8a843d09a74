"""Which trajectory each row of a ring belongs to, which rows are next to it, and what clusters take of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import check_integer, fail, shape_of


class Trajectories:
    """Numbers of trajectories, slot by slot of a ring, and the order in which rows came.

    Args:
        capacity: slots.
    """

    def __init__(self, capacity: int) -> None:
        self._numbers = torch.full((capacity,), -1, device="cpu")
        self._times = torch.full((capacity,), -1, device="cpu")
        self._written = 0
        self._next = 0
        self._open: dict[int, int] = {}  # of each environment that is under way; -1 is the one of `extend`

    def extend(self, slots: Tensor, ends: Tensor) -> None:
        """Rows one after the other, `ends` [M] where a trajectory's last is; the first goes on with what is open."""
        number = self._open.pop(-1, self._next)
        numbers = number + torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), ends[:-1].long().cumsum(dim=0)])
        # The first may be an older trajectory; those that begin here have numbers of their own.
        numbers = torch.where(numbers > number, numbers - number - 1 + max(self._next, number + 1), number)
        self._next = max(self._next, int(numbers.max()) + 1)
        if not bool(ends[-1]):
            self._open[-1] = int(numbers[-1])
        self._write(slots, numbers[len(numbers) - len(slots) :])

    def add(self, slots: Tensor, ends: Tensor) -> None:
        """One row of each environment, `ends` [E] where its trajectory ends."""
        numbers = []
        for environment, end in enumerate(ends.tolist()):
            if environment not in self._open:
                self._open[environment] = self._next
                self._next += 1
            numbers.append(self._open.pop(environment) if end else self._open[environment])
        self._open = _of_first(self._open, len(ends))
        self._write(slots, torch.tensor(numbers, device="cpu")[len(numbers) - len(slots) :])

    def cut(self) -> None:
        """The trajectories under way of environments end where they are."""
        self._open = {source: value for source, value in self._open.items() if source < 0}

    def catch_up(self, slots: Tensor, written: int) -> None:
        """Rows that it was not told of are in these slots, each a trajectory of its own; `written` have ever been."""
        self._numbers[slots] = torch.arange(self._next, self._next + len(slots), device="cpu")
        self._times[slots] = torch.arange(written - len(slots), written, device="cpu")
        self._next += len(slots)
        self._open, self._written = {}, written

    def _write(self, slots: Tensor, numbers: Tensor) -> None:
        self._numbers[slots] = numbers
        self._times[slots] = torch.arange(self._written, self._written + len(slots), device="cpu")
        self._written += len(slots)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        open_ = [[environment, number] for environment, number in self._open.items()]
        return {
            "numbers": self._numbers,
            "times": self._times,
            "written": self._written,
            "next": self._next,
            "open": open_,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take what `state` gave; ValueError for what it can not have given."""
        written, next_, open_ = _counts_of(state, "written", "next")
        _check_between("numbers", state["numbers"], next_)
        _check_between("times", state["times"], written)
        _fill({"numbers": self._numbers, "times": self._times}, state)
        self._written, self._next, self._open = written, next_, open_

    def of(self, rows: int) -> tuple[Tensor, Tensor]:
        """Numbers and times of the first `rows` slots, int64 each."""
        return self._numbers[:rows], self._times[:rows]


class Neighbours:
    """Of each slot of a ring, the slots of the rows before and after it in the same trajectory; -1 where there is none.

    A row is overwritten before its successor is, so that a link forward never leads to a row of another trajectory; a
    link back is kept as the number of the row, to be seen when that is overwritten.

    Args:
        capacity: slots.
    """

    def __init__(self, capacity: int) -> None:
        self._next = torch.full((capacity,), -1, device="cpu")
        # row j of all that were ever written is in slot j % capacity
        self._previous = torch.full((capacity,), -1, device="cpu")
        self._written = 0
        self._open: dict[int, int] = {}  # the last row of each environment that is under way; -1 is that of `extend`

    def extend(self, slots: Tensor, ends: Tensor) -> None:
        """Rows one after the other, `ends` [M] where a trajectory's last is; the first goes on with what is open."""
        first = self._written
        self._written += len(ends)
        whole = len(slots) == len(ends)
        if whole:
            self._link(self._open.get(-1), int(slots[0]))
        previous = torch.arange(first - 1, self._written - 1, device="cpu")
        previous[0] = self._open.get(-1, -1)
        previous[1:] = torch.where(ends[:-1], -1, previous[1:])
        self._previous[slots] = previous[len(ends) - len(slots) :]
        ends = ends[len(ends) - len(slots) :]
        self._next[slots] = torch.cat([torch.where(ends[:-1], -1, slots[1:]), torch.tensor([-1], device="cpu")])
        self._close(-1, self._written - 1, bool(ends[-1]))

    def add(self, slots: Tensor, ends: Tensor) -> None:
        """One row of each environment, `ends` [E] where its trajectory ends."""
        first = self._written
        self._written += len(ends)
        self._next[slots] = -1
        for environment, end in enumerate(ends.tolist()):
            row = first + environment
            if self._holds(row):  # not overwritten by the same step's rows
                self._link(self._open.get(environment), row % len(self._next))
                self._previous[row % len(self._next)] = self._open.get(environment, -1)
            self._close(environment, row, end)
        self._open = _of_first(self._open, len(ends))

    def cut(self) -> None:
        """The trajectories under way of environments end where they are."""
        self._open = {source: value for source, value in self._open.items() if source < 0}

    def catch_up(self, slots: Tensor, written: int) -> None:
        """Rows that it was not told of are in these slots, next to nothing; `written` have ever been."""
        self._next[slots] = self._previous[slots] = -1
        self._open, self._written = {}, written

    def after(self, slots: Tensor) -> Tensor:
        """The successors [M] of some slots."""
        return self._next[slots]

    def before(self, slots: Tensor) -> Tensor:
        """The predecessors [M] of some slots, as far as they have not been overwritten."""
        rows = self._previous[slots]
        return torch.where(rows >= max(0, self._written - len(self._next)), rows % len(self._next), -1)

    def _holds(self, row: int) -> bool:
        return row >= self._written - len(self._next)

    def _link(self, row: int | None, slot: int) -> None:
        if row is not None and self._holds(row):
            self._next[row % len(self._next)] = slot

    def _close(self, environment: int, row: int, end: bool) -> None:
        if end:
            self._open.pop(environment, None)
        else:
            self._open[environment] = row

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        open_ = [[environment, row] for environment, row in self._open.items()]
        return {"next": self._next, "previous": self._previous, "written": self._written, "open": open_}

    def restore(self, state: dict[str, Any]) -> None:
        """Take what `state` gave; ValueError for what it can not have given."""
        written, open_ = _counts_of(state, "written")
        _check_between("next", state["next"], len(self._next))
        _check_between("previous", state["previous"], written)
        _fill({"next": self._next, "previous": self._previous}, state)
        self._written, self._open = written, open_


def _of_first(open_: dict[int, int], environments: int) -> dict[int, int]:
    """What is under way, less the environments that took no part in a step: they begin anew when they come back."""
    return {environment: value for environment, value in open_.items() if environment < environments}


def _counts_of(state: dict[str, Any], *names: str) -> tuple[Any, ...]:
    """The counters of these names, and what is open by environment."""
    counts = [check_integer(name, state[name], minimum=0) for name in names]
    open_ = {check_integer("open", e, minimum=-1): check_integer("open", n, minimum=0) for e, n in state["open"]}
    return (*counts, open_)


def _check_between(name: str, values: Tensor, end: int) -> None:
    """Numbers from -1 to before `end`."""
    if values.dtype != torch.int64:
        fail(name, "int64", values.dtype)
    if values.numel() and not -1 <= int(values.min()) <= int(values.max()) < end:
        fail(name, f"numbers from -1 to {end - 1}", f"{int(values.min())} to {int(values.max())}")


def _fill(columns: dict[str, Tensor], state: dict[str, Any]) -> None:
    for name, column in columns.items():
        if state[name].shape != column.shape:
            fail(name, f"a shape of {shape_of(column)}", shape_of(state[name]))
        column.copy_(state[name])


def with_tails(labels: Tensor, n_clusters: int, numbers: Tensor, times: Tensor) -> Tensor:
    """Members [K, N] of clusters that also hold the rest of each trajectory after its last member there.

    Args:
        labels: of each row its cluster, -1 for none, [N].
        n_clusters: K.
        numbers, times: of each row its trajectory, and its place in the order of all rows, [N].
    """
    inverse = numbers.unique(return_inverse=True)[1]
    last = torch.full((int(inverse.max()) + 1, n_clusters), torch.iinfo(torch.int64).max, device="cpu")
    known = labels >= 0
    last.view(-1).scatter_reduce_(
        0, (inverse * n_clusters + labels)[known], times[known], reduce="amax", include_self=False
    )
    return torch.stack([(labels == z) | (times > last[:, z][inverse]) for z in range(n_clusters)])
