"""The cross-covariance of critic and target gradients: its decomposition over clusters, and the penalty on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._checks import check_choice, check_number, fail, shape_of
from ..critics import Critics, check_critics, member_features
from ..gradients import paired_gradients
from ..inference import eagerly, in_full_precision, outside_inference_mode, without_autocast
from ..memory import floats_at_once
from ..partition import check_responsibilities
from ..scaling import CHUNK_ROWS
from ..transitions import Transitions

ROUNDINGS = 32  # what a few layers of a few hundred units leave in gradients that are equal but for rounding
HALF_ROUNDINGS = 2  # in 16-bit types, whose sums are made in 32


def cross_covariance(target_gradients: Tensor, gradients: Tensor) -> Tensor:
    """C = Cov_B(g', g), [D, D], with divisor B - 1; of 16-bit gradients in float32.

    Args:
        target_gradients: g', [B, D].
        gradients: g, [B, D].

    Raises:
        ValueError: for shapes that differ or fewer than two rows.
    """
    _check_pair(target_gradients, gradients)
    with without_autocast(gradients.device.type):
        # C = sum_i (g'_i - mean g') (g_i - mean g)^T / (B - 1)
        return _centred(target_gradients).T @ _centred(gradients) / (len(gradients) - 1)


def covariance_penalty(target_gradients: Tensor, gradients: Tensor, *, trace_weight: float = 1.0) -> Tensor:
    """||C||_F^2 + beta (tr C)^2 with C = Cov_B(g', g): the bracket of Eq. 14 (a scalar, in units of g^4).

    Of gradients with more columns than rows, as those by pixels, C is not formed. Of 16-bit gradients it is in float32.

    Args:
        target_gradients: g', [B, D].
        gradients: g, [B, D].
        trace_weight: beta.

    Raises:
        ValueError: for shapes that differ or fewer than two rows.
    """
    _check_pair(target_gradients, gradients)
    rows, columns = gradients.shape
    if columns <= rows:
        c = cross_covariance(target_gradients, gradients)
        return c.square().sum() + trace_weight * c.trace().square()
    with without_autocast(gradients.device.type):
        target_centred, centred = _centred(target_gradients), _centred(gradients)
        # ||C||_F^2 = tr(G'^T G G^T G') / (B - 1)^2 = sum_ij (G' G'^T)_ij (G G^T)_ij / (B - 1)^2, centred G', G [B, D]
        norm = ((target_centred @ target_centred.T) * (centred @ centred.T)).sum()
        trace = (target_centred * centred).sum()
        return (norm + trace_weight * trace.square()) / (rows - 1) ** 2


@in_full_precision
def decompose_cross_covariance(
    target_gradients: Tensor, gradients: Tensor, responsibilities: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Theorem 2: C = E[C_Z] + Cov(mu'_Z, mu_Z); returns (C, within, between), each [D, D].

    With p_z = mean_i r_iz and weights r_iz / sum_j r_jz inside cluster z; all with divisor N, so that the identity is
    exact to rounding.

    Args:
        target_gradients: g', [N, D].
        gradients: g, [N, D].
        responsibilities: r, [N, K], rows that sum to one.

    Raises:
        ValueError: for shapes that differ, fewer than two rows, and responsibilities that are none.
    """
    _check_pair(target_gradients, gradients)
    check_responsibilities(responsibilities, len(gradients))
    responsibilities = responsibilities.to(gradients)
    rows = len(gradients)
    mass = responsibilities.sum(dim=0)  # [K], N p_z
    divisor = mass.clamp(min=torch.finfo(mass.dtype).tiny).unsqueeze(1)
    target_mean, mean = target_gradients.mean(dim=0), gradients.mean(dim=0)
    columns = (target_gradients, gradients, responsibilities)
    width = gradients.shape[1]
    size = max(1, floats_at_once(gradients.device, cached=CHUNK_ROWS * width) // width)
    # mu'_z and mu_z, [K, D]; deviations from the mean of all, which lose fewer digits
    means = torch.zeros(len(mass), gradients.shape[1], dtype=mean.dtype, device=mean.device)
    target_means = torch.zeros_like(means)
    for target_part, part, r in zip(*(column.split(size) for column in columns)):
        target_means += r.T @ (target_part - target_mean)
        means += r.T @ (part - mean)
    target_means, means = target_means / divisor, means / divisor

    total = torch.zeros(gradients.shape[1], gradients.shape[1], dtype=mean.dtype, device=mean.device)
    within = torch.zeros_like(total)
    for target_part, part, r in zip(*(column.split(size) for column in columns)):
        target_part, part = target_part - target_mean, part - mean
        total += target_part.T @ part
        for z in range(len(mass)):
            # p_z C_z = sum_i r_iz (g'_i - mu'_z) (g_i - mu_z)^T / N
            within += ((target_part - target_means[z]) * r[:, z : z + 1]).T @ (part - means[z])
    # the mean of mu_z is that of all, zero, but for rounding
    p = (mass / rows).unsqueeze(1)
    target_left, left = (p * target_means).sum(dim=0), (p * means).sum(dim=0)
    between = (p * (target_means - target_left)).T @ (means - left)
    return total / rows - target_left.outer(left), within / rows, between


class CovariancePenalty:
    """The corrective term of Eq. 14, to be added to the critic loss: `loss = td_loss + penalty(critics, batch)`.

    Stateless: how often it is applied is the loop's business. g' and f' are detached and g' is masked by (1 - d), so it
    moves the critic only; member i of an ensemble pairs with target i, and the members are summed. It calls
    `torch.autograd.grad`, which the transforms of `torch.func` do not allow.

    kind="gradient", by `scale`, with P = ||C||_F^2 + beta (tr C)^2 and C = Cov_B(g', g):
        raw: weight * P.
        relative: weight * P / (tr Sigma' tr Sigma) * Var_B(Q_target(x')), both factors detached. A squared correlation
            (the divisor is the square of Eq. 10's bound) in units of the squared TD error: it scales with the rewards
            as the TD loss does and does not depend on the units of states and actions. Zero where a divisor vanishes.
        correlation: the same with tr Sigma not detached, so that shrinking the gradients does not lower it.
    kind="feature": weight * mean_i <f(s_i, a_i), f_target(s'_i, a'_i)>, the published code's default.

    Args:
        weight: lambda; at least 0.
        trace_weight: beta; at least 0. For kind="gradient".
        scale: "raw", "relative" or "correlation". For kind="gradient"; a feature penalty is always raw.
        kind: "gradient" or "feature".

    >>> q = torch.nn.Bilinear(2, 1, 1)
    >>> t = Transitions(observations=torch.randn(8, 2), actions=torch.randn(8, 1), rewards=torch.zeros(8),
    ...                 next_observations=torch.randn(8, 2), terminals=torch.zeros(8))
    >>> CovariancePenalty(0.1, scale="relative")(Critics(q, q), t).shape
    torch.Size([])
    """

    def __init__(
        self,
        weight: float,
        *,
        trace_weight: float = 1.0,
        scale: Literal["raw", "relative", "correlation"] = "raw",
        kind: Literal["gradient", "feature"] = "gradient",
    ) -> None:
        self.weight = check_number("weight", weight, minimum=0)
        self.trace_weight = check_number("trace_weight", trace_weight, minimum=0)
        check_choice("scale", scale, ("raw", "relative", "correlation"))
        check_choice("kind", kind, ("gradient", "feature"))
        if kind == "feature" and scale != "raw":
            fail("scale", "'raw' for kind='feature', which has no other form", repr(scale))
        self.scale = scale
        self.kind = kind

    def __call__(self, critics: Critics, batch: Transitions, *, values: Sequence[Tensor] | None = None) -> Tensor:
        """The penalty on one batch, a scalar with a graph to the critic's parameters.

        Args:
            critics: the critic and its target.
            batch: B transitions.
            values: for kind="gradient", each ensemble member's Q at (s, a), [B] or [B, 1], when the TD loss has
                computed it from the batch's observations and actions, and these require gradients: saves the critic's
                forward pass and a part of the backward pass. Of networks without dropout and batch statistics.

        Raises:
            ValueError: for critics of the wrong form (see `Critics`), and for gradients of fewer than two transitions.
        """
        check_critics(critics)
        if not hasattr(batch, "next_observations"):
            fail("batch", "Transitions, as the buffer's `sample` gives them", type(batch).__name__)
        if values is not None and self.kind == "feature":
            fail("values", "None for kind='feature', which does not use them", "values")
        if torch.compiler.is_compiling():
            # AOT autograd has no second derivatives: in a compiled loss the penalty runs eagerly.
            evaluate: Callable[..., Tensor] = torch.compiler.disable(self._evaluate)
            return evaluate(critics, batch, values)
        return self._evaluate(critics, batch, values)

    @outside_inference_mode
    def _evaluate(self, critics: Critics, batch: Transitions, values: Sequence[Tensor] | None) -> Tensor:
        # Of attention, only this form has second derivatives.
        with critics.evaluating(), eagerly(), sdpa_kernel(SDPBackend.MATH):
            return self._feature(critics, batch) if self.kind == "feature" else self._gradient(critics, batch, values)

    def _gradient(self, critics: Critics, batch: Transitions, values: Sequence[Tensor] | None) -> Tensor:
        if len(batch) < 2:
            fail("batch", "at least two transitions, or there is no covariance", len(batch))
        terms = [self._term(*pair) for pair in paired_gradients(critics, batch, values=values)]
        return self.weight * torch.stack(terms).sum()

    def _term(self, next_q: Tensor, target_g: Tensor, g: Tensor) -> Tensor:
        if self.scale == "raw":
            return covariance_penalty(target_g, g, trace_weight=self.trace_weight)
        # P / (tr Sigma' tr Sigma) is P of g' / sqrt(tr Sigma') and g / sqrt(tr Sigma), which can not overflow
        target_trace, trace = target_g.var(dim=0).sum(), g.detach().var(dim=0).sum()
        vanishes = (target_trace <= rounding_noise(target_g)) | (trace <= rounding_noise(g))
        one = torch.ones_like(trace)
        target_unit = target_g * torch.where(vanishes, one, target_trace).rsqrt()
        unit = g * torch.where(vanishes, one, trace).rsqrt()
        term = covariance_penalty(target_unit, unit, trace_weight=self.trace_weight) * next_q.var()
        if self.scale == "correlation":
            term = term / torch.where(vanishes, one, unit.var(dim=0).sum())  # by one, whose gradient is what counts
        return torch.where(vanishes, torch.zeros_like(term), term)

    def _feature(self, critics: Critics, batch: Transitions) -> Tensor:
        with torch.no_grad():
            target_f = member_features(critics, critics.target, *critics.next_inputs(batch), name="target")
        f = member_features(critics, critics.critic, *critics.inputs(batch), name="critic")
        if len(f) != len(target_f):
            fail("target", f"as many members as the critic has, {len(f)}", len(target_f))
        return self.weight * torch.stack([(a * b).sum(dim=1).mean() for a, b in zip(f, target_f)]).sum()


def rounding_noise(gradients: Tensor) -> Tensor:
    """The trace of a covariance that is all rounding: a spread of a few dozen epsilon of the gradients' size."""
    precision = torch.finfo(gradients.dtype)
    roundings = HALF_ROUNDINGS if precision.bits == 16 else ROUNDINGS
    return precision.tiny + (roundings * precision.eps) ** 2 * gradients.detach().square().sum(dim=1).mean()


def span_of(target_gradients: Tensor, gradients: Tensor) -> Tensor | None:
    """An orthonormal basis [D, 2 N] of what gradients [N, D] span, where their columns are more; else None.

    Products of gradients, and the norms and traces of their covariances, are the same in it.
    """
    rows, columns = gradients.shape
    if columns <= 2 * rows:
        return None
    basis: Tensor = torch.linalg.qr(torch.cat([target_gradients, gradients]).T)[0]
    return basis


def _centred(values: Tensor) -> Tensor:
    """Less their mean, in float32 at least: 16-bit squares overflow, and torch 2.8 has no trace of bfloat16."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return values - values.mean(dim=0)


def _check_pair(target_gradients: Tensor, gradients: Tensor) -> None:
    for name, value in (("target_gradients", target_gradients), ("gradients", gradients)):
        if not isinstance(value, Tensor):
            fail(name, "a tensor [B, D]", type(value).__name__)
    if gradients.ndim != 2 or target_gradients.shape != gradients.shape:
        fail(
            "target_gradients and gradients",
            "one shape [B, D]",
            f"{shape_of(target_gradients)} and {shape_of(gradients)}",
        )
    if len(gradients) < 2:
        fail("gradients", "at least two rows, or there is no covariance", len(gradients))
