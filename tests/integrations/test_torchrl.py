"""The sampler inside TorchRL's replay buffers: which rows it draws, what it clusters, what of the losses it reads."""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from c4buffer.integrations.torchrl import ClusterSampler, Keys, critics_of, tensordict_of, transitions_of
from c4buffer.integrations.torchrl.rows import DEFAULT_KEYS, stored
from c4buffer.integrations.torchrl.sampler import parameters_of
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import Tensor, nn
from torchrl import objectives
from torchrl.data import (
    Bounded,
    LazyMemmapStorage,
    LazyTensorStorage,
    ListStorage,
    OneHot,
    ReplayBuffer,
    TensorDictMaxValueWriter,
    TensorDictReplayBuffer,
)
from torchrl.envs.transforms import MultiStepTransform
from torchrl.modules import (
    Actor,
    DistributionalQValueActor,
    OneHotCategorical,
    ProbabilisticActor,
    QValueActor,
    TanhNormal,
    ValueOperator,
)

from c4buffer import (
    CovariancePenalty,
    Critics,
    Every,
    MixtureClusterer,
    OnDrift,
    Transitions,
    diagnose,
    stacked_gradients,
)
from c4buffer.critics import member_values, members_of

# a warning of TorchRL's losses: nothing is trained here, so that no target needs updates
pytestmark = pytest.mark.filterwarnings("ignore:No target network updater")

BOUNDS = Bounded(-1, 1, shape=(2,))
QUANTILES = 7


def steps(*shape: int, seed: int = 0, episode: int = 10) -> TensorDict:
    """Rows [..., T] of episodes of ten steps, by turns terminal and not; each row starts where the last one ended."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(*shape[:-1], shape[-1] + 1, 3, generator=generator)
    done = (torch.arange(shape[-1]) % episode == episode - 1).expand(shape)
    terminated = done & (torch.arange(shape[-1]) % (2 * episode) == episode - 1)
    return TensorDict(
        {
            "observation": states[..., :-1, :],
            "action": torch.rand(*shape, 2, generator=generator) * 2 - 1,
            "next": {
                "observation": states[..., 1:, :],
                "reward": torch.randn(*shape, 1, generator=generator),
                "terminated": terminated.unsqueeze(-1),
                "done": done.unsqueeze(-1),
            },
        },
        batch_size=shape,
    )


class QNetwork(nn.Module):
    """Q(s, a), [B, 1]."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, outputs))

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        value: Tensor = self.layers(torch.cat([observation, action], dim=-1))
        return value


def q_value(*, outputs: int = 1) -> ValueOperator:
    return ValueOperator(QNetwork(outputs), in_keys=["observation", "action"])


def value() -> ValueOperator:
    return ValueOperator(nn.Linear(3, 1), in_keys=["observation"])


def actor() -> Actor:
    return Actor(nn.Sequential(nn.Linear(3, 2), nn.Tanh()), spec=BOUNDS)


def stochastic_actor() -> ProbabilisticActor:
    network = nn.Sequential(nn.Linear(3, 4), NormalParamExtractor())
    parameters = TensorDictModule(network, in_keys=["observation"], out_keys=["loc", "scale"])
    return ProbabilisticActor(parameters, spec=BOUNDS, in_keys=["loc", "scale"], distribution_class=TanhNormal)


def discrete_actor() -> ProbabilisticActor:
    logits = TensorDictModule(nn.Linear(3, 4), in_keys=["observation"], out_keys=["logits"])
    return ProbabilisticActor(logits, spec=OneHot(4), in_keys=["logits"], distribution_class=OneHotCategorical)


def action_values(key: str = "action_value") -> TensorDictModule:
    return TensorDictModule(
        nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)), in_keys=["observation"], out_keys=[key]
    )


def q_actor() -> QValueActor:
    return QValueActor(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)), spec=OneHot(4))


CONTINUOUS: dict[str, Callable[[], Any]] = {
    "TD3": lambda: objectives.TD3Loss(actor(), q_value(), bounds=(-1, 1)),
    "TD3BC": lambda: objectives.TD3BCLoss(actor(), q_value(), bounds=(-1, 1)),
    "DDPG": lambda: objectives.DDPGLoss(actor(), q_value()),
    "SAC": lambda: objectives.SACLoss(stochastic_actor(), q_value()),
    "SAC with V": lambda: objectives.SACLoss(stochastic_actor(), q_value(), value()),
    "REDQ": lambda: objectives.REDQLoss(stochastic_actor(), q_value()),
    "CQL": lambda: objectives.CQLLoss(stochastic_actor(), q_value()),
    "IQL": lambda: objectives.IQLLoss(stochastic_actor(), q_value(), value()),
    "CrossQ": lambda: objectives.CrossQLoss(stochastic_actor(), q_value()),
    "TQC": lambda: objectives.TQCLoss(stochastic_actor(), q_value(outputs=QUANTILES)),
}
DISCRETE: dict[str, Callable[[], Any]] = {
    "DQN": lambda: objectives.DQNLoss(q_actor(), action_space="one-hot"),
    "double DQN": lambda: objectives.DQNLoss(q_actor(), action_space="one-hot", double_dqn=True),
    "CQL": lambda: objectives.DiscreteCQLLoss(q_actor(), action_space="one-hot"),
    "SAC": lambda: objectives.DiscreteSACLoss(discrete_actor(), action_values(), action_space="one-hot", num_actions=4),
    "IQL": lambda: objectives.DiscreteIQLLoss(
        discrete_actor(), action_values("state_action_value"), value(), action_space="one-hot"
    ),
}


