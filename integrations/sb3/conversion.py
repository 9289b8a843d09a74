"""What a model's replay buffer holds as Transitions, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from c4buffer import Transitions
from c4buffer._checks import fail
from c4buffer.transitions import ends_of

from .buffers import _Clustered


def transitions_of(model: Any, *, seen: bool = False) -> Transitions:
    """All rows of a model's replay buffer, as it got them: actions in the environment's units, nothing normalised.

    Oldest first, one environment after the other; where an environment's rows stop in the middle of an episode, or go
    on in another (each `learn` begins one), that counts as a timeout. Rows of an n-step buffer are single steps, those
    of a hindsight buffer have the goals that they had. A memory-optimised buffer knows less: at an episode's end its
    next observation is the following episode's first, and when it is full one row of each environment is missing.

    Args:
        model: an off-policy model.
        seen: as its networks see them, on its device: actions in [-1, 1], observations and rewards as a VecNormalize
            has them by now. That is what `diagnose` wants beside `critics_of(model)`.

    Raises:
        ValueError: for a model without a replay buffer, and for one that has seen nothing.
    """
    columns = _columns(model)
    if not isinstance(model.action_space, spaces.Box):
        columns["actions"] = columns["actions"].reshape(-1).astype(np.int64)
    elif not seen:
        shape = (-1, *model.action_space.shape)
        unscaled = model.policy.unscale_action(columns["actions"].reshape(shape))
        columns["actions"] = unscaled.reshape(len(unscaled), -1)
    if not seen:
        return Transitions(**columns)
    normalizing = model.get_vec_normalize_env()
    if normalizing is not None:
        for name in ("observations", "next_observations"):
            columns[name] = normalizing.normalize_obs(columns[name])
        columns["rewards"] = normalizing.normalize_reward(columns["rewards"]).astype(np.float32)
    return Transitions(**columns).to(model.device)


def fill_replay_buffer(model: Any, transitions: Transitions) -> None:
    """Replace what the model's replay buffer holds: as a loop of `add` in one environment would leave it.

    A row that the next one does not follow, and the last, end an episode by timeout: n-step returns stop there.

    Args:
        model: with one environment, whose buffer is not memory-optimised and has no hindsight.
        transitions: with actions in the environment's units; their intervals must be 1.

    Raises:
        ValueError: for another model, and for transitions of other spaces or more than the buffer holds; the buffer is
            unchanged then.
    """
    buffer: Any = getattr(model, "replay_buffer", None)
    if not isinstance(buffer, ReplayBuffer) or isinstance(buffer, HerReplayBuffer):
        got = f"{type(model).__name__} with {'none' if buffer is None else type(buffer).__name__}"
        fail("model", "one with a replay buffer of transitions, without hindsight", got)
    if buffer.n_envs != 1 or buffer.optimize_memory_usage:
        got = f"{buffer.n_envs}, and {buffer.optimize_memory_usage}"
        fail("model", "one environment, and optimize_memory_usage=False", got)
    if not isinstance(transitions, Transitions):
        fail("transitions", "Transitions, as load_d4rl(path) gives them", type(transitions).__name__)
    rows = len(transitions)
    if rows > buffer.buffer_size:
        fail("transitions", f"at most buffer_size, {buffer.buffer_size}", rows)
    if bool((transitions.intervals != 1).any()):
        fail("transitions", "single steps (a model's own n_steps makes more of them)", "intervals above 1")
    columns = {
        "observations": _arrays(transitions.observations),
        "next_observations": _arrays(transitions.next_observations),
        "actions": _actions(model, transitions),
    }
    columns = {name: _as_held(name, column, getattr(buffer, name)) for name, column in columns.items()}
    buffer.reset()
    for name, column in columns.items():
        held = getattr(buffer, name)
        for key, target in held.items() if isinstance(held, dict) else [(None, held)]:
            source = column if key is None else column[key]
            target[:rows, 0] = source.reshape(target[:rows, 0].shape)
    terminals, timeouts = (part.cpu().numpy() for part in (transitions.terminals, transitions.timeouts))
    ends = ends_of(transitions).cpu().numpy()
    if not buffer.handle_timeout_termination:  # SB3 takes timeouts for terminals then
        terminals = np.maximum(terminals, timeouts)
    timeouts = np.maximum(timeouts, ends) * (1 - terminals)
    buffer.rewards[:rows, 0] = transitions.rewards.cpu().numpy()
    buffer.dones[:rows, 0] = np.maximum(terminals, timeouts) if buffer.handle_timeout_termination else terminals
    # where nothing but n-step returns reads them, SB3 does not clear them either when it writes anew
    if buffer.handle_timeout_termination or isinstance(buffer, NStepReplayBuffer):
        buffer.timeouts[:rows, 0] = timeouts
    buffer.pos = rows % buffer.buffer_size
    buffer.full = rows == buffer.buffer_size
    if isinstance(buffer, _Clustered):
        buffer.forget_clusters()


def _columns(model: Any) -> dict[str, Any]:
    """The rows of all environments, actions and the rest as they are stored."""
    buffer = getattr(model, "replay_buffer", None)
    if not isinstance(buffer, ReplayBuffer):
        fail("model", "an off-policy model, which has a replay buffer", type(model).__name__)
    if buffer.size() == 0:
        fail("model", "a replay buffer with at least one row", "an empty one")
    positions = np.arange(buffer.pos)
    if buffer.full:  # oldest first; a memory-optimised buffer has written over the oldest row's observation
        oldest = buffer.pos + 1 if buffer.optimize_memory_usage else buffer.pos
        positions = np.arange(oldest, buffer.pos + buffer.buffer_size) % buffer.buffer_size
    observations = _at(buffer.observations, positions)
    if buffer.optimize_memory_usage:
        following = buffer.observations[(positions + 1) % buffer.buffer_size]
    else:
        following = _at(buffer.next_observations, positions)
    timeouts = buffer.timeouts[positions] * buffer.dones[positions]
    terminals = buffer.dones[positions] - timeouts
    columns = {
        "observations": observations,
        "next_observations": following,
        "actions": buffer.actions[positions],
        "rewards": buffer.rewards[positions],
        "terminals": terminals,
        "timeouts": np.maximum(timeouts, _cut(observations, following)) * (1 - terminals),
    }
    return {name: _by_environment(column) for name, column in columns.items()}


def _at(held: Any, positions: np.ndarray) -> Any:
    return {key: part[positions] for key, part in held.items()} if isinstance(held, dict) else held[positions]


def _cut(observations: Any, following: Any) -> np.ndarray:
    """Whether an environment's next row does not go on where a row ended, [T, n_envs]; the last has no next."""
    pairs = [(observations, following)]
    if isinstance(observations, dict):
        pairs = [(observations[key], following[key]) for key in observations]
    cut = np.zeros(pairs[0][0].shape[:2], dtype=bool)
    cut[-1] = True
    for now, after in pairs:
        cut[:-1] |= (now[1:] != after[:-1]).any(axis=tuple(range(2, now.ndim)))
    return cut.astype(np.float32)


