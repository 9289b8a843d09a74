"""The TD loss's own forward pass through the Q-functions, kept for the penalty, which would otherwise make it again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from d3rlpy.models.torch.q_functions import ContinuousMeanQFunction
from d3rlpy.torch_utility import TorchMiniBatch
from torch import Tensor, nn

MODE_DEPENDENT = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)
KNOWN = ("torch.nn.", "d3rlpy.models.")


def can_be_shared(q_functions: Any) -> bool:
    """Whether the Q-functions do in training what they do in evaluation, where the penalty looks at them."""
    return all(type(q) is ContinuousMeanQFunction for q in q_functions) and all(
        type(module).__module__.startswith(KNOWN) and not isinstance(module, MODE_DEPENDENT)
        for module in q_functions.modules()
    )


def differentiable(batch: TorchMiniBatch) -> TorchMiniBatch:
    """The batch with observations and actions that require gradients."""
    parts = batch.observations if isinstance(batch.observations, (list, tuple)) else [batch.observations]
    leaves = [part.detach().requires_grad_() for part in parts]
    return dataclasses.replace(
        batch,
        observations=leaves if isinstance(batch.observations, (list, tuple)) else leaves[0],
        actions=batch.actions.detach().requires_grad_(),
    )


@contextmanager
def values_kept(q_functions: Any, batch: TorchMiniBatch) -> Iterator[list[Tensor]]:
    """Collects each Q-function's first values at the batch's own observations and actions, in their order."""
    found: dict[int, Tensor] = {}
    values: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs[0] is batch.observations and inputs[1] is batch.actions:
            found.setdefault(id(module), output.q_value)

    handles = [q.register_forward_hook(keep) for q in q_functions]
    try:
        yield values
    finally:
        for handle in handles:
            handle.remove()
        values.extend(found[id(q)] for q in q_functions if id(q) in found)
