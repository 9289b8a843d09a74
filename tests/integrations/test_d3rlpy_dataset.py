"""A d3rlpy dataset's rows are its buffer's, whatever was appended to that, and take no more room than they need."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from c4buffer.integrations.d3rlpy import C4Config, transitions_of
from c4buffer.integrations.d3rlpy.dataset import returns_to_go_of
from c4buffer.integrations.d3rlpy.rows import rows_of, runs_of
from d3rlpy.algos import CalQLConfig
from d3rlpy.dataset import BasicTransitionPicker, Episode, FIFOBuffer, InfiniteBuffer, ReplayBuffer
from d3rlpy.logging import NoopAdapterFactory
from d3rlpy.preprocessing import MultiplyRewardScaler

from c4buffer import Transitions

from .test_d3rlpy import built, dataset_of, drawn, episodes, small

__all__ = ["drawn"]  # a fixture
QUIET: dict[str, Any] = {"show_progress": False, "logger_adapter": NoopAdapterFactory()}
FIELDS = {
    "observations": "observation",
    "actions": "action",
    "rewards": "reward",
    "next_observations": "next_observation",
    "next_actions": "next_action",
    "terminals": "terminal",
}


class OwnPicker(BasicTransitionPicker):
    """The basic one under another name, which is asked for every row."""


class OwnBuffer(InfiniteBuffer):
    """One whose rows are read by their numbers."""


def plain(**options: Any) -> ReplayBuffer:
    return dataset_of(episodes(), **options)


def with_dropped_rows(**options: Any) -> ReplayBuffer:
    return dataset_of(episodes(), buffer=FIFOBuffer(limit=50), **options)


def with_a_dropped_repeat(**options: Any) -> ReplayBuffer:
    return dataset_of([*episodes(2)] * 3, buffer=FIFOBuffer(limit=57), **options)


def repeated_side_by_side(**options: Any) -> ReplayBuffer:
    first, *rest = episodes(3)
    return dataset_of([first] * 5 + rest, **options)


def repeated_with_others_between(**options: Any) -> ReplayBuffer:
    return dataset_of([*episodes(3), *episodes(1, seed=1)] * 2 + episodes(1, seed=1), **options)


def interleaved(limit: int | None = None, **options: Any) -> ReplayBuffer:
    """Steps of one episode, with whole episodes in between; then an episode under way."""
    whole, between, again = episodes(3)
    dataset = dataset_of([between], buffer=FIFOBuffer(limit) if limit else InfiniteBuffer(), **options)
    for step in range(len(whole)):
        if step in (4, 5, 11):
            dataset.append_episode(again if step == 11 else between)
        dataset.append(whole.observations[step], whole.actions[step], whole.rewards[step])
    dataset.clip_episode(True)
    for step in range(6):
        dataset.append(again.observations[step], again.actions[step], again.rewards[step])
    return dataset


def interleaved_and_dropped(**options: Any) -> ReplayBuffer:
    return interleaved(limit=50, **options)


def read_by_number(**options: Any) -> ReplayBuffer:
    first, second = episodes(2)
    return dataset_of([first, first, second], buffer=OwnBuffer(), **options)


DATASETS = [
    plain,
    with_dropped_rows,
    with_a_dropped_repeat,
    repeated_side_by_side,
    repeated_with_others_between,
    interleaved,
    interleaved_and_dropped,
    read_by_number,
]


def assert_row(transitions: Transitions, row: int, picked: Any) -> None:
    """Row `row` is one that the host's picker gave."""
    for name, its_name in FIELDS.items():
        expected = np.asarray(getattr(picked, its_name), dtype=np.float32)
        np.testing.assert_array_equal(getattr(transitions, name)[row].reshape(expected.shape).numpy(), expected, name)


@pytest.mark.parametrize("picker", [BasicTransitionPicker(), OwnPicker()])
@pytest.mark.parametrize("made", DATASETS)
def test_rows_are_those_of_the_hosts_buffer(made: Any, picker: Any) -> None:
    dataset = made(transition_picker=picker)
    transitions = transitions_of(dataset)
    assert len(transitions) == dataset.transition_count
    for i in range(dataset.transition_count):
        assert_row(transitions, i, dataset.transition_picker(*dataset.buffer[i]))


@pytest.mark.parametrize("picker", [BasicTransitionPicker(), OwnPicker()])
@pytest.mark.parametrize("made", DATASETS)
def test_a_trajectory_ends_where_the_next_row_is_not_the_next_step(made: Any, picker: Any) -> None:
    dataset = made(transition_picker=picker)
    transitions = transitions_of(dataset)
    rows = [dataset.buffer[i] for i in range(dataset.transition_count)]
    follows = [one[0] is two[0] and two[1] == one[1] + 1 for one, two in itertools.pairwise(rows)]
    assert (transitions.terminals + transitions.timeouts).tolist() == [float(not goes_on) for goes_on in follows] + [1]


def test_an_oversampled_dataset_has_all_its_rows_in_one_run_for_each_repeat() -> None:
    dataset = repeated_side_by_side()
    assert len(dataset.episodes) == 3
    assert len(transitions_of(dataset)) == 142
    assert len(runs_of(rows_of(dataset))) == 7


@pytest.mark.parametrize("made", DATASETS)
def test_returns_to_go_are_those_of_the_rows_drawn(made: Any, drawn: list[Transitions]) -> None:
    dataset = made()
    base = small(CalQLConfig, reward_scaler=MultiplyRewardScaler(0.5))
    algo = built(C4Config(base=base, n_clusters=2, seed=0), dataset)
    seen: list[Any] = []
    update = type(algo.impl).inner_update

    def keep(batch: Any, grad_step: int) -> Any:
        seen.append(batch)
        return update(algo.impl, batch, grad_step)

    algo.impl.inner_update = keep
    algo.fit(dataset, n_steps=3, n_steps_per_epoch=3, **QUIET)
    for batch, rows in zip(seen, drawn, strict=True):
        for i, row in enumerate(rows.indices.tolist()):
            picked = dataset.transition_picker(*dataset.buffer[row])
            np.testing.assert_array_equal(batch.observations[i].numpy(), picked.observation)
            np.testing.assert_array_equal(batch.rewards[i].numpy(), 0.5 * picked.reward)
            rewards = 0.5 * picked.rewards_to_go
            powers = (0.99 ** np.arange(len(rewards))).astype(np.float32).reshape(-1, 1)
            np.testing.assert_array_equal(batch.returns_to_go[i].numpy(), np.sum(powers * rewards, axis=0))
    assert torch.equal(batch.returns_to_go, returns_to_go_of(dataset, algo)[rows.indices])


def test_parts_of_observations_are_repeated_together() -> None:
    parts = [
        Episode(
            observations=[part.observations, part.observations[:, :2]],
            actions=part.actions,
            rewards=part.rewards,
            terminated=part.terminated,
        )
        for part in episodes(2)
    ]
    dataset = dataset_of([parts[0], *parts, parts[0]])
    transitions = transitions_of(dataset)
    for i in range(dataset.transition_count):
        picked = dataset.transition_picker(*dataset.buffer[i])
        for name in ("observations", "next_observations"):
            for part, expected in zip(getattr(transitions, name), getattr(picked, FIELDS[name]), strict=True):
                np.testing.assert_array_equal(part[i].numpy(), expected)
