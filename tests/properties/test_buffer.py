"""The buffer under any order of steps, whole datasets, refreshes and batches, against what was put into it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

from c4buffer import ClusteredReplayBuffer, Critics, Every, MixtureClusterer, Transitions

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
seeds = st.integers(0, 2**31)
DIMENSIONS = 2


def critic(seed: int, dtype: torch.dtype) -> nn.Module:
    """Q(s, a) = s^T W a, which has gradients that differ from row to row."""
    product = nn.Bilinear(DIMENSIONS, 1, 1, bias=False, dtype=dtype)
    nn.init.normal_(product.weight, generator=torch.Generator().manual_seed(seed))
    return product


def states_as_embeddings(critics: Critics, batch: Transitions) -> Tensor:
    assert isinstance(batch.observations, Tensor)
    return batch.observations


def soft_clusters(embeddings: Tensor, previous: Tensor | None) -> Tensor:
    """Two clusters, from vague to sharp, and one that is small."""
    return torch.cat([4 * embeddings, torch.full_like(embeddings[:, :1], -3)], dim=1).softmax(dim=1)


def effective_size(r: Tensor) -> float:
    """(sum_i r_iz)^2 / sum_i r_iz^2 of the smallest cluster."""
    sums, squares = r.double().sum(dim=0), r.double().square().sum(dim=0)
    return float((sums.square() / squares.clamp(min=1e-300)).min())


@contextmanager
def rows_alike() -> Iterator[None]:
    """Rows that are all the same lower K, with a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="n_components: ", category=UserWarning)
        yield


