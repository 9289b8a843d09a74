"""What C4 costs in time: d3rlpy's `fit` of a wrapped algorithm over that of the plain one.

    python benchmarks/fit_time.py             # TD3+BC, 5 turns of 1,000 updates
    python benchmarks/fit_time.py --threads 1
    python benchmarks/fit_time.py --algorithm iql --copies 100    # a million transitions

In a turn the plain fit and the wrapped ones start anew and go forward by 20 updates each in rotation, all in one
process, so that whatever else the machine does meets all of them; a ratio is taken within each turn and the median
over turns is what counts. 10,000 transitions of hopper medium-expert, networks and batch of d3rlpy's defaults, K = 3,
relative gradient penalty 0.1, default refresh: once per 1,000 updates, or N / 10. An update's time has that part of a
refresh in it, as a turn is shorter than what lies between two refreshes of a million transitions. What is done once,
before the first update (the dataset's columns), stands beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import logging
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from c4buffer import load_d4rl

DATA = Path(__file__).parent.parent / "data" / "hopper-medium-expert-10k.hdf5"
ALGORITHMS = {"td3_plus_bc": "TD3PlusBCConfig", "iql": "IQLConfig", "cql": "CQLConfig", "sac": "SACConfig"}
ARMS = {"plain": None, "C4, every 4th": 4, "C4, every": 1}  # update gets the penalty
BLOCK = 20  # updates of one arm before the next one's


def import_d3rlpy() -> Any:
    """d3rlpy without its greeting and its log lines."""
    with contextlib.redirect_stderr(io.StringIO()):
        import d3rlpy
    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    return d3rlpy


@dataclass
class Timing:
    """Of a fit: seconds of each block of updates, less the refreshes in it, and of each refresh.

    The first block has in it what is done before the first update.
    """

    refresh_interval: int
    blocks: list[float] = field(default_factory=list)
    refreshes: list[float] = field(default_factory=list)

    @property
    def update(self) -> float:
        """Of one update, with its part of a refresh."""
        return self._steady + self._share

    @property
    def refresh(self) -> float:
        return statistics.mean(self.refreshes) if self.refreshes else 0.0

    @property
    def refresh_share(self) -> float:
        """The part of an update's time that is refreshes'."""
        return self._share / self.update

    @property
    def start(self) -> float:
        """Before the first update."""
        return self.blocks[0] - BLOCK * self._steady

    @property
    def _steady(self) -> float:
        return statistics.mean(self.blocks[1:]) / BLOCK

    @property
    def _share(self) -> float:
        return self.refresh / self.refresh_interval


def timed_turn(d3rlpy: Any, algorithm: str, dataset: Any, scaler: Any, updates: int, turn: int) -> dict[str, Timing]:
    """A fit of each arm, new algorithms with a fitted scaler, in rotation; another arm begins in each turn."""
    fits = {arm: fit_of(d3rlpy, algorithm, dataset, scaler, every, updates) for arm, every in ARMS.items()}
    timings = {arm: Timing(max(1000, dataset.transition_count // 10)) for arm in ARMS}
    order = list(ARMS)[turn % len(ARMS) :] + list(ARMS)[: turn % len(ARMS)]
    for _, arm in itertools.product(range(updates // BLOCK), order):
        began = time.perf_counter()
        _, metrics = next(fits[arm])
        refresh = metrics.get("c4_refresh_seconds")
        timings[arm].blocks.append(time.perf_counter() - began - (refresh or 0.0))
        if refresh is not None:
            timings[arm].refreshes.append(refresh)
    return timings


def fit_of(
    d3rlpy: Any, algorithm: str, dataset: Any, scaler: Any, penalty_every: int | None, updates: int
) -> Iterator[tuple[int, dict[str, float]]]:
    """An epoch for each block of updates."""
    from c4buffer.integrations.d3rlpy import C4Config

    d3rlpy.seed(0)
    config = getattr(d3rlpy.algos, ALGORITHMS[algorithm])(observation_scaler=scaler)
    if penalty_every is not None:
        config = C4Config(base=config, penalty_every=penalty_every, seed=0)
    algo = config.create("cpu")
    algo.build_with_dataset(dataset)
    return algo.fitter(
        dataset,
        n_steps=updates,
        n_steps_per_epoch=BLOCK,
        show_progress=False,
        logger_adapter=d3rlpy.logging.NoopAdapterFactory(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--updates", type=int, default=1000, help=f"of each arm in a turn; a multiple of {BLOCK}")
    parser.add_argument("--algorithm", choices=sorted(ALGORITHMS), default="td3_plus_bc")
    parser.add_argument("--copies", type=int, default=1, help="of the 10,000 transitions, as episodes of their own")
    parser.add_argument("--threads", type=int, default=None, help="torch's threads; left as they are by default")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if arguments.updates < 2 * BLOCK or arguments.updates % BLOCK:
        parser.error(f"--updates: expected a multiple of {BLOCK}, at least {2 * BLOCK}, got {arguments.updates}")
    d3rlpy = import_d3rlpy()
    data = load_d4rl(DATA)
    names = ("observations", "actions", "rewards", "terminals", "timeouts")
    columns = {name: getattr(data, name).numpy() for name in names}
    columns = {name: np.concatenate([values] * arguments.copies) for name, values in columns.items()}
    dataset = d3rlpy.dataset.MDPDataset(**columns)

    scaler = d3rlpy.preprocessing.StandardObservationScaler()
    scaler.fit_with_transition_picker(dataset.episodes, dataset.transition_picker)

    console = Console(width=None if sys.stdout.isatty() else 110)
    machine = platform.processor() or platform.machine()
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {machine}")
    console.print(f"{arguments.algorithm}, {dataset.transition_count:,} transitions")
    timed_turn(d3rlpy, arguments.algorithm, dataset, scaler, 2 * BLOCK, 0)  # warm-up
    turns: list[dict[str, Timing]] = []
    for turn in range(arguments.turns):
        turns.append(timed_turn(d3rlpy, arguments.algorithm, dataset, scaler, arguments.updates, turn))
        told = ", ".join(f"{arm} {1000 * timing.update:.2f} ms" for arm, timing in turns[-1].items())
        console.print(f"turn {turn + 1}: {told}")

    table = Table(
        title=f"d3rlpy {arguments.algorithm}, fit of {arguments.updates:,} updates, median of {len(turns)} turns"
    )
    for heading in (
        "",
        "ms per update",
        "ratio to plain",
        "smallest to largest",
        "refresh's part",
        "a refresh",
        "before",
    ):
        table.add_column(heading, justify="right" if heading else "left")
    for arm in ARMS:
        ratios = sorted(turn[arm].update / turn["plain"].update for turn in turns)
        timings = [turn[arm] for turn in turns]
        table.add_row(
            arm,
            f"{statistics.median(1000 * timing.update for timing in timings):.2f}",
            f"{statistics.median(ratios):.2f}",
            f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
            f"{statistics.median(timing.refresh_share for timing in timings):.1%}",
            f"{statistics.median(timing.refresh for timing in timings):.2f} s",
            f"{statistics.median(timing.start for timing in timings):.2f} s",
        )
    console.print(table)


if __name__ == "__main__":
    main()
