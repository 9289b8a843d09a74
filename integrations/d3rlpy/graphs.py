"""d3rlpy's captured critic update, twice: with the penalty and without it, as what is captured takes no branches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from d3rlpy.torch_utility import CudaGraphWrapper, TorchMiniBatch
from torch import Tensor, nn

CAPTURED = {"_compute_critic_grad": "compute_critic_grad", "_compute_grad": "compute_grad"}  # what holds: what is held


def capture_twice(impl: Any) -> None:
    """Replace the one graph that d3rlpy captures of the critic's loss and gradient by two."""
    for holder, method in CAPTURED.items():
        if isinstance(getattr(impl, holder, None), CudaGraphWrapper):
            setattr(impl, holder, TwoGraphs(impl, getattr(impl, method)))


class TwoGraphs:
    """`batch -> loss`, by the graph that fits the update: `impl._c4_due` says which.

    The graph with the penalty is captured from eager code, since a compiled function has no second derivatives.
    """

    def __init__(self, impl: Any, compute: Callable[[TorchMiniBatch], Any]) -> None:
        parameters = [parameter for group in impl.q_function_optim.param_groups for parameter in group["params"]]
        self._impl = impl
        self._with = _Graph(compute, parameters, impl._c4_penalties, compiled=False)
        self._without = _Graph(compute, parameters, impl._c4_penalties, compiled=True)

    def __call__(self, batch: TorchMiniBatch) -> Any:
        return (self._with if self._impl._c4_due else self._without)(batch)


class _Graph:
    """One of them. A replay writes gradients where they stood when it was captured: they are put back in place."""

    def __init__(
        self,
        compute: Callable[[TorchMiniBatch], Any],
        parameters: list[nn.Parameter],
        penalties: list[Tensor],
        *,
        compiled: bool,
    ) -> None:
        self._wrapper: Any = CudaGraphWrapper(compute, compile_func=compiled)
        self._parameters = parameters
        self._penalties = penalties  # where the code that is captured leaves them
        self._gradients: list[Tensor | None] | None = None
        self._warm_ups: list[list[Tensor | None]] = []
        self._captured_penalties: list[Tensor] = []

    def __call__(self, batch: TorchMiniBatch) -> Any:
        out = self._wrapper(batch)
        if self._wrapper._graph is None:
            # An actor's graph that is captured meanwhile adds to these: it must find them where they were.
            self._warm_ups.append([parameter.grad for parameter in self._parameters])
            return out
        if self._gradients is None:
            # While it is captured nothing is computed: the gradients' new places are filled by a first replay.
            self._gradients = [parameter.grad for parameter in self._parameters]
            self._captured_penalties = self._penalties[-1:]
            self._wrapper._graph.replay()
            out = self._wrapper._out
        for parameter, gradient in zip(self._parameters, self._gradients):
            parameter.grad = gradient
        self._penalties[:] = self._captured_penalties
        return out
