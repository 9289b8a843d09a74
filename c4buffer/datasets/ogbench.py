"""OGBench's datasets -> Transitions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import fail
from ..fields import as_flags
from ..transitions import Transitions
from .arrays import as_network_input

REQUIRED = ("observations", "actions", "rewards", "terminals", "masks")
OPTIONAL = ("next_observations", "valids")
FLAGS = ("terminals", "masks", "valids")


def load_ogbench(dataset: Mapping[str, Any] | str | Path) -> Transitions:
    """A dataset of a single-task variant of OGBench (any name with "singletask"), whose rewards are the task's.

    OGBench's `masks` are 0 where the task is solved: terminals are 1 - masks. Its `terminals` mark where a trajectory
    ends, and become timeouts where that is not a terminal. Where `next_observations` are missing (the compact form, and
    files), s' is the next row's observation, and rows that have none are left out: those with `valids` 0 or, without
    `valids`, each trajectory's last. Floating values take torch's default dtype.

    Args:
        dataset: the mapping that `ogbench.make_env_and_datasets` gives for training or validation, in the regular or
            the compact form, or an .npz file with the same fields: observations [N, *O], actions [N, A] or integer
            [N], rewards [N], terminals [N], masks [N]; next_observations or valids [N].

    Raises:
        ValueError: if a field is missing (data without a task have no rewards and masks), has another length or values
            that it can not have; names it.

    >>> data = load_ogbench({"observations": np.zeros((3, 2)), "next_observations": np.ones((3, 2)),
    ...                      "actions": np.zeros((3, 1)), "rewards": [-1, 0, -1],
    ...                      "masks": [1, 0, 1], "terminals": [0, 0, 1]})
    >>> data.terminals.tolist(), data.timeouts.tolist()
    ([0.0, 1.0, 0.0], [0.0, 0.0, 1.0])
    """
    if not isinstance(dataset, Mapping):
        file = np.load(dataset)
        if not isinstance(file, np.lib.npyio.NpzFile):
            fail("dataset", "a mapping or an .npz file", f"an array {list(file.shape)}, {dataset}")
        with file:
            return load_ogbench({name: file[name] for name in (*REQUIRED, *OPTIONAL) if name in file})
    missing = [name for name in REQUIRED if name not in dataset]
    if missing:
        fail(
            "dataset",
            f"the fields {', '.join(REQUIRED)} (rewards and masks come with a task: names with 'singletask')",
            f"one without {', '.join(missing)}",
        )
    names = [name for name in (*REQUIRED, *OPTIONAL) if name in dataset]
    columns = {name: as_network_input(name, dataset[name]) for name in names}
    numbers = [name for name, column in columns.items() if column.ndim == 0]
    if numbers:
        fail(numbers[0], "an array [N, ...]", "a single number")
    rows = len(columns["terminals"])
    for name, column in columns.items():
        if len(column) != rows:
            fail(name, f"{rows} rows, as many as terminals", len(column))
        if name in FLAGS:
            columns[name] = as_flags(name, column, rows, like=torch.empty(0, device=column.device))
    if "next_observations" not in columns and rows > 0:
        columns = _followed(columns)
    solved = 1 - columns["masks"]
    return Transitions(
        **{name: columns[name] for name in names if name not in (*FLAGS, "next_observations")},
        next_observations=columns.get("next_observations", columns["observations"]),
        terminals=solved,
        timeouts=columns["terminals"] * (1 - solved),
    )


def _followed(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows whose s' is the next row's observation, the last of each trajectory marked anew."""
    valid = columns["valids"] > 0 if "valids" in columns else columns["terminals"] == 0
    valid[-1] = False
    new = {"next_observations": columns["observations"].roll(-1, dims=0), "terminals": (~valid).roll(-1).float()}
    return {name: column[valid] for name, column in {**columns, **new}.items()}
