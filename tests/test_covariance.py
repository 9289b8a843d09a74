"""The cross-covariance, its decomposition, and the penalty on it: recorded numbers, closed forms, invariances."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from c4buffer import (
    CovariancePenalty,
    Critics,
    Transitions,
    covariance_penalty,
    cross_covariance,
    decompose_cross_covariance,
    stacked_gradients,
)

GOLDEN = Path(__file__).parent / "golden" / "official_c4.npz"
SCALES: tuple[Any, ...] = ("raw", "relative", "correlation")
few_examples = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def gradients_of(penalty: Tensor, network: nn.Module) -> list[Tensor]:
    """By each parameter; zeros where there is no path."""
    parameters = list(network.parameters())
    found = torch.autograd.grad(penalty, parameters, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if gradient is None else gradient for p, gradient in zip(parameters, found)]


def plain_gradient(critic: nn.Module, observations: Tensor, actions: Tensor) -> Tensor:
    """Of w tanh(W x + b) + c by x in closed form: W^T (w (1 - tanh^2)), [B, D]."""
    h = torch.tanh(torch.cat([observations, actions], dim=1) @ critic.first.weight.T + critic.first.bias)
    return ((1 - h**2) * critic.last.weight[0]) @ critic.first.weight


def plain_penalty(critic: nn.Module, target: nn.Module, batch: Transitions, *, beta: float, scale: str) -> Tensor:
    """What CovariancePenalty(1.0) is for one critic, written out from the formulas."""
    g = plain_gradient(critic, batch.observations, batch.actions)
    target_g = plain_gradient(target, batch.next_observations, batch.next_actions).detach()
    target_g = target_g * (1 - batch.terminals).unsqueeze(1)
    rows = len(batch)
    centred, target_centred = g - g.sum(0) / rows, target_g - target_g.sum(0) / rows
    c = torch.einsum("bi,bj->ij", target_centred, centred) / (rows - 1)
    p = (c**2).sum() + beta * sum(c[i, i] for i in range(len(c))) ** 2
    if scale == "raw":
        return p
    trace, target_trace = (centred**2).sum() / (rows - 1), (target_centred**2).sum() / (rows - 1)
    next_q = target(batch.next_observations, batch.next_actions).detach()
    value_variance = ((next_q - next_q.mean()) ** 2).sum() / (rows - 1)
    return p / (target_trace * (trace.detach() if scale == "relative" else trace)) * value_variance


class Times(nn.Module):
    """exp(log_factor) Q(x / unit): a critic in other units."""

    def __init__(self, critic: nn.Module, *, factor: float = 1.0, unit: float = 1.0) -> None:
        super().__init__()
        self.critic = critic
        self.log_factor = nn.Parameter(torch.tensor(factor, dtype=torch.float64).log())
        self.unit = unit

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        value: Tensor = self.critic(observations / self.unit, actions / self.unit)
        return self.log_factor.exp().to(value) * value


@pytest.fixture
def batch(make_transitions: Callable[..., Transitions]) -> Transitions:
    """16 float64 transitions, every fifth terminal."""
    return make_transitions(16, dtype=torch.float64)


# The published code


class RecordedCritic(nn.Module):
    """A recorded network: Linear, LayerNorm where there, ReLU; and a linear head."""

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        names = {int(name.split(".")[2]): name for name in parameters if name.endswith("weight") and "model" in name}
        layers: list[nn.Module] = []
        for position in range(max(names) + 2):
            if position not in names:
                layers.append(nn.ReLU())
                continue
            weight = parameters[names[position]]
            layers.append(nn.Linear(*reversed(weight.shape)) if weight.ndim == 2 else nn.LayerNorm(len(weight)))
        self.backbone = nn.ModuleDict({"model": nn.Sequential(*layers)})
        self.last = nn.Linear(parameters["last.weight"].shape[1], 1)
        self.load_state_dict(parameters)

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        value: Tensor = self.last(self.features(observations, actions))
        return value

    def features(self, observations: Tensor, actions: Tensor) -> Tensor:
        hidden: Tensor = self.backbone["model"](torch.cat([observations, actions], dim=1))
        return hidden


@pytest.mark.parametrize("kind", ["gradient", "feature"])
@pytest.mark.parametrize("case", ["case0", "case1", "case2"])
def test_the_penalty_and_its_gradients_are_those_recorded_from_the_published_code(case: str, kind: Any) -> None:
    with np.load(GOLDEN) as archive:
        recorded = {key: torch.from_numpy(archive[key]) for key in archive.files if key.startswith(case)}

    def under(prefix: str) -> dict[str, Tensor]:
        prefix = f"{case}/{prefix}"
        return {key.removeprefix(prefix): value for key, value in recorded.items() if key.startswith(prefix)}

    inputs = under("batch.")
    batch = Transitions(
        observations=inputs["obs"],
        actions=inputs["act"],
        rewards=torch.zeros(len(inputs["obs"])),
        next_observations=inputs["next_obs"],
        terminals=torch.zeros(len(inputs["obs"])),
        next_actions=inputs["next_act"],
    )
    critic, target = RecordedCritic(under("critic.")), RecordedCritic(under("target."))
    penalty = CovariancePenalty(1.0, trace_weight=1.0, kind=kind)(Critics(critic, target), batch)
    assert penalty.item() == pytest.approx(recorded[f"{case}/penalty.{kind}"].item(), rel=1e-4)

    expected = under(f"penalty.{kind}.grad.")
    assert set(expected) == {name for name, _ in critic.named_parameters()}
    for (name, _), gradient in zip(critic.named_parameters(), gradients_of(penalty, critic)):
        largest = expected[name].abs().max().item()
        zero = 1e-9  # the last LayerNorm's bias moves no slope; 5e-32 is recorded for it
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4 * largest + zero, msg=name)


# Cross-covariance and Theorem 2


def test_cross_covariance_is_the_off_diagonal_block_of_numpys() -> None:
    generator = torch.Generator().manual_seed(0)
    target_g, g = torch.randn(2, 9, 4, generator=generator, dtype=torch.float64).unbind()
    both = np.cov(np.concatenate([target_g, g], axis=1), rowvar=False)
    np.testing.assert_allclose(cross_covariance(target_g, g), both[:4, 4:], rtol=1e-12)


@pytest.mark.parametrize("columns", [5, 8, 9, 40])
def test_the_penalty_of_wide_gradients_is_that_of_the_covariance_they_would_have(columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    target_g, g = torch.randn(2, 8, columns, generator=generator, dtype=torch.float64)
    g.requires_grad_()
    c = cross_covariance(target_g, g)
    expected = (c**2).sum() + 0.7 * c.trace() ** 2
    found = covariance_penalty(target_g, g, trace_weight=0.7)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(found, g), torch.autograd.grad(expected, g), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("trace_weight", "expected"), [(0.0, 40.0), (0.5, 58.0), (1.0, 76.0)])
def test_covariance_penalty_by_hand(trace_weight: float, expected: float) -> None:
    target_g, g = torch.tensor([[0.0, 0.0], [2.0, 4.0]]), torch.tensor([[1.0, 0.0], [3.0, 2.0]])
    # centred: -+[1, 2] and -+[1, 1]; C = 2 [1, 2]^T [1, 1] / (2 - 1); |C|_F^2 = 40, tr C = 6
    assert cross_covariance(target_g, g).tolist() == [[2, 2], [4, 4]]
    assert covariance_penalty(target_g, g, trace_weight=trace_weight).item() == expected


def test_the_trace_counts_fully_by_default() -> None:
    target_g, g = torch.tensor([[0.0, 0.0], [2.0, 4.0]]), torch.tensor([[1.0, 0.0], [3.0, 2.0]])
    assert covariance_penalty(target_g, g).item() == 76


@pytest.mark.parametrize("function", [cross_covariance, covariance_penalty])
def test_pairs_that_do_not_fit_are_refused(function: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match=r"^gradients: expected a tensor \[B, D\], got ndarray$"):
        function(torch.zeros(3, 2), np.zeros((3, 2)))
    shapes = re.escape("target_gradients and gradients: expected one shape [B, D], got [3, 2] and [3, 4]")
    with pytest.raises(ValueError, match=shapes):
        function(torch.zeros(3, 2), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="gradients: expected at least two rows, or there is no covariance, got 1"):
        function(torch.zeros(1, 2), torch.zeros(1, 2))


@st.composite
def pairs_and_responsibilities(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    rows, dimensions, clusters = draw(st.integers(2, 40)), draw(st.integers(1, 6)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    target_g, g = torch.randn(2, rows, dimensions, generator=generator, dtype=torch.float64).unbind()
    target_g = 10 ** draw(st.floats(-3, 3)) * target_g
    logits = 3 * torch.randn(rows, clusters, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):  # hard labels, where clusters can be empty
        return target_g, g, nn.functional.one_hot(logits.argmax(dim=1), clusters).double()
    return target_g, g, logits.softmax(dim=1)


@few_examples
@given(pairs_and_responsibilities())
def test_theorem_2_holds_to_rounding_and_its_parts_are_what_they_say(data: tuple[Tensor, Tensor, Tensor]) -> None:
    target_g, g, r = data
    total, within, between = decompose_cross_covariance(target_g, g, r)
    size = (target_g.norm() * g.norm() / len(g)).item()
    torch.testing.assert_close(within + between, total, rtol=0, atol=1e-12 * size)
    torch.testing.assert_close(total, cross_covariance(target_g, g) * (len(g) - 1) / len(g), rtol=0, atol=1e-12 * size)

    both, half = np.concatenate([target_g, g], axis=1), g.shape[1]
    expected = np.zeros((half, half))
    for z in range(r.shape[1]):
        if r[:, z].sum() > 0:
            cov = np.cov(both, rowvar=False, ddof=0, aweights=r[:, z])
            expected += r[:, z].mean().item() * np.atleast_2d(cov)[:half, half:]
    np.testing.assert_allclose(within, expected, rtol=0, atol=1e-12 * size)


def test_one_cluster_has_nothing_between() -> None:
    target_g, g = torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind()
    total, within, between = decompose_cross_covariance(target_g, g, torch.ones(20, 1, dtype=torch.float64))
    torch.testing.assert_close(within, total)
    assert between.norm().item() < 1e-15


def test_decomposition_takes_responsibilities_in_another_precision() -> None:
    target_g, g = torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(0)).unbind()
    r = torch.softmax(torch.randn(20, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64), dim=1)
    for part, expected in zip(
        decompose_cross_covariance(target_g, g, r), decompose_cross_covariance(target_g, g, r.float()), strict=True
    ):
        torch.testing.assert_close(part, expected)


def test_decomposition_refuses_responsibilities_of_other_rows() -> None:
    with pytest.raises(ValueError, match=re.escape("[N, K] with N = 3, got torch.float32 [4, 2]")):
        decompose_cross_covariance(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="responsibilities: expected values from 0, rows that sum to one, got rows"):
        decompose_cross_covariance(torch.zeros(3, 2), torch.zeros(3, 2), torch.ones(3, 2))


@few_examples
@given(pairs_and_responsibilities())
def test_eq_10_the_traces_bound_the_norm_and_the_norm_every_direction(data: tuple[Tensor, Tensor, Tensor]) -> None:
    target_g, g, _ = data
    c = cross_covariance(target_g, g)
    norm = torch.linalg.matrix_norm(c, ord=2)
    bound = (target_g.var(dim=0).sum() * g.var(dim=0).sum()).sqrt()
    directions = nn.functional.normalize(g, dim=1)
    assert norm <= bound * (1 + 1e-12)
    assert (directions @ c @ directions.T).abs().max() <= norm * (1 + 1e-12)


# The penalty: value and gradient


@pytest.mark.parametrize("beta", [0.0, 0.7])
@pytest.mark.parametrize("scale", SCALES)
def test_value_and_parameter_gradients_agree_with_the_formulas_written_out(
    scale: Any, beta: float, batch: Transitions, pair: tuple[nn.Module, nn.Module]
) -> None:
    critic, target = pair
    penalty = CovariancePenalty(0.3, trace_weight=beta, scale=scale)(Critics(critic, target), batch)
    expected = 0.3 * plain_penalty(critic, target, batch, beta=beta, scale=scale)
    torch.testing.assert_close(penalty, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradients_of(penalty, critic), gradients_of(expected, critic), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", ["raw", "correlation"])
def test_parameter_gradients_agree_with_finite_differences(
    scale: Any, batch: Transitions, pair: tuple[nn.Module, nn.Module]
) -> None:
    critic, _ = pair
    penalty, critics, step = CovariancePenalty(1.0, scale=scale), Critics(*pair), 1e-5
    for parameter, gradient in zip(critic.parameters(), gradients_of(penalty(critics, batch), critic)):
        flat = parameter.data.view(-1)
        for entry in range(0, len(flat), 7):
            values = []
            for sign in (1, -1):
                flat[entry] += sign * step
                values.append(penalty(critics, batch).item())
                flat[entry] -= sign * step
            difference = (values[0] - values[1]) / (2 * step)
            assert gradient.view(-1)[entry].item() == pytest.approx(difference, rel=1e-6, abs=1e-9)


def test_raw_is_the_pure_function_of_the_stacked_gradients(
    batch: Transitions, pair: tuple[nn.Module, nn.Module]
) -> None:
    critics = Critics(*pair, policy=nn.Linear(3, 2, dtype=torch.float64))
    expected = 0.2 * covariance_penalty(*stacked_gradients(critics, batch).chunk(2, dim=1), trace_weight=3.0)
    torch.testing.assert_close(CovariancePenalty(0.2, trace_weight=3.0)(critics, batch).detach(), expected)


def test_feature_penalty_is_the_mean_inner_product_and_not_masked(
    batch: Transitions, pair: tuple[nn.Module, nn.Module]
) -> None:
    critic, target = pair
    penalty = CovariancePenalty(0.3, kind="feature")(Critics(critic, target), batch)
    f = critic.features(batch.observations, batch.actions)
    target_f = target.features(batch.next_observations, batch.next_actions).detach()
    expected = 0.3 * sum((a @ b for a, b in zip(f, target_f)), start=torch.zeros(())) / len(batch)
    torch.testing.assert_close(penalty, expected)
    torch.testing.assert_close(gradients_of(penalty, critic), gradients_of(expected, critic))


@pytest.mark.parametrize("scale", SCALES)
def test_discrete_actions_are_gathered(scale: Any, make_transitions: Callable[..., Transitions]) -> None:
    batch = make_transitions(16, 3, 4, dtype=torch.float64, discrete=True)
    critic, target = (nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)).double() for _ in range(2))

    def gathered(network: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda s, a: network(s)[torch.arange(16), a[:, 0].long()] + 0 * a[:, 0]

    # The same critics of continuous actions, of which they read the index; its gradient is zero.
    continuous = Transitions.unchecked(
        {
            **dict(batch.columns()),
            "actions": batch.actions.double().unsqueeze(1),
            "next_actions": batch.next_actions.double().unsqueeze(1),
        }
    )
    penalty = CovariancePenalty(1.0, scale=scale)
    expected = penalty(Critics(gathered(critic), gathered(target)), continuous)
    found = penalty(Critics(critic, target), batch)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients_of(found, critic), gradients_of(expected, critic))


@pytest.mark.parametrize(("kind", "scale"), [*(("gradient", scale) for scale in SCALES), ("feature", "raw")])
def test_only_the_critic_receives_a_gradient(kind: Any, scale: Any, batch: Transitions) -> None:
    encoder, policy = nn.Linear(3, 3, dtype=torch.float64), nn.Linear(3, 2, dtype=torch.float64)
    critic, target = (nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).double() for _ in range(2))

    def reading(network: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda s, a: network(torch.cat([s, a], dim=1))

    critics = Critics(
        reading(critic),
        reading(target),
        policy=policy,
        encode=encoder,
        features=lambda member, s, a: (critic if member is critics.critic else target)[:2](torch.cat([s, a], dim=1)),
    )
    CovariancePenalty(1.0, kind=kind, scale=scale)(critics, batch).backward()
    assert critic[0].weight.grad is not None
    assert bool((critic[0].weight.grad != 0).any())
    for network in (target, policy, encoder):
        assert all(parameter.grad is None for parameter in network.parameters())
    assert not batch.observations.requires_grad


def test_a_critic_that_is_its_own_target_is_moved_as_critic_only(
    batch: Transitions, pair: tuple[nn.Module, nn.Module]
) -> None:
    critic, _ = pair
    for scale in SCALES:
        penalty = CovariancePenalty(1.0, scale=scale)
        alone, copied = (penalty(Critics(critic, target), batch) for target in (critic, copy.deepcopy(critic)))
        torch.testing.assert_close(gradients_of(alone, critic), gradients_of(copied, critic))


# Ensembles


def in_form(form: str, members: list[nn.Module]) -> Any:
    return {
        "list": members,
        "ModuleList": nn.ModuleList(members),
        "[n, B]": lambda s, a: torch.stack([member(s, a)[:, 0] for member in members]),
        "list of [B, 1]": lambda s, a: [member(s, a) for member in members],
    }[form]


@pytest.mark.parametrize("form", ["list", "ModuleList", "[n, B]", "list of [B, 1]"])
@pytest.mark.parametrize("scale", SCALES)
def test_an_ensemble_sums_over_its_pairs(
    scale: Any, form: str, batch: Transitions, make_critic: Callable[..., nn.Module]
) -> None:
    members, targets = (
        [make_critic(seed=seed, dtype=torch.float64) for seed in seeds] for seeds in ((1, 2, 3), (4, 5, 6))
    )
    penalty = CovariancePenalty(0.5, scale=scale)
    found = penalty(Critics(in_form(form, members), in_form(form, targets)), batch)
    single = torch.stack([penalty(Critics(*pair), batch) for pair in zip(members, targets)]).sum()
    torch.testing.assert_close(found, single)
    for member in members:
        torch.testing.assert_close(gradients_of(found, member), gradients_of(single, member))


def test_a_feature_penalty_sums_over_pairs_too(batch: Transitions, make_critic: Callable[..., nn.Module]) -> None:
    members = [make_critic(seed=seed, dtype=torch.float64) for seed in range(4)]
    penalty = CovariancePenalty(0.5, kind="feature")
    single = torch.stack([penalty(Critics(*pair), batch) for pair in zip(members[:2], members[2:])]).sum()
    torch.testing.assert_close(penalty(Critics(members[:2], members[2:]), batch), single)


@pytest.mark.parametrize("kind", ["gradient", "feature"])
def test_different_numbers_of_members_are_refused(
    kind: Any, batch: Transitions, pair: tuple[nn.Module, nn.Module]
) -> None:
    with pytest.raises(ValueError, match="target: expected as many members as the critic has, 2, got 1"):
        CovariancePenalty(1.0, kind=kind)(Critics(list(pair), [pair[0]]), batch)


# Scales


def scaled(batch: Transitions, unit: float) -> Transitions:
    """The batch with states and actions in other units."""
    names = ("observations", "actions", "next_observations", "next_actions")
    return Transitions.unchecked({**dict(batch.columns()), **{name: unit * getattr(batch, name) for name in names}})


@pytest.mark.parametrize("factor", [0.01, 7.0])
def test_relative_grows_with_the_square_of_the_rewards(
    factor: float, batch: Transitions, pair: tuple[nn.Module, nn.Module]
) -> None:
    penalty = CovariancePenalty(1.0, scale="relative")
    larger = Critics(*(Times(network, factor=factor) for network in pair))
    torch.testing.assert_close(penalty(larger, batch), factor**2 * penalty(Critics(*pair), batch))


@pytest.mark.parametrize("scale", ["relative", "correlation"])
@pytest.mark.parametrize("unit", [0.01, 7.0])
def test_relative_and_correlation_do_not_depend_on_the_units_of_states_and_actions(
    unit: float, scale: Any, batch: Transitions, pair: tuple[nn.Module, nn.Module]
) -> None:
    penalty = CovariancePenalty(1.0, scale=scale)
    expected = penalty(Critics(*pair), batch)
    found = penalty(Critics(*(Times(network, unit=unit) for network in pair)), scaled(batch, unit))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients_of(found, pair[0]), gradients_of(expected, pair[0]))


def test_raw_does_depend_on_them(batch: Transitions, pair: tuple[nn.Module, nn.Module]) -> None:
    penalty = CovariancePenalty(1.0)
    found = penalty(Critics(*(Times(network, unit=2.0) for network in pair)), scaled(batch, 2.0))
    torch.testing.assert_close(found, penalty(Critics(*pair), batch) / 2**4)


def test_correlation_neither_changes_with_the_critics_size_nor_rewards_shrinking_it(
    batch: Transitions, pair: tuple[nn.Module, nn.Module]
) -> None:
    critic, target = pair
    expected = CovariancePenalty(1.0, scale="correlation")(Critics(critic, target), batch)
    for factor in (0.1, 1.0, 30.0):
        sized = Times(critic, factor=factor)
        values = {s: CovariancePenalty(1.0, scale=s)(Critics(sized, target), batch) for s in SCALES}
        by_size = {s: torch.autograd.grad(value, sized.log_factor)[0] for s, value in values.items()}
        torch.testing.assert_close(values["correlation"], expected)
        torch.testing.assert_close(values["relative"], expected)
        assert abs(by_size["correlation"].item()) < 1e-12 * expected.item()
        torch.testing.assert_close(by_size["relative"], 2 * values["relative"])
        torch.testing.assert_close(by_size["raw"], 2 * values["raw"])


class Linear(nn.Module):
    """A critic with a constant gradient."""

    def __init__(self, inputs: int = 5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, inputs) / 3)

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        return torch.cat([observations, actions], dim=1).to(self.weight) @ self.weight


class RoundedLinear(Linear):
    """A critic with a gradient that is constant but for rounding, which differs from row to row."""

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        x = torch.cat([observations, actions], dim=1).to(self.weight)
        factor = 1 + x.detach().abs().sum(dim=1, keepdim=True)
        return ((factor * x) @ torch.diag(self.weight) / factor).sum(dim=1)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    ("critic", "target"),
    [
        ("linear", "linear"),
        ("curved", "linear"),
        ("linear", "curved"),
        ("rounded", "rounded"),
        ("curved", "rounded"),
        ("rounded", "curved"),
    ],
)
def test_constant_gradients_give_zero_and_no_gradient(
    critic: str,
    target: str,
    scale: Any,
    make_transitions: Callable[..., Transitions],
    make_critic: Callable[..., nn.Module],
) -> None:
    networks: dict[str, nn.Module] = {"linear": Linear(), "rounded": RoundedLinear(), "curved": make_critic()}
    batch = make_transitions(64, terminals=False)
    network = networks[critic]
    penalty = CovariancePenalty(1.0, scale=scale)(Critics(network, copy.deepcopy(networks[target])), batch)
    largest = max(gradient.abs().max().item() for gradient in gradients_of(penalty, network))
    limit = 1e-7 if scale == "raw" else 0  # raw is what rounding leaves of it
    assert 0 <= penalty.item() <= limit
    assert 0 <= largest <= limit


@pytest.mark.parametrize("scale", ["relative", "correlation"])
@pytest.mark.parametrize("size", [1.0, 0.1])
def test_critics_in_bfloat16_have_the_penalty_that_they_have_in_float32(size: float, scale: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(5, generator=generator)  # of all rows, about which the gradients spread
    target_g, g = (common + size * torch.randn(256, 5, generator=generator) for _ in range(2))
    values = torch.randn(256, generator=generator)
    penalty = CovariancePenalty(1.0, scale=scale)
    exact = penalty._term(values, target_g, g)
    half = penalty._term(*(part.bfloat16() for part in (values, target_g, g)))
    assert exact > 0
    assert half.item() == pytest.approx(exact.item(), rel=0.3)


@pytest.mark.parametrize("columns", [5, 40])  # with C formed, and without
def test_long_gradients_in_16_bits_do_not_overflow(columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    pair = [(300 * torch.randn(16, columns, generator=generator)).half() for _ in range(2)]
    wide = [part.float() for part in pair]
    assert torch.equal(covariance_penalty(*pair), covariance_penalty(*wide))
    assert torch.equal(cross_covariance(*pair), cross_covariance(*wide))


@pytest.mark.parametrize("columns", [5, 40])  # with C formed, and without
def test_long_gradients_do_not_overflow_under_autocast(columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    target_g, g = (300 * torch.randn(16, columns, generator=generator) for _ in range(2))
    expected = covariance_penalty(target_g, g), cross_covariance(target_g, g)
    with torch.autocast("cpu", dtype=torch.float16):
        found = covariance_penalty(target_g, g), cross_covariance(target_g, g)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("scale", SCALES)
def test_a_batch_of_ends_or_of_one_repeated_row_gives_zero(
    scale: Any, batch: Transitions, pair: tuple[nn.Module, nn.Module]
) -> None:
    ends = Transitions.unchecked({**dict(batch.columns()), "terminals": torch.ones(16, dtype=torch.float64)})
    for degenerate in (ends, batch[[3] * 8]):
        penalty = CovariancePenalty(1.0, scale=scale)(Critics(*pair), degenerate)
        assert penalty.item() == pytest.approx(0, abs=1e-25)
        assert all(gradient.abs().max() < 1e-12 for gradient in gradients_of(penalty, pair[0]))


@pytest.mark.parametrize("scale", ["relative", "correlation"])
@pytest.mark.parametrize("size", [1e15, 1e-15])
def test_huge_and_tiny_critics_in_float32_lose_nothing(
    size: float, scale: Any, make_transitions: Callable[..., Transitions], make_critic: Callable[..., nn.Module]
) -> None:
    def penalty_and_gradients(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        networks = [make_critic(seed=seed).to(dtype) for seed in (1, 2)]
        for network in networks:
            for parameter in network.last.parameters():
                parameter.data *= size
        batch = make_transitions(32)
        columns = {name: value.to(dtype) for name, value in batch.columns()}
        penalty = CovariancePenalty(1.0, scale=scale)(Critics(*networks), Transitions.unchecked(columns))
        return penalty.detach(), gradients_of(penalty, networks[0])

    penalty, gradients = penalty_and_gradients(torch.float32)
    exact, exact_gradients = penalty_and_gradients(torch.float64)
    assert penalty.item() == pytest.approx(exact.item(), rel=1e-4, abs=0)
    for gradient, expected in zip(gradients, exact_gradients):
        assert bool(torch.isfinite(gradient).all())
        atol = 1e-4 * expected.abs().max().item()
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=atol)


@pytest.mark.parametrize(("kind", "scale"), [*(("gradient", scale) for scale in SCALES), ("feature", "raw")])
def test_weight_zero_is_zero_and_the_weight_is_a_factor(
    kind: Any, scale: Any, batch: Transitions, pair: tuple[nn.Module, nn.Module]
) -> None:
    zero, one, three = (CovariancePenalty(w, kind=kind, scale=scale)(Critics(*pair), batch) for w in (0, 1, 3.0))
    assert zero.item() == 0
    assert all(not gradient.any() for gradient in gradients_of(zero, pair[0]))
    torch.testing.assert_close(three, 3 * one)


# The networks, compilation, errors


def test_the_penalty_reads_the_networks_in_eval_mode_and_leaves_them_as_they_were(batch: Transitions) -> None:
    def noisy() -> nn.Sequential:
        return nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 1)).double()

    critic, target = noisy(), noisy()
    critics = Critics(lambda s, a: critic(torch.cat([s, a], 1)), lambda s, a: target(torch.cat([s, a], 1)))
    statistics = copy.deepcopy([critic.state_dict(), target.state_dict()])
    values = [CovariancePenalty(1.0)(critics, batch) for _ in range(2)]
    assert torch.equal(*values)
    assert all(module.training for network in (critic, target) for module in network.modules())
    torch.testing.assert_close([critic.state_dict(), target.state_dict()], statistics, rtol=0, atol=0)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before or after."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("compiled", ["loss", "critic"])
def test_compiling_the_loss_or_the_critics_changes_nothing(
    compiled: str, backend: str, batch: Transitions, pair: tuple[nn.Module, nn.Module]
) -> None:
    critic, target = pair
    networks = [torch.compile(network, backend=backend) for network in pair] if compiled == "critic" else pair
    critics = Critics(*networks)
    penalties = [CovariancePenalty(0.1, scale=s) for s in SCALES] + [CovariancePenalty(0.1, kind="feature")]

    def loss(batch: Transitions) -> Tensor:
        error: Tensor = (critic(batch.observations, batch.actions)[:, 0] - batch.rewards).square().mean()
        return error + sum(penalty(critics, batch) for penalty in penalties)

    expected = (critic(batch.observations, batch.actions)[:, 0] - batch.rewards).square().mean()
    expected = expected + sum(penalty(Critics(critic, target), batch) for penalty in penalties)
    found = (torch.compile(loss, backend=backend) if compiled == "loss" else loss)(batch)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients_of(found, critic), gradients_of(expected, critic))


@pytest.mark.parametrize("scale", SCALES)
def test_a_single_transition_has_no_covariance(
    scale: Any, batch: Transitions, pair: tuple[nn.Module, nn.Module]
) -> None:
    with pytest.raises(ValueError, match="batch: expected at least two transitions, or there is no covariance, got 1"):
        CovariancePenalty(1.0, scale=scale)(Critics(*pair), batch[:1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": -1}, "weight: expected a finite number at least 0, got -1"),
        ({"weight": float("nan")}, "weight: expected a finite number at least 0, got nan"),
        ({"weight": float("inf")}, "weight: expected a finite number at least 0, got inf"),
        ({"weight": 10**400}, "weight: expected a finite number at least 0, got 1000000"),
        ({"weight": -(10**400)}, "weight: expected a finite number at least 0, got -1000000"),
        ({"weight": True}, "weight: expected a number at least 0, got True"),
        ({"weight": "0.1"}, "weight: expected a number at least 0, got '0.1'"),
        ({"weight": 1, "trace_weight": -0.5}, "trace_weight: expected a finite number at least 0, got -0.5"),
        ({"weight": 1, "scale": "rel"}, "scale: expected one of 'raw', 'relative', 'correlation', got 'rel'"),
        ({"weight": 1, "kind": "features"}, "kind: expected one of 'gradient', 'feature', got 'features'"),
        (
            {"weight": 1, "kind": "feature", "scale": "relative"},
            "scale: expected 'raw' for kind='feature', which has no other form, got 'relative'",
        ),
    ],
)
def test_wrong_options_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        CovariancePenalty(**arguments)


def test_a_critic_without_features_has_no_feature_penalty(batch: Transitions) -> None:
    with pytest.raises(ValueError, match="features: expected a callable, or a target with a method"):
        CovariancePenalty(1.0, kind="feature")(Critics(Linear(), Linear()), batch)


def test_the_decomposition_is_the_same_under_autocast_and_of_gradients_with_a_graph() -> None:
    g = torch.Generator().manual_seed(0)
    target_g, online = 40 * torch.randn(2, 500, 15, generator=g)
    r = torch.randn(500, 3, generator=g).softmax(dim=1)
    plain = decompose_cross_covariance(target_g, online, r)
    with torch.autocast("cpu", dtype=torch.float16):
        found = decompose_cross_covariance(target_g, online, r)
    assert all(map(torch.equal, plain, found))
    online.requires_grad_()
    parts = decompose_cross_covariance(target_g, online, r)
    assert all(map(torch.equal, plain, (part.detach() for part in parts)))
    (gradient,) = torch.autograd.grad(sum((part**2).sum() for part in parts), online)
    assert bool(gradient.isfinite().all())


def test_theorem_2_holds_in_single_precision_far_from_zero() -> None:
    g = torch.Generator().manual_seed(0)
    target_g, online = 1e6 + torch.randn(2, 2000, 4, generator=g)
    whole, within, between = decompose_cross_covariance(
        target_g, online, torch.randn(2000, 3, generator=g).softmax(dim=1)
    )
    assert float((whole - within - between).norm()) < 1e-5


@pytest.mark.parametrize("scale", ["relative", "correlation"])
def test_a_spread_of_a_thousand_roundings_is_no_rounding(scale: str) -> None:
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(5, generator=generator)
    target_g, g = (common + 1e-4 * torch.randn(256, 5, generator=generator) for _ in range(2))
    values = torch.randn(256, generator=generator)
    penalty = CovariancePenalty(1.0, scale=scale)
    exact = penalty._term(values.double(), target_g.double(), g.double())
    assert exact > 0
    assert penalty._term(values, target_g, g).item() == pytest.approx(exact.item(), rel=0.02)


def test_the_decomposition_refuses_pairs_that_do_not_fit() -> None:
    shapes = re.escape("target_gradients and gradients: expected one shape [B, D], got [3, 2] and [3, 4]")
    with pytest.raises(ValueError, match="^" + shapes):
        decompose_cross_covariance(torch.zeros(3, 2), torch.zeros(3, 4), torch.ones(3, 1))


def test_the_penalty_is_the_same_in_inference_mode(batch: Transitions, pair: tuple[nn.Module, nn.Module]) -> None:
    penalty = CovariancePenalty(0.3, scale="relative")
    expected = penalty(Critics(*pair), batch)
    with torch.inference_mode():
        found = penalty(Critics(*pair), batch)
    assert torch.equal(found, expected)
