"""The defaults that the contract names."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import c4buffer

DEFAULTS: list[tuple[str, dict[str, Any]]] = [
    (
        "GaussianMixture",
        {"covariance": "full", "regularization": 1e-6, "max_iterations": 10, "tolerance": 1e-3, "generator": None},
    ),
    (
        "ClusteredReplayBuffer",
        {"n_clusters": 3, "embedding": "gradients", "refresh": None, "clusterer": None, "max_dim": 256, "seed": None}
        | {"assignment": "soft", "replacement": True, "trajectory_tail": False, "device": "cpu", "storage": "memory"},
    ),
    ("covariance_penalty", {"trace_weight": 1.0}),
    ("CovariancePenalty", {"trace_weight": 1.0, "scale": "raw", "kind": "gradient"}),
    ("VEnsemble", {"hidden": (256, 256), "layer_norm": False}),
    ("VEnsembleAdvantage", {"temperature": 1.0, "max_weight": 100.0}),
    ("TemperatureController", {"learning_rate": 3e-4, "initial": 1.0, "maximum": None}),
]


@pytest.mark.parametrize(("name", "defaults"), DEFAULTS)
def test_defaults_are_those_of_the_contract(name: str, defaults: dict[str, Any]) -> None:
    parameters = inspect.signature(getattr(c4buffer, name)).parameters
    assert {option: parameters[option].default for option in defaults} == defaults
