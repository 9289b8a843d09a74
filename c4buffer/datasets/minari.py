"""Minari's datasets -> Transitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from .._checks import fail, requiring, shape_of
from ..observations import Observations, map_observations
from ..transitions import Transitions
from .arrays import as_network_input


def load_minari(
    dataset: Any, *, observations: Callable[[Any], Any] | None = None, download: bool = False
) -> Transitions:
    """The episodes of a Minari dataset, one after the other (needs Minari: `pip install c4buffer[data]`).

    Of an episode's T + 1 observations the first T become s and the last T s'; terminations become terminals,
    truncations timeouts, and an episode whose last row is neither ends by timeout there. Floating values take torch's
    default dtype, as networks have it; images stay uint8, discrete actions become int64.

    Args:
        dataset: a dataset's id, such as "mujoco/hopper/medium-v0", or a `minari.MinariDataset`, filtered or not.
        observations: what to keep of an episode's observations (an array [T + 1, ...], or the dict or tuple of arrays
            that the environment gives): a function of them, whose value has the same leading axis. Default: all;
            `lambda o: o["observation"]` leaves the goals of a goal-conditioned task out.
        download: fetch a dataset that is not on this machine.

    Raises:
        FileNotFoundError: (Minari's) if the dataset is not on this machine.
        ValueError: if there is no step, or if an episode's actions or observations are of a kind that Transitions
            cannot hold (texts, nested dicts, several action arrays); names the episode and the field.
    """
    with requiring("a dataset of Minari's", "data"):
        import minari

    if isinstance(dataset, str):
        dataset = minari.load_dataset(dataset, download=download)
    parts = []
    for episode in dataset.iterate_episodes():
        if len(episode.rewards) > 0:
            try:
                parts.append(_transitions_of(episode, observations))
            except ValueError as error:
                raise ValueError(f"episode {episode.id}: {error}") from None
    if not parts:
        fail("dataset", "at least one step", "none")
    return Transitions.concatenate(parts)


def _transitions_of(episode: Any, observations: Callable[[Any], Any] | None) -> Transitions:
    kept = _tensors_of(episode.observations if observations is None else observations(episode.observations))
    return Transitions(
        observations=map_observations(lambda leaf: leaf[:-1], kept),
        actions=_tensor_of("actions", episode.actions),
        rewards=_tensor_of("rewards", episode.rewards),
        next_observations=map_observations(lambda leaf: leaf[1:], kept),
        terminals=_tensor_of("terminations", episode.terminations),
        timeouts=_tensor_of("truncations", episode.truncations),
    )


def _tensors_of(observations: Any) -> Observations:
    if isinstance(observations, dict):
        return {key: _rows_of(f"observations[{key!r}]", leaf) for key, leaf in observations.items()}
    if isinstance(observations, tuple):
        return tuple(_rows_of(f"observations[{place}]", leaf) for place, leaf in enumerate(observations))
    return _rows_of("observations", observations)


def _rows_of(field: str, values: Any) -> Tensor:
    rows = _tensor_of(field, values)
    if rows.ndim < 2:
        fail(field, "[T + 1, ...] with at least one axis more (choose or change with observations=)", shape_of(rows))
    return rows


def _tensor_of(field: str, values: Any) -> Tensor:
    if not isinstance(values, np.ndarray | Tensor):
        fail(field, "one array of numbers", type(values).__name__)
    return as_network_input(field, values)
