"""The papers' quantities on live critics: Theorems 1 and 2, Eq. 10 and Observation 1 of C4, the spread of ACTIVE."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Union

import torch
from torch import Tensor, nn

from ._checks import check_finite, check_fraction, check_number, fail, shape_or_type
from .buffer import ClusteredReplayBuffer
from .critics import Critics, check_critics, member_values
from .embedding import embed_rows
from .inference import noise_of_its_own, outside_inference_mode
from .losses.covariance import decompose_cross_covariance, span_of
from .losses.value_ensemble import ensemble_spread
from .memory import parts_of
from .networks import modules_behind
from .observations import Observations, map_observations
from .partition import check_responsibilities
from .stacking import PROBE_ROWS, rows_for
from .transitions import Transitions

NEARLY_ONE = 1e-3  # a direction that was normalised in float16 is still of length one

Read = Callable[[int, int], Transitions]  # rows start to stop, on the critics' device
Along = Callable[[Tensor, int, int], float]  # of a covariance [D, D]: from side 0 (w') or 1 (w) to side 0 or 1


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` measured: floats alone, so that `dataclasses.asdict` gives what any logger takes.

    Sigma' and Sigma are the covariances of g' and g over the rows, C = Cov(g', g), all with divisor N; delta is the TD
    error; z goes over clusters, p_z is their share.

    Args:
        target_term: A = gamma^2 k'^2 w'^T Sigma' w' (Theorem 1).
        critic_term: B = k^2 w^T Sigma w.
        cross_term: C = 2 gamma k k' w'^T C w, which TD learning has and supervised learning has not.
        shift_variance: A + B - C, the variance of delta that the shift induces.
        total, within, between: Frobenius norms of C, of E[C_Z] and of Cov(mu'_Z, mu_Z) (Theorem 2).
        correlation: ||C||_F / sqrt(tr Sigma' tr Sigma), from 0 to 1; 0 where one of them vanishes.
        cluster_cross: sum_z p_z |w'^T C_z w|, at most `cluster_norm` (Eq. 10).
        cluster_norm: sum_z p_z ||C_z||_2, the spectral norm, at most `cluster_bound`.
        cluster_bound: sum_z p_z sqrt(tr Sigma'_z tr Sigma_z).
        gradient_norm, target_gradient_norm: root mean square of |g| and |g'|.
        td_mean, td_variance: E[delta] and Var[delta].
        variance_cosine: of the gradients, by the critic's parameters, of E[delta^2] and of Var[delta] (Observation 1).
        mean_cosine: of those of E[delta^2] and of (E[delta])^2. NaN where a gradient vanishes or nothing is trained.
        value_spread: E[sigma(s)], the standard deviation over the members of a V-ensemble; NaN without one.
        smallest_effective_size, largest_effective_size: of n_z = (sum_i r_iz)^2 / sum_i r_iz^2, in transitions.
    """

    target_term: float
    critic_term: float
    cross_term: float
    shift_variance: float
    total: float
    within: float
    between: float
    correlation: float
    cluster_cross: float
    cluster_norm: float
    cluster_bound: float
    gradient_norm: float
    target_gradient_norm: float
    td_mean: float
    td_variance: float
    variance_cosine: float
    mean_cosine: float
    value_spread: float
    smallest_effective_size: float
    largest_effective_size: float


