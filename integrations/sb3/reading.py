"""Stable-Baselines3's networks and samples as Critics and Transitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from torch import Tensor

from c4buffer import Critics, Transitions
from c4buffer._checks import fail


class _Q:
    """One network of a ContinuousCritic, `(observations, actions) -> [B]`; quantiles by their mean.

    The critic itself is not called: it takes no gradients through a feature extractor that it shares.
    """

    def __init__(self, critic: Any, place: int) -> None:
        self.critic = critic
        self.place = place

    def __call__(self, observations: Any, actions: Tensor) -> Tensor:
        values: Tensor = self.critic.q_networks[self.place](self._inputs(observations, actions))
        return values.mean(dim=1)

    def features(self, observations: Any, actions: Tensor) -> Tensor:
        """The last hidden layer, [B, F]."""
        hidden: Tensor = self.critic.q_networks[self.place][:-1](self._inputs(observations, actions))
        return hidden

    def _inputs(self, observations: Any, actions: Tensor) -> Tensor:
        features = self.critic.extract_features(observations, self.critic.features_extractor)
        return torch.cat([features, actions], dim=1)


class _DiscreteQ:
    """`observations -> [B, n_actions]`; quantiles [B, n, n_actions] by their mean."""

    def __init__(self, network: Any) -> None:
        self.network = network

    def __call__(self, observations: Any) -> Tensor:
        values: Tensor = self.network(observations)
        return values.mean(dim=1) if values.ndim == 3 else values

    def features(self, observations: Any, actions: Tensor) -> Tensor:
        """The last hidden layer, [B, F], which no action enters."""
        layers = getattr(self.network, "q_net", None) or self.network.quantile_net
        hidden: Tensor = layers[:-1](self.network.extract_features(observations, self.network.features_extractor))
        return hidden


class _Greedy:
    """The best action by the network that makes the TD target."""

    def __init__(self, network: _DiscreteQ) -> None:
        self.network = network

    def __call__(self, observations: Any) -> Tensor:
        return self.network(observations).argmax(dim=1)


class _Actor:
    """The actor's action: the target actor's, where there is one; else without noise."""

    def __init__(self, actor: Any, options: dict[str, Any]) -> None:
        self.actor = actor
        self.options = options

    def __call__(self, observations: Any) -> Tensor:
        action: Tensor = self.actor(observations, **self.options)
        return action


def critics_of(model: Any) -> Critics:
    """The critics of an off-policy model: SAC, TD3, DDPG and DQN, sb3-contrib's TQC, CrossQ and QR-DQN, and ACTIVE.

    a' is what the model's own TD target takes, but for its noise: of the target actor in TD3 and DDPG, the actor's mean
    in SAC, TQC and CrossQ, the greedy action in DQN and QR-DQN; in ACTIVE, whose target takes none, the actor's
    mean. CrossQ has no target network: its live critic stands in, in evaluation mode.

    Raises:
        ValueError: for a model without a Q-function, as PPO, and for observations that have no gradient.
    """
    if not isinstance(model, OffPolicyAlgorithm):
        fail("model", "an off-policy model, which has a Q-function and a replay buffer", type(model).__name__)
    _check_observations(model.observation_space)
    for name, target in (("q_net", "q_net_target"), ("quantile_net", "quantile_net_target")):
        if hasattr(model, name):
            greedy = _DiscreteQ(getattr(model, target))
            return Critics(_DiscreteQ(getattr(model, name)), greedy, policy=_Greedy(greedy))
    if not hasattr(model, "critic"):
        fail("model", "one with a critic or a Q-network", type(model).__name__)
    _check_critic(model.critic)
    critic, target = model.critic, getattr(model, "critic_target", model.critic)
    members = range(len(critic.q_networks))
    if hasattr(model, "actor_target"):
        policy = _Actor(model.actor_target, {})
    else:
        policy = _Actor(model.actor, {"deterministic": True})
    return Critics([_Q(critic, i) for i in members], [_Q(target, i) for i in members], policy=policy)


def _check_critic(critic: Any) -> None:
    """Its networks are read one by one, past its `forward`."""
    written_by = type(critic).forward.__module__.partition(".")[0]
    if written_by not in ("stable_baselines3", "sb3_contrib") or not hasattr(critic, "q_networks"):
        expected = "a critic with q_networks and SB3's own forward, as its networks are read one by one"
        fail("model", expected, f"a {type(critic).__name__}")


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    """That of the critic."""
    optimizer: torch.optim.Optimizer = (model.critic if hasattr(model, "critic") else model.policy).optimizer
    return optimizer


def transitions_of_samples(samples: Any) -> Transitions:
    """What a replay buffer's `sample` gives, nothing checked; timeouts are no terminals there already."""
    terminals = samples.dones.squeeze(1)
    discrete = not samples.actions.is_floating_point()
    actions = samples.actions.squeeze(1) if discrete else samples.actions
    return Transitions.unchecked(
        {
            "observations": samples.observations,
            "actions": actions.long() if discrete else actions,
            "rewards": samples.rewards.squeeze(1),
            "next_observations": samples.next_observations,
            "terminals": terminals,
            "timeouts": torch.zeros_like(terminals),
            "next_actions": actions.long() if discrete else actions,  # replaced by the policy's
            "has_next_actions": torch.zeros_like(terminals),
            "intervals": torch.ones_like(terminals),
        }
    )


class AtEnvironments:
    """An array [positions, environments, ...], read at an environment of each sample, whichever the reader asks for.

    Args:
        held: the array.
        environments: of each sample, [B].
    """

    def __init__(self, held: np.ndarray, environments: np.ndarray) -> None:
        self.held = held
        self.environments = environments

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, tuple):
            return self.held[key]
        positions, asked, *rest = key
        place = (positions, self.environments.reshape(np.shape(asked)), *rest)
        return self.held[place]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.held[key] = value


def joined(parts: list[Any]) -> Any:
    """Samples one behind the other."""
    return _each_field(lambda *values: torch.cat(values), parts)


def picked(samples: Any, order: np.ndarray) -> Any:
    """Samples in this order of their rows, [B]."""
    places = torch.from_numpy(order)
    return _each_field(lambda value: value[places.to(value.device)], [samples])


def _each_field(function: Any, parts: list[Any]) -> Any:
    def apply(values: tuple[Any, ...]) -> Any:
        if isinstance(values[0], dict):
            return {key: function(*(value[key] for value in values)) for key in values[0]}
        return None if values[0] is None else function(*values)

    return type(parts[0])(*(apply(values) for values in zip(*parts)))


def _check_observations(space: spaces.Space[Any]) -> None:
    parts = list(space.spaces.values()) if isinstance(space, spaces.Dict) else [space]
    for part in parts:
        if not isinstance(part, (spaces.Box, spaces.MultiBinary)):
            fail("observation_space", "boxes or bits, by whose entries a critic has gradients", repr(part))
