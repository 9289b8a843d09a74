"""ACTIVE as an algorithm of SB3's: its steps are the paper's, and it does all that SB3's own do."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from c4buffer.integrations.sb3 import (
    ACTIVE,
    C4Callback,
    ClusteredDictReplayBuffer,
    ClusteredReplayBuffer,
    attached,
    critics_of,
    fill_replay_buffer,
    learn_offline,
)
from c4buffer.integrations.sb3.active import CnnPolicy, MlpPolicy, MultiInputPolicy
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn

from c4buffer import CovariancePenalty, VEnsemble, VEnsembleAdvantage

from .test_sb3 import Toy, assert_equal, model_of, parameters_of
from .test_sb3_offline import OnlySpaces, data

QUICK = {"likelihood_target": -2.0}


def active(env: Any = None, **options: Any) -> Any:
    return model_of(ACTIVE, env or OnlySpaces(), **{**QUICK, **options})


class Reference:
    """ACTIVE's updates by formulas of our own, on copies of a model's networks."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.policy = copy.deepcopy(model.policy)
        self.beta = float(model.temperature_controller.beta.detach())
        parts = (self.policy.actor, self.policy.critic, self.policy.value)
        self.optimizers = [torch.optim.Adam(part.parameters(), lr=model.learning_rate) for part in parts]

    def mean_and_deviation(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        actor = self.policy.actor
        return actor.mu(observations), torch.exp(-5 + 7 / (1 + torch.exp(-actor.spread)))

    def values(self, observations: torch.Tensor) -> torch.Tensor:
        """[m, B], member by member."""
        found = []
        for i in range(self.model.policy.n_members):
            h = observations
            layers = list(zip(self.policy.value.members.weights, self.policy.value.members.biases))
            for depth, (weight, bias) in enumerate(layers):
                h = h @ weight[i] + bias[i]
                h = torch.relu(h) if depth + 1 < len(layers) else h
            found.append(h[:, 0])
        return torch.stack(found)

    def q(self, critic: Any, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        x = torch.cat([observations, actions], dim=1)
        return torch.cat([network(x) for network in critic.q_networks], dim=1)  # [B, n]

    def step(self, batch: Any) -> None:
        model, policy = self.model, self.policy
        actor_optimizer, critic_optimizer, value_optimizer = self.optimizers
        s, a = batch.observations, batch.actions
        discount = model.gamma if batch.discounts is None else batch.discounts[:, 0]
        with torch.no_grad():
            y = batch.rewards[:, 0] + discount * (1 - batch.dones[:, 0]) * self.values(batch.next_observations).amin(0)
            data_q = self.q(policy.critic_target, s, a).amin(dim=1)
        u = data_q - self.values(s)
        if model.value_loss == "expectile":
            value_loss = ((model.expectile - (u < 0).float()).abs() * u**2).mean()
        else:
            inner = u / (2 * model.alpha) + 1
            value_loss = ((inner > 0) * inner**2 + self.values(s) / model.alpha).mean()
        critic_loss = ((self.q(policy.critic, s, a) - y[:, None]) ** 2).mean(dim=0).sum()
        for optimizer, loss in ((value_optimizer, value_loss), (critic_optimizer, critic_loss)):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        mean, deviation = self.mean_and_deviation(s)
        log_prob = (-0.5 * ((a - mean) / deviation) ** 2 - torch.log(deviation) - 0.5 * math.log(2 * math.pi)).sum(
            dim=1
        )
        with torch.no_grad():
            middle = torch.quantile(self.values(s), model.quantile, dim=0)
            weights = torch.exp((data_q - middle) / model.temperature).clamp(max=model.max_weight)
        sampled = (mean + deviation * torch.normal(torch.zeros_like(mean), torch.ones_like(mean))).clamp(-1, 1)
        policy_q = self.q(policy.critic_target, s, sampled).amin(dim=1)
        loss = -policy_q.mean() - self.beta * (weights * log_prob).mean()
        actor_optimizer.zero_grad()
        loss.backward()
        actor_optimizer.step()
        self.beta = max(
            0.0, self.beta - model.beta_learning_rate * (float(log_prob.detach().mean()) - model.likelihood_target)
        )
        with torch.no_grad():
            for target, live in zip(policy.critic_target.parameters(), policy.critic.parameters()):
                target.copy_((1 - model.tau) * target + model.tau * live)


@pytest.mark.parametrize("value_loss", ["expectile", "sparse"])
@pytest.mark.parametrize("n_steps", [1, 3])
def test_its_steps_are_the_papers(value_loss: str, n_steps: int) -> None:
    model = active(value_loss=value_loss, quantile=0.3, n_steps=n_steps, beta_learning_rate=0.01)
    learn_offline(model, data(), 1)
    reference = Reference(model)
    for part, optimizer in zip((model.actor, model.critic, model.value), reference.optimizers):
        optimizer.load_state_dict(copy.deepcopy(part.optimizer.state_dict()))
    batches = [model.replay_buffer.sample(16) for _ in range(10)]
    supply = iter(batches)
    model.replay_buffer.sample = lambda *_, **__: next(supply)
    torch.manual_seed(0)
    model.train(10, 16)
    torch.manual_seed(0)
    for batch in batches:
        reference.step(batch)
    for (name, ours), theirs in zip(model.policy.state_dict().items(), reference.policy.state_dict().values()):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5, msg=name)
    assert float(model.temperature_controller.beta.detach()) == pytest.approx(reference.beta, rel=1e-5)


def test_it_clones_good_actions_offline_and_goes_on_online() -> None:
    """Actions at 0.5 are rewarded, those at -0.5 are not; half of the data each."""
    transitions = data()
    good = torch.arange(len(transitions)) % 2 == 0
    noise = 0.05 * torch.randn(len(transitions), 2, generator=torch.Generator().manual_seed(1))
    actions = torch.where(good, 0.5, -0.5)[:, None] + noise
    transitions = transitions.replace(actions=actions, rewards=good.float())
    model = active(Toy(), likelihood_target=0.0, learning_rate=3e-3, temperature=0.2)
    learn_offline(model, transitions, 400)
    found = model.predict(np.zeros((1, 3), np.float32), deterministic=True)[0]
    assert (found > 0.3).all()
    model.learn(50)
    assert model.replay_buffer.size() == 350
    assert model._n_updates == 400 + 30


def test_h_d_is_estimated_offline_and_an_environment_alone_gives_none(tmp_path: Path) -> None:
    model = active(Toy(), likelihood_target="auto")
    with pytest.raises(ValueError, match="likelihood_target: expected a number or None, or data before: learn_offline"):
        model.learn(30)
    state = torch.get_rng_state()
    found = learn_offline(model, data().replace(actions=data().actions.clamp(-1, 1)), 1)
    target = found.temperature_controller.target
    assert math.isfinite(target)
    other = active(Toy(), likelihood_target="auto")
    learn_offline(other, data().replace(actions=data().actions.clamp(-1, 1)), 1)
    torch.set_rng_state(state)
    assert other.estimate_likelihood_target(quantile=0.6) != target
    assert torch.equal(torch.get_rng_state(), state)
    model.save(tmp_path / "model")
    loaded = ACTIVE.load(tmp_path / "model", env=Toy(), device="cpu")
    assert loaded.temperature_controller.target == target
    loaded.learn(30)
    with_another = ACTIVE.load(tmp_path / "model", env=Toy(), device="cpu", likelihood_target=-7.0)
    assert with_another.temperature_controller.target == -7.0


def test_settings_given_to_load_count_and_are_checked(tmp_path: Path) -> None:
    model = active(Toy(), likelihood_target=-3.0, policy_kwargs={"net_arch": [8]}, initial_beta=0.9)
    learn_offline(model, data().replace(actions=data().actions.clamp(-1, 1)), 2)
    estimated = model.estimate_likelihood_target(updates=20)
    assert model.likelihood_target == model.temperature_controller.target == estimated
    model.set_parameters({"policy": model.policy.state_dict()}, exact_match=False)
    assert model.temperature_controller.target == estimated
    model.save(tmp_path / "model")

    def loaded(**options: Any) -> Any:
        return ACTIVE.load(tmp_path / "model", device="cpu", **options)

    assert loaded().temperature_controller.target == estimated
    assert loaded(policy_kwargs={"net_arch": [8]}).n_members == 4
    assert loaded(likelihood_target="auto").temperature_controller.target is None
    assert loaded(likelihood_target=np.float32(-7.5)).temperature_controller.target == -7.5
    assert float(loaded(max_beta=0.5, initial_beta=0.5).temperature_controller.beta.detach()) == 0.5
    with pytest.raises(ValueError, match="value_loss: expected one of"):
        loaded(value_loss="expectlie")


def test_settings_of_a_live_model_count_are_checked_and_can_be_loaded(tmp_path: Path) -> None:
    transitions = data().replace(actions=data().actions.clamp(-1, 1))
    model = active(Toy(), likelihood_target=-3.0)
    model.max_beta = 0.5
    learn_offline(model, transitions, 2)
    assert float(model.temperature_controller.beta.detach()) == 0.5
    model.save(tmp_path / "model")
    loaded = ACTIVE.load(tmp_path / "model", device="cpu")
    assert float(loaded.temperature_controller.beta.detach()) == 0.5
    for name, value in (("value_loss", "expctile"), ("max_beta", -1.0)):
        setattr(loaded, name, value)
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            loaded.train(1, 8)
        setattr(loaded, name, getattr(model, name))
    with pytest.raises(ValueError, match=r"^initial_beta: expected at most max_beta, 0.5, got 1.0"):
        active(Toy(), max_beta=0.5)


def test_a_refused_learn_leaves_nothing_behind_and_a_filled_buffer_is_data() -> None:
    model = active(
        Toy(), likelihood_target="auto", replay_buffer_class=ClusteredReplayBuffer, learning_starts=0, batch_size=8
    )
    with pytest.raises(ValueError, match="likelihood_target"):
        model.learn(30, callback=C4Callback(CovariancePenalty(0.1)))
    assert "zero_grad" not in vars(model.critic.optimizer)
    fill_replay_buffer(model, data().replace(actions=data().actions.clamp(-1, 1)))
    model.learn(5, callback=C4Callback(CovariancePenalty(0.1)))
    assert math.isfinite(model.likelihood_target)


def test_values_that_make_targets_are_taken_in_evaluation_mode() -> None:
    class Noted(FlattenExtractor):
        def __init__(self, space: Any) -> None:
            super().__init__(space)
            self.modes: list[tuple[bool, bool]] = []

        def forward(self, observations: torch.Tensor) -> torch.Tensor:
            self.modes.append((self.training, torch.is_grad_enabled()))
            return super().forward(observations)

    model = active(policy_kwargs={"net_arch": [8], "features_extractor_class": Noted})
    learn_offline(model, data(), 3)
    modes = model.value.features_extractor.modes
    assert set(modes) == {(True, True), (False, False)}
    assert model.value.training
    model.train(0)


def test_the_estimate_is_of_what_the_policy_sees() -> None:
    """Where environment actions go from -2 to 3, the policy's go from -1 to 1, and its densities are of these."""
    model = active(likelihood_target="auto")
    learn_offline(model, data(), 1)
    assert model.temperature_controller.target == pytest.approx(-2 * math.log(2), abs=0.5)


def test_after_loading_it_predicts_and_trains_the_same(tmp_path: Path) -> None:
    model = learn_offline(active(Toy()), data().replace(actions=data().actions.clamp(-1, 1)), 20)
    model.save(tmp_path / "model")
    loaded = ACTIVE.load(tmp_path / "model", env=Toy(), device="cpu")
    assert_equal(model, loaded)
    observations = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    np.testing.assert_array_equal(
        model.predict(observations, deterministic=True)[0], loaded.predict(observations, deterministic=True)[0]
    )
    loaded.replay_buffer = copy.deepcopy(model.replay_buffer)
    for each in (model, loaded):
        np.random.seed(3)
        torch.manual_seed(3)
        each.set_logger(model.logger)
        each.train(10, 16)
    assert_equal(model, loaded)
    assert (tmp_path / "model.zip").stat().st_size < 200_000


def test_with_one_cluster_and_no_penalty_c4_changes_nothing_and_with_them_it_trains() -> None:
    transitions = data().replace(actions=data().actions.clamp(-1, 1))
    stock = learn_offline(active(Toy()), transitions, 60)
    clustered = {"replay_buffer_class": ClusteredReplayBuffer, "replay_buffer_kwargs": {"n_clusters": 1}}
    assert_equal(stock, learn_offline(active(Toy(), **clustered), transitions, 60, C4Callback(CovariancePenalty(0.0))))
    clustered["replay_buffer_kwargs"] = {"n_clusters": 3, "refresh_interval": 20}
    ours = active(Toy(), **clustered)
    learn_offline(ours, transitions, 60, C4Callback(CovariancePenalty(0.1, scale="relative")))
    assert ours.replay_buffer.c4_metrics["smallest_probability"] > 0
    assert not torch.equal(
        parameters_of(ours)["policy.critic.qf0.0.weight"], parameters_of(stock)["policy.critic.qf0.0.weight"]
    )
    assert len(critics_of(ours).critic) == 2


@pytest.mark.parametrize(
    ("kind", "policy", "buffer"),
    [("image", "CnnPolicy", ClusteredReplayBuffer), ("dict", "MultiInputPolicy", ClusteredDictReplayBuffer)],
)
def test_images_and_dictionaries(kind: str, policy: str, buffer: Any) -> None:
    model = active(Toy(kind), policy=policy, learning_starts=20, replay_buffer_class=buffer, buffer_size=60)
    model.learn(30, callback=C4Callback())
    assert type(model.policy) is {"CnnPolicy": CnnPolicy, "MultiInputPolicy": MultiInputPolicy}[policy]
    before = parameters_of(model)["policy.value.members.weights.0"]
    with attached(model):
        model.train(2, 8)
    assert not torch.equal(before, parameters_of(model)["policy.value.members.weights.0"])


def test_several_and_normalising_environments() -> None:
    env = VecNormalize(DummyVecEnv([Toy] * 3))
    model = active(env, likelihood_target=-3.0)
    model.learn(90)
    assert model._n_updates > 10
    assert math.isfinite(model.estimate_likelihood_target(updates=20))


@pytest.mark.parametrize("net_arch", [[8], [8, 8], []])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_networks_are_as_asked_for(net_arch: list[int], activation: Any) -> None:
    model = active(n_members=3, policy_kwargs={"net_arch": net_arch, "activation_fn": activation, "n_critics": 3})
    assert len(model.critic.q_networks) == 3
    values = model.value(torch.zeros(5, 3))
    assert values.shape == (3, 5)
    assert isinstance(model.value.members, VEnsemble) == (activation is nn.ReLU and net_arch != [])
    learn_offline(model, data(), 3)
    rebuilt = MlpPolicy(**{**model.policy._get_constructor_parameters(), "lr_schedule": lambda _: 1e-3})
    rebuilt.load_state_dict(model.policy.state_dict())
    copied = [part.value(torch.ones(5, 3)) for part in (rebuilt, model.policy)]
    assert torch.equal(*copied)


def test_actions_stay_in_the_box_and_likelihoods_are_finite_at_its_edge() -> None:
    model = active()
    drawn = model.predict(np.zeros((500, 3), np.float32))[0]
    assert (drawn >= -2).all()
    assert (drawn <= 3).all()
    assert len(np.unique(drawn)) > 400
    edge = torch.tensor([[1.0, -1.0]])
    assert torch.isfinite(model.actor.log_prob(torch.zeros(1, 3), edge)).all()
    mean = model.predict(np.zeros((1, 3), np.float32), deterministic=True)[0]
    expected = model.policy.unscale_action(torch.tanh(model.actor.mu[:-1](torch.zeros(1, 3))).detach().numpy())
    np.testing.assert_allclose(mean, expected, rtol=1e-6)


def test_schedules_checkpoints_and_logs(tmp_path: Path) -> None:
    model = active(learning_rate=lambda left: left * 1e-3)
    learn_offline(model, data(), 20, callback=CheckpointCallback(10, str(tmp_path)))
    assert model.value.optimizer.param_groups[0]["lr"] < 1e-4
    loaded = ACTIVE.load(tmp_path / "rl_model_20_steps.zip", device="cpu")
    assert type(loaded) is ACTIVE
    values = model.logger.name_to_value
    names = {"value_loss", "critic_loss", "actor_loss", "log_likelihood", "beta", "n_updates"}
    assert {f"train/{name}" for name in names} <= set(values)


def test_a_target_out_of_reach_is_said() -> None:
    model = active(likelihood_target=50.0, beta_learning_rate=1.0, max_beta=2.0)
    learn_offline(model, data(), 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.train(1000, 4)
    assert any("beta has been at its maximum" in str(each.message) for each in caught)


def test_a_fixed_beta_stays() -> None:
    model = active(likelihood_target=None, initial_beta=0.7, q_weight=0.0, n_members=1)
    learn_offline(model, data(), 5)
    assert float(model.temperature_controller.beta.detach()) == pytest.approx(0.7)


def test_a_target_set_on_a_model_counts_from_then_on() -> None:
    model = active(likelihood_target=None, beta_learning_rate=1.0)
    learn_offline(model, data(), 2)
    model.likelihood_target = 50.0
    model.train(1, 8)
    assert model.temperature_controller.target == 50
    assert float(model.temperature_controller.beta.detach()) > 10


def test_a_rate_and_a_bound_of_beta_set_on_a_model_count_from_then_on() -> None:
    model = active(likelihood_target=50.0, beta_learning_rate=0.0)
    learn_offline(model, data(), 2)
    assert float(model.temperature_controller.beta.detach()) == 1
    model.beta_learning_rate, model.max_beta = 1.0, 3.0
    model.train(2, 8)
    assert float(model.temperature_controller.beta.detach()) == 3


def test_wrong_input() -> None:
    for options, message in (
        ({"value_loss": "huber"}, "value_loss: expected"),
        ({"n_members": 0}, "n_members: expected an integer of at least 1"),
        ({"expectile": 1.0}, "expectile: expected"),
        ({"alpha": 0.0}, "alpha: expected"),
        ({"quantile": 1.5}, "quantile: expected"),
        ({"likelihood_target": "none"}, "likelihood_target: expected"),
        ({"likelihood_target": math.inf}, "likelihood_target: expected a finite number"),
        ({"initial_beta": 3.0, "max_beta": 2.0}, "initial_beta: expected at most max_beta, 2.0, got 3.0"),
        ({"initial_beta": -1.0}, "initial_beta: expected"),
        ({"beta_learning_rate": -1.0}, "beta_learning_rate: expected"),
        ({"policy_kwargs": {"n_members": 2}}, "policy_kwargs: expected no n_members"),
        ({"q_weight": -1.0}, "q_weight: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            active(**options)
    with pytest.raises(ValueError, match="env: expected an environment, or its id, got None"):
        ACTIVE("MlpPolicy", None)
    with pytest.raises(AssertionError, match="only supports .*Box.* as action spaces but Discrete"):
        active(OnlySpaces(discrete=True))
    assert isinstance(active().action_space, spaces.Box)


def test_other_numbers_of_networks_than_there_are_are_refused() -> None:
    transitions = data().replace(actions=data().actions.clamp(-1, 1))
    model = active(Toy(), likelihood_target=-3.0)
    model.n_members += 1
    with pytest.raises(ValueError, match="^n_members: expected .*, as the networks were built, got"):
        learn_offline(model, transitions, 2)


def test_a_bound_counts_for_a_beta_that_stays() -> None:
    transitions = data().replace(actions=data().actions.clamp(-1, 1))
    model = active(Toy(), likelihood_target=None)
    model.max_beta = 0.5
    learn_offline(model, transitions, 1)
    assert float(model.temperature_controller.beta.detach()) == 0.5


def test_a_training_that_diverges_says_so() -> None:
    transitions = data().replace(actions=data().actions.clamp(-1, 1))
    model = active(Toy(), likelihood_target=-3.0, learning_rate=1e30)
    with pytest.raises(ValueError, match="has the training diverged. Scale the rewards, or lower the learning rates"):
        learn_offline(model, transitions, 30)


class Normed(BaseFeaturesExtractor):
    def __init__(self, space: Any) -> None:
        super().__init__(space, 3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.norm(observations)
        return found


def test_statistics_of_batches_are_the_targets_too() -> None:
    model = learn_offline(active(policy_kwargs={"net_arch": [8], "features_extractor_class": Normed}), data(), 3)
    assert not any(module.training for module in model.critic_target.modules())
    mean = model.critic.features_extractor.norm.running_mean
    assert mean.abs().sum() > 0
    assert torch.equal(model.critic_target.features_extractor.norm.running_mean, mean)
    assert all(parameter.grad is None for parameter in model.critic_target.parameters())


def test_the_weight_of_q_in_the_policys_loss() -> None:
    model = learn_offline(active(), data(), 2)
    batch, losses = model.replay_buffer.sample(16), []
    for weight in (0.0, 1.0, 2.0):
        model.q_weight, actor = weight, copy.deepcopy(model.actor.state_dict())
        torch.manual_seed(0)
        losses.append(float(model._train_actor(batch, torch.zeros(16), VEnsembleAdvantage(quantile=0.5))[0].detach()))
        model.actor.load_state_dict(actor)
    assert losses[1] != pytest.approx(losses[0], abs=1e-4)
    assert losses[2] - losses[0] == pytest.approx(2 * (losses[1] - losses[0]), rel=1e-3)


def test_each_optimizer_follows_the_schedule_and_has_its_options() -> None:
    options = {"net_arch": [8], "optimizer_kwargs": {"weight_decay": 0.25}}
    model = learn_offline(active(learning_rate=lambda left: left * 1e-3, policy_kwargs=options), data(), 20)
    for part in (model.actor, model.critic, model.value):
        assert part.optimizer.param_groups[0]["lr"] < 1e-4
        assert part.optimizer.param_groups[0]["weight_decay"] == 0.25


def test_what_is_logged_is_the_mean_over_the_gradient_steps() -> None:
    model = learn_offline(active(), data(), 1)
    model._log([torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([3.0, 4.0, 5.0, 6.0])])
    names = ("value_loss", "critic_loss", "actor_loss", "log_likelihood")
    assert [model.logger.name_to_value[f"train/{name}"] for name in names] == [2.0, 3.0, 4.0, 5.0]


def test_batches_are_normalised_as_the_environment_is() -> None:
    env = VecNormalize(DummyVecEnv([Toy]))
    model = active(env).learn(25)
    given: list[Any] = []
    sample = model.replay_buffer.sample
    model.replay_buffer.sample = lambda size, env=None: (given.append(env), sample(size, env=env))[1]
    model.train(2, 8)
    assert given == [env, env]


def test_learning_may_go_on_counting() -> None:
    model = active(Toy())
    assert model.learn(10).learn(10, reset_num_timesteps=False).num_timesteps == 20


def test_values_have_the_widths_of_q_and_defaults_are_sacs() -> None:
    model = active(policy_kwargs={"net_arch": {"pi": [8], "qf": [24]}})
    assert [weight.shape[-1] for weight in model.value.members.weights] == [24, 1]
    assert active(policy_kwargs={}).policy.net_arch == SAC("MlpPolicy", Toy()).policy.net_arch
