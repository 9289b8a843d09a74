"""A buffer whose additions were interrupted: it holds what was written, and goes on."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from c4buffer import ClusteredReplayBuffer, Critics
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
