"""ACTIVE in plain PyTorch, from the modules that its integrations use. Bracketed numbers are the paper's equations."""

from __future__ import annotations

import copy
import itertools
import sys
from pathlib import Path

import gymnasium
import torch
from torch import Tensor, nn

from c4buffer import (
    ClusteredReplayBuffer,
    TemperatureController,
    Transitions,
    VEnsemble,
    VEnsembleAdvantage,
    cloning_policy_loss,
    estimate_log_likelihood_target,
    expectile_value_loss,
    load_d4rl,
)

DATA = Path(__file__).parent.parent / "data" / "hopper-medium-expert-10k.hdf5"
GAMMA, ETA, EXPECTILE, MEMBERS = 0.99, 0.005, 0.9, 4
RETURN_SPAN = 1000.0  # rewards are scaled so that the returns in the data span as much


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, outputs))


class Policy(nn.Module):
    """A Gaussian around tanh(mu(s)) with a spread for each action dimension."""

    def __init__(self, observation_dim: int, action_dim: int) -> None:
        super().__init__()
        self.mean = nn.Sequential(mlp(observation_dim, action_dim), nn.Tanh())
        self.log_std = nn.Parameter(torch.full((action_dim,), -1.5))

    def forward(self, observations: Tensor) -> torch.distributions.Normal:
        return torch.distributions.Normal(self.mean(observations), self.log_std.clamp(-5, 2).exp())

    def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
        return self(observations).log_prob(actions).sum(dim=1)


def train(data: Transitions, updates: int, batch_size: int = 256) -> Policy:
    """The policy after so many updates on standardised data."""
    dims = data.observations.shape[1], data.actions.shape[1]
    policy, v = Policy(*dims), VEnsemble(dims[0], n_members=MEMBERS)
    q = nn.ModuleList([mlp(sum(dims), 1) for _ in range(2)])
    target_q = copy.deepcopy(q).requires_grad_(False)
    advantage = VEnsembleAdvantage(quantile=0.5)
    temperature = TemperatureController(estimate_log_likelihood_target(data, lambda: Policy(*dims)), learning_rate=3e-3)
    value_optimizer = torch.optim.Adam(itertools.chain(q.parameters(), v.parameters()), lr=3e-4)
    policy_optimizer = torch.optim.Adam(policy.parameters(), lr=3e-4)

    def least_q(critics: nn.ModuleList, observations: Tensor, actions: Tensor) -> Tensor:
        x = torch.cat([observations, actions], dim=1)
        return torch.min(*(member(x).squeeze(1) for member in critics))

    buffer = ClusteredReplayBuffer.from_transitions(data)  # uniform, as no critics are attached
    for _ in range(updates):
        batch = buffer.sample(batch_size)
        x = torch.cat([batch.observations, batch.actions], dim=1)
        with torch.no_grad():
            y = batch.rewards + GAMMA * (1 - batch.terminals) * advantage.target(v(batch.next_observations))  # (4)
            data_q = least_q(target_q, batch.observations, batch.actions)
        q_loss = sum((member(x).squeeze(1) - y).square().mean() for member in q)
        value_loss = expectile_value_loss(data_q, v(batch.observations), tau=EXPECTILE)  # (3)
        value_optimizer.zero_grad()
        (q_loss + value_loss).backward()
        value_optimizer.step()

        density = policy(batch.observations)
        log_prob = density.log_prob(batch.actions).sum(dim=1)
        policy_q = least_q(target_q, batch.observations, density.rsample().clamp(-1, 1))
        with torch.no_grad():
            weights = advantage.weights(data_q, v(batch.observations))  # (7)
        policy_loss = cloning_policy_loss(policy_q, log_prob, weights, temperature.beta)  # (13)
        policy_optimizer.zero_grad()
        policy_loss.backward()
        policy_optimizer.step()
        temperature.step(log_prob)  # (14)

        for parameter, target_parameter in zip(q.parameters(), target_q.parameters()):
            target_parameter.data.lerp_(parameter.data, ETA)
    return policy


def span_of_returns(data: Transitions) -> float:
    """The best trajectory's return less the worst's."""
    ends = (data.terminals + data.timeouts).nonzero().squeeze(1) + 1
    sizes = torch.diff(ends, prepend=torch.zeros(1, dtype=torch.int64))
    returns = torch.stack([rewards.sum() for rewards in data.rewards.split(sizes.tolist())])
    return float(returns.max() - returns.min())


def mean_return(policy: Policy, mean: Tensor, scale: Tensor, episodes: int = 5) -> float:
    """In Hopper-v5, by the policy's mean action."""
    env, total = gymnasium.make("Hopper-v5"), 0.0
    for episode in range(episodes):
        observation, done = env.reset(seed=episode)[0], False
        while not done:
            with torch.no_grad():
                action = policy.mean((torch.as_tensor(observation, dtype=torch.float32) - mean) / scale)
            observation, reward, terminated, truncated, _ = env.step(action.numpy())
            total, done = total + float(reward), terminated or truncated
    return total / episodes


if __name__ == "__main__":
    data = load_d4rl(DATA)
    mean, scale = data.observations.mean(dim=0), data.observations.std(dim=0) + 1e-3
    scaled = data.replace(
        observations=(data.observations - mean) / scale,
        next_observations=(data.next_observations - mean) / scale,
        rewards=data.rewards * RETURN_SPAN / span_of_returns(data),
    )
    trained = train(scaled, updates=int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
    print(f"mean return in Hopper-v5: {mean_return(trained, mean, scale):.0f}")
