"""TD3+BC on 10,000 transitions of Hopper, plain and with C4: trained side by side, measured, and drawn.

    python examples/quickstart.py                            # 40,000 updates: eight to ten minutes on two cores
    python examples/quickstart.py --updates 4000             # a first look
    python examples/quickstart.py --data medium-replay       # where plain TD3+BC does not break

Prints a table; writes three pictures and runs.json, with settings and all that was measured, to results/quickstart/.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from c4buffer import MixtureClusterer, load_d4rl, plots, stacked_gradients

ROOT = Path(__file__).parent.parent
ARMS = ("plain", "C4")
RETURNS = (-20.272305, 3234.3)  # D4RL's reference returns of Hopper: score 0 and score 100
MEASUREMENTS = 40
EVALUATIONS = 10
EPISODES = 10


@dataclass(frozen=True)
class Settings:
    """What both arms share."""

    data: str
    updates: int
    seed: int
    n_clusters: int
    penalty_weight: float
    threads: int

    @property
    def path(self) -> Path:
        return ROOT / "data" / f"hopper-{self.data}-10k.hdf5"


@dataclass
class Run:
    """What one arm leaves behind."""

    updates: list[int] = field(default_factory=list)
    measured: dict[str, list[float]] = field(default_factory=dict)  # by name, one value for each of `updates`
    evaluated: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    updates_per_second: float = 0.0

    def history(self) -> dict[str, Any]:
        """As the pictures take it."""
        return {"updates": self.updates, **self.measured, "evaluated": self.evaluated, "scores": self.scores}


def train(arm: str, settings: Settings, queue: Any) -> None:
    """One arm, in a process of its own; sends (arm, "progress", update) and, at the end, (arm, "done", run)."""
    torch.set_num_threads(settings.threads)
    d3rlpy = import_d3rlpy()
    from c4buffer.integrations.d3rlpy import C4Config

    dataset = d3rlpy_dataset(d3rlpy, settings.path)
    d3rlpy.seed(settings.seed)
    config = d3rlpy.algos.TD3PlusBCConfig(observation_scaler=d3rlpy.preprocessing.StandardObservationScaler())
    if arm == "C4":
        weight = settings.penalty_weight
        config = C4Config(base=config, n_clusters=settings.n_clusters, penalty_weight=weight, seed=settings.seed)
    observer = Observer(arm, settings, dataset, queue)
    algo = config.create("cpu")
    algo.fit(
        dataset,
        n_steps=settings.updates,
        n_steps_per_epoch=settings.updates,
        show_progress=False,
        logger_adapter=d3rlpy.logging.NoopAdapterFactory(),
        callback=observer,
    )
    queue.put((arm, "done", (observer.run, observer.pictured)))


class Observer:
    """d3rlpy's callback: measures both arms in the same way, and stops the clock meanwhile."""

    def __init__(self, arm: str, settings: Settings, dataset: Any, queue: Any) -> None:
        import gymnasium

        self.run = Run()
        self.pictured: dict[int, Any] = {}  # update -> stacked gradients and responsibilities, as arrays
        self._arm, self._settings, self._dataset, self._queue = arm, settings, dataset, queue
        self._env = gymnasium.make("Hopper-v5")
        self._env.reset(seed=settings.seed)
        self._transitions: Any = None
        self._measure_every = max(1, settings.updates // MEASUREMENTS)
        self._evaluate_every = max(1, settings.updates // EVALUATIONS)
        self._observing = 0.0
        self._started = time.perf_counter()

    def __call__(self, algo: Any, epoch: int, update: int) -> None:
        began = time.perf_counter()
        if update % 100 == 0:
            self._queue.put((self._arm, "progress", update))
        last = update == self._settings.updates
        if last or update % self._measure_every == 0:
            self._measure(algo, update)
        if last or update == self._evaluate_every:
            self._picture(algo, update)
        if last or update % self._evaluate_every == 0:
            self._evaluate(algo, update)
        ended = time.perf_counter()
        self._observing += ended - began
        self.run.updates_per_second = update / (ended - self._started - self._observing)

    def _measure(self, algo: Any, update: int) -> None:
        from c4buffer.integrations.d3rlpy import measure, transitions_of

        if self._transitions is None:
            self._transitions = transitions_of(self._dataset, algo)
        self.run.updates.append(update)
        for name, value in measure(algo, self._transitions, n_clusters=self._settings.n_clusters).items():
            self.run.measured.setdefault(name, []).append(value)

    def _picture(self, algo: Any, update: int) -> None:
        from c4buffer.integrations.d3rlpy import critics_of

        embeddings = stacked_gradients(critics_of(algo), self._transitions)
        responsibilities = MixtureClusterer(self._settings.n_clusters)(embeddings)
        self.pictured[update] = (embeddings.numpy(), responsibilities.numpy())

    def _evaluate(self, algo: Any, update: int) -> None:
        from d3rlpy.metrics import EnvironmentEvaluator

        mean_return = EnvironmentEvaluator(self._env, n_trials=EPISODES)(algo, self._dataset)
        low, high = RETURNS
        self.run.evaluated.append(update)
        self.run.scores.append(100 * (mean_return - low) / (high - low))


def import_d3rlpy() -> Any:
    """d3rlpy without its greeting and its log lines."""
    with contextlib.redirect_stderr(io.StringIO()):
        import d3rlpy
    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    return d3rlpy


def d3rlpy_dataset(d3rlpy: Any, path: Path) -> Any:
    """The file as d3rlpy has it."""
    data = load_d4rl(path)
    names = ("observations", "actions", "rewards", "terminals", "timeouts")
    return d3rlpy.dataset.MDPDataset(**{name: getattr(data, name).numpy() for name in names})


def largest_discounted_return(path: Path, gamma: float = 0.99) -> float:
    """Of all the rows of the data, to their episode's end."""
    data = load_d4rl(path)
    best, value = 0.0, 0.0
    for reward, last in zip(reversed(data.rewards.tolist()), reversed((data.terminals + data.timeouts).tolist())):
        value = reward + (0.0 if last else gamma * value)
        best = max(best, value)
    return best


def train_both(settings: Settings, console: Console) -> dict[str, tuple[Run, dict[int, Any]]]:
    """Both arms in two processes, with a progress bar each."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=train, args=(arm, settings, queue), daemon=True) for arm in ARMS]
    finished: dict[str, Any] = {}
    columns = (
        TextColumn("{task.description:>6}"),
        BarColumn(bar_width=40),
        MofNCompleteColumn(),
        TextColumn("updates"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, refresh_per_second=2) as progress:
        tasks = {arm: progress.add_task(arm, total=settings.updates) for arm in ARMS}
        for worker in workers:
            worker.start()
        while len(finished) < len(ARMS):
            if queue.empty():
                if any(worker.exitcode for worker in workers):
                    raise SystemExit("a training process ended with an error; its message stands above")
                time.sleep(0.2)
                continue
            arm, kind, value = queue.get()
            if kind == "progress":
                progress.update(tasks[arm], completed=value)
            else:
                finished[arm] = value
    for worker in workers:
        worker.join()
    return {arm: finished[arm] for arm in ARMS}


def print_table(runs: dict[str, Run], settings: Settings, largest_return: float, console: Console) -> None:
    """One row a quantity, one column an arm."""
    title = f"TD3+BC, hopper-{settings.data}, 10,000 transitions, {settings.updates:,} updates, seed {settings.seed}"
    table = Table(title=title, min_width=len(title) + 2)
    table.add_column("at the end of training")
    for arm in runs:
        table.add_column(arm, justify="right")

    def row(name: str, form: str, value: Callable[[Run], float]) -> None:
        table.add_row(name, *(format(value(run), form) for run in runs.values()))

    def last(name: str) -> Callable[[Run], float]:
        return lambda run: run.measured[name][-1]

    row(f"mean Q (largest discounted return in the data: {largest_return:.0f})", ",.1f", last("mean_q"))
    row("TD loss", ",.2f", last("td_loss"))
    row("cross-covariance of target and critic gradients, total", ".3g", last("total"))
    row("  within clusters", ".3g", last("within"))
    row("  between clusters", ".3g", last("between"))
    row("  correlation (total over its bound)", ".2f", last("correlation"))
    row("updates per second", ".0f", lambda run: run.updates_per_second)
    row("normalised score, last evaluation", ".1f", lambda run: run.scores[-1])
    row("normalised score, mean of the last five", ".1f", lambda run: sum(run.scores[-5:]) / len(run.scores[-5:]))
    console.print(table)
    console.print("One seed says little: runs that differ by the seed alone differ by tens of points here.")


def draw_gradient_space(pictured: dict[str, dict[int, Any]]) -> Any:
    """Both arms early and at the end: a row a time, a column an arm."""
    embeddings, responsibilities = {}, {}
    for update in sorted({update for moments in pictured.values() for update in moments}):
        for arm, moments in pictured.items():
            name = f"{arm}, {update:,} updates"
            embeddings[name], responsibilities[name] = map(torch.from_numpy, moments[update])
    return plots.gradient_space(embeddings, responsibilities, columns=len(pictured))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("medium-expert", "medium-replay"), default="medium-expert")
    parser.add_argument("--updates", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clusters", type=int, default=3)
    parser.add_argument("--penalty-weight", type=float, default=0.1)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "quickstart")
    arguments = parser.parse_args()
    threads = max(1, (os.cpu_count() or 2) // len(ARMS))
    settings = Settings(
        data=arguments.data,
        updates=arguments.updates,
        seed=arguments.seed,
        n_clusters=arguments.clusters,
        penalty_weight=arguments.penalty_weight,
        threads=threads,
    )

    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(f"TD3+BC plain and with C4, {threads} thread(s) each; {settings.path.name}")
    finished = train_both(settings, console)
    runs = {arm: run for arm, (run, _) in finished.items()}
    largest_return = largest_discounted_return(settings.path)
    print_table(runs, settings, largest_return, console)

    arguments.out.mkdir(parents=True, exist_ok=True)
    histories = {arm: run.history() for arm, run in runs.items()}
    (arguments.out / "runs.json").write_text(json.dumps({"settings": vars(settings), "runs": histories}, indent=1))
    figures = {
        "training": plots.training_curves(histories, largest_return=largest_return),
        "cross_covariance": plots.cross_covariance_split(histories),
        "gradient_space": draw_gradient_space({arm: pictured for arm, (_, pictured) in finished.items()}),
    }
    for name, figure in figures.items():
        figure.savefig(arguments.out / f"{name}.png")
        console.print(f"wrote {arguments.out / name}.png")


if __name__ == "__main__":
    main()
