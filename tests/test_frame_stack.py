"""Frames stacked when sampling, against a walk back through written-down episodes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from c4buffer import ClusteredReplayBuffer, Critics, Transitions

SHAPE = (2, 3, 3)  # C, H, W


def frame(number: float) -> Tensor:
    return torch.full(SHAPE, number, dtype=torch.uint8)


class Episodes:
    """Rows in the order in which they came: the frames are numbers that no other row has."""

    def __init__(self, environments: int, seed: int) -> None:
        self.draw = random.Random(seed)
        self.environments = environments
        self.rows: list[dict[str, Any]] = []
        self.last: list[int | None] = [None] * environments

    def step(self) -> dict[str, Tensor]:
        """One step of all environments, as `add` takes it."""
        first = len(self.rows)
        for environment in range(self.environments):
            number = len(self.rows)
            terminal, timeout = self.draw.random() < 0.15, self.draw.random() < 0.1
            self.rows.append(
                {"before": self.last[environment], "terminal": terminal, "timeout": timeout, "reward": number / 7}
            )
            self.last[environment] = None if terminal or timeout else number
        rows = range(first, len(self.rows))
        return {
            "observations": torch.stack([frame(2 * j % 250) for j in rows]),
            "actions": torch.tensor([[float(j)] for j in rows]),
            "rewards": torch.tensor([self.rows[j]["reward"] for j in rows]),
            "next_observations": torch.stack([frame(2 * j % 250 + 1) for j in rows]),
            "terminals": torch.tensor([float(self.rows[j]["terminal"]) for j in rows]),
            "timeouts": torch.tensor([float(self.rows[j]["timeout"]) for j in rows]),
        }

    def stacks(self, row: int, count: int, capacity: int) -> tuple[Tensor, Tensor]:
        """Of s and s', as one would put them together."""
        frames, here = [frame(2 * row % 250)], row
        while len(frames) < count:
            before = None if here is None else self.rows[here]["before"]
            here = before if before is not None and before >= len(self.rows) - capacity else None
            frames.insert(0, torch.zeros(SHAPE, dtype=torch.uint8) if here is None else frame(2 * here % 250))
        return torch.cat(frames), torch.cat([*frames[1:], frame(2 * row % 250 + 1)])


@pytest.mark.parametrize("environments", [1, 3])
@pytest.mark.parametrize(("count", "capacity"), [(2, 100), (4, 100), (4, 20), (3, 2)])
def test_stacks_are_those_of_a_walk_back_through_each_episode(environments: int, count: int, capacity: int) -> None:
    episodes = Episodes(environments, seed=count)
    buffer = ClusteredReplayBuffer(capacity, frame_stack=count, seed=0)
    for _ in range(30):
        step = episodes.step()
        buffer.add(**{name: value[0] if environments == 1 else value for name, value in step.items()})
        batch = buffer.sample(16)
        assert batch.observations.dtype == torch.uint8
        assert batch.observations.shape == (16, count * SHAPE[0], *SHAPE[1:])
        for i, row in enumerate(batch.actions[:, 0].long().tolist()):
            here, following = episodes.stacks(row, count, capacity)
            assert torch.equal(batch.observations[i], here)
            assert torch.equal(batch.next_observations[i], following)
            assert float(batch.rewards[i]) == pytest.approx(episodes.rows[row]["reward"])


def images(rows: int, *, ends: set[int], extra: bool = False) -> Transitions:
    pixels = torch.stack([frame(j) for j in range(rows + 1)])
    numbers = torch.arange(rows + 1.0).unsqueeze(1)

    def observations(part: slice) -> Any:
        return {"pixels": pixels[part], "numbers": numbers[part]} if extra else pixels[part]

    return Transitions(
        observations=observations(slice(rows)),
        actions=numbers[:-1],
        rewards=torch.ones(rows),
        next_observations=observations(slice(1, None)),
        terminals=torch.tensor([float(j in ends) for j in range(rows)]),
    )


def test_extending_goes_on_with_the_open_trajectory_and_only_images_are_stacked() -> None:
    data = images(6, ends={2}, extra=True)
    buffer = ClusteredReplayBuffer(20, frame_stack=3, replacement=False, seed=0)
    buffer.extend(data[:2])
    buffer.extend(data[2:])
    batch = buffer.sample(6)
    order = batch.actions[:, 0].long().argsort()
    assert isinstance(batch.observations, dict)
    assert isinstance(batch.next_observations, dict)
    assert batch.observations["numbers"].shape == (6, 1)
    stacks = batch.observations["pixels"][order][:, :: SHAPE[0], 0, 0].tolist()
    assert stacks == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [0, 0, 3], [0, 3, 4], [3, 4, 5]]
    following = batch.next_observations["pixels"][order][:, :: SHAPE[0], 0, 0].tolist()
    assert following == [[0, 0, 1], [0, 1, 2], [1, 2, 3], [0, 3, 4], [3, 4, 5], [4, 5, 6]]


