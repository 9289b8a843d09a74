"""Transitions of several steps and stacks of frames, made from a ring's single rows when sampling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import fail, shape_of
from .observations import observation_leaves, with_leaves
from .storage import RingStorage
from .trajectories import Neighbours
from .transitions import Transitions


class Windows:
    """Looks forward from a row for n-step returns, and back from it for stacked frames.

    Args:
        storage: of single steps and single frames, trajectory by trajectory.
        n_steps: r = sum_k gamma^k r_k over so many rows, fewer where the trajectory ends or has no more rows; s', a'
            and the flags are the last row's, `intervals` the number of rows.
        discount: gamma.
        frame_stack: frames of an image observation, [C, H, W], joined to [frame_stack * C, H, W], the newest last;
            zeros where the trajectory has no earlier ones.
    """

    def __init__(self, storage: RingStorage, *, n_steps: int, discount: float, frame_stack: int) -> None:
        self.storage = storage
        self.n_steps = n_steps
        self.discount = discount
        self.frame_stack = frame_stack
        self.neighbours = Neighbours(storage.capacity)

    def check(self, transitions: Transitions) -> None:
        """Raise ValueError for rows that are no single steps, or that have no frames to stack."""
        if bool((transitions.intervals != 1).any()):
            fail("intervals", "1, as single steps are joined when sampling", float(transitions.intervals.max()))
        leaves = observation_leaves(transitions.observations)
        if self.frame_stack > 1 and not any(map(_is_image, leaves)):
            shapes = ", ".join(map(shape_of, leaves))
            fail("observations", "images [N, C, H, W], as frame_stack joins them", shapes)

    def gather(self, slots: Tensor, *, cluster: int = -1) -> Transitions:
        """From the rows in `slots`, int64 [B], on the storage's target."""
        first = self.storage.gather(slots, cluster=cluster)
        columns = dict(first.columns())
        last = slots
        if self.n_steps > 1:
            last, rewards, intervals = self._ahead(slots)
            end = self.storage.gather(last)
            for name in ("next_observations", "terminals", "timeouts", "next_actions", "has_next_actions"):
                columns[name] = getattr(end, name)
            rewards, intervals = self.storage.sent(rewards), self.storage.sent(intervals)
            columns.update(rewards=rewards.to(first.rewards), intervals=intervals.to(first.intervals))
        if self.frame_stack > 1:
            columns["observations"] = self._stacked(columns["observations"], self._back(slots, self.frame_stack - 1))
            # Of the frames that end in s', the one before it is the last row's own.
            earlier = [*self._back(last, self.frame_stack - 2), (last, torch.ones_like(last, dtype=torch.bool))]
            columns["next_observations"] = self._stacked(columns["next_observations"], earlier)
        return Transitions.unchecked(columns, indices=first.indices, cluster=cluster)

    def _ahead(self, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The last row of each window, its rewards' discounted sum, and how many rows it has."""
        here = slots
        rewards = self.storage.column("rewards", slots)
        intervals = torch.ones_like(rewards)
        going = torch.ones(len(slots), dtype=torch.bool, device="cpu")
        for step in range(1, self.n_steps):
            following = self.neighbours.after(here)  # none where the trajectory ended
            going = going & (following >= 0)
            if not bool(going.any()):
                break
            here = torch.where(going, following, here)
            alive = going.to(rewards)
            rewards += self.discount**step * alive * self.storage.column("rewards", here)
            intervals += alive
        return here, rewards, intervals

    def _back(self, slots: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
        """Up to `count` rows before those in `slots`, the oldest first: slots, and whether there is such a row."""
        found = []
        here, there = slots, torch.ones(len(slots), dtype=torch.bool, device="cpu")
        for _ in range(count):
            before = self.neighbours.before(here)
            there = there & (before >= 0)
            here = torch.where(there, before, here)
            found.append((here, there))
        return found[::-1]

    def _stacked(self, newest: Any, earlier: list[tuple[Tensor, Tensor]]) -> Any:
        """Images of the rows in `earlier` (zeros where there is none) before the newest ones, channel by channel."""
        leaves = observation_leaves(newest)
        frames: list[list[Tensor]] = [[] for _ in leaves]
        for slots, there in earlier:
            for kept, leaf in zip(frames, observation_leaves(self.storage.column("observations", slots))):
                if _is_image(leaf):
                    kept.append(leaf * there.to(leaf.device, leaf.dtype).view(-1, 1, 1, 1))
        joined = [
            torch.cat([*map(self.storage.sent, kept), leaf], dim=1) if _is_image(leaf) else leaf
            for kept, leaf in zip(frames, leaves)
        ]
        return with_leaves(newest, joined)


def _is_image(leaf: Tensor) -> bool:
    return leaf.ndim == 4
