"""The networks behind critics, which reading leaves alone, and what is refused."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import c4buffer.memory
from c4buffer import CovariancePenalty, Critics, Transitions, diagnose, stacked_features, stacked_gradients
from c4buffer.networks import evaluating
from c4buffer.stacking import rows_for


@pytest.fixture
def batch(make_transitions: Callable[..., Transitions]) -> Transitions:
    """12 float64 transitions, every fifth terminal."""
    return make_transitions(12, dtype=torch.float64)


def test_transitions_of_another_precision_than_the_networks_are_refused(batch: Transitions) -> None:
    def total(observations: Tensor, actions: Tensor) -> Tensor:
        return observations.sum(dim=1)

    q = nn.Bilinear(3, 2, 1)
    for critics, name in [
        (Critics(q, total), "critic"),
        (Critics(lambda observations, actions: q(observations, actions), total), "critic"),
        (Critics(q, [q]), "target"),
        (Critics(q, q, policy=nn.Linear(3, 2)), "policy"),
    ]:
        message = f"^{name}: expected transitions of its own torch.float32, got torch.float64$"
        with pytest.raises(ValueError, match=message):
            CovariancePenalty(0.1)(critics, batch)
    with pytest.raises(RuntimeError, match="size"):
        CovariancePenalty(0.1)(Critics(nn.Bilinear(5, 2, 1).double(), total), batch)


# What is left alone


class Noisy(nn.Module):
    """A critic, policy or encoder whose output changes with the mode and whose use in training mode leaves traces."""

    def __init__(self, inputs: int, outputs: int = 1) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(inputs)
        self.drop = nn.Dropout(0.5)
        self.hidden = nn.Linear(inputs, 16)
        self.last = nn.Linear(16, outputs)

    def forward(self, *inputs: Tensor) -> Tensor:
        value: Tensor = self.last(self.features(*inputs))
        return value

    def features(self, *inputs: Tensor) -> Tensor:
        return torch.tanh(self.hidden(self.drop(self.norm(torch.cat(inputs, dim=1)))))

    def value(self, *inputs: Tensor) -> Tensor:
        return self(*inputs)


class Agent:
    """Networks as attributes of something that is no module."""

    def __init__(self, network: nn.Module) -> None:
        self.networks = [network]

    def value(self, *inputs: Tensor) -> Tensor:
        value: Tensor = self.networks[0](*inputs)
        return value

    __call__ = value


NETWORK_OF_THE_FILE = Noisy(5)


def reads_the_network_of_the_file(observations: Tensor, actions: Tensor) -> Tensor:
    return NETWORK_OF_THE_FILE(observations, actions)


def calling(network: nn.Module) -> dict[str, Any]:
    """Ways to hand over one network."""

    def function(observations: Tensor, actions: Tensor) -> Tensor:
        value: Tensor = network(observations, actions)
        return value

    return {
        "module": network,
        "list": [network],
        "bound method": network.value,
        "partial": functools.partial(network),
        "closure": function,
        "closure over a closure": lambda s, a: function(s, a),
        "object": Agent(network),
        "method of an object": Agent(network).value,
        "global": reads_the_network_of_the_file,
    }


def footprint(networks: Sequence[nn.Module]) -> list[Any]:
    """All that a use could change: modes, parameters, statistics, gradients, what requires them."""
    traces: list[Any] = []
    for network in networks:
        traces += [module.training for module in network.modules()]
        traces += [tensor.clone() for tensor in network.state_dict().values()]
        traces += [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in network.parameters()]
    return traces


def assert_same_footprint(before: list[Any], after: list[Any]) -> None:
    torch.testing.assert_close(before, after, rtol=0, atol=0)


@pytest.mark.parametrize("read", [stacked_gradients, stacked_features])
def test_modes_statistics_gradients_and_generator_are_untouched(
    read: Callable[..., Tensor], make_transitions: Callable[..., Transitions]
) -> None:
    batch = make_transitions(16)
    critic, target, policy, encoder = Noisy(6), Noisy(6), Noisy(3, 2), Noisy(3, 4)
    critic.drop.eval()  # a mode of its own is to be restored, too
    target.requires_grad_(False)
    for parameter in critic.hidden.parameters():
        parameter.grad = torch.ones_like(parameter)
    networks = (critic, target, policy, encoder)
    before, state = footprint(networks), torch.get_rng_state()
    critics = Critics(critic, target, policy=policy, encode=encoder)
    stacked = read(critics, batch)
    assert_same_footprint(before, footprint(networks))
    assert torch.equal(torch.get_rng_state(), state), "dropout was on"

    for network in networks:
        network.eval()
    torch.testing.assert_close(stacked, read(critics, batch))


@pytest.mark.parametrize("way", list(calling(Noisy(5))))
def test_networks_are_found_and_kept_in_eval_mode_however_they_are_handed_over(
    way: str, make_transitions: Callable[..., Transitions]
) -> None:
    batch = make_transitions(16)
    network = NETWORK_OF_THE_FILE if way == "global" else Noisy(5)
    held = calling(network)[way]
    before = footprint([network])
    stacked = stacked_gradients(Critics(held, held), batch)
    assert_same_footprint(before, footprint([network]))
    torch.testing.assert_close(stacked, stacked_gradients(Critics(network, network), batch))


def test_a_network_behind_the_features_is_in_eval_mode_too(
    batch: Transitions, pair: tuple[nn.Module, nn.Module]
) -> None:
    network = Noisy(5).double()
    before = footprint([network])
    stacked_features(Critics(*pair, features=lambda member, s, a: network.features(s, a)), batch)
    assert_same_footprint(before, footprint([network]))


@pytest.mark.parametrize("read", [stacked_gradients, stacked_features])
def test_probing_leaves_modes_statistics_gradients_and_generator_alone(
    read: Callable[..., Tensor], make_transitions: Callable[..., Transitions], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_transitions(64)
    networks = (Noisy(6), Noisy(6), Noisy(3, 2), Noisy(3, 4))
    networks[0].drop.eval()
    networks[1].requires_grad_(False)
    critics = Critics(networks[0], networks[1], policy=networks[2], encode=networks[3])
    before, state = footprint(networks), torch.get_rng_state()
    monkeypatch.setattr(c4buffer.memory, "free_bytes", lambda device: 20_000)
    assert rows_for(critics, batch) < 64
    found = read(critics, batch)
    assert_same_footprint(before, footprint(networks))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(found, read(critics, batch, chunk_size=64), rtol=1e-4, atol=1e-6)


def test_modes_are_restored_after_an_error(make_transitions: Callable[..., Transitions]) -> None:
    network = Noisy(5)
    with pytest.raises(ValueError, match="target"):
        stacked_gradients(Critics(network, lambda s, a: network(s, a).expand(-1, 3)), make_transitions(4))
    assert all(module.training for module in network.modules())


# Errors


@pytest.mark.parametrize(
    ("critic", "target", "message"),
    [
        (None, abs, "critic: expected a callable or a sequence of callables, got NoneType"),
        ([], abs, "critic: expected a callable or a sequence of callables, got list"),
        (abs, [abs, 3], "target: expected a callable or a sequence of callables, got list"),
    ],
)
def test_what_is_no_critic_is_refused(critic: Any, target: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Critics(critic, target)


@pytest.mark.parametrize("read", [stacked_gradients, stacked_features, CovariancePenalty(1.0)])
def test_networks_that_are_not_in_a_record_are_refused(read: Callable[..., Tensor], batch: Transitions) -> None:
    with pytest.raises(ValueError, match="critics: expected a Critics record, got Linear"):
        read(nn.Linear(5, 1), batch)


@pytest.mark.parametrize("read", [stacked_gradients, stacked_features])
def test_no_transitions_are_said_to_be_none(
    read: Callable[..., Tensor], batch: Transitions, pair: tuple[nn.Module, nn.Module]
) -> None:
    with pytest.raises(ValueError, match="batch: expected at least one transition, got none"):
        read(Critics(*pair), batch[:0])


CONTINUOUS = "expected [B], [B, 1], [n, B] or [n, B, 1] with B = 12 for continuous actions, got "


@pytest.mark.parametrize(
    ("critic", "message"),
    [
        (lambda s, a: s @ s.T[:, :3], "critic: " + CONTINUOUS + "[12, 3]"),
        (lambda s, a: s.sum(), "critic: " + CONTINUOUS + "[]"),
        (lambda s, a: {"q": s}, "critic: " + CONTINUOUS + "dict"),
        (
            lambda s, a: torch.ones(12, dtype=torch.float64),
            "critic: expected values that can be differentiated by observations and actions, got values without",
        ),
        (lambda s, a: s[:, 0] / 0 * 0, "critic: expected finite values, got nan in row 0 (12 of 12 rows are bad); has"),
        (lambda s, a: (s[:, 0] - s[:, 0]).abs().sqrt(), "gradient of critic: expected finite values, got nan in row 0"),
    ],
)
def test_a_critic_that_returns_something_else_is_named(
    critic: Callable[..., Any], message: str, batch: Transitions, pair: tuple[nn.Module, nn.Module]
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        stacked_gradients(Critics(critic, pair[1]), batch)
    with pytest.raises(ValueError, match=re.escape(message.replace("critic", "target"))):
        stacked_gradients(Critics(pair[0], critic), batch)


def test_a_critic_of_discrete_actions_must_return_a_table(make_transitions: Callable[..., Transitions]) -> None:
    batch = make_transitions(6, discrete=True)
    message = "critic: expected [B, n_actions] or [n, B, n_actions] with B = 6 for discrete actions, got [6]"
    with pytest.raises(ValueError, match=re.escape(message)):
        stacked_gradients(Critics(lambda s: s[:, 0], lambda s: s), batch)


def test_a_policy_must_return_an_action_for_each_row(batch: Transitions, pair: tuple[nn.Module, nn.Module]) -> None:
    with pytest.raises(ValueError, match=re.escape("policy: expected a tensor of actions [12, 2], got [1, 2]")):
        stacked_gradients(Critics(*pair, policy=lambda s: torch.zeros(1, 2)), batch)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (
            None,
            "features: expected a callable, or a critic with a method `features(observations, actions)`, "
            "got None and a Linear without one",
        ),
        (lambda member, s, a: s[:, 0], "features: expected [B, F] with B = 12, got [12]"),
        (lambda member, s, a: None, "features: expected [B, F] with B = 12, got NoneType"),
        (lambda member, s, a: s / 0, "features: expected finite values, got"),
    ],
)
def test_features_that_can_not_be_read_are_an_error(features: Any, message: str, batch: Transitions) -> None:
    network = nn.Linear(3, 1)
    with pytest.raises(ValueError, match=re.escape(message)):
        stacked_features(Critics(network, network, features=features), batch)


def test_networks_in_a_dictionary_are_found_and_names_not_assigned_yet_are_no_trouble() -> None:
    networks = {"q": nn.Sequential(nn.Linear(3, 1), nn.Dropout())}

    def late() -> nn.Module:
        return unassigned

    found = Critics(lambda s: networks["q"](s), lambda s: late()(s)).modules
    assert networks["q"] in found
    unassigned = nn.Linear(3, 1)


def test_a_policy_that_returns_a_pair_is_refused_by_name(batch: Transitions, pair: tuple[nn.Module, nn.Module]) -> None:
    with pytest.raises(ValueError, match=re.escape("policy: expected a tensor of actions [12, 2], got tuple")):
        stacked_gradients(Critics(*pair, policy=lambda s: (s[:, :2], s[:, 0])), batch)


def test_an_action_that_the_critic_does_not_have_is_told(make_critic: Callable[..., nn.Module]) -> None:
    rows = torch.zeros(4, 3)
    batch = Transitions(
        observations=rows,
        actions=[0, 1, 5, 2],
        rewards=torch.zeros(4),
        next_observations=rows,
        terminals=torch.zeros(4),
    )
    q = make_critic(3, outputs=3)
    with pytest.raises(ValueError, match=r"^actions: expected numbers from 0 to 2, as \w+ has them, got 0 to 5$"):
        stacked_gradients(Critics(q, q), batch)


def test_a_network_that_is_put_in_place_of_another_is_read_in_eval_mode(batch: Transitions) -> None:
    class Agent:
        q: nn.Module = nn.Linear(5, 1)

    def value(observations: Tensor, actions: Tensor) -> Tensor:
        output: Tensor = agent.q(torch.cat([observations, actions], dim=1).float())
        return output

    agent = Agent()
    critics = Critics(value, value)
    stacked_gradients(critics, batch)
    agent.q = nn.Sequential(nn.Linear(5, 64), nn.Dropout(0.5), nn.Linear(64, 1))
    assert torch.equal(stacked_gradients(critics, batch), stacked_gradients(critics, batch))


@pytest.mark.parametrize("mode", [False, True], ids=["on the way in", "on the way out"])
def test_an_interrupt_leaves_no_network_in_eval_mode(mode: bool) -> None:
    class Interrupted(torch.nn.Linear):
        armed = False

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "training" and value is mode and self.armed:
                Interrupted.armed = False
                raise KeyboardInterrupt

    for inside in ([Interrupted(2, 2)], []):  # what is known, and what is met only when it is called
        others = [torch.nn.Linear(2, 2), torch.nn.Dropout(0.5)]
        networks = [others[0], Interrupted(2, 2), others[1]]
        Interrupted.armed = True
        with pytest.raises(KeyboardInterrupt), evaluating(networks if inside else others, and_others=True):
            networks[1](torch.zeros(1, 2))
        assert all(network.training for network in networks)
        torch.nn.Dropout(0.5)(torch.zeros(1))
        assert not torch.nn.modules.module._global_forward_pre_hooks


def test_networks_put_into_a_critic_later_are_evaluated_too() -> None:
    critic = torch.nn.Module()
    critic.hidden = torch.nn.Linear(2, 2)
    critics = Critics([critic], [critic])
    with critics.evaluating():
        pass
    critic.hidden = torch.nn.Sequential(torch.nn.Dropout(0.5), critic.hidden)
    with critics.evaluating():
        assert not any(module.training for module in critic.modules())
    assert all(module.training for module in critic.modules())


def test_logs_and_memories_of_an_agent_are_not_searched_for_networks(make_critic: Any) -> None:
    class Log(list[Any]):
        def __iter__(self) -> Any:
            raise AssertionError("looked into")

    class Agent:
        def __init__(self) -> None:
            self.q = make_critic(5)
            self.ensemble = [make_critic(5) for _ in range(20)]
            self.losses = Log(range(5000))
            self.memory = dict.fromkeys(range(5000))

        def act(self, observations: Tensor) -> Tensor:
            return observations[:, :2]

    agent = Agent()
    found = Critics(agent.q, agent.q, policy=agent.act).modules
    assert all(any(module is network for module in found) for network in (agent.q, *agent.ensemble))


class Hidden:
    """Holds its network where a search does not look."""

    __slots__ = ("parts",)

    def __init__(self, network: nn.Module) -> None:
        self.parts = [{"critics": [SimpleNamespace(network=network)]}]

    def __call__(self, observations: Tensor, actions: Tensor) -> Tensor:
        value: Tensor = self.parts[0]["critics"][0].network(torch.cat([observations, actions], dim=1))
        return value.squeeze(1)


@pytest.mark.parametrize("read", [stacked_gradients, CovariancePenalty(1.0), lambda c, b: torch.tensor(0.0)])
def test_networks_that_no_search_finds_are_called_in_eval_mode(
    read: Callable[..., Tensor], make_transitions: Callable[..., Transitions]
) -> None:
    network = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1))
    agent, batch = Hidden(network), make_transitions(30)
    critics = Critics(agent, agent)
    assert critics.modules == ()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert torch.equal(read(critics, batch), read(critics, batch))
    diagnose(critics, batch)
    assert all(module.training for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    network[0].weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="diverged"):
        stacked_gradients(critics, batch)
    assert all(module.training for module in network.modules())


def test_networks_of_another_thread_are_left_in_their_mode() -> None:
    network, seen = nn.Dropout(0.5), []

    def train() -> None:
        network(torch.ones(3))
        seen.append(network.training)

    with Critics(lambda s, a: s, lambda s, a: s).evaluating():
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
        assert seen == [True]
        network(torch.ones(3))
        assert not network.training
    assert network.training


def test_attention_has_a_penalty(make_transitions: Callable[..., Transitions]) -> None:
    class Attentive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

        def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
            value: Tensor = self.layer(torch.cat([observations, actions], dim=1).view(-1, 3, 4)).mean(dim=(1, 2))
            return value + observations.square().sum(dim=1) * actions.sum(dim=1)

    torch.manual_seed(0)
    critic = Attentive()
    CovariancePenalty(1.0)(Critics(critic, critic), make_transitions(6, 8, 4)).backward()  # type: ignore[no-untyped-call]
    assert any(bool(parameter.grad.any()) for parameter in critic.parameters() if parameter.grad is not None)
