"""d3rlpy's networks as Critics."""

import contextlib
import dataclasses
from typing import Any

import torch
from d3rlpy.models.torch.q_functions import DiscreteEnsembleQFunctionForwarder
from d3rlpy.torch_utility import unwrap_ddp_model
from torch import Tensor, nn

from c4buffer import Critics
from c4buffer._checks import check_choice, fail


class _Member(nn.Module):
    """One Q-function of d3rlpy's ensemble: `(observations, actions) -> [B, 1]`, its expectation."""

    def __init__(self, q_function: nn.Module, forwarder: Any) -> None:
        super().__init__()
        self.q_function: Any = q_function
        self._forwarder = forwarder

    def forward(self, observations: Any, actions: Tensor) -> Tensor:
        expected: Tensor = self._forwarder.compute_expected_q(as_d3rlpy(observations), actions)
        return expected

    def features(self, observations: Any, actions: Tensor) -> Tensor:
        """The output of the encoder, [B, F]: the last hidden layer."""
        hidden: Tensor = unwrap_ddp_model(self.q_function).encoder(as_d3rlpy(observations), actions)
        return hidden


class _DiscreteMember(nn.Module):
    """One Q-function of d3rlpy's ensemble for discrete actions: `observations -> [B, n_actions]`, its expectation."""

    def __init__(self, q_function: nn.Module, forwarder: Any) -> None:
        super().__init__()
        self.q_function: Any = q_function
        self._forwarder = forwarder

    def forward(self, observations: Any) -> Tensor:
        expected: Tensor = self._forwarder.compute_expected_q(as_d3rlpy(observations))
        return expected

    def features(self, observations: Any, actions: Tensor) -> Tensor:
        """The output of the encoder, [B, F]: the last hidden layer, which no action enters."""
        hidden: Tensor = unwrap_ddp_model(self.q_function).encoder(as_d3rlpy(observations))
        return hidden


class _Greedy(nn.Module):
    """The policy's best action. What it draws (BCQ, BEAR and CRR do) leaves torch's generators as they were."""

    def __init__(self, impl: Any) -> None:
        super().__init__()
        self.networks = networks_of(impl)
        self._impl = impl

    def forward(self, observations: Any) -> Tensor:
        with torch.no_grad(), _generators_kept(self._impl.device):
            action: Tensor = self._impl.inner_predict_best_action(as_d3rlpy(observations))
        return action


def _generators_kept(device: str) -> Any:
    """A context after which torch's generators stand as before it; in a captured CUDA graph they move all the same."""
    if "cuda" not in device:
        return torch.random.fork_rng(devices=[])
    if torch.cuda.is_current_stream_capturing():
        return contextlib.nullcontext()
    return torch.random.fork_rng(devices=[torch.device(device)])


def critics_of(algo: Any, *, next_action: str = "dataset") -> Critics:
    """The critics of a built d3rlpy algorithm, wrapped or not.

    Args:
        algo: with an ensemble of Q-functions.
        next_action: a' of g': "dataset" for the data's, "policy" for the policy's best action.

    Raises:
        ValueError: for an algorithm without networks or without Q-functions.
    """
    check_choice("next_action", next_action, ("dataset", "policy"))
    if getattr(algo, "impl", None) is None:
        fail("algo", "a built algorithm (call build_with_dataset, build_with_env or fit first)", "one without networks")
    if not hasattr(algo.impl, "_q_func_forwarder"):
        fail("algo", "one with an ensemble of Q-functions", type(algo).__name__)
    return critics_of_impl(algo.impl, next_action=next_action)


def networks_of(impl: Any) -> nn.ModuleList:
    """All networks of d3rlpy's implementation object."""
    parts = (getattr(impl.modules, field.name) for field in dataclasses.fields(impl.modules))
    return nn.ModuleList([part for part in parts if isinstance(part, nn.Module)])


def is_discrete(impl: Any) -> bool:
    """Whether d3rlpy's implementation object is one for discrete actions."""
    return isinstance(impl._q_func_forwarder, DiscreteEnsembleQFunctionForwarder)


def critics_of_impl(impl: Any, *, next_action: str) -> Critics:
    """The same, from d3rlpy's implementation object."""
    modules = impl.modules
    critic = zip(modules.q_funcs, impl._q_func_forwarder.forwarders)
    target = zip(modules.targ_q_funcs, impl._targ_q_func_forwarder.forwarders)
    member = _DiscreteMember if is_discrete(impl) else _Member
    return Critics(
        [member(*pair) for pair in critic],
        [member(*pair) for pair in target],
        policy=_Greedy(impl) if next_action == "policy" else None,
    )


def as_d3rlpy(observations: Any) -> Any:
    """Observations of several parts as its networks and scalers take them, in a list."""
    return list(observations) if isinstance(observations, tuple) else observations