def discrete_steps(rows: int) -> TensorDict:
    data = steps(rows)
    places = torch.randint(4, (rows,), generator=torch.Generator().manual_seed(0))
    return data.set("action", nn.functional.one_hot(places, 4))


def filled(sampler: ClusterSampler, rows: int = 200, **options: Any) -> TensorDictReplayBuffer:
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(rows), sampler=sampler, **{"batch_size": 32, **options})
    buffer.extend(steps(rows))
    return buffer


@pytest.fixture
def critics() -> Critics:
    torch.manual_seed(0)
    return critics_of(CONTINUOUS["TD3"]())


# Batches


def test_the_contracts_program() -> None:
    sampler = ClusterSampler(n_clusters=3)
    buffer = ReplayBuffer(storage=LazyTensorStorage(100), sampler=sampler)
    buffer.extend(steps(100))
    sampler.attach(critics_of(CONTINUOUS["TD3"]()))
    batch, info = buffer.sample(16, return_info=True)
    assert batch.batch_size == (16,)
    assert info["cluster"].unique().tolist() in ([0], [1], [2])


def test_before_critics_batches_are_uniform_and_after_them_of_one_cluster(critics: Critics) -> None:
    sampler = ClusterSampler(3, seed=0)
    buffer = filled(sampler)
    assert buffer.sample()["cluster"].tolist() == [-1] * 32
    sampler.attach(critics)
    r = None
    for _ in range(50):
        batch = buffer.sample()
        r = sampler.responsibilities if r is None else r
        (cluster,) = batch["cluster"].unique().tolist()
        assert (r[batch["index"], cluster] > 0).all()
    assert sampler.last_report is not None
    assert sampler.probabilities.sum() == pytest.approx(1)


def test_what_is_clustered_are_the_gradients_of_all_that_is_stored(critics: Critics) -> None:
    sampler = ClusterSampler(3, seed=5)
    buffer = filled(sampler)
    sampler.attach(critics)
    buffer.sample()
    target_g, g = stacked_gradients(critics, transitions_of(steps(200))).double().chunk(2, dim=1)
    covariance = (target_g - target_g.mean(dim=0)).T @ (g - g.mean(dim=0)) / 200
    report = sampler.last_report
    assert report is not None
    assert report.total == pytest.approx(float(covariance.norm()), rel=1e-4)
    assert sum(report.sizes) == pytest.approx(200)


def test_over_batches_every_row_is_equally_likely(critics: Critics) -> None:
    sampler = ClusterSampler(3, refresh=Every(10**9), seed=0)
    buffer = filled(sampler, rows=50, batch_size=20)
    sampler.attach(critics)
    counts = torch.zeros(50)
    for _ in range(4000):
        counts += torch.bincount(buffer.sample()["index"], minlength=50)
    # rows of a batch share its cluster: the counts of a row vary with z as well
    assert counts.std() / counts.mean() < 0.1
    assert abs(counts - 1600).max() < 300


@pytest.mark.parametrize("storage", [LazyTensorStorage, LazyMemmapStorage, ListStorage])
def test_every_storage_is_read(critics: Critics, storage: Any, tmp_path: Path) -> None:
    sampler = ClusterSampler(2, seed=0)
    buffer = TensorDictReplayBuffer(storage=storage(60), sampler=sampler, batch_size=8)
    buffer.extend(steps(60))
    sampler.attach(critics)
    batch = buffer.sample()
    assert batch["cluster"].min() >= 0
    rows = transitions_of(batch)
    assert torch.equal(rows.observations, steps(60)["observation"][batch["index"]])


def test_several_axes_are_rows_in_the_order_of_time(critics: Critics) -> None:
    seen: list[Transitions] = []

    def embedding(critics: Critics, rows: Transitions) -> Tensor:
        seen.append(rows)
        return stacked_gradients(critics, rows)

    data = steps(4, 20)  # four environments
    sampler = ClusterSampler(2, embedding=embedding, seed=0)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(80, ndim=2), sampler=sampler, batch_size=8)
    buffer.extend(data)
    sampler.attach(critics)
    batch = buffer.sample()
    assert len(sampler) == 80
    assert batch["index"].shape == (8, 2)
    t, e = batch["index"].unbind(1)
    assert torch.equal(batch["observation"], data["observation"][e, t])
    (rows,) = seen
    flat = data.transpose(0, 1).reshape(-1)
    assert torch.equal(rows.observations, flat["observation"])
    done = flat["next", "done"].squeeze(1)
    expected = (~done).float()
    expected[-4:] = 0  # nothing is stored after the newest step
    assert torch.equal(rows.has_next_actions, expected)
    linked = rows.has_next_actions == 1
    assert torch.equal(rows.next_actions[linked], flat["action"][4:][linked[:-4]])


def test_without_replacement_clusters_are_walked(critics: Critics) -> None:
    sampler = ClusterSampler(2, replacement=False, refresh=Every(10**9), seed=0)
    assert isinstance(sampler, ClusterSampler)
    buffer = filled(sampler, rows=200, batch_size=10)
    sampler.attach(critics)
    for _ in range(20):
        assert len(buffer.sample()["index"].unique()) == 10


