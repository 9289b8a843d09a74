"""C4 inside Stable-Baselines3: nothing changes without it, what it adds is exact, and nothing is left behind."""

from __future__ import annotations

import inspect
import pickle
import random
import textwrap
import warnings
from pathlib import Path
from typing import Any

import c4buffer.integrations.sb3.buffers
import gymnasium
import numpy as np
import pytest
import torch
from c4buffer.integrations.sb3 import (
    C4Callback,
    ClusteredDictReplayBuffer,
    ClusteredHerReplayBuffer,
    ClusteredNStepReplayBuffer,
    ClusteredReplayBuffer,
    attached,
    critics_of,
    learn_offline,
    load_replay_buffer,
    save_replay_buffer,
    transitions_of,
)
from c4buffer.integrations.sb3.callback import ATTACHED
from c4buffer.integrations.sb3.reading import transitions_of_samples
from gymnasium import spaces
from sb3_contrib import QRDQN, TQC, CrossQ
from stable_baselines3 import DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer
from stable_baselines3.sac.policies import SACPolicy

from c4buffer import CovariancePenalty, stacked_gradients

CONTINUOUS = [SAC, TD3, DDPG, TQC, CrossQ]
DISCRETE = [DQN, QRDQN]
ALL = [*CONTINUOUS, *DISCRETE]


class Toy(gymnasium.Env[Any, Any]):
    """Observations that drift and end now and then; boxes, images or dictionaries; continuous or discrete actions."""

    def __init__(self, kind: str = "box", discrete: bool = False) -> None:
        self.kind = kind
        box = spaces.Box(-10, 10, (3,), dtype=np.float32)
        image = spaces.Box(0, 255, (1, 36, 36), dtype=np.uint8)
        self.observation_space = {
            "box": box,
            "image": image,
            "dict": spaces.Dict({"a": box, "b": spaces.Box(-10, 10, (2,), dtype=np.float32)}),
        }[kind]
        self.action_space = spaces.Discrete(4) if discrete else spaces.Box(-1, 1, (2,), dtype=np.float32)
        self.noise = np.random.default_rng(0)
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        if seed is not None:
            self.noise = np.random.default_rng(seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        terminated = bool(self.noise.random() < 0.05)
        return self._observe(), float(self.noise.normal()), terminated, self.steps >= 30, {}

    def _observe(self) -> Any:
        if self.kind == "image":
            return self.noise.integers(0, 256, (1, 36, 36), dtype=np.uint8)
        box = self.noise.normal(size=3).astype(np.float32)
        return box if self.kind == "box" else {"a": box, "b": box[:2] * 2}


def model_of(algorithm: Any, env: Any = None, seed: int = 0, policy: str = "MlpPolicy", **options: Any) -> Any:
    """A small model, trained on every step after 20."""
    discrete = issubclass(algorithm, tuple(DISCRETE))
    common: dict[str, Any] = {
        "learning_starts": 20,
        "batch_size": 16,
        "train_freq": 1,
        "policy_kwargs": {"net_arch": [16, 16]},
        "device": "cpu",
        "buffer_size": 500,
    }
    if discrete:
        common["target_update_interval"] = 10
    return algorithm(policy, env or Toy(discrete=discrete), seed=seed, **{**common, **options})


def clustered(algorithm: Any, env: Any = None, n_clusters: int = 3, **options: Any) -> Any:
    buffer = {"n_clusters": n_clusters, "refresh_interval": 10, **options.pop("buffer", {})}
    cls = options.pop("cls", ClusteredReplayBuffer)
    return model_of(algorithm, env, replay_buffer_class=cls, replay_buffer_kwargs=buffer, **options)


def parameters_of(model: Any) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": value.detach().clone()
        for part, state in model.get_parameters().items()
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def assert_equal(one: Any, other: Any, tolerance: float = 0.0) -> None:
    first, second = parameters_of(one), parameters_of(other)
    assert first.keys() == second.keys()
    for name in first:
        if tolerance:
            torch.testing.assert_close(first[name], second[name], rtol=0, atol=tolerance)
        else:
            assert torch.equal(first[name], second[name]), name


class LargeImages(Toy):
    """Of 3 x 40 x 40, so that [g', g] has 9,600 columns."""

    def __init__(self) -> None:
        super().__init__("image", discrete=True)
        self.observation_space = spaces.Box(0, 255, (3, 40, 40), dtype=np.uint8)

    def _observe(self) -> Any:
        return self.noise.integers(0, 256, (3, 40, 40), dtype=np.uint8)


def test_gradients_by_many_pixels_are_projected_as_they_are_read() -> None:
    model = clustered(DQN, LargeImages(), policy="CnnPolicy", buffer_size=60)
    model.learn(32, callback=C4Callback())
    assert model.replay_buffer.cluster == -1  # unbound again
    assert 0 < model.replay_buffer.c4_metrics["smallest_probability"] < 1
    assert np.isnan(model.replay_buffer.c4_metrics["cross_covariance"])


@pytest.mark.parametrize("algorithm", ALL)
def test_one_cluster_and_no_penalty_equal_the_stock_model_bit_for_bit(algorithm: Any) -> None:
    stock = model_of(algorithm).learn(220)
    ours = clustered(algorithm, n_clusters=1).learn(220, callback=C4Callback(CovariancePenalty(0.0)))
    assert_equal(stock, ours)


@pytest.mark.parametrize("algorithm", [SAC, DQN])
def test_a_bound_but_idle_buffer_changes_nothing_beside_it(algorithm: Any) -> None:
    stock = model_of(algorithm).learn(120)
    idle = clustered(algorithm)
    beside = model_of(algorithm)
    idle.replay_buffer.bind(critics_of(idle))
    beside.learn(120)
    assert_equal(stock, beside)


PLACES = {
    SAC: "critic_loss = 0.5 * sum(F.mse_loss(current_q, target_q_values) for current_q in current_q_values)",
    TD3: "critic_loss = sum(F.mse_loss(current_q, target_q_values) for current_q in current_q_values)",
    DQN: "loss = F.smooth_l1_loss(current_q_values, target_q_values)",
    TQC: "critic_loss = quantile_huber_loss(current_quantiles, target_quantiles, sum_over_quantiles=False)",
    CrossQ: "critic_loss = 0.5 * sum("
    "F.mse_loss(current_q, target_q_values.detach()) for current_q in current_q_values)",
    QRDQN: "loss = quantile_huber_loss(current_quantiles, target_quantiles, sum_over_quantiles=True)",
}


def with_penalty_in_its_source(algorithm: Any, penalty: CovariancePenalty) -> Any:
    """SB3's own `train` with the term added where the loss is made."""
    source = textwrap.dedent(inspect.getsource(algorithm.train))
    line = PLACES[TD3 if algorithm is DDPG else algorithm]
    name = line.split(" ")[0]
    assert source.count(line) == 1
    source = source.replace(line, f"{line}; {name} = {name} + penalty(critics(self), transitions(replay_data))")
    scope = {**inspect.getmodule(algorithm.train).__dict__}
    scope.update(penalty=penalty, critics=critics_of, transitions=transitions_of_samples)
    exec(source.replace("super()", "super(type(self), self)"), scope)
    return type(algorithm.__name__, (algorithm,), {"train": scope["train"]})


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        *((algorithm, {}) for algorithm in ALL),
        (DQN, {"max_grad_norm": 0.01}),
        (QRDQN, {"max_grad_norm": 0.01, "learning_rate": 1e-2}),
    ],
)
def test_the_penalty_equals_the_term_in_the_hosts_source(algorithm: Any, options: dict[str, Any]) -> None:
    penalty = CovariancePenalty(50.0 if algorithm is QRDQN else 0.5, scale="relative")
    changed = with_penalty_in_its_source(algorithm, penalty)
    # each is made and trained before the next one, as making one sets the global seeds
    expected = model_of(changed, **options).learn(40)
    ours = clustered(algorithm, n_clusters=1, **options).learn(40, callback=C4Callback(penalty))
    stock = model_of(algorithm, **options).learn(40)
    assert ours._n_updates == 20
    assert_equal(expected, ours, tolerance=1e-7)
    with pytest.raises(AssertionError):
        assert_equal(stock, ours, tolerance=1e-7)


