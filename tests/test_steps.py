"""Steps of environments as rows."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

from c4buffer import ClusteredReplayBuffer, Transitions
from c4buffer.steps import step_of


def test_one_environments_step_is_one_row_whose_episode_goes_on() -> None:
    step = step_of(np.array([1.0, 2.0]), np.array([0.5]), 3.0, np.array([3.0, 4.0]), False)
    assert step.observations.tolist() == [[1.0, 2.0]]
    assert step.next_actions.tolist() == step.actions.tolist() == [[0.5]]
    assert (step.rewards.tolist(), step.terminals.tolist(), step.timeouts.tolist()) == ([3.0], [0.0], [0.0])
    assert step.has_next_actions.tolist() == [0.0]


def test_several_environments_have_a_leading_axis() -> None:
    step = step_of(torch.zeros(3, 2), torch.zeros(3, 1), [1, 2, 3], torch.zeros(3, 2), [0, 1, 0], [0, 0, 1])
    assert len(step) == 3
    assert step.terminals.tolist() == [0.0, 1.0, 0.0]
    assert step.timeouts.tolist() == [0.0, 0.0, 1.0]


def test_arrays_of_doubles_come_in_torchs_default_dtype_and_tensors_as_they_are() -> None:
    column = np.zeros((2, 1))
    assert step_of(column, column, [0.0, 0.0], column, [0, 0]).observations.dtype == torch.float32
    doubles = torch.zeros(2, 1, dtype=torch.float64)
    assert step_of(doubles, doubles, [0.0, 0.0], doubles, [0, 0]).observations.dtype == torch.float64


def test_parts_of_a_dict_and_of_a_tuple_are_read_each() -> None:
    def rows(observation: object) -> Transitions:
        return step_of(observation, 1, 0.0, observation, False)

    keyed = rows({"image": np.zeros((1, 2, 2), np.uint8), "speed": [1.0]})
    assert isinstance(keyed.observations, dict)
    assert {key: (list(part.shape), part.dtype) for key, part in keyed.observations.items()} == {
        "image": ([1, 1, 2, 2], torch.uint8),
        "speed": ([1, 1], torch.float32),
    }
    pair = rows(([1.0], [2.0, 3.0]))
    assert isinstance(pair.observations, tuple)
    assert [list(part.shape) for part in pair.observations] == [[1, 1], [1, 2]]


@pytest.mark.parametrize("name", ["observations", "actions", "terminals"])
def test_what_fits_no_row_is_named(name: str) -> None:
    step = {
        "observations": torch.zeros(2, 1),
        "actions": torch.zeros(2, 1),
        "rewards": torch.zeros(2),
        "next_observations": torch.zeros(2, 1),
        "terminals": torch.zeros(2),
    }
    step[name] = torch.zeros(3, 1)
    with pytest.raises(ValueError, match=name if name != "observations" else "observations: expected"):
        step_of(**step)


def test_an_axis_of_rewards_alone_is_refused() -> None:
    buffer = ClusteredReplayBuffer(4)
    for observation, action in [([0.0, 1.0, 2.0], 1), ([[0.0, 1.0, 2.0]], 1), ([0.0, 1.0, 2.0], [1])]:
        name = "actions" if action == 1 else "observations"
        with pytest.raises(ValueError, match=rf"^{name}: expected an axis of 1 first, like rewards .*, got \["):
            buffer.add(observation, action, [0.5], observation, [False])
    assert len(buffer) == 0


@pytest.mark.parametrize(("held", "added"), [(torch.uint8, torch.float32), (torch.float32, torch.uint8)])
def test_only_floats_are_cast_and_only_to_floats(held: torch.dtype, added: torch.dtype) -> None:
    buffer = ClusteredReplayBuffer(4)
    images = torch.zeros(2, 1, 2, 2)
    buffer.add(images[0].to(held), [0.5], 1.0, images[1].to(held), 0)
    with pytest.raises(ValueError, match=f"^observations: expected rows like those stored, .* got .*{added}$"):
        buffer.add(images[0].to(added), [0.5], 1.0, images[1].to(added), 0)
    assert len(buffer) == 1


class Lazy:
    """Frames that become an array when they are asked for."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.arange(4.0).reshape(1, 2, 2)


def test_what_can_become_an_array_is_read_as_one() -> None:
    buffer = ClusteredReplayBuffer(3)
    buffer.add(Lazy(), [0.5], 1.0, Lazy(), False)
    assert buffer.rows().observations.dtype == torch.float32
    assert buffer.rows().observations[0].flatten().tolist() == [0, 1, 2, 3]
    buffer = ClusteredReplayBuffer(3)
    parts = MappingProxyType({"a": np.zeros(2), "b": Lazy()})
    buffer.add(parts, [0.5], 1.0, parts, False)
    assert set(buffer.rows().observations) == {"a", "b"}
