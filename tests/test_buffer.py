"""The buffer: episodes linked as they are added, clustering when it is due, and nothing changed by what fails."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture as SklearnMixture
from torch import Tensor, nn

import c4buffer.refresh as refresh_file
import c4buffer.storage as storage_file
from c4buffer import (
    ClusteredReplayBuffer,
    Critics,
    Every,
    MixtureClusterer,
    Transitions,
    stacked_features,
    stacked_gradients,
)
from c4buffer.buffer import Embedding
from c4buffer.observations import observation_leaves
from c4buffer.prefetch import drawn_ahead


def transitions(count: int = 60, *, seed: int = 0, **fields: Any) -> Transitions:
    """Three behaviours, far apart in observations and actions."""
    g = torch.Generator().manual_seed(seed)
    centre = 6.0 * (torch.arange(count) % 3 - 1).unsqueeze(1)
    columns: dict[str, Any] = {
        "observations": torch.randn(count, 3, generator=g) + centre,
        "actions": torch.randn(count, 2, generator=g) + centre,
        "rewards": torch.randn(count, generator=g),
        "next_observations": torch.randn(count, 3, generator=g) + centre,
        "terminals": (torch.rand(count, generator=g) < 0.1).float(),
        "next_actions": torch.randn(count, 2, generator=g) + centre,
    }
    return Transitions(**{**columns, **fields})


def product(seed: int) -> nn.Bilinear:
    """Q(s, a) = s^T W a, so that grad_s Q = W a and grad_a Q = W^T s."""
    critic = nn.Bilinear(3, 2, 1, bias=False)
    nn.init.normal_(critic.weight, generator=torch.Generator().manual_seed(seed))
    return critic


def features(critic: nn.Bilinear, observations: Tensor, actions: Tensor) -> Tensor:
    return torch.cat([observations @ critic.weight[0], actions], dim=1)


CRITICS = Critics(product(1), product(2), features=features)


def buffer_of(data: Transitions | None = None, **options: Any) -> ClusteredReplayBuffer:
    return ClusteredReplayBuffer.from_transitions(transitions() if data is None else data, **{"seed": 0, **options})


def leaves(batch: Transitions) -> list[Tensor]:
    return [leaf for _, value in batch.columns() for leaf in observation_leaves(value)]


def held(buffer: ClusteredReplayBuffer) -> Transitions:
    """What the buffer holds, slot by slot, read off a batch so large that it has every row."""
    batch = buffer.sample(4000)
    assert batch.indices is not None
    rows = {slot: row for row, slot in enumerate(batch.indices.tolist())}
    assert sorted(rows) == list(range(len(buffer)))
    return batch[torch.tensor([rows[slot] for slot in range(len(buffer))])]


def assert_same(one: Transitions, other: Transitions) -> None:
    for a, b in zip(leaves(one), leaves(other), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def assert_same_draws(one: ClusteredReplayBuffer, other: ClusteredReplayBuffer, *, batches: int = 10) -> None:
    for _ in range(batches):
        a, b = one.sample(8), other.sample(8)
        assert a.indices is not None
        assert b.indices is not None
        assert a.indices.tolist() == b.indices.tolist()
        assert a.cluster == b.cluster
        assert_same(a, b)


def counting() -> tuple[list[int], Embedding]:
    """An embedding by actions, and the numbers of rows that it was called for."""
    calls: list[int] = []

    def embedding(critics: Critics, batch: Transitions) -> Tensor:
        calls.append(len(batch))
        return batch.actions

    return calls, embedding


# --- holding and drawing -------------------------------------------------------------------------------------------


def test_batches_hold_the_rows_they_name() -> None:
    data = transitions()
    batch = buffer_of(data).sample(32)
    assert len(batch) == 32
    assert batch.cluster == -1
    assert batch.indices is not None
    assert_same(batch, data[batch.indices])


@pytest.mark.parametrize("storage", ["memory", "device"])
def test_batches_are_never_views_of_the_storage(storage: str) -> None:
    data = transitions()
    buffer = buffer_of(data, storage=storage)
    for _ in range(20):
        batch = buffer.sample(64)
        for leaf in leaves(batch):
            leaf.zero_()
        assert batch.indices is not None
        batch.indices.zero_()
    assert_same(held(buffer), data)


@pytest.mark.parametrize("storage", ["memory", "device", "memmap"])
def test_rows_are_copies_of_what_is_held_in_the_order_of_their_indices(storage: str) -> None:
    data = transitions(60)
    buffer = buffer_of(data[:50], storage=storage, capacity=40)
    buffer.extend(data[50:])
    expected = held(buffer)
    assert_same(buffer.rows(), expected)
    assert_same(buffer.rows(7, 20), expected[7:20])
    part = buffer.rows(38)
    assert part.indices is not None
    assert part.indices.tolist() == [38, 39]
    assert part.cluster == -1
    for leaf in leaves(buffer.rows()):
        leaf.zero_()
    assert_same(buffer.rows(), expected)


def test_rows_are_windows_where_batches_are() -> None:
    buffer = buffer_of(n_steps=3)
    assert_same(buffer.rows(5, 20), held(buffer)[5:20])


@pytest.mark.parametrize("place", [(0, 61), (-1, 3), (5, 5), (60,), (0, 0), (0, 1.5)])
def test_rows_that_are_not_held_are_refused(place: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=r"start: expected an integer|stop: expected an integer|of the 60 transitions"):
        buffer_of().rows(*place)
    with pytest.raises(ValueError, match="rows: expected at least one of the 0 transitions held, got 0 to 0"):
        ClusteredReplayBuffer(10).rows()


def test_transitions_given_are_copied() -> None:
    data = transitions()
    buffer = buffer_of(data)
    for leaf in leaves(data):
        leaf.zero_()
    assert_same(held(buffer), transitions())


def test_from_transitions_has_room_for_them_unless_told_otherwise() -> None:
    data = transitions(10)
    assert buffer_of(data).capacity == 10
    small = buffer_of(data, capacity=4)
    assert (small.capacity, len(small)) == (4, 4)
    assert_same(held(small), data[torch.tensor([8, 9, 6, 7])])
    large = buffer_of(data, capacity=16)
    large.extend(data)
    assert len(large) == 16
    assert_same(held(large), Transitions.concatenate([data, data])[torch.tensor([16, 17, 18, 19, *range(4, 16)])])


def test_images_dicts_and_discrete_actions_pass_through() -> None:
    images = torch.randint(0, 256, (20, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    observations = {"image": images, "speed": torch.arange(20.0).unsqueeze(1)}
    data = Transitions(
        observations=observations,
        actions=torch.arange(20) % 4,
        rewards=torch.zeros(20),
        next_observations=observations,
        terminals=torch.zeros(20),
    )
    buffer = buffer_of(data)
    assert_same(held(buffer), data)
    batch = buffer.sample(5)
    assert isinstance(batch.observations, dict)
    assert batch.observations["image"].dtype == torch.uint8
    assert batch.actions.dtype == torch.int64


@pytest.mark.parametrize("storage", ["memory", "device"])
def test_whole_batches_come_on_the_device(storage: str) -> None:
    batch = buffer_of(device="meta", storage=storage).sample(4)
    assert batch.indices is not None
    assert {leaf.device.type for leaf in [*leaves(batch), batch.indices]} == {"meta"}


def test_memory_and_device_storage_draw_the_same_batches() -> None:
    buffers = [buffer_of(storage=storage) for storage in ("memory", "device")]
    for buffer in buffers:
        buffer.refresh(CRITICS)
    assert_same_draws(*buffers)


GROWING: dict[str, dict[str, Any]] = {
    "memory": {},
    "device": {"storage": "device"},
    "memmap": {"storage": "memmap"},
    "walks": {"replacement": False, "assignment": "hard"},
    "tails": {"trajectory_tail": True},
    "n-step": {"n_steps": 3},
}


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("case", GROWING)
def test_a_growing_buffer_gives_the_batches_of_one_whole_from_the_start(
    case: str, saved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_file, "FEWEST_ROWS", 4)
    rooms, found = [], []
    for growing in (True, False):
        buffer = ClusteredReplayBuffer(90, n_clusters=2, refresh=Every(15), seed=3, growing=growing, **GROWING[case])
        batches = []
        for step in range(80):
            rows = transitions(2, seed=step)
            end = torch.tensor([step % 7 == 6, step % 5 == 4]).float()
            buffer.add(rows.observations, rows.actions, rows.rewards, rows.next_observations, end)
            if step % 20 == 19:
                buffer.extend(transitions(4, seed=100 + step))
            if step == 12:
                buffer.attach(CRITICS)
            if step > 6:
                batches += [buffer.sample(7) for _ in range(1 + step % 3)]
            rooms.append(buffer._storage.room)
            if saved and step in (30, 70):
                buffer.save(tmp_path / "buffer.c4")
                buffer = ClusteredReplayBuffer.load(tmp_path / "buffer.c4", refresh=Every(15))
                assert buffer._storage.growing == growing
                buffer.attach(CRITICS)
        assert len(buffer) == 90
        found.append([*batches, buffer.sample(7)])
    assert {4, 8, 16, 32, 64, 90} >= set(rooms[:80]) > {4, 8, 16, 90}
    assert set(rooms[80:]) == {90}
    for one, other in zip(*found, strict=True):
        assert one.cluster == other.cluster
        assert one.indices is not None
        assert other.indices is not None
        assert torch.equal(one.indices, other.indices)
        assert_same(one, other)
    assert {batch.cluster for batch in found[0]} == {-1, 0, 1}


@pytest.mark.parametrize("prefetch", [1, 3, 50])
def test_batches_drawn_ahead_are_the_same_batches(prefetch: int) -> None:
    one, other = buffer_of(), buffer_of()
    for buffer in (one, other):
        buffer.refresh(CRITICS)
    found = list(one.batches(16, steps=10, prefetch=prefetch))
    assert len(found) == 10
    for batch, expected in zip(found, other.batches(16, steps=10)):
        assert batch.cluster == expected.cluster
        assert_same(batch, expected)


def test_so_many_batches_are_drawn_ahead_and_no_more_than_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = buffer_of()
    drawn: list[int] = []
    sample = buffer.sample

    def counting(size: int) -> Transitions:
        drawn.append(size)
        return sample(size)

    monkeypatch.setattr(buffer, "sample", counting)
    batches = buffer.batches(16, steps=5, prefetch=2)
    assert not drawn
    counts = []
    for _ in batches:
        counts.append(len(drawn))
    assert counts == [3, 4, 5, 5, 5]
    assert len(list(buffer.batches(16, steps=0, prefetch=2))) == 0
    endless = buffer.batches(16, prefetch=2)
    assert [len(next(endless)) for _ in range(4)] == [16] * 4
    with pytest.raises(ValueError, match="prefetch: expected an integer of at least 0, got -1"):
        buffer.batches(16, prefetch=-1)


def test_pinned_memory_is_for_cuda_devices() -> None:
    message = "storage: expected another than 'pinned', unless device is a CUDA device, got device 'cpu'"
    with pytest.raises(ValueError, match=message):
        ClusteredReplayBuffer(4, storage="pinned")


def test_with_replacement_a_batch_may_be_larger_than_the_buffer() -> None:
    buffer = buffer_of(transitions(5))
    assert len(buffer.sample(50)) == 50
    buffer.refresh(CRITICS)
    assert len(buffer.sample(50)) == 50
    assert buffer.probabilities.shape == (3,)  # as they stand, before dissolving


def test_without_replacement_it_may_not() -> None:
    buffer = buffer_of(transitions(5), replacement=False)
    assert buffer.sample(5).rewards.unique().numel() == 5
    with pytest.raises(ValueError, match=r"^batch_size: expected at most the 5 transitions held.*, got 6$"):
        buffer.sample(6)


def test_a_mismatching_extend_is_refused_and_nothing_changes() -> None:
    buffer, twin = buffer_of(), buffer_of()
    for each in (buffer, twin):
        each.refresh(CRITICS)
        each.sample(8)
    with pytest.raises(ValueError, match=r"^actions: expected rows like those stored, \[2\] .*, got \[5\]"):
        buffer.extend(transitions(3, actions=torch.zeros(3, 5), next_actions=torch.zeros(3, 5)))
    assert len(buffer) == 60
    assert_same_draws(buffer, twin)


# --- add -----------------------------------------------------------------------------------------------------------

FIELDS = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")


def steps(count: int, environments: int, ends: list[tuple[int, int, str]], *, seed: int = 0) -> dict[str, Tensor]:
    """Fields [count, environments, ...]; `ends` are (step, environment, "terminals" or "timeouts")."""
    g = torch.Generator().manual_seed(seed)
    fields = {
        "observations": torch.randn(count, environments, 3, generator=g),
        "actions": torch.randn(count, environments, 2, generator=g),
        "rewards": torch.randn(count, environments, generator=g),
        "next_observations": torch.randn(count, environments, 3, generator=g),
        "terminals": torch.zeros(count, environments),
        "timeouts": torch.zeros(count, environments),
    }
    for step, environment, kind in ends:
        fields[kind][step, environment] = 1
    return fields


def whole_episodes(fields: dict[str, Tensor]) -> Transitions:
    """Transitions(...) of each environment's steps, put in the order in which `add` gets them."""
    count, environments = fields["rewards"].shape
    parts = [
        Transitions(**{name: value[:, environment] for name, value in fields.items()})
        for environment in range(environments)
    ]
    order = torch.arange(count * environments).reshape(environments, count).T.flatten()
    return Transitions.concatenate(parts)[order]


