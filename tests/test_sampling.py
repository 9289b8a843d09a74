"""Single-cluster batches: uniform over rows in closed form and in numbers, under any history and any dissolving."""

from __future__ import annotations

import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scipy import stats
from torch import Tensor

from c4buffer import SingleClusterSampler
from c4buffer.drawing import POOL_ROWS, SMALLEST_SHARE_BY_PROPOSAL

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
REJECT = 0.001  # significance of every statistical test here; seeds are fixed


def empty_sampler(*, seed: int = 0, **options: Any) -> SingleClusterSampler:
    return SingleClusterSampler(generator=torch.Generator().manual_seed(seed), **options)


def sampler_of(r: Tensor, *, distances: Tensor | None = None, seed: int = 0, **options: Any) -> SingleClusterSampler:
    sampler = empty_sampler(seed=seed, **options)
    sampler.extend(len(r))
    sampler.assign(r, distances=distances)
    return sampler


def soft(rows: int, clusters: int, *, scale: float = 2.0, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Responsibilities [rows, clusters]; sharper with a larger scale, exact zeros included from about 200."""
    logits = torch.randn(rows, clusters, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    r = (scale * logits).softmax(dim=1)
    return torch.where(r < 1e-100, 0, r).to(dtype)


def one_hot(labels: list[int] | Tensor, clusters: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.as_tensor(labels), clusters).double()


def draw(sampler: SingleClusterSampler, batches: int, batch_size: int) -> tuple[Tensor, Tensor]:
    """Rows [batches, batch_size] and clusters [batches]."""
    drawn = [sampler.sample(batch_size) for _ in range(batches)]
    return torch.stack([rows for rows, _ in drawn]), torch.tensor([cluster for _, cluster in drawn])


def test_more_rows_of_a_cluster_are_drawn_as_its_batches_are() -> None:
    r = soft(50, 3)
    sampler = sampler_of(r)
    _, cluster = sampler.sample(4)
    ids, shares, _ = sampler.partition_for(4)
    weights = shares[:, ids.tolist().index(cluster)]
    counts = torch.bincount(sampler.rows_of(cluster, 100_000, batch_size=4), minlength=50)
    likely = weights > 1e-4
    expected = 100_000 * weights[likely] / weights.sum()
    assert stats.chisquare(counts[likely], expected * counts[likely].sum() / expected.sum()).pvalue > REJECT


def assert_uniform(r: Tensor, p: Tensor, tolerance: float) -> None:
    """sum_z p_z r_iz / sum_j r_jz = 1 / N for every row i, and p is the mean of r."""
    r = r.double()
    assert bool((r >= 0).all())
    assert bool((p >= 0).all())
    np.testing.assert_allclose(p, r.mean(dim=0), rtol=tolerance, atol=tolerance)
    drawn = p > 0
    share = (p[drawn] * r[:, drawn] / r[:, drawn].sum(dim=0)).sum(dim=1)
    np.testing.assert_allclose(share, np.full(len(r), 1 / len(r)), rtol=tolerance)


def p_value(observed: Tensor, weights: Tensor) -> float:
    """Of a chi-square test for counts in proportion to the weights; cells that expect fewer than five count as one."""
    observed, weights = observed.double(), weights.double()
    assert int(observed[weights == 0].sum()) == 0
    expected = observed.sum() * weights / weights.sum()
    small = expected < 5
    cells = [torch.cat([x[~small], x[small].sum().reshape(1)]) for x in (observed, expected)]
    kept = cells[1] > 0
    return float(stats.chisquare(cells[0][kept], cells[1][kept]).pvalue)


# --- uniformity in closed form -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("assignment", ["soft", "hard"])
@pytest.mark.parametrize("scale", [0.5, 5.0, 500.0])
def test_closed_form_is_uniform_for_every_batch_size(dtype: torch.dtype, assignment: str, scale: float) -> None:
    sampler = sampler_of(soft(3000, 6, scale=scale, dtype=dtype), assignment=assignment)
    sampler.extend(70)
    sampler.overwrite(torch.arange(100, 300))
    assert_uniform(sampler.responsibilities, sampler.probabilities, TOLERANCE[dtype])
    for batch_size in (1, 64, 400, 600, 1200, 5000):
        ids, r, p = sampler.partition_for(batch_size)
        assert r.shape == (3070, len(ids))
        assert_uniform(r, p, TOLERANCE[dtype])


def test_rows_that_sum_to_nearly_one_are_uniform_too() -> None:
    r = soft(50, 3) * torch.linspace(0.9991, 1.0009, 50).double().unsqueeze(1)
    sampler = sampler_of(r)
    assert_uniform(sampler.responsibilities, sampler.probabilities, 1e-12)


def test_unassigned_rows_take_the_probabilities_as_their_responsibilities() -> None:
    r = soft(20, 3)
    sampler = sampler_of(r)
    sampler.overwrite(torch.tensor([3, 4, 3]))
    sampler.extend(2)
    assigned = [i for i in range(20) if i not in (3, 4)]
    p = r[assigned].mean(dim=0)
    expected = r.clone()
    expected[[3, 4]] = p
    expected = torch.cat([expected, p.expand(2, 3)])
    np.testing.assert_allclose(sampler.probabilities, p, rtol=1e-14)
    np.testing.assert_allclose(sampler.responsibilities, expected, rtol=1e-14)


def test_hard_assignment_is_the_arg_max_and_p_is_formed_after_it() -> None:
    r = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.3, 0.7], [0.51, 0.49]])
    sampler = sampler_of(r, assignment="hard")
    assert sampler.responsibilities.tolist() == [[1, 0], [1, 0], [0, 1], [1, 0]]
    assert sampler.probabilities.tolist() == [0.75, 0.25]


@pytest.mark.parametrize("replacement", [True, False])
def test_when_all_rows_are_overwritten_they_are_drawn_by_the_last_p(replacement: bool) -> None:
    sampler = sampler_of(soft(30, 3), replacement=replacement)
    sampler.extend(5)
    for rows in torch.arange(35).flip(0).split(8):
        assert sampler.clustered
        p = sampler.probabilities
        sampler.overwrite(rows)
    assert not sampler.clustered
    assert torch.equal(sampler.probabilities, p)
    torch.testing.assert_close(sampler.responsibilities, p.expand(35, 3))
    ids, r, shares = sampler.partition_for(36)  # more than any cluster has
    assert (len(ids), r.shape, shares.tolist()) == (1, (35, 1), [1.0])
    sampler.extend(1)
    rows, clusters = draw(sampler, 1000, 4)
    if replacement:
        assert p_value(torch.bincount(clusters, minlength=3), p) > REJECT
        assert p_value(torch.bincount(rows.flatten(), minlength=36), torch.ones(36)) > REJECT
    again = empty_sampler(replacement=replacement)
    again.restore(sampler.state())
    for one, other in zip(draw(again, 20, 4), draw(sampler, 20, 4)):
        assert torch.equal(one, other)


def test_a_cluster_whose_rows_are_all_overwritten_is_never_drawn() -> None:
    # 0.1 + 0.2 + 0.3 less its terms is not zero in floating point, but p_z has to be.
    r = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [1, 0], [1, 0]]).double()
    sampler = sampler_of(r)
    for row in (2, 1, 0):
        sampler.overwrite(torch.tensor([row]))
    assert sampler.probabilities.tolist() == [1, 0]
    assert sampler.partition_for(4)[0].tolist() == [0]


def test_sums_stay_exact_while_a_ring_is_overwritten_row_by_row() -> None:
    r = soft(600, 4, scale=8.0)
    r, order = r[r[:, 0].argsort(descending=True)], torch.arange(600)
    sampler = sampler_of(r)
    for row in order[:-1]:
        sampler.overwrite(row.reshape(1))
        rest = r[int(row) + 1 :].mean(dim=0)
        np.testing.assert_allclose(sampler.probabilities, rest, rtol=1e-12)


def dissolved(
    r: np.ndarray, known: np.ndarray, distances: np.ndarray | None, batch_size: int
) -> tuple[list[int], np.ndarray, np.ndarray] | None:
    """An oracle for `partition_for`, in float64; None where rounding decides which cluster goes."""
    ids, r, known = list(range(r.shape[1])), r.copy(), known.copy()
    while True:
        p = r[known].mean(axis=0)
        r[~known] = p
        if len(ids) == 1:
            return ids, r, p
        sums, squares = r.sum(axis=0), (r**2).sum(axis=0)
        sizes = np.divide(sums**2, squares, out=np.zeros_like(sums), where=squares > 0)
        z = int(sizes.argmin())
        others = np.append(np.delete(sizes, z), batch_size)
        exact = known.all() and ((r == 0) | (r == 1)).all()
        if not exact and np.isclose(others, sizes[z], rtol=1e-9).any():
            return None
        if sizes[z] >= batch_size:
            return ids, r, p
        del ids[z]
        r = np.delete(r, z, axis=1)
        distances = None if distances is None else np.delete(distances, z, axis=1)
        left = r.sum(axis=1)
        lost = known & (left == 0)
        r[known & ~lost] /= left[known & ~lost, None]
        if distances is None:
            known &= ~lost
        else:
            r[lost] = np.eye(len(ids))[distances[lost].argmin(axis=1)]


class History(RuleBasedStateMachine):
    """Any order of extend, overwrite, assign and draws, against responsibilities kept in a plain array."""

    @initialize(
        rows=st.integers(1, 40),
        dtype=st.sampled_from([torch.float64, torch.float64, torch.float32]),
        assignment=st.sampled_from(["soft", "hard"]),
        replacement=st.sampled_from([True, True, False]),
    )
    def start(self, rows: int, dtype: torch.dtype, assignment: str, replacement: bool) -> None:
        self.dtype, self.assignment = dtype, assignment
        self.sampler = empty_sampler(assignment=assignment, replacement=replacement)
        self.sampler.extend(rows)
        self.r = np.zeros((rows, 1))
        self.distances: np.ndarray | None = None
        self.known = np.zeros(rows, dtype=bool)
        self.p: np.ndarray | None = None  # once there are clusters

    @rule(rows=st.integers(1, 12))
    def extend(self, rows: int) -> None:
        self.sampler.extend(rows)
        new = np.zeros((rows, self.r.shape[1]))
        self.r = np.append(self.r, new, axis=0)
        self.distances = None if self.distances is None else np.append(self.distances, new, axis=0)
        self.known = np.append(self.known, np.zeros(rows, dtype=bool))

    @rule(first=st.floats(0, 1), share=st.sampled_from([0.0, 0.2, 0.5, 1.0]))
    def overwrite(self, first: float, share: float) -> None:
        size = len(self.known)
        rows = np.arange(int(first * size), int((first + share) * size) + 1) % size
        self.sampler.overwrite(torch.from_numpy(rows))
        self.known[rows] = False
        if self.known.any():
            self.p = self.r[self.known].mean(axis=0)

    @rule(
        clusters=st.integers(1, 5),
        scale=st.sampled_from([0.3, 3.0, 30.0, 1000.0]),
        seed=st.integers(0, 99),
        means=st.booleans(),
    )
    def assign(self, clusters: int, scale: float, seed: int, means: bool) -> None:
        rows = len(self.known)
        r = soft(rows, clusters, scale=scale, seed=seed, dtype=self.dtype)
        distances = torch.rand(rows, clusters, generator=torch.Generator().manual_seed(seed)) if means else None
        self.sampler.assign(r, distances=distances)
        self.r = r.double().numpy()
        if self.assignment == "hard":
            self.r = np.eye(clusters)[self.r.argmax(axis=1)]
        self.distances = None if distances is None else distances.numpy()
        self.known = np.ones(rows, dtype=bool)
        self.p = self.r.mean(axis=0)

    @rule(batch_size=st.integers(1, 12), batches=st.integers(1, 5))
    def sample(self, batch_size: int, batches: int) -> None:
        if not self.sampler.replacement:
            batch_size = min(batch_size, len(self.known))
        rows, clusters = draw(self.sampler, batches, batch_size)
        assert int(rows.min()) >= 0
        assert int(rows.max()) < len(self.known)
        ids = self.sampler.partition_for(batch_size)[0].tolist() if self.p is not None else [-1]
        assert set(clusters.tolist()) <= set(ids)

    @invariant()
    def clustered_while_an_assigned_row_is_left(self) -> None:
        assert self.sampler.size == len(self.known)
        assert self.sampler.clustered == bool(self.known.any())

    @precondition(lambda self: self.p is not None)
    @invariant()
    def uniform_in_closed_form(self) -> None:
        tolerance = TOLERANCE[self.dtype]
        r = self.r.copy()
        r[~self.known] = self.p
        np.testing.assert_allclose(self.sampler.responsibilities, r, rtol=tolerance, atol=tolerance)
        assert_uniform(self.sampler.responsibilities, self.sampler.probabilities, tolerance)
        for batch_size in (len(r) // 8 + 1, len(r) // 4 + 1, len(r) // 2 + 1):
            ids, remaining, p = self.sampler.partition_for(batch_size)
            assert_uniform(remaining, p, tolerance)
            expected = dissolved(r, self.known, self.distances, batch_size) if self.known.any() else None
            if self.sampler.replacement and expected is not None and self.dtype is torch.float64:
                assert ids.tolist() == expected[0]
                np.testing.assert_allclose(remaining, expected[1], rtol=1e-9, atol=1e-12)
                np.testing.assert_allclose(p, expected[2], rtol=1e-9, atol=1e-12)


History.TestCase.settings = settings(max_examples=200, stateful_step_count=15, deadline=None, derandomize=True)
TestUniformAfterAnyHistory = History.TestCase


# --- what is drawn, over 2,000 batches -----------------------------------------------------------------------------


def with_strangers(r: Tensor, **options: Any) -> SingleClusterSampler:
    """Rows overwritten and added after the clustering, and after batches were drawn from it."""
    sampler = sampler_of(r, **options)
    draw(sampler, 200, 32)
    sampler.overwrite(torch.arange(5, 15))
    sampler.extend(12)
    return sampler


def skewed(rows: int, share: float) -> Tensor:
    """Three clusters; the first has about `share` of the rows, unevenly."""
    r = soft(rows, 3, scale=1.0)
    r[:, 0] *= share
    return r / r.sum(dim=1, keepdim=True)


SMALL_HARD = torch.arange(400) % 20 // 9  # 180, 180 and 40 rows
DRAWN: dict[str, tuple[Callable[[], SingleClusterSampler], int, int]] = {
    # the sampler, the batch size, and how many clusters are drawn by table
    "rejection": (lambda: sampler_of(soft(60, 3)), 8, 0),
    "rejection, float32": (lambda: sampler_of(soft(60, 3, dtype=torch.float32)), 8, 0),
    "rejection, hard": (lambda: sampler_of(soft(60, 3), assignment="hard"), 8, 0),
    "rejection, rows unassigned": (lambda: with_strangers(soft(60, 3)), 8, 0),
    "table": (lambda: sampler_of(skewed(300, 0.06)), 32, 1),
    "table, hard": (lambda: sampler_of(one_hot(torch.arange(800) % 20 * 2 // 19, 3), assignment="hard"), 32, 1),
    "table, rows unassigned": (lambda: with_strangers(skewed(300, 0.06)), 32, 1),
    "dissolved": (lambda: sampler_of(one_hot(SMALL_HARD, 3), distances=soft(400, 3)), 64, 0),
}


@pytest.mark.parametrize("case", DRAWN)
def test_clusters_and_rows_come_as_often_as_they_should_over_2000_batches(case: str) -> None:
    make, batch_size, by_table = DRAWN[case]
    sampler = make()
    ids, r, p = sampler.partition_for(batch_size)
    assert len(ids) >= 2
    assert int((p < SMALLEST_SHARE_BY_PROPOSAL).sum()) == by_table
    rows, clusters = draw(sampler, 2000, batch_size)
    assert set(clusters.tolist()) == set(ids.tolist())
    counts = torch.stack([(clusters == z).sum() for z in ids])
    assert p_value(counts, p) > REJECT
    for z, weights in zip(ids, r.T):
        drawn = torch.bincount(rows[clusters == z].flatten(), minlength=len(r))
        assert p_value(drawn, weights) > REJECT


@pytest.mark.parametrize("case", DRAWN)
def test_every_row_is_equally_likely_over_batches(case: str) -> None:
    make, batch_size, _ = DRAWN[case]
    sampler = make()
    rows, _ = draw(sampler, 8000, batch_size)
    first = torch.bincount(rows[:, 0], minlength=sampler.size)  # of each batch, so that the draws are independent
    assert p_value(first, torch.ones(sampler.size)) > REJECT


@pytest.mark.parametrize("replacement", [True, False])
def test_each_batch_comes_from_one_cluster(replacement: bool) -> None:
    r = soft(200, 3)
    for one, assignment in ((r, "hard"), (one_hot(r.argmax(dim=1), 3), "soft")):
        rows, clusters = draw(sampler_of(one, assignment=assignment, replacement=replacement), 2000, 16)
        assert torch.equal(r.argmax(dim=1)[rows], clusters.unsqueeze(1).expand(-1, 16))
        assert set(clusters.tolist()) == {0, 1, 2}


def test_rows_added_or_overwritten_since_are_drawn_with_every_cluster() -> None:
    sampler = sampler_of(one_hot([0] * 30 + [1] * 30, 2))
    sampler.overwrite(torch.tensor([0, 59]))
    sampler.extend(1)
    rows, clusters = draw(sampler, 500, 8)
    for stranger in (0, 59, 60):
        assert set(clusters[(rows == stranger).any(dim=1)].tolist()) == {0, 1}
    for z, foreign in ((0, range(30, 59)), (1, range(1, 30))):
        assert not set(rows[clusters == z].flatten().tolist()) & set(foreign)


def test_before_any_clustering_rows_are_uniform_and_the_cluster_is_minus_one() -> None:
    sampler = empty_sampler()
    sampler.extend(50)
    rows, clusters = draw(sampler, 2000, 8)
    assert set(clusters.tolist()) == {-1}
    assert p_value(torch.bincount(rows.flatten(), minlength=50), torch.ones(50)) > REJECT


def test_one_cluster_is_uniform_and_has_its_name() -> None:
    rows, clusters = draw(sampler_of(torch.ones(50, 1)), 2000, 8)
    assert set(clusters.tolist()) == {0}
    assert p_value(torch.bincount(rows.flatten(), minlength=50), torch.ones(50)) > REJECT


@pytest.mark.parametrize("batch_size", [1, 200, 20_000])
def test_with_replacement_any_batch_size_will_do(batch_size: int) -> None:
    sampler = sampler_of(soft(20, 3))
    for _ in range(3):
        rows, _ = sampler.sample(batch_size)
        assert rows.shape == (batch_size,)
        assert rows.dtype == torch.int64
        assert 0 <= int(rows.min()) <= int(rows.max()) < 20


# --- dissolving ----------------------------------------------------------------------------------------------------

LABELS = [0] * 5 + [1] * 5 + [2] * 2
NEAREST = torch.tensor([[0.0, 1, 2]] * 5 + [[1.0, 0, 2]] * 5 + [[1.0, 2, 0], [2.0, 1, 0]])


@pytest.mark.parametrize("assignment", ["soft", "hard"])
@pytest.mark.parametrize(
    ("batch_size", "ids", "p"), [(2, [0, 1, 2], [5, 5, 2]), (3, [0, 1], [6, 6]), (6, [0, 1], [6, 6]), (7, [1], [12])]
)
def test_a_cluster_smaller_than_the_batch_goes_to_the_nearest_remaining_means(
    assignment: str, batch_size: int, ids: list[int], p: list[int]
) -> None:
    sampler = sampler_of(one_hot(LABELS, 3), distances=NEAREST, assignment=assignment)
    kept, r, probabilities = sampler.partition_for(batch_size)
    assert kept.tolist() == ids
    np.testing.assert_allclose(probabilities, np.array(p) / 12, rtol=1e-15)
    if len(ids) == 2:
        assert r.argmax(dim=1).tolist() == [0] * 5 + [1] * 5 + [0, 1]
    assert bool((r.sum(dim=1) == 1).all())


def test_never_below_one_cluster() -> None:
    sampler = sampler_of(one_hot(LABELS, 3), distances=NEAREST)
    ids, r, p = sampler.partition_for(1000)
    assert len(ids) == 1
    assert r.tolist() == [[1.0]] * 12
    assert p.tolist() == [1.0]
    assert sampler.sample(1000)[1] == int(ids)


def test_rows_with_nothing_left_and_no_means_to_go_to_are_drawn_with_every_cluster() -> None:
    _, r, p = sampler_of(one_hot(LABELS, 3)).partition_for(3)
    assert p.tolist() == [0.5, 0.5]
    assert r[10:].tolist() == [[0.5, 0.5]] * 2


def test_the_clusters_asked_for_are_as_before_any_dissolving() -> None:
    sampler = sampler_of(soft(40, 4), distances=soft(40, 4))
    r, p = sampler.responsibilities.clone(), sampler.probabilities.clone()
    kept = [len(sampler.partition_for(batch_size)[0]) for batch_size in (1, 20, 1000, 20, 1)]
    draw(sampler, 10, 1000)
    assert kept[0] == 4
    assert kept[2] == 1
    assert kept[:2] == kept[:2:-1]
    assert torch.equal(sampler.responsibilities, r)
    assert torch.equal(sampler.probabilities, p)


@pytest.mark.parametrize("seed", range(5))
def test_the_smallest_effective_size_decides_for_every_batch_size(seed: int) -> None:
    r = soft(40, 4, seed=seed)
    sampler = sampler_of(r)
    answers = set()
    for batch_size in range(1, 42):
        expected = dissolved(r.numpy(), np.ones(40, dtype=bool), None, batch_size)
        assert expected is not None
        ids, remaining, p = sampler.partition_for(batch_size)
        assert ids.tolist() == expected[0]
        np.testing.assert_allclose(remaining, expected[1], rtol=1e-12)
        np.testing.assert_allclose(p, expected[2], rtol=1e-12)
        answers.add(tuple(expected[0]))
    assert len(answers) == 4


def test_the_effective_size_is_the_squared_sum_over_the_sum_of_squares() -> None:
    # Even halves of 10 rows count as 10 rows each. (1 + 9 / 3)^2 / (1 + 9 / 9) = 8 and (9 * 2 / 3)^2 / (9 * 4 / 9) = 9.
    even = sampler_of(torch.full((10, 2), 0.5).double())
    assert [len(even.partition_for(batch_size)[0]) for batch_size in (10, 11)] == [2, 1]
    r = torch.tensor([[1.0, 0]] + [[1 / 3, 2 / 3]] * 9).double()
    uneven = sampler_of(r)
    assert [uneven.partition_for(batch_size)[0].tolist() for batch_size in (7, 9)] == [[0, 1], [1]]


@pytest.mark.parametrize("rows", [49, 98, 103, 107])
def test_a_cluster_of_exactly_the_batch_size_is_kept(rows: int) -> None:
    # 49 * (1 / 49) is less than 1 in floating point.
    for batch_size in range(1, 6):
        labels = [0] * batch_size + [1] * (rows - batch_size)
        assert sampler_of(one_hot(labels, 2)).partition_for(batch_size)[0].tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tiny_responsibilities_that_are_left_are_renormalised_exactly(dtype: torch.dtype) -> None:
    left = [(1e-30, 2e-30), (1e-30, 3e-37), (5e-20, 1e-3), (0.0, 1e-35)]
    small = [[1 - sum(pair), *pair] for pair in left]
    r = torch.tensor(small + [[0, 1, 0]] * 20 + [[0, 0, 1]] * 20, dtype=torch.float64).to(dtype)
    ids, remaining, _ = sampler_of(r).partition_for(10)
    assert ids.tolist() == [1, 2]
    for row, (_, *pair) in zip(remaining[:4].double().tolist(), r[:4].double().tolist()):
        exact = [Fraction(value) / sum(map(Fraction, pair)) for value in pair]
        np.testing.assert_allclose(
            row, [float(value) for value in exact], rtol=1e-12 if dtype is torch.float64 else 1e-6
        )


def test_effective_sizes_see_what_float32_can_not_square() -> None:
    # (sum r)^2 / sum r^2 = 2 for two rows of 1e-30, whose squares are no float32.
    r = torch.tensor([[1, 1e-30]] * 2 + [[1, 0]] * 20)
    assert sampler_of(r).partition_for(3)[0].tolist() == [0]


# --- without replacement -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [3, 4])
def test_a_walk_visits_every_row_of_its_cluster_once(batch_size: int) -> None:
    labels = torch.tensor([0] * 7 + [1] * 12)
    rows, clusters = draw(sampler_of(one_hot(labels, 2), replacement=False), 400, batch_size)
    for z, members in ((0, 7), (1, 12)):
        batches = members // batch_size  # a rest smaller than a batch is shuffled in again
        walks = rows[clusters == z].split(batches)[:-1]
        assert len(walks) > 20
        for walk in walks:
            assert len(walk.unique()) == batches * batch_size
        left_out = {row for walk in walks for row in range(19) if labels[row] == z and row not in walk}
        assert len(left_out) == (members if members % batch_size else 0)


def test_before_any_clustering_a_walk_visits_every_row_once() -> None:
    sampler = empty_sampler(replacement=False)
    sampler.extend(12)
    rows, clusters = draw(sampler, 40, 3)
    assert set(clusters.tolist()) == {-1}
    assert all(len(walk.unique()) == 12 for walk in rows.split(4))


def test_walks_go_on_through_adds_and_overwrites() -> None:
    sampler = sampler_of(torch.ones(8, 1), replacement=False)
    rows = [sampler.sample(2)[0] for _ in range(2)]
    sampler.extend(4)
    sampler.overwrite(torch.tensor([0, 7]))
    rows += [sampler.sample(2)[0] for _ in range(2)]
    assert sorted(torch.cat(rows).tolist()) == list(range(8))
    rows = [sampler.sample(2)[0] for _ in range(6)]
    assert sorted(torch.cat(rows).tolist()) == list(range(12))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6), st.integers(1, 5)), min_size=1, max_size=8))
def test_between_changes_every_row_is_in_one_cluster_and_no_batch_has_it_twice(
    steps: list[tuple[int, int, int]],
) -> None:
    labels = torch.arange(24) % 3
    sampler = sampler_of(one_hot(labels, 3), replacement=False)
    strangers: set[int] = set()
    for added, overwritten, batch_size in steps:
        if added:
            strangers |= set(range(sampler.size, sampler.size + added))
            sampler.extend(added)
        strangers |= set(range(overwritten))
        sampler.overwrite(torch.arange(overwritten))
        cluster_of: dict[int, int] = {}
        undissolved = len(sampler.partition_for(batch_size)[0]) == 3
        for _ in range(30):
            rows, cluster = sampler.sample(batch_size)
            assert len(rows.unique()) == batch_size
            if undissolved:
                assert {cluster_of.setdefault(row, cluster) for row in rows.tolist()} == {cluster}
                assert {int(labels[row]) for row in rows.tolist() if row not in strangers} <= {cluster}
    rows, _ = draw(sampler, 200, 1)
    assert set(rows.flatten().tolist()) == set(range(sampler.size))  # whoever was moved is still visited


def test_without_replacement_rows_added_or_overwritten_draw_a_cluster_by_p() -> None:
    counts = torch.zeros(2, 2)
    for seed in range(1500):
        sampler = sampler_of(one_hot([0] * 25 + [1] * 5, 2), replacement=False, seed=seed)
        sampler.overwrite(torch.arange(10))  # p = 15 / 20, 5 / 20
        sampler.extend(10)
        rows, cluster = sampler.sample(2)
        for kind, strangers in enumerate((range(10), range(30, 40))):
            counts[kind, cluster] += int(rows[0]) in strangers
    for kind in counts:
        assert p_value(kind, torch.tensor([15, 5])) > REJECT


@pytest.mark.parametrize("batch_size", [2, 12])
def test_without_replacement_every_row_is_equally_likely_over_clusterings(batch_size: int) -> None:
    r = soft(30, 3)
    sampler = empty_sampler(replacement=False)
    sampler.extend(30)
    counts, clusters = torch.zeros(30), torch.zeros(3)
    for _ in range(3000):
        sampler.assign(r)
        rows, cluster = sampler.sample(batch_size)
        counts[rows[0]] += 1
        clusters[cluster] += 1
    assert p_value(counts, torch.ones(30)) > REJECT
    if batch_size == 2:
        assert p_value(clusters, r.mean(dim=0)) > REJECT


def test_without_replacement_a_cluster_with_too_few_members_is_dissolved() -> None:
    sampler = sampler_of(one_hot(LABELS, 3), distances=NEAREST, replacement=False)
    rows, clusters = draw(sampler, 300, 3)
    assert set(clusters.tolist()) == {0, 1}
    assert set(rows[clusters == 0].flatten().tolist()) == {0, 1, 2, 3, 4, 10}
    assert set(rows[clusters == 1].flatten().tolist()) == {5, 6, 7, 8, 9, 11}
    assert sorted(sampler.sample(12)[0].tolist()) == list(range(12))


@pytest.mark.parametrize("clustered", [True, False])
def test_without_replacement_a_batch_larger_than_the_buffer_is_refused(clustered: bool) -> None:
    sampler = empty_sampler(replacement=False)
    sampler.extend(12)
    if clustered:
        sampler.assign(soft(12, 3))
    with pytest.raises(ValueError, match=r"^batch_size: expected at most the 12 transitions held.*, got 13$"):
        sampler.sample(13)
    assert sorted(sampler.sample(12)[0].tolist()) == list(range(12))


# --- randomness ----------------------------------------------------------------------------------------------------


def story(seed: int, replacement: bool) -> list[tuple[list[int], int]]:
    """Everything drawn in a history with all kinds of changes."""
    sampler = empty_sampler(seed=seed, replacement=replacement)
    drawn = []
    changes: list[Callable[[], None]] = [
        lambda: sampler.extend(40),
        lambda: sampler.assign(soft(40, 3), distances=soft(40, 3)),
        lambda: sampler.extend(5),
        lambda: sampler.overwrite(torch.arange(7)),
        lambda: sampler.assign(soft(45, 4, seed=1)),
    ]
    for change in changes:
        change()
        drawn += [sampler.sample(batch_size) for batch_size in (4, 4, 4, 20, 4, 20)]
    return [(rows.tolist(), cluster) for rows, cluster in drawn]


@pytest.mark.parametrize("replacement", [True, False])
def test_the_same_seed_draws_the_same_and_another_another(replacement: bool) -> None:
    assert story(3, replacement) == story(3, replacement)
    assert story(3, replacement) != story(4, replacement)


@pytest.mark.parametrize("replacement", [True, False])
def test_global_generators_are_neither_read_nor_touched(replacement: bool) -> None:
    numpy_global = np.random.mtrand._rand
    told = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        numpy_global.seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), str(numpy_global.get_state()), random.getstate()
        told.append(story(3, replacement))
        after = torch.get_rng_state(), str(numpy_global.get_state()), random.getstate()
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]
    assert told[0] == told[1]


def test_batches_drawn_ahead_are_dropped_at_every_change() -> None:
    sampler = empty_sampler()
    sampler.extend(1)
    draw(sampler, 10, 32)
    sampler.extend(999)
    rows, clusters = draw(sampler, 10, 32)
    assert int(rows[0].max()) > 0
    assert set(clusters.tolist()) == {-1}
    for labels in (torch.arange(1000) // 500, torch.arange(1000) % 2):
        sampler.assign(one_hot(labels, 2))
        rows, clusters = draw(sampler, 10, 32)
        assert torch.equal(labels[rows], clusters.unsqueeze(1).expand(-1, 32))
    sampler.overwrite(torch.arange(1000))
    rows, clusters = draw(sampler, 10, 32)
    assert any(len(set(labels[batch].tolist())) == 2 for batch in rows)
    assert set(clusters.tolist()) == {0, 1}


def test_a_change_of_batch_size_draws_no_more_than_is_asked_for() -> None:
    sampler = empty_sampler(seed=5)
    sampler.extend(10)
    for _ in range(20):
        draw(sampler, 1, 7)
        draw(sampler, 1, 9)
    again = torch.Generator().manual_seed(5)
    for _ in range(20):
        torch.rand(16, generator=again, dtype=torch.float64)
    assert torch.equal(sampler.generator.get_state(), again.get_state())


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("responsibilities", "message"),
    [
        (torch.ones(4), r"a floating tensor \[N, K\] with N = 4, got torch.float32 \[4\]"),
        (torch.ones(3, 1), r"a floating tensor \[N, K\] with N = 4, got torch.float32 \[3, 1\]"),
        (torch.ones(4, 0), r"a floating tensor \[N, K\] with N = 4, got torch.float32 \[4, 0\]"),
        (torch.ones(4, 1).long(), r"a floating tensor \[N, K\] with N = 4, got torch.int64 \[4, 1\]"),
        (np.ones((4, 1)), r"a floating tensor \[N, K\] with N = 4, got ndarray"),
        (torch.full((4, 1), float("nan")), "finite values, got nan in row 0"),
        (torch.full((4, 2), 0.6), "values from 0, rows that sum to one, got rows that miss it by 0.2"),
        (torch.tensor([[1.5, -0.5]] * 4), "values from 0, rows that sum to one, got -0.5"),
    ],
)
def test_wrong_responsibilities_are_refused_and_nothing_changes(responsibilities: Any, message: str) -> None:
    sampler, twin = (sampler_of(one_hot([0, 0, 1, 1], 2)) for _ in range(2))
    draw(sampler, 5, 2)
    draw(twin, 5, 2)
    with pytest.raises(ValueError, match=f"^responsibilities: expected {message}"):
        sampler.assign(responsibilities)
    assert torch.equal(sampler.responsibilities, one_hot([0, 0, 1, 1], 2))
    assert torch.equal(draw(sampler, 5, 2)[0], draw(twin, 5, 2)[0])


def test_responsibilities_given_are_not_written_to() -> None:
    r = torch.ones(6, 1)
    sampler = sampler_of(r)
    sampler.overwrite(torch.arange(3))
    assert torch.equal(r, torch.ones(6, 1))


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, True, "8"])
def test_wrong_batch_sizes_are_refused(batch_size: Any) -> None:
    with pytest.raises(ValueError, match=r"^batch_size: expected an integer of at least 1, got "):
        sampler_of(soft(4, 2)).sample(batch_size)


def test_without_rows_or_clusters_there_is_nothing_to_ask_for() -> None:
    sampler = empty_sampler()
    with pytest.raises(ValueError, match=r"^buffer: expected transitions to draw from, got an empty buffer"):
        sampler.sample(1)
    sampler.extend(3)
    for ask in (lambda: sampler.responsibilities, lambda: sampler.probabilities, lambda: sampler.partition_for(2)):
        with pytest.raises(ValueError, match=r"^buffer: expected a refresh before .* got no clusters"):
            ask()


@pytest.mark.parametrize("shares", [(0.4, 0.35, 0.25), (0.9, 0.06, 0.04), (0.94, 0.03, 0.03)])
def test_rows_drawn_ahead_do_not_pile_up(shares: tuple[float, ...]) -> None:
    sampler = SingleClusterSampler(generator=torch.Generator().manual_seed(0))
    sampler.extend(5000)
    sampler.assign(torch.tensor(shares, dtype=torch.float64).repeat(5000, 1))
    for _ in range(3000):
        sampler.sample(64)
    assert all(len(pool) <= POOL_ROWS for pool in sampler._pools)
    small = [share < SMALLEST_SHARE_BY_PROPOSAL for share in shares]
    # what was proposed before there were tables
    assert all(len(pool) < 64 for pool, by_table in zip(sampler._pools, small) if by_table)
