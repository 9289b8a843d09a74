"""A model's replay buffer in one file, without pickle."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from c4buffer import checkpoint
from c4buffer._checks import fail

from .buffers import _Clustered

KIND = "replay buffer of Stable-Baselines3"


def save_replay_buffer(model: Any, path: str | os.PathLike[str]) -> None:
    """Write what the model's replay buffer holds to one safetensors file; all of it, or the old file stays.

    Raises:
        ValueError: for a model without a replay buffer, and for hindsight with `copy_info_dict=True`, whose records can
            be any objects.
    """
    buffer = _buffer_of(model)
    # a memory-optimised ring holds the last row's next observation behind it
    rows = buffer.size() if buffer.full else min(buffer.pos + buffer.optimize_memory_usage, buffer.buffer_size)
    arrays = {name: torch.from_numpy(_rows_of(array, rows, buffer)) for name, array in _arrays(buffer).items()}
    state = {"pos": buffer.pos, "full": buffer.full, "rows": rows, "sizes": _sizes(buffer), "arrays": arrays}
    checkpoint.save(path, KIND, state)


def load_replay_buffer(model: Any, path: str | os.PathLike[str], truncate_last_traj: bool = True) -> None:
    """Put what `save_replay_buffer` wrote into the replay buffer that the model has. Nothing in a file can run.

    Args:
        model: with a buffer for the same spaces, of the same size and number of environments.
        path: the file.
        truncate_last_traj: with hindsight: whether the last episode, if it is open, ends here, as the next `learn`
            begins a new one.

    Raises:
        OSError: where there is no such file.
        ValueError: for a damaged file, or one of another buffer; the model's buffer is unchanged then.
    """
    buffer = _buffer_of(model)
    state = checkpoint.load(path, KIND)
    held = _arrays(buffer)
    rows, expected, got = state["rows"], _sizes(buffer), state["sizes"]
    if expected != got:
        differing = sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name))
        wanted, found = ({name: sizes.get(name) for name in differing} for sizes in (expected, got))
        fail("path", f"the file of a replay buffer with {wanted}", f"{found}, {path}")
    found = {name: state["arrays"][name].numpy() for name in held}  # all of it, before anything is changed
    for name, target in held.items():
        if _has_rows(target, buffer):
            target[:rows], target[rows:] = found[name], 0
        else:
            target[:] = found[name]
    buffer.pos, buffer.full = state["pos"], state["full"]
    if isinstance(buffer, HerReplayBuffer) and truncate_last_traj:
        buffer.truncate_last_trajectory()
    if isinstance(buffer, _Clustered):
        buffer.forget_clusters()


def _buffer_of(model: Any) -> Any:
    buffer = getattr(model, "replay_buffer", None)
    if not isinstance(buffer, ReplayBuffer):
        fail("model", "an off-policy model, which has a replay buffer", type(model).__name__)
    if getattr(buffer, "copy_info_dict", False):
        fail("model", "copy_info_dict=False, as info records can be any objects", "True")
    return buffer


def _arrays(buffer: Any) -> dict[str, np.ndarray]:
    """By name, the keys of dictionaries of observations included."""
    found = {}
    for name, value in vars(buffer).items():
        for key, array in value.items() if isinstance(value, dict) else [(None, value)]:
            if isinstance(array, np.ndarray) and array.dtype != object:
                found[name if key is None else f"{name}.{key}"] = array
    return found


def _sizes(buffer: Any) -> dict[str, str]:
    """What must be equal: arrays, and the action box, by which actions are scaled."""
    sizes = {name: f"{array.dtype} {list(array.shape)}" for name, array in _arrays(buffer).items()}
    space = buffer.action_space
    box = f" {space.low.tolist()} to {space.high.tolist()}" if isinstance(space, spaces.Box) else ""
    return {**sizes, "action_space": f"{space}{box}"}


def _has_rows(array: np.ndarray, buffer: Any) -> bool:
    return array.shape[:2] == (buffer.buffer_size, buffer.n_envs)


def _rows_of(array: np.ndarray, rows: int, buffer: Any) -> np.ndarray:
    return np.ascontiguousarray(array[:rows] if _has_rows(array, buffer) else array)
