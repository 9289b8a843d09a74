"""Which row is of which trajectory, and clusters that also hold what comes after their last member in each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from c4buffer import ClusteredReplayBuffer, Critics, SingleClusterSampler, Transitions
from c4buffer.trajectories import Trajectories, with_tails

REJECT = 0.001  # significance of every statistical test here; seeds are fixed
CRITICS = Critics(nn.Bilinear(2, 1, 1), nn.Bilinear(2, 1, 1))
few_examples = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def slow_tails(labels: list[int], n_clusters: int, numbers: list[int], times: list[int]) -> list[list[bool]]:
    """Each cluster also holds the rest of each trajectory after its last member there."""
    held = [[label == z for label in labels] for z in range(n_clusters)]
    for trajectory in set(numbers):
        rows = sorted((row for row in range(len(labels)) if numbers[row] == trajectory), key=times.__getitem__)
        for z in range(n_clusters):
            places = [place for place, row in enumerate(rows) if labels[row] == z]
            if places:
                for row in rows[places[-1] :]:
                    held[z][row] = True
    return held


def p_value(observed: Tensor, weights: Tensor) -> float:
    """Of a chi-square test for counts in proportion to the weights."""
    assert int(observed[weights == 0].sum()) == 0
    kept = weights > 0
    expected = observed.sum() * weights[kept].double() / weights.sum()
    assert float(expected.min()) >= 5
    return float(stats.chisquare(observed[kept].double(), expected).pvalue) if len(expected) > 1 else 1.0


def one_hot(labels: Any, clusters: int) -> Tensor:
    return nn.functional.one_hot(torch.as_tensor(labels), clusters).double()


# --- members -------------------------------------------------------------------------------------------------------


def test_tails_by_hand() -> None:
    labels = torch.tensor([0, 1, 1, 2, 0, 0, 2, 2, -1])
    numbers = torch.tensor([4, 4, 4, 4, 7, 7, 7, 7, 7])
    members = with_tails(labels, 3, numbers, torch.arange(9))
    assert members.int().tolist() == [
        [1, 1, 1, 1, 1, 1, 1, 1, 1],
        [0, 1, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 1, 1, 1],
    ]


@st.composite
def labelled_trajectories(draw: st.DrawFn) -> tuple[list[int], int, list[int], list[int]]:
    rows, n_clusters = draw(st.integers(1, 40)), draw(st.integers(1, 4))
    labels = draw(st.lists(st.integers(-1, n_clusters - 1), min_size=rows, max_size=rows))
    numbers = draw(st.lists(st.integers(0, 5).map(lambda i: 37 * i), min_size=rows, max_size=rows))
    return labels, n_clusters, numbers, draw(st.permutations(range(100, 100 + rows)))


@few_examples
@given(labelled_trajectories())
def test_tails_are_those_of_a_plain_loop(case: tuple[list[int], int, list[int], list[int]]) -> None:
    labels, n_clusters, numbers, times = case
    members = with_tails(torch.tensor(labels), n_clusters, torch.tensor(numbers), torch.tensor(times))
    assert members.tolist() == slow_tails(labels, n_clusters, numbers, times)


# --- numbers -------------------------------------------------------------------------------------------------------

ENDS = st.lists(st.booleans(), min_size=1, max_size=7)
WRITES = st.lists(st.one_of(ENDS, st.tuples(st.booleans()), st.tuples(st.booleans(), st.booleans())), max_size=12)


@few_examples
@given(capacity=st.integers(1, 9), writes=WRITES)
def test_rows_have_one_number_exactly_if_they_are_of_one_trajectory(
    capacity: int, writes: list[list[bool] | tuple[bool, ...]]
) -> None:
    """Lists are rows one after the other, tuples a step of so many environments."""
    trajectories = Trajectories(capacity)
    begun: dict[int, int] = {}  # trajectories that each source has ended
    held: dict[int, tuple[int, int]] = {}  # of each slot its trajectory
    written = 0
    order: dict[int, int] = {}
    for ends in writes:
        for place, end in enumerate(ends):
            source = place if isinstance(ends, tuple) else -1
            held[written % capacity], order[written % capacity] = (source, begun.get(source, 0)), written
            begun[source] = begun.get(source, 0) + end
            written += 1
        if isinstance(ends, tuple):  # an environment that took no part begins anew
            begun.update({source: count + 1 for source, count in begun.items() if source >= len(ends)})
        kept = min(capacity, len(ends))
        slots = torch.arange(written - kept, written) % capacity
        (trajectories.add if isinstance(ends, tuple) else trajectories.extend)(slots, torch.tensor(ends))

        size = min(capacity, written)
        numbers, times = (part.tolist() for part in trajectories.of(size))
        assert len(numbers) == len(times) == size
        assert len(set(numbers)) == len(set(held.values())) == len({(numbers[s], held[s]) for s in range(size)})
        assert sorted(range(size), key=times.__getitem__) == sorted(range(size), key=order.__getitem__)


def test_what_is_extended_in_parts_goes_on_where_it_stopped() -> None:
    ends = torch.tensor([0, 0, 1, 0, 0, 0, 1, 0, 0]) > 0
    whole, parts = Trajectories(9), Trajectories(9)
    whole.extend(torch.arange(9), ends)
    for part in torch.arange(9).split(2):
        parts.extend(part, ends[part])
    assert torch.equal(whole.of(9)[0], torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2]))
    for one, other in zip(whole.of(9), parts.of(9)):
        assert torch.equal(one, other)


# --- the sampler ---------------------------------------------------------------------------------------------------


def sampler_of(
    r: Tensor, numbers: Tensor, times: Tensor | None = None, *, distances: Tensor | None = None, seed: int = 0
) -> SingleClusterSampler:
    sampler = SingleClusterSampler(generator=torch.Generator().manual_seed(seed), assignment="hard")
    sampler.extend(len(r))
    times = torch.arange(len(r)) if times is None else times
    sampler.assign(r, distances=distances, trajectories=(numbers, times))
    return sampler


def random_case(rows: int = 120, clusters: int = 3, *, length: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Labels, and numbers of trajectories of so many rows each."""
    labels = torch.randint(clusters, (rows,), generator=torch.Generator().manual_seed(seed))
    return labels, torch.arange(rows) // length


