"""Run or resume a grid of training runs over all cores, one thread a process.

    python benchmarks/study/run.py first                      # the grid named in arms.py
    python benchmarks/study/run.py first --arms plain c4      # a part of it
    python benchmarks/study/run.py first --list               # what is done and what is not

Each finished run is one JSON line appended to results/GRID.jsonl. A run that stands there is never repeated, unless its
arm means something else by now; the command may be killed at any time and started again. A run whose critic breaks is a
result like any other; one that fails by an error is told at the end, and the others go on.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import itertools
import json
import multiprocessing
import os
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from arms import ARMS, GRIDS, Arm, Grid
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"
KEY = ("dataset", "base", "arm", "seed", "updates", "evaluate_every", "episodes")


def settings_of(grid: Grid) -> list[dict[str, Any]]:
    """One dictionary a run; a seed's runs stand together, so that early results can be compared."""
    return [
        {
            "dataset": dataset,
            "base": base,
            "arm": arm,
            "change": dataclasses.asdict(ARMS[arm]),
            "seed": seed,
            "updates": grid.updates,
            "evaluate_every": grid.evaluate_every,
            "episodes": grid.episodes,
        }
        for seed, dataset, base, arm in itertools.product(grid.seeds, grid.datasets, grid.bases, grid.arms)
    ]


def key_of(record: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two runs the same: their settings, and what the arm changes (fields that came later: unchanged)."""
    change = json.dumps(dataclasses.asdict(Arm(**record["change"])), sort_keys=True)
    return (*(record[name] for name in KEY), change)


def finished_runs(path: Path) -> list[dict[str, Any]]:
    """The records of a results file; a last line that was cut by a kill is passed over."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def append(path: Path, record: dict[str, Any]) -> None:
    """One line, written whole; what a killed writer left of a line is removed first, and no run is written twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        if key_of(record) not in map(key_of, finished_runs(path)):
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def leave_with(parent: int) -> None:
    """End this process when the one that started it is gone, so that a killed command leaves no runs behind."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_one(work: tuple[dict[str, Any], Path]) -> dict[str, Any]:
    """Train and append, in a process of its own."""
    from training import train

    settings, path = work
    record = train(settings)
    append(path, record)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", choices=sorted(GRIDS))
    parser.add_argument("--arms", nargs="+", help="only these")
    parser.add_argument("--datasets", nargs="+", help="only these")
    parser.add_argument("--bases", nargs="+", help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()

    path = arguments.results / f"{arguments.grid}.jsonl"
    done = {key_of(record) for record in finished_runs(path)}
    chosen = [
        settings
        for settings in settings_of(GRIDS[arguments.grid])
        if (arguments.arms is None or settings["arm"] in arguments.arms)
        and (arguments.datasets is None or settings["dataset"] in arguments.datasets)
        and (arguments.bases is None or settings["base"] in arguments.bases)
        and (arguments.seeds is None or settings["seed"] in arguments.seeds)
    ]
    missing = [settings for settings in chosen if key_of(settings) not in done]
    print(f"{len(chosen) - len(missing)} of {len(chosen)} runs are done; {path}")
    if arguments.list:
        for settings in chosen:
            mark = "done" if key_of(settings) in done else "    "
            print(mark, settings["dataset"], settings["base"], settings["arm"], settings["seed"])
        return
    failures = 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, context, leave_with, (os.getpid(),), max_tasks_per_child=1) as pool:
        works = {pool.submit(run_one, (settings, path)): settings for settings in missing}
        for work in tqdm(as_completed(works), total=len(works), unit="run"):
            told = " ".join(str(works[work][name]) for name in ("dataset", "base", "arm", "seed"))
            error = work.exception()
            failures += error is not None
            tqdm.write(f"{told}: score {work.result()['score']:.1f}" if error is None else f"{told}: {error!r}")
    if failures:
        raise SystemExit(f"{failures} of {len(missing)} runs failed")


if __name__ == "__main__":
    main()
