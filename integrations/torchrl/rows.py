"""TorchRL's tensordicts as Transitions: batches, and what a storage holds."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Union

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data.replay_buffers.storages import Storage

from c4buffer import Transitions
from c4buffer._checks import fail, shape_of
from c4buffer.observations import Observations, observation_leaves

Key = Union[str, tuple[str, ...]]


@dataclass(frozen=True)
class Keys:
    """Where a tensordict has what; the defaults are TorchRL's.

    Args:
        observation: one key, or several: then observations are a dict of the parts.
        action: floats [B, A]; or discrete: integers [B] or [B, 1], or one-hot, integers or bool [B, n].
        reward, terminated, done: of the step, under "next". Without `terminated`, `done` stands for it.
        next_action: the action after the step, where the data have it.
        has_next_action: whether they have it in this row; without the key, in all rows.
        intervals: n of an n-step transition, where the data have it, as behind a MultiStepTransform.
    """

    observation: Union[Key, list[Key]] = "observation"
    action: Key = "action"
    reward: Key = ("next", "reward")
    terminated: Key = ("next", "terminated")
    done: Key = ("next", "done")
    next_action: Key = ("next", "action")
    has_next_action: Key = ("next", "has_action")
    intervals: Key = "steps_to_next_obs"

    def parts(self) -> dict[str, Key]:
        """The observation's keys by their names; one alone has the name ""."""
        if not isinstance(self.observation, list):
            return {"": self.observation}
        return {name_of(key): key for key in self.observation}


DEFAULT_KEYS = Keys()


def transitions_of(batch: TensorDictBase, keys: Keys = DEFAULT_KEYS) -> Transitions:
    """A batch of TorchRL's, [B], as the penalty and `diagnose` take it; nothing is copied that need not be.

    a' is the data's where they have it; else the row's own action stands in and `has_next_actions` is 0, so that it
    wants critics with a policy, as `critics_of(loss)` gives them.

    Args:
        batch: what the replay buffer's `sample` gave.
        keys: where the batch has what.

    Raises:
        ValueError: for a batch of another shape than [B], and for one that lacks a key.
    """
    if not isinstance(batch, TensorDictBase):
        fail("batch", "a tensordict", type(batch).__name__)
    if batch.ndim != 1:
        fail("batch", "one axis, [B]", shape_of(torch.empty(batch.shape, device="meta")))
    rows = len(batch)

    def scalars(key: Key) -> Tensor | None:
        value = batch.get(key, None)
        return None if value is None else value.reshape(rows).to(rewards)

    rewards = _found(batch, keys.reward).reshape(rows)
    rewards = rewards if rewards.is_floating_point() else rewards.float()
    actions = discrete_or_not(_found(batch, keys.action))
    done, terminals = scalars(keys.done), scalars(keys.terminated)
    if done is None and terminals is None:
        fail("batch", f"the key {keys.terminated!r} or {keys.done!r}", f"only {_names(batch)}")
    terminals = done if terminals is None else terminals
    assert terminals is not None
    timeouts = torch.zeros_like(terminals) if done is None else done * (1 - terminals)
    next_actions = batch.get(keys.next_action, None)
    intervals = scalars(keys.intervals)
    known = None if next_actions is None else scalars(keys.has_next_action)
    if known is None:
        known = torch.full_like(rewards, 0 if next_actions is None else 1)
    return Transitions.unchecked(
        {
            "observations": _observations(batch, keys, lambda key: key),
            "actions": actions,
            "rewards": rewards,
            "next_observations": _observations(batch, keys, _after),
            "terminals": terminals,
            "timeouts": timeouts,
            "next_actions": actions if next_actions is None else discrete_or_not(next_actions),
            "has_next_actions": known,
            "intervals": torch.ones_like(rewards) if intervals is None else intervals,
        }
    )