def tails_of(labels: Tensor, clusters: int, numbers: Tensor) -> Tensor:
    """[N, K], float64."""
    members = slow_tails(labels.tolist(), clusters, numbers.tolist(), list(range(len(labels))))
    return torch.tensor(members).double().T


def test_clusters_are_drawn_in_proportion_to_their_size_and_rows_evenly_within() -> None:
    labels, numbers = random_case()
    members = tails_of(labels, 3, numbers)
    sampler = sampler_of(one_hot(labels, 3), numbers)
    ids, r, p = sampler.partition_for(8)
    assert ids.tolist() == [0, 1, 2]
    assert torch.equal(r, members)
    torch.testing.assert_close(p, members.sum(dim=0) / members.sum())

    drawn = [sampler.sample(8) for _ in range(3000)]
    clusters = torch.tensor([cluster for _, cluster in drawn])
    assert p_value(torch.bincount(clusters), members.sum(dim=0)) > REJECT
    for z in range(3):
        rows = torch.cat([rows for rows, cluster in drawn if cluster == z])
        assert p_value(torch.bincount(rows, minlength=120), members[:, z]) > REJECT


def test_late_rows_are_drawn_more_often_as_the_docstring_says() -> None:
    labels, numbers = random_case(1200)
    sampler = sampler_of(one_hot(labels, 3), numbers)
    rows = torch.cat([sampler.sample(1)[0] for _ in range(8000)])
    by_step = torch.bincount(rows % 20, minlength=20)
    clusters_of_step = tails_of(labels, 3, numbers).sum(dim=1).reshape(-1, 20).sum(dim=0)
    assert p_value(by_step, clusters_of_step) > REJECT
    assert clusters_of_step[-1] > 2.5 * clusters_of_step[0]  # the last row is in every cluster that its trajectory has
    assert by_step[-1] > 2 * by_step[0]


def test_probabilities_and_responsibilities_are_those_before_the_tails() -> None:
    labels, numbers = random_case()
    sampler = sampler_of(one_hot(labels, 3), numbers)
    sampler.sample(8)
    assert torch.equal(sampler.responsibilities, one_hot(labels, 3))
    torch.testing.assert_close(sampler.probabilities, one_hot(labels, 3).mean(dim=0))