def assert_linked_as(buffer: ClusteredReplayBuffer, expected: Transitions, *, newest: int) -> None:
    """The last rows of `expected`, slot by slot; the newest ones stay open, where the constructor closes them."""
    rows = len(expected)
    slots = [max(row for row in range(rows) if row % buffer.capacity == slot) for slot in range(len(buffer))]
    wanted, got = expected[torch.tensor(slots)], held(buffer)
    for name, value in wanted.columns():
        if name == "timeouts":
            closed = torch.tensor([row < rows - newest for row in slots])
            assert torch.equal(got.timeouts[closed], value[closed])
        else:
            assert torch.equal(getattr(got, name), value), name


END = st.tuples(st.integers(0, 11), st.integers(0, 2), st.sampled_from(["terminals", "timeouts"]))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    count=st.integers(1, 12),
    environments=st.integers(1, 3),
    ends=st.lists(END, max_size=8),
    capacity=st.integers(1, 40),
)
def test_rows_added_are_linked_as_whole_episodes_are(
    count: int, environments: int, ends: list[tuple[int, int, str]], capacity: int
) -> None:
    fields = steps(count, environments, [end for end in ends if end[0] < count and end[1] < environments])
    buffer = ClusteredReplayBuffer(capacity, seed=0)
    for step in range(count):
        buffer.add(*(fields[name][step] for name in FIELDS))
    assert_linked_as(buffer, whole_episodes(fields), newest=environments)