@pytest.mark.parametrize("refresh", [Every(2), OnDrift(1e-9, check_every=1)])
def test_prefetched_batches_are_of_one_cluster_too_and_clustering_is_left_to_the_loop(
    refresh: Any, critics: Critics
) -> None:
    sampler = ClusterSampler(3, refresh=refresh, seed=0)
    buffer = filled(sampler, prefetch=2)
    sampler.attach(critics)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        buffer.sample()  # TorchRL draws the first where it is asked for
        report = sampler.last_report
        assert report is not None
        state = torch.get_rng_state()
        assert all(len(buffer.sample()["cluster"].unique()) == 1 for _ in range(20))
    assert sum("in another thread" in str(each.message) for each in caught) == 1
    assert sampler.last_report is report
    assert torch.equal(torch.get_rng_state(), state)
    sampler.refresh()
    assert sampler.last_report is not report
    assert all(len(buffer.sample()["cluster"].unique()) == 1 for _ in range(20))


# Following the storage


def test_rows_that_come_or_are_overwritten_belong_to_each_cluster_in_its_share(critics: Critics) -> None:
    sampler = ClusterSampler(2, refresh=Every(10**9), seed=0)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100), sampler=sampler, batch_size=8)
    buffer.extend(steps(60))
    sampler.attach(critics)
    buffer.sample()
    assert len(sampler) == 60
    known = sampler.responsibilities.clone()
    buffer.extend(steps(50, seed=1))  # 40 new, 10 over the oldest
    buffer.add(steps(1, seed=2)[0])
    buffer.sample()
    assert len(sampler) == 100
    r, p = sampler.responsibilities, sampler.probabilities
    for rows in (range(60, 100), range(11)):
        torch.testing.assert_close(r[list(rows)].double(), p.expand(len(rows), -1))
    torch.testing.assert_close(r[11:60], known[11:60])


def test_overwritten_rows_of_several_axes(critics: Critics) -> None:
    sampler = ClusterSampler(2, refresh=Every(10**9), seed=0)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(40, ndim=2), sampler=sampler, batch_size=8)
    buffer.extend(steps(4, 10))
    sampler.attach(critics)
    buffer.sample()
    known = sampler.responsibilities.clone()
    buffer.extend(steps(4, 3, seed=1))
    r, p = sampler.responsibilities, sampler.probabilities
    torch.testing.assert_close(r[:12].double(), p.expand(12, -1))
    torch.testing.assert_close(r[12:], known[12:])


@pytest.mark.parametrize("refresh", [None, OnDrift(1.0, check_every=1)])
def test_an_emptied_buffer_begins_anew(refresh: Any, critics: Critics) -> None:
    sampler = ClusterSampler(2, refresh=refresh, seed=0)
    buffer = filled(sampler)
    sampler.attach(critics)
    buffer.sample()
    buffer.empty()
    assert not sampler.clustered
    ClusterSampler(2, refresh=refresh, seed=1).load_state_dict(sampler.state_dict())
    buffer.extend(steps(50, seed=1))
    assert buffer.sample()["cluster"].min() >= 0
    assert len(sampler) == 50


@pytest.mark.parametrize("refresh", [None, OnDrift(1.0, check_every=1)])
def test_a_smaller_storage_is_a_new_beginning(refresh: Any, critics: Critics) -> None:
    sampler = ClusterSampler(2, refresh=refresh, seed=0)
    sampler.attach(critics)
    for rows in (200, 50):
        buffer = filled(sampler, rows=rows)
        for _ in range(3):
            assert buffer.sample()["cluster"].min() >= 0
        assert len(sampler) == rows


@pytest.mark.parametrize("replacement", [True, False])
def test_acting_loops_under_inference_mode_leave_it_usable(replacement: bool, critics: Critics) -> None:
    sampler = ClusterSampler(2, replacement=replacement, seed=0)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100), sampler=sampler, batch_size=8)
    buffer.extend(steps(60))
    sampler.attach(critics)
    with torch.inference_mode():
        assert buffer.sample()["cluster"].min() >= 0  # clustered here
        buffer.extend(steps(20, seed=1))
        buffer.sample()
        state = sampler.state_dict()
        sampler.load_state_dict(state)
    buffer.extend(steps(60, seed=2))
    assert buffer.sample()["cluster"].min() >= 0
    assert not sampler.responsibilities.is_inference()


def test_data_that_were_there_before_the_sampler(critics: Critics) -> None:
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(50), batch_size=8)
    buffer.extend(steps(50))
    sampler = ClusterSampler(2, seed=0)
    buffer.set_sampler(sampler)
    sampler.attach(critics)
    assert buffer.sample()["cluster"].min() >= 0


def test_an_empty_buffer_says_so() -> None:
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(50), sampler=ClusterSampler(), batch_size=8)
    with pytest.raises((ValueError, RuntimeError), match="empty"):
        buffer.sample()


def test_refreshes_are_due_by_the_policy(critics: Critics) -> None:
    sampler = ClusterSampler(2, refresh=Every(4), seed=0)
    buffer = filled(sampler)
    sampler.attach(critics)
    reports = []
    for _ in range(9):
        buffer.sample()
        reports.append(sampler.last_report)
    assert [a is b for a, b in itertools.pairwise(reports)] == [True, True, True, False, True, True, True, False]


