"""SB3's models trained from transitions alone."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import c4buffer.integrations.sb3.offline as offline_module
import gymnasium
import numpy as np
import pytest
import torch
from c4buffer.integrations.sb3 import (
    C4Callback,
    ClusteredReplayBuffer,
    fill_replay_buffer,
    learn_offline,
    transitions_of,
)
from gymnasium import spaces
from stable_baselines3 import DQN, PPO, SAC, TD3
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from c4buffer import CovariancePenalty, Transitions

from .test_sb3 import Toy, assert_equal, model_of


class OnlySpaces(gymnasium.Env[Any, Any]):
    """All that a model needs of an environment when it learns from data."""

    def __init__(self, discrete: bool = False) -> None:
        self.observation_space = spaces.Box(-10, 10, (3,), dtype=np.float32)
        self.action_space = spaces.Discrete(4) if discrete else spaces.Box(-2, 3, (2,), dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return np.zeros(3, np.float32), {}

    def step(self, action: Any) -> Any:
        raise AssertionError("no environment is stepped")


def data(rows: int = 300, discrete: bool = False) -> Transitions:
    generator = torch.Generator().manual_seed(0)
    ends = torch.arange(rows) % 20 == 19
    terminal = ends & (torch.arange(rows) % 40 == 39)
    continuous = torch.rand(rows, 2, generator=generator) * 5 - 2
    observations, last = (torch.randn(rows, 3, generator=generator) for _ in range(2))
    return Transitions(
        observations=observations,
        actions=torch.randint(4, (rows,), generator=generator) if discrete else continuous,
        rewards=torch.randn(rows, generator=generator),
        next_observations=torch.where(ends[:, None], last, observations.roll(-1, dims=0)),
        terminals=terminal.float(),
        timeouts=(ends & ~terminal).float(),
    )


def offline_model(algorithm: Any, **options: Any) -> Any:
    return model_of(algorithm, OnlySpaces(algorithm is DQN), **options)


@pytest.mark.parametrize("algorithm", [SAC, TD3, DQN])
def test_it_is_the_hosts_train_on_a_buffer_filled_by_add(algorithm: Any) -> None:
    transitions = data(discrete=algorithm is DQN)
    ours = learn_offline(offline_model(algorithm), transitions, 40)
    by_hand = offline_model(algorithm)
    actions = transitions.actions.numpy()
    actions = actions if algorithm is DQN else by_hand.policy.scale_action(actions)
    for i in range(len(transitions)):
        done = bool(transitions.terminals[i] + transitions.timeouts[i])
        by_hand.replay_buffer.add(
            transitions.observations[i : i + 1].numpy(),
            transitions.next_observations[i : i + 1].numpy(),
            actions[i : i + 1],
            transitions.rewards[i : i + 1].numpy(),
            np.array([done]),
            [{"TimeLimit.truncated": bool(transitions.timeouts[i])}],
        )
    for name in ("observations", "next_observations", "actions", "rewards", "dones", "timeouts", "pos", "full"):
        np.testing.assert_array_equal(getattr(ours.replay_buffer, name), getattr(by_hand.replay_buffer, name))
    by_hand._setup_learn(40)
    for _ in range(40):
        by_hand.num_timesteps += 1
        by_hand._update_current_progress_remaining(by_hand.num_timesteps, 40)
        by_hand._on_step()
        by_hand.train(gradient_steps=1, batch_size=16)
    assert_equal(ours, by_hand)
    assert ours.num_timesteps == ours._n_updates == 40
    assert type(ours) is algorithm
    assert ours.learning_starts == 20


def test_callbacks_schedules_and_checkpoints_go_on(tmp_path: Path) -> None:
    rates: list[float] = []

    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            rates.append(self.model.critic.optimizer.param_groups[0]["lr"])
            return True

    model = offline_model(SAC, learning_rate=lambda left: left * 1e-3)
    evaluations = EvalCallback(Monitor(Toy()), n_eval_episodes=1, eval_freq=20, log_path=str(tmp_path), verbose=0)
    evaluations_of_one = [Watch(), CheckpointCallback(10, str(tmp_path)), evaluations]
    learn_offline(model, data(), 40, callback=evaluations_of_one, progress_bar=False)
    assert rates[-1] < 1e-4 < rates[2]
    assert len(np.load(tmp_path / "evaluations.npz")["results"]) == 2
    assert len(list(tmp_path.glob("rl_model_*_steps.zip"))) == 4
    loaded = SAC.load(tmp_path / "rl_model_40_steps.zip", device="cpu")
    assert type(loaded) is SAC
    assert (tmp_path / "rl_model_40_steps.zip").stat().st_size < 200_000


@pytest.mark.filterwarnings("ignore:rich is experimental")
def test_a_progress_bar_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    learn_offline(offline_model(SAC), data(), 20, progress_bar=True)
    assert "20/20" in capsys.readouterr().out


def test_c4_trains_offline_and_may_go_on_online() -> None:
    model = model_of(SAC, replay_buffer_class=ClusteredReplayBuffer, replay_buffer_kwargs={"refresh_interval": 10})
    clusters: list[int] = []

    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            clusters.append(self.model.replay_buffer.cluster)
            return True

    callback = C4Callback(CovariancePenalty(0.1, scale="relative"))
    transitions = data().replace(actions=data().actions.clamp(-1, 1))
    learn_offline(model, transitions, 30, callback=[callback, Watch()])
    assert len(set(clusters[1:])) > 1
    model.learn(40, callback=callback, reset_num_timesteps=False)
    assert model.replay_buffer.size() == 340
    pickle.dumps(model.replay_buffer)


def test_a_step_may_take_several_gradient_steps() -> None:
    model = offline_model(SAC, gradient_steps=4)
    learn_offline(model, data(), 40)
    assert model.num_timesteps == model._n_updates == 40
    every = offline_model(SAC, gradient_steps=-1)
    assert learn_offline(every, data(), 10)._n_updates == 10


def test_an_error_leaves_the_model_as_it_was() -> None:
    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            raise KeyboardInterrupt

    model = offline_model(SAC)
    with pytest.raises(KeyboardInterrupt):
        learn_offline(model, data(), 10, callback=Stop())
    assert type(model) is SAC
    assert model.learning_starts == 20


def test_checkpoints_keep_the_models_own_settings(tmp_path: Path) -> None:
    model = offline_model(SAC)
    learn_offline(model, data(), 10, callback=CheckpointCallback(5, str(tmp_path)))
    assert SAC.load(tmp_path / "rl_model_5_steps.zip", device="cpu").learning_starts == 20
    assert model.learning_starts == 20


def test_a_callback_may_load_a_model_of_the_same_kind(tmp_path: Path) -> None:
    loaded = []

    class Loads(BaseCallback):
        def _on_step(self) -> bool:
            self.model.save(tmp_path / "model")
            loaded.append(type(self.model).load(tmp_path / "model", device="cpu"))
            return True

    learn_offline(offline_model(SAC), data(), 1, callback=Loads())
    assert type(loaded[0]) is SAC
    assert loaded[0].learning_starts == 20


def test_a_ring_that_took_timeouts_for_ends_still_knows_the_later_ends() -> None:
    model = offline_model(
        SAC,
        buffer_size=40,
        replay_buffer_class=ClusteredReplayBuffer,
        replay_buffer_kwargs={"handle_timeout_termination": False},
    )
    buffer = model.replay_buffer
    fill_replay_buffer(model, data(200)[::5])  # no row follows the one before
    zeros = np.zeros((1, 3), np.float32)
    for _ in range(40):
        buffer.add(zeros, zeros, np.zeros((1, 2), np.float32), np.zeros(1), np.ones(1), [{}])
    assert bool((buffer._get_samples(np.arange(40)).dones == 1).all())


def test_statistics_of_a_normalising_environment_stay_as_they_are() -> None:
    env = VecNormalize(DummyVecEnv([Toy]))
    transitions = data().replace(actions=data().actions.clamp(-1, 1))
    model = model_of(SAC, env)
    with pytest.raises(ValueError, match="model: expected a VecNormalize with statistics"):
        learn_offline(model, transitions, 5)
    model.learn(50)
    mean = env.obs_rms.mean.copy()
    training = []

    class Looks(BaseCallback):
        def _on_step(self) -> bool:
            training.append(env.training)
            return True

    learn_offline(model, transitions, 5, callback=Looks())
    np.testing.assert_array_equal(env.obs_rms.mean, mean)
    assert env.training
    assert all(training)  # as a checkpoint would save it


def test_what_does_not_fit_is_refused_and_the_buffer_keeps_what_it_has() -> None:
    model = learn_offline(offline_model(SAC), data(100), 1)
    wrong = data().replace(observations=torch.zeros(300, 4), next_observations=torch.zeros(300, 4))
    for transitions, message in (
        (data(501), "transitions: expected at most buffer_size, 500, got 501"),
        (wrong, "transitions: expected observations of shape .*, as the model's spaces have it"),
        (data(discrete=True), "transitions: expected actions of Box"),
        (data().replace(actions=data().actions * 9), "transitions: expected actions in Box.*, got from"),
    ):
        with pytest.raises(ValueError, match=message):
            learn_offline(model, transitions, 1)
        assert model.replay_buffer.size() == 100
    with pytest.raises(ValueError, match="model: expected an off-policy model"):
        learn_offline(PPO("MlpPolicy", Toy(), device="cpu"), data(), 1)
    without = offline_model(SAC)
    without.env = None
    with pytest.raises(ValueError, match="model: expected one with an environment"):
        learn_offline(without, data(), 1)
    with pytest.raises(ValueError, match="transitions: expected Transitions, .*, got dict"):
        learn_offline(model, {"observations": torch.zeros(5, 3)}, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="total_timesteps: expected an integer of at least 1"):
        learn_offline(model, data(), 0)
    several = model_of(
        SAC, Toy(), replay_buffer_kwargs={"handle_timeout_termination": False}, optimize_memory_usage=True
    )
    with pytest.raises(ValueError, match="model: expected one environment, .*, got 1, and True"):
        learn_offline(several, data(), 1)
    assert isinstance(model.replay_buffer, ReplayBuffer)


def test_a_callback_may_end_it() -> None:
    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.n_calls < 5

    model = learn_offline(offline_model(SAC), data(), 40, callback=Stop())
    assert (model.num_timesteps, model._n_updates) == (5, 4)


def test_it_logs_every_so_many_timesteps(monkeypatch: pytest.MonkeyPatch) -> None:
    assert offline_module.LOGGED_EVERY == 1000
    monkeypatch.setattr(offline_module, "LOGGED_EVERY", 10)
    steps: list[int] = []
    monkeypatch.setattr(SAC, "dump_logs", lambda model: steps.append(model.num_timesteps))
    learn_offline(offline_model(SAC), data(), 40)
    assert steps == [10, 20, 30, 40]


def test_callbacks_hear_of_each_round_and_see_what_the_hosts_loop_shows() -> None:
    calls: list[str] = []

    class Watch(BaseCallback):
        def _on_rollout_start(self) -> None:
            calls.append("start")

        def _on_step(self) -> bool:
            assert (self.locals["dones"].tolist(), self.locals["rewards"].tolist()) == ([False], [0.0])
            assert self.locals["infos"] == [{}]
            calls.append("step")
            return True

        def _on_rollout_end(self) -> None:
            calls.append("end")

    learn_offline(offline_model(SAC, gradient_steps=2), data(), 6, callback=Watch())
    assert calls == ["start", "step", "step", "end"] * 3


@pytest.mark.parametrize("kind", ["rewards alone", "dictionaries", "frozen"])
def test_normalising_environments_of_every_kind(kind: str) -> None:
    keyed = kind == "dictionaries"
    env = VecNormalize(DummyVecEnv([lambda: Toy("dict" if keyed else "box")]), norm_obs=kind != "rewards alone")
    model = model_of(SAC, env, policy="MultiInputPolicy" if keyed else "MlpPolicy").learn(25)
    env.training = kind != "frozen"
    learn_offline(model, transitions_of(model), 3)
    assert model.num_timesteps == 3
    assert env.training == (kind != "frozen")
