"""A buffer shares nothing with its copies and pickles, nor with the callables that it calls; and works in any mode."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from c4buffer import ClusteredReplayBuffer, Critics, OnDrift, Transitions

from .conftest import MakeTransitions, numbered

Copy = Callable[[ClusteredReplayBuffer], ClusteredReplayBuffer]


def pickled(buffer: ClusteredReplayBuffer) -> ClusteredReplayBuffer:
    restored: ClusteredReplayBuffer = pickle.loads(pickle.dumps(buffer))
    return restored


copies = pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["copy", "pickle"])


def critics() -> Critics:
    torch.manual_seed(0)
    return Critics(nn.Bilinear(3, 2, 1), nn.Bilinear(3, 2, 1))


def of_reward(make_transitions: MakeTransitions, rows: int, reward: float) -> Transitions:
    return make_transitions(rows).replace(rewards=torch.full((rows,), reward))


@copies
@pytest.mark.parametrize("room", [60, 80])
@pytest.mark.parametrize(
    "options", [{}, {"growing": True}, {"storage": "memmap"}, {"storage": "memmap", "growing": True}]
)
def test_what_is_written_to_a_copy_is_drawn_from_it_alone(
    options: dict[str, Any], room: int, copied: Copy, make_transitions: MakeTransitions
) -> None:
    data = of_reward(make_transitions, 60, 0.0)
    buffer = ClusteredReplayBuffer.from_transitions(data, capacity=room, seed=0, **options)
    buffer.refresh(critics())
    buffer.sample(8)
    twin = copied(buffer)
    for _ in range(70):
        assert torch.equal(twin.sample(8).indices, buffer.sample(8).indices)
    for number in (1.0, 2.0):  # all rows are other ones
        twin.extend(of_reward(make_transitions, 45, number))
    drawn = twin.sample(1000)
    assert set(drawn.rewards.tolist()) == {1.0, 2.0}
    buffer.extend(of_reward(make_transitions, 5, 3.0))
    assert set(buffer.sample(1000).rewards.tolist()) == {0.0, 3.0}
    twin.refresh(critics())
    assert 3.0 not in twin.sample(1000).rewards
    del buffer
    twin.extend(of_reward(make_transitions, 5, 4.0))
    assert {1.0, 2.0, 4.0} >= set(twin.sample(1000).rewards.tolist())


def test_a_growing_copy_in_files_outlives_the_original(make_transitions: MakeTransitions) -> None:
    buffer = ClusteredReplayBuffer(5000, storage="memmap", growing=True, seed=0)
    buffer.extend(of_reward(make_transitions, 1000, 0.0))
    twin = copy.deepcopy(buffer)
    assert twin._storage.folder != buffer._storage.folder
    folder = twin._storage.folder
    del buffer
    twin.extend(of_reward(make_transitions, 1000, 1.0))
    assert float(twin.sample(4000).rewards.mean()) == pytest.approx(0.5, abs=0.05)
    assert isinstance(folder, Path)
    assert folder.is_dir()
    del twin
    assert not folder.exists()


@copies
def test_drift_goes_on_in_a_copy_as_in_the_original(copied: Copy, make_transitions: MakeTransitions) -> None:
    drift = OnDrift(1e-4, check_every=2, probe_size=20)
    buffer = ClusteredReplayBuffer.from_transitions(make_transitions(60), seed=0, refresh=drift)
    q, target = nn.Bilinear(3, 2, 1), nn.Bilinear(3, 2, 1)
    buffer.attach(Critics(q, target))
    for _ in range(3):
        buffer.sample(8)
    twin = copied(buffer)
    twin.attach(Critics(q, target))
    for _ in range(8):
        for parameter in q.parameters():
            parameter.data.mul_(1.3)
        assert torch.equal(twin.sample(8).indices, buffer.sample(8).indices)
        assert twin.last_report is not None
        assert buffer.last_report is not None
        assert twin.last_report.log_likelihood == buffer.last_report.log_likelihood


def test_a_policy_given_to_a_second_buffer_starts_anew(make_transitions: MakeTransitions) -> None:
    drift = OnDrift(1.0, probe_size=20)
    for rows in (200, 30):
        buffer = ClusteredReplayBuffer.from_transitions(make_transitions(rows), seed=0, refresh=drift)
        buffer.attach(critics())
        for _ in range(3):
            buffer.sample(8)
    assert int(drift.state_dict()["probe"].max()) < 30


def test_a_buffer_whose_policy_serves_another_by_now_is_saved_and_loaded(
    make_transitions: MakeTransitions, tmp_path: Path
) -> None:
    drift = OnDrift(1.0, probe_size=100)
    buffers = [ClusteredReplayBuffer.from_transitions(make_transitions(n), seed=0, refresh=drift) for n in (50, 200)]
    for buffer in buffers:
        buffer.attach(critics())
        buffer.sample(8)
    for buffer in buffers:
        buffer.save(tmp_path / "buffer")
        loaded = ClusteredReplayBuffer.load(tmp_path / "buffer")
        loaded.attach(critics())
        expected = buffer.sample(8)
        assert torch.equal(loaded.sample(8).indices, expected.indices)


# --- callables that change what they are given ---------------------------------------------------------------------


def test_an_embedding_or_policy_that_works_in_place_leaves_the_data_alone(
    make_transitions: MakeTransitions,
) -> None:
    data = make_transitions(60)
    kept: list[Any] = []

    def centred(given: Critics, batch: Transitions) -> Tensor:
        kept.append(batch)
        rows = batch.observations
        assert isinstance(rows, Tensor)
        rows -= rows.mean(dim=0)
        return rows

    def shifting(observations: Any) -> Tensor:
        return torch.tanh(observations.sub_(1.0)[:, :2])

    q = critics().critic
    by_embedding = ClusteredReplayBuffer.from_transitions(data, embedding=centred)
    by_embedding.refresh(critics())
    by_policy = ClusteredReplayBuffer.from_transitions(data)
    by_policy.refresh(Critics(q, q, policy=shifting))
    kept[0].rewards.fill_(7.0)
    for buffer in (by_embedding, by_policy):
        batch = buffer.sample(200)
        for name in ("observations", "next_observations", "rewards"):
            assert torch.equal(getattr(batch, name), getattr(data, name)[batch.indices]), name


def test_what_a_policy_draws_at_a_refresh_leaves_the_global_generator_alone(make_transitions: MakeTransitions) -> None:
    def noisy(observations: Any) -> Tensor:
        return torch.randn(len(observations), 2)

    def responsibilities(seed: int) -> Tensor:
        q = critics().critic
        buffer = ClusteredReplayBuffer.from_transitions(make_transitions(60), seed=0)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        buffer.refresh(Critics(q, q, policy=noisy))
        assert torch.equal(torch.get_rng_state(), before)
        return buffer.responsibilities

    assert torch.equal(responsibilities(1), responsibilities(2))


# --- modes and graphs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replacement", [True, False])
def test_a_buffer_filled_in_inference_mode_is_used_outside_it(
    replacement: bool, make_transitions: MakeTransitions
) -> None:
    buffer = ClusteredReplayBuffer(100, seed=0, n_clusters=2, replacement=replacement)
    row = torch.zeros(3), torch.zeros(2), 0.0, torch.zeros(3), 0.0
    given = critics()
    for _ in range(2):
        with torch.inference_mode():
            buffer.extend(make_transitions(60))
            buffer.add(*row)
            buffer.refresh(given)
            buffer.sample(8)
        buffer.extend(make_transitions(60))
        buffer.add(*row)
        buffer.refresh(given)
        assert not buffer.sample(8).rewards.is_inference()


def test_actions_with_a_graph_are_stored_without_it(make_transitions: MakeTransitions) -> None:
    data = make_transitions(10)
    grown = data.replace(actions=data.actions.clone().requires_grad_() * 1)
    buffer = ClusteredReplayBuffer.from_transitions(make_transitions(20, seed=1))
    for _ in range(2):
        buffer.extend(grown)
    for _ in range(2):
        buffer.add(torch.zeros(3), grown.actions[0], 0.0, torch.zeros(3), 0.0)
    batch = buffer.sample(100)
    assert not batch.actions.requires_grad
    assert not batch.next_actions.requires_grad


# --- numbers of numpy's --------------------------------------------------------------------------------------------


def test_numbers_of_numpy_do_as_well(tmp_path: Path, make_transitions: MakeTransitions) -> None:
    buffer = ClusteredReplayBuffer(
        np.int64(100),
        n_clusters=np.int64(2),
        max_dim=np.int32(9),
        n_steps=np.int64(2),
        discount=np.float32(0.5),
        frame_stack=np.int64(1),
        replacement=np.bool_(True),  # type: ignore[arg-type]
        seed=np.int64(3),
    )
    buffer.extend(make_transitions(50))
    buffer.refresh(critics())
    assert len(buffer.sample(np.int64(8))) == 8
    assert sum(map(len, buffer.batches(np.int64(8), steps=np.int64(2), prefetch=np.int64(1)))) == 16
    buffer.save(tmp_path / "buffer")
    twin = ClusteredReplayBuffer.load(tmp_path / "buffer")
    assert torch.equal(twin.sample(8).indices, buffer.sample(8).indices)


@copies
def test_the_copy_of_a_policy_keeps_its_probe_when_a_refresh_comes_first(
    copied: Copy, make_transitions: MakeTransitions
) -> None:
    policy = OnDrift(1.0, check_every=5, probe_size=16)
    buffer = ClusteredReplayBuffer(200, n_clusters=2, refresh=policy, seed=0)
    buffer.extend(make_transitions(100))
    buffer.attach(critics())
    buffer.sample(8)
    buffer.extend(make_transitions(100))
    twin = copied(buffer)
    for each in (buffer, twin):
        each.attach(critics())
        each.refresh()
    twins_policy = twin._rows.policy
    assert isinstance(twins_policy, OnDrift)
    assert torch.equal(policy.state_dict()["probe"], twins_policy.state_dict()["probe"])


@pytest.mark.parametrize("options", [{}, {"n_steps": 3}, {"trajectory_tail": True}, {"frame_stack": 2}])
def test_a_buffer_made_or_loaded_in_inference_mode_is_used_outside_it(options: dict[str, Any], tmp_path: Path) -> None:
    image = torch.zeros(1, 2, 2) if "frame_stack" in options else torch.zeros(3)
    row = image, torch.zeros(2), 0.0, image, 0.0
    with torch.inference_mode():
        buffer = ClusteredReplayBuffer(40, seed=0, **options)
        buffer.add(*row)
        buffer.save(tmp_path / "buffer")
    buffer.add(*row)
    with torch.inference_mode():
        loaded = ClusteredReplayBuffer.load(tmp_path / "buffer")
    loaded.add(*row)
    assert len(buffer) == len(loaded) == 2
    assert not loaded.sample(3).rewards.is_inference()


# --- other processes -----------------------------------------------------------------------------------------------


class OfOnesOwn(ClusteredReplayBuffer):
    """A subclass."""


@pytest.mark.parametrize("kind", [ClusteredReplayBuffer, OfOnesOwn])
def test_another_process_has_a_buffer_of_its_own(kind: Any) -> None:
    buffer = kind.from_transitions(numbered(100), n_steps=3, n_clusters=2, seed=0)
    q = nn.Bilinear(1, 1, 1)
    buffer.refresh(Critics(q, q))
    buffer.attach(Critics(lambda s, a: q(s, a), q))
    before = buffer.rows(), buffer.responsibilities
    context = torch.multiprocessing.get_context("spawn")
    there, back = context.Queue(), context.Queue()
    process = context.Process(target=_echoes, args=(buffer, there, back))
    process.start()
    other = there.get(timeout=120)
    back.put(None)
    process.join(120)
    assert type(other) is kind
    assert other.rows().intervals.eq(1).all()
    assert torch.equal(buffer.rows().rewards, before[0].rewards)
    assert torch.equal(buffer.responsibilities, before[1])


def _echoes(buffer: ClusteredReplayBuffer, there: Any, back: Any) -> None:
    buffer.extend(numbered(100).replace(terminals=torch.ones(100)))
    there.put(buffer)
    back.get()  # until the other side has it


def test_copies_with_seeds_of_their_own_draw_batches_of_their_own(tmp_path: Path) -> None:
    for options in ({}, {"replacement": False}):
        buffer = ClusteredReplayBuffer.from_transitions(numbered(100), seed=0, **options)
        buffer.sample(8)
        buffer.save(tmp_path / "buffer")
        twins = [copy.deepcopy(buffer) for _ in range(3)]
        for twin, seed in zip(twins, (1, 2, 2)):
            twin.seed(seed)
        loaded = ClusteredReplayBuffer.load(tmp_path / "buffer", seed=2)
        one, two, again, other = ([each.sample(8).indices.tolist() for _ in range(9)] for each in (*twins, loaded))
        assert one != two
        assert two == again == other
        assert two != [buffer.sample(8).indices.tolist() for _ in range(9)]
    with pytest.raises(ValueError, match="^seed: expected an integer of at least 0, got -1$"):
        buffer.seed(-1)