@outside_inference_mode
def diagnose(
    critics: Critics,
    data: Union[Transitions, ClusteredReplayBuffer],
    *,
    responsibilities: Tensor | None = None,
    discount: float = 0.99,
    shift: float = 1.0,
    next_shift: float = 1.0,
    direction: Tensor | None = None,
    next_direction: Tensor | None = None,
    value_ensemble: Callable[[Observations], Tensor] | None = None,
) -> Diagnosis:
    """Measure what C4 is about on critics as they are now; nothing of theirs is changed.

    g, g', Q and Q_target are those of `stacked_gradients`: raw, of the members' mean, g' and Q_target masked by
    (1 - d). The TD error is delta = r + gamma^n (1 - d) Q_target(x') - Q(x), with n the `intervals`; of n-step
    transitions gamma g' reads gamma^n g'. Sums are made in float64.

    Args:
        critics: the critic and its target.
        data: N transitions, or a buffer, for all that it holds.
        responsibilities: r [N, K] of the rows. None: the buffer's as they stand; one cluster where there are none.
        discount: gamma, from 0 to 1.
        shift, next_shift: k and k' of Theorem 1, how far x and x' are moved; at least 0.
        direction, next_direction: w and w', unit vectors [D]. None: the mean over one orthonormal basis for both, which
            gives A = gamma^2 k'^2 tr Sigma' / D, B = k^2 tr Sigma / D and C = 2 gamma k k' tr C / D.
        value_ensemble: V-functions, observations -> [m, B], such as `VEnsemble`.

    Raises:
        ValueError: for critics of the wrong form (see `Critics`), values that are not finite, fewer than two rows,
            responsibilities of other rows, and directions that are not unit vectors [D].

    >>> t = Transitions(observations=torch.randn(64, 3), actions=torch.randn(64, 1), rewards=torch.randn(64),
    ...                 next_observations=torch.randn(64, 3), terminals=torch.zeros(64))
    >>> q = torch.nn.Bilinear(3, 1, 1)
    >>> found = diagnose(Critics(q, q), t)
    >>> found.cluster_cross <= found.cluster_norm <= found.cluster_bound
    True
    """
    check_critics(critics)
    discount = check_fraction("discount", discount)
    shift, next_shift = (
        check_number(name, value, minimum=0) for name, value in (("shift", shift), ("next_shift", next_shift))
    )
    rows, device, read = _rows_of(data)
    r = _responsibilities_of(data, rows) if responsibilities is None else responsibilities
    check_responsibilities(r, rows)
    stacked, _ = embed_rows("gradients", critics, rows, read, device=device, max_dim=sys.maxsize)
    target_g, g = stacked.double().chunk(2, dim=1)
    r = r.to(g) / r.to(g).sum(dim=1, keepdim=True)
    directions = _checked_directions(next_direction, direction, g)
    with noise_of_its_own(device):
        size = rows_for(critics, read(0, min(2 * PROBE_ROWS, rows)))
    parts = list(parts_of(rows, size))
    discounts = torch.cat([discount ** read(*part).intervals.to(g) for part in parts])  # gamma^n, [N]
    columns = g.shape[1]
    basis = span_of(target_g, g)
    if basis is not None:
        target_g, g = target_g @ basis, g @ basis
        directions = [w @ basis for w in directions]

    def along(covariance: Tensor, left: int, right: int) -> float:
        """w_left^T C w_right; without directions its mean over one orthonormal basis for both, tr C / D."""
        return float(directions[left] @ covariance @ directions[right] if directions else covariance.trace() / columns)

    with noise_of_its_own(device):  # a policy draws the a' that it drew for g'
        observation_1 = _observation_1(critics, read, parts, discounts)
    return Diagnosis(
        **_theorem_1(next_shift * discounts.unsqueeze(1) * target_g, shift * g, along),
        **_theorem_2(target_g, g, r),
        **_equation_10(target_g, g, r, along),
        gradient_norm=_root_mean_square(g),
        target_gradient_norm=_root_mean_square(target_g),
        **observation_1,
        value_spread=_spread_of(value_ensemble, read, parts),
    )


def _theorem_1(target_change: Tensor, change: Tensor, along: Along) -> dict[str, float]:
    """A + B - C = Var(<w', gamma k' g'> - <w, k g>), from gamma k' g' and k g."""
    a = along(_covariance(target_change, target_change), 0, 0)
    b = along(_covariance(change, change), 1, 1)
    c = 2 * along(_covariance(target_change, change), 0, 1)
    return {"target_term": a, "critic_term": b, "cross_term": c, "shift_variance": a + b - c}