def test_one_environment_adds_without_a_leading_axis() -> None:
    fields = steps(9, 1, [(3, 0, "terminals"), (6, 0, "timeouts")])
    buffer = ClusteredReplayBuffer(20, seed=0)
    for step in range(9):
        buffer.add(*(fields[name][step, 0].numpy() for name in FIELDS))
    assert_linked_as(buffer, whole_episodes(fields), newest=1)
    got = held(buffer)
    assert got.has_next_actions.tolist() == [1, 1, 1, 0, 1, 1, 0, 1, 0]
    assert got.timeouts.tolist() == [0, 0, 0, 0, 0, 0, 1, 0, 0]
    assert torch.equal(got.next_actions[[0, 3, 6, 8]], fields["actions"][[1, 3, 6, 8], 0])


def test_the_newest_row_gets_its_next_action_when_that_is_known() -> None:
    fields = steps(2, 1, [])
    buffer = ClusteredReplayBuffer(5, seed=0)
    buffer.add(*(fields[name][0, 0] for name in FIELDS))
    assert held(buffer).has_next_actions.tolist() == [0]
    buffer.add(*(fields[name][1, 0] for name in FIELDS))
    assert held(buffer).has_next_actions.tolist() == [1, 0]
    assert torch.equal(held(buffer).next_actions[0], fields["actions"][1, 0])


def test_a_row_that_was_overwritten_is_not_linked() -> None:
    fields = steps(2, 1, [])
    buffer = ClusteredReplayBuffer(4, seed=0)
    buffer.add(*(fields[name][0, 0] for name in FIELDS))
    others = whole_episodes(steps(4, 1, [], seed=1))
    buffer.extend(others)
    before = held(buffer)
    buffer.add(*(fields[name][1, 0] for name in FIELDS))
    after = held(buffer)
    kept = torch.tensor([0, 2, 3])  # slot 1 is the one just written
    assert_same(after[kept], before[kept])


def test_an_extend_between_two_steps_does_not_break_the_link() -> None:
    fields = steps(2, 1, [])
    buffer = ClusteredReplayBuffer(9, seed=0)
    buffer.add(*(fields[name][0, 0] for name in FIELDS))
    buffer.extend(whole_episodes(steps(4, 1, [], seed=1)))
    buffer.add(*(fields[name][1, 0] for name in FIELDS))
    assert torch.equal(held(buffer).next_actions[0], fields["actions"][1, 0])


