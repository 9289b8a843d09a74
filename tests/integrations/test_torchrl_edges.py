"""TorchRL: arguments that are refused, keys and policies of unusual losses, states that are taken."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from c4buffer.integrations.torchrl import ClusterSampler, critics_of, transitions_of
from c4buffer.integrations.torchrl.rows import DEFAULT_KEYS, stored
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl import objectives
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import ValueOperator

from c4buffer import Critics, Every, stacked_gradients

from .test_torchrl import CONTINUOUS, QNetwork, critics, filled, steps

__all__ = ["critics"]  # a fixture


quiet = pytest.mark.filterwarnings("ignore:No target network updater")


@quiet
def test_what_can_not_be_a_transform_or_has_no_critics_is_named(critics: Critics) -> None:
    sampler = ClusterSampler(2, seed=0)
    buffer = filled(sampler)
    buffer.sample()
    with pytest.raises(ValueError, match=r"^log_likelihood_of: expected attached critics, got none"):
        sampler.log_likelihood_of(torch.arange(3))
    with pytest.raises(ValueError, match=r"^transform: expected a callable or None, got 3"):
        sampler.attach(critics, transform=3)  # type: ignore[arg-type]


@quiet
def test_of_several_axes_row_numbers_alone_name_no_rows(critics: Critics) -> None:
    sampler = ClusterSampler(2, refresh=Every(10**9), seed=0)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(40, ndim=2), sampler=sampler, batch_size=8)
    buffer.extend(steps(4, 10))
    sampler.attach(critics)
    buffer.sample()
    assert sampler.clustered
    buffer.mark_update(torch.arange(3))
    assert not sampler.clustered


@quiet
def test_another_storage_of_the_same_size_is_a_new_beginning(critics: Critics) -> None:
    sampler = ClusterSampler(2, refresh=Every(10**9), seed=0)
    sampler.attach(critics)
    filled(sampler, rows=50).sample()
    report = sampler.last_report
    other = TensorDictReplayBuffer(storage=LazyTensorStorage(50), batch_size=8)
    other.extend(steps(50, seed=1))
    other.set_sampler(sampler)
    assert other.sample()["cluster"].min() >= 0
    assert sampler.last_report is not report


@quiet
def test_a_state_that_was_taken_stays_as_it_was(critics: Critics) -> None:
    sampler = ClusterSampler(2, refresh=Every(3), seed=0)
    buffer = filled(sampler)
    sampler.attach(critics)
    buffer.sample()
    state = sampler.state_dict()
    before = copy.deepcopy(state)
    buffer.extend(steps(60, seed=1))
    for _ in range(6):
        buffer.sample()

    def compare(one: Any, other: Any) -> None:
        if isinstance(one, dict):
            assert one.keys() == other.keys()
            for key in one:
                compare(one[key], other[key])
        elif isinstance(one, (list, tuple)):
            for a, b in zip(one, other, strict=True):
                compare(a, b)
        else:
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other

    compare(state, before)


def test_a_row_that_the_next_one_does_not_follow_has_no_next_action() -> None:
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(40), batch_size=4)
    buffer.extend(steps(40, episode=100)[order])
    held = stored(buffer._storage, torch.arange(40), DEFAULT_KEYS, None)
    expected = [float(i < 39 and order[i + 1] == order[i] + 1) for i in range(40)]
    assert held.has_next_actions.tolist() == expected


def test_batches_that_say_too_little_are_named() -> None:
    with pytest.raises(ValueError, match=r"^batch: expected the key \('next', 'terminated'\) or \('next', 'done'\)"):
        transitions_of(steps(4).exclude(("next", "done"), ("next", "terminated")))
    batch = steps(3)
    batch["action"] = torch.tensor([[0, 2, 0], [1, 0, 0], [0, 0, 1]])
    with pytest.raises(ValueError, match=r"^action: expected one action a row"):
        transitions_of(batch)


def test_rewards_in_integers_become_floats() -> None:
    batch = steps(4)
    batch["next", "reward"] = torch.tensor([[1], [-2], [0], [3]])
    rows = transitions_of(batch)
    assert rows.rewards.dtype == rows.terminals.dtype == torch.float32
    assert rows.rewards.tolist() == [1, -2, 0, 3]


@quiet
@pytest.mark.parametrize("name", ["SAC", "IQL"])
def test_the_policy_of_a_stochastic_actor_is_its_likeliest_action(name: str) -> None:
    torch.manual_seed(0)
    loss = CONTINUOUS[name]()
    critics, rows = critics_of(loss), transitions_of(steps(10))
    with set_exploration_type(ExplorationType.RANDOM):  # as in a loop that collects
        found = critics.policy(rows.observations)
        assert torch.equal(critics.policy(rows.observations), found)
    with torch.no_grad():
        loc = loss.actor_network(steps(10).select("observation"))["loc"]
    torch.testing.assert_close(found, torch.tanh(loc), rtol=1e-3, atol=1e-3)


@quiet
def test_keys_of_a_loss_are_its_own() -> None:
    network = TensorDictModule(nn.Sequential(nn.Linear(3, 2), nn.Tanh()), in_keys=["observation"], out_keys=["move"])
    q = ValueOperator(QNetwork(), in_keys=["observation", "move"], out_keys=["state_action_value"])
    loss = objectives.TD3Loss(network, q, bounds=(-1, 1))
    loss.set_keys(action="move")
    assert stacked_gradients(critics_of(loss), transitions_of(steps(10))).shape == (10, 10)


@quiet
def test_several_q_functions_without_an_actor_have_no_greedy_action() -> None:
    loss = CONTINUOUS["REDQ"]()
    loss._modules.pop("actor_network", None)
    loss.__dict__["actor_network"] = None
    with pytest.raises(
        ValueError, match="^next_action: expected 'dataset' for a loss with several Q-functions and no a"
    ):
        critics_of(loss)
    assert critics_of(loss, next_action="dataset").policy is None


@quiet
def test_a_loss_with_values_of_states_alone_is_refused() -> None:
    loss = CONTINUOUS["DDPG"]()
    loss.value_network.out_keys = ["state_value"]
    with pytest.raises(ValueError, match="^loss: expected .*, got DDPGLoss with values of states alone"):
        critics_of(loss)


@quiet
def test_sent_through_a_queue_it_shares_nothing(critics: Critics) -> None:
    sampler = ClusterSampler(2, refresh=Every(10**9), seed=0)
    buffer = filled(sampler)
    sampler.attach(critics)
    buffer.sample()
    before = sampler.responsibilities.clone()
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    queue.put(sampler)
    queue.get()._written(torch.arange(20))
    assert torch.equal(sampler.responsibilities, before)


@quiet
def test_pickled_it_holds_no_transform(critics: Critics) -> None:
    sampler = ClusterSampler(2, seed=0)
    buffer = filled(sampler)
    sampler.attach(critics, transform=lambda batch: batch)  # which has no pickle
    buffer.sample()
    assert pickle.loads(pickle.dumps(sampler))._transform is None