def _theorem_2(target_g: Tensor, g: Tensor, r: Tensor) -> dict[str, float]:
    """C = E[C_Z] + Cov(mu'_Z, mu_Z), and C against its bound."""
    parts = decompose_cross_covariance(target_g, g, r)
    norms = dict(zip(("total", "within", "between"), (float(torch.linalg.matrix_norm(part)) for part in parts)))
    bound = _bound(target_g, g)
    return {**norms, "correlation": norms["total"] / bound if bound > 0 else 0.0}


def _equation_10(target_g: Tensor, g: Tensor, r: Tensor, along: Along) -> dict[str, float]:
    """|w'^T C_z w| <= ||C_z||_2 <= sqrt(tr Sigma'_z) sqrt(tr Sigma_z), summed with p_z; the clusters' sizes."""
    cross = norm = bound = 0.0
    for share in r.T:
        mass = share.sum()
        if mass > 0:
            p, weights = float(mass) / len(r), share.unsqueeze(1) / mass
            inside = _covariance(target_g, g, weights)
            cross += p * abs(along(inside, 0, 1))
            norm += p * float(torch.linalg.matrix_norm(inside, 2))
            bound += p * _bound(target_g, g, weights)
    effective = r.sum(dim=0).square() / r.square().sum(dim=0).clamp(min=torch.finfo(r.dtype).tiny)
    return {
        "cluster_cross": cross,
        "cluster_norm": norm,
        "cluster_bound": bound,
        "smallest_effective_size": float(effective.min()),
        "largest_effective_size": float(effective.max()),
    }


def _observation_1(critics: Critics, read: Read, parts: list[tuple[int, int]], discounts: Tensor) -> dict[str, float]:
    """E[delta], Var[delta], and how grad E[delta^2] = grad Var[delta] + grad (E[delta])^2 lies to its two parts."""
    networks = modules_behind(critics.critic)
    trained = list({p: None for network in networks for p in network.parameters() if p.requires_grad})
    deltas, weighted, plain = [], torch.zeros((), device="cpu"), torch.zeros((), device="cpu")
    with critics.evaluating():
        for start, stop in parts:
            batch = read(start, stop)
            with torch.no_grad():
                next_q = _mean(member_values(critics.target, *_floating(*critics.next_inputs(batch)), name="target"))
            with torch.enable_grad():
                q = _mean(member_values(critics.critic, *_floating(*critics.inputs(batch))))
            ahead = discounts[start:stop] * (1 - batch.terminals.to(next_q)) * next_q
            deltas.append(batch.rewards.to(ahead) + ahead - q.detach())
            if trained and q.requires_grad:
                # grad E[delta^2] = -2 E[delta grad Q], grad (E[delta])^2 = -2 E[delta] E[grad Q]
                weighted = weighted + _gradient(q, trained, deltas[-1].to(q), retain_graph=True)
                plain = plain + _gradient(q, trained, torch.ones_like(q))
    delta = torch.cat(deltas)
    of_mean = delta.mean() * plain
    return {
        "td_mean": float(delta.mean()),
        "td_variance": float(delta.var(correction=0)),
        "variance_cosine": _cosine(weighted, weighted - of_mean),
        "mean_cosine": _cosine(weighted, of_mean),
    }


def _floating(observations: Observations, actions: Tensor) -> tuple[Observations, Tensor]:
    """Images as numbers, as they are where gradients are taken."""
    return map_observations(lambda leaf: leaf if leaf.is_floating_point() else leaf.float(), observations), actions