def _by_environment(column: Any) -> Any:
    """[T, n_envs, ...] -> [n_envs T, ...], an environment's rows together."""
    if isinstance(column, dict):
        return {key: _by_environment(part) for key, part in column.items()}
    return np.ascontiguousarray(column.swapaxes(0, 1).reshape(-1, *column.shape[2:]))


def _arrays(observations: Any) -> Any:
    if isinstance(observations, dict):
        return {key: part.cpu().numpy() for key, part in observations.items()}
    if isinstance(observations, tuple):
        fail("transitions", "observations as a tensor or a dict, as SB3 has them", "a tuple")
    return observations.cpu().numpy()


def _actions(model: Any, transitions: Transitions) -> np.ndarray:
    actions: np.ndarray = transitions.actions.cpu().numpy()
    if isinstance(model.action_space, spaces.Box) and actions.dtype.kind == "f":
        actions = actions.reshape(len(actions), -1)
        low, high = model.action_space.low.reshape(-1), model.action_space.high.reshape(-1)
        rounding = 1e-3 * (high - low)
        if actions.shape[1] == len(low) and ((actions < low - rounding) | (actions > high + rounding)).any():
            fail("transitions", f"actions in {model.action_space}", f"from {actions.min():.3g} to {actions.max():.3g}")
        if actions.shape[1] != len(low):
            fail("transitions", f"actions of {model.action_space}", f"[N, {actions.shape[1]}]")
        scaled: np.ndarray = model.policy.scale_action(actions.reshape(len(actions), *model.action_space.shape))
        return scaled.reshape(len(actions), -1)
    if isinstance(model.action_space, spaces.Discrete) and actions.dtype.kind == "i":
        if actions.min() < 0 or actions.max() >= model.action_space.n:
            fail("transitions", f"actions in {model.action_space}", f"from {actions.min()} to {actions.max()}")
        return actions.reshape(-1, 1)
    return fail("transitions", f"actions of {model.action_space}", f"{actions.dtype} {list(actions.shape)}")


def _as_held(name: str, column: Any, held: Any) -> Any:
    """The rows in the dtype of the buffer's own arrays [size, 1, ...], whose shapes they must have."""
    if isinstance(held, dict) != isinstance(column, dict) or (isinstance(held, dict) and held.keys() != column.keys()):
        wanted, got = (sorted(part) if isinstance(part, dict) else "one array" for part in (held, column))
        fail("transitions", f"{name} as the model's spaces have it, {wanted}", got)
    if isinstance(held, dict):
        return {key: _as_held(f"{name}[{key!r}]", column[key], held[key]) for key in held}
    if held.shape[2:] != column.shape[1:]:
        fail("transitions", f"{name} of shape {held.shape[2:]}, as the model's spaces have it", column.shape[1:])
    cast = column.astype(held.dtype, copy=False)
    if held.dtype.kind in "iu" and (cast != column).any():
        fail("transitions", f"{name} that {held.dtype} can hold", f"{column.dtype} with other values")
    return cast
