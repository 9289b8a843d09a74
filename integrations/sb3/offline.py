"""Training of an off-policy model from data alone, with the host's own `learn` around the host's own `train`."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import RolloutReturn
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from c4buffer import Transitions
from c4buffer._checks import check_integer, fail

LOGGED_EVERY = 1000  # timesteps; the host logs at the ends of episodes, of which there are none


def learn_offline(
    model: Any, transitions: Transitions, total_timesteps: int, callback: Any = None, progress_bar: bool = False
) -> Any:
    """Train on transitions alone: SB3's `learn`, but that no environment is stepped. Returns the model.

    A timestep is one gradient step. Callbacks, evaluations, checkpoints, the progress bar and schedules see these as
    they see an environment's. What the replay buffer held is replaced by the transitions.

    Args:
        model: an off-policy model with one environment, whose spaces are those of the data; beyond them, only its
            `reset` is called. Statistics of a VecNormalize stay as they are.
        transitions: with actions in the environment's own units.
        total_timesteps: how many.
        callback, progress_bar: as in `learn`.

    Raises:
        ValueError: for a model that has no replay buffer or several environments, and for transitions of other spaces
            or more than the buffer holds; the buffer is unchanged then.

    .. code-block:: python

        model = SAC("MlpPolicy", env, replay_buffer_class=ClusteredReplayBuffer, buffer_size=len(transitions))
        learn_offline(model, transitions, 100_000, callback=C4Callback())
    """
    check_integer("total_timesteps", total_timesteps, minimum=1)
    if not isinstance(model, OffPolicyAlgorithm):
        fail("model", "an off-policy model, which learns from a replay buffer", type(model).__name__)
    normalizing: Any = model.get_vec_normalize_env()
    if normalizing is not None and _seen(normalizing) < 1:
        fail(
            "model", "a VecNormalize with statistics, loaded or from steps taken, or none", "one that has seen nothing"
        )
    fill(model, transitions)
    online, updating = type(model), normalizing is not None and normalizing.training
    model.__class__ = _offline_class(online)
    if updating:
        normalizing.training = False
    try:
        return model.learn(total_timesteps, callback=callback, progress_bar=progress_bar)
    finally:
        model.__class__ = online
        if updating:
            normalizing.training = True


def _seen(normalizing: Any) -> float:
    """How many observations, or returns, its statistics are of."""
    statistics = getattr(normalizing, "obs_rms", None) or normalizing.ret_rms
    statistics = next(iter(statistics.values())) if isinstance(statistics, dict) else statistics
    return float(statistics.count)


def fill(model: Any, transitions: Transitions) -> None:
    """Replace what the model's replay buffer holds: as a loop of `add` in one environment would leave it."""
    buffer: Any = model.replay_buffer
    if not isinstance(buffer, ReplayBuffer) or isinstance(buffer, HerReplayBuffer):
        fail("model", "one with a replay buffer of transitions, without hindsight", type(buffer).__name__)
    if buffer.n_envs != 1 or buffer.optimize_memory_usage:
        fail("model", "one environment and optimize_memory_usage=False", "another setting")
    rows = len(transitions)
    if rows > buffer.buffer_size:
        fail("transitions", f"at most buffer_size, {buffer.buffer_size}", rows)
    columns = {
        "observations": _arrays(transitions.observations),
        "next_observations": _arrays(transitions.next_observations),
        "actions": _actions(model, transitions),
    }
    for name, column in columns.items():
        _check_space(name, column, getattr(buffer, name))
    buffer.reset()
    for name, column in columns.items():
        held = getattr(buffer, name)
        for key, target in held.items() if isinstance(held, dict) else [(None, held)]:
            source = column if key is None else column[key]
            target[:rows, 0] = source.reshape(target[:rows, 0].shape)
    terminals, timeouts = (part.cpu().numpy() for part in (transitions.terminals, transitions.timeouts))
    buffer.rewards[:rows, 0] = transitions.rewards.cpu().numpy()
    buffer.dones[:rows, 0] = np.maximum(terminals, timeouts)
    buffer.timeouts[:rows, 0] = timeouts * (1 - terminals) if buffer.handle_timeout_termination else 0
    buffer.pos = rows % buffer.buffer_size
    buffer.full = rows == buffer.buffer_size


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


def _check_space(name: str, column: Any, held: Any) -> None:
    """The rows' shape, by the buffer's own arrays [size, 1, ...]."""
    expected = {key: part.shape[2:] for key, part in held.items()} if isinstance(held, dict) else held.shape[2:]
    got = {key: part.shape[1:] for key, part in column.items()} if isinstance(column, dict) else column.shape[1:]
    if expected != got:
        fail("transitions", f"{name} of shape {expected}, as the model's spaces have it", got)


class _Offline(OffPolicyAlgorithm):
    """Steps no environment: the timestep counter, callbacks and schedules go on."""

    learning_starts: Any = property(lambda self: 0)  # what the model has stays, and is what checkpoints hold

    def collect_rollouts(self, env: Any, callback: Any, *arguments: Any, **options: Any) -> RolloutReturn:
        callback.on_rollout_start()
        steps = max(1, self.gradient_steps)
        for step in range(steps):
            self.num_timesteps += 1
            callback.update_locals(locals())
            if not callback.on_step():
                return RolloutReturn(step + 1, 0, continue_training=False)
            self._update_current_progress_remaining(self.num_timesteps, self._total_timesteps)
            self._on_step()  # where DQN moves its target
            if self.num_timesteps % LOGGED_EVERY == 0:
                self.dump_logs()
        callback.on_rollout_end()
        return RolloutReturn(1, 0, continue_training=True)


@functools.cache
def _offline_class(online: Any) -> type:
    return type(online.__name__, (_Offline, online), {"__module__": online.__module__})
