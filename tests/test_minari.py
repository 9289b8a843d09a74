"""Minari: episodes of T + 1 observations become T transitions each, whatever the spaces hold."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import minari
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from c4buffer import ClusteredReplayBuffer, Transitions, load_minari

LINE = spaces.Box(-np.inf, np.inf, (2,), np.float64)
FORCE = spaces.Box(-1, 1, (1,), np.float32)


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))


def episode(first: int, steps: int, *, end: str | None = None, observe: Any = None, act: Any = None) -> Any:
    """Observations count up from `first`; the last step is a "termination", a "truncation", or neither."""
    count = np.arange(first, first + steps + 1)
    last = np.arange(1, steps + 1) == steps
    return minari.data_collector.EpisodeBuffer(
        observations=np.stack([count, 10.0 * count], axis=1) if observe is None else observe(count),
        actions=(count[:-1, None] / 100).astype(np.float32) if act is None else act(count[:-1]),
        rewards=(-count[:-1]).astype(np.float64).tolist(),
        terminations=(last & (end == "termination")).tolist(),
        truncations=(last & (end == "truncation")).tolist(),
    )


def stored(*episodes: Any, observation_space: Any = LINE, action_space: Any = FORCE, name: str = "counted") -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Minari misses the authors' names
        return minari.create_dataset_from_buffers(
            f"line/{name}-v0",
            list(episodes),
            observation_space=observation_space,
            action_space=action_space,
            data_format="hdf5",
        )


@pytest.fixture
def three() -> Any:
    """Rows 0 to 2 end in a termination, 3 and 4 in a truncation, 5 and 6 are cut off."""
    return stored(episode(0, 3, end="termination"), episode(10, 2, end="truncation"), episode(20, 2))


def test_an_episode_of_t_plus_one_observations_is_t_transitions(three: Any) -> None:
    data = load_minari("line/counted-v0")
    assert isinstance(data.observations, Tensor)
    assert isinstance(data.next_observations, Tensor)
    now = [0, 1, 2, 10, 11, 20, 21]
    assert data.observations.tolist() == [[row, 10 * row] for row in now]
    assert data.next_observations.tolist() == [[row + 1, 10 * (row + 1)] for row in now]
    assert data.rewards.tolist() == [-row for row in now]
    torch.testing.assert_close(data.actions.squeeze(1), torch.tensor(now) / 100)
    assert data.terminals.tolist() == [0, 0, 1, 0, 0, 0, 0]
    assert data.timeouts.tolist() == [0, 0, 0, 0, 1, 0, 1]
    assert data.has_next_actions.tolist() == [1, 1, 0, 1, 0, 1, 0]
    torch.testing.assert_close(data.next_actions.squeeze(1), torch.tensor([1, 2, 2, 11, 11, 21, 21]) / 100)
    assert {data.observations.dtype, data.actions.dtype, data.rewards.dtype} == {torch.float32}


def test_a_dataset_at_hand_may_be_filtered(three: Any) -> None:
    assert three.total_steps == len(load_minari(three)) == 7
    long = three.filter_episodes(lambda each: len(each) > 2)
    assert load_minari(long).rewards.tolist() == [0, -1, -2]


def test_floating_values_take_the_default_dtype(three: Any) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        data = load_minari(three)
    finally:
        torch.set_default_dtype(torch.float32)
    assert isinstance(data.observations, Tensor)
    assert {data.observations.dtype, data.actions.dtype, data.rewards.dtype} == {torch.float64}


GOALS = spaces.Dict({"observation": LINE, "desired_goal": spaces.Box(-1, 1, (1,), np.float64)})


def with_goal(count: np.ndarray) -> dict[str, np.ndarray]:
    return {"observation": np.stack([count, 10.0 * count], axis=1), "desired_goal": np.full((len(count), 1), 0.5)}


def test_goals_come_along_in_a_dict_or_as_chosen() -> None:
    dataset = stored(episode(0, 3, observe=with_goal), observation_space=GOALS)
    whole = load_minari(dataset)
    assert isinstance(whole.observations, dict)
    assert {key: list(value.shape) for key, value in whole.observations.items()} == {
        "observation": [3, 2],
        "desired_goal": [3, 1],
    }
    alone = load_minari(dataset, observations=lambda given: given["observation"])
    beside = load_minari(
        dataset, observations=lambda given: np.concatenate([given["observation"], given["desired_goal"]], axis=1)
    )
    assert isinstance(alone.next_observations, Tensor)
    assert isinstance(beside.next_observations, Tensor)
    assert alone.next_observations.tolist() == [[1, 10], [2, 20], [3, 30]]
    assert beside.next_observations.tolist() == [[1, 10, 0.5], [2, 20, 0.5], [3, 30, 0.5]]
    assert len(ClusteredReplayBuffer.from_transitions(whole).sample(4)) == 4


def test_tuples_images_and_discrete_actions() -> None:
    def see(count: np.ndarray) -> tuple[np.ndarray, ...]:
        images = np.broadcast_to(count[:, None, None, None], (len(count), 3, 4, 4)).astype(np.uint8)
        return images, np.stack([count, -count], axis=1).astype(np.float32)

    dataset = stored(
        episode(0, 3, end="truncation", observe=see, act=lambda count: count % 2),
        observation_space=spaces.Tuple(
            [spaces.Box(0, 255, (3, 4, 4), np.uint8), spaces.Box(-np.inf, np.inf, (2,), np.float32)]
        ),
        action_space=spaces.Discrete(2),
    )
    data = load_minari(dataset)
    assert isinstance(data.observations, tuple)
    assert [leaf.dtype for leaf in data.observations] == [torch.uint8, torch.float32]
    assert data.observations[0][:, 0, 0, 0].tolist() == [0, 1, 2]
    assert data.actions.tolist() == [0, 1, 0]
    assert data.actions.dtype == torch.int64


def test_the_same_as_d3rlpy_reads(three: Any) -> None:
    """An oracle: d3rlpy's own dataset of the same episodes, read back as transitions."""
    d3rlpy = pytest.importorskip("d3rlpy")
    from c4buffer.integrations.d3rlpy import transitions_of

    episodes = [
        d3rlpy.dataset.Episode(
            each.observations[:-1].astype(np.float32),
            each.actions,
            each.rewards[:, None].astype(np.float32),
            bool(each.terminations[-1]),
        )
        for each in three.iterate_episodes()
    ]
    theirs = transitions_of(d3rlpy.dataset.ReplayBuffer(d3rlpy.dataset.InfiniteBuffer(), episodes=episodes))
    ours = load_minari(three)
    # d3rlpy has no observation after a timeout and leaves that row out.
    kept = ours[(ours.timeouts == 0)]
    for name in ("observations", "actions", "rewards", "terminals"):
        assert torch.equal(getattr(kept, name), getattr(theirs, name)), name


