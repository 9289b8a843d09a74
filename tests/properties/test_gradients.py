"""Gradients read off quadratic critics, whose closed form is known: g = (M + M^T) x + b."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from c4buffer import Critics, Transitions, stacked_features, stacked_gradients

seeds = st.integers(0, 2**31)
dtypes = st.sampled_from([torch.float32, torch.float64])
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-12}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Quadratic(nn.Module):
    """Q(x)[k] = x^T M_k x + b_k^T x, of x = (s, a), or of x = s for each action k where there are several.

    Its normalisation does nothing in eval mode, its dropout neither; in training mode both do, and one leaves traces.
    """

    def __init__(self, dimensions: int, seed: int, dtype: torch.dtype, *, outputs: int = 1) -> None:
        super().__init__()
        self.M = nn.Parameter(normal(seed, outputs, dimensions, dimensions).to(dtype))
        self.b = nn.Parameter(normal(seed + 1, outputs, dimensions).to(dtype))
        self.norm = nn.BatchNorm1d(dimensions, eps=0.0, affine=False, dtype=dtype)
        self.drop = nn.Dropout(0.5)

    def features(self, observations: Tensor, actions: Tensor | None = None) -> Tensor:
        return torch.einsum("bi,ij->bj", self.read(observations, actions), self.M[0])

    def read(self, observations: Tensor, actions: Tensor | None) -> Tensor:
        x: Tensor = self.norm(observations if actions is None else torch.cat([observations, actions], dim=1))
        return self.drop(x)

    def forward(self, observations: Tensor, actions: Tensor | None = None) -> Tensor:
        x = self.read(observations, actions)
        return torch.einsum("bi,kij,bj->bk", x, self.M, x) + x @ self.b.T

    def gradient(self, x: Tensor, actions: Tensor | None = None) -> Tensor:
        """In closed form and float64, [B, D]; of the values at these actions, where they are discrete."""
        M, b, x = self.M.detach().double(), self.b.detach().double(), x.double()
        k = torch.zeros(len(x), dtype=torch.int64) if actions is None else actions
        return torch.einsum("bij,bj->bi", (M + M.mT)[k], x) + b[k]


def in_form(form: str, members: list[Quadratic]) -> Any:
    """One ensemble in the forms that `Critics` takes."""
    forms: dict[str, Callable[[], Any]] = {
        "list": lambda: members,
        "tuple": lambda: tuple(members),
        "ModuleList": lambda: nn.ModuleList(members),
        "[n, B]": lambda: lambda s, a: torch.stack([member(s, a)[:, 0] for member in members]),
        "[n, B, 1]": lambda: lambda s, a: torch.stack([member(s, a) for member in members]),
        "list of [B]": lambda: lambda s, a: [member(s, a)[:, 0] for member in members],
    }
    return forms[form]()


@dataclass
class Case:
    members: list[Quadratic]
    targets: list[Quadratic]
    batch: Transitions
    critics: Critics

    def inputs(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """x and x', [B, D], and a and a' where these are not in them."""
        batch, policy = self.batch, self.critics.policy
        next_actions = batch.next_actions if policy is None else policy(batch.next_observations)
        if not batch.actions.is_floating_point():
            return batch.observations, batch.next_observations, batch.actions, next_actions
        x, next_x = (
            torch.cat(pair, dim=1)
            for pair in ((batch.observations, batch.actions), (batch.next_observations, next_actions))
        )
        return x, next_x, None, None

    def expected(self) -> Tensor:
        """[g', g] in closed form: means over members, g' zero at ends."""
        x, next_x, actions, next_actions = self.inputs()
        g = torch.stack([member.gradient(x, actions) for member in self.members]).mean(dim=0)
        target_g = torch.stack([target.gradient(next_x, next_actions) for target in self.targets]).mean(dim=0)
        return torch.cat([target_g * (1 - self.batch.terminals.double()).unsqueeze(1), g], dim=1)


@st.composite
def cases(draw: st.DrawFn, *, discrete: bool | None = None, form: str | None = None) -> Case:
    discrete = draw(st.booleans()) if discrete is None else discrete
    sequences = ["list", "tuple", "ModuleList"]
    form = form or draw(st.sampled_from(sequences if discrete else [*sequences, "[n, B]", "[n, B, 1]", "list of [B]"]))
    rows, observation_dim, action_dim = draw(st.integers(1, 25)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    seed, dtype = draw(seeds), draw(dtypes)
    ends = draw(st.sampled_from([0.0, 0.2, 1.0]))

    def actions_of(seed: int) -> Tensor:
        values = normal(seed, rows, action_dim)
        return values.argmax(dim=1) if discrete else values.to(dtype)

    batch = Transitions(
        observations=normal(seed, rows, observation_dim).to(dtype),
        actions=actions_of(seed + 1),
        rewards=torch.zeros(rows, dtype=dtype),
        next_observations=normal(seed + 2, rows, observation_dim).to(dtype),
        terminals=torch.rand(rows, generator=torch.Generator().manual_seed(seed)) < ends,
        next_actions=actions_of(seed + 3),
    )
    policy: Callable[[Any], Tensor] | None = None
    if draw(st.booleans()):

        def policy(observations: Tensor) -> Tensor:
            first = observations[:, :1]
            return (
                (first[:, 0] > 0).long().clamp(max=action_dim - 1) if discrete else first.sin().expand(-1, action_dim)
            )

    width, outputs = (observation_dim, action_dim) if discrete else (observation_dim + action_dim, 1)
    members, targets = (
        [Quadratic(width, seed + 10 * i + first, dtype, outputs=outputs) for i in range(draw(st.integers(1, 3)))]
        for first in (4, 6)
    )
    return Case(members, targets, batch, Critics(in_form(form, members), in_form(form, targets), policy=policy))


@given(case=cases(), chunk_size=st.integers(1, 30))
def test_gradients_are_those_in_closed_form_whatever_the_chunks(case: Case, chunk_size: int) -> None:
    found, dtype = stacked_gradients(case.critics, case.batch), case.batch.rewards.dtype
    assert found.dtype == dtype
    assert not found.requires_grad
    scale = 1 + float(case.expected().abs().max())
    atol = TOLERANCE[dtype] * scale
    torch.testing.assert_close(found.double(), case.expected(), rtol=0, atol=atol)
    assert not found[case.batch.terminals == 1].chunk(2, dim=1)[0].any(), "g' is masked at ends, exactly"
    chunked = stacked_gradients(case.critics, case.batch, chunk_size=chunk_size)
    torch.testing.assert_close(chunked, found, rtol=0, atol=64 * torch.finfo(dtype).eps * scale)


@given(case=cases(), data=st.data())
def test_each_row_has_its_own_gradient_whatever_rows_come_with_it(case: Case, data: st.DataObject) -> None:
    everything = stacked_gradients(case.critics, case.batch)
    row = st.integers(0, len(case.batch) - 1)
    rows = torch.tensor(data.draw(st.permutations(range(len(case.batch))) | st.lists(row, min_size=1, max_size=30)))
    found = stacked_gradients(case.critics, case.batch[rows])
    scale = 1 + float(everything.abs().max())
    torch.testing.assert_close(found, everything[rows], rtol=0, atol=64 * torch.finfo(found.dtype).eps * scale)


@given(case=cases(form="list"))
def test_an_ensemble_has_the_mean_of_its_members_gradients(case: Case) -> None:
    policy = case.critics.policy

    def half(members: list[Quadratic], which: int) -> Tensor:
        alone = [
            stacked_gradients(Critics(member, member, policy=policy), case.batch).chunk(2, dim=1)[which]
            for member in members
        ]
        return torch.stack(alone).mean(dim=0)

    found = stacked_gradients(case.critics, case.batch)
    expected = torch.cat([half(case.targets, 0), half(case.members, 1)], dim=1)
    scale = 1 + float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=64 * torch.finfo(found.dtype).eps * scale)


@pytest.mark.parametrize("read", [stacked_gradients, stacked_features])
@given(
    case=cases(discrete=False, form="list"),
    chunk_size=st.integers(1, 30),
    modes=st.lists(st.booleans(), min_size=18, max_size=18),
    with_gradients=st.booleans(),
    frozen=st.booleans(),
    enabled=st.booleans(),
)
def test_networks_batch_and_generators_are_left_as_they_were(
    read: Callable[..., Tensor],
    case: Case,
    chunk_size: int,
    modes: list[bool],
    with_gradients: bool,
    frozen: bool,
    enabled: bool,
) -> None:
    networks = nn.ModuleList([*case.members, *case.targets])
    for module, mode in zip(networks.modules(), modes * 2):
        module.training = mode
    for position, parameter in enumerate(networks.parameters()):
        parameter.grad = torch.full_like(parameter, position) if with_gradients else None
        parameter.requires_grad_(not frozen)
    columns = [leaf.clone() for leaf in (case.batch.observations, case.batch.actions, case.batch.next_actions)]
    training = [module.training for module in networks.modules()]
    state, generator = copy.deepcopy(networks.state_dict()), torch.get_rng_state()

    with torch.set_grad_enabled(enabled):
        read(case.critics, case.batch, chunk_size=chunk_size)

    assert [module.training for module in networks.modules()] == training
    torch.testing.assert_close(networks.state_dict(), state, rtol=0, atol=0)
    for position, parameter in enumerate(networks.parameters()):
        assert parameter.requires_grad != frozen
        if with_gradients:
            assert parameter.grad is not None
            assert bool((parameter.grad == position).all())
        else:
            assert parameter.grad is None
    for leaf, before in zip((case.batch.observations, case.batch.actions, case.batch.next_actions), columns):
        assert torch.equal(leaf, before)
        assert not leaf.requires_grad
    assert torch.equal(torch.get_rng_state(), generator)


@given(case=cases(discrete=False, form="list"), chunk_size=st.integers(1, 30), data=st.data())
def test_features_stand_side_by_side_those_of_the_targets_first(
    case: Case, chunk_size: int, data: st.DataObject
) -> None:
    found = stacked_features(case.critics, case.batch)
    x, next_x, _, _ = case.inputs()
    sides = [(next_x, case.targets), (x, case.members)]
    expected = torch.cat([x @ member.M.detach()[0] for x, members in sides for member in members], dim=1)
    tolerance = 64 * torch.finfo(found.dtype).eps * (1 + float(expected.abs().max()))
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    chunked = stacked_features(case.critics, case.batch, chunk_size=chunk_size)
    torch.testing.assert_close(chunked, found, rtol=0, atol=tolerance)
    rows = torch.tensor(data.draw(st.permutations(range(len(case.batch)))))
    torch.testing.assert_close(stacked_features(case.critics, case.batch[rows]), found[rows], rtol=0, atol=tolerance)
