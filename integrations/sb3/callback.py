"""The seam: binds a model's critics to its buffer, and adds the penalty's gradient to the critic's."""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from stable_baselines3.common.callbacks import BaseCallback, EventCallback
from stable_baselines3.common.type_aliases import RolloutReturn

from c4buffer import CovariancePenalty
from c4buffer._checks import check_integer, fail

from .buffers import _Clustered
from .reading import critics_of, optimizer_of, transitions_of_samples
from .worn import Worn, worn_over

ATTACHED: weakref.WeakKeyDictionary[Any, _Attachment] = weakref.WeakKeyDictionary()
# Of each model, the steps of its critic with a penalty attached.
STEPS: weakref.WeakKeyDictionary[Any, itertools.count[int]] = weakref.WeakKeyDictionary()


class C4Callback(BaseCallback):
    """C4 for the time of a `learn`: single-cluster batches, and the covariance penalty in the critic's loss.

    The model needs one of the clustered buffers. Its training code is its own: where its critic's optimizer clears the
    gradients, the penalty's are put in, and the loss's come on top, so that clipping sees both.

    Args:
        penalty: `(critics, batch) -> scalar`, as CovariancePenalty(0.1, scale="relative"). None for batches alone.
        penalty_every: on every k-th step of the critic, with k times the weight, counted on from `learn` to `learn`.
        verbose: as in every callback of SB3.

    .. code-block:: python

        model.learn(100_000, callback=C4Callback(CovariancePenalty(0.1, scale="relative"), penalty_every=4))
    """

    def __init__(self, penalty: CovariancePenalty | None = None, *, penalty_every: int = 1, verbose: int = 0) -> None:
        super().__init__(verbose)
        self.penalty = _checked_penalty(penalty)
        self.penalty_every = check_integer("penalty_every", penalty_every, minimum=1)

    def _on_training_start(self) -> None:
        if isinstance(self.parent, EventCallback):
            expected = "C4Callback itself, or a list with it: others do not pass the end of the training on"
            fail("callback", expected, f"one inside {type(self.parent).__name__}")
        attachment = ATTACHED.get(self.model)
        if attachment is not None and attachment.for_learn:
            end_of_learn(self.model)
            fail("callback", "one C4Callback in a learn (the sum of two penalties is a penalty)", "two")
        attach(self.model, self.penalty, self.penalty_every, for_learn=True)

    def _on_step(self) -> bool:
        attachment = ATTACHED.get(self.model)
        if attachment is not None:
            for name, value in attachment.metrics().items():
                self.logger.record(f"c4/{name}", value)
        return True

    def _on_training_end(self) -> None:
        end_of_learn(self.model)


@contextmanager
def attached(model: Any, penalty: CovariancePenalty | None = None, *, penalty_every: int = 1) -> Iterator[Any]:
    """C4 for the time of a `with`, for calls of `model.train` alone. Nothing is left behind, whatever is raised.

    .. code-block:: python

        with attached(model, CovariancePenalty(0.1, scale="relative")):
            model.train(gradient_steps=100, batch_size=256)
    """
    check_integer("penalty_every", penalty_every, minimum=1)
    attach(model, _checked_penalty(penalty), penalty_every)
    try:
        yield model
    finally:
        detach(model)


def _checked_penalty(penalty: Any) -> Any:
    if penalty is not None and not callable(penalty):
        fail("penalty", "a callable as CovariancePenalty(0.1), or None", repr(penalty))
    return penalty


def attach(model: Any, penalty: Any, penalty_every: int, *, for_learn: bool = False) -> None:
    """Bind the buffer and arm the optimizer, for as long as `detach` is not called.

    Until then it takes the place of what a `with` around it has attached; what a `learn` has left is taken off first.

    `for_learn`: until the running `learn` ends, or the next begins.
    """
    critics = critics_of(model)
    if not isinstance(model.replay_buffer, _Clustered):
        name = type(model.replay_buffer).__name__
        fail("model", "one with replay_buffer_class=ClusteredReplayBuffer, or another clustered one", f"a {name}")
    for name in ("observation_space", "action_space", "n_envs"):
        own, buffers = getattr(model, name), getattr(model.replay_buffer, name)
        if own != buffers:
            fail("model", f"a replay buffer of its own {name}, {own}", str(buffers))
    end_of_learn(model)
    around = ATTACHED.get(model)
    if around is not None:
        around.remove()
    ATTACHED[model] = _Attachment(model, critics, penalty, penalty_every, for_learn=for_learn, around=around)
    kind: Any = type(model)
    if not issubclass(kind, _Watched):
        model.__class__ = worn_over(_Watched, kind)


def detach(model: Any) -> None:
    """Leave the model as it was before the last `attach`."""
    attachment = ATTACHED.pop(model, None)
    if attachment is not None:
        attachment.remove()
        if attachment.around is not None:
            ATTACHED[model] = attachment.around.anew(model)
            return
    if type(model).__bases__[0] is _Watched:
        model.__class__ = type(model).__bases__[1]


def end_of_learn(model: Any) -> None:
    """What was attached for a `learn` is taken off, whatever ended it; what a `with` has attached stays."""
    attachment = ATTACHED.get(model)
    if attachment is None or attachment.for_learn:
        detach(model)


