"""ACTIVE's V-functions in d3rlpy's terms, and its policy as something that can be cloned."""

from typing import Any

import torch
from d3rlpy.models.builders import create_value_function
from d3rlpy.models.encoders import DefaultEncoderFactory, EncoderFactory, VectorEncoderFactory
from d3rlpy.models.torch import VectorEncoder, build_gaussian_distribution
from torch import Tensor, nn

from c4buffer import VEnsemble

from .dataset import scaled_observations
from .reading import as_d3rlpy

HOSTS_OWN = (DefaultEncoderFactory, VectorEncoderFactory)  # another may have filled, or frozen, what it makes


class PolicyDensity(nn.Module):
    """A policy of d3rlpy's with the method that fits it."""

    def __init__(self, policy: Any, algo: Any) -> None:
        super().__init__()
        self.policy = policy
        self._algo = algo

    def log_prob(self, observations: Any, actions: Tensor) -> Tensor:
        observations = as_d3rlpy(scaled_observations(observations, self._algo.observation_scaler))
        found: Tensor = build_gaussian_distribution(self.policy(observations)).log_prob(actions).squeeze(1)
        return found


def new_value_functions(observation_shape: Any, encoder_factory: EncoderFactory, n_members: int) -> nn.Module:
    """observations -> [m, B]: a VEnsemble for d3rlpy's own perceptrons with ReLU, else m networks of the factory's."""
    first = create_value_function(observation_shape, encoder_factory, "cpu:0", False)
    if type(encoder_factory) in HOSTS_OWN and type(first._encoder) is VectorEncoder:
        layers = list(first._encoder._layers)
        kinds = [type(layer) for layer in layers]
        if kinds == [nn.Linear, nn.ReLU] * (len(layers) // 2):
            widths = [layer.out_features for layer in layers[::2]]
            return VEnsemble(layers[0].in_features, n_members=n_members, hidden=widths)
    others = (create_value_function(observation_shape, encoder_factory, "cpu:0", False) for _ in range(n_members - 1))
    return OneByOne([first, *others])


class OneByOne(nn.Module):
    """V-functions of any networks, [B, ...] -> [m, B]."""

    def __init__(self, members: list[Any]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, observations: Any) -> Tensor:
        return torch.stack([member(observations).squeeze(1) for member in self.members])
