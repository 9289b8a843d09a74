"""C4 for offline reinforcement learning: a clustered replay buffer and the covariance penalty."""

from .backends import FaissClusterer, SklearnClusterer
from .buffer import ClusteredReplayBuffer
from .clustering import Clusterer, MixtureClusterer
from .critics import Critics, stacked_features, stacked_gradients
from .datasets.d4rl import load_d4rl
from .losses.covariance import (
    CovariancePenalty,
    covariance_penalty,
    cross_covariance,
    decompose_cross_covariance,
)
from .mixture import GaussianMixture, MixtureResult
from .reduction import ReducedClusterer
from .refresh import Every, OnDrift, RefreshPolicy, RefreshReport
from .sampling import SingleClusterSampler
from .transitions import Transitions

__version__ = "0.1.0"

__all__ = [
    "ClusteredReplayBuffer",
    "Clusterer",
    "CovariancePenalty",
    "Critics",
    "Every",
    "FaissClusterer",
    "GaussianMixture",
    "MixtureClusterer",
    "MixtureResult",
    "OnDrift",
    "ReducedClusterer",
    "RefreshPolicy",
    "RefreshReport",
    "SingleClusterSampler",
    "SklearnClusterer",
    "Transitions",
    "covariance_penalty",
    "cross_covariance",
    "decompose_cross_covariance",
    "load_d4rl",
    "stacked_features",
    "stacked_gradients",
]
