"""Rows of clusters by proposal and by table: as often as they should, and no table where it would not pay."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import Tensor

from c4buffer import SingleClusterSampler
from c4buffer.drawing import rows_of_clusters
from c4buffer.partition import Partition

REJECT = 1e-4


def partition_of(r: Tensor) -> Partition:
    return Partition(r.T.contiguous(), torch.arange(r.shape[1]), None)


def skewed(rows: int) -> Tensor:
    """[rows, 3]: soft, and the last cluster small."""
    r = torch.rand(rows, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    r[:, 2] *= 0.06
    return r / r.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("overlapping", [False, True])
def test_rows_come_by_their_responsibilities_by_proposal_and_by_table(settled: bool, overlapping: bool) -> None:
    partition = partition_of(skewed(60))
    generator, pools = torch.Generator().manual_seed(0), list[Tensor]()
    drawn = torch.zeros(3, 60)
    for _ in range(4000):
        rows = rows_of_clusters(
            partition, [2, 0, 1], pools, size=60, generator=generator, settled=settled, overlapping=overlapping
        )
        assert [len(part) for part in rows] == [2, 0, 1]
        for z, part in enumerate(rows):
            drawn[z] += torch.bincount(part, minlength=60)
    assert bool(partition._tables) == settled
    for z in (0, 2):
        expected = partition.r[z] / partition.r[z].sum()
        assert stats.chisquare(drawn[z].double(), expected * drawn[z].sum()).pvalue > REJECT


def test_of_more_rows_than_proposals_would_take_a_table_is_made_at_once() -> None:
    partition = partition_of(skewed(60))
    rows = rows_of_clusters(
        partition, [0, 0, 500], [], size=60, generator=torch.Generator().manual_seed(0), settled=False
    )[2]
    assert list(partition._tables) == [2]
    expected = partition.r[2] / partition.r[2].sum()
    assert stats.chisquare(torch.bincount(rows, minlength=60), expected * 500).pvalue > REJECT


def test_a_step_that_adds_and_samples_makes_no_table_of_all_rows() -> None:
    sampler = SingleClusterSampler(generator=torch.Generator().manual_seed(0))
    sampler.extend(10_000)
    sampler.assign(torch.tensor([0.9, 0.06, 0.04]).repeat(10_000, 1))
    clusters = set()
    for row in range(200):
        sampler.overwrite(torch.tensor([row]))
        clusters.add(sampler.sample(32)[1])
        assert not sampler._clustered()._tables
    assert clusters == {0, 1, 2}
    for _ in range(200):
        sampler.sample(32)
    assert set(sampler._clustered()._tables) == {1, 2}


def test_dissolved_clusters_take_no_copies_that_nothing_is_drawn_from() -> None:
    labels = torch.arange(4000) % 400
    labels = torch.where(labels < 24, labels, 24)  # 24 clusters of 10 rows, and one of all others
    sampler = SingleClusterSampler(generator=torch.Generator().manual_seed(0))
    sampler.extend(4000)
    distances = 1 - torch.nn.functional.one_hot(torch.full((4000,), 24), 25)  # of all rows the last mean is nearest
    sampler.assign(torch.nn.functional.one_hot(labels, 25).float(), distances=distances)
    assert sampler.sample(64)[1] == 24
    dissolved = list(sampler._dissolved.values())
    assert [len(less.ids) for less in dissolved] == list(range(24, 0, -1))
    assert all(less._r is None for less in dissolved)  # of one cluster, rows are drawn uniformly


def test_dissolved_clusters_are_exact_and_few_after_any_history() -> None:
    sampler = SingleClusterSampler(generator=torch.Generator().manual_seed(0))
    sampler.extend(600)
    r = torch.rand(600, 6, generator=torch.Generator().manual_seed(1)) ** 4
    r /= r.sum(dim=1, keepdim=True)
    sampler.assign(r)
    for row in range(300):
        sampler.overwrite(torch.tensor([row]))
        ids, left, p = sampler.partition_for(230)
        known = torch.cat([torch.zeros(row + 1, dtype=torch.bool), torch.ones(599 - row, dtype=torch.bool)])
        oracle = r[:, ids].double() / r[:, ids].double().sum(dim=1, keepdim=True)
        assert torch.allclose(left[known].double(), oracle[known], atol=1e-6)
        assert torch.allclose(p, oracle[known].mean(dim=0), atol=1e-6)
        assert len(sampler._dissolved) <= 6
