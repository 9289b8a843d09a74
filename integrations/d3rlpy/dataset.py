"""A d3rlpy dataset as Transitions, and Transitions as d3rlpy's batches: no per-transition Python while training."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from d3rlpy.constants import ActionSpace
from d3rlpy.dataset import BasicTransitionPicker, InfiniteBuffer, MixedReplayBuffer, ReplayBufferBase
from d3rlpy.torch_utility import TorchMiniBatch
from torch import Tensor

from c4buffer import Transitions
from c4buffer._checks import fail
from c4buffer.observations import map_observations, observation_leaves

from .frames import BLOCK_ROWS, frames_to_stack
from .reading import as_d3rlpy
from .rows import Run, columns_of, ends_of_runs, rows_of, runs_of


def transitions_of(dataset: ReplayBufferBase, algo: Any = None) -> Transitions:
    """All transitions of a dataset in the order of its buffer: what its transition picker gives, stacked.

    As d3rlpy has it: an episode that was not terminated loses its last step; a terminal has zeros as next observation
    and next action; a row that is not followed by its episode's next step, as an episode may be there twice, has a
    timeout. With `algo`, its observation, action and reward scalers are applied (they must have been fitted), and the
    tensors are on its device: what the algorithm's networks see.

    Args:
        dataset: N transitions.
        algo: with fitted scalers; None for the data as they are, on the processor.

    Raises:
        ValueError: for a dataset of two parts or without transitions, and for scalers that are not fitted.
    """
    columns = _columns_of(dataset)
    for name in ("observations", "next_observations"):
        columns[name] = map_observations(torch.Tensor.float, columns[name])
    return _transitions(columns, dataset, algo)


def stored_transitions_of(dataset: ReplayBufferBase, algo: Any) -> Transitions:
    """The same as it is stored: observations with images (uint8) stay as they are until a batch is drawn."""
    return _transitions(_columns_of(dataset), dataset, algo)


def transitions_for_buffer(dataset: ReplayBufferBase, algo: Any, *, frames: bool = True) -> tuple[Transitions, int]:
    """The same in RAM, and how many frames a FrameBuffer is to stack: observations are single frames then.

    It is 0, and observations are what the picker gives, where a buffer's stacks would not be the picker's, and for
    `frames=False`.
    """
    _check(dataset)
    runs = runs_of(rows_of(dataset))
    count = frames_to_stack(dataset, runs, algo.observation_scaler) if frames else 0
    columns = _from_runs(runs) if count else _columns_of(dataset)
    return _transitions(columns, dataset, algo, torch.device("cpu")), count


def stored_transitions_from(dataset: Any, start: int, algo: Any) -> Transitions:
    """Those from row `start` on, of a buffer that an environment fills: the episode under way is not closed."""
    found = _transitions(_from_picker(dataset, start), dataset, algo)
    columns = dict(found.columns())
    if dataset.buffer[dataset.transition_count - 1][0] is dataset._writer._active_episode:
        columns["timeouts"] = torch.cat([found.timeouts[:-1], torch.zeros_like(found.timeouts[-1:])])
    return Transitions.unchecked(columns)


class Seen(NamedTuple):
    """The newest row at some moment: its episode, its place there, and how many rows there were."""

    episode: Any
    step: int
    rows: int


def seen_of(dataset: ReplayBufferBase) -> Seen:
    """That of a dataset as it is, with at least one row."""
    rows = dataset.transition_count
    episode, step = dataset.buffer[rows - 1]
    return Seen(episode, step, rows)


def rows_since(dataset: ReplayBufferBase, seen: Seen | None) -> int:
    """The row after the one `seen`; 0 where that has been dropped."""
    row = int(dataset.transition_count)
    if seen is None:
        return 0
    if type(dataset.buffer) is InfiniteBuffer or getattr(dataset.buffer, "_limit", row) > row:
        return seen.rows  # nothing has been dropped; an episode may have been appended twice
    while row > 0:
        episode, step = dataset.buffer[row - 1]
        if episode is seen.episode and step == seen.step:
            break
        row -= 1
    return row


def _transitions(columns: dict[str, Any], dataset: ReplayBufferBase, algo: Any, device: Any = None) -> Transitions:
    """On `device`; None for the algorithm's."""
    if algo is not None:
        _scale(columns, algo)
        device = algo._device if device is None else device
        columns = {name: map_observations(lambda part: part.to(device), value) for name, value in columns.items()}
    if dataset.dataset_info.action_space == ActionSpace.DISCRETE:
        columns.update({name: columns[name].long() for name in ("actions", "next_actions")})
    return Transitions(**columns, has_next_actions=1 - columns["terminals"].reshape(-1))


