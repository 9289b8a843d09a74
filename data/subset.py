"""Cut a small D4RL-layout file out of a large one: whole trajectories, drawn in proportion to their length.

python data/subset.py hopper-medium-expert.hdf5 hopper-medium-expert-10k.hdf5 --transitions 10000 --seed 0
"""

from __future__ import annotations

import argparse
from pathlib import Path

import h5py
import numpy as np

FIELDS = ("observations", "actions", "next_observations", "rewards", "terminals", "timeouts")


def draw_rows(ends: np.ndarray, transitions: int, seed: int) -> np.ndarray:
    """Rows of distinct trajectories, each next one drawn with probability proportional to its length.

    `ends` [T] are the last rows of the trajectories. The last trajectory drawn is cut so that exactly `transitions`
    rows come back.
    """
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.sum() < transitions:
        raise ValueError(f"transitions: expected at most {lengths.sum()} (all that the file holds), got {transitions}")
    order = np.random.default_rng(seed).choice(len(ends), size=len(ends), replace=False, p=lengths / lengths.sum())
    return np.concatenate([np.arange(starts[t], ends[t] + 1) for t in order])[:transitions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--transitions", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    with h5py.File(arguments.source) as file:
        columns = {name: file[name][:] for name in FIELDS}
        attributes = dict(file.attrs)
    ends = np.flatnonzero(columns["terminals"] | columns["timeouts"])
    rows = draw_rows(ends, arguments.transitions, arguments.seed)
    columns = {name: column[rows] for name, column in columns.items()}
    if not columns["terminals"][-1]:
        columns["timeouts"][-1] = True  # the last trajectory was cut here

    with h5py.File(arguments.target, "w") as file:
        for name, column in columns.items():
            file.create_dataset(name, data=column, compression="gzip", compression_opts=9, shuffle=True)
        file.attrs.update(attributes)
        file.attrs.update(source=arguments.source.name, subset_seed=arguments.seed)


if __name__ == "__main__":
    main()
