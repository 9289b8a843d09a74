"""The arms of the study: what is changed in a base algorithm, one thing at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from c4buffer import CovariancePenalty, Critics, Transitions, covariance_penalty
from c4buffer.gradients import paired_gradients
from c4buffer.losses.covariance import rounding_noise


@dataclass(frozen=True)
class Arm:
    """A change to the base algorithm.

    Args:
        c4: fields of C4Config; None for the host's own sampler and loss.
        layer_norm: in the critic.
        random_partition: clusters of equal sizes drawn at random at each refresh, in place of the mixture's.
        gradient_norm: the mean squared gradient in place of the covariance penalty, over tr Sigma and times Var Q.
        gradient_variance: the trace of its covariance in that place.
        cap: the raw penalty P of each critic becomes cap * tanh(P / cap), as in C4's published code.
        buffer: options of the ClusteredReplayBuffer that C4Config has no field for.
        active: fields of ACTIVEConfig, for a base of ACTIVE's.
        target: how ACTIVE's H_D is estimated, as options of `estimate_log_likelihood_target`.
    """

    c4: dict[str, Any] | None = None
    layer_norm: bool = False
    random_partition: bool = False
    gradient_norm: bool = False
    gradient_variance: bool = False
    cap: float | None = None
    buffer: dict[str, Any] = field(default_factory=dict)
    active: dict[str, Any] = field(default_factory=dict)
    target: dict[str, Any] = field(default_factory=dict)


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
FIRST = tuple(ARMS)

BEST = {**SAMPLER, **PENALTY}  # what the search starts from; each of its arms changes one thing
ARMS.update(
    {
        "raw": Arm(c4={**BEST, "penalty_scale": "raw"}),
        "raw-capped": Arm(c4={**BEST, "penalty_scale": "raw"}, cap=10.0),
        "correlation": Arm(c4={**BEST, "penalty_scale": "correlation"}),
        "correlation-1": Arm(c4={**BEST, "penalty_scale": "correlation", "penalty_weight": 1.0}),
        "feature": Arm(c4={**BEST, "penalty_kind": "feature", "penalty_weight": 0.3}),
        "gradient-variance": Arm(c4={**UNIFORM, **PENALTY}, gradient_variance=True),
        "weight-0.001": Arm(c4={**BEST, "penalty_weight": 0.001}),
        "weight-0.01": Arm(c4={**BEST, "penalty_weight": 0.01}),
        "weight-1": Arm(c4={**BEST, "penalty_weight": 1.0}),
        "every-4th": Arm(c4={**BEST, "penalty_every": 4}),
        "k-2": Arm(c4={**BEST, "n_clusters": 2}),
        "k-5": Arm(c4={**BEST, "n_clusters": 5}),
        "k-8": Arm(c4={**BEST, "n_clusters": 8}),
        "refresh-200": Arm(c4={**BEST, "refresh_interval": 200}),
        "refresh-5000": Arm(c4={**BEST, "refresh_interval": 5000}),
        "policy-action": Arm(c4={**BEST, "next_action": "policy"}),
        "feature-clusters": Arm(c4={**BEST, "embedding": "features"}),
        "hard": Arm(c4=BEST, buffer={"assignment": "hard"}),
        "trajectory-tail": Arm(c4=BEST, buffer={"trajectory_tail": True}),
        "c4-layer-norm": Arm(c4=BEST, layer_norm=True),
    }
)
SEARCH = tuple(name for name in ARMS if name not in FIRST)

TARGETS: dict[str, dict[str, Any]] = {
    "fraction-0.5": {"method": "fraction", "fraction": 0.5},
    "fraction-1": {"method": "fraction", "fraction": 1.0},
    "quantile-0.1": {"method": "quantile", "quantile": 0.1},
    "quantile-0.5": {"method": "quantile", "quantile": 0.5},
}
ARMS.update({name: Arm(target=options) for name, options in TARGETS.items()})
# before the default was the median: 0.8 of the way, and a tenth of the learning rate of beta
ARMS["fraction-0.8, beta 3e-4"] = Arm(active={"beta_learning_rate": 3e-4}, target={"method": "fraction"})


@dataclass(frozen=True)
class Grid:
    """Every combination of datasets, arms and seeds, for a number of updates.

    beside: grids whose runs are shown with this one's, such as those of the baseline.
    baseline: the arm that the others are compared with.
    """

    datasets: tuple[str, ...]
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    updates: int
    evaluate_every: int
    episodes: int = 10
    bases: tuple[str, ...] = ("td3_plus_bc",)
    beside: tuple[str, ...] = ()
    baseline: str = "plain"


GRIDS = {
    "first": Grid(
        datasets=("hopper-medium-expert", "hopper-medium-replay"),
        arms=FIRST,
        seeds=(0, 1, 2),
        updates=100_000,
        evaluate_every=5_000,
    ),
    "search": Grid(
        datasets=("hopper-medium-expert", "hopper-medium-replay"),
        arms=SEARCH,
        seeds=(0, 1, 2),
        updates=100_000,
        evaluate_every=5_000,
        beside=("first",),
        baseline="c4",
    ),
    "confirm": Grid(
        datasets=(
            "halfcheetah-medium-expert",
            "halfcheetah-medium-replay",
            "walker2d-medium-expert",
            "walker2d-medium-replay",
        ),
        # of the first grid the best form of C4, and the best of all; of the search the best form on medium-expert,
        # and the one that gained there and lost nothing clear on medium-replay
        arms=("plain", "penalty", "layer-norm", "correlation-1", "correlation"),
        seeds=(3, 4, 5),
        updates=100_000,
        evaluate_every=5_000,
    ),
    "active": Grid(
        datasets=("hopper-medium-expert", "hopper-medium-replay"),
        arms=("plain",),
        seeds=(0, 1, 2),
        updates=25_000,
        evaluate_every=2_500,
        bases=("iql", "active_i", "active_s"),
    ),
    "target": Grid(
        datasets=("hopper-medium-expert", "hopper-medium-replay"),
        arms=tuple(TARGETS),
        seeds=(0,),
        updates=25_000,
        evaluate_every=2_500,
        bases=("active_i",),
        beside=("active",),
    ),
    "beta": Grid(
        datasets=("hopper-medium-expert", "hopper-medium-replay"),
        arms=("fraction-0.8, beta 3e-4",),
        seeds=(0,),
        updates=25_000,
        evaluate_every=2_500,
        bases=("active_i", "active_s"),
        beside=("active",),
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


class GradientVariancePenalty(CovariancePenalty):
    """The control: weight * tr Sigma / tr Sigma * Var_B(Q_target(x')), summed over members, the last two detached.

    Zero, as the relative penalty is, where the trace is all rounding: its gradient grows as 1 / sqrt(tr Sigma).
    """

    def _gradient(self, critics: Critics, batch: Transitions, values: Sequence[Tensor] | None) -> Tensor:
        terms = []
        for next_q, _, g in paired_gradients(critics, batch, values=values):
            trace = g.var(dim=0).sum()
            vanishes = trace <= rounding_noise(g)
            unit = trace / torch.where(vanishes, torch.ones_like(trace), trace.detach())
            terms.append(torch.where(vanishes, torch.zeros_like(unit), unit * next_q.var()))
        return self.weight * torch.stack(terms).sum()


class CappedPenalty(CovariancePenalty):
    """weight * cap * tanh(P / cap), summed over members, P the raw penalty of each."""

    def __init__(self, weight: float, *, cap: float) -> None:
        super().__init__(weight)
        self.cap = cap

    def _gradient(self, critics: Critics, batch: Transitions, values: Sequence[Tensor] | None) -> Tensor:
        terms = [covariance_penalty(a, g) for _, a, g in paired_gradients(critics, batch, values=values)]
        return self.weight * self.cap * torch.tanh(torch.stack(terms) / self.cap).sum()


def random_partition(n_clusters: int, seed: int) -> Callable[[Tensor, Tensor | None], Tensor]:
    """A clusterer that looks at nothing: equal sizes, drawn anew each time."""
    generator = torch.Generator().manual_seed(seed)

    def partition(embeddings: Tensor, previous: Tensor | None) -> Tensor:
        labels = torch.randperm(len(embeddings), generator=generator) % n_clusters
        return torch.nn.functional.one_hot(labels, n_clusters).to(embeddings.dtype)

    return partition