@pytest.mark.parametrize("algorithm", ALL)
def test_batches_come_from_one_cluster_and_metrics_are_logged(algorithm: Any) -> None:
    model = clustered(algorithm)
    clusters: list[int] = []
    logged: dict[str, float] = {}

    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            clusters.append(self.model.replay_buffer.cluster)
            logged.update({k: v for k, v in self.logger.name_to_value.items() if k.startswith("c4/")})
            return True

    penalty = CovariancePenalty(0.1, scale="relative")
    model.learn(100, callback=[C4Callback(penalty, penalty_every=2), Watch()])
    assert set(clusters[:15]) == {-1}
    assert len(set(clusters[30:])) > 1
    assert set(clusters[30:]) <= {0, 1, 2}
    names = {"cross_covariance", "within_cross_covariance", "between_cross_covariance", "smallest_probability"}
    assert {f"c4/{name}" for name in {*names, "refresh_seconds", "penalty"}} == set(logged)
    assert all(np.isfinite(value) for value in logged.values())


@pytest.mark.parametrize("embedding", ["gradients", "features"])
@pytest.mark.parametrize("algorithm", ALL)
def test_clusters_of_either_embedding_after_saving_loading_and_further_learning(
    algorithm: Any, embedding: str, tmp_path: Path
) -> None:
    model = clustered(algorithm, buffer={"embedding": embedding, "assignment": "hard"})
    model.learn(60, callback=C4Callback())
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = algorithm.load(tmp_path / "model", env=model.get_env(), device="cpu")
    assert_equal(model, loaded)
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert loaded.replay_buffer.size() == model.replay_buffer.size()
    loaded.learn(40, callback=C4Callback(), reset_num_timesteps=False)
    assert loaded.num_timesteps == 100


