"""What `fit_online` needs beyond a fit: a buffer that can be followed while it grows, and returns-to-go that grow."""

from __future__ import annotations

from typing import Any

import torch
from d3rlpy.dataset import (
    BasicTransitionPicker,
    FrameStackTransitionPicker,
    MixedReplayBuffer,
    ReplayBuffer,
    ReplayBufferBase,
    SparseRewardTransitionPicker,
)

from c4buffer._checks import fail

from .dataset import return_to_go

# The step after a row is all that these look ahead; the sparse-reward one reads further rewards for its returns alone.
WHOLE_AT_ONCE = (BasicTransitionPicker, FrameStackTransitionPicker, SparseRewardTransitionPicker)


def check_growing(dataset: ReplayBufferBase) -> None:
    """Raise ValueError for a buffer whose rows may change after they have appeared."""
    if not isinstance(dataset, ReplayBuffer):
        expected = "a ReplayBuffer, or a MixedReplayBuffer with one as primary, as what it takes is followed"
        fail("buffer", expected, type(dataset).__name__)
    picker = type(dataset.transition_picker)
    if picker not in WHOLE_AT_ONCE and not dataset._writer._write_at_termination:
        pickers = " or ".join(known.__name__ for known in WHOLE_AT_ONCE)
        reason = "as each row is read once, when it appears, and others may look ahead of the newest step"
        fail("buffer", f"one with a {pickers}, or with write_at_termination=True, {reason}", picker.__name__)


def check_secondary(dataset: ReplayBufferBase) -> None:
    """Raise ValueError for a mixed buffer's other half that its first batch would refuse."""
    if isinstance(dataset, MixedReplayBuffer):
        fail("buffer", "a MixedReplayBuffer of two ReplayBuffers, as a share comes from one", "a secondary mixed again")
    if dataset.transition_count == 0:
        fail("buffer", "a secondary with at least one transition", "none")


def rows_at_most(dataset: ReplayBuffer, n_steps: int) -> int:
    """Transitions that a buffer can hold: its limit, or what there will be after so many steps; at least 1."""
    rows = dataset.transition_count + len(dataset._writer._active_episode) + n_steps
    return int(getattr(dataset.buffer, "_limit", max(1, rows)))


class ReturnsToGo:
    """Returns-to-go of a growing buffer's rows, slot by slot of a ring, as d3rlpy has them when a batch is drawn.

    Those of the episode under way reach to its newest step, and are computed for each batch. Of an episode that has
    ended they are computed once.

    Args:
        dataset: d3rlpy's buffer.
        algo: the algorithm, whose discount and reward scaler count.
        capacity: slots; the j-th row ever taken is in slot j % capacity.
    """

    def __init__(self, dataset: ReplayBuffer, algo: Any, capacity: int) -> None:
        self._dataset = dataset
        self._algo = algo
        self._capacity = capacity
        self._taken = 0
        self._slots: list[tuple[Any, int] | float] = []  # a row's episode and its place there, or the result

    def extend(self, start: int) -> None:
        """Take over the dataset's rows from `start` on."""
        for row in range(start, self._dataset.transition_count):
            if self._taken < self._capacity:
                self._slots.append(self._dataset.buffer[row])
            else:
                self._slots[self._taken % self._capacity] = self._dataset.buffer[row]
            self._taken += 1

    def __getitem__(self, slots: torch.Tensor) -> torch.Tensor:
        """[B, 1], on the algorithm's device, for slots [B]."""
        found = [self._of(slot) for slot in slots.tolist()]
        return torch.tensor(found, dtype=torch.float32, device=self._algo._device).unsqueeze(1)

    def _of(self, slot: int) -> float:
        row = self._slots[slot]
        if isinstance(row, float):
            return row
        returned = float(return_to_go(self._dataset, row, self._algo)[0])
        if row[0] is not self._dataset._writer._active_episode:
            self._slots[slot] = returned
        return returned
