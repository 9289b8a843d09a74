"""Fixtures that several test files share: random transitions and small critics."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

from c4buffer import Transitions

MakeTransitions = Callable[..., Transitions]
MakeCritic = Callable[..., nn.Module]

# How long a case takes says how busy the machine is, nothing more.
untimed = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("short", untimed, max_examples=30, stateful_step_count=20, derandomize=True)
settings.register_profile("long", untimed, max_examples=600, stateful_step_count=30)
settings.load_profile("short")  # or pytest --hypothesis-profile=long, which draws other cases each time


class SmallCritic(nn.Module):
    """Q(s, a) = w tanh(W [s, a] + b): smooth, so that finite differences and second derivatives are exact."""

    def __init__(self, inputs: int, *, hidden: int = 8, outputs: int = 1) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, hidden)
        self.last = nn.Linear(hidden, outputs)

    def forward(self, observations: Tensor, actions: Tensor | None = None) -> Tensor:
        value: Tensor = self.last(self.features(observations, actions))
        return value

    def features(self, observations: Tensor, actions: Tensor | None = None) -> Tensor:
        x = observations if actions is None else torch.cat([observations, actions], dim=1)
        return torch.tanh(self.first(x))


def numbered(rows: int = 20) -> Transitions:
    """Rows 0, 1, 2, ... of one trajectory, each column the row's number, the next observation the next one's."""
    column = torch.arange(float(rows)).unsqueeze(1)
    return Transitions(
        observations=column, actions=column, rewards=column, next_observations=column + 1, terminals=column * 0
    )


@pytest.fixture
def make_transitions() -> MakeTransitions:
    """`make_transitions(n, ...)`: n seeded random transitions; every fifth is terminal unless `terminals=False`."""

    def make(
        n: int,
        observation_dim: int = 3,
        action_dim: int = 2,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        terminals: bool = True,
        discrete: bool = False,
    ) -> Transitions:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=dtype)

        return Transitions(
            observations=normal(n, observation_dim),
            actions=torch.randint(action_dim, (n,), generator=generator) if discrete else normal(n, action_dim),
            rewards=normal(n),
            next_observations=normal(n, observation_dim),
            terminals=(torch.arange(n) % 5 == 4) if terminals else torch.zeros(n),
        )

    return make


@pytest.fixture
def make_critic() -> MakeCritic:
    """`make_critic(inputs, ...)`: a seeded critic of one hidden layer, smooth, with a method `features`."""

    def make(
        inputs: int = 5,
        *,
        hidden: int = 8,
        outputs: int = 1,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> nn.Module:
        critic = SmallCritic(inputs, hidden=hidden, outputs=outputs).to(dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in critic.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype) / 2)
        return critic

    return make


@pytest.fixture
def pair(make_critic: MakeCritic) -> tuple[nn.Module, nn.Module]:
    """A critic and a target that differ, float64."""
    return make_critic(seed=1, dtype=torch.float64), make_critic(seed=2, dtype=torch.float64)
