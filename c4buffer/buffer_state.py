"""What a ClusteredReplayBuffer's batches to come depend on: taken out of one, put into one, and from a file.

The buffer alone calls this, and it alone knows the buffer's insides.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ._checks import fail
from .checkpoint import load
from .refresh import Every, OnDrift, RefreshPolicy
from .trajectories import Neighbours, Trajectories

KIND = "ClusteredReplayBuffer"  # of a file
OWN = "the caller's own"  # of an option, in a checkpoint: a callable that no file can hold
POLICIES = {"Every": Every, "OnDrift": OnDrift}
# those that the state's meaning depends on
SAME_OPTIONS = (
    *("capacity", "n_clusters", "embedding", "max_dim", "reduction"),
    *("assignment", "replacement", "trajectory_tail", "n_steps", "discount", "frame_stack"),
)


def outline_of(policy: RefreshPolicy | None) -> Any:
    """A refresh policy in plain values; OWN for one that is not ours."""
    if isinstance(policy, (Every, OnDrift)) and type(policy) in POLICIES.values():
        return {"policy": type(policy).__name__, "options": policy.options()}
    return None if policy is None else OWN


def state_of(buffer: Any) -> dict[str, Any]:
    """Everything but the critics, in nested containers of the buffer's own tensors and plain values."""
    windows = buffer._windows
    return {
        "options": dict(buffer._options),
        "storage": buffer._storage.state(),
        **buffer._rows.state(buffer),
        "trajectories": None if buffer._trajectories is None else buffer._trajectories.state(),
        "neighbours": None if windows is None else windows.neighbours.state(),
        "last_rows": [[environment, row] for environment, row in buffer._last_rows.items()],
    }


def copied(state: dict[str, Any]) -> dict[str, Any]:
    """The same state, which does not change with the buffer; transitions in files stay where they are."""
    in_files = state["options"]["storage"] == "memmap"
    return {
        name: part if name == "storage" and in_files else _each_tensor(Tensor.clone, part)
        for name, part in state.items()
    }


def restore(buffer: Any, state: dict[str, Any]) -> None:
    """Put in what `state_of` gave, all of it or nothing.

    Raises:
        ValueError: for a state of another form, or of a buffer of other options.
    """
    try:
        _restore(buffer, state)
    except (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError) as error:
        fail("state", "what state_dict gave", f"{type(error).__name__}: {error}")


def loaded(cls: Any, path: str | os.PathLike[str], options: dict[str, Any]) -> Any:
    """A buffer of class `cls` as it was saved to `path`, but for some options."""
    parameters = inspect.signature(cls).parameters
    known, takes_any = list(parameters), any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    for name in options:
        if name not in known and not takes_any:
            fail("options", f"names among {', '.join(known)}", name)
    state = load(path, KIND)
    try:
        saved = dict(state["options"])
        for name in ("embedding", "clusterer", "refresh"):
            if saved[name] == OWN and name not in options:
                fail(name, "to be given, as the saved buffer had its own", "nothing")
        if isinstance(saved["refresh"], dict) and "refresh" not in options:
            saved["refresh"] = POLICIES[saved["refresh"]["policy"]](**saved["refresh"]["options"])
    except (AttributeError, KeyError, TypeError) as error:
        fail("path", "the state of a buffer", f"{path}: {error}")
    try:
        buffer = cls(**{**saved, **options})
    except TypeError as error:
        if options:  # it may be theirs
            raise
        fail("path", "the state of a buffer", f"{path}: {error}")
    restore(buffer, state)
    if options.get("seed") is not None:
        buffer.seed(options["seed"])
    return buffer


def _restore(buffer: Any, state: dict[str, Any]) -> None:
    for name in SAME_OPTIONS:
        if state["options"][name] != buffer._options[name]:
            fail(name, f"{state['options'][name]!r}, as in the state", repr(buffer._options[name]))
    storage = buffer._new_storage(buffer._options["storage"])
    storage.restore(state["storage"])
    trajectories = None if buffer._trajectories is None else Trajectories(buffer.capacity)
    if trajectories is not None:
        trajectories.restore(state["trajectories"])
    neighbours = None if buffer._windows is None else Neighbours(buffer.capacity)
    if neighbours is not None:
        neighbours.restore(state["neighbours"])
    last_rows = {int(environment): int(row) for environment, row in state["last_rows"]}
    on_device = _each_tensor(lambda part: part.to(buffer.device, copy=True), state["clusterer"])
    buffer._rows.restore({**state, "clusterer": on_device}, buffer, size=len(storage))
    # nothing fails from here on
    buffer._storage, buffer._trajectories, buffer._last_rows = storage, trajectories, last_rows
    buffer._taken_in = storage.written
    if neighbours is not None:
        buffer._windows.storage, buffer._windows.neighbours = storage, neighbours


def _each_tensor(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    """The same nested state with what `function` makes of each tensor."""
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, dict):
        return {key: _each_tensor(function, value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(_each_tensor(function, value) for value in state)
    return state