def test_on_drift_refreshes_when_the_critics_moved(critics: Critics) -> None:
    sampler = ClusterSampler(2, refresh=OnDrift(1.0, check_every=1, probe_size=64), seed=0)
    buffer = filled(sampler)
    sampler.attach(critics)
    buffer.sample()
    report = sampler.last_report
    buffer.sample()
    buffer.sample()
    assert sampler.last_report is report
    with torch.no_grad():
        for member in critics.critic:
            for parameter in member.parameters.values(True, True):
                parameter.mul_(3)
    buffer.sample()
    assert sampler.last_report is not report


def test_a_transform_of_the_batches_is_clustered_through(critics: Critics) -> None:
    from torchrl.envs import ObservationNorm

    norm = ObservationNorm(loc=1.0, scale=2.0, in_keys=["observation", ("next", "observation")])
    seen: list[Transitions] = []

    def embedding(critics: Critics, rows: Transitions) -> Tensor:
        seen.append(rows)
        return stacked_gradients(critics, rows)

    sampler = ClusterSampler(2, embedding=embedding, seed=0)
    buffer = filled(sampler, transform=norm)
    stored = steps(200)["observation"]
    sampler.attach(critics, transform=buffer.transform)
    batch = buffer.sample()
    torch.testing.assert_close(seen[0].observations[batch["index"]], batch["observation"])
    assert not torch.equal(seen[0].observations, stored)
    assert torch.equal(buffer.storage[:]["observation"], stored)
    assert seen[0].has_next_actions.sum() == 180


# Checkpoints


def test_a_state_goes_on_batch_for_batch(critics: Critics) -> None:
    sampler = ClusterSampler(3, seed=0)
    buffer = filled(sampler)
    sampler.attach(critics)
    for _ in range(3):
        buffer.sample()
    state = sampler.state_dict()
    expected = [buffer.sample()["index"].tolist() for _ in range(5)]
    other_sampler = ClusterSampler(3, seed=1)
    other = filled(other_sampler)
    other_sampler.load_state_dict(state)
    other_sampler.attach(critics)
    assert [other.sample()["index"].tolist() for _ in range(5)] == expected
    assert other_sampler.last_report == sampler.last_report


def test_a_state_goes_on_with_the_probe_of_on_drift(critics: Critics) -> None:
    def drifting(seed: int) -> tuple[ClusterSampler, TensorDictReplayBuffer]:
        sampler = ClusterSampler(2, refresh=OnDrift(1.0, check_every=1, probe_size=64, seed=seed), seed=0)
        return sampler, filled(sampler)

    sampler, buffer = drifting(seed=0)
    sampler.attach(critics)
    buffer.sample()
    state = sampler.state_dict()
    with torch.no_grad():
        for member in critics.critic:
            for parameter in member.parameters.values(True, True):
                parameter.mul_(3)
    other_sampler, other = drifting(seed=1)
    other_sampler.load_state_dict(state)
    other_sampler.attach(critics)
    buffer.sample()
    other.sample()  # what the critics were at the last refresh is in the state alone
    for one in (sampler, other_sampler):
        assert one.last_report is not None
        assert one.last_report.seconds != state["report"]["seconds"]
    assert torch.equal(sampler.probabilities, other_sampler.probabilities)


def test_the_buffers_files_hold_the_sampler(critics: Critics, tmp_path: Path) -> None:
    sampler = ClusterSampler(3, seed=0)
    buffer = filled(sampler)
    sampler.attach(critics)
    buffer.sample()
    buffer.dumps(tmp_path)
    expected = [buffer.sample()["index"].tolist() for _ in range(3)]
    other_sampler = ClusterSampler(3, seed=1)
    other = filled(other_sampler)
    other.loads(tmp_path)
    other_sampler.attach(critics)
    assert [other.sample()["index"].tolist() for _ in range(3)] == expected
    file = next(tmp_path.rglob("cluster_sampler.safetensors"))
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match="path"):
        other_sampler.loads(file.parent)


@pytest.mark.parametrize("axes", [1, 2])
def test_rows_overwritten_between_loading_and_the_first_batch_lose_their_clusters(critics: Critics, axes: int) -> None:
    def made() -> tuple[ClusterSampler, TensorDictReplayBuffer]:
        sampler = ClusterSampler(2, refresh=lambda step, sampler: not sampler.clustered, seed=0)
        buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(40, ndim=axes), sampler=sampler, batch_size=8)
        buffer.extend(steps(40) if axes == 1 else steps(4, 10))
        return sampler, buffer

    sampler, buffer = made()
    sampler.attach(critics)
    buffer.sample()
    loaded, other = made()
    loaded.load_state_dict(sampler.state_dict())
    other.extend(steps(12, seed=1) if axes == 1 else steps(4, 3, seed=1))
    strangers = (loaded.responsibilities != sampler.responsibilities).any(dim=1)
    assert int(strangers.sum()) == 12
    assert axes == 2 or bool(strangers[:12].all())
    torch.testing.assert_close(loaded.responsibilities[strangers].double(), loaded.probabilities.expand(12, -1))


def test_a_writer_that_keeps_the_best_rows(critics: Critics) -> None:
    sampler = ClusterSampler(2, seed=0)
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(50), sampler=sampler, writer=TensorDictMaxValueWriter(rank_key="rank"), batch_size=8
    )
    rows = steps(50)
    rows["rank"] = torch.arange(50.0)
    buffer.extend(rows)
    sampler.attach(critics)
    buffer.sample()
    r = sampler.responsibilities
    worse = steps(3)
    worse["rank"] = torch.full((3,), -1.0)
    buffer.extend(worse)
    buffer.add(worse[0])
    assert torch.equal(sampler.responsibilities, r)


