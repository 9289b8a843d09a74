"""ACTIVE's in-sample V-ensemble: its value losses, its target and its advantage."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_integer, check_number, fail, shape_of
from ..products import gains, product


def expectile_value_loss(q: Tensor, v: Tensor, *, tau: float) -> Tensor:
    """Eq. 3 with IQL's f: the mean over members and batch of |tau - 1[u < 0]| u^2, u = Q(s, a) - V_i(s).

    Its minimiser is the tau-expectile of Q(s, .) under the data's actions.

    Args:
        q: [B], detached here: every V_i fits the same values.
        v: [m, B].
        tau: the expectile, above 0 and below 1.

    Raises:
        ValueError: for shapes other than these, and for tau outside (0, 1).
    """
    _check_fraction("tau", tau, open_ends=True)
    _check_values(q, v)
    u = q.detach() - v
    return ((tau - (u < 0).to(u)).abs() * u.square()).mean()


def sparse_value_loss(q: Tensor, v: Tensor, *, alpha: float) -> Tensor:
    """Eq. 3 with SQL's f: the mean over members and batch of 1[y > 0] y^2 + V_i / alpha, y = (Q - V_i) / (2 alpha) + 1.

    Args:
        q: [B], detached here.
        v: [m, B].
        alpha: the weight of the implicit regularisation, above 0.

    Raises:
        ValueError: for shapes other than these, and for alpha that is not positive.
    """
    check_number("alpha", alpha, minimum=0, exclusive=True)
    _check_values(q, v)
    y = (q.detach() - v) / (2 * alpha) + 1
    return (y.clamp(min=0).square() + v / alpha).mean()


def ensemble_minimum(v: Tensor) -> Tensor:
    """min_i V_i of Eq. 4, [m, B] -> [B]."""
    _check_members(v)
    return v.amin(dim=0)


def ensemble_quantile(v: Tensor, *, quantile: float) -> Tensor:
    """E_c[V_i] of Eq. 7: the c-quantile over members, between neighbours linear, [m, B] -> [B]."""
    _check_fraction("quantile", quantile)
    _check_members(v)
    if len(v) == 1:
        return v[0]
    ordered = v.sort(dim=0).values
    place = quantile * (len(v) - 1)
    below = min(int(place), len(v) - 2)
    return torch.lerp(ordered[below], ordered[below + 1], place - below)


def ensemble_spread(v: Tensor) -> Tensor:
    """sigma of Eq. 8: the standard deviation over members, divisor m - 1, 0 for m = 1, [m, B] -> [B]."""
    _check_members(v)
    return v.std(dim=0) if len(v) > 1 else torch.zeros_like(v[0])


def expected_minimum(v: Tensor) -> Tensor:
    """Eq. 8: E[min_i V_i] of m normal V_i is about mu - Phi^-1((m - pi/8) / (m - pi/4 + 1)) sigma, [m, B] -> [B]."""
    _check_members(v)
    m = len(v)
    distance = NormalDist().inv_cdf((m - math.pi / 8) / (m - math.pi / 4 + 1))
    return v.mean(dim=0) - distance * ensemble_spread(v)


def cloning_policy_loss(q: Tensor, log_prob: Tensor, weights: Tensor, beta: Tensor | float) -> Tensor:
    """Eq. 13: -mean Q(s, a_pi) - beta mean(w(s, a) log pi(a | s)), a scalar.

    Args:
        q: at the policy's actions, with a graph to the policy, [B].
        log_prob: log pi(a | s) of the data's actions, summed over action dimensions, [B].
        weights: w, [B], as `VEnsembleAdvantage.weights` gives them; detached here.
        beta: the cloning temperature; detached here.

    Raises:
        ValueError: for anything but three vectors of one length.
    """
    if q.ndim != 1 or not q.shape == log_prob.shape == weights.shape:
        shapes = ", ".join(map(shape_of, (q, log_prob, weights)))
        fail("q, log_prob and weights", "one shape [B]", shapes)
    beta = beta.detach() if isinstance(beta, Tensor) else beta
    return -q.mean() - beta * (weights.detach() * log_prob).mean()


class VEnsembleAdvantage:
    """What ACTIVE reads off an ensemble of V-functions [m, B]: the target, the advantage and the cloning weights.

    Args:
        quantile: c of Eq. 7, from 0 (the least member, the largest advantages) to 1.
        temperature: of the weights exp(A / temperature); above 0. The paper's is 1; IQL's inverse temperature 3 is 1/3.
        max_weight: where they are clipped; above 0.

    >>> v = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    >>> advantage = VEnsembleAdvantage(quantile=0.5)
    >>> advantage.target(v)
    tensor([1., 0.])
    >>> advantage.advantage(torch.tensor([2.0, 2.0]), v)
    tensor([0., 1.])
    """

    def __init__(self, *, quantile: float, temperature: float = 1.0, max_weight: float = 100.0) -> None:
        self.quantile = _check_fraction("quantile", quantile)
        self.temperature = check_number("temperature", temperature, minimum=0, exclusive=True)
        self.max_weight = check_number("max_weight", max_weight, minimum=0, exclusive=True)

    def target(self, v_next: Tensor) -> Tensor:
        """min_i V_i(s') for r + gamma^n (1 - d) min_i V_i(s') (Eq. 4), [m, B] -> [B], detached."""
        return ensemble_minimum(v_next.detach())

    def advantage(self, q: Tensor, v: Tensor) -> Tensor:
        """A(s, a) = Q(s, a) - E_c[V_i](s) (Eq. 7), [B]; with the graphs of q [B] and v [m, B]."""
        _check_values(q, v)
        return q - ensemble_quantile(v, quantile=self.quantile)

    def weights(self, q: Tensor, v: Tensor) -> Tensor:
        """w(s, a) = exp(A(s, a) / temperature), at most `max_weight`, [B], detached."""
        exponent = self.advantage(q.detach(), v.detach()) / self.temperature
        return exponent.exp().clamp(max=self.max_weight)

    def uncertainty(self, v: Tensor) -> Tensor:
        """sigma(s): the standard deviation over members, divisor m - 1, 0 for m = 1, [m, B] -> [B], detached."""
        return ensemble_spread(v.detach())

    def expected_minimum(self, v: Tensor) -> Tensor:
        """Eq. 8: what min_i V_i would be for normal members of this mean and spread, [m, B] -> [B], detached."""
        return expected_minimum(v.detach())


class VEnsemble(nn.Module):
    """m V-functions of independent initialisation, [B, d_s] -> [m, B].

    Multilayer perceptrons with ReLU, initialised as torch.nn.Linear is; the members' layers stand behind each other in
    one parameter, so that all are computed at once.

    Args:
        observation_dim: d_s.
        n_members: m.
        hidden: widths of the hidden layers.
        layer_norm: normalise each hidden layer before its ReLU.

    >>> VEnsemble(3, n_members=4)(torch.zeros(5, 3)).shape
    torch.Size([4, 5])
    """

    def __init__(
        self, observation_dim: int, *, n_members: int, hidden: Sequence[int] = (256, 256), layer_norm: bool = False
    ) -> None:
        super().__init__()
        self.observation_dim = check_integer("observation_dim", observation_dim, minimum=1)
        self.n_members = check_integer("n_members", n_members, minimum=1)
        if not hidden:
            fail("hidden", "at least one width", repr(hidden))
        for width in hidden:
            check_integer("hidden", width, minimum=1)
        widths = [observation_dim, *hidden, 1]
        self.layers = nn.ModuleList(
            _MemberLinear(n_members, before, after) for before, after in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(_MemberNorm(n_members, width) for width in hidden) if layer_norm else None

    def forward(self, observations: Tensor) -> Tensor:
        if observations.ndim != 2 or observations.shape[1] != self.observation_dim:
            fail("observations", f"[B, {self.observation_dim}]", shape_of(observations))
        h = observations.expand(self.n_members, *observations.shape)
        for i, layer in enumerate(self.layers[:-1]):
            h = layer(h)
            h = (h if self.norms is None else self.norms[i](h)).relu()
        v: Tensor = self.layers[-1](h)
        return v.squeeze(2)


class _MemberLinear(nn.Module):
    """y_i = x_i W_i + b_i: [m, B, n] -> [m, B, p], drawn as torch.nn.Linear draws, each member for itself."""

    def __init__(self, members: int, before: int, after: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(before)
        self.weight = nn.Parameter(torch.empty(members, before, after).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, 1, after).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        if gains(x, self.weight) and not torch.compiler.is_compiling():
            return _affine(x, self.weight, self.bias)
        return torch.baddbmm(self.bias, x, self.weight)


class _MemberNorm(nn.Module):
    """LayerNorm over the last dimension of [m, B, n], with each member's own scale and shift."""

    def __init__(self, members: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(members, 1, width))
        self.bias = nn.Parameter(torch.zeros(members, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:]) * self.weight + self.bias


class _Affine(torch.autograd.Function):
    """x W + b by the faster of a processor's libraries, and its first derivatives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight).add_(bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        by_x = product(gradient, weight.transpose(1, 2)) if ctx.needs_input_grad[0] else None
        by_weight = product(x.transpose(1, 2), gradient) if ctx.needs_input_grad[1] else None
        by_bias = gradient.sum(dim=1, keepdim=True) if ctx.needs_input_grad[2] else None
        return by_x, by_weight, by_bias


_affine: Callable[[Tensor, Tensor, Tensor], Tensor] = _Affine.apply


def _check_fraction(name: str, value: float, *, open_ends: bool = False) -> float:
    number = check_number(name, value, minimum=0, exclusive=open_ends)
    if number > 1 or (open_ends and number == 1):
        fail(name, "a number above 0 and below 1" if open_ends else "a number from 0 to 1", repr(value))
    return number


def _check_members(v: Tensor) -> None:
    if v.ndim != 2 or len(v) == 0:
        fail("v", "[m, B] with at least one member", shape_of(v))


def _check_values(q: Tensor, v: Tensor) -> None:
    _check_members(v)
    if q.shape != v.shape[1:]:
        fail("q", f"[B] with B = {v.shape[1]}, as v has it", shape_of(q))