def test_nothing_is_left_behind() -> None:
    model = clustered(SAC)
    optimizer = model.critic.optimizer
    penalty = CovariancePenalty(0.1, scale="relative")
    model.learn(40, callback=C4Callback(penalty))
    assert "zero_grad" not in vars(optimizer)
    assert model.replay_buffer.take_batch() is None

    def interrupted() -> None:
        with attached(model, penalty):
            model.train(gradient_steps=2, batch_size=16)
            assert "zero_grad" in vars(optimizer)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "zero_grad" not in vars(optimizer)

    def patched(set_to_none: bool = True) -> None:
        type(optimizer).zero_grad(optimizer, set_to_none)

    optimizer.zero_grad = patched
    for some in (None, penalty):
        with attached(model, some):
            model.train(gradient_steps=1, batch_size=16)
        assert optimizer.zero_grad is patched
    del optimizer.zero_grad

    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            raise KeyboardInterrupt

    for learn in (model.learn, lambda *a, **k: learn_offline(model, transitions_of(model), *a, **k)):
        with pytest.raises(KeyboardInterrupt):
            learn(40, callback=[C4Callback(penalty), Stop()])
        assert "zero_grad" not in vars(optimizer)
        assert model.replay_buffer._critics is None
        assert type(model) is SAC
    with attached(model):  # and within a binding there may be another
        learn_offline(model, transitions_of(model), 3, callback=C4Callback(penalty))
    assert type(model) is SAC

    class Refuse(BaseCallback):
        def _on_training_start(self) -> None:
            raise KeyboardInterrupt

        def _on_step(self) -> bool:
            return True

    with pytest.raises(KeyboardInterrupt):
        learn_offline(model, transitions_of(model), 5, callback=[C4Callback(penalty), Refuse()])
    assert type(model) is SAC
    assert "zero_grad" not in vars(optimizer)
    assert model.replay_buffer._critics is None
    with pytest.raises(KeyboardInterrupt):
        model.learn(40, callback=[C4Callback(penalty), Refuse()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        learn_offline(model, transitions_of(model), 3)  # without C4
    assert type(model) is SAC
    assert model.replay_buffer._critics is None
    with pytest.raises(KeyboardInterrupt):
        model.learn(40, callback=[C4Callback(penalty), Refuse()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # uniform until the buffer knows the critics
        model.learn(40)  # without C4
    assert type(model) is SAC
    assert "zero_grad" not in vars(optimizer)
    assert model.replay_buffer._critics is None

    def failing(*_: Any) -> Any:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        model.learn(40, callback=C4Callback(failing))  # type: ignore[arg-type]
    assert "zero_grad" not in vars(optimizer)
    assert all(parameter.grad is None for parameter in model.critic_target.parameters())


def test_each_of_two_models_with_one_buffer_clusters_by_its_own_critics() -> None:
    models = [clustered(SAC, seed=seed).learn(40, callback=C4Callback()) for seed in (0, 1)]
    buffer = models[1].replay_buffer = models[0].replay_buffer
    penalty = CovariancePenalty(0.1, scale="relative")
    with attached(models[0], penalty):
        with attached(models[1], penalty):
            for model in (*models, models[0]):
                model.train(gradient_steps=2, batch_size=16)
                assert buffer.is_bound_to(ATTACHED[model].critics)
                assert len(buffer.probabilities) == 3
        models[0].train(gradient_steps=2, batch_size=16)
        assert buffer.is_bound_to(ATTACHED[models[0]].critics)
    assert buffer._critics is None


def test_the_penalty_is_put_on_every_kth_step() -> None:
    model = clustered(SAC, n_clusters=1)
    model.learn(30)
    seen: list[int] = []

    class Counting(CovariancePenalty):
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            seen.append(model._n_updates)
            return super().__call__(*arguments, **options)

    with attached(model, Counting(0.1), penalty_every=3):
        for _ in range(7):
            model.train(gradient_steps=1, batch_size=16)
    assert [n - seen[0] for n in seen] == [0, 3, 6]


@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 7]])
def test_the_penaltys_steps_are_counted_on_however_a_training_is_cut(pieces: list[int]) -> None:
    calls = []

    class Counting(CovariancePenalty):
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            calls.append(1)
            return super().__call__(*arguments, **options)

    model = clustered(SAC, n_clusters=1).learn(30, callback=C4Callback())
    for steps in pieces:
        with attached(model, Counting(0.1), penalty_every=4):
            model.train(gradient_steps=steps, batch_size=16)
        model.learn(steps, callback=C4Callback(Counting(0.1), penalty_every=4), reset_num_timesteps=False)
    assert len(calls) == 6


def test_without_a_callback_one_warning_says_that_sampling_is_uniform() -> None:
    with pytest.warns(UserWarning, match="sampling stays uniform until the buffer knows the critics"):
        model = clustered(SAC).learn(25)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(25)
        clustered(SAC, n_clusters=1).learn(25)


@pytest.mark.parametrize("n_envs", [1, 4])
@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_rows_are_read_as_the_host_reads_them(n_envs: int, optimize: bool, normalize: bool) -> None:
    env: Any = DummyVecEnv([Toy for _ in range(n_envs)])
    env = VecNormalize(env) if normalize else env
    kwargs = {"handle_timeout_termination": False} if optimize else {}
    model = clustered(SAC, env, buffer=kwargs, buffer_size=80, optimize_memory_usage=optimize)
    model.learn(200, callback=C4Callback())
    buffer = model.replay_buffer
    assert buffer.full
    rows = np.array([r for r in np.random.default_rng(0).permutation(80) if not optimize or r // n_envs != buffer.pos])
    found = buffer._samples(rows, env if normalize else None)
    place, e = np.divmod(rows, n_envs)
    observations = buffer.observations[place, e]
    following = (
        buffer.observations[(place + 1) % buffer.buffer_size, e] if optimize else buffer.next_observations[place, e]
    )
    rewards = buffer.rewards[place, e]
    if normalize:
        observations, following = env.normalize_obs(observations), env.normalize_obs(following)
        rewards = env.normalize_reward(rewards)
    np.testing.assert_allclose(found.observations.numpy(), observations, rtol=1e-6)
    np.testing.assert_allclose(found.next_observations.numpy(), following, rtol=1e-6)
    np.testing.assert_allclose(found.rewards[:, 0].numpy(), rewards, rtol=1e-6)
    np.testing.assert_array_equal(found.actions.numpy(), buffer.actions[place, e])
    dones = buffer.dones[place, e] * (1 - buffer.timeouts[place, e])
    np.testing.assert_array_equal(found.dones[:, 0].numpy(), dones)
    # a row that a memory-optimised buffer is about to write is never drawn
    buffer.bind(critics_of(model), seed=0)
    for _ in range(30):
        batch = buffer.sample(64, env=env if normalize else None)
        assert len(batch.rewards) == 64
        if optimize:
            gone = torch.as_tensor(buffer.observations[buffer.pos])
            raw = (
                batch.observations
                if not normalize
                else torch.as_tensor(env.unnormalize_obs(batch.observations.numpy()))
            )
            assert not any((raw - row).abs().max(dim=1).values.min() < 1e-4 for row in gone)


@pytest.mark.parametrize("normalize", [False, True])
def test_n_steps_of_several_environments_are_read_as_those_of_each(
    normalize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    env: Any = DummyVecEnv([Toy for _ in range(4)])
    env = VecNormalize(env) if normalize else env
    model = clustered(SAC, env, cls=ClusteredNStepReplayBuffer, buffer={"n_steps": 3}, buffer_size=80)
    model.learn(200, callback=C4Callback())
    buffer = model.replay_buffer
    assert buffer.full
    rows = np.random.default_rng(0).permutation(80)
    timeouts = buffer.timeouts.copy()
    found = buffer._samples(rows, env if normalize else None)
    np.testing.assert_array_equal(buffer.timeouts, timeouts)
    monkeypatch.setattr(c4buffer.integrations.sb3.buffers, "INDEXED", ())  # one environment after the other
    expected = buffer._samples(rows, env if normalize else None)
    for one, other in zip(found, expected):
        assert torch.equal(one, other)
    assert len({float(discount) for discount in found.discounts}) > 1


def test_dictionaries_of_several_environments_are_read_as_they_were_stored() -> None:
    env = DummyVecEnv([lambda: Toy("dict")] * 4)
    model = clustered(SAC, env, cls=ClusteredDictReplayBuffer, policy="MultiInputPolicy", buffer_size=80)
    model.learn(60, callback=C4Callback())
    buffer = model.replay_buffer
    rows = np.random.default_rng(0).permutation(60)
    found = buffer._samples(rows, None)
    place, e = np.divmod(rows, 4)
    for key, stored in buffer.observations.items():
        np.testing.assert_array_equal(found.observations[key].numpy(), stored[place, e])
        np.testing.assert_array_equal(found.next_observations[key].numpy(), buffer.next_observations[key][place, e])
    np.testing.assert_array_equal(found.rewards[:, 0].numpy(), buffer.rewards[place, e])


@pytest.mark.parametrize("n_envs", [1, 3])
def test_a_subclass_that_reads_neighbouring_rows_is_shown_one_environment(n_envs: int) -> None:
    class Following(ClusteredReplayBuffer):
        def _get_samples(self, batch_inds: Any, env: Any = None) -> Any:
            return super()._get_samples((batch_inds + 1) % self.buffer_size, env)

    model = clustered(SAC, DummyVecEnv([Toy] * n_envs), cls=Following, buffer_size=60)
    model.learn(60, callback=C4Callback())
    buffer = model.replay_buffer
    place, e = np.divmod(np.arange(60), n_envs)
    found = buffer._samples(np.arange(60), None)
    expected = buffer.observations[(place + 1) % buffer.buffer_size, e]
    np.testing.assert_array_equal(found.observations.numpy(), expected)


def test_all_rows_are_equally_likely_over_batches() -> None:
    model = clustered(SAC, buffer={"refresh_interval": 10**6}, buffer_size=60)
    model.learn(100, callback=C4Callback())
    buffer = model.replay_buffer
    buffer.bind(critics_of(model), seed=0)
    keys = {tuple(np.round(row, 5)): i for i, row in enumerate(buffer.observations[:, 0].tolist())}
    counts = np.zeros(60)
    for _ in range(400):
        for row in buffer.sample(60).observations.tolist():
            counts[keys[tuple(np.round(row, 5))]] += 1
    assert buffer.probabilities.min() > 0.02
    assert counts.sum() == 24_000
    # clusters make counts of rows in one cluster go together: wider than multinomial
    assert abs(counts / 400 - 1).max() < 0.6


def test_dictionaries_images_and_n_steps_train() -> None:
    penalty = CovariancePenalty(0.1, scale="relative")
    for n_envs in (1, 4):
        env = DummyVecEnv([lambda: Toy("dict")] * n_envs)
        model = clustered(SAC, env, cls=ClusteredDictReplayBuffer, policy="MultiInputPolicy")
        model.learn(120, callback=C4Callback(penalty))
        assert model.replay_buffer.c4_metrics["cross_covariance"] > 0
        env = DummyVecEnv([Toy] * n_envs)
        model = clustered(TD3, env, cls=ClusteredNStepReplayBuffer, buffer={"n_steps": 3, "gamma": 0.9})
        model.learn(120, callback=C4Callback(penalty))
        assert model.replay_buffer.take_batch() is None
    for algorithm, share in ((DQN, False), (SAC, False), (SAC, True)):
        kwargs: dict[str, Any] = {"net_arch": [16]}
        if algorithm is SAC:
            kwargs["share_features_extractor"] = share
        model = clustered(
            algorithm, Toy("image", algorithm is DQN), policy="CnnPolicy", policy_kwargs=kwargs, buffer_size=100
        )
        model.learn(26, callback=C4Callback(penalty))
        assert model.replay_buffer.c4_metrics["smallest_probability"] > 0


@pytest.mark.parametrize("n_envs", [1, 3])
def test_hindsight_relabels_the_share_that_the_host_does(n_envs: int) -> None:
    env = DummyVecEnv([Goal] * n_envs)
    model = clustered(
        SAC,
        env,
        cls=ClusteredHerReplayBuffer,
        policy="MultiInputPolicy",
        buffer={"n_sampled_goal": 4},
        learning_starts=60,
        buffer_size=240,
    )
    model.learn(600, callback=C4Callback(CovariancePenalty(0.1, scale="relative")))
    buffer = model.replay_buffer
    assert buffer.full
    assert buffer.c4_metrics["cross_covariance"] > 0
    buffer.bind(critics_of(model), seed=0)
    known = {tuple(goal) for goal in np.round(buffer.observations["desired_goal"].reshape(-1, 2), 4).tolist()}
    reached = {tuple(goal) for goal in np.round(buffer.next_observations["achieved_goal"].reshape(-1, 2), 4).tolist()}
    for _ in range(5):
        batch = buffer.sample(50)
        goals = [tuple(goal) for goal in np.round(batch.observations["desired_goal"].numpy(), 4).tolist()]
        assert len(goals) == 50
        assert sum(goal in known for goal in goals) == 50 - int(buffer.her_ratio * 50) == 10
        assert sum(goal in reached for goal in goals) == 40
        rows = {tuple(row) for row in np.round(buffer.observations["observation"].reshape(-1, 2), 4).tolist()}
        assert all(tuple(row) in rows for row in np.round(batch.observations["observation"].numpy(), 4).tolist())


class Goal(gymnasium.Env[Any, Any]):
    """A point that walks at random to a goal, by goals that HER may change."""

    def __init__(self) -> None:
        box = spaces.Box(-100, 100, (2,), dtype=np.float32)
        self.observation_space = spaces.Dict({"observation": box, "achieved_goal": box, "desired_goal": box})
        self.action_space = spaces.Box(-1, 1, (2,), dtype=np.float32)
        self.noise = np.random.default_rng(0)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.place, self.goal = np.zeros((2, 2), np.float32) + self.noise.normal(size=(2, 2)).astype(np.float32)
        self.steps = 0
        return self._observe(), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        self.place = (self.place + action + 0.1 * self.noise.normal(size=2)).astype(np.float32)
        reward = self.compute_reward(self.place, self.goal, {})
        return self._observe(), float(reward), False, self.steps >= 12, {}

    def compute_reward(self, achieved: Any, desired: Any, info: Any) -> Any:
        return -np.linalg.norm(achieved - desired, axis=-1)

    def _observe(self) -> Any:
        return {"observation": self.place, "achieved_goal": self.place, "desired_goal": self.goal}


def test_hindsight_before_the_first_episodes_end_is_the_hosts_error() -> None:
    model = clustered(SAC, Goal(), cls=ClusteredHerReplayBuffer, policy="MultiInputPolicy", learning_starts=5)
    with pytest.raises(RuntimeError, match="Unable to sample before the end of the first episode"):
        model.learn(8, callback=C4Callback())


def test_hindsight_with_few_whole_episodes_still_draws_all_their_rows() -> None:
    env = DummyVecEnv([Goal])
    options: dict[str, Any] = {"cls": ClusteredHerReplayBuffer, "policy": "MultiInputPolicy", "learning_starts": 30}
    model = clustered(SAC, env, buffer_size=400, **options)
    model.learn(120, callback=C4Callback())
    buffer = model.replay_buffer
    buffer.ep_length[36:] = 0  # as if one long episode were under way
    buffer.bind(critics_of(model))
    buffer.sample(64)
    batches = [buffer.sample(64).observations["observation"].numpy() for _ in range(30)]
    seen = {tuple(row) for row in np.round(np.concatenate(batches), 4).tolist()}
    assert len(seen) == 36
    buffer.ep_length[:] = 0
    with pytest.raises(RuntimeError, match="Unable to sample before the end of the first episode"):
        buffer.sample(64)


def test_too_few_rows_are_not_clustered_yet() -> None:
    model = clustered(SAC, learning_starts=0)
    model.learn(3, callback=C4Callback(CovariancePenalty(0.0)))
    loaded = clustered(SAC, learning_starts=2)
    loaded.learn(8, callback=C4Callback(CovariancePenalty(0.1, scale="relative")))
    assert loaded.replay_buffer.c4_metrics["cross_covariance"] >= 0


def test_without_replacement_batches_are_the_hosts_until_there_are_rows_for_one() -> None:
    model = clustered(SAC, buffer={"n_clusters": 2, "replacement": False})
    buffer, generator, drawn = model.replay_buffer, np.random.default_rng(0), []
    with attached(model):
        for rows in (10, 16, 30):
            while buffer.size() < rows:
                row = [generator.normal(size=(1, size)).astype(np.float32) for size in (3, 3, 2)]
                buffer.add(*row, np.zeros(1), np.zeros(1), [{}])
            drawn.append((len(buffer.sample(16).rewards), buffer.cluster >= 0))
    assert drawn == [(16, False), (16, True), (16, True)]


def test_each_binding_goes_on_with_the_random_numbers_of_the_last() -> None:
    model = clustered(SAC)
    model.learn(60, callback=C4Callback())
    batches = []
    for _ in range(4):
        with attached(model):
            batches.append(model.replay_buffer.sample(32).observations)
    assert not any(torch.equal(batches[0], other) for other in batches[1:])


@pytest.mark.parametrize("algorithm", [SAC, TD3])
def test_a_shared_feature_extractor_gets_no_gradient_of_the_penalty(algorithm: Any) -> None:
    kwargs = {"net_arch": [16], "share_features_extractor": True}
    model = clustered(algorithm, Toy("image"), n_clusters=1, policy="CnnPolicy", policy_kwargs=kwargs, buffer_size=60)
    model.learn(20)
    with attached(model, CovariancePenalty(0.1)):
        model.replay_buffer.sample(8)
        model.critic.optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in model.critic.features_extractor.parameters())
        assert all(parameter.grad is not None for parameter in model.critic.qf0[:1].parameters() if parameter.ndim == 2)


@pytest.mark.parametrize("discrete", [False, True])
def test_bits_are_observations_with_a_gradient_and_numbers_of_states_are_not(discrete: bool) -> None:
    env = DummyVecEnv([lambda: BitFlippingEnv(n_bits=4, continuous=True, max_steps=6, discrete_obs_space=discrete)])
    model = clustered(SAC, env, cls=ClusteredHerReplayBuffer, policy="MultiInputPolicy", learning_starts=60)
    penalty = CovariancePenalty(0.1, scale="relative")
    if not discrete:
        model.learn(150, callback=C4Callback(penalty))
        assert model.replay_buffer.c4_metrics["cross_covariance"] > 0
        return
    with pytest.raises(ValueError, match="observation_space: expected boxes or bits"):
        model.learn(150, callback=C4Callback(penalty))


class Frozen(BaseFeaturesExtractor):
    """As a pretrained one."""

    def __init__(self, space: Any) -> None:
        super().__init__(space, 8)
        self.layer = torch.nn.Linear(3, 8).requires_grad_(False)

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.layer(observations)
        return features


@pytest.mark.parametrize("algorithm", [SAC, TD3, DQN])
def test_frozen_parameters_stay_as_they_are(algorithm: Any) -> None:
    model = clustered(algorithm, policy_kwargs={"net_arch": [16], "features_extractor_class": Frozen})
    model.learn(40, callback=C4Callback(CovariancePenalty(0.1)))
    critic = model.critic if hasattr(model, "critic") else model.q_net
    assert all(parameter.grad is None for parameter in critic.features_extractor.parameters())


def test_a_critic_that_computes_its_values_otherwise_is_refused() -> None:
    class Scaled(ContinuousCritic):
        def forward(self, obs: Any, actions: Any) -> Any:
            return tuple(10 * q for q in super().forward(obs, actions))

    class Policy(SACPolicy):
        def make_critic(self, features_extractor: Any = None) -> Any:
            return Scaled(**self._update_features_extractor(self.critic_kwargs, features_extractor)).to(self.device)

    with pytest.raises(ValueError, match="model: expected a critic with q_networks and SB3's own forward.*a Scaled"):
        critics_of(model_of(SAC, policy=Policy))


def test_clearing_the_gradients_more_often_does_not_change_which_steps_are_penalised() -> None:
    calls = []

    class Clearing(SAC):
        def train(self, *arguments: Any, **options: Any) -> None:
            self.critic.optimizer.zero_grad()
            super().train(*arguments, **options)

    def penalty(critics: Any, batch: Any) -> torch.Tensor:
        calls.append(len(batch))
        return CovariancePenalty(0.1)(critics, batch)

    clustered(Clearing).learn(60, callback=C4Callback(penalty, penalty_every=2))  # type: ignore[arg-type]
    assert len(calls) == 20


class HalfOpen(ClusteredReplayBuffer):
    """Of its 500 rows, those from 250 on can not be sampled, as those of an open episode."""

    def _is_valid(self, rows: np.ndarray) -> np.ndarray:
        return rows < 250

    def _training_samples(self, rows: np.ndarray, env: Any) -> Any:
        self.drawn = rows
        return super()._training_samples(rows, env)


class Known(torch.nn.Module):
    """A clusterer that finds these responsibilities."""

    max_dim = 256

    def __init__(self, found: torch.Tensor) -> None:
        super().__init__()
        self.found = found

    def forward(self, embeddings: torch.Tensor, previous: Any) -> torch.Tensor:
        return self.found.to(embeddings)


@pytest.mark.parametrize(("assignment", "batch_size"), [("soft", 64), ("hard", 64), ("soft", 512)])
def test_rows_that_can_not_be_sampled_leave_the_others_equally_likely(assignment: str, batch_size: int) -> None:
    model = clustered(
        SAC, cls=HalfOpen, n_clusters=2, buffer={"assignment": assignment, "refresh_interval": 10**9, "c4_seed": 0}
    )
    buffer = model.replay_buffer
    buffer.full = True
    found = torch.full((250, 2), 0.02)
    found[:130, 0] = found[130:, 1] = 0.98
    counts = np.zeros(250)
    with attached(model):
        buffer._clusterer = Known(found)
        for _ in range(100_000 // batch_size):
            buffer.sample(batch_size)
            np.add.at(counts, buffer.drawn, 1)
        share = 0.52 if assignment == "hard" else 0.5192
        torch.testing.assert_close(buffer.probabilities[0], torch.tensor(share, dtype=torch.float64), rtol=0, atol=1e-6)
    assert counts[:130].mean() / counts.mean() == pytest.approx(1, abs=0.05)
    assert counts[130:].mean() / counts.mean() == pytest.approx(1, abs=0.05)


def test_hard_rows_of_a_dissolved_cluster_go_to_the_nearest_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.zeros(500, dtype=torch.int64)
    labels[240:470], labels[470:] = 1, 2
    embeddings = torch.tensor([[0.0, 0.0], [100.0, 100.0], [101.0, 101.0]])[labels]
    monkeypatch.setattr(c4buffer.integrations.sb3.buffers, "embed_rows", lambda *a, **k: (embeddings, False))
    model = clustered(SAC, buffer={"assignment": "hard", "refresh_interval": 10**9})
    model.replay_buffer.full = True
    with attached(model):
        model.replay_buffer._clusterer = Known(torch.nn.functional.one_hot(labels, 3))
        model.replay_buffer.sample(64)
        _, r, _ = model.replay_buffer._sampler.partition_for(64)
    assert r[470].tolist() == [0, 1]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="model: expected an off-policy model, .* got PPO"):
        critics_of(PPO("MlpPolicy", Toy(), device="cpu"))
    with pytest.raises(ValueError, match="model: expected one with replay_buffer_class=.*, got .*a ReplayBuffer"):
        model_of(SAC).learn(30, callback=C4Callback())
    for call in (lambda model: model.learn(30, callback=C4Callback()), lambda model: attached(model).__enter__()):
        with pytest.raises(ValueError, match="model: expected an off-policy model, .* got PPO"):
            call(PPO("MlpPolicy", Toy(), device="cpu"))
    several = clustered(SAC)
    several.replay_buffer = clustered(SAC, DummyVecEnv([Toy] * 2)).replay_buffer
    with pytest.raises(ValueError, match="model: expected a replay buffer of its own n_envs, 1, got 2"):
        several.learn(30, callback=C4Callback())
    with pytest.raises(ValueError, match="n_clusters: expected an integer of at least 1, got 0"):
        clustered(SAC, n_clusters=0)
    with pytest.raises(ValueError, match="penalty: expected a callable"):
        C4Callback(0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="penalty_every: expected an integer of at least 1"):
        C4Callback(penalty_every=0)
    with pytest.raises(ValueError, match="n_clusters: expected at most the 500 transitions of the buffer, got 501"):
        clustered(SAC, n_clusters=501)
    with pytest.raises(ValueError, match="probabilities: expected a buffer"):
        _ = clustered(SAC).replay_buffer.probabilities


def test_k_by_bic() -> None:
    model = clustered(SAC, n_clusters="auto")
    model.learn(30, callback=C4Callback())
    with attached(model, CovariancePenalty(0.1)):
        model.replay_buffer.sample(8)
        assert len(model.replay_buffer.probabilities) >= 1


def test_the_penalty_follows_the_models_buffer_and_optimizer(tmp_path: Path) -> None:
    model = clustered(SAC)
    model.learn(60, callback=C4Callback())
    model.save_replay_buffer(tmp_path / "buffer")
    seen: list[float] = []

    def penalty(critics: Any, batch: Any) -> torch.Tensor:
        seen.append(float(batch.rewards.sum()))
        return CovariancePenalty(0.1)(critics, batch)

    with attached(model, penalty):
        model.train(2, 16)
        model.load_replay_buffer(tmp_path / "buffer")
        model.train(4, 16)
        assert len(set(seen)) == len(seen) == 6
        model.critic.optimizer = torch.optim.AdamW(model.critic.parameters(), lr=1e-4)
        model.train(2, 16)
        assert len(seen) == 8
        model.critic.optimizer.zero_grad()  # without a batch drawn before
        assert len(seen) == 8
    assert "zero_grad" not in vars(model.critic.optimizer)


def test_spaces_that_do_not_fit_a_buffer_are_refused() -> None:
    goals = "observation_space: expected a Dict with achieved_goal, desired_goal, observation, for hindsight"
    for env, cls, policy, message in (
        (Toy(), ClusteredHerReplayBuffer, "MlpPolicy", goals),
        (Toy("dict"), ClusteredHerReplayBuffer, "MultiInputPolicy", goals),
        (Toy(), ClusteredDictReplayBuffer, "MlpPolicy", "observation_space: expected a Dict for a ClusteredDict"),
        (Toy("dict"), ClusteredReplayBuffer, "MultiInputPolicy", "observation_space: expected no Dict for a Clustered"),
    ):
        with pytest.raises(ValueError, match=message):
            clustered(SAC, env, cls=cls, policy=policy)
    model = clustered(SAC)
    model.replay_buffer = ClusteredReplayBuffer(100, spaces.Box(-1, 1, (7,)), model.action_space)
    with pytest.raises(ValueError, match="model: expected a replay buffer of its own observation_space, Box"):
        model.learn(40, callback=C4Callback())


def own_gradients(model: Any, batch: Any) -> torch.Tensor:
    """[g', g] by the model's own networks: the target's at its own next action, the live ones' at the data's."""
    found = []
    live = batch.terminals == 0
    for target, observations in ((True, batch.next_observations), (False, batch.observations)):
        s = observations.clone().requires_grad_()
        if isinstance(model, tuple(DISCRETE)):
            name = "q_net" if isinstance(model, DQN) else "quantile_net"
            values = getattr(model, name + ("_target" if target else ""))(s)
            values = values if values.ndim == 2 else values.mean(dim=1)
            chosen = values.argmax(dim=1) if target else batch.actions
            inputs, q = [s], values.gather(1, chosen[:, None])[:, 0]
        else:
            if target:
                actor = getattr(model, "actor_target", None)
                a = model.actor(s, deterministic=True) if actor is None else actor(s)
            else:
                a = batch.actions
            inputs = [s, a.detach().clone().requires_grad_()]
            critic = getattr(model, "critic_target", model.critic) if target else model.critic
            critic.set_training_mode(False)
            members = critic(*inputs)
            members = members.mean(dim=2) if isinstance(members, torch.Tensor) else torch.cat(members, dim=1)
            q = members.mean(dim=1)
        gradients = torch.cat(torch.autograd.grad(q.sum(), inputs), dim=1)
        found.append(gradients * live[:, None] if target else gradients)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("algorithm", ALL)
def test_gradients_are_those_of_the_models_own_networks(algorithm: Any) -> None:
    model = clustered(algorithm, learning_rate=0.01)  # so that targets are far from what they follow
    model.learn(60, callback=C4Callback())
    batch = transitions_of_samples(ReplayBuffer.sample(model.replay_buffer, 30))
    assert 0 < batch.terminals.sum() < 30
    torch.testing.assert_close(stacked_gradients(critics_of(model), batch), own_gradients(model, batch))


def test_the_penaltys_gradient_has_k_times_its_weight_on_every_kth_step() -> None:
    gradients = []
    for every in (1, 3):
        model = clustered(SAC, n_clusters=1).learn(30, callback=C4Callback())
        with attached(model, CovariancePenalty(0.3), penalty_every=every):
            np.random.seed(0)
            model.replay_buffer.sample(16)
            model.critic.optimizer.zero_grad()
            gradients.append([parameter.grad.clone() for parameter in model.critic.parameters() if parameter.ndim == 2])
    for one, three in zip(*gradients):
        torch.testing.assert_close(3 * one, three)


def test_clusters_are_found_anew_on_schedule_and_touch_no_global_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[Any] = []
    refresh = ClusteredReplayBuffer._refresh

    def watched(buffer: Any, env: Any) -> None:
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        refresh(buffer, env)
        assert torch.equal(before[0], torch.get_rng_state())
        np.testing.assert_array_equal(before[1], np.random.get_state()[1])
        assert before[2] == random.getstate()
        states.append(buffer.c4_metrics)

    monkeypatch.setattr(ClusteredReplayBuffer, "_refresh", watched)
    model = clustered(SAC, DummyVecEnv([Toy] * 2)).learn(20 + 2 * 60, callback=C4Callback())
    assert model._n_updates == 60
    assert len(states) == 6


def test_overwritten_rows_belong_to_each_cluster_in_its_share() -> None:
    model = clustered(SAC, buffer={"refresh_interval": 10**6}, buffer_size=60)
    model.learn(100, callback=C4Callback())
    buffer = model.replay_buffer
    buffer.bind(critics_of(model))
    buffer.sample(16)
    row = buffer.pos
    before = buffer._sampler.responsibilities[row].double()
    buffer.add(*(np.zeros((1, size), np.float32) for size in (3, 3, 2)), np.zeros(1), np.zeros(1), [{}])
    after = buffer._sampler.responsibilities[row].double()
    torch.testing.assert_close(after, buffer.probabilities, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("n_envs", [1, 4])
@pytest.mark.parametrize("kind", ["dict", "n-step", "hindsight"])
def test_with_one_cluster_each_kind_of_buffer_is_the_hosts(kind: str, n_envs: int) -> None:
    make = {"dict": lambda: Toy("dict"), "n-step": Toy, "hindsight": Goal}[kind]
    stock, ours = {
        "dict": (DictReplayBuffer, ClusteredDictReplayBuffer),
        "n-step": (NStepReplayBuffer, ClusteredNStepReplayBuffer),
        "hindsight": (HerReplayBuffer, ClusteredHerReplayBuffer),
    }[kind]
    policy = "MlpPolicy" if kind == "n-step" else "MultiInputPolicy"
    kwargs = {"n_steps": 3, "gamma": 0.9} if kind == "n-step" else {}
    options: dict[str, Any] = {"policy": policy, "learning_starts": 100}
    expected = model_of(
        SAC, DummyVecEnv([make] * n_envs), replay_buffer_class=stock, replay_buffer_kwargs=kwargs, **options
    ).learn(200)
    found = clustered(SAC, DummyVecEnv([make] * n_envs), n_clusters=1, cls=ours, buffer=kwargs, **options)
    assert_equal(expected, found.learn(200, callback=C4Callback(CovariancePenalty(0.0))))


@pytest.mark.parametrize("kind", ["dict", "n-step", "image"])
def test_rows_of_four_environments_are_read_as_the_host_reads_them(kind: str) -> None:
    cls, options = {
        "dict": (ClusteredDictReplayBuffer, {"policy": "MultiInputPolicy"}),
        "n-step": (ClusteredNStepReplayBuffer, {"buffer": {"n_steps": 3, "gamma": 0.9}}),
        "image": (ClusteredReplayBuffer, {"policy": "CnnPolicy"}),
    }[kind]
    env = DummyVecEnv([lambda: Toy("box" if kind == "n-step" else kind)] * 4)
    model = clustered(SAC, env, cls=cls, buffer_size=80, learning_starts=10**6, **options).learn(200)
    buffer = model.replay_buffer
    for row in range(80):
        position, e = divmod(row, 4)
        found = buffer._samples(np.array([row]), None)
        if kind == "n-step":
            reward, gone, place = 0.0, 0, position
            for k in range(3):
                reward += 0.9**k * buffer.rewards[place, e]
                gone, last = k, place
                if buffer.dones[place, e] or (place + 1) % buffer.buffer_size == buffer.pos:
                    break
                place = (place + 1) % buffer.buffer_size
            assert float(found.rewards) == pytest.approx(reward, rel=1e-5)
            assert float(found.discounts) == pytest.approx(0.9 ** (gone + 1))
            np.testing.assert_array_equal(found.next_observations[0], buffer.next_observations[last, e])
        elif kind == "dict":
            for key in ("a", "b"):
                np.testing.assert_array_equal(found.observations[key][0], buffer.observations[key][position, e])
        else:
            np.testing.assert_array_equal(found.observations[0], buffer.observations[position, e])
        np.testing.assert_array_equal(found.actions[0], buffer.actions[position, e])


@pytest.mark.filterwarnings("ignore")
def test_the_environments_here_are_as_gymnasium_asks() -> None:
    for env in (*(Toy(kind, discrete) for kind in ("box", "image", "dict") for discrete in (False, True)), Goal()):
        check_env(env)


def test_what_is_loaded_in_the_middle_goes_on_with_clusters_and_penalty(tmp_path: Path) -> None:
    model = clustered(SAC).learn(60, callback=C4Callback())
    model.save(tmp_path / "model")
    save_replay_buffer(model, tmp_path / "buffer")
    loaded = SAC.load(tmp_path / "model", env=model.get_env(), device="cpu")
    load_replay_buffer(loaded, tmp_path / "buffer")
    seen: list[tuple[int, float]] = []

    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            seen.append((loaded.replay_buffer.cluster, self.logger.name_to_value.get("c4/penalty", 0.0)))
            return True

    penalty = CovariancePenalty(0.1, scale="relative")
    loaded.learn(40, callback=[C4Callback(penalty), Watch()], reset_num_timesteps=False)
    assert {cluster for cluster, _ in seen[1:]} <= {0, 1, 2}
    assert all(value > 0 for _, value in seen[2:])


def test_a_pickled_buffer_holds_no_networks() -> None:
    model = clustered(SAC)
    model.learn(40, callback=C4Callback())
    plain = len(pickle.dumps(model.replay_buffer))
    model.replay_buffer.bind(critics_of(model))
    model.replay_buffer.sample(16)
    assert len(pickle.dumps(model.replay_buffer)) < plain + 500
    model.replay_buffer.unbind()


def test_a_penalty_that_is_none_is_named() -> None:
    model = clustered(SAC)
    with (
        pytest.raises(ValueError, match=r"^penalty: expected a callable as .*, or None, got 0.1$"),
        attached(model, 0.1),  # type: ignore[arg-type]
    ):
        pass