def _check(dataset: ReplayBufferBase) -> None:
    if not isinstance(dataset, ReplayBufferBase):
        fail("dataset", "a d3rlpy dataset", type(dataset).__name__)
    if isinstance(dataset, MixedReplayBuffer):
        fail("dataset", "one ReplayBuffer with all the episodes", "a MixedReplayBuffer of several")
    if dataset.transition_count == 0:
        fail("dataset", "at least one transition", "an empty dataset")


def _columns_of(dataset: ReplayBufferBase) -> dict[str, Any]:
    _check(dataset)
    if type(dataset.transition_picker) is BasicTransitionPicker:
        return _from_runs(runs_of(rows_of(dataset)))
    return _from_picker(dataset)


def _from_runs(runs: Sequence[Run]) -> dict[str, Any]:
    columns = columns_of(runs)
    return {
        name: _observations(value) if name.endswith("observations") else _floats(value)
        for name, value in columns.items()
    }


def _from_picker(dataset: ReplayBufferBase, start: int = 0) -> dict[str, Any]:
    """The columns that any other picker gives from row `start` on, one transition at a time, once."""
    rows = [dataset.buffer[i] for i in range(start, dataset.transition_count)] if start else rows_of(dataset)
    picked = [dataset.transition_picker(episode, index) for episode, index in rows]
    last = np.zeros(len(rows), dtype=bool)
    last[ends_of_runs(runs_of(rows))] = True

    def stack(name: str) -> list[np.ndarray]:
        values = [getattr(transition, name) for transition in picked]
        return [np.stack(part) for part in (zip(*values) if isinstance(values[0], (list, tuple)) else [values])]

    return {
        "observations": _observations(stack("observation")),
        "next_observations": _observations(stack("next_observation")),
        "actions": _floats(stack("action")[0]),
        "next_actions": _floats(stack("next_action")[0]),
        "rewards": _floats(stack("reward")[0]),
        "terminals": _floats(stack("terminal")[0]),
        "timeouts": _floats(last & (stack("terminal")[0].reshape(-1) == 0)),
        "intervals": _floats(stack("interval")[0]),
    }


def _observations(parts: list[np.ndarray]) -> Any:
    tensors = tuple(
        torch.from_numpy(np.ascontiguousarray(part)) if part.dtype == np.uint8 else _floats(part) for part in parts
    )
    return tensors[0] if len(tensors) == 1 else tensors


def has_images(observations: Any) -> bool:
    """Whether these are as they were stored: with bytes, not scaled."""
    return any(part.dtype == torch.uint8 for part in observation_leaves(observations))


def scaled_observations(observations: Any, scaler: Any) -> Any:
    """What the networks see of stored observations: floats, images scaled as the others were when they were stored."""
    if not has_images(observations):
        return observations
    floats = map_observations(torch.Tensor.float, observations)
    return floats if scaler is None else _transformed(scaler, floats)


