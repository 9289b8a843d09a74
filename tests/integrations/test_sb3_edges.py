"""Stable-Baselines3: rows that change under clusters, what is bound when, and models of unusual parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from c4buffer.integrations.sb3 import C4Callback, ClusteredReplayBuffer, attached, critics_of
from c4buffer.integrations.sb3.callback import ATTACHED
from gymnasium import spaces
from stable_baselines3 import DQN, SAC
from stable_baselines3.common.vec_env import DummyVecEnv

from c4buffer import CovariancePenalty

from .test_sb3 import Known, Toy, clustered, model_of


def put(buffer: Any, rows: int) -> None:
    """Adds random rows."""
    noise = np.random.default_rng(buffer.pos)
    for _ in range(rows):
        parts = [noise.normal(size=(buffer.n_envs, size)).astype(np.float32) for size in (3, 3, 2)]
        buffer.add(*parts, noise.normal(size=buffer.n_envs), np.zeros(buffer.n_envs), [{}] * buffer.n_envs)


def test_overwritten_rows_of_each_environment_lose_their_cluster() -> None:
    model = clustered(SAC, DummyVecEnv([Toy] * 3), buffer={"refresh_interval": 10**6}, buffer_size=60)
    buffer = model.replay_buffer
    put(buffer, 25)
    with attached(model):
        buffer.sample(16)
        first = buffer.pos * 3
        put(buffer, 1)
        found = buffer._sampler.responsibilities[first : first + 3].double()
        torch.testing.assert_close(found, buffer.probabilities.expand(3, -1), rtol=1e-5, atol=1e-6)


def test_clusters_are_made_anew_after_a_tenth_of_the_rows_or_a_thousand_batches() -> None:
    model = clustered(SAC, buffer={"refresh_interval": None}, buffer_size=1500)
    buffer = model.replay_buffer
    put(buffer, 1500)
    with attached(model):
        buffer.sample(16)
        for since, after in ((999, 1000), (1000, 1)):
            buffer._since_refresh = since
            buffer.sample(16)
            assert buffer._since_refresh == after


def test_metrics_of_forgotten_clusters_are_forgotten() -> None:
    model = clustered(SAC)
    put(model.replay_buffer, 60)
    with attached(model):
        model.replay_buffer.sample(16)
        assert model.replay_buffer.c4_metrics
        model.replay_buffer.forget_clusters()
        assert model.replay_buffer.c4_metrics == {}


class Closing(ClusteredReplayBuffer):
    """Of its rows, those from `limit` on can not be sampled."""

    limit = 500

    def _is_valid(self, rows: np.ndarray) -> np.ndarray:
        return rows < self.limit

    def _training_samples(self, rows: np.ndarray, env: Any) -> Any:
        self.drawn = rows
        return super()._training_samples(rows, env)


def test_where_no_row_of_a_cluster_can_be_sampled_any_more_all_others_are_alike() -> None:
    options = {"assignment": "hard", "refresh_interval": 10**9, "c4_seed": 0}
    model = clustered(SAC, cls=Closing, n_clusters=2, buffer=options)
    buffer = model.replay_buffer
    buffer.full = True
    found = torch.zeros(500, 2)
    found[:250, 0] = found[250:, 1] = 1
    with attached(model):
        buffer._clusterer = Known(found)
        buffer.sample(64)
        buffer.limit = 250
        rows = []
        for _ in range(20):
            buffer.sample(64)
            if buffer.cluster == 1:
                rows.extend(buffer.drawn.tolist())
    assert max(rows) < 250
    assert len(set(rows)) > 150


def test_a_buffer_that_was_emptied_while_bound_is_clustered_anew() -> None:
    model = clustered(SAC, buffer={"refresh_interval": 10**6})
    buffer = model.replay_buffer
    put(buffer, 60)
    with attached(model):
        buffer.sample(16)
        buffer.reset()
        put(buffer, 30)
        buffer.sample(16)
        assert buffer._sampler.size == 30
        assert buffer.cluster >= 0


@pytest.mark.parametrize(("c4_seed", "expected"), [(7, 7), (None, 3)])
def test_the_buffers_seed_goes_before_the_models_and_that_before_torchs(c4_seed: Any, expected: int) -> None:
    model = clustered(SAC, seed=3, buffer={"c4_seed": c4_seed})
    torch.manual_seed(99)
    with attached(model):
        assert model.replay_buffer._generator.initial_seed() == expected


def test_no_batch_is_held_after_a_learn_without_a_penalty() -> None:
    model = clustered(SAC).learn(30, callback=C4Callback())
    assert model.replay_buffer.take_batch() is None


def test_a_penalty_comes_on_top_of_gradients_that_are_cleared_to_zero() -> None:
    model = clustered(SAC, n_clusters=1).learn(30, callback=C4Callback())
    gradients = []
    for to_none in (True, False):
        with attached(model, CovariancePenalty(1e5)):
            np.random.seed(0)
            model.replay_buffer.sample(16)
            model.critic.optimizer.zero_grad(set_to_none=to_none)
            gradients.append([parameter.grad.clone() for parameter in model.critic.parameters() if parameter.ndim == 2])
    for one, other in zip(*gradients):
        assert one.abs().max() > 1e-3
        torch.testing.assert_close(one, other)


def test_a_zero_grad_of_ones_own_is_there_again() -> None:
    model, calls = clustered(SAC, n_clusters=1).learn(30, callback=C4Callback()), []
    model.critic.optimizer.zero_grad = own = lambda *a, **k: calls.append(1)
    with attached(model, CovariancePenalty(0.3)):
        model.critic.optimizer.zero_grad()
    assert calls == [1]
    assert model.critic.optimizer.zero_grad is own


def test_a_buffer_stays_bound_to_the_model_that_trained_last() -> None:
    models = [clustered(SAC, seed=seed).learn(40, callback=C4Callback()) for seed in (0, 1)]
    buffer = models[1].replay_buffer = models[0].replay_buffer
    with attached(models[0]):
        with attached(models[1]):
            models[0].train(gradient_steps=1, batch_size=16)
        assert buffer.is_bound_to(ATTACHED[models[0]].critics)


def test_a_buffer_of_another_action_space_is_refused() -> None:
    model = clustered(SAC)
    model.replay_buffer = ClusteredReplayBuffer(100, model.observation_space, spaces.Box(-1, 1, (5,)))
    with pytest.raises(ValueError, match="model: expected a replay buffer of its own action_space, Box"):
        model.learn(40, callback=C4Callback())


def test_the_metric_is_the_penalty_without_the_factor_of_the_steps_left_out() -> None:
    model, values = clustered(SAC, n_clusters=1).learn(30, callback=C4Callback()), []

    def penalty(critics: Any, batch: Any) -> torch.Tensor:
        values.append(CovariancePenalty(0.3)(critics, batch))
        return values[-1]

    with attached(model, penalty, penalty_every=3):  # type: ignore[arg-type]
        model.replay_buffer.sample(16)
        model.critic.optimizer.zero_grad()
        assert ATTACHED[model].metrics()["penalty"] == float(values[0].detach())


@pytest.mark.parametrize("algorithm", [SAC, DQN])
def test_features_are_what_the_last_layer_makes_values_of(algorithm: Any) -> None:
    model = clustered(algorithm)
    observations, actions = torch.randn(7, 3), torch.rand(7, 2)
    critic = critics_of(model).critic
    if algorithm is DQN:
        torch.testing.assert_close(model.q_net.q_net[-1](critic.features(observations, actions)), critic(observations))
    else:
        for member, network in zip(critic, model.critic.q_networks):
            last = network[-1](member.features(observations, actions))[:, 0]
            torch.testing.assert_close(last, member(observations, actions))


def test_a_model_without_a_critic_is_refused() -> None:
    model = model_of(SAC)
    del model.critic
    with pytest.raises(ValueError, match="model: expected one with a critic or a Q-network, got SAC"):
        critics_of(model)