def _spread_of(
    value_ensemble: Callable[[Observations], Tensor] | None, read: Read, parts: list[tuple[int, int]]
) -> float:
    """The mean over rows of the standard deviation over the members of a V-ensemble."""
    if value_ensemble is None:
        return math.nan
    spreads = []
    with torch.no_grad(), Critics(value_ensemble, value_ensemble).evaluating():
        for start, stop in parts:
            v = value_ensemble(read(start, stop).observations)
            if not isinstance(v, Tensor) or v.ndim != 2 or v.shape[1] != stop - start:
                got = shape_or_type(v)
                fail("value_ensemble", f"values [m, B] with B = {stop - start}", got)
            check_finite("value_ensemble", v.T)
            spreads.append(ensemble_spread(v).double())
    return float(torch.cat(spreads).mean())


def _rows_of(data: object) -> tuple[int, torch.device, Read]:
    if not isinstance(data, (ClusteredReplayBuffer, Transitions)):
        fail("data", "Transitions or a ClusteredReplayBuffer", type(data).__name__)
    rows = len(data)
    if rows < 2:
        fail("data", "at least two transitions, or there is no covariance", rows)
    if isinstance(data, ClusteredReplayBuffer):
        return rows, data.device, data.rows
    return rows, data.rewards.device, lambda start, stop: data[start:stop]


def _responsibilities_of(data: object, rows: int) -> Tensor:
    if isinstance(data, ClusteredReplayBuffer) and data.clustered:
        return data.responsibilities
    return torch.ones(rows, 1, device="cpu")


def _checked_directions(next_direction: Tensor | None, direction: Tensor | None, g: Tensor) -> list[Tensor]:
    """[w', w], each [D]; none where none are given."""
    if next_direction is None and direction is None:
        return []
    expected = f"a unit vector [{g.shape[1]}], as the other direction is given"
    directions = []
    for name, w in (("next_direction", next_direction), ("direction", direction)):
        if not isinstance(w, Tensor) or w.shape != g.shape[1:]:
            fail(name, expected, shape_or_type(w))
        unit = w.detach().to(g)
        length = float(unit.norm())
        if not abs(length - 1) < NEARLY_ONE:
            fail(name, expected, f"one of length {length:g}")
        directions.append(unit / length)  # else Eq. 10's bounds would not hold to the last digits
    return directions


def _gradient(q: Tensor, parameters: list[nn.Parameter], weights: Tensor, *, retain_graph: bool = False) -> Tensor:
    """sum_i weight_i grad Q_i by all the parameters, as one vector in float64."""
    parts = torch.autograd.grad(q, parameters, weights, retain_graph=retain_graph, allow_unused=True)
    found = [part.double().flatten() for part in parts if part is not None]
    return torch.cat(found) if found else q.new_full((1,), math.nan, dtype=torch.float64)


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean(dim=0)


def _cosine(one: Tensor, other: Tensor) -> float:
    lengths = float(one.norm() * other.norm())
    return float((one * other).sum()) / lengths if lengths > 0 else math.nan


def _covariance(target_g: Tensor, g: Tensor, weights: Tensor | None = None) -> Tensor:
    """Cov(g', g), [D, D], with divisor N; or with weights [N, 1] that sum to one."""
    weights = torch.full_like(g[:, :1], 1 / len(g)) if weights is None else weights
    return ((target_g - (weights * target_g).sum(dim=0)) * weights).T @ (g - (weights * g).sum(dim=0))


def _bound(target_g: Tensor, g: Tensor, weights: Tensor | None = None) -> float:
    """sqrt(tr Sigma' tr Sigma), with divisor N; or with weights [N, 1] that sum to one."""
    weights = torch.full_like(g[:, :1], 1 / len(g)) if weights is None else weights
    traces = [(weights * (part - (weights * part).sum(dim=0)).square()).sum() for part in (target_g, g)]
    return math.sqrt(float(traces[0]) * float(traces[1]))


def _root_mean_square(g: Tensor) -> float:
    """sqrt(E |g|^2)."""
    return float(g.square().sum(dim=1).mean().sqrt())
