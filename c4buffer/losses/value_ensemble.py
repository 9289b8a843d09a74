"""ACTIVE's in-sample V-ensemble: its value losses, its target and its advantage."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .._checks import check_fraction, check_integer, check_number, fail, shape_of

WIDE = 128  # units of a layer from which a processor does better with one member after the other


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
    check_fraction("tau", tau, open_ends=True)
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
    check_fraction("quantile", quantile)
    _check_members(v)
    if len(v) == 1:
        return v[0]
    ordered = v.sort(dim=0).values
    place = quantile * (len(v) - 1)
    below = min(int(place), len(v) - 2)
    found = torch.lerp(ordered[below], ordered[below + 1], place - below)
    return torch.where(ordered[-1].isnan(), ordered[-1], found)  # a NaN is sorted last


def ensemble_spread(v: Tensor) -> Tensor:
    """sigma of Eq. 8: the standard deviation over members, divisor m - 1, 0 for m = 1, [m, B] -> [B]."""
    _check_members(v)
    return v.std(dim=0) if len(v) > 1 else torch.zeros_like(v[0])


def expected_minimum(v: Tensor) -> Tensor:
    """Eq. 8: E[min_i V_i] of m normal V_i is about mu - Phi^-1((m - pi/8) / (m - pi/4 + 1)) sigma, [m, B] -> [B]."""
    _check_members(v)
    m = len(v)
    level = torch.tensor((m - math.pi / 8) / (m - math.pi / 4 + 1), dtype=torch.float64, device="cpu")
    distance: Tensor = torch.special.ndtri(level)  # Phi^-1, which torch can compile
    return v.mean(dim=0) - distance * ensemble_spread(v)


def cloning_policy_loss(q: Tensor, log_prob: Tensor, weights: Tensor, beta: Tensor | float) -> Tensor:
    """Eq. 13: -mean Q(s, a_pi) - beta mean(w(s, a) log pi(a | s)), a scalar.

    Args:
        q: at the policy's actions, with a graph to the policy, [B].
        log_prob: log pi(a | s) of the data's actions, summed over action dimensions, [B].
        weights: w, [B], as `VEnsembleAdvantage.weights` gives them; detached here.
        beta: the cloning temperature, a number; detached here.

    Raises:
        ValueError: for anything but three vectors of one length and one number.
    """
    if q.ndim != 1 or not q.shape == log_prob.shape == weights.shape:
        shapes = ", ".join(map(shape_of, (q, log_prob, weights)))
        fail("q, log_prob and weights", "one shape [B]", shapes)
    if isinstance(beta, Tensor):
        if beta.numel() != 1:
            fail("beta", "one number", shape_of(beta))
        beta = beta.detach().reshape(())
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
        self.quantile = check_fraction("quantile", quantile)
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

    Multilayer perceptrons with ReLU, initialised as torch.nn.Linear is. The members' layers stand behind each other in
    one parameter: they are computed all at once, and an optimizer steps them together. On a processor, where a layer is
    128 units wide or more, one member after the other is faster, as their products are large enough and fit its cache.

    Args:
        observation_dim: d_s.
        n_members: m.
        hidden: widths of the hidden layers.
        layer_norm: normalise each hidden layer before its ReLU.

    >>> VEnsemble(3, n_members=4)(torch.zeros(5, 3)).shape
    torch.Size([4, 5])
    """

    def __init__(
        self, observation_dim: int, *, n_members: int, hidden: Iterable[int] = (256, 256), layer_norm: bool = False
    ) -> None:
        super().__init__()
        self.observation_dim = check_integer("observation_dim", observation_dim, minimum=1)
        self.n_members = check_integer("n_members", n_members, minimum=1)
        if not isinstance(hidden, Iterable):
            fail("hidden", "widths, as (256, 256)", repr(hidden))
        hidden = [check_integer("hidden", width, minimum=1) for width in hidden]
        if not hidden:
            fail("hidden", "at least one width", repr(hidden))
        pairs = list(itertools.pairwise([observation_dim, *hidden, 1]))
        bounds = [1 / math.sqrt(before) for before, _ in pairs]
        m = self.n_members
        # [m, n, p] and [m, 1, p] for each layer from n to p units
        self.weights = nn.ParameterList(torch.empty(m, *pair).uniform_(-c, c) for pair, c in zip(pairs, bounds))
        self.biases = nn.ParameterList(torch.empty(m, 1, p).uniform_(-c, c) for (_, p), c in zip(pairs, bounds))
        normed = hidden if layer_norm else ()
        self.scales = nn.ParameterList(torch.ones(m, 1, width) for width in normed)
        self.shifts = nn.ParameterList(torch.zeros(m, 1, width) for width in normed)

    def forward(self, observations: Tensor) -> Tensor:
        if observations.ndim != 2 or observations.shape[1] != self.observation_dim:
            fail("observations", f"[B, {self.observation_dim}]", shape_of(observations))
        kinds = (self.weights, self.biases, self.scales, self.shifts)
        if observations.device.type != "cpu" or max(bias.shape[-1] for bias in self.biases) < WIDE:
            return _perceptron(observations.expand(self.n_members, *observations.shape), *map(list, kinds))
        alone = [[parameter.unbind() for parameter in kind] for kind in kinds]
        members = range(self.n_members)
        return torch.stack([_perceptron(observations, *[[p[i] for p in kind] for kind in alone]) for i in members])


def _perceptron(
    h: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], scales: Sequence[Tensor], shifts: Sequence[Tensor]
) -> Tensor:
    """One member's values, [B, d_s] -> [B], or all members', [m, B, d_s] -> [m, B]."""
    affine = torch.addmm if h.ndim == 2 else torch.baddbmm
    for i, (weight, bias) in enumerate(zip(weights, biases)):
        h = affine(bias, h, weight)
        if i < len(weights) - 1:
            if scales:
                h = nn.functional.layer_norm(h, h.shape[-1:]) * scales[i] + shifts[i]
            h = h.relu_()
    return h.squeeze(-1)


def _check_members(v: Tensor) -> None:
    if v.ndim != 2 or len(v) == 0:
        fail("v", "[m, B] with at least one member", shape_of(v))


def _check_values(q: Tensor, v: Tensor) -> None:
    _check_members(v)
    if q.shape != v.shape[1:]:
        fail("q", f"[B] with B = {v.shape[1]}, as v has it", shape_of(q))