@pytest.mark.parametrize("written", [slice(3, 9), [3, 4, 5, 6, 7, 8], torch.arange(3, 9)])
def test_rows_that_another_buffer_wrote_lose_their_cluster(written: Any, critics: Critics) -> None:
    sampler = ClusterSampler(2, seed=0)
    buffer = filled(sampler)
    sampler.attach(critics)
    buffer.sample()
    buffer.mark_update(written)
    p = sampler.probabilities
    torch.testing.assert_close(sampler.responsibilities[3:9].double(), p.expand(6, 2), rtol=1e-6, atol=1e-6)
    buffer.mark_update(...)  # nobody can tell which
    assert not sampler.clustered


@pytest.mark.parametrize("replacement", [True, False])
def test_after_set_rng_the_same_batches_come_again(replacement: bool, critics: Critics) -> None:
    sampler = ClusterSampler(2, refresh=Every(10**9), replacement=replacement, seed=0)
    buffer = filled(sampler)
    sampler.attach(critics)
    buffer.sample()
    drawn = []
    for _ in range(2):
        buffer.set_rng(torch.Generator().manual_seed(7))
        drawn.append([buffer.sample()["index"].tolist() for _ in range(5)])
    assert drawn[0] == drawn[1]


def test_k_by_bic(critics: Critics) -> None:
    sampler = ClusterSampler("auto", seed=0)
    buffer = filled(sampler)
    sampler.attach(critics)
    buffer.sample()
    assert 1 <= len(sampler.probabilities) <= 200
    with pytest.raises(ValueError, match="n_clusters: expected an integer of at least 1, got 'some'"):
        ClusterSampler("some")  # type: ignore[arg-type]


def test_a_clusterer_of_ones_own_takes_as_few_rows_as_it_likes(critics: Critics) -> None:
    sampler = ClusterSampler(clusterer=lambda y, previous: torch.ones(len(y), 1), seed=0)
    buffer = filled(sampler, rows=2, batch_size=4)
    sampler.attach(critics)
    assert buffer.sample()["cluster"].tolist() == [0] * 4
    few = ClusterSampler(3, seed=0)
    buffer = filled(few, rows=2, batch_size=4)
    few.attach(critics)
    with pytest.warns(UserWarning, match="3 components for 2 distinct rows"):
        buffer.sample()


def test_a_foreign_state_changes_nothing(critics: Critics) -> None:
    sampler = ClusterSampler(3, seed=0)
    buffer = filled(sampler)
    sampler.attach(critics)
    buffer.sample()
    before = sampler.state_dict()
    with pytest.raises(ValueError, match="state_dict"):
        sampler.load_state_dict({"rows": {}})
    hard = ClusterSampler(3, assignment="hard")
    with pytest.raises(ValueError, match="assignment"):
        sampler.load_state_dict(hard.state_dict())
    for name, other in {
        "n_clusters": ClusterSampler(5),
        "max_dim": ClusterSampler(3, max_dim=4),
        "embedding": ClusterSampler(3, embedding=lambda critics, batch: batch.actions),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}: expected .*, as in the state, got"):
            sampler.load_state_dict(other.state_dict())
    expected = [buffer.sample()["index"].tolist() for _ in range(3)]
    sampler.load_state_dict(before)
    assert [buffer.sample()["index"].tolist() for _ in range(3)] == expected


def test_pickled_it_holds_no_networks(critics: Critics) -> None:
    sampler = ClusterSampler(3, seed=0)
    buffer = filled(sampler)
    sampler.attach(critics)
    buffer.sample()
    copy = pickle.loads(pickle.dumps(sampler))
    assert copy._critics is None
    assert torch.equal(copy.responsibilities, sampler.responsibilities)


def test_the_buffers_generator_sets_the_samplers(critics: Critics) -> None:
    def drawn(seed: int) -> list[int]:
        sampler = ClusterSampler(3)  # with torch's initial seed
        buffer = filled(sampler)
        buffer.set_rng(torch.Generator().manual_seed(seed))
        sampler.attach(critics)
        found: list[int] = buffer.sample()["index"].tolist()
        return found

    assert drawn(1) == drawn(1) != drawn(2)


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("way", ["state_dict", "dumps", "pickle"])
def test_with_the_buffers_generator_a_loaded_one_goes_on(
    way: str, replacement: bool, critics: Critics, tmp_path: Path
) -> None:
    def made(seed: int) -> TensorDictReplayBuffer:
        sampler = ClusterSampler(2, refresh=Every(20), replacement=replacement)
        buffer = filled(sampler, generator=torch.Generator().manual_seed(seed))
        sampler.attach(critics)
        return buffer

    buffer = made(1)
    for _ in range(30):
        buffer.sample()
    if way == "state_dict":
        state, other = buffer.state_dict(), made(2)
        other.load_state_dict(state)
    elif way == "dumps":
        buffer.dumps(tmp_path)
        other = made(2)
        other.loads(tmp_path)
    else:
        other = pickle.loads(pickle.dumps(buffer))
        other.sampler.attach(critics)
    expected = [buffer.sample()["index"].tolist() for _ in range(40)]  # a refresh among them
    assert [other.sample()["index"].tolist() for _ in range(40)] == expected


