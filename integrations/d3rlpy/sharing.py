"""The TD loss's own forward pass through the Q-functions, kept for the penalty, which would otherwise make it again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from d3rlpy.models.torch.q_functions import ContinuousMeanQFunction
from d3rlpy.torch_utility import TorchMiniBatch
from torch import Tensor, nn

from c4buffer import CovariancePenalty

MODE_DEPENDENT = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)
KNOWN = ("torch.nn.", "d3rlpy.models.")


def can_be_shared(q_functions: Any) -> bool:
    """Whether the Q-functions do in training what they do in evaluation, where the penalty looks at them."""
    return all(type(q) is ContinuousMeanQFunction for q in q_functions) and all(
        type(module).__module__.startswith(KNOWN) and not isinstance(module, MODE_DEPENDENT)
        for module in q_functions.modules()
    )


def takes_values(penalty: Any) -> bool:
    """Whether a penalty can be given the TD loss's values: a CovariancePenalty of gradients, called as it is."""
    own_call = isinstance(penalty, CovariancePenalty) and type(penalty).__call__ is CovariancePenalty.__call__
    return own_call and penalty.kind == "gradient"


@contextmanager
def values_kept(q_functions: Any, batch: TorchMiniBatch) -> Iterator[tuple[TorchMiniBatch, list[Tensor]]]:
    """The batch with inputs to differentiate by, and each Q-function's values there, in their order.

    While this lasts, the first call of each Q-function with the batch's own observations and actions is given copies
    that require gradients; everything else that a loss computes goes on without them. The values come at the end, one
    for each Q-function that was called so.
    """
    copies = _differentiable(batch)
    found: dict[int, Tensor] = {}
    called: set[int] = set()
    values: list[Tensor] = []

    def lend(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if id(module) in called or inputs[0] is not batch.observations or inputs[1] is not batch.actions:
            return None
        called.add(id(module))
        return copies.observations, copies.actions

    def keep(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs[0] is copies.observations:
            found[id(module)] = output.q_value

    handles = [q.register_forward_pre_hook(lend) for q in q_functions]
    handles += [q.register_forward_hook(keep) for q in q_functions]
    try:
        yield copies, values
    finally:
        for handle in handles:
            handle.remove()
        values.extend(found[id(q)] for q in q_functions if id(q) in found)


def _differentiable(batch: TorchMiniBatch) -> TorchMiniBatch:
    """The batch with observations and actions that require gradients."""
    parts = batch.observations if isinstance(batch.observations, (list, tuple)) else [batch.observations]
    leaves = [part.detach().requires_grad_() for part in parts]
    return dataclasses.replace(
        batch,
        observations=leaves if isinstance(batch.observations, (list, tuple)) else leaves[0],
        actions=batch.actions.detach().requires_grad_(),
    )
