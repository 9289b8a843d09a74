"""Gradients and features read off critics, against finite differences, and the networks that they leave alone."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import c4buffer.critics
import c4buffer.memory
from c4buffer import Critics, Transitions, stacked_features, stacked_gradients
from c4buffer.critics import rows_for

STEP = 1e-5  # of the central differences, in float64: truncation and rounding are both about 1e-10


def central_differences(value: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Gradient of value(*inputs) [B] by the inputs, flattened and side by side, [B, D]."""
    columns = []
    for position, leaf in enumerate(inputs):
        for column in range(leaf[0].numel()):
            shift = torch.zeros_like(leaf[0]).reshape(-1)
            shift[column] = STEP
            moved = [
                value(*[x + sign * shift.view_as(x[0]) if i == position else x for i, x in enumerate(inputs)])
                for sign in (1, -1)
            ]
            columns.append((moved[0] - moved[1]).detach() / (2 * STEP))
    return torch.stack(columns, dim=1)


def assert_pair(stacked: Tensor, target_gradients: Tensor, gradients: Tensor, terminals: Tensor) -> None:
    """stacked is [g', g] with g' masked, to the accuracy of the differences."""
    alive = (1 - terminals).unsqueeze(1)
    torch.testing.assert_close(stacked, torch.cat([alive * target_gradients, gradients], dim=1), rtol=1e-7, atol=1e-8)


class Table(nn.Module):
    """Q(s)[a] of discrete actions, [B, n_actions]."""

    def __init__(self, observation_dim: int, n_actions: int, *, seed: int) -> None:
        super().__init__()
        weights = torch.randn(observation_dim, n_actions, generator=torch.Generator().manual_seed(seed))
        self.weights = nn.Parameter(weights.double())

    def forward(self, observations: Tensor) -> Tensor:
        return torch.tanh(observations @ self.weights)


@pytest.fixture
def batch(make_transitions: Callable[..., Transitions]) -> Transitions:
    """12 float64 transitions, every fifth terminal."""
    return make_transitions(12, dtype=torch.float64)