def test_a_generator_that_was_seeded_again_and_given_again_gives_the_same_batches(critics: Critics) -> None:
    generator, drawn = torch.Generator(), []
    sampler = ClusterSampler(2, refresh=Every(10**9), seed=0)
    buffer = filled(sampler)
    sampler.attach(critics)
    buffer.sample()
    for _ in range(2):
        buffer.set_rng(generator.manual_seed(7))
        drawn.append([buffer.sample()["index"].tolist() for _ in range(5)])
    assert drawn[0] == drawn[1]


def test_samplers_of_one_generator_draw_different_batches(critics: Critics) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (filled(ClusterSampler(2), generator=generator) for _ in range(2))
    assert first.sample()["index"].tolist() != second.sample()["index"].tolist()


def test_a_clusterer_of_ones_own_keeps_its_generator(critics: Critics) -> None:
    own, given = (torch.Generator().manual_seed(seed) for seed in (3, 4))
    clusterer = MixtureClusterer(2, generator=own)
    filled(ClusterSampler(2, clusterer=clusterer), generator=given)
    assert clusterer.generator is own
    drawn = ClusterSampler(2)
    filled(drawn, generator=given)
    assert drawn._rows.clusterer.clusterer.generator is drawn._rows.sampler.generator is given


def test_global_generators_are_left_alone(critics: Critics) -> None:
    sampler = ClusterSampler(3, seed=0)
    buffer = filled(sampler)
    sampler.attach(critics)
    state = torch.get_rng_state()
    buffer.sample()
    assert torch.equal(torch.get_rng_state(), state)


# Transitions


def test_a_batch_becomes_transitions() -> None:
    data = steps(40)
    rows = transitions_of(data)
    assert torch.equal(rows.rewards, data["next", "reward"].squeeze(1))
    assert torch.equal(rows.terminals.bool(), data["next", "terminated"].squeeze(1))
    assert torch.equal((rows.terminals + rows.timeouts).bool(), data["next", "done"].squeeze(1))
    assert rows.has_next_actions.sum() == 0  # a batch's rows are no neighbours
    with_actions = transitions_of(data.set(("next", "action"), data["action"].flip(0)))
    assert torch.equal(with_actions.next_actions, data["action"].flip(0))
    assert with_actions.has_next_actions.all()


@pytest.mark.parametrize("form", ["one-hot", "categorical", "column"])
def test_discrete_actions_of_every_form_become_places(form: str) -> None:
    places = torch.randint(4, (40,), generator=torch.Generator().manual_seed(0))
    actions = {"one-hot": nn.functional.one_hot(places, 4), "categorical": places, "column": places.unsqueeze(1)}
    assert torch.equal(transitions_of(steps(40).set("action", actions[form])).actions, places)


def test_keys_name_what_stands_elsewhere() -> None:
    data = steps(40)
    moved = TensorDict(
        {
            "agent": {"state": data["observation"], "move": data["action"]},
            "goal": data["observation"][:, :1],
            "next": {
                "agent": {"state": data["next", "observation"]},
                "goal": data["next", "observation"][:, :1],
                "gain": data["next", "reward"],
                "done": data["next", "done"],
            },
            "steps_to_next_obs": torch.full((40, 1), 3),
        },
        batch_size=[40],
    )
    keys = Keys(observation=[("agent", "state"), "goal"], action=("agent", "move"), reward=("next", "gain"))
    rows = transitions_of(moved, keys)
    assert isinstance(rows.observations, dict)
    assert set(rows.observations) == {"agent.state", "goal"}
    assert torch.equal(rows.terminals.bool(), data["next", "done"].squeeze(1))  # nothing tells ends from timeouts
    assert (rows.intervals == 3).all()


def test_transitions_become_a_tensordict_and_come_back() -> None:
    rows = transitions_of(steps(40))
    there = tensordict_of(rows)
    assert set(there.keys(True, True)) == set(steps(40).keys(True, True))
    for (name, before), (_, after) in zip(rows.columns(), transitions_of(there).columns()):
        assert torch.equal(before, after), name
    complete = rows.replace(
        next_actions=rows.actions.flip(0), has_next_actions=torch.ones(40), intervals=torch.full((40,), 3)
    )
    for (name, before), (_, after) in zip(complete.columns(), transitions_of(tensordict_of(complete)).columns()):
        assert torch.equal(before, after), name
    parts = rows.replace(
        observations={"b": rows.observations, "a": rows.rewards.unsqueeze(1)},
        next_observations={"b": rows.next_observations, "a": rows.rewards.unsqueeze(1)},
    )
    ended = complete.replace(has_next_actions=1 - complete.terminals)
    for (name, before), (_, after) in zip(
        ended.columns(), transitions_of(tensordict_of(ended, next_actions=True)).columns()
    ):
        assert torch.equal(before, after), name
    keys = Keys(observation=["a", "b"])
    back = transitions_of(tensordict_of(parts, keys), keys)
    assert torch.equal(back.next_observations["b"], rows.next_observations)  # type: ignore[call-overload, index]
    with pytest.raises(ValueError, match="keys: expected Keys.* for parts named 'b', 'a', got 'observation'"):
        tensordict_of(parts)