@pytest.mark.parametrize("sampled_before", [True, False])
def test_rows_added_since_are_drawn_with_every_cluster_in_their_share(sampled_before: bool) -> None:
    labels, numbers = random_case()
    members = tails_of(labels, 3, numbers)
    sampler = sampler_of(one_hot(labels, 3), numbers)
    if sampled_before:
        sampler.sample(8)
    sampler.extend(30)
    _, r, p = sampler.partition_for(8)
    share = members.mean(dim=0)
    torch.testing.assert_close(r, torch.cat([members, share.expand(30, 3)]))
    torch.testing.assert_close(p, share / share.sum())

    drawn = [sampler.sample(8) for _ in range(3000)]
    clusters = torch.tensor([cluster for _, cluster in drawn])
    assert p_value(torch.bincount(clusters), members.sum(dim=0)) > REJECT
    for z in range(3):
        rows = torch.cat([rows for rows, cluster in drawn if cluster == z])
        assert p_value(torch.bincount(rows, minlength=150), r[:, z]) > REJECT


def test_rows_overwritten_since_count_as_new_ones() -> None:
    labels, numbers = random_case()
    members = tails_of(labels, 3, numbers)
    sampler = sampler_of(one_hot(labels, 3), numbers)
    sampler.sample(8)
    for row in range(100):
        sampler.overwrite(torch.tensor([row]))
        _, r, p = sampler.partition_for(1)
        share = members[row + 1 :].mean(dim=0)
        torch.testing.assert_close(r[row + 1 :], members[row + 1 :])
        torch.testing.assert_close(r[: row + 1], share.expand(row + 1, 3))
        torch.testing.assert_close(p, share / share.sum())
    sampler.overwrite(torch.arange(100, 120))
    r, p = sampler.responsibilities, sampler.probabilities
    torch.testing.assert_close(r, p.to(r).expand(120, 3))


@pytest.mark.parametrize("sampled_before", [True, False])
def test_rows_overwritten_before_the_first_batch_count_as_new_ones_too(sampled_before: bool) -> None:
    labels, numbers = random_case()
    members = tails_of(labels, 3, numbers)
    sampler = sampler_of(one_hot(labels, 3), numbers)
    if sampled_before:
        sampler.sample(8)
    assert set(labels[:8].tolist()) == set(labels[8:20].tolist()) == {0, 1, 2}  # the last members are still there
    sampler.overwrite(torch.arange(8))
    _, r, _ = sampler.partition_for(1)
    torch.testing.assert_close(r[8:], members[8:])
    torch.testing.assert_close(r[:8], members[8:].mean(dim=0).expand(8, 3))


def test_a_cluster_too_small_for_the_batch_is_dissolved_before_the_tails() -> None:
    labels, numbers = random_case()
    labels[labels == 2] = 1
    labels[[3, 40, 41]] = 2
    nearest = torch.tensor([0, 1, 2]).expand(120, 3).contiguous()  # of the means to any row, the first
    sampler = sampler_of(one_hot(labels, 3), numbers, distances=nearest)
    assert torch.equal(sampler.partition_for(3)[1], tails_of(labels, 3, numbers))
    ids, r, p = sampler.partition_for(4)
    members = tails_of(torch.where(labels == 2, 0, labels), 2, numbers)
    assert ids.tolist() == [0, 1]
    assert torch.equal(r, members)
    torch.testing.assert_close(p, members.sum(dim=0) / members.sum())
    assert torch.equal(sampler.partition_for(3)[1], tails_of(labels, 3, numbers))  # for smaller batches it is there
    sampler.extend(5)
    torch.testing.assert_close(sampler.partition_for(4)[1][120:], members.mean(dim=0).expand(5, 2))


def test_one_cluster_holds_every_row_once() -> None:
    labels, numbers = random_case(clusters=1)
    sampler = sampler_of(one_hot(labels, 1), numbers)
    rows = torch.cat([sampler.sample(8)[0] for _ in range(1000)])
    assert p_value(torch.bincount(rows, minlength=120), torch.ones(120)) > REJECT


def test_a_clustering_without_trajectories_has_no_tails_again() -> None:
    labels, numbers = random_case()
    sampler = sampler_of(one_hot(labels, 3), numbers)
    sampler.sample(8)
    sampler.assign(one_hot(labels, 3))
    assert torch.equal(sampler.partition_for(8)[1], one_hot(labels, 3))


# --- the buffer ----------------------------------------------------------------------------------------------------


def labelled(labels: Any, ends: Any, **fields: Any) -> Transitions:
    """Observations hold the row and its label."""
    labels = torch.as_tensor(labels)
    observations = torch.stack([torch.arange(len(labels)), labels], dim=1).float()
    columns: dict[str, Any] = {
        "observations": observations,
        "actions": torch.zeros(len(labels), 1),
        "rewards": torch.zeros(len(labels)),
        "next_observations": observations,
        "terminals": torch.zeros(len(labels)),
        "timeouts": torch.as_tensor(ends),
    }
    return Transitions(**{**columns, **fields})


