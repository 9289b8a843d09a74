"""Rows by their numbers: when a clustering is due, and a state that is taken whole or not at all."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from c4buffer import Critics, MixtureClusterer, OnDrift, Transitions
from c4buffer.clustered_rows import ClusteredRows

CPU = torch.device("cpu")
CRITICS = Critics(lambda s, a: s.sum(dim=1), lambda s, a: s.sum(dim=1))


def read(start: int, stop: int) -> Transitions:
    """Rows of two kinds."""
    numbers = torch.arange(start, stop, dtype=torch.float32)
    column = (numbers + 1000 * (numbers % 2)).unsqueeze(1)
    return Transitions(
        observations=column,
        actions=column,
        rewards=numbers,
        next_observations=column,
        terminals=torch.zeros(len(column)),
    )


def observations(critics: Critics, batch: Transitions) -> Tensor:
    assert isinstance(batch.observations, Tensor)
    return batch.observations


def rows_of(count: int = 50, **options: Any) -> ClusteredRows:
    defaults: dict[str, Any] = {
        "n_clusters": 2,
        "embedding": observations,
        "refresh": None,
        "clusterer": None,
        "assignment": "soft",
        "replacement": True,
        "seed": 0,
    }
    rows = ClusteredRows(**{**defaults, **options})
    rows.sampler.extend(count)
    return rows


@pytest.mark.parametrize(("count", "after"), [(50, 1000), (30_000, 3000)])
def test_without_a_policy_it_is_due_at_once_and_then_a_tenth_of_the_rows_later(count: int, after: int) -> None:
    rows = rows_of(count)
    rows.sample(4)
    assert rows.due(None)
    rows.refresh(CRITICS, read, device=CPU)
    for _ in range(after):
        assert not rows.due(None)
        rows.sample(4)
    assert rows.due(None)


def test_it_is_due_when_no_row_is_left_that_was_clustered() -> None:
    rows = rows_of()
    rows.refresh(CRITICS, read, device=CPU)
    rows.sampler.overwrite(torch.arange(49))
    assert not rows.due(None)
    rows.sampler.overwrite(torch.tensor([49]))
    assert rows.due(None)


def test_a_policy_is_shown_the_number_of_batches_and_the_holder() -> None:
    shown: list[Any] = []
    rows = rows_of(refresh=lambda step, holder: bool(shown.append((step, holder))))
    holder = object()
    for _ in range(2):
        rows.due(holder)
        rows.sample(4)
    assert shown == [(0, holder), (1, holder)]


def test_a_refresh_finds_the_two_kinds_of_rows() -> None:
    rows = rows_of()
    assert rows.refresh(CRITICS, read, device=CPU) is rows.last_report
    drawn, cluster = rows.sample(16)
    assert len(set((drawn % 2).tolist())) == 1
    assert cluster in (0, 1)


def test_cleared_it_holds_nothing_and_begins_anew() -> None:
    rows = rows_of()
    rows.refresh(CRITICS, read, device=CPU)
    rows.sample(4)
    rows.clear(None)
    assert (rows.sampler.size, rows.sampler.clustered, rows.batches, rows.last_report) == (0, False, 0, None)
    with pytest.raises(ValueError, match="refresh: expected transitions to cluster, got an empty buffer"):
        rows.refresh(CRITICS, read, device=CPU)
    rows.sampler.extend(50)
    assert rows.due(None)


def test_a_state_goes_on_batch_for_batch() -> None:
    rows, other = rows_of(), rows_of(seed=1)
    rows.refresh(CRITICS, read, device=CPU)
    rows.sample(4)
    other.restore(copy.deepcopy(rows.state(None)), None, size=50)
    assert (other.batches, other.last_report) == (rows.batches, rows.last_report)
    for _ in range(5):
        expected, cluster = rows.sample(4)
        drawn, found = other.sample(4)
        assert (drawn.tolist(), found) == (expected.tolist(), cluster)


class Unwilling(MixtureClusterer):
    """Takes no state but the one it had."""

    def __init__(self) -> None:
        super().__init__(2, warm_start=False)
        self.loads: list[Any] = []

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loads.append(state)
        if len(self.loads) == 1:
            raise RuntimeError("not this one")
        super().load_state_dict(state)


BROKEN: dict[str, tuple[Any, ...]] = {
    "sampler": ({}, KeyError),
    "report": ({"sizes": ()}, TypeError),
    "batches": ("many", ValueError),
    "policy": ({"probe": torch.tensor([50]), "reference": 0.0, "compared": True}, ValueError),
}


@pytest.mark.parametrize("part", BROKEN)
def test_a_state_that_is_damaged_changes_nothing(part: str) -> None:
    rows = rows_of(refresh=OnDrift(1.0))
    value, error = BROKEN[part]
    state = {**copy.deepcopy(rows.state(None)), part: value}
    rows.refresh(CRITICS, read, device=CPU)
    rows.sample(4)
    before = copy.deepcopy(rows.state(None))
    with pytest.raises(error):
        rows.restore(state, None)
    assert_equal(rows.state(None), before)


def test_a_clusterer_that_refuses_its_state_keeps_the_one_it_had() -> None:
    clusterer = Unwilling()
    rows = rows_of(clusterer=clusterer)
    state = copy.deepcopy(rows.state(None))
    rows.refresh(CRITICS, read, device=CPU)
    before = copy.deepcopy(rows.state(None))
    with pytest.raises(RuntimeError, match="not this one"):
        rows.restore(state, None)
    assert_equal(rows.state(None), before)
    assert clusterer.mixture is not None


def test_clusters_of_another_number_of_rows_are_refused() -> None:
    rows = rows_of()
    with pytest.raises(ValueError, match="state: expected clusters of the 49 transitions held, got 50"):
        rows.restore(rows.state(None), None, size=49)


def assert_equal(one: Any, other: Any) -> None:
    """Nested states, tensors by their values."""
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other):
            assert_equal(a, b)
    else:
        assert repr(one) == repr(other)  # a NaN equals itself