def tensordict_of(transitions: Transitions, keys: Keys = DEFAULT_KEYS, *, next_actions: bool = False) -> TensorDict:
    """Transitions as TorchRL stores them, [N], for `buffer.extend`; what `transitions_of` reads.

    Discrete actions are their places, int64 [N]. Next actions are left out where some rows have none: next to each
    other in a storage, rows are linked again.

    Args:
        transitions: N of them.
        keys: where the tensordict gets what; a dict of observations wants a list of keys with the names of its parts.
        next_actions: keep them all the same, and under `Keys.has_next_action` which rows have one: a batch's rows are
            not linked, and `critics_of(loss, next_action="dataset")` reads theirs.
    """
    held = transitions.observations
    parts = held if isinstance(held, Mapping) else dict(zip(keys.parts(), observation_leaves(held)))
    if set(parts) != set(keys.parts()) or isinstance(held, tuple):
        expected = f"Keys(observation=...) for parts named {', '.join(map(repr, parts))}"
        fail("keys", expected, repr(keys.observation))
    following = dict(zip(sorted(parts), observation_leaves(transitions.next_observations)))
    data = TensorDict({}, batch_size=[len(transitions)])
    for name, key in keys.parts().items():
        data.set(key, parts[name])
        data.set(_after(key), following[name])
    data.set(keys.action, transitions.actions)
    data.set(keys.reward, transitions.rewards.unsqueeze(1))
    data.set(keys.terminated, transitions.terminals.bool().unsqueeze(1))
    data.set(keys.done, (transitions.terminals + transitions.timeouts > 0).unsqueeze(1))
    if bool((transitions.intervals > 1).any()):
        data.set(keys.intervals, transitions.intervals.long().unsqueeze(1))
    everywhere = bool(transitions.has_next_actions.all())
    if everywhere or next_actions:
        data.set(keys.next_action, transitions.next_actions)
    if next_actions and not everywhere:
        data.set(keys.has_next_action, transitions.has_next_actions.bool().unsqueeze(1))
    return data


def stored(
    storage: Storage, rows: Tensor, keys: Keys, transform: Callable[[Any], Any] | None, *, linked: bool = True
) -> Transitions:
    """Rows [M] of a storage; a missing a' is that of the row `intervals` on, where that starts where this one ends.

    Without `linked` they are left as they are.

    A storage of several axes [T, E, ...] is read as [T * E * ...]: one row on is E * ... rows there.
    """
    found = _read(storage, rows, keys, transform)
    missing = found.has_next_actions == 0
    if not linked or not bool(missing.any()):
        return found
    after = rows + found.intervals.long().cpu() * (math.prod(storage.shape[1:]) if storage.ndim > 1 else 1)
    within = after < len(storage)
    ahead = _read(storage, torch.where(within, after, rows), keys, transform)
    goes_on = missing & within.to(found.rewards.device) & (found.terminals + found.timeouts == 0)
    pairs = zip(observation_leaves(found.next_observations), observation_leaves(ahead.observations))
    for end, start in pairs:
        goes_on &= (end == start).flatten(start_dim=1).all(dim=1)
    chosen = goes_on.reshape(-1, *[1] * (found.actions.ndim - 1))
    links = {"next_actions": torch.where(chosen, ahead.actions, found.next_actions)}
    known = {"has_next_actions": (goes_on | ~missing).to(found.rewards)}
    return Transitions.unchecked({**dict(found.columns()), **links, **known})


def _read(storage: Storage, rows: Tensor, keys: Keys, transform: Callable[[Any], Any] | None) -> Transitions:
    data: Any = storage.get(coordinates(rows, storage))
    data = torch.stack(data) if isinstance(data, list) else data
    return transitions_of(data if transform is None else transform(data.clone(False)), keys)


def coordinates(rows: Tensor, storage: Storage) -> Any:
    """Row numbers [M] as the storage takes them: a tuple, where it has several axes."""
    device = getattr(storage, "device", None)
    rows = rows if device is None or device == "auto" else rows.to(device)
    return rows if storage.ndim == 1 else torch.unravel_index(rows, storage.shape)


def _observations(batch: TensorDictBase, keys: Keys, where: Callable[[Key], Key]) -> Observations:
    parts = {name: _found(batch, where(key)) for name, key in keys.parts().items()}
    return parts.get("", parts)


def _after(key: Key) -> Key:
    return ("next", *((key,) if isinstance(key, str) else key))


def _found(batch: TensorDictBase, key: Key) -> Tensor:
    value: Tensor | None = batch.get(key, None)
    if value is None:
        fail("batch", f"the key {key!r} (see Keys)", f"only {_names(batch)}")
    return value


def _names(batch: TensorDictBase) -> str:
    return ", ".join(sorted(map(repr, batch.keys(include_nested=True, leaves_only=True))))


def name_of(key: Key) -> str:
    """A part's name in a dict of observations."""
    return key if isinstance(key, str) else ".".join(key)


def discrete_or_not(actions: Tensor) -> Tensor:
    """[B, A] of floats as they are; discrete ones as int64 [B], one-hot ones by their place."""
    if actions.is_floating_point():
        return actions
    if actions.ndim == 2 and actions.shape[1] > 1:
        places = actions.long()
        if not (actions.is_cuda or torch.compiler.is_compiling()) and bool(
            ((places != 0).sum(dim=1) != 1).any() or (places.sum(dim=1) != 1).any()
        ):
            fail("action", "one action a row: floats, integers [B] or [B, 1], or one-hot [B, n]", "several integers")
        return places.argmax(dim=1)
    return actions.reshape(len(actions)).long()
