"""ACTIVE's adaptive cloning temperature: dual gradient descent on beta."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_finite, check_number, fail, is_finite_number, shape_of
from ..collective import Group, ranks_in, total

PATIENCE = 1000  # steps at the bound in a row before it is said


class TemperatureController(nn.Module):
    """beta of Eq. 13, the multiplier of E[log pi(a | s)] >= H_D: too little likelihood raises it, too much lowers it.

    A module, so that beta is saved with the networks; its gradient is that of Eq. 14, and a step is plain descent:
    beta <- min(max(beta - lambda (mean log pi - H_D), 0), maximum).

    Args:
        target: H_D, in nats per action vector; a number, as `estimate_log_likelihood_target` gives it. None where it
            will be set, or loaded, before the first step. It is saved with beta.
        learning_rate: lambda of beta.
        initial: beta at the start, from 0 to `maximum`.
        maximum: its upper bound; None for none. Where beta stays at it for 1,000 steps, a warning says so once: no
            policy that this loss finds is as likely as H_D asks.
        process_group: of the ranks of one training, whose mean likelihoods are averaged; None for this process alone.

    >>> controller = TemperatureController(-2.0, learning_rate=0.5)
    >>> controller.step(torch.tensor([-3.0, -5.0]))  # two nats too little
    >>> controller.beta.item()
    2.0
    """

    def __init__(
        self,
        target: float | None,
        *,
        learning_rate: float = 3e-4,
        initial: float = 1.0,
        maximum: float | None = None,
        process_group: Group | None = None,
    ) -> None:
        super().__init__()
        self.target = target
        self.learning_rate = check_number("learning_rate", learning_rate, minimum=0)
        if maximum is not None:
            check_number("maximum", maximum, minimum=0, exclusive=True)
        if check_number("initial", initial, minimum=0) > (math.inf if maximum is None else maximum):
            fail("initial", f"at most maximum, {maximum!r}", repr(initial))
        self.maximum = maximum
        self.process_group = process_group
        self.beta = nn.Parameter(torch.tensor(float(initial)))
        self._steps_at_maximum = 0
        self._warned = False

    @property
    def target(self) -> float | None:
        """H_D; None before it is known."""
        return self._target

    @target.setter
    def target(self, value: Any) -> None:
        if value is not None and not is_finite_number(value):
            fail("target", "a finite number or None", repr(value))
        self._target: float | None = None if value is None else float(value)

    def get_extra_state(self) -> Tensor:
        """H_D for the state dict, as a number of full precision that `half` and `to` leave alone; NaN for None."""
        return torch.tensor(math.nan if self._target is None else self._target, dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        value = float(state)
        self.target = None if math.isnan(value) else value

    def loss(self, log_prob: Tensor) -> Tensor:
        """L(beta) = beta (mean log pi - H_D) (Eq. 14), a scalar whose gradient reaches beta only.

        Args:
            log_prob: log pi(a | s) of the data's actions, summed over action dimensions, [B].
        """
        return self.beta * (self._mean(log_prob) - self._known_target())

    @torch.no_grad()
    def step(self, log_prob: Tensor) -> None:
        """One step of projected gradient descent on L(beta).

        Args:
            log_prob: [B].

        Raises:
            ValueError: for values that are not finite; beta stays as it was.
        """
        mean = self._mean(log_prob)
        check_finite("log_prob", mean.reshape(1), hint="; has the training diverged?")
        # dL/dbeta = mean log pi - H_D
        self.beta.sub_(self.learning_rate * (mean - self._known_target())).clamp_(min=0, max=self.maximum)
        if self.maximum is not None and not self._warned:
            self._watch(mean)

    @torch.no_grad()
    def bound(self) -> None:
        """Lower a beta that was loaded, or met a lower `maximum` since, to that."""
        if self.maximum is not None:
            self.beta.clamp_(max=self.maximum)

    def _mean(self, log_prob: Tensor) -> Tensor:
        if log_prob.ndim != 1 or len(log_prob) == 0:
            fail("log_prob", "[B] with at least one row", shape_of(log_prob))
        mean = total(log_prob.detach().mean(), self.process_group)
        return mean / ranks_in(self.process_group)

    def _known_target(self) -> float:
        if self._target is None:
            fail("target", "H_D to be set before it is compared", "None")
        return self._target

    def _watch(self, mean: Tensor) -> None:
        assert self.maximum is not None
        beta = self.beta.detach()
        at_maximum = bool(beta >= beta.new_tensor(self.maximum))  # as beta's dtype rounds it
        self._steps_at_maximum = self._steps_at_maximum + 1 if at_maximum else 0
        if self._steps_at_maximum == PATIENCE:
            self._warned = True
            warnings.warn(
                f"beta has been at its maximum, {self.maximum:g}, for {PATIENCE:,} steps; the mean log-likelihood is "
                f"{float(mean):.3g} and the target {self.target:.3g}: lower the target, which may be out of the "
                "policy's reach, or raise the maximum",
                stacklevel=4,  # the caller of `step`, past torch's no_grad
            )