class BufferHistory(RuleBasedStateMachine):
    """Rows are told apart by their rewards, which count up."""

    @initialize(
        capacity=st.integers(1, 30),
        environments=st.integers(1, 3),
        dtype=st.sampled_from([torch.float32, torch.float64]),
        clusterer=st.sampled_from(["soft", "mixture", "default"]),
        embedding=st.sampled_from(["gradients", "states"]),
        assignment=st.sampled_from(["soft", "hard"]),
        replacement=st.sampled_from([True, True, False]),
        every=st.integers(1, 6),
        seed=seeds,
    )
    def start(
        self,
        capacity: int,
        environments: int,
        dtype: torch.dtype,
        clusterer: str,
        embedding: str,
        assignment: Any,
        replacement: bool,
        every: int,
        seed: int,
    ) -> None:
        self.dtype, self.environments = dtype, environments
        self.assignment, self.replacement = assignment, replacement
        self.buffer = ClusteredReplayBuffer(
            capacity,
            n_clusters=2,
            clusterer={"soft": soft_clusters, "mixture": MixtureClusterer(2), "default": None}[clusterer],
            embedding=embedding if embedding == "gradients" else states_as_embeddings,
            assignment=assignment,
            replacement=replacement,
            refresh=Every(every),
            seed=seed,
        )
        self.generator = torch.Generator().manual_seed(seed)
        self.critics = Critics(critic(1, dtype), critic(2, dtype))
        self.attached = False
        self.count = 0
        self.rows: dict[int, float] = {}  # what each slot holds
        self.found: Tensor | None = None  # responsibilities, as the last refresh left them
        self.seen = np.zeros(capacity, dtype=bool)  # slots whose rows that refresh has seen
        self.global_state = torch.get_rng_state()

    def teardown(self) -> None:
        if hasattr(self, "global_state"):
            assert torch.equal(torch.get_rng_state(), self.global_state), "the global generator was read"

    def new_rows(self, count: int, *, distinct: bool = True) -> dict[str, Tensor]:
        """Fields [count, ...], and the slots that they will go to."""
        rewards = torch.arange(self.count, self.count + count, dtype=self.dtype)
        for row in range(self.count, self.count + count):
            slot = row % self.buffer.capacity
            self.rows[slot], self.seen[slot] = float(row), False
        self.count += count

        def normal(width: int) -> Tensor:
            values = torch.randn(count if distinct else 1, width, generator=self.generator, dtype=self.dtype)
            return values.expand(count, -1).clone()

        return {
            "observations": normal(DIMENSIONS),
            "actions": normal(1),
            "rewards": rewards,
            "next_observations": normal(DIMENSIONS),
            "terminals": (rewards % 7 == 3).to(self.dtype),
        }

    @rule()
    def add(self) -> None:
        self.buffer.add(**self.new_rows(self.environments))

    @rule(count=st.integers(1, 40), distinct=st.sampled_from([True, True, False]))
    def extend(self, count: int, distinct: bool) -> None:
        fields = self.new_rows(count, distinct=distinct)
        self.buffer.extend(Transitions(**fields, next_actions=fields["actions"]))

    @precondition(lambda self: self.rows)
    @rule()
    def refresh(self) -> None:
        with rows_alike():
            report = self.buffer.refresh(self.critics)
        self.refreshed()
        np.testing.assert_allclose(sum(report.sizes), len(self.rows), rtol=1e-5)
        np.testing.assert_allclose(report.probabilities, self.buffer.probabilities, rtol=0, atol=0)

    def refreshed(self) -> None:
        self.found = self.buffer.responsibilities.clone()
        self.seen[: len(self.rows)] = True

    @rule()
    def attach(self) -> None:
        self.buffer.attach(self.critics)
        self.attached = True

    @precondition(lambda self: self.rows)
    @rule(batch_size=st.integers(1, 20))
    def sample(self, batch_size: int) -> None:
        if not self.replacement:
            batch_size = min(batch_size, len(self.rows))
        before = self.buffer.last_report
        with rows_alike():
            batch = self.buffer.sample(batch_size)
        if self.buffer.last_report is not before:
            assert self.attached
            self.refreshed()
        assert len(batch) == batch_size
        assert batch.indices is not None
        assert int(batch.indices.min()) >= 0
        assert int(batch.indices.max()) < len(self.rows)
        assert batch.rewards.tolist() == [self.rows[slot] for slot in batch.indices.tolist()]
        if self.found is None:
            assert batch.cluster == -1
        elif (
            self.seen.any()
            and effective_size(self.buffer.responsibilities) >= batch_size * (1 + 1e-6)
            and self.replacement
        ):
            # No cluster has been dissolved for it.
            assert bool((self.buffer.responsibilities[batch.indices, batch.cluster] > 0).all())

    @invariant()
    def it_holds_the_newest_rows(self) -> None:
        assert len(self.buffer) == len(self.rows) == min(self.count, self.buffer.capacity)

    @precondition(lambda self: self.seen.any())
    @invariant()
    def every_row_is_equally_likely(self) -> None:
        assert self.found is not None
        size, r, p = len(self.rows), self.buffer.responsibilities, self.buffer.probabilities
        tolerance = TOLERANCE[self.dtype]
        assert r.dtype == self.dtype
        assert r.shape == (size, self.found.shape[1])
        seen = torch.from_numpy(self.seen[:size])
        assert torch.equal(r[seen], self.found[: len(seen)][seen[: len(self.found)]])
        np.testing.assert_allclose(r[~seen], p.expand(int((~seen).sum()), -1), rtol=tolerance, atol=1e-30)
        np.testing.assert_allclose(p, r.double().mean(dim=0), rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(self.buffer.cluster_sizes, size * p, rtol=1e-15)
        if self.assignment == "hard":
            assert bool(((r[seen] == 0) | (r[seen] == 1)).all())
        drawn, r = p > 0, r.double()
        share = (p[drawn] * r[:, drawn] / r[:, drawn].sum(dim=0)).sum(dim=1)
        np.testing.assert_allclose(share, np.full(size, 1 / size), rtol=tolerance)


TestEveryRowIsEquallyLikelyWhateverIsAddedAndRefreshed = BufferHistory.TestCase
