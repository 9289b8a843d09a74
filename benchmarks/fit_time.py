"""What C4 costs in time: d3rlpy's `fit` of a wrapped algorithm over that of the plain one.

    python benchmarks/fit_time.py             # TD3+BC, 5 pairs of 2,000 updates
    python benchmarks/fit_time.py --threads 1
    python benchmarks/fit_time.py --algorithm iql --copies 100    # a million transitions

Plain and wrapped runs take turns in one process, so that both see the same machine; a ratio is taken within each turn
and the median over turns is what counts. 10,000 transitions of hopper medium-expert, networks and batch of d3rlpy's
defaults, K = 3, relative gradient penalty 0.1, default refresh: once per 1,000 updates, or N / 10. An update's time has
that part of a refresh in it, as a fit is shorter than what lies between two refreshes of a million transitions. What is
done once, before the first update (the dataset's columns), stands beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import platform
import statistics
import sys
import time
from dataclasses import dataclass
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


def import_d3rlpy() -> Any:
    """d3rlpy without its greeting and its log lines."""
    with contextlib.redirect_stderr(io.StringIO()):
        import d3rlpy
    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    return d3rlpy


@dataclass(frozen=True)
class Timing:
    """Of a fit: seconds of an update, of a refresh, and before the first of either."""

    update: float
    refresh: float
    refresh_share: float
    start: float


def timed_fit(
    d3rlpy: Any, algorithm: str, dataset: Any, scaler: Any, penalty_every: int | None, updates: int
) -> Timing:
    """What a fit of a new algorithm takes, with a scaler that is fitted."""
    from c4buffer.integrations.d3rlpy import C4Config

    d3rlpy.seed(0)
    config = getattr(d3rlpy.algos, ALGORITHMS[algorithm])(observation_scaler=scaler)
    if penalty_every is not None:
        config = C4Config(base=config, penalty_every=penalty_every, seed=0)
    algo = config.create("cpu")
    algo.build_with_dataset(dataset)
    moments = [time.perf_counter()]
    results = algo.fit(
        dataset,
        n_steps=updates,
        n_steps_per_epoch=min(1000, updates),
        show_progress=False,
        logger_adapter=d3rlpy.logging.NoopAdapterFactory(),
        callback=lambda *_: moments.append(time.perf_counter()),
    )
    refreshes = [metrics["c4_refresh_seconds"] for _, metrics in results if "c4_refresh_seconds" in metrics]
    steady = (moments[-1] - moments[1] - sum(refreshes[1:])) / (updates - 1)
    refresh = statistics.mean(refreshes) if refreshes else 0.0
    share = refresh / max(1000, dataset.transition_count // 10)
    start = moments[1] - moments[0] - sum(refreshes[:1]) - steady
    return Timing(update=steady + share, refresh=refresh, refresh_share=share / (steady + share), start=start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--updates", type=int, default=2000, help="a multiple of 1,000, or less than that")
    parser.add_argument("--algorithm", choices=sorted(ALGORITHMS), default="td3_plus_bc")
    parser.add_argument("--copies", type=int, default=1, help="of the 10,000 transitions, as episodes of their own")
    parser.add_argument("--threads", type=int, default=None, help="torch's threads; left as they are by default")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
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
    for penalty_every in ARMS.values():
        timed_fit(d3rlpy, arguments.algorithm, dataset, scaler, penalty_every, min(1000, arguments.updates))  # warm-up
    turns: list[dict[str, Timing]] = []
    for turn in range(arguments.pairs):
        turns.append(
            {
                arm: timed_fit(d3rlpy, arguments.algorithm, dataset, scaler, every, arguments.updates)
                for arm, every in ARMS.items()
            }
        )
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
