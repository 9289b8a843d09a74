"""Critics, and the gradients and features read off them: transitions -> [N, 2D]."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import check_finite, check_integer, fail, shape_of
from .inference import outside_inference_mode
from .memory import bytes_made, rows_at_once
from .networks import modules_behind
from .transitions import Observations, Transitions, observation_leaves, with_leaves

CHUNK_ROWS = 4096  # rows whose gradients are taken at once: the activations of a 256-wide layer fit the cache
FEW_ROWS = 512  # a batch that is taken whole
PROBE_ROWS = 8


@dataclass(frozen=True)
class Critics:
    """A critic, its target, and how to read them: the one record that buffer, penalty and diagnostics take.

    Args:
        critic: Q. A callable `(observations, actions) -> [B]` or `[B, 1]`, an ensemble as `[n, B]`, `[n, B, 1]` or a
            sequence of those, or a sequence of callables (`[q1, q2]`, a ModuleList). For discrete actions (int64):
            `(observations) -> [B, n_actions]`, gathered at the action.
        target: the target critic, of the same form.
        policy: `policy(next_observations) -> a'`; when given, it replaces the data's next actions everywhere.
        features: `features(critic, observations, actions) -> [B, F]`, the last hidden layer, called for each member of
            a sequence. Default: the critic's own `features(observations, actions)` method; for discrete actions,
            it may be `features(observations)`.
        encode: `encode(observations) -> [B, L]`; when given, critic and target take this latent in place of the
            observations, and gradients are taken by it (for pixels).
    """

    critic: Any
    target: Any
    policy: Callable[[Observations], Tensor] | None = None
    features: Callable[[Any, Observations, Tensor], Tensor] | None = None
    encode: Callable[[Observations], Tensor] | None = None

    def __init__(
        self,
        critic: Any,
        target: Any,
        *,
        policy: Callable[[Observations], Tensor] | None = None,
        features: Callable[[Any, Observations, Tensor], Tensor] | None = None,
        encode: Callable[[Observations], Tensor] | None = None,
    ) -> None:
        for name, value in (("critic", critic), ("target", target)):
            members = members_of(value)
            if not members or not all(callable(member) for member in members):
                fail(name, "a callable or a sequence of callables", type(value).__name__)
        fields = {"critic": critic, "target": target, "policy": policy, "features": features, "encode": encode}
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Every network module that is reached through critic, target, policy, features and encode."""
        known: tuple[nn.Module, ...] | None = self.__dict__.get("_modules")
        if known is not None:
            return known
        parts = [*members_of(self.critic), *members_of(self.target), self.policy, self.features, self.encode]
        found: dict[nn.Module, None] = {}
        for part in parts:
            for root in modules_behind(part):
                found.update(dict.fromkeys(root.modules()))
        if all(part is None or isinstance(part, nn.Module) for part in parts):
            object.__setattr__(self, "_modules", tuple(found))  # what a function reaches may be another one next time
        return tuple(found)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """All networks in eval mode (no dropout, no batch statistics moved), each one's own mode restored after."""
        training = [module for module in self.modules if module.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True

    def inputs(self, batch: Transitions) -> tuple[Observations, Tensor]:
        """x = (s, a), with s encoded where there is an encoder."""
        return self._encoded(batch.observations), batch.actions

    def next_inputs(self, batch: Transitions) -> tuple[Observations, Tensor]:
        """x' = (s', a'), with a' from the policy where there is one."""
        actions = batch.next_actions
        if self.policy is not None:
            with torch.no_grad():
                actions = self.policy(batch.next_observations)
            shape = batch.actions.shape
            column = not batch.actions.is_floating_point() and getattr(actions, "shape", None) == (*shape, 1)
            if not isinstance(actions, Tensor) or not (actions.shape == shape or column):
                got = shape_of(actions) if isinstance(actions, Tensor) else type(actions).__name__
                fail("policy", f"a tensor of actions {shape_of(batch.actions)}", got)
            if not batch.actions.is_floating_point():
                actions = actions.reshape(shape).long()
        return self._encoded(batch.next_observations), actions

    def _encoded(self, observations: Observations) -> Observations:
        if self.encode is None:
            return observations
        with torch.no_grad():
            return self.encode(observations)


def members_of(critic: Any) -> Sequence[Any]:
    """The members of a sequence of callables; a single callable as a sequence of one."""
    if isinstance(critic, (list, tuple, nn.ModuleList)):
        return list(critic)
    return [critic]


def member_values(critic: Any, observations: Observations, actions: Tensor, *, name: str = "critic") -> list[Tensor]:
    """Q of each ensemble member at (observations, actions): n tensors [B]."""
    discrete = not actions.is_floating_point()
    values = []
    for member in members_of(critic):
        output = member(observations) if discrete else member(observations, actions)
        parts = list(output) if isinstance(output, (list, tuple)) else [output]
        for part in parts:
            values += _rows_of(part, actions, name=name) if discrete else _columns_of(part, len(actions), name=name)
    return values


def _columns_of(output: Any, batch_size: int, *, name: str) -> list[Tensor]:
    """[B], [B, 1], [n, B] or [n, B, 1] as n tensors [B]."""
    if isinstance(output, Tensor):
        if output.shape in ((batch_size,), (batch_size, 1)):
            return [output.reshape(batch_size)]
        if output.ndim == 3 and output.shape[2] == 1:
            output = output.squeeze(2)
        if output.ndim == 2 and output.shape[1] == batch_size:
            return list(output.unbind(0))
    expected = f"[B], [B, 1], [n, B] or [n, B, 1] with B = {batch_size} for continuous actions"
    return fail(name, expected, shape_of(output) if isinstance(output, Tensor) else type(output).__name__)


def _rows_of(output: Any, actions: Tensor, *, name: str) -> list[Tensor]:
    """[B, n_actions] or [n, B, n_actions] gathered at the actions, as n tensors [B]."""
    if isinstance(output, Tensor) and output.ndim in (2, 3) and output.shape[-2] == len(actions):
        table = output.reshape(-1, *output.shape[-2:])
        chosen = actions.reshape(1, -1, 1).expand(len(table), -1, 1)
        try:
            return list(table.gather(2, chosen).squeeze(2).unbind(0))
        except RuntimeError:
            lowest, highest = int(actions.min()), int(actions.max())
            if 0 <= lowest <= highest < table.shape[2]:
                raise
            fail("actions", f"numbers from 0 to {table.shape[2] - 1}, as {name} has them", f"{lowest} to {highest}")
    expected = f"[B, n_actions] or [n, B, n_actions] with B = {len(actions)} for discrete actions"
    return fail(name, expected, shape_of(output) if isinstance(output, Tensor) else type(output).__name__)


def differentiable_inputs(observations: Observations, actions: Tensor) -> tuple[Observations, Tensor, list[Tensor]]:
    """Copies to differentiate by, and the leaves of x in order: x = (s, a), or s alone for discrete actions."""
    leaves = [
        (leaf if leaf.is_floating_point() else leaf.float()).detach().requires_grad_()
        for leaf in observation_leaves(observations)
    ]
    observations = with_leaves(observations, leaves)
    if actions.is_floating_point():
        actions = actions.detach().requires_grad_()
        leaves = [*leaves, actions]
    return observations, actions, leaves


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
    return [
        torch.zeros_like(leaf).flatten(1) if gradient is None else gradient.flatten(1)
        for leaf, gradient in zip(leaves, gradients)
    ]


@outside_inference_mode
def stacked_gradients(critics: Critics, batch: Transitions, *, chunk_size: int | None = None) -> Tensor:
    """The pairs of input gradients that C4 clusters: y = [g', g], [N, 2D].

    g = grad_x Q(x) at x = (s, a) flattened; g' = (1 - d) grad_x' Q_target(x') at x' = (s', a'). For an ensemble Q is
    the members' mean. With discrete actions x = s. No graph is kept; modes, parameter gradients and statistics of the
    networks stay as they are.

    Args:
        critics: the critic and its target.
        batch: N transitions, on the critics' device.
        chunk_size: rows that are differentiated at once. None: as many as an eighth of the free memory holds, up to
            4,096 on a processor.

    Raises:
        ValueError: if a critic returns another shape than `Critics` names, or a value or gradient is not finite.
    """
    return _in_chunks(_stacked_gradients_of_chunk, critics, batch, chunk_size, "gradients")


@outside_inference_mode
def stacked_features(critics: Critics, batch: Transitions, *, chunk_size: int | None = None) -> Tensor:
    """The pairs of last hidden layers, y = [f', f], [N, 2F]: what C4's published code clusters by default.

    f = features of the critic at (s, a), f' = features of the target at (s', a'). The features of an ensemble's members
    stand side by side, so that F is their sum.

    Raises:
        ValueError: if there are no features to read, or they are not [B, F] and finite.
    """
    return _in_chunks(_stacked_features_of_chunk, critics, batch, chunk_size, "features")


def rows_for(critics: Critics, batch: Transitions, embedding: str = "gradients") -> int:
    """How many rows like these to embed at once: by what the networks make of a few of them, and by the free memory."""
    read = _stacked_gradients_of_chunk if embedding == "gradients" else _stacked_features_of_chunk
    if len(batch) < 2 * PROBE_ROWS:
        return CHUNK_ROWS
    eagerly = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    with critics.evaluating(), eagerly:
        try:
            few = bytes_made(lambda: read(critics, batch[:PROBE_ROWS]))
            twice = bytes_made(lambda: read(critics, batch[: 2 * PROBE_ROWS]))
        except Exception:  # whatever is wrong is said by the pass itself, of all the rows
            return CHUNK_ROWS
    per_row = max(1, (twice - few) // PROBE_ROWS)
    return rows_at_once(per_row, batch.rewards.device, cached=CHUNK_ROWS)


def _in_chunks(
    read: Callable[[Critics, Transitions], Tensor],
    critics: Critics,
    batch: Transitions,
    chunk_size: int | None,
    embedding: str,
) -> Tensor:
    if chunk_size is None:
        chunk_size = len(batch) if len(batch) <= FEW_ROWS else rows_for(critics, batch, embedding)
    check_integer("chunk_size", chunk_size, minimum=1)
    if len(batch) <= chunk_size:
        with critics.evaluating():
            return read(critics, batch)
    stacked: Tensor | None = None
    with critics.evaluating():
        for start in range(0, len(batch), chunk_size):
            part = read(critics, batch[start : start + chunk_size])
            if stacked is None:
                stacked = part.new_empty(len(batch), part.shape[1])
            stacked[start : start + len(part)] = part
    assert stacked is not None
    return stacked


def _stacked_gradients_of_chunk(critics: Critics, batch: Transitions) -> Tensor:
    g = _mean_gradient(critics.critic, *critics.inputs(batch), name="critic")
    target_g = _mean_gradient(critics.target, *critics.next_inputs(batch), name="target")
    return torch.cat([target_g * (1 - batch.terminals.to(target_g)).unsqueeze(1), g], dim=1)


def _mean_gradient(critic: Any, observations: Observations, actions: Tensor, *, name: str) -> Tensor:
    observations, actions, leaves = differentiable_inputs(observations, actions)
    with torch.enable_grad():
        values = member_values(critic, observations, actions, name=name)
        mean = torch.stack(values).mean(dim=0)
    check_finite(name, mean.detach(), hint="; has the training diverged?")
    gradient = torch.cat(flat_gradients([mean], leaves, name=name), dim=1)
    check_finite(f"gradient of {name}", gradient, hint="; has the training diverged?")
    return gradient


def _stacked_features_of_chunk(critics: Critics, batch: Transitions) -> Tensor:
    with torch.no_grad():
        f = member_features(critics, critics.critic, *critics.inputs(batch), name="critic")
        target_f = member_features(critics, critics.target, *critics.next_inputs(batch), name="target")
    stacked = torch.cat([*target_f, *f], dim=1)
    check_finite("features", stacked, hint="; has the training diverged?")
    return stacked


def member_features(
    critics: Critics, critic: Any, observations: Observations, actions: Tensor, *, name: str
) -> list[Tensor]:
    """The last hidden layer of each member, [B, F] each."""
    features = []
    for member in members_of(critic):
        if critics.features is not None:
            read = critics.features(member, observations, actions)
        elif hasattr(member, "features"):
            alone = not actions.is_floating_point() and not _takes_two(member.features)
            read = member.features(observations) if alone else member.features(observations, actions)
        else:
            fail(
                "features",
                f"a callable, or a {name} with a method `features(observations, actions)`",
                f"None and a {type(member).__name__} without one",
            )
        if not isinstance(read, Tensor) or read.ndim != 2 or len(read) != len(actions):
            fail(
                "features",
                f"[B, F] with B = {len(actions)}",
                shape_of(read) if isinstance(read, Tensor) else type(read).__name__,
            )
        features.append(read)
    return features


def _takes_two(function: Callable[..., Any]) -> bool:
    """Whether it can be called by two positional arguments."""
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # of a function in C, which nobody can look into
        return True
    return True


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
