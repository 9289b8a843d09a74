"""D4RL's HDF5 layout -> Transitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .._checks import fail, requiring
from ..transitions import Transitions
from .arrays import as_network_input

REQUIRED = ("observations", "actions", "rewards", "terminals")
OPTIONAL = ("timeouts", "next_observations")


def load_d4rl(path: str | Path) -> Transitions:
    """Read a file in D4RL's layout (needs h5py: `pip install c4buffer[data]`).

    observations [N, *O], actions [N, A], rewards [N], terminals [N]; timeouts [N] and next_observations [N, *O] may be
    missing. Without timeouts only terminals end an episode: what lies on either side of another cut is taken for
    consecutive. Without next_observations, s' is the next row's observation, and the last row of an episode that did
    not end in a terminal is left out, as it has none; the row before it is the timeout then.

    Raises:
        ValueError: if the file is no HDF5 file, a field is missing or no array, or no row has a next observation; names
            it.
    """
    with requiring("a file in D4RL's layout", "data"):
        import h5py

    if Path(path).is_file() and not h5py.is_hdf5(path):
        fail("path", "an HDF5 file in D4RL's layout", f"another kind of file, {path}")
    with h5py.File(path, "r") as file:
        missing = [name for name in REQUIRED if name not in file]
        if missing:
            fail(str(path), f"the fields {', '.join(REQUIRED)}", f"a file without {', '.join(missing)}")
        groups = [name for name in (*REQUIRED, *OPTIONAL) if isinstance(file.get(name), h5py.Group)]
        if groups:
            fail(f"{path}: {groups[0]}", "an array [N, ...]", f"a group of {', '.join(file[groups[0]]) or 'nothing'}")
        numbers = [name for name in (*REQUIRED, *OPTIONAL) if name in file and file[name].shape == ()]
        if numbers:
            fail(f"{path}: {numbers[0]}", "an array [N, ...]", "a single number")
        fields: dict[str, Any] = {
            name: as_network_input(name, file[name][:]) for name in (*REQUIRED, *OPTIONAL) if name in file
        }
    if "next_observations" in fields:
        return Transitions(**fields)
    observations = fields["observations"]
    fields["next_observations"] = torch.cat([observations[1:], observations[-1:]])
    whole = Transitions(**fields)  # links next actions over whole episodes
    cut = (whole.timeouts == 1) & (whole.terminals == 0)
    if bool(cut.all()):
        fail(f"{path}: next_observations", "them, or a row that is followed by one of its episode", "neither")
    # The row before one that is left out ends its episode now, unless it belongs to the episode before.
    before = torch.cat([cut[1:], cut[:1] & False]) & (whole.terminals + whole.timeouts == 0)
    timeouts = torch.where(before, torch.ones_like(whole.timeouts), whole.timeouts)
    return Transitions.unchecked({**dict(whole.columns()), "timeouts": timeouts})[~cut]