class _Watched(Worn):
    """Takes off what a `learn` has attached when an exception leaves the model's own code: no callback hears of it.

    What the exception of another callback has left is taken off when the next `learn` begins.
    """

    def _setup_learn(self, *arguments: Any, **options: Any) -> Any:
        set_up = super()._setup_learn
        end_of_learn(self)
        return set_up(*arguments, **options)

    def collect_rollouts(self, *arguments: Any, **options: Any) -> RolloutReturn:
        with _taken_off_by_exceptions(self):
            return super().collect_rollouts(*arguments, **options)

    def train(self, *arguments: Any, **options: Any) -> None:
        with _taken_off_by_exceptions(self):
            attachment = ATTACHED.get(self)
            if attachment is not None and attachment.is_of_another(self):
                attachment.remove()
                attachment = ATTACHED[self] = attachment.anew(self)
            super().train(*arguments, **options)
            if attachment is not None:
                attachment.check_heard()


@contextmanager
def _taken_off_by_exceptions(model: Any) -> Iterator[None]:
    try:
        yield
    except BaseException:
        end_of_learn(model)
        raise


class _Attachment:
    """What is put into one model for a time, in place of what is `around`."""

    def __init__(
        self,
        model: Any,
        critics: Any,
        penalty: Any,
        penalty_every: int,
        *,
        for_learn: bool,
        around: _Attachment | None,
    ) -> None:
        self.critics, self.penalty, self.every = critics, penalty, penalty_every
        self.for_learn, self.around = for_learn, around
        self.buffer: Any = model.replay_buffer
        self.optimizer = optimizer_of(model)
        self.shared = _shared_parameters(model)
        self.before: Any = None
        self.steps = STEPS.setdefault(model, itertools.count())
        self.heard = self.warned = False
        self.last_penalty: torch.Tensor | None = None
        self.buffer.bind(critics, seed=model.seed)
        if penalty is not None:
            self.before = vars(self.optimizer).get("zero_grad")
            clear: Callable[..., None] = self.optimizer.zero_grad
            self.optimizer.zero_grad = lambda *a, **k: self._cleared(clear, *a, **k)  # type: ignore[method-assign]

    def _cleared(self, clear: Callable[..., None], *arguments: Any, **options: Any) -> None:
        clear(*arguments, **options)
        batch = self.buffer.take_batch()
        if batch is None:  # cleared once more, without a new batch
            return
        self.heard = True
        due = next(self.steps) % self.every == 0
        if not due or getattr(self.penalty, "weight", 1) == 0:
            return
        parameters = [
            parameter
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            if parameter.requires_grad and id(parameter) not in self.shared
        ]
        penalty = self.penalty(self.critics, transitions_of_samples(batch))
        self.last_penalty = penalty.detach()
        if not penalty.requires_grad:  # nothing that learns is in it, as behind a frozen feature extractor
            return
        for parameter, gradient in zip(parameters, _gradients(self.every * penalty, parameters)):
            if gradient is not None and parameter.grad is None:
                parameter.grad = torch.empty_like(parameter).copy_(gradient)  # in the parameter's own layout
            elif gradient is not None:
                parameter.grad += gradient

    def is_of_another(self, model: Any) -> bool:
        """Whether the model has another buffer or optimizer by now, or another model has bound its buffer."""
        replaced = model.replay_buffer is not self.buffer or optimizer_of(model) is not self.optimizer
        return replaced or not self.buffer.is_bound_to(self.critics)

    def anew(self, model: Any) -> _Attachment:
        """The same for what the model has now; this one must have been removed."""
        critics = critics_of(model)
        return _Attachment(model, critics, self.penalty, self.every, for_learn=self.for_learn, around=self.around)

    def check_heard(self) -> None:
        """After a `train`: a UserWarning, once, where no penalty could be added."""
        if self.penalty is not None and not (self.heard or self.warned) and self.buffer.take_batch() is not None:
            self.warned = True
            warnings.warn(
                "no penalty is added: train draws batches, but does not clear gradients by the zero_grad of the "
                "critic's optimizer",
                stacklevel=4,
            )

    def metrics(self) -> dict[str, float]:
        """Of the last refresh and the last penalty."""
        found = dict(self.buffer.c4_metrics)
        if self.last_penalty is not None:
            found["penalty"] = float(self.last_penalty)
        return found

    def remove(self) -> None:
        if self.penalty is not None:
            vars(self.optimizer).pop("zero_grad", None)
        if self.before is not None:
            self.optimizer.zero_grad = self.before  # type: ignore[method-assign]
        if self.buffer.is_bound_to(self.critics):
            self.buffer.unbind()


def _shared_parameters(model: Any) -> set[int]:
    """Of a feature extractor that learns by the actor's loss alone, though TD3's critic optimizer holds it."""
    critic = getattr(model, "critic", None)
    if not getattr(critic, "share_features_extractor", False):
        return set()
    return set(map(id, model.critic.features_extractor.parameters()))


def _gradients(loss: torch.Tensor, parameters: list[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
    """By the optimizer's own parameters only: nothing piles up in target networks."""
    return torch.autograd.grad(loss, parameters, allow_unused=True)
