"""C4 on d3rlpy's MixedReplayBuffer: each of its two shares of a batch comes from one cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from c4buffer.integrations.d3rlpy import C4Config, transitions_of
from c4buffer.integrations.d3rlpy.batches import _another, _joined
from c4buffer.integrations.d3rlpy.dataset import to_mini_batch
from d3rlpy.algos import CalQLConfig, SACConfig, TD3Config, TD3PlusBCConfig
from d3rlpy.dataset import Episode, MixedReplayBuffer, MultiStepTransitionPicker, create_fifo_replay_buffer

from c4buffer import ClusteredReplayBuffer, MixtureClusterer, OnDrift, Transitions

from .test_d3rlpy import QUIET, batches_given, built, dataset_of, drawn, episodes, row_key, small, transitions_of_rows
from .test_d3rlpy_user import ONE

__all__ = ["drawn"]  # a fixture


def pendulum_episodes() -> Any:
    env = gymnasium.make("Pendulum-v1", max_episode_steps=30)
    buffer = create_fifo_replay_buffer(500, env=env)
    generator = np.random.default_rng(0)
    for episode in range(5):
        observation, _ = env.reset(seed=episode)
        for _ in range(30):
            action = generator.uniform(-2, 2, size=1).astype(np.float32)
            following, reward, *_ = env.step(action)
            buffer.append(observation, action, float(reward))
            observation = following
        buffer.clip_episode(False)
    return buffer


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
def test_shares_are_the_hosts_and_come_from_one_cluster_each(ratio: float, drawn: list[Transitions]) -> None:
    primary, secondary = dataset_of(episodes(6)), dataset_of(episodes(6, seed=1))
    mixed = MixedReplayBuffer(primary, secondary, secondary_mix_ratio=ratio)
    algo = built(C4Config(base=small(TD3PlusBCConfig), n_clusters=2, penalty_every=1, seed=0), primary)
    metrics = algo.fit(mixed, n_steps=5, n_steps_per_epoch=5, **QUIET)[0][1]
    assert np.isfinite(metrics["c4_penalty"])
    first = int((1 - ratio) * 16)
    sizes = [size for size in (first, 16 - first) if size > 0]
    assert [len(batch) for batch in drawn] == sizes * 5
    assert {batch.cluster for batch in drawn} == {0, 1}
    if 0 < ratio < 1:
        assert len(algo.c4_buffer) == primary.transition_count
        assert len(algo.c4_secondary_buffer) == secondary.transition_count
        for rows, batches in ((primary, drawn[::2]), (secondary, drawn[1::2])):
            everything = transitions_of_rows(rows)
            for batch in batches:
                assert torch.equal(batch.observations, everything.observations[batch.indices])


def test_policies_and_clusterers_remember_each_buffer_apart(tmp_path: Path) -> None:
    primary, secondary = dataset_of(episodes(6)), dataset_of(episodes(12, seed=1))
    algo = built(C4Config(base=small(TD3PlusBCConfig), n_clusters=2, seed=0), primary)
    policy, clusterer = OnDrift(1.0, check_every=1, probe_size=1000), MixtureClusterer(2)
    algo.c4_buffer_options, algo.c4_clusterer = {"refresh": policy}, clusterer
    algo.fit(MixedReplayBuffer(primary, secondary, secondary_mix_ratio=0.5), n_steps=3, n_steps_per_epoch=3, **QUIET)
    one, other = algo.c4_buffer, algo.c4_secondary_buffer
    assert policy.serves(one)
    assert len(policy.state_dict()["probe"]) == len(one) < len(other)
    assert len(other.state_dict()["policy"]["probe"]) == len(other)
    assert one.mixture is clusterer.mixture is not other.mixture
    for buffer in (one, other):
        assert buffer.mixture.log_likelihood == buffer.last_report.log_likelihood
        buffer.save(tmp_path / "buffer")
        loaded = ClusteredReplayBuffer.load(tmp_path / "buffer", clusterer=MixtureClusterer(2))
        assert loaded.last_report == buffer.last_report


def test_offline_data_and_an_environments_are_mixed_online(drawn: list[Transitions]) -> None:
    env = gymnasium.make("Pendulum-v1", max_episode_steps=30)
    offline, online = pendulum_episodes(), create_fifo_replay_buffer(1000, env=env)
    mixed = MixedReplayBuffer(online, offline, secondary_mix_ratio=0.5)
    algo = C4Config(base=small(SACConfig), n_clusters=2, refresh_interval=10, seed=0).create()
    algo.fit_online(env, mixed, n_steps=60, n_steps_per_epoch=60, update_start_step=5, random_steps=10, **QUIET)
    own, others = drawn[::2], drawn[1::2]
    assert len(own) == len(others) == 55
    assert own[0].cluster == -1  # five transitions are no clusters yet
    assert own[-1].cluster >= 0
    assert all(batch.cluster >= 0 for batch in others)
    known = {row_key(transitions_of_rows(online), i) for i in range(online.transition_count)}
    assert all(row_key(batch, i) in known for batch in own for i in range(len(batch)))
    assert algo.c4_secondary_buffer.capacity == offline.transition_count


def test_returns_to_go_are_those_of_each_shares_episodes() -> None:
    primary, secondary = dataset_of(episodes(6)), dataset_of(episodes(6, seed=1))
    mixed = MixedReplayBuffer(primary, secondary, secondary_mix_ratio=0.5)
    algo = built(C4Config(base=small(CalQLConfig), n_clusters=2, seed=0), primary)
    seen = batches_given(algo)
    algo.fit(mixed, n_steps=2, n_steps_per_epoch=2, **QUIET)
    table = {}
    for dataset in (primary, secondary):
        for i in range(dataset.transition_count):
            step = dataset.transition_picker(*dataset.buffer[i])
            rewards = step.rewards_to_go[:, 0]
            table[tuple(step.observation.tolist())] = float((0.99 ** np.arange(len(rewards)) * rewards).sum())
    for batch in seen:
        assert batch.observations.shape == (16, 3)
        for observation, returned in zip(batch.observations.tolist(), batch.returns_to_go[:, 0].tolist()):
            assert returned == pytest.approx(table[tuple(observation)], rel=1e-4, abs=1e-4)


def test_a_mixed_buffer_online_needs_a_picker_that_looks_back_in_what_grows_alone(tmp_path: Path) -> None:
    env = gymnasium.make("Pendulum-v1")
    ahead = MultiStepTransitionPicker(n_steps=3, gamma=0.99)
    mixed = MixedReplayBuffer(
        create_fifo_replay_buffer(100, env=env, transition_picker=ahead),
        dataset_of(episodes(), transition_picker=ahead),
        secondary_mix_ratio=0.5,
    )
    with pytest.raises(ValueError, match="buffer: expected one with a BasicTransitionPicker or Frame.*, got MultiStep"):
        C4Config(base=small(SACConfig)).create().fit_online(env, mixed)
    own = create_fifo_replay_buffer(100, env=env)
    algo = C4Config(base=small(SACConfig)).create()
    with pytest.raises(FileNotFoundError, match="somewhere"):
        algo.c4_resume(tmp_path / "somewhere")
    (tmp_path / "somewhere").touch()
    algo.c4_resume(tmp_path / "somewhere")
    with pytest.raises(ValueError, match="c4_resume: expected a fit of one dataset after it, got fit with a Mixed"):
        algo.fit(MixedReplayBuffer(own, own, secondary_mix_ratio=0.5), n_steps=1)


def test_the_primarys_share_is_rounded_down(drawn: list[Transitions]) -> None:
    primary, secondary = dataset_of(episodes(6)), dataset_of(episodes(6, seed=1))
    algo = built(C4Config(base=small(TD3PlusBCConfig), n_clusters=2, seed=0), primary)
    algo.fit(MixedReplayBuffer(primary, secondary, secondary_mix_ratio=0.3), **ONE)
    assert [len(batch) for batch in drawn] == [11, 5]  # of 16, as d3rlpy shares them
    assert algo.c4_critics is algo.impl.c4_critics


def test_of_a_secondary_alone_the_refreshes_are_logged() -> None:
    primary, secondary = dataset_of(episodes(6)), dataset_of(episodes(6, seed=1))
    algo = built(C4Config(base=small(TD3PlusBCConfig), n_clusters=2, seed=0), primary)
    metrics = algo.fit(MixedReplayBuffer(primary, secondary, secondary_mix_ratio=1.0), **ONE)[0][1]
    assert metrics["c4_cross_covariance"] == algo.c4_secondary_buffer.last_report.total


def test_a_clusterer_of_ones_own_takes_a_small_secondary() -> None:
    env = gymnasium.make("Pendulum-v1", max_episode_steps=20)
    offline = create_fifo_replay_buffer(10, env=env)
    for _ in range(2):
        offline.append(np.zeros(3, np.float32), np.zeros(1, np.float32), 0.0)
    offline.clip_episode(True)
    mixed = MixedReplayBuffer(create_fifo_replay_buffer(100, env=env), offline, secondary_mix_ratio=0.5)
    algo = C4Config(base=small(SACConfig), n_clusters=5, seed=0).create()
    algo.c4_clusterer = lambda embeddings, previous: torch.ones(len(embeddings), 1)
    algo.fit_online(env, mixed, n_steps=30, n_steps_per_epoch=30, **QUIET)
    assert len(algo.c4_secondary_buffer) == 2


def of_two_parts() -> Any:
    return dataset_of(
        [
            Episode([part.observations, part.observations[:, :2]], part.actions, part.rewards, part.terminated)
            for part in episodes()
        ]
    )


def test_shares_of_several_parts_are_joined_part_by_part() -> None:
    algo, rows = built(small(TD3Config), dataset_of(episodes())), transitions_of(of_two_parts())
    joined = _joined([to_mini_batch(rows[:3], algo), to_mini_batch(rows[5:7], algo)])
    for found, part in zip(joined.observations, rows.observations):
        assert torch.equal(found, torch.cat([part[:3], part[5:7]]))
    assert torch.equal(joined.rewards[:, 0], torch.cat([rows.rewards[:3], rows.rewards[5:7]]))


def test_ranks_of_both_buffers_talk_through_one_process_group() -> None:
    class Group:
        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("a process group has no copy")

    clusterer = MixtureClusterer(2)
    clusterer.process_group = Group()  # type: ignore[assignment]
    assert _another(clusterer).process_group is clusterer.process_group