# --- what it refuses -----------------------------------------------------------------------------------------------


def test_a_dataset_that_is_not_here_is_told_by_minari() -> None:
    with pytest.raises(FileNotFoundError, match="download=True"):
        load_minari("line/nowhere-v0")


def test_texts_are_named_and_can_be_left_out() -> None:
    def read(count: np.ndarray) -> dict[str, Any]:
        return {"words": ["go"] * len(count), "place": np.stack([count, 10.0 * count], axis=1)}

    dataset = stored(
        episode(0, 2, observe=read), observation_space=spaces.Dict({"words": spaces.Text(5), "place": LINE})
    )
    with pytest.raises(ValueError, match=r"^episode 0: observations\['words'\]: expected one array .*, got list$"):
        load_minari(dataset)
    assert len(load_minari(dataset, observations=lambda given: given["place"])) == 2


def test_an_observation_short_of_t_plus_one_and_a_bad_number_name_the_episode(three: Any) -> None:
    with pytest.raises(ValueError, match=r"^episode 0: actions: expected 2 rows, as many as observations, got 3$"):
        load_minari(three, observations=lambda given: given[1:])
    broken = stored(episode(0, 3), replace(episode(10, 2), rewards=[0.0, float("nan")]), name="broken")
    with pytest.raises(ValueError, match=r"^episode 1: rewards: expected finite values, got nan in row 1"):
        load_minari(broken)


def test_an_empty_choice_of_episodes_is_told(three: Any) -> None:
    none = three.filter_episodes(lambda each: len(each) > 9)
    with pytest.raises(ValueError, match=r"^dataset: expected at least one step, got none$"):
        load_minari(none)


def test_episodes_that_differ_in_form_are_refused(three: Any) -> None:
    def widths(given: np.ndarray) -> np.ndarray:
        return given if given[0, 0] < 20 else given[:, :1]

    with pytest.raises(ValueError, match=r"^parts: expected the form of observations"):
        load_minari(three, observations=widths)
    assert isinstance(load_minari(three), Transitions)


def test_a_part_without_an_axis_of_its_own_is_named_and_can_be_given_one() -> None:
    def facing(count: np.ndarray) -> dict[str, np.ndarray]:
        return {"direction": count % 4, "place": np.stack([count, 10.0 * count], axis=1)}

    dataset = stored(
        episode(0, 2, observe=facing), observation_space=spaces.Dict({"direction": spaces.Discrete(4), "place": LINE})
    )
    with pytest.raises(ValueError, match=r"^episode 0: observations\['direction'\]: expected \[T \+ 1, \.\.\.\]"):
        load_minari(dataset)
    data = load_minari(dataset, observations=lambda given: {**given, "direction": np.eye(4)[given["direction"]]})
    assert isinstance(data.observations, dict)
    assert data.observations["direction"].tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]


def test_arrays_that_are_read_only_are_taken(three: Any) -> None:
    def frozen(given: np.ndarray) -> np.ndarray:
        given.flags.writeable = False
        return given

    assert len(load_minari(three, observations=frozen)) == 7


def test_an_episode_without_a_step_is_passed_over() -> None:
    def episode(steps: int) -> Any:
        rows = np.arange(steps + 1.0)[:, None]
        flags = np.zeros(steps, dtype=bool)
        return SimpleNamespace(
            id=0, observations=rows, actions=rows[:-1], rewards=rows[:-1, 0], terminations=flags, truncations=flags
        )

    found = load_minari(SimpleNamespace(iterate_episodes=lambda: iter([episode(0), episode(2), episode(0)])))
    assert found.rewards.tolist() == [0, 1]
