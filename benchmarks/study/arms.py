"""The arms of the study: what is changed in a base algorithm, one thing at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from c4buffer import CovariancePenalty, Critics, Transitions
from c4buffer.critics import paired_gradients


@dataclass(frozen=True)
class Arm:
    """A change to the base algorithm.

    Args:
        c4: fields of C4Config; None for the host's own sampler and loss.
        layer_norm: in the critic.
        random_partition: clusters of equal sizes drawn at random at each refresh, in place of the mixture's.
        gradient_norm: the mean squared gradient in place of the covariance penalty, with the same normaliser.
    """

    c4: dict[str, Any] | None = None
    layer_norm: bool = False
    random_partition: bool = False
    gradient_norm: bool = False


SAMPLER = {"n_clusters": 3, "refresh_interval": 1000, "penalty_weight": 0.0}
PENALTY = {"penalty_weight": 0.1, "penalty_kind": "gradient", "penalty_scale": "relative", "penalty_every": 1}
UNIFORM = {"n_clusters": 1, "refresh_interval": 1_000_000}

ARMS = {
    "plain": Arm(),
    "gradient-norm": Arm(c4={**UNIFORM, **PENALTY}, gradient_norm=True),
    "layer-norm": Arm(layer_norm=True),
    "random-partition": Arm(c4=SAMPLER, random_partition=True),
    "sampler": Arm(c4=SAMPLER),
    "penalty": Arm(c4={**UNIFORM, **PENALTY}),
    "feature-penalty": Arm(c4={**UNIFORM, "penalty_kind": "feature", "penalty_weight": 0.3, "penalty_every": 1}),
    "c4": Arm(c4={**SAMPLER, **PENALTY}),
}


@dataclass(frozen=True)
class Grid:
    """Every combination of datasets, arms and seeds, for a number of updates."""

    datasets: tuple[str, ...]
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    updates: int
    evaluate_every: int
    episodes: int = 10
    bases: tuple[str, ...] = field(default=("td3_plus_bc",))


GRIDS = {
    "first": Grid(
        datasets=("hopper-medium-expert", "hopper-medium-replay"),
        arms=tuple(ARMS),
        seeds=(0, 1, 2),
        updates=100_000,
        evaluate_every=5_000,
    ),
    "toy": Grid(
        datasets=("hopper-medium-expert",),
        arms=("plain", "random-partition", "c4"),
        seeds=(0, 1),
        updates=60,
        evaluate_every=20,
        episodes=1,
    ),
}


class GradientNormPenalty(CovariancePenalty):
    """The control: weight * mean |g|^2 / tr Sigma * Var_B(Q_target(x')), summed over members, the last two detached."""

    def _gradient(self, critics: Critics, batch: Transitions, values: Sequence[Tensor] | None) -> Tensor:
        terms = []
        for next_q, _, g in paired_gradients(critics, batch, values=values):
            trace = g.detach().var(dim=0).sum().clamp(min=torch.finfo(g.dtype).tiny)
            terms.append(g.square().sum(dim=1).mean() / trace * next_q.var())
        return self.weight * torch.stack(terms).sum()


def random_partition(n_clusters: int, seed: int) -> Callable[[Tensor, Tensor | None], Tensor]:
    """A clusterer that looks at nothing: equal sizes, drawn anew each time."""
    generator = torch.Generator().manual_seed(seed)

    def partition(embeddings: Tensor, previous: Tensor | None) -> Tensor:
        labels = torch.randperm(len(embeddings), generator=generator) % n_clusters
        return torch.nn.functional.one_hot(labels, n_clusters).to(embeddings.dtype)

    return partition
