"""Gradients of critics by their inputs: of the members' mean, and member by member for the penalty."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import check_finite, fail
from .critics import Critics, member_values, members_of
from .observations import Observations, observation_leaves, with_leaves
from .transitions import Transitions


def differentiable_inputs(observations: Observations, actions: Tensor) -> tuple[Observations, Tensor, list[Tensor]]:
    """Copies to differentiate by, and the leaves of x in order: x = (s, a), or s alone for discrete actions."""
    leaves = [
        _differentiable(leaf if leaf.is_floating_point() else leaf.float()) for leaf in observation_leaves(observations)
    ]
    observations = with_leaves(observations, leaves)
    if actions.is_floating_point():
        actions = _differentiable(actions)
        leaves = [*leaves, actions]
    return observations, actions, leaves


def _differentiable(values: Tensor) -> Tensor:
    return values.detach().requires_grad_()


def flat_gradients(
    outputs: Sequence[Tensor],
    leaves: Sequence[Tensor],
    *,
    create_graph: bool = False,
    retain_graph: bool = False,
    name: str,
) -> list[Tensor]:
    """Gradient of the sum of `outputs` by each leaf, [B, d] each; zeros for a leaf that they do not depend on."""
    if not all(output.requires_grad for output in outputs):
        fail(name, "values that can be differentiated by observations and actions", "values without a graph")
    gradients = torch.autograd.grad(
        outputs,
        leaves,
        [torch.ones_like(output) for output in outputs],
        create_graph=create_graph,
        retain_graph=create_graph or retain_graph,
        allow_unused=True,
    )
    if all(gradient is None for gradient in gradients):
        fail(name, "values that depend on observations or actions", "values that depend on neither")
    return [
        torch.zeros_like(leaf).flatten(1) if gradient is None else gradient.flatten(1)
        for leaf, gradient in zip(leaves, gradients)
    ]


def mean_gradient(critic: Any, observations: Observations, actions: Tensor, *, name: str) -> Tensor:
    """Of the mean of the members' values, [B, D]; without a graph."""
    observations, actions, leaves = differentiable_inputs(observations, actions)
    with torch.enable_grad():
        values = member_values(critic, observations, actions, name=name)
        mean = torch.stack(values).mean(dim=0)
    check_finite(name, mean.detach(), hint="; has the training diverged?")
    gradient = torch.cat(flat_gradients([mean], leaves, name=name), dim=1)
    check_finite(f"gradient of {name}", gradient, hint="; has the training diverged?")
    return gradient


def paired_gradients(
    critics: Critics, batch: Transitions, *, values: Sequence[Tensor] | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each ensemble member: Q_target(x') [B], g' [B, D] (both detached, g' masked), and g [B, D] with its graph.

    Args:
        values: each member's Q at (s, a), [B] or [B, 1], where it is known already: computed from the batch's own
            observations and actions, which require gradients.

    Raises:
        ValueError: if critic and target have different numbers of members; for values without such a graph.
    """
    next_values, target_g = _member_gradients(critics.target, *critics.next_inputs(batch), name="target")
    if values is None:
        _, g = _member_gradients(critics.critic, *critics.inputs(batch), name="critic", create_graph=True)
    else:
        g = _gradients_of_values(batch, values)
    if len(g) != len(target_g):
        fail("target", f"as many members as the critic has, {len(g)}", len(target_g))
    alive = (1 - batch.terminals.to(g[0])).unsqueeze(1)
    for value, target_gradient, gradient in zip(next_values, target_g, g):
        yield value.detach(), target_gradient * alive, gradient


def _gradients_of_values(batch: Transitions, values: Sequence[Tensor]) -> list[Tensor]:
    leaves = observation_leaves(batch.observations)
    if batch.actions.is_floating_point():
        leaves = [*leaves, batch.actions]
    if not all(leaf.requires_grad for leaf in leaves):
        fail("values", "observations and actions that require gradients, from which they were computed", "others")
    return [torch.cat(flat_gradients([value], leaves, create_graph=True, name="values"), dim=1) for value in values]


def _member_gradients(
    critic: Any, observations: Observations, actions: Tensor, *, name: str, create_graph: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Values [B] and input gradients [B, D] of each member."""
    members = members_of(critic)
    # A member of a sequence has inputs of its own, so that one backward pass serves them all.
    copies = [differentiable_inputs(observations, actions) for _ in members]
    with torch.enable_grad():
        outputs = [member_values(member, *copy[:2], name=name) for member, copy in zip(members, copies)]
    if all(len(output) == 1 for output in outputs):
        leaves = [leaf for copy in copies for leaf in copy[2]]
        parts = flat_gradients([output[0] for output in outputs], leaves, create_graph=create_graph, name=name)
        width = len(copies[0][2])
        gradients = [torch.cat(parts[i : i + width], dim=1) for i in range(0, len(parts), width)]
        return [output[0] for output in outputs], gradients
    gradients = [
        torch.cat(
            flat_gradients([value], leaves, create_graph=create_graph, retain_graph=True, name=name),
            dim=1,
        )
        for output, (_, _, leaves) in zip(outputs, copies)
        for value in output
    ]
    return [value for output in outputs for value in output], gradients
