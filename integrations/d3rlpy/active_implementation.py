"""ACTIVE's losses on d3rlpy's networks."""

import dataclasses
import math
from typing import Any

import torch
from d3rlpy.algos.qlearning.torch.ddpg_impl import (
    DDPGBaseActorLoss,
    DDPGBaseCriticLoss,
    DDPGBaseImpl,
    DDPGBaseModules,
)
from d3rlpy.dataclass_utils import asdict_as_float
from d3rlpy.models.torch import ActionOutput, build_gaussian_distribution
from d3rlpy.torch_utility import TorchMiniBatch
from torch import Tensor, nn

from c4buffer import (
    TemperatureController,
    VEnsembleAdvantage,
    cloning_policy_loss,
    expectile_value_loss,
    sparse_value_loss,
)
from c4buffer._checks import fail

from .active_config import ACTIVEConfig


@dataclasses.dataclass(frozen=True)
class ACTIVEModules(DDPGBaseModules):
    """The networks, and beta."""

    value_funcs: nn.Module
    temperature: TemperatureController


@dataclasses.dataclass(frozen=True)
class ACTIVECriticLoss(DDPGBaseCriticLoss):
    """Its parts, as d3rlpy logs them."""

    q_loss: Tensor
    v_loss: Tensor


@dataclasses.dataclass(frozen=True)
class ACTIVEActorLoss(DDPGBaseActorLoss):
    """With the mean log-likelihood of the data's actions."""

    log_likelihood: Tensor


