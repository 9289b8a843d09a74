"""The critics of TorchRL's losses."""

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import DistributionalDQNLoss, LossModule

from c4buffer import Critics
from c4buffer._checks import check_choice, fail
from c4buffer.observations import Observations

from .rows import Key, discrete_or_not, name_of

Q_NETWORKS = ("qvalue_network", "value_network")


class _Q:
    """A Q-network with parameters of its own, of an ensemble one member's.

    `(observations, actions) -> [B, 1]` or `observations -> [B, A]`.
    """

    def __init__(
        self, loss: Any, name: str, parameters: str, output: Key, action: Key, *, member: int | None = None
    ) -> None:
        self._loss, self._parameters = loss, parameters  # first, as the loss's are moved, and not the network's own
        self._member = member
        self.network, self.output, self.action = getattr(loss, name), output, action

    @property
    def parameters(self) -> Any:
        """As the loss has them now: without delayed targets it makes new ones of them when it is moved."""
        parameters = getattr(self._loss, self._parameters)
        return parameters if self._member is None else parameters[self._member]

    def __call__(self, observations: Observations, actions: Tensor | None = None) -> Tensor:
        batch = _input_of(self.network, observations, self.action)
        if actions is not None:
            batch.set(self.action, actions)
        with self.parameters.to_module(self.network, preserve_module_state=False):
            found: Tensor = self.network(batch).get(self.output)
        return found if actions is None else found.mean(dim=-1, keepdim=True)  # of quantiles


class _Policy:
    """The deterministic, or the most likely, action of a loss's actor, with the target's parameters."""

    def __init__(self, loss: Any, action: Key) -> None:
        self.network, self.action, self._loss = loss.actor_network, action, loss

    def __call__(self, observations: Observations) -> Tensor:
        batch = _input_of(self.network, observations, self.action)
        with (
            torch.no_grad(),
            set_exploration_type(ExplorationType.DETERMINISTIC),
            self._loss.target_actor_network_params.to_module(self.network, preserve_module_state=False),
        ):
            return discrete_or_not(self.network(batch).get(self.action))


class _Greedy:
    """The action of the largest value."""

    def __init__(self, values: _Q) -> None:
        self.values = values

    def __call__(self, observations: Observations) -> Tensor:
        with torch.no_grad():
            return self.values(observations).argmax(dim=-1)


def critics_of(loss: LossModule, *, next_action: str = "policy") -> Critics:
    """The critic and the target critic of a loss, as they are whenever they are asked.

    Of TD3, TD3+BC, SAC, REDQ, CrossQ, CQL, IQL, TQC (quantiles count by their mean) and DDPG losses: Q(s, a). Of DQN
    and of discrete SAC, CQL and IQL: Q(s), gathered at the action. An observation of several keys is the dict that
    `transitions_of` makes of them.

    Args:
        loss: with a Q-network.
        next_action: a' of g': "policy" for the deterministic or likeliest action of the loss's target actor, or the
            greedy action where there is no actor; "dataset" for the data's, which batches must hold, too, for the
            penalty (see `tensordict_of`): each row's own action stands in where they do not.

    Raises:
        ValueError: for a loss without a Q-network, and for a distributional one.
    """
    check_choice("next_action", next_action, ("policy", "dataset"))
    name = next((name for name in Q_NETWORKS if getattr(loss, f"{name}_params", None) is not None), None)
    if not isinstance(loss, LossModule) or isinstance(loss, DistributionalDQNLoss) or name is None:
        fail("loss", "one of TorchRL's losses with a Q-network, not a distributional one", type(loss).__name__)
    network: Any = getattr(loss, name)
    action = getattr(loss.tensor_keys, "action", "action")
    keys = (getattr(loss.tensor_keys, value, value) for value in ("action_value", "state_action_value"))
    output = next((key for key in keys if key in network.out_keys), None)
    if output is None:
        fail("loss", "one of TorchRL's losses with a Q-network", f"{type(loss).__name__} with values of states alone")
    critic, target = (_members(loss, name, f"{which}{name}_params", output, action) for which in ("", "target_"))
    if next_action == "dataset":
        return Critics(critic, target)
    if getattr(loss, "actor_network", None) is not None:
        return Critics(critic, target, policy=_Policy(loss, action))
    greedy = critic if getattr(loss, "double_dqn", False) else target
    if isinstance(greedy, list):
        fail("next_action", "'dataset' for a loss with several Q-functions and no actor", "'policy'")
    return Critics(critic, target, policy=_Greedy(greedy))


def _members(loss: Any, name: str, parameters: str, output: Key, action: Key) -> _Q | list[_Q]:
    """One by one, as the penalty takes each one's gradients: through all of them together they cost n times as much."""
    size = getattr(loss, parameters).batch_size
    if not size:
        return _Q(loss, name, parameters, output, action)
    return [_Q(loss, name, parameters, output, action, member=member) for member in range(size[0])]


def _input_of(network: Any, observations: Observations, action: Key) -> TensorDictBase:
    """The observations under the keys that the network reads them from."""
    keys = [key for key in network.in_keys if key != action]
    if isinstance(observations, Tensor):
        return TensorDict({keys[0]: observations}, batch_size=[len(observations)])
    held = dict(observations)  # type: ignore[arg-type]
    rows = len(next(iter(held.values())))
    return TensorDict({key: held[name_of(key)] for key in keys}, batch_size=[rows])
