"""Under another default device of torch: what is bookkeeping stays where it belongs, and batches are the same.

A tensor on "meta" has no values, so that one made there by mistake fails wherever it is looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from c4buffer import (
    ClusteredReplayBuffer,
    CovariancePenalty,
    Critics,
    FaissClusterer,
    GaussianMixture,
    MixtureClusterer,
    OnDrift,
    SklearnClusterer,
    Transitions,
    diagnose,
)

from .conftest import MakeCritic, MakeTransitions

OPTIONS: dict[str, dict[str, Any]] = {
    "by default": {},
    "hard": {"assignment": "hard"},
    "walks": {"replacement": False},
    "tails": {"trajectory_tail": True},
    "three steps": {"n_steps": 3},
    "drift": {"refresh": OnDrift(0.1, check_every=1, probe_size=20)},
    "few dimensions": {"max_dim": 4},
    "principal ones": {"max_dim": 4, "reduction": "pca"},
    "K by BIC": {"n_clusters": "auto"},
    "FAISS": {"clusterer": FaissClusterer(3)},
    "files": {"storage": "memmap"},
    "growing": {"growing": True, "capacity": 1000},
}


@pytest.fixture
def critics(make_critic: MakeCritic) -> Critics:
    return Critics(make_critic(seed=1), make_critic(seed=2))


def batches(options: dict[str, Any], data: Transitions, critics: Critics, path: Path) -> list[tuple[list[int], int]]:
    """What is drawn before and after clustering, overwriting, adding and coming back from a file."""
    buffer = ClusteredReplayBuffer.from_transitions(data, **{"seed": 0, **options})
    drawn = [buffer.sample(8)]
    buffer.attach(critics)
    drawn += [buffer.sample(size) for size in (8, 8, 40)]
    buffer.extend(data[:30])
    one = data[0]
    assert isinstance(one.observations, torch.Tensor)
    assert isinstance(one.next_observations, torch.Tensor)
    for _ in range(2):
        buffer.add(one.observations[0], one.actions[0], one.rewards[0], one.next_observations[0], one.terminals[0])
    drawn += [buffer.sample(8) for _ in range(3)]
    if "clusterer" not in options:
        buffer.save(path)
        buffer = ClusteredReplayBuffer.load(path)
        buffer.attach(critics)
    buffer.refresh(critics)
    drawn += [buffer.sample(8), buffer.rows(3, 9)]
    assert all(leaf.device.type == "cpu" for batch in drawn for _, leaf in batch.columns())
    return [(batch.indices.tolist() if batch.indices is not None else [], batch.cluster) for batch in drawn]


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_buffer_draws_the_same_batches(
    kind: str, make_transitions: MakeTransitions, critics: Critics, tmp_path: Path
) -> None:
    data = make_transitions(120)
    expected = batches(OPTIONS[kind], data, critics, tmp_path / "one")
    with torch.device("meta"):
        found = batches(OPTIONS[kind], data, critics, tmp_path / "other")
    assert found == expected


@pytest.mark.parametrize(
    "measure",
    [
        lambda data, critics: CovariancePenalty(0.1, scale="relative")(critics, data),
        lambda data, critics: CovariancePenalty(0.1, kind="feature")(critics, data),
        lambda data, critics: torch.tensor(vars(diagnose(critics, data))["total"], device="cpu"),
        lambda data, critics: GaussianMixture(3, start="faiss").fit(data.observations).means,
        lambda data, critics: GaussianMixture(3, covariance="tied").fit(data.observations).means,
        lambda data, critics: MixtureClusterer(3, covariance="diag")(data.observations, None),
    ],
)
def test_what_is_measured_is_the_same(
    measure: Callable[[Transitions, Critics], torch.Tensor], make_transitions: MakeTransitions, critics: Critics
) -> None:
    data = make_transitions(60)
    expected = measure(data, critics)
    with torch.device("meta"):
        found = measure(data, critics)
    assert torch.equal(found, expected)


def test_estimators_of_scikit_learn_give_the_same(make_transitions: MakeTransitions) -> None:
    from sklearn.cluster import KMeans
    from sklearn.mixture import BayesianGaussianMixture

    data = make_transitions(60)
    for estimator in (KMeans(2, random_state=0, n_init=1), BayesianGaussianMixture(n_components=2, random_state=0)):
        expected = SklearnClusterer(estimator)(data.observations, None)
        with torch.device("meta"):
            assert torch.equal(SklearnClusterer(estimator)(data.observations, None), expected)