def _floats(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def _scale(columns: dict[str, Any], algo: Any) -> None:
    """In place, some rows at a time on the algorithm's device, which all of them may not fit."""
    for scaler, names in (
        (algo.observation_scaler, ("observations", "next_observations")),
        (algo.action_scaler, ("actions", "next_actions")),
        (algo.reward_scaler, ("rewards",)),
    ):
        if scaler is not None and not has_images(columns[names[0]]):
            for name in names:
                for start in range(0, len(columns["rewards"]), BLOCK_ROWS):
                    _scale_rows(columns[name], slice(start, start + BLOCK_ROWS), scaler, algo._device)


def _scale_rows(value: Any, rows: slice, scaler: Any, device: Any) -> None:
    found = _transformed(scaler, map_observations(lambda part: part[rows].to(device), value))
    for part, scaled in zip(observation_leaves(value), observation_leaves(found)):
        part[rows] = scaled


def _transformed(scaler: Any, value: Any) -> Any:
    """By one of d3rlpy's scalers, which takes several parts as a list."""
    if not scaler.built:
        fail("algo", "one whose scalers have been fitted, as by a fit", f"a {type(scaler).__name__} that has not")
    found = scaler.transform(as_d3rlpy(value))
    return tuple(found) if isinstance(found, list) else found


def returns_to_go_of(dataset: ReplayBufferBase, algo: Any) -> Tensor:
    """Discounted sums of the (scaled) rewards to each transition's episode's end, [N, 1], on the algorithm's device.

    In the rows' order, and in d3rlpy's own arithmetic.
    """
    found = [return_to_go(dataset, row, algo) for row in rows_of(dataset)]
    return _floats(np.stack(found)).to(algo._device)


def return_to_go(dataset: ReplayBufferBase, row: tuple[Any, int], algo: Any) -> np.ndarray:
    """That of one row, an episode and a place in it, as far as the episode has come: [1]."""
    rewards = dataset.transition_picker(*row).rewards_to_go
    if algo.reward_scaler is not None:
        rewards = algo.reward_scaler.transform_numpy(rewards)
    powers = (algo.gamma ** np.arange(len(rewards))).astype(np.float32).reshape(-1, 1)
    returned: np.ndarray = np.sum(powers * rewards, axis=0)
    return returned


def to_mini_batch(batch: Transitions, algo: Any, returns_to_go: Tensor | None = None) -> TorchMiniBatch:
    """A sampled batch as d3rlpy's own record: scaled, but for images, which are scaled here."""
    observations, next_observations = (
        as_d3rlpy(scaled_observations(part, algo.observation_scaler))
        for part in (batch.observations, batch.next_observations)
    )
    rewards = batch.rewards.unsqueeze(1)
    return TorchMiniBatch(
        observations=observations,
        actions=_action_columns(batch.actions),
        rewards=rewards,
        next_observations=next_observations,
        next_actions=_action_columns(batch.next_actions),
        returns_to_go=torch.zeros_like(rewards) if returns_to_go is None else returns_to_go,
        terminals=batch.terminals.unsqueeze(1),
        intervals=batch.intervals.unsqueeze(1),
        device=algo._device,
    )


def _action_columns(actions: Tensor) -> Tensor:
    """As d3rlpy has them: discrete actions [B] as floats in a column."""
    return actions.float().unsqueeze(1) if actions.ndim == 1 else actions


def from_mini_batch(batch: TorchMiniBatch, *, discrete: bool = False) -> Transitions:
    """d3rlpy's record as Transitions, nothing checked; copied are discrete actions alone."""
    actions, next_actions = (
        value.squeeze(1).long() if discrete else value for value in (batch.actions, batch.next_actions)
    )
    observations, next_observations = (
        tuple(value) if isinstance(value, list) else value for value in (batch.observations, batch.next_observations)
    )
    terminals = batch.terminals.squeeze(1)
    return Transitions.unchecked(
        {
            "observations": observations,
            "actions": actions,
            "rewards": batch.rewards.squeeze(1),
            "next_observations": next_observations,
            "terminals": terminals,
            "timeouts": torch.zeros_like(terminals),
            "next_actions": next_actions,
            "has_next_actions": 1 - terminals,
            "intervals": batch.intervals.squeeze(1),
        }
    )
