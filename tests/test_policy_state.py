"""What a refresh policy has noted: cleared with the rows, and refused where a part lacks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from c4buffer import ClusteredReplayBuffer, Critics, OnDrift, Transitions


def buffer_of(rows: int = 60) -> ClusteredReplayBuffer:
    torch.manual_seed(0)
    numbers = torch.randn(rows, 3, generator=torch.Generator().manual_seed(0))
    data = Transitions(
        observations=numbers,
        actions=numbers[:, :2],
        rewards=numbers[:, 0],
        next_observations=numbers,
        terminals=torch.zeros(rows),
    )
    buffer = ClusteredReplayBuffer.from_transitions(
        data, n_clusters=2, seed=0, refresh=OnDrift(1.0, check_every=2, probe_size=20)
    )
    buffer.attach(Critics(nn.Bilinear(3, 2, 1), nn.Bilinear(3, 2, 1)))
    buffer.sample(4)
    return buffer


def test_cleared_rows_leave_no_probe_behind() -> None:
    buffer = buffer_of()
    policy: Any = buffer._rows.policy
    assert len(policy.state_dict()["probe"]) == 20
    buffer._rows.clear(buffer)
    assert len(policy.state_dict()["probe"]) == 0


def test_rows_cleared_for_another_leave_the_probe_alone() -> None:
    buffer = buffer_of()
    policy: Any = buffer._rows.policy
    buffer._rows.clear(object())
    assert len(policy.state_dict()["probe"]) == 20


@pytest.mark.parametrize("part", ["probe", "reference", "compared"])
def test_a_policys_state_that_lacks_a_part_is_refused_and_nothing_changes(part: str) -> None:
    buffer = buffer_of()
    state = buffer.state_dict()
    del state["policy"][part]
    buffer.sample(4)
    batches, report = buffer._rows.batches, buffer.last_report
    with pytest.raises(ValueError, match="^state: expected what state_dict gave, got KeyError"):
        buffer.load_state_dict(state)
    assert buffer._rows.batches == batches
    assert buffer.last_report is report


def test_the_likelihood_of_no_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="^rows: expected at least one index, got none$"):
        buffer_of().log_likelihood_of(torch.empty(0, dtype=torch.int64))


def test_the_likelihood_is_the_same_under_autocast() -> None:
    buffer = buffer_of()
    rows = torch.arange(60)
    expected = buffer.log_likelihood_of(rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert buffer.log_likelihood_of(rows) == expected
