"""Edges of the buffer: nothing to add, rows on the device, files that can not grow, and what is refused when."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import c4buffer.storage as storage_file
from c4buffer import ClusteredReplayBuffer, Transitions


def data(rows: int = 10) -> Transitions:
    frames, flat = torch.zeros(rows, 1, 2, 2), torch.arange(float(rows)).unsqueeze(1)
    return Transitions(
        observations=frames, actions=flat, rewards=flat, next_observations=frames, terminals=torch.zeros(rows)
    )


@pytest.mark.parametrize("options", [{}, {"trajectory_tail": True}, {"n_steps": 3}])
def test_extending_by_nothing_changes_nothing(options: dict[str, Any]) -> None:
    buffer, twin = (ClusteredReplayBuffer(20, seed=0, **options) for _ in range(2))
    for each in (buffer, twin):
        each.extend(data()[:5])
    buffer.extend(data()[:0])
    for each in (buffer, twin):
        each.extend(data()[5:])
    for (name, one), (_, other) in zip(buffer.sample(50).columns(), twin.sample(50).columns()):
        assert torch.equal(one, other), name


def test_rows_come_on_the_device_of_the_batches() -> None:
    rows = ClusteredReplayBuffer.from_transitions(data(), device="meta").rows()
    assert rows.indices is not None
    assert {rows.rewards.device.type, rows.indices.device.type} == {"meta"}


@pytest.mark.parametrize(("name", "value"), [("n_steps", 3), ("discount", 0.5), ("frame_stack", 2)])
def test_a_state_of_other_windows_is_refused(name: str, value: Any) -> None:
    options = {"n_steps": 2, "discount": 0.9, "frame_stack": 3}
    state = ClusteredReplayBuffer.from_transitions(data(), **options).state_dict()
    other = ClusteredReplayBuffer.from_transitions(data(4), capacity=10, **{**options, name: value})
    with pytest.raises(ValueError, match=f"^{name}: expected .*, as in the state, got {value}$"):
        other.load_state_dict(state)
    assert len(other) == 4


@pytest.mark.parametrize(
    ("batch_size", "steps", "message"),
    [
        (4, -1, "steps: expected an integer of at least 0, got -1"),
        (0, None, "batch_size: expected an integer of at least 1, got 0"),
    ],
)
def test_batches_that_can_not_be_drawn_are_refused_when_they_are_asked_for(
    batch_size: int, steps: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        ClusteredReplayBuffer.from_transitions(data()).batches(batch_size, steps=steps)


def test_a_folder_is_one_that_exists_for_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^folder: expected None, unless storage is 'memmap', got"):
        ClusteredReplayBuffer(10, folder=tmp_path)
    with pytest.raises(ValueError, match="^folder: expected a folder that exists, got"):
        ClusteredReplayBuffer(10, storage="memmap", folder=tmp_path / "nowhere")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_what_is_wrong_with_a_disk_but_its_size_is_the_systems_error(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reserve(file: int, start: int, size: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", reserve, raising=False)
    with pytest.raises(OSError, match=os.strerror(number)):
        ClusteredReplayBuffer.from_transitions(data(), storage="memmap", folder=tmp_path)
    assert not list(tmp_path.glob("*/*.rows"))


def test_a_file_that_can_not_grow_keeps_its_length_and_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_file, "FEWEST_ROWS", 4)
    buffer = ClusteredReplayBuffer(100, storage="memmap", folder=tmp_path, growing=True, seed=0)
    buffer.extend(data(4))
    (path,) = tmp_path.glob("*/float32.rows")
    size = path.stat().st_size

    def reserve(file: int, start: int, length: int) -> None:
        os.ftruncate(file, length - 1)  # a part of it was there
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", reserve, raising=False)
    with pytest.raises(ValueError, match="^capacity: expected one whose rows fit the disk of"):
        buffer.extend(data(3))
    assert path.stat().st_size == size
    assert buffer.rows().rewards.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("part", ["trajectories", "neighbours"])
def test_trajectories_of_another_capacity_are_refused(part: str) -> None:
    options: dict[str, Any] = {"trajectory_tail": True} if part == "trajectories" else {"n_steps": 2}
    buffer = ClusteredReplayBuffer.from_transitions(data(), **options)
    state = buffer.state_dict()
    name = "times" if part == "trajectories" else "next"
    state[part][name] = state[part][name][:1]
    with pytest.raises(ValueError, match=rf"^{name}: expected a shape of \[10\], got \[1\]$"):
        buffer.load_state_dict(state)


def test_an_environment_that_sat_out_a_step_has_no_next_action_from_before() -> None:
    buffer = ClusteredReplayBuffer(10, seed=0)
    for step, environments in enumerate((2, 1, 2)):
        rows = torch.arange(environments) + 10.0 * step
        column = rows.unsqueeze(1)
        buffer.add(column, column, rows, column, torch.zeros(environments))
    held = buffer.rows()
    assert held.rewards.tolist() == [0, 1, 10, 20, 21]
    assert held.has_next_actions.tolist() == [0, 0, 0, 0, 0]  # which of the two it was is not known
    assert held.next_actions.squeeze(1).tolist() == [0, 1, 10, 20, 21]


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("neighbours", "written", "many"),
        ("neighbours", "next", torch.full((10,), 10)),
        ("neighbours", "previous", torch.full((10,), 10)),
        ("neighbours", "open", [[0, -3]]),
        ("trajectories", "next", None),
        ("trajectories", "numbers", torch.full((10,), 99)),
        ("trajectories", "times", torch.zeros(10)),
        ("trajectories", "open", [[-2, 0]]),
    ],
)
def test_a_state_with_neighbours_that_can_not_be_is_refused(part: str, name: str, value: Any) -> None:
    options: dict[str, Any] = {"n_steps": 2} if part == "neighbours" else {"trajectory_tail": True}
    buffer = ClusteredReplayBuffer.from_transitions(data(10), seed=0, **options)
    state = buffer.state_dict()
    state[part][name] = value
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        buffer.load_state_dict(state)
    assert len(buffer.sample(4)) == 4


def test_when_the_number_of_environments_changes_what_is_under_way_ends_where_it_is() -> None:
    buffer = ClusteredReplayBuffer(20, trajectory_tail=True, seed=0)
    step = 0
    for environments in (3, 3, 2, 3, 3):
        rows = torch.arange(step, step + environments).unsqueeze(1).float()
        zeros = torch.zeros(environments)
        buffer.add(rows, rows, zeros, rows, zeros)
        step += environments
    rows = buffer.rows()
    assert rows.has_next_actions.tolist() == [1] * 3 + [0] * 3 + [0] * 2 + [1] * 3 + [0] * 3
    assert rows.next_actions[:3, 0].tolist() == [3, 4, 5]
    assert rows.next_actions[8:11, 0].tolist() == [11, 12, 13]
    assert buffer._trajectories is not None
    assert len(set(buffer._trajectories.of(14)[0].tolist())) == 3 + 2 + 3


@pytest.mark.parametrize("kind", [torch.float16, torch.float32])
def test_a_step_that_the_buffers_floats_can_not_hold_is_refused(kind: torch.dtype) -> None:
    buffer = ClusteredReplayBuffer(5, seed=0)
    zero = torch.zeros(1, dtype=kind)
    buffer.add(zero, zero, zero[0], zero, zero[0])
    huge = torch.tensor([1e39], dtype=torch.float64)
    with pytest.raises(ValueError, match=f"^rewards: expected finite values, got inf in row 0 .*, as {kind}"):
        buffer.add(zero, zero, huge[0], zero, zero[0])
    with pytest.raises(ValueError, match="^observations: expected finite values, got inf in row 0"):
        buffer.add(huge, zero, zero[0], huge, zero[0])
    assert len(buffer) == 1
    buffer.add(zero, zero, zero[0], zero, zero[0])
    assert buffer.rows().has_next_actions.tolist() == [1, 0]
