"""TD3+BC in plain PyTorch. The three lines marked C4 are all that C4 adds; without them this is the plain algorithm."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import gymnasium
import torch
from torch import Tensor, nn

from c4buffer import ClusteredReplayBuffer, CovariancePenalty, Critics, Transitions, load_d4rl

DATA = Path(__file__).parent.parent / "data" / "hopper-medium-expert-10k.hdf5"
GAMMA, TAU, ALPHA, NOISE, NOISE_CLIP = 0.99, 0.005, 2.5, 0.2, 0.5


class Critic(nn.Module):
    """Q(s, a): [B, d_s], [B, d_a] -> [B]."""

    def __init__(self, observation_dim: int, action_dim: int) -> None:
        super().__init__()
        self.net = mlp(observation_dim + action_dim, 1)

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        value: Tensor = self.net(torch.cat([observations, actions], dim=1)).squeeze(1)
        return value


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, outputs))


def train(data: Transitions, updates: int, batch_size: int = 256) -> nn.Module:
    """The policy after so many updates on standardised data."""
    observation_dim, action_dim = data.next_observations.shape[1], data.actions.shape[1]
    policy = nn.Sequential(mlp(observation_dim, action_dim), nn.Tanh())
    q = nn.ModuleList([Critic(observation_dim, action_dim) for _ in range(2)])
    target_policy, target_q = copy.deepcopy(policy), copy.deepcopy(q)
    policy_optimizer = torch.optim.Adam(policy.parameters(), lr=3e-4)
    q_optimizer = torch.optim.Adam(q.parameters(), lr=3e-4)

    buffer = ClusteredReplayBuffer.from_transitions(data)
    critics = Critics(q, target_q)  # C4
    buffer.attach(critics)  # C4
    for update in range(updates):
        batch = buffer.sample(batch_size)
        with torch.no_grad():
            noise = (NOISE * torch.randn_like(batch.actions)).clamp(-NOISE_CLIP, NOISE_CLIP)
            next_actions = (target_policy(batch.next_observations) + noise).clamp(-1, 1)
            next_q = torch.min(*(member(batch.next_observations, next_actions) for member in target_q))
            target = batch.rewards + GAMMA * (1 - batch.terminals) * next_q
        q_loss = sum((member(batch.observations, batch.actions) - target).square().mean() for member in q)
        q_loss = q_loss + CovariancePenalty(0.1, scale="relative")(critics, batch)  # C4
        q_optimizer.zero_grad()
        q_loss.backward()
        q_optimizer.step()

        if update % 2 == 0:
            actions = policy(batch.observations)
            value = q[0](batch.observations, actions)
            imitation = (actions - batch.actions).square().mean()
            policy_loss = imitation - ALPHA * value.mean() / value.abs().mean().detach()
            policy_optimizer.zero_grad()
            policy_loss.backward()
            policy_optimizer.step()
            for online, slow in ((policy, target_policy), (q, target_q)):
                for parameter, target_parameter in zip(online.parameters(), slow.parameters()):
                    target_parameter.data.lerp_(parameter.data, TAU)
    return policy


def mean_return(policy: nn.Module, mean: Tensor, scale: Tensor, episodes: int = 5) -> float:
    """In Hopper-v5."""
    env, total = gymnasium.make("Hopper-v5"), 0.0
    for episode in range(episodes):
        observation, done = env.reset(seed=episode)[0], False
        while not done:
            with torch.no_grad():
                action = policy((torch.as_tensor(observation, dtype=torch.float32) - mean) / scale)
            observation, reward, terminated, truncated, _ = env.step(action.numpy())
            total, done = total + float(reward), terminated or truncated
    return total / episodes


if __name__ == "__main__":
    data = load_d4rl(DATA)
    mean, scale = data.observations.mean(dim=0), data.observations.std(dim=0) + 1e-3
    standardised = data.replace(
        observations=(data.observations - mean) / scale,
        next_observations=(data.next_observations - mean) / scale,
    )
    trained = train(standardised, updates=int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
    print(f"mean return in Hopper-v5: {mean_return(trained, mean, scale):.0f}")
