"""When to cluster again."""

from __future__ import annotations

from typing import Any

import pytest

from c4buffer import ClusteredReplayBuffer, Every, RefreshPolicy


def due(policy: RefreshPolicy, batches: int) -> list[int]:
    buffer = ClusteredReplayBuffer(1)
    return [step for step in range(batches) if policy(step, buffer)]


@pytest.mark.parametrize("n", [1, 3, 7])
def test_every_n_is_due_at_multiples_of_n(n: int) -> None:
    assert due(Every(n), 22) == list(range(0, 22, n))


def test_any_callable_is_a_policy() -> None:
    assert due(lambda step, buffer: step == buffer.capacity + 1, 5) == [2]


def test_every_says_what_it_is() -> None:
    assert repr(Every(50)) == "Every(50)"
    assert Every(50).n == 50


@pytest.mark.parametrize("n", [0, -1, 2.0, True, "3", None])
def test_every_needs_a_whole_number_from_one(n: Any) -> None:
    with pytest.raises(ValueError, match=r"^n: expected an integer of at least 1, got "):
        Every(n)
