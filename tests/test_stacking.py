"""Pairs of gradients and of features, read off critics some rows at a time."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import c4buffer.memory
import c4buffer.stacking
from c4buffer import CovariancePenalty, Critics, Transitions, stacked_features, stacked_gradients
from c4buffer.stacking import rows_for


@pytest.fixture
def batch(make_transitions: Callable[..., Transitions]) -> Transitions:
    """12 float64 transitions, every fifth terminal."""
    return make_transitions(12, dtype=torch.float64)


@pytest.mark.parametrize("read", [stacked_gradients, stacked_features])
@pytest.mark.parametrize("chunk_size", [1, 5, 12, 100])
def test_chunks_change_nothing(
    read: Callable[..., Tensor], chunk_size: int, batch: Transitions, pair: tuple[nn.Module, nn.Module]
) -> None:
    critics = Critics(*pair, policy=nn.Linear(3, 2, dtype=torch.float64))
    torch.testing.assert_close(
        read(critics, batch, chunk_size=chunk_size), read(critics, batch), rtol=1e-13, atol=1e-14
    )


@pytest.mark.parametrize("read", [stacked_gradients, stacked_features])
@pytest.mark.parametrize("chunk_size", [0, 1.5, True])
def test_a_chunk_has_at_least_one_row(
    read: Callable[..., Tensor], chunk_size: Any, batch: Transitions, pair: tuple[nn.Module, nn.Module]
) -> None:
    with pytest.raises(ValueError, match="chunk_size: expected an integer of at least 1, got"):
        read(Critics(*pair), batch, chunk_size=chunk_size)


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
    monkeypatch.setattr(c4buffer.stacking, "FEW_ROWS", 0)
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
    table = Critics(*[make_critic(3, outputs=4, seed=seed, dtype=torch.float64) for seed in (0, 1)])
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


def test_features_of_bytes_of_an_image_are_those_of_its_numbers() -> None:
    class Convolved(Pixels):
        def features(self, observations: Tensor, actions: Tensor) -> Tensor:
            hidden = torch.relu(self.convolution(observations / 255)).flatten(1)
            return torch.cat([hidden, actions], dim=1)

        def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
            value: Tensor = self.last(self.features(observations, actions))
            return value

    critics, batch = Critics(Convolved(), Convolved()), pixels(20)
    assert isinstance(batch.observations, Tensor)
    assert isinstance(batch.next_observations, Tensor)
    numbers = batch.replace(observations=batch.observations.float(), next_observations=batch.next_observations.float())
    assert torch.equal(stacked_features(critics, batch), stacked_features(critics, numbers))
    penalty = CovariancePenalty(1.0, kind="feature")
    assert torch.equal(penalty(critics, batch), penalty(critics, numbers))

    taken: list[torch.dtype] = []

    def own(critic: nn.Module, observations: Tensor, actions: Tensor) -> Tensor:
        taken.append(observations.dtype)
        return actions

    stacked_features(Critics(Convolved(), Convolved(), features=own), batch)
    assert set(taken) == {torch.float32}


def test_features_need_no_critic_that_can_be_differentiated(make_transitions: Callable[..., Transitions]) -> None:
    class Features(nn.Module):
        def features(self, observations: Tensor, actions: Tensor) -> Tensor:
            return torch.cat([observations, actions], dim=1)

    batch = make_transitions(40)
    found = stacked_features(Critics(Features(), Features()), batch)
    assert torch.equal(found[:, 5:], torch.cat([batch.observations, batch.actions], dim=1))
