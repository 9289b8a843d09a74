"""Buffers of single frames, from which the frame-stack picker's stacks are made when sampling, where they can be."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from d3rlpy.dataset import FrameStackTransitionPicker, ReplayBufferBase
from torch import Tensor

from c4buffer import ClusteredReplayBuffer, Transitions
from c4buffer.observations import observation_leaves

from .rows import Run, parts_of

BLOCK_ROWS = 8192  # taken over at once


class FrameBuffer(ClusteredReplayBuffer):
    """One whose `frame_stack` is d3rlpy's: at a terminal all of s' is zeros, not its newest frame alone."""

    def _gather(self, slots: Tensor, cluster: int = -1) -> Transitions:
        batch = super()._gather(slots, cluster)
        goes_on = (batch.terminals == 0).view(-1, 1, 1, 1)
        for leaf in observation_leaves(batch.next_observations):
            leaf.mul_(goes_on)  # a batch's are copies
        return batch


def frames_to_stack(dataset: ReplayBufferBase, runs: Sequence[Run], scaler: Any) -> int:
    """How many frames a FrameBuffer joins to give the picker's rows; 0 where it would give others.

    It does for images [C, H, W] that are scaled after they are joined, and where no run begins within an episode: the
    picker then looks back to steps that are not in the buffer.
    """
    picker = dataset.transition_picker
    if type(picker) is not FrameStackTransitionPicker or any(run.start > 0 for run in runs):
        return 0
    parts = parts_of(runs[0].episode.observations)
    scaled_later = scaler is None or any(part.dtype == np.uint8 for part in parts)
    return int(picker._n_frames) if scaled_later and all(part.ndim == 4 for part in parts) else 0


def fill(buffer: ClusteredReplayBuffer, transitions: Transitions) -> None:
    """In blocks: on its way to another device, a column needs no second place there."""
    for start in range(0, len(transitions), BLOCK_ROWS):
        buffer.extend(transitions[start : start + BLOCK_ROWS])