@pytest.fixture
def pair(make_critic: Callable[..., nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A critic and a target that differ, float64."""
    return make_critic(seed=1, dtype=torch.float64), make_critic(seed=2, dtype=torch.float64)


# Gradients


def test_both_gradients_agree_with_finite_differences_and_ends_are_masked(
    batch: Transitions, pair: tuple[nn.Module, nn.Module]
) -> None:
    critic, target = pair
    stacked = stacked_gradients(Critics(critic, target), batch)
    assert stacked.shape == (12, 10)
    assert_pair(
        stacked,
        central_differences(lambda s, a: target(s, a)[:, 0], batch.next_observations, batch.next_actions),
        central_differences(lambda s, a: critic(s, a)[:, 0], batch.observations, batch.actions),
        batch.terminals,
    )
    ends = batch.terminals == 1
    assert bool(ends.any())
    assert torch.equal(stacked[ends, :5], torch.zeros(int(ends.sum()), 5, dtype=torch.float64))
    assert bool((stacked[ends, 5:] != 0).all()), "g is not masked"
    assert not stacked.requires_grad


def forms(members: list[nn.Module]) -> dict[str, Any]:
    """One ensemble, in every form that Critics takes."""
    return {
        "list": members,
        "tuple": tuple(members),
        "ModuleList": nn.ModuleList(members),
        "[n, B]": lambda s, a: torch.stack([member(s, a)[:, 0] for member in members]),
        "[n, B, 1]": lambda s, a: torch.stack([member(s, a) for member in members]),
        "list of [B]": lambda s, a: [member(s, a)[:, 0] for member in members],
        "tuple of [B, 1]": lambda s, a: tuple(member(s, a) for member in members),
        "list of callables": [functools.partial(member) for member in members],
        "list with an ensemble in it": [members[0], lambda s, a: torch.stack([member(s, a) for member in members[1:]])],
    }


@pytest.mark.parametrize("form", list(forms([nn.Identity()])))
@pytest.mark.parametrize("rows", [12, 3, 1])
def test_an_ensemble_in_every_form_gives_the_gradient_of_its_members_mean(
    form: str, rows: int, batch: Transitions, make_critic: Callable[..., nn.Module]
) -> None:
    members = [make_critic(seed=seed, dtype=torch.float64) for seed in range(3)]
    targets = [make_critic(seed=seed, dtype=torch.float64) for seed in range(3, 6)]
    part = batch[:rows]  # as many rows as members, and a single row, are where shapes could be mistaken

    def mean_of(ensemble: Sequence[nn.Module]) -> Callable[..., Tensor]:
        return lambda s, a: sum(member(s, a)[:, 0] for member in ensemble) / len(ensemble)

    assert_pair(
        stacked_gradients(Critics(forms(members)[form], forms(targets)[form]), part),
        central_differences(mean_of(targets), part.next_observations, part.next_actions),
        central_differences(mean_of(members), part.observations, part.actions),
        part.terminals,
    )


@pytest.mark.parametrize("form", ["table", "list", "[n, B, n_actions]", "list of tables"])
def test_discrete_actions_gather_their_value_and_leave_x_the_state_alone(
    form: str, make_transitions: Callable[..., Transitions]
) -> None:
    batch = make_transitions(12, 3, 4, dtype=torch.float64, discrete=True)
    tables, targets = ([Table(3, 4, seed=seed + shift) for seed in range(2)] for shift in (0, 10))

    def as_form(members: list[Table]) -> Any:
        return {
            "table": members[0],
            "list": members,
            "[n, B, n_actions]": lambda s: torch.stack([member(s) for member in members]),
            "list of tables": lambda s: [member(s) for member in members],
        }[form]

    def value_of(members: list[Table], actions: Tensor) -> Callable[..., Tensor]:
        used = members[:1] if form == "table" else members
        rows = torch.arange(len(actions))
        return lambda s: sum(member(s)[rows, actions] for member in used) / len(used)

    stacked = stacked_gradients(Critics(as_form(tables), as_form(targets)), batch)
    assert stacked.shape == (12, 6)
    assert_pair(
        stacked,
        central_differences(value_of(targets, batch.next_actions), batch.next_observations),
        central_differences(value_of(tables, batch.actions), batch.observations),
        batch.terminals,
    )


@pytest.mark.parametrize("structure", ["dict", "tuple"])
def test_structured_observations_are_flattened_in_a_fixed_order(
    structure: str, make_critic: Callable[..., nn.Module]
) -> None:
    generator = torch.Generator().manual_seed(0)
    b, a, next_b, next_a, actions = (
        torch.randn(6, *shape, generator=generator, dtype=torch.float64) for shape in ((2, 2), (3,), (2, 2), (3,), (2,))
    )
    critic, target = (make_critic(9, seed=seed, dtype=torch.float64) for seed in (1, 2))

    def parts(observations: Any) -> tuple[Tensor, Tensor]:
        return (observations["a"], observations["b"]) if isinstance(observations, dict) else observations

    def reading(network: nn.Module) -> Callable[..., Tensor]:
        return lambda s, x: network(torch.cat([part.flatten(1) for part in parts(s)], dim=1), x)

    batch = Transitions(
        observations={"b": b, "a": a} if structure == "dict" else (a, b),
        actions=actions,
        rewards=torch.zeros(6),
        next_observations={"a": next_a, "b": next_b} if structure == "dict" else (next_a, next_b),
        terminals=torch.tensor([0, 0, 1, 0, 0, 0]),
    )
    assert_pair(
        stacked_gradients(Critics(reading(critic), reading(target)), batch),
        central_differences(lambda x, y, z: reading(target)((x, y), z)[:, 0], next_a, next_b, batch.next_actions),
        central_differences(lambda x, y, z: reading(critic)((x, y), z)[:, 0], a, b, actions),
        batch.terminals,
    )


def test_bytes_of_an_image_are_differentiated_as_numbers(make_critic: Callable[..., nn.Module]) -> None:
    critic = make_critic(4 + 1, seed=1)
    image = torch.arange(12, dtype=torch.uint8).reshape(3, 1, 2, 2)
    batch = Transitions(
        observations=image,
        actions=torch.ones(3, 1),
        rewards=torch.zeros(3),
        next_observations=image,
        terminals=torch.zeros(3),
    )

    def reading(s: Tensor, a: Tensor) -> Tensor:
        value: Tensor = critic(s.flatten(1) / 255, a)
        return value

    g = stacked_gradients(Critics(reading, reading), batch)[:, 5:]
    scaled = image.float().flatten(1).requires_grad_()
    expected = torch.autograd.grad(critic(scaled / 255, batch.actions).sum(), scaled)[0]
    torch.testing.assert_close(g[:, :4], expected)


def test_a_policy_replaces_the_next_actions_of_the_data(batch: Transitions, pair: tuple[nn.Module, nn.Module]) -> None:
    critic, target = pair
    policy = nn.Linear(3, 2, dtype=torch.float64)
    stacked = stacked_gradients(Critics(critic, target, policy=policy), batch)
    next_actions = policy(batch.next_observations).detach()
    assert_pair(
        stacked,
        central_differences(lambda s, a: target(s, a)[:, 0], batch.next_observations, next_actions),
        central_differences(lambda s, a: critic(s, a)[:, 0], batch.observations, batch.actions),
        batch.terminals,
    )
    assert not torch.equal(stacked[:, :5], stacked_gradients(Critics(critic, target), batch)[:, :5])


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_a_policy_of_discrete_actions_may_return_a_column(
    shape: tuple[int, ...], make_transitions: Callable[..., Transitions]
) -> None:
    batch = make_transitions(6, 3, 4, dtype=torch.float64, discrete=True)
    critic = Table(3, 4, seed=0)
    chosen = torch.tensor([3, 2, 1, 0, 3, 2])
    stacked = stacked_gradients(Critics(critic, critic, policy=lambda s: chosen.reshape(shape)), batch)
    rows = torch.arange(6)
    expected = central_differences(lambda s: critic(s)[rows, chosen], batch.next_observations)
    torch.testing.assert_close(stacked[:, :3], (1 - batch.terminals).unsqueeze(1) * expected, rtol=1e-7, atol=1e-8)


def test_with_an_encoder_the_gradient_is_taken_by_its_latent(
    batch: Transitions, make_critic: Callable[..., nn.Module]
) -> None:
    critic, target = (make_critic(4 + 2, seed=seed, dtype=torch.float64) for seed in (1, 2))
    encoder = nn.Sequential(nn.Linear(3, 4), nn.Tanh()).double()
    stacked = stacked_gradients(Critics(critic, target, encode=encoder), batch)
    assert stacked.shape == (12, 2 * (4 + 2))
    latent, next_latent = encoder(batch.observations).detach(), encoder(batch.next_observations).detach()
    assert_pair(
        stacked,
        central_differences(lambda s, a: target(s, a)[:, 0], next_latent, batch.next_actions),
        central_differences(lambda s, a: critic(s, a)[:, 0], latent, batch.actions),
        batch.terminals,
    )


def test_an_input_that_the_critic_does_not_read_has_gradient_zero(batch: Transitions) -> None:
    network = nn.Linear(3, 1, dtype=torch.float64)
    g = stacked_gradients(Critics(lambda s, a: network(s), lambda s, a: network(s)), batch)[:, 5:]
    assert torch.equal(g, torch.cat([network.weight.detach().expand(12, 3), torch.zeros(12, 2)], dim=1))


def test_gradients_are_the_same_under_no_grad(batch: Transitions, pair: tuple[nn.Module, nn.Module]) -> None:
    expected = stacked_gradients(Critics(*pair), batch)
    with torch.no_grad():
        assert torch.equal(stacked_gradients(Critics(*pair), batch), expected)


@pytest.mark.parametrize("read", [stacked_gradients, stacked_features])
@pytest.mark.parametrize("chunk_size", [1, 5, 12, 100])
def test_chunks_change_nothing(
    read: Callable[..., Tensor], chunk_size: int, batch: Transitions, pair: tuple[nn.Module, nn.Module]
) -> None:
    critics = Critics(*pair, policy=nn.Linear(3, 2, dtype=torch.float64))
    torch.testing.assert_close(
        read(critics, batch, chunk_size=chunk_size), read(critics, batch), rtol=1e-13, atol=1e-14
    )


# How many rows at once


class Pixels(nn.Module):
    """Q of small images and actions, by a convolution."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, channels, 3, padding=1)
        self.last = nn.Linear(channels * 64 + 2, 1)

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        hidden = torch.relu(self.convolution(observations / 255)).flatten(1)
        value: Tensor = self.last(torch.cat([hidden, actions], dim=1))
        return value


def pixels(rows: int) -> Transitions:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, rows, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return Transitions(
        observations=images[0],
        actions=torch.randn(rows, 2, generator=generator),
        rewards=torch.zeros(rows),
        next_observations=images[1],
        terminals=torch.zeros(rows),
    )


def with_free(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(c4buffer.memory, "free_bytes", lambda device: count)


def watched(critic: Callable[..., Any]) -> tuple[Callable[..., Any], list[int]]:
    """The critic, and the numbers of rows that it is called for."""
    calls: list[int] = []

    def calling(*inputs: Tensor) -> Any:
        calls.append(len(inputs[-1]))
        return critic(*inputs)

    return calling, calls


@pytest.mark.parametrize("read", [stacked_gradients, stacked_features])
@pytest.mark.parametrize("free", [0, 10_000, 100_000])
def test_scarce_memory_makes_small_chunks_and_the_same_answer(
    read: Callable[..., Tensor],
    free: int,
    pair: tuple[nn.Module, nn.Module],
    make_transitions: Callable[..., Transitions],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = make_transitions(200, dtype=torch.float64)
    expected = read(Critics(*pair), batch)
    with_free(monkeypatch, free)
    monkeypatch.setattr(c4buffer.critics, "FEW_ROWS", 0)
    rows = rows_for(Critics(*pair), batch, read.__name__.removeprefix("stacked_"))
    assert 1 <= rows <= 150
    assert (rows == 1) == (free < 100_000)
    critic, calls = watched(pair[0])

    def features(member: Any, s: Tensor, a: Tensor) -> Tensor:
        calls.append(len(a))
        value: Tensor = (pair[0] if member is critic else member).features(s, a)
        return value

    critics = Critics(critic, pair[1], features=features)
    found = read(critics, batch)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)
    assert max(calls[-(200 // rows) :]) <= rows


def test_with_memory_to_spare_the_cache_decides(
    pair: tuple[nn.Module, nn.Module], make_transitions: Callable[..., Transitions], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(monkeypatch, 1 << 50)
    batch = make_transitions(5000, dtype=torch.float64)
    critic, calls = watched(pair[0])
    stacked_gradients(Critics(critic, pair[1]), batch)
    assert calls[-2:] == [4096, 904]
    assert rows_for(Critics(*pair), batch) == 4096


def test_rows_are_fewer_where_a_critic_makes_more_of_each(
    make_critic: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(monkeypatch, 8 << 20)
    batch = pixels(32)

    def flat(network: nn.Module) -> Callable[..., Tensor]:
        return lambda s, a: network(s.flatten(1) / 255, a)

    small, large = (make_critic(3 * 64 + 2, hidden=hidden) for hidden in (8, 512))
    rows = [
        rows_for(Critics(critic, critic), batch)
        for critic in (flat(small), flat(large), Pixels(16), Pixels(64), [Pixels(64), Pixels(64)])
    ]
    assert rows == sorted(rows, reverse=True)
    assert len(set(rows)) == 5
    # the convolution's output alone, of critic and target, in floats
    assert rows[3] < (8 << 20) / 8 / (2 * 64 * 64 * 4)


@pytest.mark.parametrize("rows", [1, 15])
def test_few_rows_are_not_probed(rows: int, pair: tuple[nn.Module, nn.Module], batch: Transitions) -> None:
    critic, calls = watched(pair[0])
    assert rows_for(Critics(critic, pair[1]), batch[:rows]) == 4096
    assert calls == []


def test_discrete_actions_and_structured_observations_are_probed_too(
    make_transitions: Callable[..., Transitions], make_critic: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    discrete = make_transitions(100, 3, 4, dtype=torch.float64, discrete=True)
    table = Critics(Table(3, 4, seed=0), Table(3, 4, seed=1))
    images = pixels(100)
    speed = torch.randn(100, 2, generator=torch.Generator().manual_seed(1))
    structured = Transitions(
        observations={"image": images.observations, "speed": speed},
        actions=images.actions,
        rewards=images.rewards,
        next_observations={"speed": speed + 1, "image": images.next_observations},
        terminals=images.terminals,
    )
    convolution, vector = Pixels(), make_critic(4)
    of_dict = Critics(*[lambda s, a: convolution(s["image"], a) + vector(s["speed"], a)] * 2)
    for critics, batch in ((table, discrete), (of_dict, structured)):
        expected = stacked_gradients(critics, batch, chunk_size=100)
        with_free(monkeypatch, 1 << 40)
        assert rows_for(critics, batch) == 4096
        with_free(monkeypatch, 30_000)
        assert 1 <= rows_for(critics, batch) < 100
        torch.testing.assert_close(stacked_gradients(critics, batch), expected, rtol=1e-4, atol=1e-6)


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
    with_free(monkeypatch, 20_000)
    assert rows_for(critics, batch) < 64
    found = read(critics, batch)
    assert_same_footprint(before, footprint(networks))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(found, read(critics, batch, chunk_size=64), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("free", [20_000, 1 << 40])
def test_compiled_critics_are_probed_and_read_as_before(
    free: int,
    make_critic: Callable[..., nn.Module],
    make_transitions: Callable[..., Transitions],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_free(monkeypatch, free)
    critic, target = make_critic(seed=1), make_critic(seed=2)
    batch = make_transitions(50)
    compiled = Critics(torch.compile(critic, backend="eager"), torch.compile(target, backend="eager"))
    expected = stacked_gradients(Critics(critic, target), batch, chunk_size=50)
    for _ in range(2):
        torch.testing.assert_close(stacked_gradients(compiled, batch), expected, rtol=1e-5, atol=1e-6)
    assert rows_for(compiled, batch) == rows_for(Critics(critic, target), batch)


def test_what_is_wrong_with_a_critic_is_said_of_all_rows_not_of_those_probed(
    make_transitions: Callable[..., Transitions], make_critic: Callable[..., nn.Module]
) -> None:
    batch, critic = make_transitions(40), make_critic()
    wrong = [
        (lambda s, a: critic(s, a)[1:], "critic: expected [B], [B, 1], [n, B] or [n, B, 1] with B = 40"),
        (lambda s, a: critic(s, a) / 0, "critic: expected finite values, got "),
    ]
    for fails, message in wrong:
        assert rows_for(Critics(fails, critic), batch) == 4096
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            stacked_gradients(Critics(fails, critic), batch)
        assert "40" in str(caught.value)

    def raises(s: Tensor, a: Tensor) -> Tensor:
        raise RuntimeError(f"no such rows: {len(s)}")

    assert rows_for(Critics(raises, critic), batch) == 4096
    with pytest.raises(RuntimeError, match="no such rows: 40"):
        stacked_gradients(Critics(raises, critic), batch)


def test_features_of_a_critic_of_discrete_actions_may_be_of_the_observations_alone() -> None:
    class Alone(nn.Linear):
        def features(self, observations: Tensor) -> Tensor:
            return 2 * observations

    class Both(nn.Linear):
        def features(self, observations: Tensor, actions: Tensor) -> Tensor:
            return 2 * observations

    rows = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    batch = Transitions(
        observations=rows,
        actions=torch.zeros(6, dtype=torch.int64),
        rewards=rows[:, 0],
        next_observations=rows + 1,
        terminals=torch.zeros(6),
    )
    for critic in (Alone(3, 2), Both(3, 2)):
        assert torch.equal(stacked_features(Critics(critic, critic), batch), torch.cat([2 * rows + 2, 2 * rows], dim=1))


def test_features_need_no_critic_that_can_be_differentiated(make_transitions: Callable[..., Transitions]) -> None:
    class Features(nn.Module):
        def features(self, observations: Tensor, actions: Tensor) -> Tensor:
            return torch.cat([observations, actions], dim=1)

    batch = make_transitions(40)
    found = stacked_features(Critics(Features(), Features()), batch)
    assert torch.equal(found[:, 5:], torch.cat([batch.observations, batch.actions], dim=1))


# Features


def test_features_are_those_of_the_target_then_of_the_critic(
    batch: Transitions, pair: tuple[nn.Module, nn.Module]
) -> None:
    critic, target = pair
    stacked = stacked_features(Critics(critic, target), batch)
    f = torch.tanh(torch.cat([batch.observations, batch.actions], dim=1) @ critic.first.weight.T + critic.first.bias)
    target_f = target.features(batch.next_observations, batch.next_actions)
    torch.testing.assert_close(stacked, torch.cat([target_f, f], dim=1).detach())
    assert not stacked.requires_grad
    ends = batch.terminals == 1
    assert bool((stacked[ends] != 0).all()), "features are not masked"


def test_features_of_an_ensemble_stand_side_by_side(batch: Transitions, make_critic: Callable[..., nn.Module]) -> None:
    members = [make_critic(seed=seed, dtype=torch.float64) for seed in range(4)]
    both = stacked_features(Critics(members[:2], nn.ModuleList(members[2:])), batch)
    single = [stacked_features(Critics(*pair), batch).chunk(2, dim=1) for pair in (members[::2], members[1::2])]
    expected = torch.cat([single[0][0], single[1][0], single[0][1], single[1][1]], dim=1)
    torch.testing.assert_close(both, expected)


def test_a_features_callable_is_called_for_each_member_with_encoded_states(
    batch: Transitions, make_critic: Callable[..., nn.Module]
) -> None:
    critic, target = (make_critic(4 + 2, seed=seed, dtype=torch.float64) for seed in (1, 2))
    encoder = nn.Linear(3, 4, dtype=torch.float64)
    critics = Critics(
        [critic], [target], encode=encoder, features=lambda member, s, a: 2 * member.first(torch.cat([s, a], dim=1))
    )
    x = torch.cat([encoder(batch.observations), batch.actions], dim=1)
    torch.testing.assert_close(stacked_features(critics, batch)[:, 8:], 2 * critic.first(x).detach())


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


@pytest.mark.parametrize("read", [stacked_gradients, stacked_features])
@pytest.mark.parametrize("chunk_size", [0, 1.5, True])
def test_a_chunk_has_at_least_one_row(
    read: Callable[..., Tensor], chunk_size: Any, batch: Transitions, pair: tuple[nn.Module, nn.Module]
) -> None:
    with pytest.raises(ValueError, match="chunk_size: expected an integer of at least 1, got"):
        read(Critics(*pair), batch, chunk_size=chunk_size)


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