def test_add_takes_dicts_discrete_actions_and_python_scalars() -> None:
    buffer = ClusteredReplayBuffer(5, seed=0)
    for action in (2, 0, 1):
        observation = {"image": torch.full((1, 2, 2), action, dtype=torch.uint8), "speed": [float(action)]}
        buffer.add(observation, action, 1.5, observation, False, False)
    got = held(buffer)
    assert isinstance(got.observations, dict)
    assert got.observations["image"].dtype == torch.uint8
    assert got.observations["image"].shape == (3, 1, 2, 2)
    assert got.actions.tolist() == [2, 0, 1]
    assert got.next_actions.tolist() == [0, 1, 1]
    assert got.rewards.tolist() == [1.5] * 3


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("observations", torch.zeros(4), r"^observations: expected rows like those stored"),
        ("actions", torch.zeros(1), r"^actions: expected rows like those stored, \[2\] .*, got \[1\]"),
        ("rewards", torch.tensor(float("nan")), r"^rewards: expected finite values, got nan"),
        ("terminals", torch.tensor(2.0), r"^terminals: expected 0 or 1, got 2.0"),
    ],
)
def test_a_step_that_is_refused_changes_nothing(field: str, value: Tensor, message: str) -> None:
    fields = steps(3, 1, [])
    buffer = ClusteredReplayBuffer(9, seed=0)
    buffer.add(*(fields[name][0, 0] for name in FIELDS))
    before = held(buffer)
    wrong = {name: fields[name][1, 0] for name in FIELDS} | {field: value}
    if field == "observations":
        wrong["next_observations"] = value
    with pytest.raises(ValueError, match=message):
        buffer.add(**wrong)
    assert_same(held(buffer), before)
    buffer.add(*(fields[name][1, 0] for name in FIELDS))
    assert torch.equal(held(buffer).next_actions[0], fields["actions"][1, 0])


# --- refresh -------------------------------------------------------------------------------------------------------


def test_before_the_first_refresh_batches_are_uniform_and_of_no_cluster() -> None:
    buffer = buffer_of()
    assert {buffer.sample(8).cluster for _ in range(50)} == {-1}
    assert buffer.mixture is None
    assert buffer.last_report is None
    for ask in ("responsibilities", "probabilities", "cluster_sizes"):
        with pytest.raises(ValueError, match=r"^buffer: expected a refresh before .*, got no clusters"):
            getattr(buffer, ask)


def test_once_attached_every_n_refreshes_before_batches_0_n_2n() -> None:
    calls, embedding = counting()
    buffer = buffer_of(embedding=embedding, refresh=Every(4))
    buffer.attach(CRITICS)
    refreshes = []
    for _ in range(10):
        buffer.sample(8)
        refreshes.append(len(calls))
    assert refreshes == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3]


def test_batches_drawn_before_attaching_count() -> None:
    calls, embedding = counting()
    buffer = buffer_of(embedding=embedding, refresh=Every(4))
    clusters = [buffer.sample(8).cluster for _ in range(2)]
    buffer.attach(CRITICS)
    clusters += [buffer.sample(8).cluster for _ in range(2)]
    assert (clusters, len(calls)) == ([-1] * 4, 0)
    assert buffer.sample(8).cluster >= 0
    assert len(calls) == 1


def test_a_refresh_policy_gets_step_and_buffer() -> None:
    asked = []

    def policy(step: int, buffer: ClusteredReplayBuffer) -> bool:
        asked.append((step, buffer))
        return step in (1, 3)

    calls, embedding = counting()
    buffer = buffer_of(embedding=embedding, refresh=policy)
    buffer.sample(8)
    assert asked == []  # nothing attached yet
    buffer.attach(CRITICS)
    refreshes = []
    for _ in range(4):
        buffer.sample(8)
        refreshes.append(len(calls))
    assert asked == [(step, buffer) for step in (1, 2, 3, 4)]
    assert refreshes == [1, 1, 2, 2]