def test_a_batch_of_the_datas_own_next_actions_has_the_penalty_of_these_rows() -> None:
    data = steps(60)
    rows = Transitions(
        observations=data["observation"],
        actions=data["action"],
        rewards=data["next", "reward"],
        next_observations=data["next", "observation"],
        terminals=data["next", "terminated"].float(),
        timeouts=(data["next", "done"] & ~data["next", "terminated"]).float(),
    )
    assert 0 < rows.has_next_actions.sum() < 60
    sampler = ClusterSampler(2, seed=0)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(60), sampler=sampler, batch_size=32)
    buffer.extend(tensordict_of(rows, next_actions=True))
    critics = critics_of(CONTINUOUS["TD3"](), next_action="dataset")
    sampler.attach(critics)
    batch = buffer.sample()
    penalty = CovariancePenalty(1.0, scale="relative")
    torch.testing.assert_close(penalty(critics, transitions_of(batch)), penalty(critics, rows[batch["index"]]))
    held = stored(buffer.storage, torch.arange(60), DEFAULT_KEYS, None)
    assert torch.equal(held.next_actions, rows.next_actions)
    assert torch.equal(held.has_next_actions, rows.has_next_actions)


@pytest.mark.parametrize("kind", ["TD3", "SAC", "CrossQ", "IQL"])
def test_a_refresh_goes_where_a_loss_was_moved_to(kind: str) -> None:
    loss = CONTINUOUS[kind]()
    before = critics_of(loss)
    loss.to(torch.float64)  # as to a GPU: the networks' own parameters stay where they were
    for critics in (before, critics_of(loss)):
        assert next(parameters_of(critics)).dtype == torch.float64


def child_overwrites(buffer: TensorDictReplayBuffer) -> None:
    buffer.extend(steps(10, seed=1))


def test_a_buffer_goes_to_another_process_and_shares_its_storage_alone(critics: Critics) -> None:
    sampler = ClusterSampler(2, seed=0)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(40), sampler=sampler, batch_size=8, shared=True)
    buffer.extend(steps(40))
    sampler.attach(critics)
    buffer.sample()
    before, r = buffer.storage[:]["observation"].clone(), sampler.responsibilities.clone()
    process = multiprocessing.get_context("spawn").Process(target=child_overwrites, args=(buffer,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert not torch.equal(buffer.storage[:]["observation"], before)
    assert torch.equal(sampler.responsibilities, r)
    buffer.sample()


def test_what_lacks_is_named() -> None:
    with pytest.raises(ValueError, match=r"batch: expected the key 'observation' \(see Keys\), got only 'action'"):
        transitions_of(steps(4).exclude("observation"))
    with pytest.raises(ValueError, match=r"batch: expected one axis, \[B\], got \[2, 10\]"):
        transitions_of(steps(2, 10))
    with pytest.raises(ValueError, match=r"batch: expected a tensordict, got dict"):
        transitions_of({})  # type: ignore[arg-type]


# Losses


@pytest.mark.parametrize("name", CONTINUOUS)
def test_the_critics_of_every_continuous_loss(name: str) -> None:
    torch.manual_seed(0)
    loss = CONTINUOUS[name]()
    rows = transitions_of(steps(30))
    critics = critics_of(loss)
    parameters = loss.value_network_params if name == "DDPG" else loss.qvalue_network_params
    members = [parameters] if name == "DDPG" else parameters.unbind(0)
    # Q of each member, and its gradient, by plain autograd on a network that holds its parameters
    x = torch.cat([rows.observations, rows.actions], dim=1).requires_grad_()
    values = []
    for member in members:
        network = QNetwork(QUANTILES if name == "TQC" else 1)
        network.load_state_dict({key.split("module.")[-1]: part for key, part in flat(member).items()})
        values.append(network.layers(x).mean(dim=1))
    (gradient,) = torch.autograd.grad(torch.stack(values).mean(0).sum(), x)
    y = stacked_gradients(critics, rows)
    torch.testing.assert_close(y[:, 5:], gradient, rtol=1e-4, atol=1e-6)
    penalty = CovariancePenalty(0.1, scale="relative")(critics, rows)
    penalty.backward()
    trained = [p for p in parameters.values(True, True) if p.grad is not None]
    assert trained
    others = [p for n, p in loss.named_parameters() if "value_network" not in n]
    assert all(p.grad is None for p in others)


def flat(parameters: Any) -> dict[str, Tensor]:
    return {".".join(key): part.detach() for key, part in parameters.items(True, True)}


@pytest.mark.parametrize("name", DISCRETE)
def test_the_critics_of_every_discrete_loss(name: str) -> None:
    torch.manual_seed(0)
    loss = DISCRETE[name]()
    rows = transitions_of(discrete_steps(30))
    critics = critics_of(loss)
    y = stacked_gradients(critics, rows)
    assert y.shape == (30, 6)
    assert torch.isfinite(y).all()
    assert critics.policy is not None
    assert critics.policy(rows.observations).shape == (30,)
    assert critics.policy(rows.observations).dtype == torch.int64
    CovariancePenalty(0.1, scale="relative")(critics, rows).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in loss.parameters())
    sampler = ClusterSampler(2, seed=0)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(60), sampler=sampler, batch_size=8)
    buffer.extend(discrete_steps(60))
    sampler.attach(critics)
    assert buffer.sample()["cluster"].min() >= 0


def test_double_q_learning_chooses_by_the_online_network() -> None:
    torch.manual_seed(0)
    plain, double = DISCRETE["DQN"](), DISCRETE["double DQN"]()
    rows = transitions_of(discrete_steps(200))
    for loss in (plain, double):
        with torch.no_grad():
            for parameter in loss.target_value_network_params.values(True, True):
                parameter.data.neg_()
    for loss, by_target in ((plain, True), (double, False)):
        critics = critics_of(loss)
        assert critics.policy is not None
        source = critics.target if by_target else critics.critic
        assert torch.equal(critics.policy(rows.observations), source(rows.observations).argmax(dim=1))


