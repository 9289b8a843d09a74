"""After any history every row is equally likely: sum_z p_z r_iz / sum_j r_jz = 1 / N. And walks repeat nothing."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from c4buffer import SingleClusterSampler

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
seeds = st.integers(0, 2**31)
dtypes = st.sampled_from([torch.float64, torch.float32])


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def new_sampler(seed: int, *, assignment: str = "soft", replacement: bool = True) -> SingleClusterSampler:
    generator = torch.Generator().manual_seed(seed)
    return SingleClusterSampler(generator=generator, assignment=assignment, replacement=replacement)  # type: ignore[arg-type]


@st.composite
def shares(draw: st.DrawFn, rows: int, dtype: torch.dtype) -> Tensor:
    """Responsibilities [rows, K]: vague to hard, exact zeros among them, some clusters small, sums not quite one."""
    clusters = draw(st.integers(1, 6))
    logits = draw(st.sampled_from([0.3, 3.0, 30.0, 1000.0])) * normal(draw(seeds), rows, clusters)
    logits[:, 0] -= draw(st.sampled_from([0.0, 3.0, 30.0, 300.0]))
    r = logits.softmax(dim=1)
    r = torch.where(r < 1e-100, 0, r)
    if draw(st.booleans()):
        r *= 1 + 9e-4 * normal(draw(seeds), rows, 1).clamp(-1, 1)
    return r.to(dtype)


def assert_uniform(r: Tensor, p: Tensor, tolerance: float) -> None:
    """sum_z p_z r_iz / sum_j r_jz = 1 / N for every row i, and p is the mean of r."""
    r = r.double()
    assert bool((r >= 0).all()), "or it is NaN"
    np.testing.assert_allclose(p, r.mean(dim=0), rtol=tolerance, atol=tolerance)
    drawn = p > 0
    share = (p[drawn] * r[:, drawn] / r[:, drawn].sum(dim=0)).sum(dim=1)
    np.testing.assert_allclose(share, np.full(len(r), 1 / len(r)), rtol=tolerance)


class SamplerHistory(RuleBasedStateMachine):
    """Rows come, go and are clustered again in any order; batches of any size are drawn in between."""

    @initialize(
        rows=st.integers(1, 40),
        dtype=dtypes,
        assignment=st.sampled_from(["soft", "hard"]),
        replacement=st.sampled_from([True, True, False]),
        watched=st.booleans(),
        seed=seeds,
    )
    def start(
        self, rows: int, dtype: torch.dtype, assignment: str, replacement: bool, watched: bool, seed: int
    ) -> None:
        self.dtype, self.global_state = dtype, torch.get_rng_state()
        self.watched = watched  # asked after every step what it dissolves; else when a batch needs it
        self.sampler = new_sampler(seed, assignment=assignment, replacement=replacement)
        self.twin = new_sampler(seed, assignment=assignment, replacement=replacement)
        self.known = np.zeros(rows, dtype=bool)  # rows that the last clustering has seen
        self.assigned = False
        for sampler in (self.sampler, self.twin):
            sampler.extend(rows)

    def teardown(self) -> None:
        if hasattr(self, "global_state"):
            assert torch.equal(torch.get_rng_state(), self.global_state), "the global generator was read"

    @rule(rows=st.integers(1, 12))
    def extend(self, rows: int) -> None:
        for sampler in (self.sampler, self.twin):
            sampler.extend(rows)
        self.known = np.append(self.known, np.zeros(rows, dtype=bool))

    @rule(data=st.data())
    def overwrite(self, data: st.DataObject) -> None:
        size = len(self.known)
        first, count = data.draw(st.integers(0, size - 1)), data.draw(st.integers(1, size))
        rows = np.arange(first, first + count) % size
        for sampler in (self.sampler, self.twin):
            sampler.overwrite(torch.from_numpy(rows))
        self.known[rows] = False

    @rule(data=st.data(), distances=st.none() | seeds)
    def assign(self, data: st.DataObject, distances: int | None) -> None:
        r = data.draw(shares(len(self.known), self.dtype))
        means = None if distances is None else normal(distances, *r.shape).square()
        for sampler in (self.sampler, self.twin):
            sampler.assign(r, distances=means)
        self.known[:] = True
        self.assigned = True

    def partition_for(self, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
        self.twin.partition_for(batch_size)  # without replacement, rows of dissolved clusters are drawn others there
        return self.sampler.partition_for(batch_size)

    @rule(batch_size=st.integers(1, 50), batches=st.integers(1, 8))
    def sample(self, batch_size: int, batches: int) -> None:
        if not self.sampler.replacement:
            batch_size = min(batch_size, len(self.known))
        for _ in range(batches):
            rows, cluster = self.sampler.sample(batch_size)
            again, cluster_again = self.twin.sample(batch_size)
            assert torch.equal(rows, again), "the same seed draws the same"
            assert cluster == cluster_again
            assert rows.shape == (batch_size,)
            assert rows.dtype == torch.int64
            assert int(rows.min()) >= 0
            assert int(rows.max()) < len(self.known)
            if not self.sampler.replacement:
                assert len(rows.unique()) == batch_size
            if not self.assigned:
                assert cluster == -1
                continue
            ids, r, p = self.partition_for(batch_size)
            assert_uniform(r, p, TOLERANCE[self.dtype])
            column = ids.tolist().index(cluster)
            assert bool((r[rows, column] > 0).all()), "each row drawn has a share in the cluster that it is drawn with"

    @invariant()
    def clustered_while_a_row_that_was_clustered_is_left(self) -> None:
        assert self.sampler.size == len(self.known)
        assert self.sampler.clustered == bool(self.known.any())

    @precondition(lambda self: self.assigned)
    @invariant()
    def every_row_is_equally_likely_for_every_batch_size(self) -> None:
        r, p = self.sampler.responsibilities, self.sampler.probabilities
        assert r.dtype == self.dtype
        assert_uniform(r, p, TOLERANCE[self.dtype])
        strangers = r[torch.from_numpy(~self.known)]
        tiny = torch.finfo(self.dtype).tiny
        np.testing.assert_allclose(strangers, p.expand(len(strangers), -1), rtol=TOLERANCE[self.dtype], atol=tiny)
        size, fewest = len(self.known), len(p)
        for batch_size in (1, size // 8 + 1, size // 4 + 1, size // 2 + 1, size + 1) if self.watched else ():
            ids, r, p = self.partition_for(batch_size)
            assert_uniform(r, p, TOLERANCE[self.dtype])
            assert 1 <= len(ids) <= fewest, "a larger batch dissolves no fewer clusters"
            fewest = len(ids)


TestEveryRowIsEquallyLikelyAfterAnyHistory = SamplerHistory.TestCase


@given(
    members=st.lists(st.integers(1, 15), min_size=1, max_size=4),
    batch_sizes=st.lists(st.integers(1, 6), min_size=1, max_size=120),
    seed=seeds,
)
def test_a_walk_visits_each_row_of_its_cluster_once_before_any_repeats(
    members: list[int], batch_sizes: list[int], seed: int
) -> None:
    labels = torch.arange(len(members)).repeat_interleave(torch.tensor(members))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    sampler = new_sampler(seed, replacement=False)
    sampler.extend(len(labels))
    # Rows of a dissolved cluster go to the nearest remaining mean, so that it is known where each of them is.
    distances = normal(seed, len(labels), len(members)).square()
    sampler.assign(torch.nn.functional.one_hot(labels, len(members)).double(), distances=distances)
    visited: dict[tuple[int, ...], set[int]] = defaultdict(set)
    for batch_size in batch_sizes:
        batch_size = min(batch_size, len(labels))
        ids, r, _ = sampler.partition_for(batch_size)
        rows, cluster = sampler.sample(batch_size)
        inside = r[:, ids.tolist().index(cluster)] == 1
        batch, seen = set(rows.tolist()), visited[(cluster, *ids.tolist())]
        assert len(batch) == batch_size
        assert bool(inside[rows].all())
        if int(inside.sum()) - len(seen) < batch_size:
            seen.clear()  # the rest was too small for a batch, and is shuffled in again
        assert not batch & seen
        seen |= batch


@given(
    rows=st.integers(4, 20),
    changes=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 4)), min_size=1, max_size=60),
    clustered=st.booleans(),
    seed=seeds,
)
def test_a_walk_goes_on_through_changes_and_visits_no_row_twice(
    rows: int, changes: list[tuple[int, int, int]], clustered: bool, seed: int
) -> None:
    sampler = new_sampler(seed, replacement=False)
    sampler.extend(rows)
    if clustered:
        sampler.assign(torch.ones(rows, 1))
    waiting: set[int] = set()
    for added, overwritten, batch_size in changes:
        if added:
            sampler.extend(added)
        if overwritten and sampler.size > overwritten + rows:  # never all of those that were clustered
            sampler.overwrite(torch.arange(sampler.size - overwritten, sampler.size))
        batch = set(sampler.sample(batch_size)[0].tolist())
        assert len(batch) == batch_size
        if len(waiting) < batch_size:
            waiting = set(range(sampler.size))
        assert batch <= waiting
        waiting -= batch


@given(
    labels=st.lists(st.integers(0, 3), min_size=2, max_size=12),
    order=seeds,
    replacement=st.booleans(),
    sharp=st.booleans(),
    seed=seeds,
)
def test_no_row_is_drawn_with_a_cluster_in_which_it_has_no_share(
    labels: list[int], order: int, replacement: bool, sharp: bool, seed: int
) -> None:
    rows = len(labels)
    sampler = new_sampler(seed, replacement=replacement)
    sampler.extend(rows)
    hard = torch.nn.functional.one_hot(torch.tensor(labels), 4).double()
    sampler.assign(hard if sharp else (3 * hard + normal(seed, rows, 4)).softmax(dim=1))
    # Cluster by cluster, the rows go that were clustered; those in their places have r_i = p of what is left.
    for row in torch.randperm(rows, generator=torch.Generator().manual_seed(order))[:-1]:
        sampler.overwrite(row.reshape(1))
        for _ in range(4):
            drawn, cluster = sampler.sample(1)
            assert float(sampler.responsibilities[drawn, cluster]) > 0
            assert float(sampler.probabilities[cluster]) > 0


@given(
    data=st.data(),
    rows=st.integers(1, 40),
    dtype=dtypes,
    assignment=st.sampled_from(["soft", "hard"]),
    seed=seeds,
    share=st.floats(0, 0.5),
)
def test_dissolving_leaves_clusters_that_fill_the_batch_with_the_shares_that_they_had(
    data: st.DataObject, rows: int, dtype: torch.dtype, assignment: str, seed: int, share: float
) -> None:
    batch_size = 1 + int(share * rows)
    sampler = new_sampler(seed, assignment=assignment)
    sampler.extend(rows)
    whole = data.draw(shares(rows, dtype))
    distances = normal(seed, *whole.shape).square()
    sampler.assign(whole, distances=distances)
    strangers = torch.zeros(rows, dtype=torch.bool)
    strangers[: data.draw(st.integers(0, rows - 1))] = True
    sampler.overwrite(strangers.nonzero().squeeze(1))
    before = sampler.responsibilities.double()
    ids, r, p = sampler.partition_for(batch_size)
    r = r.double()

    def smallest(r: Tensor) -> float:
        return float((r.sum(dim=0).square() / r.square().sum(dim=0).clamp(min=1e-300)).min())

    slack = 10 * TOLERANCE[dtype]
    assert len(ids) == 1 or smallest(r) >= batch_size * (1 - slack)
    assert len(ids) == before.shape[1] or smallest(before) < batch_size * (1 + slack), "none is dropped without need"
    # Dropped one by one or all at once: what is left is renormalised; a row with nothing left has the nearest mean.
    left = before[:, ids].sum(dim=1, keepdim=True)
    nearest = torch.nn.functional.one_hot(distances[:, ids].argmin(dim=1), len(ids)).double()
    expected = torch.where(left > 0, before[:, ids] / left, nearest)
    sure = ~strangers & ((left == 0) | (left > torch.finfo(dtype).tiny))[:, 0]
    np.testing.assert_allclose(r[sure], expected[sure], rtol=0, atol=slack)
    np.testing.assert_allclose(r[strangers], p.expand(int(strangers.sum()), -1), rtol=0, atol=slack)
