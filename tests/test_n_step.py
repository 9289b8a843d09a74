"""n-step transitions made when sampling, against a loop over written-down episodes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from c4buffer import ClusteredReplayBuffer, Critics, Transitions, stacked_gradients

GAMMA = 0.9
Row = dict[str, float]


def history(rows: int, environments: int, seed: int) -> tuple[list[list[Row]], list[Row]]:
    """Steps of several environments, and all rows in the order in which they came; each has the next row's index."""
    draw = random.Random(seed)
    steps: list[list[Row]] = []
    order: list[Row] = []
    last: dict[int, Row] = {}
    for _ in range(rows // environments):
        step = []
        for environment in range(environments):
            row = {
                "reward": draw.uniform(-1, 1),
                "state": float(len(order)),
                "terminal": float(draw.random() < 0.15),
                "timeout": float(draw.random() < 0.1),
                "next": -1.0,
            }
            if environment in last:
                last[environment]["next"] = row["state"]
            last.pop(environment, None)
            if not row["terminal"] and not row["timeout"]:
                last[environment] = row
            order.append(row)
            step.append(row)
        steps.append(step)
    return steps, order


def n_steps_from(order: list[Row], row: Row, n: int) -> tuple[float, Row, int]:
    """Discounted reward, last row and number of steps, as one would write it down."""
    total, last, count = row["reward"], row, 1
    while count < n and last["next"] >= 0:
        last = order[int(last["next"])]
        total += GAMMA**count * last["reward"]
        count += 1
    return total, last, count


def column(rows: list[Row], name: str) -> Tensor:
    return torch.tensor([row[name] for row in rows], dtype=torch.float64)


def transitions(rows: list[Row]) -> Transitions:
    """Records with the state's number as observation, action and, half a step on, next observation."""
    states = column(rows, "state").unsqueeze(1)
    columns = {
        "observations": states,
        "actions": states,
        "rewards": column(rows, "reward"),
        "next_observations": states + 0.5,
        "terminals": column(rows, "terminal"),
        "timeouts": column(rows, "timeout"),
        "next_actions": states + 0.25,
        "has_next_actions": column(rows, "next") >= 0,
        "intervals": torch.ones(len(rows), dtype=torch.float64),
    }
    return Transitions.unchecked(columns)


def check(buffer: ClusteredReplayBuffer, order: list[Row], n: int) -> None:
    batch = buffer.sample(300)
    seen = set()
    for i in range(300):
        row = order[int(batch.observations[i])]
        seen.add(row["state"])
        total, last, count = n_steps_from(order, row, n)
        assert float(batch.rewards[i]) == pytest.approx(total)
        assert float(batch.intervals[i]) == count
        assert float(batch.next_observations[i]) == last["state"] + 0.5
        assert (float(batch.terminals[i]), float(batch.timeouts[i])) == (last["terminal"], last["timeout"])
        assert float(batch.actions[i]) == row["state"]
    assert len(seen) > min(len(buffer), 300) / 3


@pytest.mark.parametrize("n", [2, 3, 7])
@pytest.mark.parametrize("capacity", [400, 90, 5])
@pytest.mark.parametrize("seed", range(3))
def test_extended_in_pieces_around_the_ring(n: int, capacity: int, seed: int) -> None:
    _, order = history(200, 1, seed)
    draw = random.Random(seed)
    buffer = ClusteredReplayBuffer(capacity, n_steps=n, discount=GAMMA, seed=seed)
    start = 0
    while start < len(order):
        stop = min(len(order), start + draw.choice((1, 2, 7, 40)))
        pieces = order[start:stop]
        buffer.extend(transitions(pieces))
        start = stop
        known = {id(row) for row in order[:stop]}
        so_far = [dict(row) for row in order[:stop]]
        for row, original in zip(so_far, order):
            if original["next"] >= stop:
                row["next"] = -1.0  # has not come yet
        assert len(known) == len(so_far)
        check(buffer, so_far, n)


@pytest.mark.parametrize("environments", [1, 3])
@pytest.mark.parametrize("capacity", [400, 50, 2])
def test_added_step_by_step_by_several_environments(environments: int, capacity: int) -> None:
    steps, order = history(210, environments, 1)
    buffer = ClusteredReplayBuffer(capacity, n_steps=4, discount=GAMMA, seed=0)
    for step in steps:
        rows = transitions(step)
        buffer.add(rows.observations, rows.actions, rows.rewards, rows.next_observations, rows.terminals, rows.timeouts)
    check(buffer, order, 4)


def test_one_step_is_what_it_always_was() -> None:
    _, order = history(100, 1, 0)
    plain = ClusteredReplayBuffer.from_transitions(transitions(order), seed=0)
    one = ClusteredReplayBuffer.from_transitions(transitions(order), seed=0, n_steps=1, discount=0.5)
    for (name, a), (_, b) in zip(plain.sample(50).columns(), one.sample(50).columns()):
        assert torch.equal(a, b), name


def test_gradients_are_those_of_the_n_step_transitions() -> None:
    _, order = history(100, 1, 0)
    seen: list[Transitions] = []

    def embedding(critics: Critics, batch: Transitions) -> Tensor:
        seen.append(batch)
        return stacked_gradients(critics, batch)

    buffer = ClusteredReplayBuffer.from_transitions(
        transitions(order), seed=0, n_steps=3, discount=GAMMA, embedding=embedding
    )
    q = nn.Bilinear(1, 1, 1, dtype=torch.float64)
    buffer.refresh(Critics(q, q))
    batch = seen[0]
    for i, row in enumerate(order):
        total, last, count = n_steps_from(order, row, 3)
        assert float(batch.rewards[i]) == pytest.approx(total)
        assert float(batch.next_observations[i]) == last["state"] + 0.5
        assert float(batch.intervals[i]) == count


def test_a_checkpoint_keeps_the_links(tmp_path: Path) -> None:
    _, order = history(120, 1, 2)
    buffer = ClusteredReplayBuffer(60, n_steps=3, discount=GAMMA, seed=0)
    buffer.extend(transitions(order[:71]))
    buffer.save(tmp_path / "buffer")
    twin = ClusteredReplayBuffer.load(tmp_path / "buffer")
    for each in (buffer, twin):
        each.extend(transitions(order[71:]))
    check(twin, order, 3)
    for (name, a), (_, b) in zip(buffer.sample(50).columns(), ClusteredReplayBuffer.sample(twin, 50).columns()):
        assert a.shape == b.shape, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_steps": 0}, "n_steps: expected an integer of at least 1, got 0"),
        ({"n_steps": 2, "discount": 1.5}, "discount: expected a number from 0 to 1, got 1.5"),
        ({"n_steps": 2, "discount": -0.1}, "discount: expected a finite number at least 0, got -0.1"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClusteredReplayBuffer(10, **options)


def test_what_spans_several_steps_already_is_refused() -> None:
    rows = torch.zeros(4, 1)
    data = Transitions(
        observations=rows, actions=rows, rewards=rows, next_observations=rows, terminals=rows, intervals=rows + 2
    )
    buffer = ClusteredReplayBuffer(10, n_steps=2)
    with pytest.raises(ValueError, match="intervals: expected 1, as single steps are joined when sampling, got 2"):
        buffer.extend(data)
    assert len(buffer) == 0


def test_the_next_action_is_that_of_the_windows_last_row() -> None:
    rows = torch.arange(6.0)
    states = rows.unsqueeze(1)
    data = Transitions(
        observations=states,
        actions=states,
        rewards=torch.ones(6),
        next_observations=states + 1,
        terminals=torch.tensor([0.0, 0, 0, 1, 0, 0]),
    )
    buffer = ClusteredReplayBuffer.from_transitions(data, n_steps=2, discount=0.5, seed=0)
    batch = buffer.rows()
    # the last rows of the windows are 1, 2, 3, 3, 5, 5, and 3 and 5 have no next action but their own
    assert batch.next_actions.squeeze(1).tolist() == [2, 3, 3, 3, 5, 5]
    assert batch.has_next_actions.tolist() == [1, 1, 0, 0, 0, 0]
    assert batch.actions.squeeze(1).tolist() == rows.tolist()


def test_no_window_spans_a_step_that_its_environment_sat_out() -> None:
    buffer = ClusteredReplayBuffer(10, n_steps=2, discount=1.0, seed=0)
    for step, environments in enumerate((2, 1, 2)):
        rows = torch.arange(environments) + 10.0 * step
        column = rows.unsqueeze(1)
        buffer.add(column, column, rows, column, torch.zeros(environments))
    held = buffer.rows()
    assert held.rewards.tolist() == [0, 1, 10, 20, 21]  # which of the two it was is not known
    assert held.intervals.tolist() == [1, 1, 1, 1, 1]