def test_stacks_and_n_steps_together() -> None:
    """s' is that of the last row of the window, and so are the frames before it."""
    buffer = ClusteredReplayBuffer(20, frame_stack=2, n_steps=3, discount=0.5, replacement=False, seed=0)
    buffer.extend(images(6, ends={5}))
    batch = buffer.sample(6)
    order = batch.actions[:, 0].long().argsort()
    assert batch.observations[order][:, :: SHAPE[0], 0, 0].tolist() == [[0, 0], [0, 1], [1, 2], [2, 3], [3, 4], [4, 5]]
    following = batch.next_observations[order][:, :: SHAPE[0], 0, 0].tolist()
    assert following == [[2, 3], [3, 4], [4, 5], [5, 6], [5, 6], [5, 6]]
    assert batch.rewards[order].tolist() == [1.75, 1.75, 1.75, 1.75, 1.5, 1.0]
    assert batch.intervals[order].tolist() == [3, 3, 3, 3, 2, 1]


def test_critics_see_stacks_when_clustering_and_a_file_brings_them_back(tmp_path: Path) -> None:
    class Q(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3 * 18 + 1, 1)

        def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
            value: Tensor = self.layer(torch.cat([observations.flatten(1).float(), actions], dim=1))
            return value

    torch.manual_seed(0)
    q = Q()
    buffer = ClusteredReplayBuffer(60, frame_stack=3, n_clusters=2, embedding="features", seed=0)
    buffer.extend(images(50, ends={20}))
    buffer.refresh(Critics(q, q, features=lambda critic, observations, actions: observations.flatten(1).float()))
    buffer.sample(8)
    buffer.save(tmp_path / "buffer.safetensors")
    other = ClusteredReplayBuffer.load(tmp_path / "buffer.safetensors")
    for each in (buffer, other):
        each.extend(images(30, ends=set()))  # the open trajectory goes on in both
    for _ in range(5):
        one, two = buffer.sample(16), other.sample(16)
        assert torch.equal(one.observations, two.observations)
        assert torch.equal(one.next_observations, two.next_observations)


def test_without_images_there_is_nothing_to_stack() -> None:
    rows = torch.zeros(4, 3)
    data = Transitions(
        observations=rows, actions=rows, rewards=rows[:, 0], next_observations=rows, terminals=rows[:, 0]
    )
    buffer = ClusteredReplayBuffer(10, frame_stack=2)
    message = r"observations: expected images \[N, C, H, W\], as frame_stack joins them, got \[4, 3\]"
    with pytest.raises(ValueError, match=message):
        buffer.extend(data)
    assert len(buffer) == 0
    with pytest.raises(ValueError, match="frame_stack: expected an integer of at least 1, got 0"):
        ClusteredReplayBuffer(10, frame_stack=0)


def test_what_spans_several_steps_already_is_refused() -> None:
    frames, flat = torch.zeros(4, *SHAPE, dtype=torch.uint8), torch.zeros(4, 1)
    data = Transitions(
        observations=frames,
        actions=flat,
        rewards=flat,
        next_observations=frames,
        terminals=flat,
        intervals=flat + 3,
    )
    buffer = ClusteredReplayBuffer(10, frame_stack=2)
    with pytest.raises(ValueError, match="intervals: expected 1, as single steps are joined when sampling, got 3"):
        buffer.extend(data)
    assert len(buffer) == 0


def test_frames_before_the_next_state_are_the_last_rows_own() -> None:
    frames = torch.arange(7, dtype=torch.uint8).view(-1, 1, 1, 1)
    zeros = torch.zeros(6)
    buffer = ClusteredReplayBuffer(20, frame_stack=3, n_steps=3, seed=0)
    buffer.extend(
        Transitions(
            observations=frames[:-1],
            actions=zeros.unsqueeze(1),
            rewards=zeros,
            next_observations=frames[1:],
            terminals=torch.tensor([0, 0, 0, 0, 0, 1]),
        )
    )
    following = buffer.rows().next_observations.flatten(1).tolist()
    assert following == [[1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5, 6], [4, 5, 6], [4, 5, 6]]
