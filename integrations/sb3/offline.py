"""Training of an off-policy model from data alone, with the host's own `learn` around the host's own `train`."""

from __future__ import annotations

from typing import Any

import numpy as np
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import RolloutReturn

from c4buffer import Transitions
from c4buffer._checks import check_integer, fail

from .callback import end_of_learn
from .conversion import fill_replay_buffer
from .worn import Worn, worn_over

LOGGED_EVERY = 1000  # timesteps; the host logs at the ends of episodes, of which there are none


def learn_offline(
    model: Any, transitions: Transitions, total_timesteps: int, callback: Any = None, progress_bar: bool = False
) -> Any:
    """Train on transitions alone: SB3's `learn`, but that no environment is stepped. Returns the model.

    A timestep is one gradient step; they come in rounds of the model's `gradient_steps`, as in SB3. Callbacks,
    evaluations, checkpoints, the progress bar and schedules see these as they see an environment's. What the replay
    buffer held is replaced by the transitions.

    Args:
        model: an off-policy model with one environment, whose spaces are those of the data; beyond them, only its
            `reset` is called. Statistics of a VecNormalize stay as they are.
        transitions: with actions in the environment's own units.
        total_timesteps: how many.
        callback, progress_bar: as in `learn`.

    Raises:
        ValueError: for a model that has no replay buffer, several environments or no gradient steps, and for
            transitions of other spaces or more than the buffer holds; the buffer is unchanged then.

    .. code-block:: python

        model = SAC("MlpPolicy", env, replay_buffer_class=ClusteredReplayBuffer, buffer_size=len(transitions))
        learn_offline(model, transitions, 100_000, callback=C4Callback())
    """
    check_integer("total_timesteps", total_timesteps, minimum=1)
    if not isinstance(model, OffPolicyAlgorithm):
        fail("model", "an off-policy model, which learns from a replay buffer", type(model).__name__)
    if model.env is None:
        fail("model", "one with an environment, for its spaces and its reset (model.set_env)", "one without")
    normalizing: Any = model.get_vec_normalize_env()
    if normalizing is not None and _seen(normalizing) < 1:
        expected = "a VecNormalize with statistics, loaded or from steps taken (by their `count`), or none"
        fail("model", expected, f"one of {_seen(normalizing):g} observations")
    if model.gradient_steps == 0:
        fail("model", "gradient_steps of at least 1, or -1 for one", 0)
    fill_replay_buffer(model, transitions)
    online = type(model)
    model.__class__ = worn_over(_Offline, online)
    try:
        return model.learn(total_timesteps, callback=callback, progress_bar=progress_bar)
    finally:
        model.__class__ = online
        end_of_learn(model)


def _seen(normalizing: Any) -> float:
    """How many observations, or returns, its statistics are of."""
    statistics = getattr(normalizing, "obs_rms", None) or normalizing.ret_rms
    statistics = next(iter(statistics.values())) if isinstance(statistics, dict) else statistics
    return float(statistics.count)


class _Offline(Worn):
    """Steps no environment: the timestep counter, callbacks and schedules go on."""

    # read as 0; what the model has stays, may be set, and is what checkpoints hold
    learning_starts: Any = property(lambda self: 0, lambda self, value: vars(self).update(learning_starts=value))

    def _setup_learn(self, *arguments: Any, **options: Any) -> Any:
        """The host's, whose reset of the environment moves no statistics here."""
        normalizing: Any = self.get_vec_normalize_env()
        updating = normalizing is not None and normalizing.training
        if updating:
            normalizing.training = False
        try:
            return super()._setup_learn(*arguments, **options)
        finally:
            if updating:
                normalizing.training = True

    def collect_rollouts(self, env: Any, callback: Any, *arguments: Any, **options: Any) -> RolloutReturn:
        callback.on_rollout_start()
        steps = max(1, self.gradient_steps)
        seen = {"dones": np.zeros(1, dtype=bool), "rewards": np.zeros(1), "infos": [{}]}  # by callbacks
        for step in range(steps):
            self.num_timesteps += 1
            callback.update_locals({**locals(), **seen})
            if not callback.on_step():
                return RolloutReturn(step + 1, 0, continue_training=False)
            self._update_current_progress_remaining(self.num_timesteps, self._total_timesteps)
            self._on_step()  # where DQN moves its target
            if self.num_timesteps % LOGGED_EVERY == 0:
                self.dump_logs()
        callback.on_rollout_end()
        return RolloutReturn(1, 0, continue_training=True)