@pytest.mark.parametrize(("rows", "n"), [(60, 1000), (10_019, 1001)])
def test_by_default_it_refreshes_every_tenth_of_the_rows_but_a_thousand_at_least(rows: int, n: int) -> None:
    calls, embedding = counting()
    buffer = buffer_of(transitions(rows), embedding=embedding)
    buffer.attach(CRITICS)
    refreshes = []
    for _ in range(2 * n + 1):
        buffer.sample(2)
        refreshes.append(sum(calls) // rows)
    assert [step for step in range(1, 2 * n + 1) if refreshes[step] > refreshes[step - 1]] == [n, 2 * n]
    assert refreshes[0] == 1


def test_by_default_a_growing_buffer_refreshes_a_tenth_of_its_rows_after_the_last_time() -> None:
    calls, embedding = counting()
    one_cluster = MixtureClusterer(1, max_iterations=1)
    buffer = buffer_of(transitions(11_000), capacity=14_000, embedding=embedding, clusterer=one_cluster)
    buffer.attach(CRITICS)
    refreshed_at = []
    for step in range(2400):
        seen = len(calls)
        buffer.sample(2)
        if len(calls) > seen:
            refreshed_at.append(step)
        buffer.extend(transitions(1))
    assert refreshed_at == [0, 1100, 1100 + 1210]


def test_by_default_it_refreshes_as_soon_as_critics_are_attached_and_not_twice() -> None:
    calls, embedding = counting()
    buffer = buffer_of(embedding=embedding)
    assert buffer.sample(8).cluster == -1
    buffer.attach(CRITICS)
    assert buffer.sample(8).cluster >= 0
    assert len(calls) == 1
    buffer = buffer_of(embedding=embedding)
    buffer.attach(CRITICS)
    buffer.refresh()
    buffer.sample(8)
    assert len(calls) == 2


def test_the_report_says_what_the_buffer_says() -> None:
    buffer = buffer_of()
    report = buffer.refresh(CRITICS)
    assert report is buffer.last_report
    assert report.probabilities == tuple(buffer.probabilities.tolist())
    assert report.sizes == tuple(buffer.cluster_sizes.tolist())
    assert sum(report.probabilities) == pytest.approx(1, rel=1e-6)
    assert sum(report.sizes) == pytest.approx(60, rel=1e-6)
    np.testing.assert_allclose(buffer.responsibilities.double().mean(dim=0), report.probabilities, rtol=1e-6)
    assert buffer.mixture is not None
    assert report.iterations == buffer.mixture.iterations > 0
    assert report.log_likelihood == buffer.mixture.log_likelihood
    assert report.seconds > 0


@pytest.mark.parametrize("assignment", ["soft", "hard"])
def test_the_report_decomposes_the_covariance_of_the_gradients(assignment: str) -> None:
    data = transitions()
    buffer = buffer_of(data, assignment=assignment)
    report = buffer.refresh(CRITICS)
    # grad Q = (W a, W^T s), in float64 and with divisor N
    assert isinstance(data.observations, Tensor)
    assert isinstance(data.next_observations, Tensor)
    w, target_w = (critic.weight[0].detach().double() for critic in (CRITICS.critic, CRITICS.target))
    g = torch.cat([data.actions.double() @ w.T, data.observations.double() @ w], dim=1).numpy()
    target_g = torch.cat([data.next_actions.double() @ target_w.T, data.next_observations.double() @ target_w], dim=1)
    target_g = (target_g * (1 - data.terminals.double()).unsqueeze(1)).numpy()
    r = buffer.responsibilities.double().numpy()
    p = r.mean(axis=0)
    within, between = np.zeros((5, 5)), np.zeros((5, 5))
    for z in range(3):
        mean, target_mean = (np.average(x, axis=0, weights=r[:, z]) for x in (g, target_g))
        for weight, row, target_row in zip(r[:, z], g, target_g):
            within += weight / 60 * np.outer(target_row - target_mean, row - mean)
        between += p[z] * np.outer(target_mean - target_g.mean(axis=0), mean - g.mean(axis=0))
    total = (target_g - target_g.mean(axis=0)).T @ (g - g.mean(axis=0)) / 60
    np.testing.assert_allclose(total, within + between, rtol=1e-5, atol=1e-5)
    for got, expected in ((report.total, total), (report.within, within), (report.between, between)):
        assert got == pytest.approx(np.linalg.norm(expected), rel=1e-4)


def test_separate_behaviours_are_found_and_batches_come_from_one() -> None:
    buffer = buffer_of(embedding=lambda critics, batch: torch.cat([batch.observations, batch.actions], dim=1))
    report = buffer.refresh(CRITICS)
    assert sorted(report.sizes) == pytest.approx([20, 20, 20], abs=0.1)
    for _ in range(50):
        batch = buffer.sample(8)
        assert batch.indices is not None
        assert len({int(row) % 3 for row in batch.indices}) == 1


@pytest.mark.parametrize(("embedding", "read"), [("gradients", stacked_gradients), ("features", stacked_features)])
def test_named_embeddings_are_the_functions_of_that_name(embedding: str, read: Any) -> None:
    seen = []

    def clusterer(embeddings: Tensor, previous: Tensor | None) -> Tensor:
        seen.append(embeddings.clone())
        return torch.full((len(embeddings), 2), 0.5)

    data = transitions()
    report = buffer_of(data, embedding=embedding, clusterer=clusterer).refresh(CRITICS)
    torch.testing.assert_close(seen[0], read(CRITICS, data))
    assert report.total > 0
    buffer_of(data, embedding=read, clusterer=clusterer).refresh(CRITICS)
    assert torch.equal(seen[0], seen[1])


def test_an_embedding_may_be_any_callable_and_has_no_cross_covariance() -> None:
    embedding = nn.Linear(3, 2)  # its output has a graph, which is not kept
    buffer = buffer_of(embedding=lambda critics, batch: embedding(batch.observations))
    report = buffer.refresh(CRITICS)
    assert np.isnan([report.total, report.within, report.between]).all()
    assert not buffer.responsibilities.requires_grad


def test_embeddings_are_put_together_from_chunks_of_rows() -> None:
    seen = []

    def clusterer(embeddings: Tensor, previous: Tensor | None) -> Tensor:
        seen.append(embeddings)
        return torch.ones(len(embeddings), 1)

    data = transitions(9000)
    buffer_of(data, embedding=lambda critics, batch: batch.actions, clusterer=clusterer).refresh(CRITICS)
    assert torch.equal(seen[0], data.actions)


def test_a_custom_clusterer_gets_the_previous_responsibilities() -> None:
    previously = []

    def clusterer(embeddings: Tensor, previous: Tensor | None) -> Tensor:
        previously.append(previous)
        labels = KMeans(3, n_init=3, random_state=len(previously)).fit(embeddings.numpy()).labels_
        return nn.functional.one_hot(torch.from_numpy(labels).long(), 3).float()

    data = transitions()
    buffer = buffer_of(data, capacity=70, clusterer=clusterer, embedding=lambda critics, batch: batch.observations)
    report = buffer.refresh(CRITICS)
    assert report.sizes == (20, 20, 20)
    assert (report.iterations, str(report.log_likelihood)) == (0, "nan")
    assert buffer.mixture is None
    first = buffer.responsibilities
    buffer.refresh(CRITICS)
    second = buffer.responsibilities
    buffer.extend(data[:10])
    buffer.refresh(CRITICS)
    assert previously[0] is None
    assert torch.equal(previously[1], first)
    assert torch.equal(previously[2][:60], second)
    torch.testing.assert_close(previously[2][60:], torch.full((10, 3), 1 / 3))


@pytest.mark.parametrize("own", ["full", SklearnMixture(2, random_state=0)])
def test_a_clusterers_attribute_named_mixture_is_its_own_affair(own: Any) -> None:
    class Halves:
        mixture = own

        def __call__(self, embeddings: Tensor, previous: Tensor | None) -> Tensor:
            return torch.nn.functional.one_hot((embeddings[:, 0] > 0).long(), 2).float()

    buffer = buffer_of(clusterer=Halves())
    report = buffer.refresh(CRITICS)
    assert report.iterations == 0
    assert np.isnan(report.log_likelihood)
    assert buffer.mixture is None
    assert buffer.last_report is report


def test_a_warm_clusterer_starts_from_the_mixture_before() -> None:
    warm = MixtureClusterer(3, warm_start=True)
    buffer = buffer_of(transitions(61), clusterer=warm, embedding=lambda critics, batch: batch.observations)
    first = buffer.refresh(CRITICS)
    second = buffer.refresh(CRITICS)
    assert sorted(first.sizes) == pytest.approx([20, 20, 21], abs=0.1)
    assert second.iterations == 2  # its first step finds nothing to move, and its second sees that
    assert second.log_likelihood == pytest.approx(first.log_likelihood, abs=1e-3)
    np.testing.assert_allclose(second.probabilities, first.probabilities, atol=1e-3)  # in the same order


def test_n_clusters_and_clusterer_options_reach_the_mixture() -> None:
    assert len(buffer_of(n_clusters=5).refresh(CRITICS).sizes) == 5
    buffer = buffer_of(clusterer=MixtureClusterer(2, covariance="diag"))
    assert len(buffer.refresh(CRITICS).sizes) == 2
    assert buffer.mixture is not None
    assert buffer.mixture.covariance == "diag"


def positions(critics: Critics, batch: Transitions) -> Tensor:
    """Observations and actions: three separate behaviours."""
    assert isinstance(batch.observations, Tensor)
    return torch.cat([batch.observations, batch.actions], dim=1)


def test_auto_finds_the_three_behaviours_and_looks_again_at_each_refresh() -> None:
    buffer = buffer_of(transitions(300), capacity=400, n_clusters="auto", embedding=positions)
    report = buffer.refresh(CRITICS)
    assert sorted(report.sizes) == pytest.approx([100, 100, 100], abs=0.1)
    assert buffer.n_clusters == "auto"
    assert {buffer.sample(8).cluster for _ in range(100)} == {0, 1, 2}
    buffer.extend(transitions(1200)[::3])  # now all are of one
    assert len(buffer.refresh(CRITICS).sizes) == 1
    assert buffer.sample(8).cluster == 0


def test_auto_needs_no_more_than_one_transition() -> None:
    buffer = buffer_of(transitions(1), n_clusters="auto")
    assert buffer.refresh(CRITICS).sizes == (1,)
    with pytest.raises(ValueError, match=r"^n_clusters: expected an integer of at least 1, got 'Auto'$"):
        buffer_of(n_clusters="Auto")


def test_a_clusterer_of_ones_own_may_find_its_number_of_clusters() -> None:
    clusterer = MixtureClusterer("auto", max_clusters=2, warm_start=False)
    assert len(buffer_of(transitions(300), clusterer=clusterer, embedding=positions).refresh(CRITICS).sizes) == 2


def test_a_refresh_probes_the_critics_once() -> None:
    calls: list[int] = []

    def critic(s: Tensor, a: Tensor) -> Tensor:
        calls.append(len(a))
        value: Tensor = CRITICS.critic(s, a)
        return value

    buffer_of(transitions(9000)).refresh(Critics(critic, CRITICS.target))
    assert calls == [8, 16, 4096, 4096, 808]


def test_one_cluster_or_one_transition_can_be_refreshed() -> None:
    buffer = buffer_of(n_clusters=1)
    report = buffer.refresh(CRITICS)
    assert report.sizes == (60,)
    assert (report.within, report.between) == (pytest.approx(report.total), pytest.approx(0, abs=1e-5))
    single = buffer_of(transitions(1), n_clusters=1)
    assert single.refresh(CRITICS).probabilities == (1,)
    assert single.sample(4).cluster == 0


def test_changes_after_a_refresh_leave_its_mixture_as_it_was() -> None:
    for n_clusters in (1, 3):
        buffer = buffer_of(n_clusters=n_clusters)
        buffer.refresh(CRITICS)
        assert buffer.mixture is not None
        before = buffer.mixture.responsibilities.clone()
        buffer.extend(transitions(10))
        assert torch.equal(buffer.mixture.responsibilities, before)


def test_a_clusterer_may_give_whole_numbers() -> None:
    labels = torch.arange(60) % 3
    buffer = buffer_of(clusterer=lambda embeddings, previous: nn.functional.one_hot(labels, 3))
    buffer.refresh(CRITICS)
    assert torch.equal(buffer.responsibilities.argmax(dim=1), labels)


def test_rows_come_and_go_between_refreshes() -> None:
    buffer = buffer_of(capacity=80)
    buffer.refresh(CRITICS)
    p = buffer.probabilities
    buffer.extend(transitions(20, seed=1))
    np.testing.assert_allclose(buffer.probabilities, p, rtol=1e-12)
    np.testing.assert_allclose(buffer.responsibilities[60:], p.expand(20, 3), rtol=1e-6)
    buffer.extend(transitions(59, seed=2))  # overwrites all but one of the rows before
    assert buffer.clustered
    p = buffer.probabilities
    buffer.extend(transitions(1, seed=3))
    assert not buffer.clustered
    assert buffer.sample(8).cluster >= 0
    assert torch.equal(buffer.probabilities, p)
    np.testing.assert_allclose(buffer.responsibilities, p.expand(80, 3), rtol=1e-6)
    buffer.refresh(CRITICS)
    assert len(buffer.responsibilities) == 80
    assert buffer.sample(8).cluster >= 0


# --- what fails ----------------------------------------------------------------------------------------------------

CRITIC, TARGET = CRITICS.critic, CRITICS.target
BREAKS: dict[str, tuple[str, Callable[..., Any], str]] = {
    # what breaks, what it returns then, and the message
    "shape": ("critic", lambda s, a: CRITIC(s, a)[1:], r"critic: expected \[B\], .* with B = 60 .*, got \[59, 1\]"),
    "form": ("target", lambda s, a: {"q": TARGET(s, a)}, r"target: expected \[B\], .* with B = 60 .*, got dict"),
    "NaN": (
        "critic",
        lambda s, a: torch.where(torch.arange(60).unsqueeze(1) == 7, torch.nan, CRITIC(s, a)),
        r"critic: expected finite values, got nan in row 7 \(1 of 60 rows are bad\); has the training diverged\?",
    ),
    "infinity": ("target", lambda s, a: TARGET(s, a).abs() / 0, r"target: expected finite values, got inf in row 0"),
    "features": ("features", lambda c, s, a: s[1:], r"features: expected \[B, F\] with B = 60, got \[59, 3\]"),
    "embedding, axes": ("embedding", lambda c, t: t.rewards, r"embedding: .* N = 60, got torch.float32 \[60\]"),
    "embedding, rows": ("embedding", lambda c, t: t.actions[1:], r"embedding: expected .* N = 60, got .* \[59, 2\]"),
    "embedding, dtype": ("embedding", lambda c, t: t.actions.long(), r"embedding: .* floating .*, got torch.int64"),
    "embedding, type": ("embedding", lambda c, t: t.actions.numpy(), r"embedding: expected a floating .*, got ndarray"),
    "embedding, NaN": ("embedding", lambda c, t: t.actions * torch.nan, r"embedding: expected finite values, got nan"),
    "clusterer, labels": ("clusterer", lambda e, r: e[:, 0], r"responsibilities: .* N = 60, got torch.float32 \[60\]"),
    "clusterer, rows": ("clusterer", lambda e, r: torch.ones(9, 1), r"responsibilities: .* N = 60, got .* \[9, 1\]"),
    "clusterer, type": ("clusterer", lambda e, r: np.ones((60, 1)), r"responsibilities: .* N = 60, got ndarray"),
    "clusterer, sums": ("clusterer", lambda e, r: torch.ones(60, 2), r"resp.*: .* one, got rows that miss it by 1"),
    "clusterer, NaN": ("clusterer", lambda e, r: torch.ones(60, 2) * torch.nan, r"resp.*: .* finite .*, got nan"),
}


def breakable(case: str, broken: list[bool]) -> tuple[ClusteredReplayBuffer, Critics]:
    """A buffer and critics that work, until `broken` holds True."""
    what, breaks, _ = BREAKS[case]
    works: dict[str, Callable[..., Any]] = {
        "critic": CRITIC,
        "target": TARGET,
        "features": features,
        "embedding": stacked_gradients,
        "clusterer": lambda embeddings, previous: (embeddings[:, :3] / 9).softmax(dim=1),
    }
    parts = works | {what: lambda *given: (breaks if any(broken) else works[what])(*given)}
    buffer = buffer_of(
        embedding="features" if what == "features" else parts["embedding"],
        clusterer=parts["clusterer"] if what == "clusterer" else None,
        refresh=lambda step, buffer: any(broken),
    )
    return buffer, Critics(parts["critic"], parts["target"], features=parts["features"])


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("case", BREAKS)
def test_a_refresh_that_fails_changes_nothing(case: str, attached: bool) -> None:
    broken: list[bool] = []
    buffer, critics = breakable(case, broken)
    twin, twin_critics = breakable(case, [])
    buffer.refresh(critics)
    twin.refresh(twin_critics)
    if attached:
        buffer.attach(critics)
    assert_same_draws(buffer, twin, batches=2)
    report, mixture = buffer.last_report, buffer.mixture
    broken.append(True)
    with pytest.raises(ValueError, match="^" + BREAKS[case][2]):
        buffer.sample(8) if attached else buffer.refresh(critics)
    broken.clear()
    assert torch.equal(buffer.responsibilities, twin.responsibilities)
    assert torch.equal(buffer.probabilities, twin.probabilities)
    assert buffer.last_report is report
    assert buffer.mixture is mixture
    assert_same_draws(buffer, twin)


def test_a_first_refresh_that_fails_leaves_sampling_uniform() -> None:
    buffer, twin = buffer_of(), buffer_of()
    with pytest.raises(ValueError, match=r"^critic: expected finite values"):
        buffer.refresh(Critics(lambda s, a: CRITIC(s, a) / 0, TARGET))
    assert buffer.last_report is None
    assert buffer.mixture is None
    assert_same_draws(buffer, twin)


def test_a_refresh_needs_critics() -> None:
    with pytest.raises(ValueError, match=r"^critics: expected a Critics record, .*, got None$"):
        buffer_of().refresh()


@pytest.mark.parametrize("method", ["attach", "refresh"])
def test_critics_are_a_critics_record(method: str) -> None:
    with pytest.raises(ValueError, match=r"^critics: expected a Critics record, .*, got Bilinear$"):
        getattr(buffer_of(), method)(CRITIC)


def test_a_refresh_needs_transitions() -> None:
    with pytest.raises(ValueError, match=r"^refresh: expected transitions to cluster, got an empty buffer$"):
        ClusteredReplayBuffer(5).refresh(CRITICS)


def test_fewer_transitions_than_clusters_lower_k_until_there_are_more() -> None:
    data = transitions(8)
    buffer = buffer_of(data[:4], capacity=8, n_clusters=5)
    with pytest.warns(UserWarning, match=r"^n_components: 5 components for 4 distinct rows; the mixture has 4\.$"):
        assert buffer.refresh(CRITICS).sizes == (1.0,) * 4
    buffer.extend(data[4:])
    assert len(buffer.refresh(CRITICS).sizes) == 5


def test_a_buffer_of_one_row_is_sampled() -> None:
    buffer = ClusteredReplayBuffer(8, seed=0)
    buffer.attach(CRITICS)
    buffer.extend(transitions(1))
    with pytest.warns(UserWarning, match="3 components for 1 distinct rows"):
        assert buffer.sample(4).indices.tolist() == [0] * 4
    buffer.extend(transitions(7))
    assert set(buffer.sample(500).indices.tolist()) == set(range(8))


@pytest.mark.parametrize("attached", [False, True])
def test_an_empty_buffer_has_nothing_to_sample(attached: bool) -> None:
    buffer = ClusteredReplayBuffer(5)
    if attached:
        buffer.attach(CRITICS)
    with pytest.raises(ValueError, match=r"^buffer: expected transitions to draw from, got an empty buffer$"):
        buffer.sample(4)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("capacity", 0, "an integer of at least 1, got 0"),
        ("capacity", 2.5, "an integer of at least 1, got 2.5"),
        ("n_clusters", 0, "an integer of at least 1, got 0"),
        ("n_clusters", True, "an integer of at least 1, got True"),
        ("embedding", "pixels", "one of 'gradients', 'features', got 'pixels'"),
        ("embedding", None, "one of 'gradients', 'features', got None"),
        ("refresh", 1000, "a callable or None, as Every(1000), got 1000"),
        ("clusterer", "kmeans", "a callable or None, got 'kmeans'"),
        ("assignment", "firm", "one of 'soft', 'hard', got 'firm'"),
        ("storage", "disk", "one of 'memory', 'pinned', 'device', 'memmap', got 'disk'"),
        ("seed", -1, "an integer of at least 0, got -1"),
    ],
)
def test_wrong_options_are_named(option: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{option}: expected {re.escape(message)}$"):
        ClusteredReplayBuffer(**{"capacity": 10, option: value})


@pytest.mark.parametrize("batch_size", [0, 1.5, None])
def test_wrong_batch_sizes_are_named(batch_size: Any) -> None:
    with pytest.raises(ValueError, match=r"^batch_size: expected an integer of at least 1, got "):
        buffer_of().sample(batch_size)


# --- randomness ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replacement", [True, False])
def test_the_same_seed_gives_the_same_clusters_and_batches(replacement: bool) -> None:
    buffers = [buffer_of(seed=5, capacity=70, replacement=replacement, refresh=Every(6)) for _ in range(2)]
    for buffer in buffers:
        buffer.attach(CRITICS)
    assert_same_draws(*buffers)
    for buffer in buffers:
        buffer.extend(transitions(15, seed=1))
    assert_same_draws(*buffers)
    assert torch.equal(buffers[0].responsibilities, buffers[1].responsibilities)
    other = buffer_of(seed=6)
    assert not torch.equal(buffer_of(seed=5).sample(8).rewards, other.sample(8).rewards)


def test_without_a_seed_it_takes_torch_initial_seed() -> None:
    torch.manual_seed(31)
    torch.rand(7)  # only the initial seed counts
    unseeded, seeded = buffer_of(seed=None), buffer_of(seed=31)
    for buffer in (unseeded, seeded):
        buffer.refresh(CRITICS)
    assert_same_draws(unseeded, seeded)


def test_global_generators_are_neither_read_nor_touched() -> None:
    numpy_global = np.random.mtrand._rand
    buffers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        numpy_global.seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), str(numpy_global.get_state()), random.getstate()
        buffers.append(buffer_of(seed=0))
        buffers[-1].refresh(CRITICS)
        buffers[-1].sample(8)
        after = torch.get_rng_state(), str(numpy_global.get_state()), random.getstate()
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]
    assert_same_draws(*buffers)