def test_the_policy_is_the_target_actors_deterministic_action() -> None:
    torch.manual_seed(0)
    loss = CONTINUOUS["TD3"]()
    with torch.no_grad():
        for parameter in loss.target_actor_network_params.values(True, True):
            parameter.data.mul_(2)
    critics = critics_of(loss)
    assert critics.policy is not None
    rows = transitions_of(steps(10))
    bias, weight = (part for _, part in sorted(flat(loss.target_actor_network_params).items()))
    torch.testing.assert_close(critics.policy(rows.observations), torch.tanh(rows.observations @ weight.T + bias))


def test_critics_follow_the_training() -> None:
    torch.manual_seed(0)
    loss = CONTINUOUS["TD3"]()
    critics, rows = critics_of(loss, next_action="dataset"), transitions_of(steps(10))

    def values(critic: Any) -> Tensor:
        return torch.stack(member_values(critic, rows.observations, rows.actions))

    before, target_before = values(critics.critic), values(critics.target)
    with torch.no_grad():
        for parameter in loss.qvalue_network_params.values(True, True):
            parameter.mul_(2)
    assert not torch.allclose(values(critics.critic), before)
    assert torch.equal(values(critics.target), target_before)
    assert critics.policy is None


def test_diagnose_reads_them(critics: Critics) -> None:
    found = diagnose(critics, transitions_of(steps(50)))
    assert found.total > 0
    assert -1 <= found.variance_cosine <= 1


@pytest.mark.parametrize(
    "loss",
    [
        lambda: objectives.ClipPPOLoss(stochastic_actor(), value()),
        lambda: objectives.DistributionalDQNLoss(
            DistributionalQValueActor(
                nn.Sequential(nn.Linear(3, 20), nn.Unflatten(-1, (5, 4))),
                spec=OneHot(4),
                support=torch.linspace(0, 1, 5),
            ),
            gamma=0.9,
        ),
        lambda: nn.Linear(3, 1),
    ],
)
def test_losses_without_a_q_network_are_refused(loss: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="loss: expected one of TorchRL's losses with a Q-network"):
        critics_of(loss())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_clusters": 0}, "n_clusters: expected an integer of at least 1, got 0"),
        ({"embedding": "gradient"}, "embedding: expected one of 'gradients', 'features', got 'gradient'"),
        ({"refresh": 5}, "refresh: expected a callable or None, as Every.*, got 5"),
        ({"assignment": "fuzzy"}, "assignment: expected one of 'soft', 'hard', got 'fuzzy'"),
        ({"seed": -1}, "seed: expected an integer of at least 0, got -1"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClusterSampler(**options)


def test_wrong_critics_are_named(critics: Critics) -> None:
    sampler = ClusterSampler()
    with pytest.raises(ValueError, match="critics: expected a Critics record, got str"):
        sampler.attach("td3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="critics: expected a Critics record, given or attached, got None"):
        sampler.refresh()
    with pytest.raises(ValueError, match="storage: expected a batch sampled by its buffer before, got none yet"):
        sampler.refresh(critics)


def test_next_actions_of_n_step_rows_are_those_of_the_row_so_many_on() -> None:
    n = 3
    rows = TensorDictReplayBuffer(
        storage=LazyTensorStorage(100), transform=MultiStepTransform(n_steps=n, gamma=0.9), batch_size=4
    )
    data = steps(30)
    data["next", "done"][:] = data["next", "terminated"][:] = False
    rows.extend(data)
    held = stored(rows._storage, torch.arange(len(rows)), DEFAULT_KEYS, None)
    assert set(held.intervals.tolist()) == {float(n)}
    assert held.has_next_actions.tolist() == [1.0] * (len(rows) - n) + [0.0] * n
    assert torch.equal(held.next_actions[:-n], data["action"][n : len(rows)])


def test_several_integers_are_no_one_hot_action() -> None:
    batch = steps(3)
    batch["action"] = torch.tensor([[0, 2, 1], [1, 0, 3], [2, 2, 0]])
    with pytest.raises(ValueError, match="^action: expected one action a row: .* one-hot"):
        transitions_of(batch)


def test_critics_follow_a_loss_that_is_moved() -> None:
    loss = objectives.TD3Loss(actor(), q_value(), bounds=(-1, 1), delay_qvalue=False, delay_actor=False)
    critics = critics_of(loss)
    loss.to(torch.float64)
    batch = steps(8).to(torch.float64)
    assert stacked_gradients(critics, transitions_of(batch)).dtype == torch.float64


def test_members_of_an_ensemble_are_read_one_by_one() -> None:
    loss = objectives.REDQLoss(stochastic_actor(), q_value(), num_qvalue_nets=5)
    critics = critics_of(loss, next_action="dataset")
    observations, actions = torch.randn(7, 3), torch.rand(7, 2)
    values = member_values(critics.critic, observations, actions)
    assert len(members_of(critics.critic)) == len(values) == 5
    batch = TensorDict({"observation": observations, "action": actions}, batch_size=[7])
    for value, parameters in zip(values, loss.qvalue_network_params.unbind(0)):
        with parameters.to_module(loss.qvalue_network):
            expected = loss.qvalue_network(batch.clone())["state_action_value"].squeeze(1)
        assert torch.equal(value, expected)
