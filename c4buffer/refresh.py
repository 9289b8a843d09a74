"""When to cluster again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from ._checks import check_integer

if TYPE_CHECKING:
    from .buffer import ClusteredReplayBuffer


class RefreshPolicy(Protocol):
    """Anything that can be called so."""

    def __call__(self, step: int, buffer: ClusteredReplayBuffer) -> bool:
        """Whether to cluster before batch number `step` (from 0) is drawn."""
        ...  # pragma: no cover


class Every:
    """Cluster before batches 0, n, 2n, ... are drawn.

    Args:
        n: number of batches, at least 1.
    """

    def __init__(self, n: int) -> None:
        self.n = check_integer("n", n, minimum=1)

    def __call__(self, step: int, buffer: ClusteredReplayBuffer) -> bool:
        return step % self.n == 0

    def __repr__(self) -> str:
        return f"Every({self.n})"
