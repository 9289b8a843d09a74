"""Gradients read off critics of every form, against finite differences."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from c4buffer import CovariancePenalty, Critics, Transitions, diagnose, stacked_gradients

from .conftest import MakeCritic, MakeTransitions

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


def test_transitions_made_in_inference_mode_have_gradients() -> None:
    rows = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    critic = torch.nn.Bilinear(3, 2, 1)

    def made() -> Transitions:
        return Transitions(
            observations=rows.clone(),
            actions=rows[:, :2].clone(),
            rewards=rows[:, 0].clone(),
            next_observations=rows.clone(),
            terminals=torch.zeros(6),
        )

    critics = Critics(critic, critic)
    with torch.inference_mode():
        batch = made()
    assert torch.equal(stacked_gradients(critics, batch), stacked_gradients(critics, made()))
    assert torch.equal(CovariancePenalty(1.0)(critics, batch), CovariancePenalty(1.0)(critics, made()))
    features = Critics(critic, critic, features=lambda network, s, a: network(s, a))
    penalties = [CovariancePenalty(1.0, kind="feature")(features, each) for each in (batch, made())]
    assert torch.equal(*penalties)
    penalties[0].backward()
    assert diagnose(critics, batch).variance_cosine == diagnose(critics, made()).variance_cosine


def test_discrete_transitions_made_in_inference_mode_have_gradients(
    make_transitions: MakeTransitions, make_critic: MakeCritic
) -> None:
    critic = make_critic(3, outputs=2)
    critics = Critics(critic, critic)
    with torch.inference_mode():
        batch = make_transitions(6, discrete=True)
    usual = make_transitions(6, discrete=True)
    assert batch.actions.is_inference()
    assert torch.equal(stacked_gradients(critics, batch), stacked_gradients(critics, usual))
    assert torch.equal(CovariancePenalty(1.0)(critics, batch), CovariancePenalty(1.0)(critics, usual))


def test_a_policy_of_discrete_actions_may_return_any_whole_numbers(
    make_transitions: MakeTransitions, make_critic: MakeCritic
) -> None:
    batch, critic = make_transitions(6, discrete=True), make_critic(3, outputs=2)
    policies = [lambda s: 1 - batch.next_actions, lambda s: (1 - batch.next_actions).short()]
    found = [stacked_gradients(Critics(critic, critic, policy=policy), batch) for policy in policies]
    assert torch.equal(*found)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("discrete", [False, True])
def test_a_critic_that_squeezes_its_values_is_read_whatever_the_number_of_rows(
    rows: int, discrete: bool, make_transitions: MakeTransitions, make_critic: MakeCritic
) -> None:
    batch = make_transitions(rows, discrete=discrete)
    network = make_critic(3 if discrete else 5, outputs=2 if discrete else 1)
    squeezed = Critics(lambda *x: network(*x).squeeze(), lambda *x: network(*x).squeeze())
    found = [stacked_gradients(each, batch, chunk_size=2) for each in (squeezed, Critics(network, network))]
    torch.testing.assert_close(*found)


def test_values_that_depend_on_neither_input_are_refused(batch: Transitions, pair: tuple[nn.Module, nn.Module]) -> None:
    network, _ = pair
    message = "^critic: expected values that depend on observations or actions, got values that depend on neither$"
    with pytest.raises(ValueError, match=message):
        stacked_gradients(Critics(lambda s, a: network(s.detach(), a.detach()), network), batch)
    values = [network(batch.observations, batch.actions)]  # before the inputs require gradients
    batch = batch.replace(observations=batch.observations.requires_grad_(), actions=batch.actions.requires_grad_())
    with pytest.raises(ValueError, match="^values: expected values that depend on observations or actions"):
        CovariancePenalty(1.0)(Critics(network, network), batch, values=values)
