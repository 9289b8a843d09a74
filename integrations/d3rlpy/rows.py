"""The rows of a d3rlpy dataset, in its buffer's order: an episode can be there twice, in part, or between others."""

from collections.abc import Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
from d3rlpy.dataset import FIFOBuffer, InfiniteBuffer, ReplayBufferBase


class Run(NamedTuple):
    """Steps `start` to `stop` of an episode, one after the other in a buffer."""

    episode: Any
    start: int
    stop: int

    @property
    def terminated(self) -> bool:
        """Whether the last of them is the episode's terminal."""
        return bool(self.episode.terminated) and self.stop == self.episode.size()


def rows_of(dataset: ReplayBufferBase) -> Sequence[tuple[Any, int]]:
    """Episode and step of every row."""
    buffer = dataset.buffer
    if type(buffer) in (InfiniteBuffer, FIFOBuffer):  # a deque finds the rows in its middle slowly, one by one
        return list(buffer._transitions)
    return [buffer[i] for i in range(dataset.transition_count)]


def runs_of(rows: Sequence[tuple[Any, int]]) -> list[Run]:
    """The same rows, at least one, as runs: as many as there are episodes where nothing is repeated or interleaved."""
    episodes = np.fromiter(map(id, map(itemgetter(0), rows)), np.int64, len(rows))
    steps = np.fromiter(map(itemgetter(1), rows), np.int64, len(rows))
    cuts = (np.flatnonzero((np.diff(episodes) != 0) | (np.diff(steps) != 1)) + 1).tolist()
    return [
        Run(rows[first][0], int(steps[first]), int(steps[end - 1]) + 1)
        for first, end in zip([0, *cuts], [*cuts, len(rows)])
    ]


def ends_of_runs(runs: Sequence[Run]) -> np.ndarray:
    """The last row of each run, int64."""
    return np.cumsum([run.stop - run.start for run in runs]) - 1


def columns_of(runs: Sequence[Run]) -> dict[str, Any]:
    """What the basic picker gives, as arrays; observations as a list of their parts. A run's end is an end."""
    observations = list(zip(*(parts_of(run.episode.observations) for run in runs)))
    actions = [run.episode.actions for run in runs]
    ends = ends_of_runs(runs)
    terminals, timeouts = np.zeros((2, ends[-1] + 1), dtype=np.float32)
    terminals[ends] = [run.terminated for run in runs]
    timeouts[ends] = 1 - terminals[ends]
    return {
        "observations": [_taken(part, runs) for part in observations],
        "next_observations": [_followers(part, runs) for part in observations],
        "actions": _taken(actions, runs),
        "next_actions": _followers(actions, runs),
        "rewards": _taken([run.episode.rewards for run in runs], runs),
        "terminals": terminals,
        "timeouts": timeouts,
    }


def parts_of(observations: Any) -> Sequence[np.ndarray]:
    """The arrays of an episode's observations."""
    return observations if isinstance(observations, (list, tuple)) else [observations]


def _taken(values: Sequence[np.ndarray], runs: Sequence[Run]) -> np.ndarray:
    return np.concatenate([value[run.start : run.stop] for value, run in zip(values, runs)])


def _followers(values: Sequence[np.ndarray], runs: Sequence[Run]) -> np.ndarray:
    """The values one step later; zeros behind a terminal."""
    pieces = []
    for value, run in zip(values, runs):
        pieces.append(value[run.start + 1 : run.stop + 1])
        if run.terminated:
            pieces.append(np.zeros_like(value[:1]))
    return np.concatenate(pieces)
