"""The same answers on a GPU as on the processor; skipped where there is none."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from c4buffer import (
    ClusteredReplayBuffer,
    CovariancePenalty,
    Critics,
    FaissClusterer,
    GaussianMixture,
    MixtureClusterer,
    ReducedClusterer,
    TemperatureController,
    Transitions,
    VEnsemble,
    decompose_cross_covariance,
    expectile_value_loss,
    stacked_features,
    stacked_gradients,
)
from c4buffer.clustering import ranks_of_means

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Q(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        self.last = nn.Linear(32, 1)

    def features(self, observations: Tensor, actions: Tensor) -> Tensor:
        return self.hidden(torch.cat([observations, actions], dim=1))

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        return self.last(self.features(observations, actions))


def critics_on(device: str) -> Critics:
    torch.manual_seed(0)
    networks = [Q().double() for _ in range(4)]
    return Critics([q.to(device) for q in networks[:2]], [q.to(device) for q in networks[2:]])


def transitions(rows: int = 3000) -> Transitions:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    terminals = (torch.rand(rows, generator=generator) < 0.05).double()
    return Transitions(
        observations=normal(rows, 6),
        actions=normal(rows, 2),
        rewards=normal(rows),
        next_observations=normal(rows, 6),
        terminals=terminals,
    )


def blobs(rows: int = 3000, columns: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    centres = 6 * torch.randn(3, columns, generator=generator, dtype=torch.float64)
    return centres[torch.arange(rows) % 3] + torch.randn(rows, columns, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("embed", [stacked_gradients, stacked_features])
def test_embeddings(embed: Any) -> None:
    expected = embed(critics_on("cpu"), transitions())
    found = embed(critics_on("cuda"), transitions().to("cuda"))
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), expected)


@pytest.mark.parametrize("covariance", ["full", "diag", "tied"])
@pytest.mark.parametrize("columns", [12, 150])
def test_mixtures(covariance: Any, columns: int) -> None:
    X = blobs(columns=columns)
    mixture = GaussianMixture(3, covariance=covariance)
    expected, found = mixture.fit(X), mixture.fit(X.cuda())
    assert found.responsibilities.is_cuda
    for name in ("weights", "means", "covariances", "responsibilities"):
        torch.testing.assert_close(getattr(found, name).cpu(), getattr(expected, name), rtol=1e-8, atol=1e-8)
    assert found.log_likelihood == pytest.approx(expected.log_likelihood)
    warm = mixture.fit(X.cuda(), initial=found)
    assert warm.log_likelihood >= found.log_likelihood - 1e-9


def test_float32_far_from_zero() -> None:
    X = (blobs(columns=40) + 1e4).float()
    expected = GaussianMixture(3).fit(X.double())
    found = GaussianMixture(3).fit(X.cuda())
    torch.testing.assert_close(found.responsibilities.cpu().double(), expected.responsibilities, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "clusterer",
    [
        lambda: MixtureClusterer(3),
        lambda: MixtureClusterer("auto", max_clusters=4),
        lambda: ReducedClusterer(MixtureClusterer(3), max_dim=5),
        lambda: ReducedClusterer(MixtureClusterer(3), max_dim=5, reduction="pca"),
        lambda: FaissClusterer(3),
    ],
)
def test_clusterers(clusterer: Any) -> None:
    X = blobs()
    expected, found = clusterer()(X, None), clusterer()(X.cuda(), None)
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=1e-6)


def test_ranks_and_decomposition() -> None:
    X = blobs()
    r = MixtureClusterer(3)(X)
    assert torch.equal(ranks_of_means(X.cuda(), r.cuda()).cpu(), ranks_of_means(X, r))
    pair = X.chunk(2, dim=1)
    expected = decompose_cross_covariance(pair[0], pair[1], r)
    found = decompose_cross_covariance(pair[0].cuda(), pair[1].cuda(), r.cuda())
    for part, other in zip(found, expected):
        torch.testing.assert_close(part.cpu(), other)


@pytest.mark.parametrize("scale", ["raw", "relative", "correlation"])
def test_penalties(scale: Any) -> None:
    gradients = []
    for device in ("cpu", "cuda"):
        critics = critics_on(device)
        CovariancePenalty(0.1, scale=scale)(critics, transitions(256).to(device)).backward()
        gradients.append([p.grad.cpu() for q in critics.critic for p in q.parameters() if p.grad is not None])
    for found, expected in zip(*reversed(gradients)):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("storage", "prefetch"), [("memory", 0), ("pinned", 0), ("pinned", 2), ("device", 2)])
def test_batches_come_the_same_by_any_way(storage: Any, prefetch: int) -> None:
    expected = ClusteredReplayBuffer.from_transitions(transitions(), seed=0)
    buffer = ClusteredReplayBuffer.from_transitions(transitions(), device="cuda", storage=storage, seed=0)
    total = torch.zeros((), device="cuda")
    for batch in buffer.batches(256, steps=20, prefetch=prefetch):
        other = expected.sample(256)
        for (name, found), (_, value) in zip(batch.columns(), other.columns()):
            assert found.is_cuda, name
            assert torch.equal(found.cpu(), value), name
        total += batch.rewards.sum()  # work of the caller's stream on memory that was filled on another
    assert bool(total.isfinite())


@pytest.mark.parametrize("storage", ["memory", "pinned", "device"])
def test_a_buffer_that_grows_between_batches_drawn_ahead_gives_what_a_whole_one_gives(storage: Any) -> None:
    found = []
    for growing in (True, False):
        buffer = ClusteredReplayBuffer(6000, device="cuda", storage=storage, growing=growing, seed=0)
        buffer.extend(transitions(900))
        batches = buffer.batches(256, prefetch=2)
        found.append([])
        for _ in range(20):
            found[-1].append(next(batches))
            buffer.extend(transitions(300))
        assert len(buffer) == 6000
    for one, other in zip(*found):
        assert torch.equal(one.indices, other.indices)
        for (name, first), (_, second) in zip(one.columns(), other.columns()):
            assert torch.equal(first, second), name


@pytest.mark.parametrize("storage", ["memory", "device"])
def test_buffers(storage: Any) -> None:
    batches = []
    for device in ("cpu", "cuda"):
        buffer = ClusteredReplayBuffer.from_transitions(transitions(), device=device, storage=storage, seed=0)
        buffer.attach(critics_on(device))
        batches.append([buffer.sample(256) for _ in range(5)])
        assert batches[-1][0].observations.device.type == device
    for expected, found in zip(*batches):
        assert torch.equal(found.indices.cpu(), expected.indices)
        assert found.cluster == expected.cluster
        assert torch.equal(found.observations.cpu(), expected.observations)


@pytest.mark.parametrize("width", [16, 256])
def test_v_ensembles_and_temperatures(width: int) -> None:
    torch.manual_seed(0)
    ensemble = VEnsemble(6, n_members=4, hidden=(width, width)).double()
    observations, q = torch.randn(50, 6, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    found = []
    for device in ("cpu", "cuda"):
        ensemble = ensemble.to(device)
        ensemble.zero_grad()
        values = ensemble(observations.to(device))
        expectile_value_loss(q.to(device), values, tau=0.9).backward()
        controller = TemperatureController(-1.0, learning_rate=0.1).to(device)
        controller.step(values[0].detach())
        parts = [values.detach(), controller.beta.detach(), *(each.grad for each in ensemble.parameters())]
        found.append([part.cpu() for part in parts if part is not None])
    for expected, ours in zip(*found):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)


class _Spaces(gymnasium.Env[Any, Any]):
    def __init__(self, observations: int, actions: int) -> None:
        self.observation_space = gymnasium.spaces.Box(-10, 10, (observations,), dtype=np.float32)
        self.action_space = gymnasium.spaces.Box(-1, 1, (actions,), dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return np.zeros(self.observation_space.shape, np.float32), {}


def test_active_of_stable_baselines3_trains_offline_on_a_gpu() -> None:
    pytest.importorskip("stable_baselines3")
    from c4buffer.integrations.sb3 import ACTIVE, learn_offline

    data = transitions(300)
    data = data.replace(actions=data.actions.clamp(-1, 1))
    environment = _Spaces(6, 2)
    model = ACTIVE("MlpPolicy", environment, device="cuda", buffer_size=300, batch_size=32, seed=0)
    learn_offline(model, data, 20)
    assert model.actor.spread.device.type == "cuda"
    assert np.isfinite(model.likelihood_target)
    assert environment.action_space.contains(model.predict(np.zeros(6, np.float32))[0])


@pytest.mark.parametrize(
    "algorithm", ["TD3PlusBCConfig", "IQLConfig", "ACTIVEConfig", "DQNConfig", "DiscreteSACConfig"]
)
def test_captured_graphs_train_as_eager_code_does(algorithm: str) -> None:
    d3rlpy = pytest.importorskip("d3rlpy")
    from c4buffer.integrations.d3rlpy import ACTIVEConfig, C4Config, graphs

    discrete = algorithm.startswith("D")
    generator = np.random.default_rng(0)
    dataset = d3rlpy.dataset.MDPDataset(
        observations=generator.normal(size=(400, 3)).astype(np.float32),
        actions=np.arange(400) % 4 if discrete else generator.uniform(-1, 1, size=(400, 2)).astype(np.float32),
        rewards=generator.normal(size=400).astype(np.float32),
        terminals=np.arange(400) % 20 == 19,
    )
    ends = []
    for compiled in (False, True):
        d3rlpy.seed(0)
        fields = {"batch_size": 32, "compile_graph": compiled}
        if algorithm == "TD3PlusBCConfig":
            fields["target_smoothing_sigma"] = 0.0
        if algorithm == "ACTIVEConfig":
            fields |= {"q_weight": 0.0, "likelihood_target": -3.0}  # without noise
        base = ACTIVEConfig(**fields) if algorithm == "ACTIVEConfig" else getattr(d3rlpy.algos, algorithm)(**fields)
        algo = C4Config(base=base, n_clusters=2, penalty_every=2, refresh_interval=10, seed=0).create("cuda:0")
        quiet = {"show_progress": False, "logger_adapter": d3rlpy.logging.NoopAdapterFactory()}
        results = algo.fit(dataset, n_steps=30, n_steps_per_epoch=30, **quiet)
        assert results[0][1]["c4_penalty"] > 0
        held = [getattr(algo.impl, name, None) for name in graphs.CAPTURED]
        assert any(isinstance(graph, graphs.TwoGraphs) for graph in held) == compiled
        ends.append([parameter.detach().clone() for parameter in algo.impl.q_function.parameters()])
    for one, other in zip(*ends):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)
