"""Models of Stable-Baselines3 trained from 10,000 transitions alone: cloning, SAC, SAC with C4, and ACTIVE.

    python benchmarks/sb3_offline.py                    # run what is missing, append to results, print the table
    python benchmarks/sb3_offline.py --arms active      # a part of it

Hopper, observations standardised by a VecNormalize with the data's statistics, rewards scaled so that the data's
returns span 1,000; 10,000 updates, evaluated every 1,000 on 10 episodes; a run's score is the mean of its last five
evaluations, normalised as D4RL does. Cloning is ACTIVE with neither values nor advantages in the policy's loss.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium
import torch
from c4buffer.integrations.sb3 import ACTIVE, C4Callback, ClusteredReplayBuffer, learn_offline
from rich.console import Console
from rich.table import Table
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from c4buffer import CovariancePenalty, Transitions, load_d4rl

sys.path.append(str(Path(__file__).parent / "study"))
from products import use_onednn

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "sb3_offline.jsonl"
DATASETS = ("hopper-medium-expert",)
ARMS = ("clone", "sac", "sac + c4", "active")
SEEDS = (0, 1, 2)
UPDATES, EVERY, EPISODES, LAST = 10_000, 1_000, 10, 5
LOW, HIGH = -20.272305, 3234.3  # D4RL's reference returns of hopper


class Evaluate(BaseCallback):
    """The normalised score every 1,000 updates."""

    def __init__(self, env: Any) -> None:
        super().__init__()
        self.env = env
        self.scores: list[float] = []

    def _on_step(self) -> bool:
        if self.num_timesteps % EVERY == 0:
            found = evaluate_policy(self.model, self.env, n_eval_episodes=EPISODES)[0]
            self.scores.append(100 * (float(found) - LOW) / (HIGH - LOW))
        return True


def environment(data: Transitions, seed: int) -> Any:
    """Normalises as the data's statistics say, which stay."""
    env = VecNormalize(DummyVecEnv([lambda: Monitor(gymnasium.make("Hopper-v5"))]), training=False, norm_reward=False)
    env.obs_rms.mean = data.observations.mean(dim=0).double().numpy()
    env.obs_rms.var = data.observations.var(dim=0, correction=0).double().numpy()
    env.obs_rms.count = len(data)
    env.seed(seed)
    return env


def span_of_returns(data: Transitions) -> float:
    """The best trajectory's return less the worst's."""
    ends = (data.terminals + data.timeouts).nonzero().squeeze(1) + 1
    sizes = torch.diff(ends, prepend=torch.zeros(1, dtype=torch.int64))
    returns = torch.stack([rewards.sum() for rewards in data.rewards.split(sizes.tolist())])
    return float(returns.max() - returns.min())


def train(dataset: str, arm: str, seed: int) -> dict[str, Any]:
    """One run."""
    data = load_d4rl(ROOT / "data" / f"{dataset}-10k.hdf5")
    data = data.replace(rewards=data.rewards * 1000.0 / span_of_returns(data))
    common = {"env": environment(data, seed), "buffer_size": len(data), "seed": seed, "device": "cpu"}
    callbacks: list[Any] = [Evaluate(environment(data, 100 + seed))]
    model: Any
    if arm == "clone":
        model = ACTIVE("MlpPolicy", **common, q_weight=0.0, likelihood_target=None, temperature=1e9)
    elif arm == "active":
        model = ACTIVE("MlpPolicy", **common)
    elif arm == "sac":
        model = SAC("MlpPolicy", **common)
    else:
        model = SAC("MlpPolicy", **common, replay_buffer_class=ClusteredReplayBuffer)
        callbacks.append(C4Callback(CovariancePenalty(0.1, scale="relative"), penalty_every=4))
    started = time.process_time()
    learn_offline(model, data, UPDATES, callback=callbacks)
    with torch.no_grad():
        samples = model.replay_buffer._get_samples(torch.arange(len(data)).numpy(), env=model.get_vec_normalize_env())
        mean_q = float(torch.cat(model.critic(samples.observations, samples.actions), dim=1).mean())
    scores = callbacks[0].scores
    return {
        "dataset": dataset,
        "arm": arm,
        "seed": seed,
        "scores": scores,
        "score": statistics.mean(scores[-LAST:]),
        "mean_q": mean_q,
        "likelihood_target": model.temperature_controller.target if arm == "active" else None,
        "seconds": time.process_time() - started,
    }


def finished() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    arguments = parser.parse_args()
    use_onednn()
    for key in itertools.product(DATASETS, arguments.arms, arguments.seeds):
        if key not in {(run["dataset"], run["arm"], run["seed"]) for run in finished()}:
            run = train(*key)
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a") as file:
                file.write(json.dumps(run) + "\n")

    table = Table(title=f"{UPDATES:,} updates on 10,000 transitions: score by seed (mean Q)")
    table.add_column("model")
    for dataset in DATASETS:
        table.add_column(dataset)
    for arm in ARMS:
        cells = []
        for dataset in DATASETS:
            runs = [run for run in finished() if (run["dataset"], run["arm"]) == (dataset, arm)]
            runs.sort(key=lambda run: run["seed"])
            cells.append(" / ".join(f"{run['score']:.0f} ({run['mean_q']:.3g})" for run in runs) or "not run")
        table.add_row(arm, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