class ACTIVEImpl(DDPGBaseImpl):
    """The losses on d3rlpy's networks."""

    _modules: ACTIVEModules

    def __init__(self, *, config: ACTIVEConfig, **options: Any) -> None:
        super().__init__(**options)
        self._modules.targ_q_funcs.requires_grad_(False)  # the policy's loss goes through them, to the action only
        self._config = config
        self._compiled: bool = options["compiled"]
        self._updating = False
        self._known_q: tuple[Tensor, Tensor] | None = None
        self._named_target = config.likelihood_target  # what the config said last
        self._built = {"n_members": config.n_members, "n_critics": config.n_critics}
        self.follow()

    def follow(self) -> None:
        """Take the config's settings as they stand. H_D is taken where it is another than the config's before.

        Raises:
            ValueError: for other numbers of networks than there are; nothing is changed then.
        """
        config, temperature = self._config, self._modules.temperature
        for name, number in self._built.items():
            if getattr(config, name) != number:
                fail(name, f"{number}, as the networks were built", getattr(config, name))
        self._gamma, self._tau = config.gamma, config.eta
        self._advantage = VEnsembleAdvantage(
            quantile=config.quantile, temperature=config.temperature, max_weight=config.max_weight
        )
        temperature.learning_rate, temperature.maximum = config.beta_learning_rate, config.max_beta
        temperature.bound()
        temperature.target, self._named_target = self._next_target(), config.likelihood_target

    def _next_target(self) -> float | None:
        """H_D as the next fit takes it; None where it estimates it first."""
        named = self._config.likelihood_target
        if named == self._named_target:
            return self._modules.temperature.target
        return None if isinstance(named, str) else named

    def save_model(self, f: Any) -> None:
        """d3rlpy's; with the H_D that the next fit would take."""
        temperature = self._modules.temperature
        target, temperature.target = temperature.target, self._next_target()
        try:
            super().save_model(f)
        finally:
            temperature.target = target

    def load_model(self, f: Any) -> None:
        """d3rlpy's; a target and a bound of beta that the config names go before what is in the file."""
        super().load_model(f)
        config, temperature = self._config, self._modules.temperature
        if config.likelihood_target != "auto":
            temperature.target = config.likelihood_target
        self._named_target = config.likelihood_target
        temperature.maximum = config.max_beta
        temperature.bound()

    @property
    def waits_for_target(self) -> bool:
        """Whether H_D is still to be estimated."""
        return self._config.likelihood_target == "auto" and self._modules.temperature.target is None

    def inner_update(self, batch: TorchMiniBatch, grad_step: int) -> dict[str, float]:
        """d3rlpy's; Q of the data's actions, which both losses ask for, is computed once."""
        if self.waits_for_target:
            fail("likelihood_target", "a number, or a fit or estimate_likelihood_target(dataset) before", "'auto'")
        self._updating = not self._compiled  # what is captured keeps nothing
        try:
            metrics: dict[str, float] = super().inner_update(batch, grad_step)
        finally:
            self._updating, self._known_q = False, None
        for name, value in metrics.items():
            if math.isnan(value):
                expected = "a number (has the training diverged? Scale the rewards, or lower the learning rates)"
                fail(name, expected, "nan")
        return metrics

    def compute_target(self, batch: TorchMiniBatch) -> Tensor:
        """min_i V_i(s') (Eq. 4), [B, 1]."""
        with torch.no_grad():
            v_next = self._modules.value_funcs(batch.next_observations)
            return self._advantage.target(v_next).unsqueeze(1)

    def compute_critic_loss(self, batch: TorchMiniBatch, q_tpn: Tensor) -> ACTIVECriticLoss:
        """The TD loss of Eq. 4 and the value loss of Eq. 3."""
        q_loss = self._q_func_forwarder.compute_error(
            observations=batch.observations,
            actions=batch.actions,
            rewards=batch.rewards,
            target=q_tpn,
            terminals=batch.terminals,
            gamma=self._gamma**batch.intervals,
        )
        v = self._modules.value_funcs(batch.observations)
        if self._config.value_loss == "expectile":
            v_loss = expectile_value_loss(self._q_of_data(batch), v, tau=self._config.tau)
        else:
            v_loss = sparse_value_loss(self._q_of_data(batch), v, alpha=self._config.alpha)
        return ACTIVECriticLoss(critic_loss=q_loss + v_loss, q_loss=q_loss, v_loss=v_loss)

    def compute_actor_loss(self, batch: TorchMiniBatch, action: ActionOutput) -> ACTIVEActorLoss:
        """The policy's loss of Eq. 13."""
        density = build_gaussian_distribution(action)
        log_prob = density.log_prob(batch.actions).squeeze(1)
        with torch.no_grad():
            weights = self._advantage.weights(self._q_of_data(batch), self._modules.value_funcs(batch.observations))
        if self._config.q_weight > 0:
            q = self._config.q_weight * self._min_target_q(batch.observations, density.sample())
        else:
            q = torch.zeros_like(log_prob)
        loss = cloning_policy_loss(q, log_prob, weights, self._modules.temperature.beta)
        return ACTIVEActorLoss(actor_loss=loss, log_likelihood=log_prob.detach().mean())

    def update_actor(self, batch: TorchMiniBatch) -> dict[str, float]:
        """A step of the policy, then one of beta, which no captured graph may hold."""
        self._modules.targ_q_funcs.eval()  # as d3rlpy has Q-functions in a policy's loss
        self._modules.targ_q_funcs.requires_grad_(False)  # which an export turns on again
        loss: Any = self._compute_actor_grad(batch)
        self._modules.actor_optim.step()
        temperature = self._modules.temperature
        if temperature.target is not None:
            temperature.step(loss.log_likelihood.reshape(1))
        return {**asdict_as_float(loss), "temperature": float(temperature.beta.detach())}

    def inner_sample_action(self, x: Any) -> Tensor:
        action: Tensor = build_gaussian_distribution(self._modules.policy(x)).sample()
        return action

    def _q_of_data(self, batch: TorchMiniBatch) -> Tensor:
        """Q(s, a) of the data, [B]."""
        if self._known_q is not None and self._known_q[0] is batch.rewards:
            return self._known_q[1]
        with torch.no_grad():
            q = self._min_target_q(batch.observations, batch.actions)
        if self._updating:
            self._known_q = batch.rewards, q
        return q

    def _min_target_q(self, observations: Any, actions: Tensor) -> Tensor:
        q: Tensor = self._targ_q_func_forwarder.compute_expected_q(observations, actions, "min")
        return q.squeeze(1)
