"""Transitions: how rows are linked, closed, checked and taken."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from c4buffer import Transitions
from c4buffer.transitions import ends_of

few_examples = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def build(rows: int = 4, **fields: Any) -> Transitions:
    """Transitions whose i-th action is [i, -i], with any field replaced; a field that is None is left out."""
    here = torch.arange(rows, dtype=torch.float32)
    given_fields = {
        "observations": here.unsqueeze(1).repeat(1, 3),
        "actions": torch.stack([here, -here], dim=1),
        "rewards": 10 * here,
        "next_observations": here.unsqueeze(1).repeat(1, 3) + 1,
        "terminals": torch.zeros(rows),
        **fields,
    }
    return Transitions(**{name: value for name, value in given_fields.items() if value is not None})


def linked_rows(transitions: Transitions) -> list[int]:
    """The row that each next action was taken from."""
    return transitions.next_actions[:, 0].int().tolist()


# Linking


def test_the_next_action_is_that_of_the_next_row_and_the_last_row_keeps_its_own() -> None:
    t = build(4)
    assert linked_rows(t) == [1, 2, 3, 3]
    assert t.has_next_actions.tolist() == [1, 1, 1, 0]
    assert torch.equal(t.next_actions, t.actions[[1, 2, 3, 3]])


@pytest.mark.parametrize("ends", ["terminals", "timeouts"])
def test_no_next_action_is_linked_across_an_end(ends: str) -> None:
    t = build(5, **{ends: torch.tensor([0, 1, 0, 0, 0])})
    assert linked_rows(t) == [1, 1, 3, 4, 4]
    assert t.has_next_actions.tolist() == [1, 0, 1, 1, 0]


def test_intervals_link_as_many_rows_on_and_never_into_the_next_episode() -> None:
    t = build(6, timeouts=torch.tensor([0, 0, 0, 1, 0, 0]), intervals=torch.tensor([2, 2, 1, 1, 1, 3]))
    assert linked_rows(t) == [2, 3, 3, 3, 5, 5]
    assert t.has_next_actions.tolist() == [1, 1, 1, 0, 1, 0]
    assert t.intervals.tolist() == [2, 2, 1, 1, 1, 3]


def test_an_interval_beyond_the_data_links_nothing() -> None:
    assert build(3, intervals=torch.tensor([7.0, 1e30, 1.0])).has_next_actions.tolist() == [0, 0, 0]


@few_examples
@given(
    ends=st.lists(st.sampled_from([(0, 0), (0, 0), (1, 0), (0, 1), (1, 1)]), min_size=1, max_size=12),
    data=st.data(),
)
def test_linking_agrees_with_a_walk_along_each_episode(ends: list[tuple[int, int]], data: st.DataObject) -> None:
    rows = len(ends)
    intervals = data.draw(st.lists(st.integers(1, 4), min_size=rows, max_size=rows))
    terminals, timeouts = zip(*ends)
    t = build(
        rows,
        terminals=torch.tensor(terminals),
        timeouts=torch.tensor(timeouts),
        intervals=torch.tensor(intervals),
    )
    for row in range(rows):
        ahead = row
        while not any(ends[ahead]) and ahead + 1 < rows and ahead - row < intervals[row]:
            ahead += 1
        reached = ahead - row == intervals[row]
        assert linked_rows(t)[row] == (ahead if reached else row)
        assert t.has_next_actions[row] == reached


def test_given_next_actions_are_used_as_they_are_even_at_ends() -> None:
    next_actions = torch.full((4, 2), 7.0)
    t = build(4, next_actions=next_actions, terminals=torch.tensor([0, 1, 0, 0]))
    assert torch.equal(t.next_actions, next_actions)
    assert t.has_next_actions.tolist() == [1, 1, 1, 1]


def test_given_next_actions_may_say_where_they_are_real() -> None:
    t = build(3, next_actions=torch.ones(3, 2), has_next_actions=torch.tensor([1, 0, 1]))
    assert t.has_next_actions.tolist() == [1, 0, 1]


# Closing


def test_an_open_last_row_becomes_a_timeout() -> None:
    given_timeouts = torch.tensor([0.0, 1.0, 0.0])
    assert build(3).timeouts.tolist() == [0, 0, 1]
    assert build(3, timeouts=given_timeouts).timeouts.tolist() == [0, 1, 1]
    assert given_timeouts.tolist() == [0, 1, 0], "the caller's tensor was written to"


def test_a_terminal_last_row_is_not_a_timeout() -> None:
    assert build(3, terminals=torch.tensor([0, 0, 1])).timeouts.tolist() == [0, 0, 0]


def test_indexing_and_to_neither_close_nor_link() -> None:
    t = build(5)
    part = t[1:3]
    assert part.timeouts.tolist() == [0, 0]
    assert linked_rows(part) == [2, 3]
    assert part.has_next_actions.tolist() == [1, 1]
    assert t.to("cpu")[:2].timeouts.tolist() == [0, 0]
    assert linked_rows(t[[3, 0]]) == [4, 1]


def test_concatenate_neither_closes_nor_links_across_its_parts() -> None:
    t = build(5)
    joined = Transitions.concatenate([t[:2], t[3:]])
    assert joined.timeouts.tolist() == [0, 0, 0, 1]
    assert linked_rows(joined) == [1, 2, 4, 4]
    assert joined.has_next_actions.tolist() == [1, 1, 1, 0]
    assert joined.rewards.tolist() == [0, 10, 30, 40]
    assert joined.indices is None
    assert joined.cluster == -1


# Forms


def test_scalars_may_come_as_columns() -> None:
    flat = build(
        3,
        timeouts=torch.tensor([0, 1, 0]),
        intervals=torch.tensor([1, 1, 2]),
        next_actions=torch.ones(3, 2),
        has_next_actions=torch.tensor([1, 0, 1]),
    )
    scalars = ("rewards", "terminals", "timeouts", "intervals", "has_next_actions")
    columns = build(3, next_actions=torch.ones(3, 2), **{name: getattr(flat, name).unsqueeze(1) for name in scalars})
    for name in scalars:
        assert getattr(columns, name).shape == (3,)
        assert torch.equal(getattr(columns, name), getattr(flat, name))


def test_arrays_and_lists_become_tensors_and_keep_their_precision() -> None:
    t = Transitions(
        observations=np.arange(6, dtype=np.float64).reshape(3, 2),
        actions=[[0.0], [1.0], [2.0]],
        rewards=np.ones(3, dtype=np.float32),
        next_observations=np.zeros((3, 2)),
        terminals=np.array([False, True, False]),
        timeouts=[0, 0, 0],
    )
    assert all(isinstance(value, Tensor) for _, value in t.columns())
    assert t.observations.dtype == torch.float64
    assert t.rewards.dtype == torch.float32
    assert t.terminals.tolist() == [0, 1, 0]
    assert t.terminals.dtype == t.rewards.dtype


def test_whole_rewards_become_floating() -> None:
    assert build(3, rewards=torch.tensor([0, 1, 2])).rewards.dtype == torch.get_default_dtype()


def test_discrete_actions_are_kept_as_int64_whatever_their_shape_and_width() -> None:
    for actions in (torch.tensor([2, 0, 1]), torch.tensor([[2], [0], [1]], dtype=torch.uint8)):
        t = build(3, actions=actions)
        assert t.actions.dtype == torch.int64
        assert t.actions.tolist() == [2, 0, 1]
        assert t.next_actions.tolist() == [0, 1, 1]


def test_observations_may_be_a_dict_or_a_tuple_with_images() -> None:
    image, vector = torch.zeros(3, 2, 4, 4, dtype=torch.uint8), torch.arange(6.0).reshape(3, 2)
    as_dict = build(
        3,
        observations={"image": image, "vector": vector},
        next_observations={"vector": vector + 1, "image": image},
    )
    assert as_dict[1:].observations["vector"].tolist() == [[2, 3], [4, 5]]
    assert as_dict[1:].observations["image"].dtype == torch.uint8
    as_tuple = build(3, observations=(image, vector), next_observations=(image, vector + 1))
    assert as_tuple[[2]].next_observations[1].tolist() == [[5, 6]]
    twice = Transitions.concatenate([as_tuple, as_tuple])
    assert [leaf.shape[0] for leaf in twice.observations] == [6, 6]
    assert Transitions.concatenate([as_dict, as_dict]).next_observations["vector"][3:].tolist() == (vector + 1).tolist()


def test_a_record_is_frozen() -> None:
    t = build(2)
    for name, value in t.columns():
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(t, name, value)
        with pytest.raises(dataclasses.FrozenInstanceError):
            delattr(t, name)


def test_to_moves_every_tensor_and_keeps_indices_and_cluster() -> None:
    drawn = Transitions.unchecked(dict(build(3).columns()), indices=torch.tensor([5, 6, 7]), cluster=2)
    moved = drawn.to("meta")
    assert {value.device.type for _, value in moved.columns()} == {"meta"}
    assert moved.indices is not None
    assert moved.indices.device.type == "meta"
    assert moved.cluster == 2


# Indexing


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (2, [2]),
        (-1, [4]),
        (-5, [0]),
        (np.int64(3), [3]),
        (torch.tensor(3), [3]),
        (np.array(3), [3]),
        (slice(1, 4), [1, 2, 3]),
        (slice(None, None, 2), [0, 2, 4]),
        ([4, 0, 0], [4, 0, 0]),
        (torch.tensor([3, 1]), [3, 1]),
        (np.array([3, 1]), [3, 1]),
        (torch.tensor([True, False, False, True, False]), [0, 3]),
        (np.array([True, False, False, True, False]), [0, 3]),
        (slice(2, 2), []),
    ],
)
def test_every_kind_of_index_takes_the_same_rows_of_every_field(index: Any, rows: list[int]) -> None:
    t = Transitions.unchecked(dict(build(5).columns()), indices=torch.arange(5) + 100, cluster=1)
    part = t[index]
    assert len(part) == len(rows)
    assert part.indices is not None
    assert part.indices.tolist() == [100 + row for row in rows]
    assert part.cluster == 1
    for (name, value), (_, whole) in zip(part.columns(), t.columns()):
        assert torch.equal(value, whole[rows]), name


@pytest.mark.parametrize("index", [5, -6, np.int64(5), torch.tensor(-6)])
def test_a_row_that_is_not_there_is_an_index_error(index: Any) -> None:
    with pytest.raises(IndexError, match=re.escape("index: expected a row of 5 transitions, got")):
        build(5)[index]


def test_iterating_gives_single_rows() -> None:
    assert [(len(row), row.rewards.item()) for row in build(3)] == [(1, 0), (1, 10), (1, 20)]


# Errors


def nan_at(*rows: int) -> Tensor:
    values = torch.zeros(4)
    values[list(rows)] = float("nan")
    return values


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rewards": nan_at(1, 3)}, "rewards: expected finite values, got nan in row 1 (2 of 4 rows are bad)"),
        (
            {"rewards": torch.tensor([0, 0, 0, -torch.inf])},
            "rewards: expected finite values, got -inf in row 3 (1 of 4 rows are bad)",
        ),
        ({"actions": nan_at(2).unsqueeze(1)}, "actions: expected finite values, got nan in row 2"),
        (
            {"next_actions": nan_at(2).unsqueeze(1).repeat(1, 2)},
            "next_actions: expected finite values, got nan in row 2",
        ),
        ({"observations": nan_at(0).unsqueeze(1)}, "observations: expected finite values, got nan in row 0"),
        (
            {"next_observations": nan_at(3).unsqueeze(1).repeat(1, 3)},
            "next_observations: expected finite values, got nan in row 3",
        ),
        ({"rewards": torch.zeros(5)}, "rewards: expected 4 rows, as many as observations, got 5"),
        ({"actions": torch.zeros(3, 2)}, "actions: expected 4 rows, as many as observations, got 3"),
        ({"actions": torch.zeros(3, dtype=torch.int64)}, "actions: expected 4 rows, as many as observations, got 3"),
        ({"terminals": torch.zeros(3)}, "terminals: expected 4 rows, as many as observations, got 3"),
        ({"timeouts": torch.zeros(5)}, "timeouts: expected 4 rows, as many as observations, got 5"),
        ({"intervals": torch.ones(1)}, "intervals: expected 4 rows, as many as observations, got 1"),
        (
            {"next_observations": torch.zeros(3, 3)},
            "next_observations: expected the form of observations, [4, 3] torch.float32, got [3, 3] torch.float32",
        ),
        ({"rewards": torch.zeros(4, 2)}, "rewards: expected [N] or [N, 1], got [4, 2]"),
        ({"rewards": torch.tensor(0.0)}, "rewards: expected [N] or [N, 1], got []"),
        ({"observations": torch.zeros(4)}, "observations: expected [N, ...] with at least one axis after N, got [4]"),
        ({"observations": {}}, "observations: expected at least one tensor, got an empty structure"),
        (
            {"observations": (torch.zeros(4, 1), torch.zeros(3, 1))},
            "observations: expected 4 rows in every part, got 3",
        ),
        ({"observations": torch.zeros(0, 3)}, "observations: expected at least one transition, got none"),
        (
            {"observations": {"a": torch.zeros(4, 3)}, "next_observations": {"b": torch.zeros(4, 3)}},
            "next_observations: expected the form of observations, {'a': [4, 3] torch.float32}, "
            "got {'b': [4, 3] torch.float32}",
        ),
        (
            {"next_observations": (torch.zeros(4, 3),)},
            "next_observations: expected the form of observations, [4, 3] torch.float32, got ([4, 3] torch.float32)",
        ),
        (
            {"next_observations": torch.zeros(4, 3, dtype=torch.float64)},
            "next_observations: expected the form of observations, [4, 3] torch.float32, got [4, 3] torch.float64",
        ),
        (
            {"actions": torch.zeros(4)},
            "actions: expected [N, A] for continuous or integer [N] for discrete actions, got torch.float32 [4]",
        ),
        ({"actions": torch.zeros(4, 2, dtype=torch.int64)}, "actions: expected [N] or [N, 1], got [4, 2]"),
        ({"actions": torch.tensor(3)}, "actions: expected [N] or [N, 1], got []"),
        ({"actions": torch.zeros(4, dtype=torch.bool)}, "actions: expected floating or integer values, got bool"),
        (
            {"next_actions": torch.zeros(4, 3)},
            "next_actions: expected the shape and dtype of actions, [4, 2] torch.float32, got [4, 3] torch.float32",
        ),
        (
            {"next_actions": torch.zeros(4, dtype=torch.int64)},
            "next_actions: expected the shape and dtype of actions, [4, 2] torch.float32, got [4] torch.int64",
        ),
        (
            {"has_next_actions": torch.ones(4)},
            "has_next_actions: expected to come together with next_actions, got it alone",
        ),
        ({"terminals": torch.tensor([0, 1, 2, 2])}, "terminals: expected 0 or 1, got 2.0 in row 2"),
        ({"terminals": nan_at(1)}, "terminals: expected 0 or 1, got nan in row 1"),
        ({"timeouts": torch.tensor([0.0, 0.5, 0.0, 0.0])}, "timeouts: expected 0 or 1, got 0.5 in row 1"),
        (
            {"next_actions": torch.zeros(4, 2), "has_next_actions": torch.tensor([1, -1, 0, 0])},
            "has_next_actions: expected 0 or 1, got -1.0 in row 1",
        ),
        ({"intervals": torch.tensor([1, 0, 1, 1])}, "intervals: expected whole numbers from 1, got 0.0 in row 1"),
        ({"intervals": torch.tensor([1, 1, 1.5, 1])}, "intervals: expected whole numbers from 1, got 1.5 in row 2"),
        (
            {"intervals": torch.tensor([1, 1, 1, torch.inf])},
            "intervals: expected whole numbers from 1, got inf in row 3",
        ),
    ],
)
def test_wrong_input_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        build(4, **fields)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (list, "parts: expected at least one Transitions, got none"),
        (
            lambda: [build(2), build(3, observations=torch.zeros(3, 5), next_observations=torch.zeros(3, 5))],
            "parts: expected the form of observations, [N, 3] torch.float32, got [N, 5] torch.float32",
        ),
        (
            lambda: [build(2), build(3, actions=torch.zeros(3, 7))],
            "parts: expected the form of actions, [N, 2] torch.float32, got [N, 7] torch.float32",
        ),
        (
            lambda: [build(2), build(3, actions=torch.zeros(3, dtype=torch.int64))],
            "parts: expected the form of actions, [N, 2] torch.float32, got [N] torch.int64",
        ),
    ],
)
def test_concatenate_refuses_parts_that_do_not_fit(parts: Callable[[], list[Transitions]], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Transitions.concatenate(parts())


def test_concatenate_takes_parts_as_they_come() -> None:
    assert len(Transitions.concatenate(build(rows) for rows in (2, 3))) == 5


def test_replace_keeps_what_it_is_not_given(make_transitions: Callable[..., Transitions]) -> None:
    batch = make_transitions(6)
    batch = Transitions.unchecked(
        {**dict(batch.columns()), "timeouts": torch.zeros(6)}, indices=torch.arange(6), cluster=2
    )
    shaped = batch.replace(rewards=2 * batch.rewards)
    assert torch.equal(shaped.rewards, 2 * batch.rewards)
    assert shaped.timeouts.tolist() == [0] * 6
    assert shaped.cluster == 2
    assert torch.equal(shaped.indices, torch.arange(6))
    with pytest.raises(ValueError, match="rewards: expected finite values"):
        batch.replace(rewards=batch.rewards / 0)
    with pytest.raises(ValueError, match="fields: expected names among observations, .*, got reward"):
        batch.replace(reward=batch.rewards)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, None, 2, 3], "rewards: expected numbers in one shape, got list"),
        ("abc", "rewards: expected numbers in one shape, got str"),
        (np.array([1j, 2, 3, 4]), "rewards: expected real numbers, got torch.complex128"),
        (torch.ones(4).to_sparse(), "rewards: expected a dense tensor, got torch.sparse_coo"),
    ],
)
def test_values_that_are_no_numbers_are_named(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(4).replace(rewards=values)


def test_a_part_of_an_observation_that_is_no_array_is_named() -> None:
    with pytest.raises(ValueError, match=r"^observations\['words'\]: expected numbers in one shape, got list"):
        Transitions(
            observations={"words": ["a", "b"]}, actions=[0, 1], rewards=[0, 0], next_observations=0, terminals=[0, 0]
        )


def test_arrays_that_are_reversed_or_read_only_are_taken() -> None:
    frozen = np.arange(4.0)
    frozen.flags.writeable = False
    for values in (np.arange(4.0)[::-1], frozen):
        assert build(4).replace(rewards=values).rewards.tolist() == values.tolist()


def test_more_rows_than_half_precision_counts_are_linked() -> None:
    rows = 70_000
    columns = {name: torch.zeros(rows, 1, dtype=torch.float16) for name in ("observations", "next_observations")}
    actions = torch.arange(rows).double().unsqueeze(1)
    t = Transitions(**columns, actions=actions, rewards=torch.zeros(rows).half(), terminals=torch.zeros(rows))
    assert torch.equal(t.next_actions[:-1], actions[1:])


def test_replaced_timeouts_are_what_was_given() -> None:
    t = build(4)[torch.tensor([0, 1])]  # drawn: no row of them is the end of a recording
    assert t.replace(timeouts=t.timeouts).timeouts.tolist() == [0, 0]
    assert t.replace(timeouts=[1, 0]).timeouts.tolist() == [1, 0]
    with pytest.raises(ValueError, match="timeouts: expected 0 or 1"):
        t.replace(timeouts=[2, 0])


def test_a_trajectory_ends_at_flags_where_the_next_row_is_elsewhere_and_at_the_last_row() -> None:
    states = torch.arange(6.0).unsqueeze(1)
    following = states + 1
    following[3] = 7.0  # row 4 is not there
    data = Transitions(
        observations={"a": torch.zeros(6, 2), "b": states},
        actions=states,
        rewards=torch.zeros(6),
        next_observations={"a": torch.zeros(6, 2), "b": following},
        terminals=torch.tensor([0, 1, 0, 0, 0, 0]),
    )[:5]
    assert ends_of(data).tolist() == [False, True, False, True, True]
    assert data.timeouts.tolist() == [0] * 5


def test_next_actions_of_another_precision_are_refused() -> None:
    rows = torch.zeros(4, 2)
    message = r"^next_actions: expected the shape and dtype of actions, \[4, 2\] torch.float32, got .* torch.float64$"
    with pytest.raises(ValueError, match=message):
        Transitions(
            observations=rows,
            actions=rows,
            rewards=rows[:, 0],
            next_observations=rows,
            terminals=rows[:, 0],
            next_actions=rows.double(),
        )
