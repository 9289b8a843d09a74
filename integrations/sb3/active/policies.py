"""ACTIVE's networks: a Gaussian policy, Q-functions with targets, and an ensemble of V-functions."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel, ContinuousCritic
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
    create_mlp,
)
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.td3.policies import Actor as DeterministicActor
from stable_baselines3.td3.policies import TD3Policy
from torch import Tensor, nn

from c4buffer import VEnsemble
from c4buffer._checks import check_integer

LOG_STD_BOUNDS = (-5.0, 2.0)


class Actor(DeterministicActor):
    """A Gaussian around tanh(mu(s)) with one spread for each action dimension, in actions scaled to [-1, 1].

    Its likelihood is finite at the edge of the action box, where that of a squashed Gaussian is not.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.spread = nn.Parameter(torch.zeros(get_action_dim(self.action_space)))

    def density(self, observations: Any) -> torch.distributions.Normal:
        """Of the action, before it is clipped to the box."""
        low, high = LOG_STD_BOUNDS
        log_std = low + (high - low) * self.spread.sigmoid()
        return torch.distributions.Normal(super().forward(observations), log_std.exp())

    def log_prob(self, observations: Any, actions: Tensor) -> Tensor:
        """log pi(a | s), summed over action dimensions, [B]."""
        found: Tensor = self.density(observations).log_prob(actions).sum(dim=1)
        return found

    def forward(self, observations: Any, deterministic: bool = False) -> Tensor:
        """The mean action, or a sample clipped to the box, [B, A]."""
        density = self.density(observations)
        action: Tensor = density.mean if deterministic else density.rsample().clamp(-1, 1)
        return action

    def _predict(self, observation: Any, deterministic: bool = False) -> Tensor:
        action: Tensor = self(observation, deterministic)
        return action


class ValueEnsemble(BaseModel):
    """m V-functions over one feature extractor, observations -> [m, B]."""

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        n_members: int,
        activation_fn: type[nn.Module] = nn.ReLU,
        normalize_images: bool = True,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            features_extractor=features_extractor,
            normalize_images=normalize_images,
        )
        self.members: nn.Module
        if activation_fn is nn.ReLU and net_arch:
            self.members = VEnsemble(features_dim, n_members=n_members, hidden=net_arch)
        else:
            self.members = nn.ModuleList(
                nn.Sequential(*create_mlp(features_dim, 1, net_arch, activation_fn)) for _ in range(n_members)
            )

    def forward(self, observations: Any) -> Tensor:
        """[m, B]."""
        assert self.features_extractor is not None
        features = self.extract_features(observations, self.features_extractor)
        if isinstance(self.members, nn.ModuleList):
            return torch.stack([member(features).squeeze(1) for member in self.members])
        found: Tensor = self.members(features)
        return found


class ACTIVEPolicy(TD3Policy):
    """Actor, critic and its target, and V-functions, each with a feature extractor of its own.

    Args:
        observation_space, action_space, lr_schedule: as every policy of SB3 gets them.
        net_arch: hidden widths, a list, or a dict of lists "pi" and "qf"; the V-functions have those of "qf".
        activation_fn: between layers.
        features_extractor_class, features_extractor_kwargs, normalize_images: of observations. None: the policy's own.
        optimizer_class, optimizer_kwargs: of all three optimizers.
        n_critics: the number of Q-functions.
        n_members: m, the number of V-functions; ACTIVE's own argument sets it.
    """

    actor: Actor
    value: ValueEnsemble
    own_extractor: ClassVar[type[BaseFeaturesExtractor]] = FlattenExtractor

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.ReLU,
        features_extractor_class: type[BaseFeaturesExtractor] | None = None,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        n_critics: int = 2,
        n_members: int = 4,
    ) -> None:
        self.n_members = check_integer("n_members", n_members, minimum=1)
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            [256, 256] if net_arch is None else net_arch,
            activation_fn,
            features_extractor_class or self.own_extractor,
            features_extractor_kwargs,
            normalize_images,
            optimizer_class,
            optimizer_kwargs,
            n_critics,
        )

    def _build(self, lr_schedule: Schedule) -> None:
        self.actor = self.make_actor()
        self.critic: ContinuousCritic = self.make_critic()
        self.critic_target: ContinuousCritic = self.make_critic()
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.critic_target.requires_grad_(False)  # the actor's loss goes through it, to the action only
        self.critic_target.set_training_mode(False)
        self.value = self.make_value()
        for part in (self.actor, self.critic, self.value):
            make_optimizer: Any = self.optimizer_class
            part.optimizer = make_optimizer(part.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> Actor:
        return Actor(**self._update_features_extractor(self.actor_kwargs, features_extractor)).to(self.device)

    def make_value(self) -> ValueEnsemble:
        options = {**self.net_args, "net_arch": self.critic_kwargs["net_arch"], "n_members": self.n_members}
        return ValueEnsemble(**self._update_features_extractor(options, None)).to(self.device)

    def _predict(self, observation: Any, deterministic: bool = False) -> Tensor:
        action: Tensor = self.actor(observation, deterministic)
        return action

    def set_training_mode(self, mode: bool) -> None:
        super().set_training_mode(mode)
        self.value.set_training_mode(mode)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        parameters = super()._get_constructor_parameters()
        del parameters["share_features_extractor"]
        return {**parameters, "n_members": self.n_members}


MlpPolicy = ACTIVEPolicy


class CnnPolicy(ACTIVEPolicy):
    """For images."""

    own_extractor = NatureCNN


class MultiInputPolicy(ACTIVEPolicy):
    """For dictionaries of observations."""

    own_extractor = CombinedExtractor
