"""ACTIVE: V-ensemble, quantile advantage and adaptive cloning temperature, as an off-policy algorithm."""

from __future__ import annotations

import math
from typing import Any, ClassVar, TypeVar

import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy, ContinuousCritic
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import get_parameters_by_name, polyak_update
from torch import Tensor

from c4buffer import (
    TemperatureController,
    VEnsembleAdvantage,
    cloning_policy_loss,
    estimate_log_likelihood_target,
    expectile_value_loss,
    sparse_value_loss,
)
from c4buffer._checks import check_choice, check_fraction, check_integer, check_number, fail, is_finite_number

from ..conversion import transitions_of
from .policies import ACTIVEPolicy, Actor, CnnPolicy, MlpPolicy, MultiInputPolicy, ValueEnsemble

SelfACTIVE = TypeVar("SelfACTIVE", bound="ACTIVE")


class ACTIVE(OffPolicyAlgorithm):
    """ACTIVE (ICLR 2025): offline from a filled buffer, as `learn_offline` does, and online from there.

    With one member, `q_weight=0` and `likelihood_target=None` it is IQL ("expectile") or SQL's value learning with
    advantage-weighted regression ("sparse").

    .. code-block:: python

        model = ACTIVE("MlpPolicy", env, learning_starts=0)
        learn_offline(model, transitions, 100_000)
        model.learn(50_000)  # fine-tuning

    Args:
        policy: "MlpPolicy", "CnnPolicy", "MultiInputPolicy", or a class of its kind.
        env: the environment, or its id; its actions are a box.
        learning_rate: lambda of all networks, a number or a function of the remaining progress from 1 to 0.
        value_loss: f of Eq. 3, "expectile" (ACTIVE-I, IQL's) or "sparse" (ACTIVE-S, SQL's).
        n_members: m, the number of V-functions.
        expectile: tau of the paper, for "expectile"; above 0 and below 1. (SB3's `tau` is the paper's eta.)
        alpha: the weight of the implicit regularisation, for "sparse"; above 0.
        quantile: c of Eq. 7, from 0 to 1.
        temperature: of the weights w = exp(A / temperature); above 0.
        max_weight: where w is clipped.
        likelihood_target: H_D of Eq. 12, in nats per action vector, for actions scaled to [-1, 1]. "auto": estimated
            from the replay buffer at the first gradient step, as `estimate_log_likelihood_target` does, and a number
            from then on. None: beta stays at `initial_beta`.
        initial_beta: beta at the start.
        beta_learning_rate: lambda of beta.
        max_beta: its upper bound; None for none.
        q_weight: of the term -E[Q(s, a_pi)] in Eq. 13; 0 leaves it out.
        buffer_size, learning_starts, batch_size, tau, gamma, train_freq, gradient_steps, action_noise,
            replay_buffer_class, replay_buffer_kwargs, optimize_memory_usage, n_steps, stats_window_size,
            tensorboard_log, policy_kwargs, verbose, seed, device: as in SB3's SAC.

    Raises:
        ValueError: for values outside their ranges, and from `learn` in an environment while H_D is still to be
            estimated and the buffer is empty.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: ACTIVEPolicy
    actor: Actor
    critic: ContinuousCritic
    critic_target: ContinuousCritic
    value: ValueEnsemble
    temperature_controller: TemperatureController

    def __init__(
        self,
        policy: str | type[ACTIVEPolicy],
        env: GymEnv | str | None,
        learning_rate: float | Schedule = 3e-4,
        buffer_size: int = 1_000_000,
        learning_starts: int = 100,
        batch_size: int = 256,
        tau: float = 0.005,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        *,
        value_loss: str = "expectile",
        n_members: int = 4,
        expectile: float = 0.9,
        alpha: float = 1.0,
        quantile: float = 0.5,
        temperature: float = 1.0,
        max_weight: float = 100.0,
        likelihood_target: str | float | None = "auto",
        initial_beta: float = 1.0,
        beta_learning_rate: float = 3e-3,
        max_beta: float | None = None,
        q_weight: float = 1.0,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        if env is None and _init_setup_model:
            fail("env", "an environment, or its id", "None")
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]  # None while `load` makes it
            learning_rate,
            buffer_size,
            learning_starts,
            batch_size,
            tau,
            gamma,
            train_freq,
            gradient_steps,
            action_noise,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            n_steps=n_steps,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            seed=seed,
            sde_support=False,
            supported_action_spaces=(spaces.Box,),
            support_multi_env=True,
        )
        self.value_loss = value_loss
        self.n_members = n_members
        self.expectile = expectile
        self.alpha = alpha
        self.quantile = quantile
        self.temperature = temperature
        self.max_weight = max_weight
        self.likelihood_target = likelihood_target
        self.initial_beta = initial_beta
        self.beta_learning_rate = beta_learning_rate
        self.max_beta = max_beta
        self.q_weight = q_weight
        if _init_setup_model:
            self._setup_model()
            if self.max_beta is not None and self.initial_beta > self.max_beta:
                fail("initial_beta", f"at most max_beta, {self.max_beta!r}", repr(self.initial_beta))

    def _setup_model(self) -> None:
        self._check_settings()
        given = self.policy_kwargs
        self.policy_kwargs = {**given, "n_members": self.n_members}
        try:
            super()._setup_model()
        finally:
            self.policy_kwargs = given
        self._create_aliases()
        self.batch_norm_stats = get_parameters_by_name(self.critic, ["running_"])
        self.batch_norm_stats_target = get_parameters_by_name(self.critic_target, ["running_"])
        self.temperature_controller = TemperatureController(
            None if isinstance(self.likelihood_target, str) else self.likelihood_target,
            learning_rate=self.beta_learning_rate,
            initial=self.initial_beta if self.max_beta is None else min(self.initial_beta, self.max_beta),
            maximum=self.max_beta,
        ).to(self.device)

    def _check_settings(self) -> None:
        """Here, as `load` puts settings in after the constructor, and users at any time."""
        check_choice("value_loss", self.value_loss, ("expectile", "sparse"))
        check_integer("n_members", self.n_members, minimum=1)
        if "n_members" in self.policy_kwargs:
            fail("policy_kwargs", "no n_members, which is an argument of the algorithm", repr(self.policy_kwargs))
        check_fraction("expectile", self.expectile, open_ends=True)
        check_number("alpha", self.alpha, minimum=0, exclusive=True)
        check_number("q_weight", self.q_weight, minimum=0)
        VEnsembleAdvantage(quantile=self.quantile, temperature=self.temperature, max_weight=self.max_weight)
        if isinstance(self.likelihood_target, str):
            check_choice("likelihood_target", self.likelihood_target, ("auto",))
        elif self.likelihood_target is not None:
            target = self.likelihood_target
            if not is_finite_number(target):
                fail("likelihood_target", "a finite number, 'auto' or None", repr(target))
            self.likelihood_target = float(target)
        check_number("beta_learning_rate", self.beta_learning_rate, minimum=0)
        if self.max_beta is not None:
            check_number("max_beta", self.max_beta, minimum=0, exclusive=True)
        check_number("initial_beta", self.initial_beta, minimum=0)

    def _create_aliases(self) -> None:
        self.actor = self.policy.actor
        self.critic = self.policy.critic
        self.critic_target = self.policy.critic_target
        self.value = self.policy.value

    def estimate_likelihood_target(self, **options: Any) -> float:
        """H_D from what the replay buffer holds, in this policy's density; `likelihood_target` from now on.

        Args:
            options: those of `estimate_log_likelihood_target`.
        """
        target = estimate_log_likelihood_target(transitions_of(self, seen=True), self.policy.make_actor, **options)
        self.likelihood_target = self.temperature_controller.target = target
        return target

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """So many steps of value and Q-functions, policy, beta and target, each on a batch of the replay buffer's."""
        assert self.replay_buffer is not None
        if gradient_steps < 1:
            return
        self._check_settings()
        if self.n_members != self.policy.n_members:
            fail("n_members", f"{self.policy.n_members}, as the networks were built", self.n_members)
        if self.likelihood_target == "auto":
            self.estimate_likelihood_target()
        controller = self.temperature_controller  # whose settings are those of now
        controller.target, controller.maximum = self.likelihood_target, self.max_beta
        controller.learning_rate = self.beta_learning_rate
        controller.bound()
        self.policy.set_training_mode(True)
        self._update_learning_rate([self.actor.optimizer, self.critic.optimizer, self.value.optimizer])
        advantage = VEnsembleAdvantage(quantile=self.quantile, temperature=self.temperature, max_weight=self.max_weight)
        found: list[Tensor] = []
        for _ in range(gradient_steps):
            batch = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)
            with torch.no_grad():
                data_q = self._least_target_q(batch.observations, batch.actions)
            value_loss, critic_loss = self._train_values(batch, data_q, advantage)
            actor_loss, log_prob = self._train_actor(batch, data_q, advantage)
            if self.likelihood_target is not None:
                controller.step(log_prob)
            polyak_update(self.critic.parameters(), self.critic_target.parameters(), self.tau)
            polyak_update(self.batch_norm_stats, self.batch_norm_stats_target, 1.0)
            found.append(torch.stack([value_loss, critic_loss, actor_loss, log_prob.mean()]).detach())
        self._n_updates += gradient_steps
        self._log(found)

    def _train_values(self, batch: Any, data_q: Tensor, advantage: VEnsembleAdvantage) -> tuple[Tensor, Tensor]:
        """A step of Eq. 3 and one of Eq. 4, both from the networks as they are; their losses."""
        discounts = self.gamma if batch.discounts is None else batch.discounts
        with torch.no_grad():
            v_next = advantage.target(self._values(batch.next_observations)).unsqueeze(1)
            y = batch.rewards + (1 - batch.dones) * discounts * v_next  # [B, 1]
        v = self.value(batch.observations)
        if self.value_loss == "expectile":
            value_loss = expectile_value_loss(data_q, v, tau=self.expectile)
        else:
            value_loss = sparse_value_loss(data_q, v, alpha=self.alpha)
        _step(self.value.optimizer, value_loss)
        members = self.critic(batch.observations, batch.actions)
        critic_loss = torch.stack([(q - y).square().mean() for q in members]).sum()
        _step(self.critic.optimizer, critic_loss)
        return value_loss, critic_loss

    def _train_actor(self, batch: Any, data_q: Tensor, advantage: VEnsembleAdvantage) -> tuple[Tensor, Tensor]:
        """A step of Eq. 13; its loss, and log pi of the data's actions, [B]."""
        density = self.actor.density(batch.observations)
        log_prob = density.log_prob(batch.actions).sum(dim=1)
        with torch.no_grad():
            weights = advantage.weights(data_q, self._values(batch.observations))
        if self.q_weight > 0:
            q = self.q_weight * self._least_target_q(batch.observations, density.rsample().clamp(-1, 1))
        else:
            q = torch.zeros_like(log_prob)
        actor_loss = cloning_policy_loss(q, log_prob, weights, self.temperature_controller.beta)
        _step(self.actor.optimizer, actor_loss)
        return actor_loss, log_prob.detach()

    def _values(self, observations: Any) -> Tensor:
        """V as it acts, in evaluation mode as target networks are, [m, B]."""
        self.value.set_training_mode(False)
        found: Tensor = self.value(observations)
        self.value.set_training_mode(True)
        return found

    def _least_target_q(self, observations: Any, actions: Tensor) -> Tensor:
        return torch.cat(self.critic_target(observations, actions), dim=1).amin(dim=1)

    def _log(self, found: list[Tensor]) -> None:
        """The means over these gradient steps."""
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        names = ("value_loss", "critic_loss", "actor_loss", "log_likelihood")
        for name, value in zip(names, torch.stack(found).mean(dim=0).tolist()):
            if math.isnan(value):
                expected = "a number (has the training diverged? Scale the rewards, or lower the learning rates)"
                fail(name, expected, "nan")
            self.logger.record(f"train/{name}", value)
        self.logger.record("train/beta", float(self.temperature_controller.beta.detach()))

    def _setup_learn(self, *arguments: Any, **options: Any) -> Any:
        """SB3's; without H_D and data there is nothing that a policy could be held to."""
        assert self.replay_buffer is not None
        if self.likelihood_target == "auto" and self.replay_buffer.size() == 0:
            fail("likelihood_target", "a number or None, or data before: learn_offline, or a filled buffer", "'auto'")
        return super()._setup_learn(*arguments, **options)

    def learn(
        self: SelfACTIVE,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "ACTIVE",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfACTIVE:
        """SB3's `learn`."""
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def set_parameters(self, *arguments: Any, **options: Any) -> None:
        """SB3's; H_D and the bound of beta are the model's own settings."""
        super().set_parameters(*arguments, **options)
        controller, target = self.temperature_controller, self.likelihood_target
        controller.target = None if isinstance(target, str) else target
        controller.maximum = self.max_beta
        controller.bound()

    def _excluded_save_params(self) -> list[str]:
        aliases = ["actor", "critic", "critic_target", "value", "temperature_controller"]
        return [*super()._excluded_save_params(), *aliases, "batch_norm_stats", "batch_norm_stats_target"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        optimizers = [f"{part}.optimizer" for part in ("actor", "critic", "value")]
        return ["policy", *optimizers, "temperature_controller"], []


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