def rows_of(batch: Transitions) -> Tensor:
    """What its observations say."""
    assert isinstance(batch.observations, Tensor)
    return batch.observations[:, 0].long()


def raw(critics: Critics, batch: Transitions) -> Tensor:
    assert isinstance(batch.observations, Tensor)
    return batch.observations


def by_label(embeddings: Tensor, previous: Tensor | None) -> Tensor:
    return one_hot(embeddings[:, 1].long(), 3).float()


def buffer_of(data: Transitions, **options: Any) -> ClusteredReplayBuffer:
    options = {"clusterer": by_label, "embedding": raw, "seed": 0, **options}
    return ClusteredReplayBuffer.from_transitions(data, trajectory_tail=True, **options)


@pytest.mark.parametrize("kind", ["terminals", "timeouts"])
@pytest.mark.parametrize("parts", [1000, 7])
def test_batches_come_from_a_cluster_and_its_tails(kind: str, parts: int) -> None:
    labels, numbers = random_case()
    data = labelled(labels, torch.zeros(120), **{kind: (torch.arange(120) % 20 == 19).float()})
    buffer = buffer_of(data[:parts], capacity=120)
    for start in range(parts, 120, parts):
        buffer.extend(data[start : start + parts])  # some end in the middle of a trajectory
    buffer.refresh(CRITICS)
    members = tails_of(labels, 3, numbers)
    drawn = []
    for _ in range(2000):
        batch = buffer.sample(8)
        assert batch.indices is not None
        assert bool(members[batch.indices, batch.cluster].all())
        assert torch.equal(rows_of(batch), batch.indices)
        drawn.append(batch.cluster)
    assert p_value(torch.bincount(torch.tensor(drawn)), members.sum(dim=0)) > REJECT


@pytest.mark.parametrize("capacity", [200, 61])
def test_environments_side_by_side_have_trajectories_of_their_own(capacity: int) -> None:
    generator = torch.Generator().manual_seed(0)
    steps, environments = 40, 3
    labels = torch.randint(3, (steps, environments), generator=generator)
    ends = torch.rand(steps, environments, generator=generator) < 0.1
    buffer = ClusteredReplayBuffer(
        capacity,
        trajectory_tail=True,
        clusterer=by_label,
        embedding=raw,
        seed=0,
    )
    for step in range(steps):
        row = (step * environments + torch.arange(environments)).float()
        observations = torch.stack([row, labels[step]], dim=1)
        rewards, actions = torch.zeros(environments), torch.zeros(environments, 1)
        buffer.add(observations, actions, rewards, observations, torch.zeros(environments), ends[step].float())
    buffer.refresh(CRITICS)

    episode = (ends.cumsum(dim=0) - ends.long()) * environments + torch.arange(environments)
    held = range(max(0, steps * environments - capacity), steps * environments)
    flat, numbers = labels.flatten().tolist(), episode.flatten().tolist()
    members = slow_tails([flat[row] for row in held], 3, [numbers[row] for row in held], list(held))
    for _ in range(300):
        batch = buffer.sample(8)
        for row in rows_of(batch).tolist():
            assert members[batch.cluster][held.index(row)]


def test_clusters_are_hard_and_reported_without_their_tails() -> None:
    labels, _ = random_case()

    def softly(embeddings: Tensor, previous: Tensor | None) -> Tensor:
        return 0.4 * by_label(embeddings, previous) + 0.2

    buffer = buffer_of(labelled(labels, torch.arange(120) % 20 == 19), clusterer=softly)
    report = buffer.refresh(CRITICS)
    counts = torch.bincount(labels).tolist()
    assert report.sizes == tuple(counts)
    assert buffer.cluster_sizes.tolist() == pytest.approx(counts)
    assert torch.equal(buffer.responsibilities.argmax(dim=1), labels)
    assert set(buffer.responsibilities.unique().tolist()) == {0, 1}