def test_add_casts_floats_to_the_dtypes_held() -> None:
    buffer = ClusteredReplayBuffer(4)
    buffer.add(torch.zeros(2), torch.zeros(1), 1.0, torch.zeros(2), 0)
    buffer.add(np.ones(2), np.ones(1), np.float64(2), np.ones(2), False)  # as environments give them
    batch = buffer.sample(8)
    assert batch.observations.dtype == batch.actions.dtype == batch.rewards.dtype == torch.float32
    assert set(batch.rewards.tolist()) <= {1.0, 2.0}
    with pytest.raises(ValueError, match="observations: expected rows like those stored"):
        buffer.add(np.ones(3), np.ones(1), 2.0, np.ones(3), False)


def test_a_batch_that_can_not_be_drawn_is_refused_before_anything_is_clustered() -> None:
    calls: list[int] = []
    buffer = ClusteredReplayBuffer(4, replacement=False, refresh=lambda step, buffer: bool(calls.append(step)))
    buffer.add(torch.zeros(2), torch.zeros(1), 1.0, torch.zeros(2), 0)
    buffer.attach(Critics(nn.Bilinear(2, 1, 1), nn.Bilinear(2, 1, 1)))
    with pytest.raises(ValueError, match="batch_size: expected at most the 1 transitions held"):
        buffer.sample(2)
    assert calls == []
    with pytest.raises(ValueError, match="transitions: expected a Transitions record, got dict"):
        buffer.extend({})


