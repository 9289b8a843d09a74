"""SAC of Stable-Baselines3 on Pendulum-v1, with its own buffer and with C4: does it learn, and what does it cost?

    python benchmarks/sb3_pendulum.py               # run what is missing, append to results, print the table
    python benchmarks/sb3_pendulum.py --threads 2   # threads of torch

The models of one seed take turns of 1,000 steps in one process, so that all see the same machine; ratios are taken
within a turn, and their median counts. The first two turns are left out of them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import gymnasium
import torch
from c4buffer.integrations.sb3 import C4Callback, ClusteredReplayBuffer
from rich.console import Console
from rich.table import Table
from stable_baselines3 import SAC
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from c4buffer import CovariancePenalty

RESULTS = Path(__file__).parent / "results" / "sb3_pendulum.jsonl"
ARMS = ("stock", "clusters", "clusters + penalty")
SEEDS = (0, 1, 2)
TURN = 1000
EPISODES = 20


def model_of(arm: str, seed: int) -> Any:
    options = {} if arm == "stock" else {"replay_buffer_class": ClusteredReplayBuffer}
    return SAC("MlpPolicy", gymnasium.make("Pendulum-v1"), learning_rate=1e-3, seed=seed, device="cpu", **options)


def callback_of(arm: str) -> Any:
    if arm == "stock":
        return None
    penalty = CovariancePenalty(0.1, scale="relative") if arm.endswith("penalty") else None
    return C4Callback(penalty, penalty_every=4)


def train(arms: list[str], seed: int, steps: int) -> dict[str, Any]:
    """All arms side by side; the mean return of each at the end, and the seconds of its turns."""
    models = {arm: model_of(arm, seed) for arm in arms}
    callbacks = {arm: callback_of(arm) for arm in arms}
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(steps // TURN):
        for arm, model in models.items():
            started = time.perf_counter()
            model.learn(TURN, callback=callbacks[arm], reset_num_timesteps=False)
            seconds[arm].append(time.perf_counter() - started)
    env = Monitor(gymnasium.make("Pendulum-v1"))
    env.reset(seed=1000 + seed)
    returns = {arm: evaluate_policy(model, env, n_eval_episodes=EPISODES)[0] for arm, model in models.items()}
    return {
        "seed": seed,
        "steps": steps,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "returns": {arm: float(value) for arm, value in returns.items()},
        "seconds": seconds,
    }


def finished(arms: list[str], steps: int, threads: int) -> list[dict[str, Any]]:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    wanted = arms, steps, threads
    return [run for run in map(json.loads, lines) if (list(run["returns"]), run["steps"], run["threads"]) == wanted]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=ARMS[:2], help=f"of {ARMS}; ratios need stock")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--steps", type=int, default=6_000)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arms = [arm for arm in ARMS if arm in arguments.arms]
    chosen = arms, arguments.steps, arguments.threads
    for seed in arguments.seeds:
        if seed not in {run["seed"] for run in finished(*chosen)}:
            run = train(arms, seed, arguments.steps)
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a") as file:
                file.write(json.dumps(run) + "\n")

    runs = finished(*chosen)
    table = Table(title=f"SAC on Pendulum-v1, {arguments.steps:,} steps, {arguments.threads} threads")
    for heading in ("arm", f"mean return of {EPISODES} episodes, by seed", "time / stock"):
        table.add_column(heading)
    for arm in arms:
        returns = " / ".join(f"{run['returns'][arm]:.0f}" for run in sorted(runs, key=lambda run: run["seed"]))
        stock = "stock" if "stock" in arms else arm
        turns = [pair for run in runs for pair in list(zip(run["seconds"][arm], run["seconds"][stock]))[2:]]
        ratio = f"{statistics.median(own / other for own, other in turns):.2f}" if "stock" in arms else "not measured"
        table.add_row(arm, returns, ratio)
    Console().print(table)


if __name__ == "__main__":
    main()
