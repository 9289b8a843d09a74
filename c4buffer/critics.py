"""Critics, and the values and features that their members give."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import fail, shape_of, shape_or_type
from .networks import evaluating, modules_behind
from .observations import Observations, map_observations, observation_leaves
from .transitions import Transitions


@dataclass(frozen=True)
class Critics:
    """A critic, its target, and how to read them: the one record that buffer, penalty and diagnostics take.

    Args:
        critic: Q. A callable `(observations, actions) -> [B]` or `[B, 1]`, an ensemble as `[n, B]`, `[n, B, 1]` or a
            sequence of those, or a sequence of callables (`[q1, q2]`, a ModuleList). For discrete actions (int64):
            `(observations) -> [B, n_actions]`, gathered at the action. Of an ensemble of n that one network computes,
            the penalty costs n^2; as a sequence of n callables, one for each member, n.
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
    policy: Callable[[Any], Tensor] | None = None
    features: Callable[[Any, Any, Tensor], Tensor] | None = None
    encode: Callable[[Any], Tensor] | None = None

    def __init__(
        self,
        critic: Any,
        target: Any,
        *,
        policy: Callable[[Any], Tensor] | None = None,
        features: Callable[[Any, Any, Tensor], Tensor] | None = None,
        encode: Callable[[Any], Tensor] | None = None,
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
        """The network modules found behind critic, target, policy, features and encode, as they are."""
        found: dict[nn.Module, None] = {}
        for part in self._parts:
            for root in modules_behind(part):
                found.update(dict.fromkeys(root.modules()))
        return tuple(found)

    def evaluating(self) -> AbstractContextManager[None]:
        """A context with all networks in eval mode (no dropout, no batch statistics moved), and as they were after."""
        return evaluating(self.modules, and_others=not all(isinstance(part, nn.Module) for part in self._parts))

    @property
    def _parts(self) -> list[Any]:
        parts = [*members_of(self.critic), *members_of(self.target), self.policy, self.features, self.encode]
        return [part for part in parts if part is not None]

    def inputs(self, batch: Transitions) -> tuple[Observations, Tensor]:
        """x = (s, a), with s encoded where there is an encoder."""
        return self._encoded(map_observations(_ordinary, batch.observations)), _ordinary(batch.actions)

    def next_inputs(self, batch: Transitions) -> tuple[Observations, Tensor]:
        """x' = (s', a'), with a' from the policy where there is one."""
        observations, actions = map_observations(_ordinary, batch.next_observations), _ordinary(batch.next_actions)
        if self.policy is not None:
            with torch.no_grad():
                actions = _given(self.policy, observations, name="policy")
            shape = batch.actions.shape
            column = not batch.actions.is_floating_point() and getattr(actions, "shape", None) == (*shape, 1)
            if not isinstance(actions, Tensor) or not (actions.shape == shape or column):
                got = shape_or_type(actions)
                fail("policy", f"a tensor of actions {shape_of(batch.actions)}", got)
            if not batch.actions.is_floating_point():
                actions = actions.reshape(shape).long()
        return self._encoded(observations), actions

    def _encoded(self, observations: Observations) -> Observations:
        if self.encode is None:
            return observations
        with torch.no_grad():
            return self.encode(observations)


def _ordinary(values: Tensor) -> Tensor:
    """A copy of what was made under `torch.inference_mode`, which no graph can hold; the rest as it is."""
    return values.clone() if values.is_inference() else values


def check_critics(critics: object, expected: str = "a Critics record") -> Critics:
    """The record, when it is one."""
    if not isinstance(critics, Critics):
        fail("critics", expected, "None" if critics is None else type(critics).__name__)
    return critics


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
        inputs = (observations,) if discrete else (observations, actions)
        output = _given(member, *inputs, name=name)
        parts = list(output) if isinstance(output, (list, tuple)) else [output]
        for part in parts:
            values += _rows_of(part, actions, name=name) if discrete else _columns_of(part, len(actions), name=name)
    return values


def _given(network: Callable[..., Any], *inputs: Any, name: str) -> Any:
    """network(*inputs); ValueError where it fails because its parameters are of another precision."""
    try:
        return network(*inputs)
    except RuntimeError:
        given = {leaf.dtype for part in inputs for leaf in observation_leaves(part) if leaf.is_floating_point()}
        parameters = itertools.chain(*(module.parameters() for module in modules_behind(network)))
        own = {parameter.dtype for parameter in parameters if parameter.is_floating_point()}
        if given <= own or not own:
            raise
        expected, got = (", ".join(sorted(map(str, dtypes))) for dtypes in (own, given))
        fail(name, f"transitions of its own {expected}", got)


def _columns_of(output: Any, batch_size: int, *, name: str) -> list[Tensor]:
    """[B], [B, 1], [n, B] or [n, B, 1] as n tensors [B]."""
    if isinstance(output, Tensor):
        if output.shape in ((batch_size,), (batch_size, 1)) or (output.ndim == 0 and batch_size == 1):
            return [output.reshape(batch_size)]
        if output.ndim == 3 and output.shape[2] == 1:
            output = output.squeeze(2)
        if output.ndim == 2 and output.shape[1] == batch_size:
            return list(output.unbind(0))
    expected = f"[B], [B, 1], [n, B] or [n, B, 1] with B = {batch_size} for continuous actions"
    return fail(name, expected, shape_or_type(output))


def _rows_of(output: Any, actions: Tensor, *, name: str) -> list[Tensor]:
    """[B, n_actions] or [n, B, n_actions] gathered at the actions, as n tensors [B]."""
    if isinstance(output, Tensor) and output.ndim == len(actions) == 1:  # squeezed
        output = output.unsqueeze(0)
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
    return fail(name, expected, shape_or_type(output))


def member_features(
    critics: Critics, critic: Any, observations: Observations, actions: Tensor, *, name: str
) -> list[Tensor]:
    """The last hidden layer of each member, [B, F] each; of images as numbers, as gradients are taken."""
    observations = map_observations(lambda leaf: leaf.float() if leaf.dtype == torch.uint8 else leaf, observations)
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
                shape_or_type(read),
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
