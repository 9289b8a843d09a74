"""C4 and ACTIVE for offline reinforcement learning: a clustered replay buffer, and losses for loops that exist."""

from . import plots
from .backends import FaissClusterer, SklearnClusterer
from .buffer import ClusteredReplayBuffer
from .clustering import Clusterer, MixtureClusterer
from .critics import Critics
from .datasets.d4rl import load_d4rl
from .datasets.minari import load_minari
from .datasets.ogbench import load_ogbench
from .diagnostics import Diagnosis, diagnose
from .losses.covariance import (
    CovariancePenalty,
    covariance_penalty,
    cross_covariance,
    decompose_cross_covariance,
)
from .losses.likelihood import estimate_log_likelihood_target
from .losses.temperature import TemperatureController
from .losses.value_ensemble import (
    VEnsemble,
    VEnsembleAdvantage,
    cloning_policy_loss,
    expectile_value_loss,
    sparse_value_loss,
)
from .mixture import GaussianMixture, MixtureResult
from .reduction import ReducedClusterer
from .refresh import Every, OnDrift, RefreshPolicy, RefreshReport
from .sampling import SingleClusterSampler
from .stacking import stacked_features, stacked_gradients
from .transitions import Transitions, ends_of

__version__ = "0.1.0"

__all__ = [
    "ClusteredReplayBuffer",
    "Clusterer",
    "CovariancePenalty",
    "Critics",
    "Diagnosis",
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
    "TemperatureController",
    "Transitions",
    "VEnsemble",
    "VEnsembleAdvantage",
    "cloning_policy_loss",
    "covariance_penalty",
    "cross_covariance",
    "decompose_cross_covariance",
    "diagnose",
    "ends_of",
    "estimate_log_likelihood_target",
    "expectile_value_loss",
    "load_d4rl",
    "load_minari",
    "load_ogbench",
    "plots",
    "sparse_value_loss",
    "stacked_features",
    "stacked_gradients",
]