def test_each_refresh_takes_the_trajectories_as_they_are_then() -> None:
    data = labelled([0] * 5 + [1] * 5, torch.arange(10) % 10 == 9)
    buffer = buffer_of(data, capacity=10)
    buffer.refresh(CRITICS)
    seen: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}
    for _ in range(200):
        batch = buffer.sample(2)
        seen[batch.cluster] |= set(np.asarray(batch.indices).tolist())
    assert seen == {0: set(range(10)), 1: set(range(5, 10)), 2: set()}

    buffer.extend(labelled([1, 1, 0, 0, 2], [0, 1, 0, 0, 1]))  # slots 0 to 4
    buffer.refresh(CRITICS)
    seen = {0: set(), 1: set(), 2: set()}
    for _ in range(300):
        batch = buffer.sample(1)
        seen[batch.cluster] |= set(np.asarray(batch.indices).tolist())
    assert seen == {0: {2, 3, 4}, 1: {5, 6, 7, 8, 9, 0, 1}, 2: {4}}


def test_before_the_first_refresh_batches_are_uniform() -> None:
    buffer = buffer_of(labelled(torch.zeros(30).long(), torch.arange(30) % 5 == 4))
    batches = [buffer.sample(8) for _ in range(500)]
    assert {batch.cluster for batch in batches} == {-1}
    rows = torch.cat([torch.as_tensor(batch.indices) for batch in batches])
    assert p_value(torch.bincount(rows, minlength=30), torch.ones(30)) > REJECT


def test_without_replacement_there_are_no_tails() -> None:
    message = "trajectory_tail: expected replacement=True, as a transition can be in several clusters, got replacement"
    with pytest.raises(ValueError, match="^" + message):
        ClusteredReplayBuffer(10, trajectory_tail=True, replacement=False)
    ClusteredReplayBuffer(10, trajectory_tail=False, replacement=False)


def test_tails_of_dissolved_clusters_do_not_depend_on_when_a_batch_was_drawn() -> None:
    """Which rows were a trajectory's last members in a cluster is as it was when it was clustered."""
    generator = torch.Generator().manual_seed(0)
    r = nn.functional.one_hot(torch.randint(0, 3, (40,), generator=generator), 3).float()
    r[:4] = torch.eye(3)[2]  # a third cluster of few rows
    r[4:, 2] = 0
    r[4:][r[4:].sum(dim=1) == 0] = torch.eye(3)[0]
    distances = torch.rand(40, 3, generator=generator)
    found = []
    for before in (False, True):
        sampler = SingleClusterSampler(generator=torch.Generator().manual_seed(1), assignment="hard")
        sampler.extend(40)
        numbers = torch.arange(40) // 20
        sampler.assign(r, distances=distances, trajectories=(numbers, torch.arange(40)))
        if before:
            sampler.sample(6)
        sampler.overwrite(torch.arange(6))
        found.append(sampler.partition_for(6))
    for one, other in zip(*found):
        assert torch.equal(one, other)
    assert len(found[0][0]) == 2


def test_a_buffer_with_tails_goes_on_as_one_that_was_saved_after_its_clustering() -> None:
    rows = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    ends = (torch.arange(60) % 10 == 9).float()
    data = Transitions(
        observations=rows, actions=rows[:, :1], rewards=rows[:, 0], next_observations=rows, terminals=ends
    )
    labels = torch.arange(60) % 7 // 3
    pair = []
    for saved in (False, True):
        buffer = ClusteredReplayBuffer.from_transitions(
            data, seed=0, trajectory_tail=True, clusterer=lambda y, previous: nn.functional.one_hot(labels, 3)
        )
        buffer.refresh(Critics(nn.Bilinear(2, 1, 1), nn.Bilinear(2, 1, 1)))
        if saved:
            buffer.load_state_dict(buffer.state_dict())
        buffer.extend(data[:16])
        pair.append(buffer)
    for _ in range(50):
        assert torch.equal(pair[0].sample(8).indices, pair[1].sample(8).indices)


def test_restored_numbers_and_times_go_on() -> None:
    one, other = Trajectories(12), Trajectories(12)
    one.add(torch.arange(2), torch.tensor([False, False]))
    one.extend(torch.arange(2, 5), torch.tensor([False, True, False]))
    other.restore(one.state())
    for each in (one, other):
        each.add(torch.arange(5, 7), torch.tensor([True, False]))
        each.add(torch.arange(7, 9), torch.tensor([False, True]))
        each.extend(torch.arange(9, 12), torch.tensor([False, True, False]))
    assert one.of(12)[0].tolist() == [0, 1, 2, 2, 3, 0, 1, 4, 1, 3, 3, 5]
    for a, b in zip(one.of(12), other.of(12)):
        assert torch.equal(a, b)
