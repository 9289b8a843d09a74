"""What C4 puts into an implementation object of d3rlpy's: the penalty in the critic loss."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from d3rlpy.algos import QLearningAlgoImplBase
from d3rlpy.torch_utility import TorchMiniBatch

from c4buffer import CovariancePenalty, Critics
from c4buffer._checks import fail, shape_or_type

from .config import C4Config
from .dataset import from_mini_batch
from .graphs import capture_twice
from .reading import critics_of_impl, is_discrete
from .sharing import can_be_shared, takes_values, values_kept

SETTINGS = ("penalty_weight", "penalty_kind", "penalty_scale", "penalty_every", "trace_weight", "next_action")


class C4Impl(QLearningAlgoImplBase):
    """What C4 adds to an implementation object: the penalty in the critic loss.

    Attributes:
        c4_critics: the networks as Critics.
        c4_penalty: `(critics, batch) -> scalar`; may be replaced after the networks are built. With a number of 0 as
            its `weight` it is not called. A CovariancePenalty of gradients also gets the TD loss's values, where the
            networks allow it.
    """

    c4_critics: Critics
    c4_penalty: Any
    _c4_made: CovariancePenalty  # by the config
    _c4_settings: tuple[Any, ...]  # what it was made of
    _c4_every: int
    _c4_due: bool
    _c4_heard: bool  # whether the penalty has ever been asked for, or missed
    _c4_shares: bool
    _c4_discrete: bool
    _c4_penalties: list[torch.Tensor]  # of the running update, where no loss record takes them

    def __reduce_ex__(self, protocol: Any) -> Any:
        return bare, (_impl_class, type(self).__bases__[1]), self.__dict__

    def inner_update(self, batch: TorchMiniBatch, grad_step: int) -> dict[str, float]:
        weight = getattr(self.c4_penalty, "weight", None)
        off = isinstance(weight, (int, float)) and weight == 0
        self._c4_due = not off and grad_step % self._c4_every == 0
        self._c4_penalties.clear()
        before = None if self._c4_heard or not self._c4_due else self._c4_versions()
        metrics: dict[str, float] = super().inner_update(batch, grad_step)
        if before is not None and not self._c4_heard and before != self._c4_versions():
            self._c4_heard = True
            name = type(self).__bases__[1].__name__
            warnings.warn(
                f"no penalty is added: {name} trains its critic without compute_critic_loss or compute_loss",
                stacklevel=2,
            )
        for penalty in self._c4_penalties:
            metrics["c4_penalty"] = float(penalty)
        return metrics

    def _c4_versions(self) -> list[int]:
        """They change when an optimizer has stepped: some algorithms leave their critic as it is at first."""
        return [parameter._version for parameter in self.modules.q_funcs.parameters()]

    def compute_critic_loss(self, batch: TorchMiniBatch, q_tpn: torch.Tensor) -> Any:
        """The loss of an actor-critic's critic, with the penalty when it is due."""
        return self._c4_penalised(super().compute_critic_loss, batch, q_tpn)

    def compute_loss(self, batch: TorchMiniBatch, q_tpn: torch.Tensor) -> Any:
        """The loss of a Q-function without an actor, with the penalty when it is due."""
        return self._c4_penalised(super().compute_loss, batch, q_tpn)

    def _c4_penalised(self, compute: Callable[..., Any], batch: TorchMiniBatch, q_tpn: torch.Tensor) -> Any:
        if not self._c4_due:
            return compute(batch, q_tpn)
        self._c4_heard = True
        options: dict[str, Any] = {}
        if self._c4_shares and takes_values(self.c4_penalty):
            with values_kept(self.modules.q_funcs, batch) as (copies, values):
                loss = compute(batch, q_tpn)
            if len(values) == len(self.modules.q_funcs):
                batch, options["values"] = copies, values
        else:
            loss = compute(batch, q_tpn)
        penalty = self.c4_penalty(self.c4_critics, from_mini_batch(batch, discrete=self._c4_discrete), **options)
        if not isinstance(penalty, torch.Tensor) or penalty.ndim > 0:
            got = shape_or_type(penalty)
            fail("c4_penalty", "a callable that returns a tensor of one number, []", got)
        if isinstance(loss, torch.Tensor):  # DiscreteSAC's
            self._c4_penalties.append(penalty.detach())
            return loss + self._c4_every * penalty
        parts = {field.name: getattr(loss, field.name) for field in dataclasses.fields(loss)}
        name = "critic_loss" if "critic_loss" in parts else "loss"
        parts[name] = parts[name] + self._c4_every * penalty
        return _loss_class(loss.__class__)(**parts, c4_penalty=penalty.detach())


def arm_impl(impl: Any, config: C4Config) -> None:
    impl._c4_discrete = is_discrete(impl)
    impl._c4_shares = can_be_shared(impl.modules.q_funcs)
    impl._c4_due = impl._c4_heard = False
    impl._c4_penalties = []
    impl._c4_settings = ()
    impl._c4_made = impl.c4_penalty = None
    follow(impl, config)
    impl.__class__ = _impl_class(impl.__class__)
    capture_twice(impl)


def follow(impl: Any, config: C4Config) -> None:
    """Take the config's settings, where they have changed; a penalty that was put in place of theirs stays."""
    settings = tuple(getattr(config, name) for name in SETTINGS)
    if settings == impl._c4_settings:
        return
    critics = critics_of_impl(impl, next_action=config.next_action)
    kind: Any = config.penalty_kind
    scale: Any = config.penalty_scale if kind == "gradient" else "raw"
    made = CovariancePenalty(config.penalty_weight, trace_weight=config.trace_weight, scale=scale, kind=kind)
    if impl.c4_penalty is impl._c4_made:
        impl.c4_penalty = made
    impl.c4_critics, impl._c4_made = critics, made
    impl._c4_every, impl._c4_settings = config.penalty_every, settings


def bare(subclass_of: Callable[[Any], type], base: Any) -> Any:
    """An object for a copy or a pickle to fill; pickle finds no class by name that was made at run time."""
    return object.__new__(subclass_of(base))


@functools.cache
def _impl_class(base: Any) -> type:
    return type(f"C4{base.__name__}", (C4Impl, base), {"__module__": __name__})


@functools.cache
def _loss_class(base: Any) -> type:
    """The loss record of an algorithm with the penalty beside it, so that d3rlpy logs it."""
    return dataclasses.make_dataclass(f"C4{base.__name__}", [("c4_penalty", torch.Tensor)], bases=(base,), frozen=True)
