"""Edges of the sampler: blocks of rows, what is refused, and what is handed out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from c4buffer import SingleClusterSampler, dissolved, partition, sampling


def sampler_of(r: Tensor, *, distances: Tensor | None = None, **options: Any) -> SingleClusterSampler:
    sampler = SingleClusterSampler(generator=torch.Generator().manual_seed(0), **options)
    sampler.extend(len(r))
    sampler.assign(r, distances=distances)
    return sampler


@pytest.mark.parametrize("assignment", ["soft", "hard"])
def test_rows_in_blocks_are_dissolved_as_those_at_once(assignment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    r = (300 * torch.randn(60, 4, generator=generator, dtype=torch.float64)).softmax(dim=1)
    r = torch.where(r < 1e-100, 0, r)
    distances = torch.rand(60, 4, generator=generator)

    def found() -> list[Any]:
        sampler = sampler_of(r, distances=distances, assignment=assignment)
        sampler.overwrite(torch.arange(20, 31))
        sampler.extend(15)
        partitions = [sampler.partition_for(batch_size) for batch_size in (1, 16, 30, 1000)]
        return [sampler.responsibilities, sampler.probabilities, *(part for each in partitions for part in each)]

    expected = found()
    assert len({len(ids) for ids in expected[2::3]}) >= 3
    for module in (dissolved, partition, sampling):
        monkeypatch.setattr(module, "BLOCK_ROWS", 7)
    for one, other in zip(found(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=0)


def test_probabilities_handed_out_are_a_copy() -> None:
    sampler = sampler_of(torch.full((4, 2), 0.5))
    sampler.probabilities.zero_()
    assert sampler.probabilities.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("options", [{}, {"assignment": "hard", "replacement": False}])
def test_trajectories_are_for_hard_clusters_with_replacement(options: dict[str, Any]) -> None:
    sampler = SingleClusterSampler(generator=torch.Generator(), **options)
    sampler.extend(4)
    rows = torch.arange(4)
    with pytest.raises(ValueError, match="^trajectories: expected None, unless assignment='hard' with replacement"):
        sampler.assign(torch.eye(2)[rows % 2], trajectories=(rows, rows))
    assert not sampler.clustered


def test_rows_that_miss_one_by_more_than_a_thousandth_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "BLOCK_ROWS", 3)
    for row in (0, 4, 9):
        r = torch.full((10, 2), 0.5, dtype=torch.float64)
        r[row, 0] += 0.002
        with pytest.raises(ValueError, match="got rows that miss it by 0.002$"):
            sampler_of(r)


@pytest.mark.parametrize("dissolved_before", [False, True])
def test_without_replacement_a_cluster_whose_rows_are_all_overwritten_is_never_drawn(dissolved_before: bool) -> None:
    sampler = sampler_of(torch.eye(3)[torch.tensor([0] * 5 + [1] * 5 + [2] * 5)], replacement=False)
    sampler.extend(45)  # about a third goes to each
    if dissolved_before:
        sampler.partition_for(30)
    assert {sampler.sample(2)[1] for _ in range(100)} == {0, 1, 2}
    sampler.overwrite(torch.arange(5))
    assert sampler.probabilities.tolist() == [0, 0.5, 0.5]
    assert {sampler.sample(2)[1] for _ in range(100)} == {1, 2}
    rows = torch.cat([sampler.sample(1)[0] for _ in range(400)])
    assert set(rows.tolist()) == set(range(60))  # whoever was moved is still visited


def test_a_restored_sampler_has_the_same_probabilities_bit_for_bit() -> None:
    r = torch.randn(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(dim=1)
    sampler = sampler_of(r)
    again = SingleClusterSampler(generator=torch.Generator())
    for row in range(90):  # sums that lose a row at a time are rounded otherwise than those counted anew
        sampler.overwrite(torch.tensor([row]))
    again.restore(sampler.state())
    for each in (sampler, again):
        each.overwrite(torch.tensor([90]))
    assert torch.equal(again.probabilities, sampler.probabilities)


def clustered(**options: Any) -> SingleClusterSampler:
    """40 rows in two clusters, and batches drawn ahead."""
    sampler = SingleClusterSampler(generator=torch.Generator().manual_seed(0), **options)
    sampler.extend(40)
    rows = torch.arange(40)
    hard = options.get("assignment") == "hard" and options.get("replacement", True)
    trajectories = (rows // 10, rows) if hard else None
    sampler.assign(torch.eye(2)[rows % 2], distances=torch.ones(40, 2), trajectories=trajectories)
    for _ in range(4):  # one, two, and of the next four the first
        sampler.sample(4)
    return sampler


WALKS: dict[str, Any] = {"replacement": False}
TAILS: dict[str, Any] = {"assignment": "hard"}
DAMAGES: dict[str, tuple[dict[str, Any], Any, str]] = {
    "the walk before clusters": (WALKS, lambda s: s.update(everything=torch.tensor([40])), "rows drawn ahead"),
    "pools": ({}, lambda s: s.update(pools=[torch.tensor([-1])] * 2), "rows drawn ahead"),
    "fewer numbers": (
        TAILS,
        lambda s: s.update(trajectories=(s["trajectories"][0][:5], *s["trajectories"][1:])),
        "trajectories",
    ),
    "other clusters": (
        TAILS,
        lambda s: s.update(trajectories=(*s["trajectories"][:2], s["trajectories"][2] + 1)),
        "trajectories",
    ),
    "distances": ({}, lambda s: s["partition"].update(distances=torch.zeros(3, 40)), "distances"),
    "distances of more rows": ({}, lambda s: s["partition"].update(distances=torch.zeros(2, 41)), "distances"),
    "too few walks": (WALKS, lambda s: s["partition"].update(walks=s["partition"]["walks"][:1]), "walks"),
    "walks elsewhere": (WALKS, lambda s: s["partition"].update(walks=[torch.tensor([40])] * 2), "walks"),
    "not numbers": ({}, lambda s: s["partition"]["r"].fill_(torch.nan), "r"),
    "shares that are no numbers": ({}, lambda s: s["partition"].update(p=torch.full((2,), torch.nan).double()), "p"),
    "sums that are no numbers": ({}, lambda s: s["partition"]["sums"].fill_(torch.inf), "sums"),
    "responsibilities above one": ({}, lambda s: s["partition"]["r"].fill_(1.5), "r"),
    "dissolved clusters that are not there": (
        {},
        lambda s: s["dissolved"].append({"ids": torch.tensor([7])}),
        "dissolved",
    ),
    "a count below zero": ({}, lambda s: s.update(drawn=-1), "drawn"),
    "labels": (WALKS, lambda s: s["partition"].update(labels=torch.full((40,), 2)), "labels"),
    "labels below": (WALKS, lambda s: s["partition"].update(labels=torch.full((40,), -2)), "labels"),
    "block": ({}, lambda s: s.update(block="many"), "block"),
    "shorter batches": ({}, lambda s: s.update(ahead_rows=[torch.tensor([1])], ahead_clusters=[0]), "rows drawn ahead"),
    "unknown clusters": ({}, lambda s: s.update(ahead_clusters=["x"] * len(s["ahead_rows"])), "rows drawn ahead"),
    "fewer clusters than batches": ({}, lambda s: s.update(ahead_clusters=[]), "rows drawn ahead"),
    "assignment": ({}, lambda s: s.update(assignment="hard"), "assignment"),
    "replacement": ({}, lambda s: s.update(replacement=False), "replacement"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_state_whose_parts_do_not_fit_is_refused_by_name_and_nothing_changes(damage: str) -> None:
    options, change, name = DAMAGES[damage]
    sampler, twin = clustered(**options), clustered(**options)
    state = clustered(**options).state()
    change(state)
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        sampler.restore(state)
    for _ in range(20):
        one, other = sampler.sample(4), twin.sample(4)
        assert torch.equal(one[0], other[0])
        assert one[1] == other[1]


def test_a_restored_sampler_goes_on_drawing_from_tables() -> None:
    labels = (torch.arange(10_000) >= 500).long()  # a share of 1/20, below that from which rows are proposed
    sampler, again = (
        sampler_of(nn.functional.one_hot(labels).float()),
        SingleClusterSampler(generator=torch.Generator()),
    )
    for _ in range(191):  # the end of a block, after more than an eighth of the rows
        sampler.sample(8)
    again.restore(sampler.state())
    for _ in range(200):
        (rows, cluster), (others, other) = sampler.sample(8), again.sample(8)
        assert (rows.tolist(), cluster) == (others.tolist(), other)


def test_a_restored_sampler_walks_on_in_the_clusters_that_are_left() -> None:
    r = torch.rand(60, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 1.0, 0.05])
    sampler = sampler_of(r / r.sum(dim=1, keepdim=True), replacement=False)
    again = SingleClusterSampler(generator=torch.Generator(), replacement=False)
    assert sampler.sample(10)[1] < 2
    assert len(sampler.partition_for(10)[0]) == 2
    again.restore(sampler.state())
    for _ in range(20):
        (rows, cluster), (others, other) = sampler.sample(10), again.sample(10)
        assert (rows.tolist(), cluster) == (others.tolist(), other)


def test_half_responsibilities_are_made_to_sum_to_one_more_closely() -> None:
    sampler = SingleClusterSampler(generator=torch.Generator().manual_seed(0))
    sampler.extend(50)
    r = torch.rand(50, 3, generator=torch.Generator().manual_seed(1)).softmax(dim=1).half()
    sampler.assign(r)
    found = sampler.responsibilities
    assert found.dtype == torch.float32
    expected = r.double() / r.double().sum(dim=1, keepdim=True)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)
