"""A buffer whose additions were interrupted: it holds what was written, and goes on."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import c4buffer
from c4buffer import ClusteredReplayBuffer, Critics, Transitions
from c4buffer.partition import Partition
from c4buffer.sampling import SingleClusterSampler
from c4buffer.trajectories import Neighbours, Trajectories

from .conftest import numbered

OPTIONS: list[dict[str, Any]] = [{}, {"n_steps": 3, "discount": 1.0}, {"trajectory_tail": True}]
INTERRUPTED = [
    (SingleClusterSampler, "extend"),
    (SingleClusterSampler, "overwrite"),
    (SingleClusterSampler, "forget_ahead"),
    (SingleClusterSampler, "_label"),
    (Neighbours, "extend"),
    (Neighbours, "_close"),
    (Trajectories, "extend"),
    (Trajectories, "_write"),
]


def clustered(**options: Any) -> ClusteredReplayBuffer:
    buffer = ClusteredReplayBuffer(30, n_clusters=2, seed=0, **options)
    buffer.extend(numbered(26))
    torch.manual_seed(0)
    critic = nn.Bilinear(1, 1, 1)
    buffer.refresh(Critics(critic, critic))
    return buffer


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "n-step", "tails"])
@pytest.mark.parametrize(("part", "method"), INTERRUPTED)
def test_an_interrupted_extension_is_taken_in_later(
    part: Any, method: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*arguments: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    buffer = clustered(**options)
    monkeypatch.setattr(part, method, interrupted)
    with contextlib.suppress(KeyboardInterrupt):
        buffer.extend(numbered(9).replace(rewards=torch.arange(100.0, 109)))
    monkeypatch.undo()
    torch.testing.assert_close(copy.deepcopy(buffer).probabilities, buffer.responsibilities.double().mean(dim=0))
    buffer.save(tmp_path / "buffer")
    buffer = ClusteredReplayBuffer.load(tmp_path / "buffer")
    assert len(buffer) == 30
    assert set(buffer.sample(5000).rewards.int().tolist()) <= set(range(400))
    assert len(buffer.responsibilities) == 30
    torch.testing.assert_close(
        buffer.responsibilities[:5].double(), buffer.probabilities.expand(5, -1), rtol=0, atol=1e-6
    )
    held = buffer.rows()
    spans = held.intervals.int().tolist()
    single = buffer._storage.rows(0, 30).rewards
    for slot, span in enumerate(spans):  # no window joins rows that did not follow each other
        assert held.rewards[slot] == sum(single[(slot + k) % 30] for k in range(span))
        assert torch.diff(torch.stack([single[(slot + k) % 30] for k in range(span)])).eq(1).all()
    buffer.extend(numbered(60))
    assert len(buffer) == 30
    drawn = buffer.sample(5000)
    assert len(drawn.indices.unique()) == 30  # type: ignore[union-attr]


def test_links_to_the_next_action_end_where_an_addition_was_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    buffer = ClusteredReplayBuffer(10, seed=0)
    for step in range(4):
        row = [float(step)], [float(step)], 0.0, [step + 1.0], 0.0
        if step == 2:
            monkeypatch.setattr(SingleClusterSampler, "extend", interrupted)
            with pytest.raises(KeyboardInterrupt):
                buffer.add(*row)
            monkeypatch.undo()
        else:
            buffer.add(*row)
    held = buffer.rows()
    assert held.observations[:, 0].tolist() == [0, 1, 2, 3]
    assert held.has_next_actions.tolist() == [1, 0, 0, 0] or held.has_next_actions.tolist() == [1, 1, 0, 0]


# At any line


def interrupted_at(line: int, run: Callable[[], object]) -> bool:
    """Whether a KeyboardInterrupt came, at that line of all that the package runs, counted from 1."""
    package, count = str(Path(c4buffer.__file__).parent), 0

    def at_line(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        if event == "line" and count == line:
            raise KeyboardInterrupt
        return at_line

    sys.settrace(lambda frame, *_: at_line if frame.f_code.co_filename.startswith(package) else None)
    try:
        run()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def interrupted_everywhere(
    made: Callable[[], ClusteredReplayBuffer], change: Callable[[ClusteredReplayBuffer], object], *, step: int
) -> Iterator[ClusteredReplayBuffer]:
    """Buffers after a change that was interrupted at its first line, that `step` lines on, and so to its end."""
    line, going = 1, True
    while going:
        buffer = made()
        going = interrupted_at(line, partial(change, buffer))
        line += step
        yield buffer
    assert line > 100


def numbered_from(first: int, rows: int, **columns: Any) -> Transitions:
    column = torch.arange(float(first), first + rows).unsqueeze(1)
    fields = dict.fromkeys(("observations", "actions", "rewards", "next_actions"), column)
    return Transitions(**{**fields, "next_observations": column + 1, "terminals": column * 0, **columns})


def check_whole(buffer: ClusteredReplayBuffer, path: Path) -> None:
    """Each row is one transition, windows join what followed each other, sums fit, and it goes on when saved."""
    if len(buffer) == 0:
        buffer.save(path)
        buffer = ClusteredReplayBuffer.load(path)
        buffer.extend(numbered_from(0, 6, observations=torch.zeros(6, 3), next_observations=torch.zeros(6, 3)))
        return
    held = buffer._storage.rows(0, len(buffer))
    for column in (held.observations, held.actions, held.next_observations - 1):
        assert torch.equal(column[:, 0], held.rewards)
    found = buffer.rows()
    for slot, span in enumerate(found.intervals.int().tolist()):
        joined = held.rewards[[(slot + k) % len(buffer) for k in range(span)]]
        assert found.rewards[slot] == joined.sum()
        assert bool((joined.diff() == 1).all())
    if buffer.clustered:
        torch.testing.assert_close(
            buffer.probabilities, buffer.responsibilities.double().mean(dim=0), rtol=1e-5, atol=1e-6
        )
    buffer.save(path)
    loaded = ClusteredReplayBuffer.load(path)
    assert buffer.sample(5).indices.tolist() == loaded.sample(5).indices.tolist()  # type: ignore[union-attr]
    loaded.extend(numbered_from(400, 20))
    drawn = torch.cat([loaded.sample(15).indices for _ in range(100)])  # type: ignore[misc]
    assert len(drawn.unique()) == len(loaded)


@pytest.mark.parametrize(
    "options",
    [*OPTIONS, {"n_steps": 3, "discount": 1.0, "replacement": False}],
    ids=["plain", "n-step", "tails", "walks"],
)
def test_wherever_an_extension_is_interrupted_the_buffer_is_whole(options: dict[str, Any], tmp_path: Path) -> None:
    first = clustered(**options)
    for buffer in interrupted_everywhere(
        lambda: copy.deepcopy(first), lambda buffer: buffer.extend(numbered_from(100, 9)), step=5
    ):
        check_whole(buffer, tmp_path / "buffer")


def test_wherever_an_addition_is_interrupted_the_buffer_is_whole(tmp_path: Path) -> None:
    def add(buffer: ClusteredReplayBuffer, step: int) -> None:
        column = torch.tensor([[100.0], [200.0], [300.0]]) + step
        buffer.add(column, column, column[:, 0], column + 1, torch.zeros(3))

    first = ClusteredReplayBuffer(11, n_clusters=2, seed=0)
    for step in range(5):
        add(first, step)
    critic = nn.Bilinear(1, 1, 1)
    first.refresh(Critics(critic, critic))
    for buffer in interrupted_everywhere(lambda: copy.deepcopy(first), lambda buffer: add(buffer, 5), step=5):
        if buffer.rows().rewards.max() == 304:  # nothing came of it
            add(buffer, 5)
        add(buffer, 6)
        held = buffer.rows()
        linked = held.has_next_actions > 0
        assert torch.equal(held.next_actions[linked, 0], held.rewards[linked] + 1)
        check_whole(buffer, tmp_path / "buffer")


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("options", [{}, {"storage": "memmap"}, {"storage": "memmap", "growing": True}])
def test_wherever_a_first_extension_is_interrupted_the_buffer_is_whole_or_empty(
    options: dict[str, Any], tmp_path: Path
) -> None:
    for buffer in interrupted_everywhere(
        lambda: ClusteredReplayBuffer(12, seed=0, folder=tmp_path if options else None, **options),
        lambda buffer: buffer.extend(numbered(7)),
        step=5,
    ):
        assert len(buffer) in (0, 7)
        check_whole(copy.deepcopy(buffer), tmp_path / "buffer")
        if len(buffer) == 0:
            buffer.extend(numbered_from(0, 4, actions=torch.zeros(4, 2), next_actions=torch.zeros(4, 2)))
        assert buffer.sample(2).cluster == -1


@pytest.mark.parametrize("options", [{}, {"replacement": False}, {"trajectory_tail": True}])
def test_wherever_a_refresh_is_interrupted_the_clusters_are_the_old_or_the_new_ones(options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    first, critic = clustered(**options), nn.Bilinear(1, 1, 1)
    second = copy.deepcopy(first)
    second.refresh(Critics(critic, critic))
    for buffer in interrupted_everywhere(
        lambda: copy.deepcopy(first), lambda buffer: buffer.refresh(Critics(critic, critic)), step=53
    ):
        assert any(torch.equal(buffer.responsibilities, each.responsibilities) for each in (first, second))
        buffer.sample(8)


def test_sums_that_are_not_those_of_the_responsibilities_are_refused(tmp_path: Path) -> None:
    buffer = clustered()
    state = buffer.state_dict()
    state["sampler"]["partition"]["sums"] += 0.1
    with pytest.raises(ValueError, match="^sums: expected those of the responsibilities"):
        buffer.load_state_dict(state)


def test_after_an_interrupted_change_every_row_is_as_likely(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    buffer = clustered()
    monkeypatch.setattr(Partition, "subtract", interrupted)
    with pytest.raises(KeyboardInterrupt):
        buffer.extend(numbered_from(100, 28))
    monkeypatch.undo()
    drawn = torch.cat([buffer.sample(2).indices for _ in range(6000)])  # type: ignore[misc]
    counts = torch.bincount(drawn, minlength=30).double()
    statistic = float(((counts - 400).square() / 400).sum())
    assert statistic < 2 * 70  # chi-square of 29 degrees of freedom, doubled as pairs share a cluster: 70 has p = 3e-5