def test_batches_drawn_before_a_failure_are_handed_out_first() -> None:
    def drawing(number: int) -> Any:
        if number == 5:
            raise RuntimeError("no more")
        return number

    ahead = drawn_ahead((functools.partial(drawing, number) for number in range(9)), 3, torch.device("cpu"))
    assert [next(ahead) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(RuntimeError, match="no more"):
        next(ahead)


def test_a_step_may_come_in_arrays_that_are_read_backwards_or_only_read() -> None:
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    fixed = np.zeros(1, dtype=np.float32)
    fixed.flags.writeable = False
    buffer = ClusteredReplayBuffer(4)
    buffer.add(image[:, :, ::-1], fixed, 0.0, image[::-1], False)
    assert torch.equal(buffer.sample(1).observations[0], torch.from_numpy(image[:, :, ::-1].copy()))
    with pytest.raises(ValueError, match="actions: expected numbers in one shape, got str"):
        buffer.add(image, "left", 0.0, image, False)


@pytest.mark.parametrize("wrong", ["ranks", "responsibilities"])
def test_a_refresh_that_fails_after_it_clustered_keeps_the_mixture_in_force(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = buffer_of()
    buffer.refresh(Critics(CRITIC, TARGET))
    weights, likelihood = buffer.mixture.weights.clone(), buffer.last_report.log_likelihood

    def broken(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(refresh_file, "ranks_of_means" if wrong == "ranks" else "check_responsibilities", broken)
    with pytest.raises(torch.OutOfMemoryError):
        buffer.refresh(Critics(product(7), product(8)))
    assert torch.equal(buffer.mixture.weights, weights)
    assert buffer.mixture.log_likelihood == likelihood


def test_autocast_changes_no_cluster() -> None:
    data = transitions(5000)
    found = []
    for enabled in (False, True):
        buffer = ClusteredReplayBuffer.from_transitions(data, n_clusters=3, seed=0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            report = buffer.refresh(Critics(CRITIC, TARGET))
        found.append((buffer.responsibilities, report.total, report.within, report.between))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]
