"""What a high expectile does to Q, with one V-function and with an ensemble: the effect of ACTIVE's first figure.

    python benchmarks/value_overestimate.py             # run what is missing, append to results, table and picture
    python benchmarks/value_overestimate.py --list      # what is done and what is not

In-sample value learning alone, as the policy has no part in it: two Q-functions towards r + gamma min_i V_i(s'), V by
the expectile loss at tau = 0.95, networks of 2 x 256, on the 10,000 transitions of hopper medium-replay. Q is bounded
by the largest discounted return that rewards like the data's allow: the largest reward / (1 - gamma).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from c4buffer import ClusteredReplayBuffer, Transitions, VEnsemble, VEnsembleAdvantage, expectile_value_loss, load_d4rl

sys.path.append(str(Path(__file__).parent / "study"))
from products import use_onednn

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "value_overestimate.jsonl"
PICTURE = ROOT / "docs" / "images" / "value_overestimate.png"
GAMMA, ETA, TAU = 0.99, 0.005, 0.95
MEMBERS = (1, 4)
SEEDS = range(5)
EVERY = 1000


def mlp(inputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1))


def learn(dataset: str, members: int, seed: int, updates: int) -> dict[str, Any]:
    """Train, and record every 1,000 updates: mean Q on the data, its largest, and the V-ensemble's mean spread."""
    data = load_d4rl(ROOT / "data" / f"{dataset}-10k.hdf5")
    mean, scale = data.observations.mean(dim=0), data.observations.std(dim=0) + 1e-3
    data = data.replace(
        observations=(data.observations - mean) / scale, next_observations=(data.next_observations - mean) / scale
    )
    torch.manual_seed(seed)
    v = VEnsemble(data.observations.shape[1], n_members=members)
    q = nn.ModuleList([mlp(data.observations.shape[1] + data.actions.shape[1]) for _ in range(2)])
    target_q = copy.deepcopy(q).requires_grad_(False)
    optimizer = torch.optim.Adam(itertools.chain(q.parameters(), v.parameters()), lr=3e-4)
    advantage = VEnsembleAdvantage(quantile=0.5)
    buffer = ClusteredReplayBuffer.from_transitions(data, seed=seed)
    everything = torch.cat([data.observations, data.actions], dim=1)
    curves: dict[str, list[float]] = {"mean_q": [], "largest_q": [], "spread": []}
    started = time.process_time()
    for update in range(1, updates + 1):
        batch = buffer.sample(256)
        x = torch.cat([batch.observations, batch.actions], dim=1)
        with torch.no_grad():
            y = batch.rewards + GAMMA * (1 - batch.terminals) * advantage.target(v(batch.next_observations))
            data_q = torch.min(*(member(x).squeeze(1) for member in target_q))
        loss = sum((member(x).squeeze(1) - y).square().mean() for member in q)
        loss = loss + expectile_value_loss(data_q, v(batch.observations), tau=TAU)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for parameter, target_parameter in zip(q.parameters(), target_q.parameters()):
            target_parameter.data.lerp_(parameter.data, ETA)
        if update % EVERY == 0:
            with torch.no_grad():
                values = torch.cat([member(everything) for member in q], dim=1)
                curves["mean_q"].append(float(values.mean()))
                curves["largest_q"].append(float(values.max()))
                curves["spread"].append(float(advantage.uncertainty(v(data.observations)).mean()))
    return {
        "dataset": dataset,
        "members": members,
        "seed": seed,
        "updates": updates,
        "bound": float(data.rewards.max()) / (1 - GAMMA),
        "largest_return": max(discounted_returns(data)),
        **curves,
        "seconds": time.process_time() - started,
    }


def discounted_returns(data: Transitions) -> list[float]:
    """Of each row, to its trajectory's end."""
    found, value = [], 0.0
    for reward, last in zip(data.rewards.tolist()[::-1], (data.terminals + data.timeouts).tolist()[::-1]):
        value = reward + (0.0 if last else GAMMA * value)
        found.append(value)
    return found[::-1]


def finished() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def draw(runs: list[dict[str, Any]]) -> None:
    """Mean and largest Q over the updates, beside the data's returns: each seed a line, each m a colour."""
    from matplotlib import pyplot, rc_context

    from c4buffer.plots import RUN_COLOURS, STYLE

    returns = discounted_returns(load_d4rl(ROOT / "data" / f"{runs[0]['dataset']}-10k.hdf5"))
    panels = (("mean_q", "mean", statistics.mean(returns)), ("largest_q", "largest", max(returns)))
    with rc_context(STYLE):
        figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
        for axis, (name, which, reference) in zip(axes, panels):
            for members, colour in zip(sorted({run["members"] for run in runs}), RUN_COLOURS):
                for i, run in enumerate(run for run in runs if run["members"] == members):
                    updates = [EVERY * (k + 1) for k in range(len(run[name]))]
                    label = f"{members} V-function{'s' if members > 1 else ''}" if i == 0 else None
                    axis.plot(updates, run[name], color=colour, label=label, linewidth=1.2)
            axis.axhline(reference, color="black", linestyle="--", linewidth=1.2)
            axis.text(0, reference, f" {which} discounted return", va="bottom", fontsize=9)
            axis.set(title=f"{which.capitalize()} Q on the data", xlabel="updates")
        axes[0].legend(loc="lower right")
        PICTURE.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(PICTURE, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="hopper-medium-replay")
    parser.add_argument("--updates", type=int, default=30_000)
    parser.add_argument("--members", type=int, nargs="+", default=MEMBERS)
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    use_onednn()
    done = {(run["dataset"], run["members"], run["seed"], run["updates"]) for run in finished()}
    for seed, members in itertools.product(SEEDS, arguments.members):
        key = (arguments.dataset, members, seed, arguments.updates)
        if key in done or arguments.list:
            print("done" if key in done else "    ", *key)
            continue
        run = learn(*key)
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(run) + "\n")

    table = Table(title=f"{arguments.dataset}, tau = {TAU}, {arguments.updates:,} updates")
    for heading in ("members", "mean Q, by seed", "largest Q, median", "spread, median", "largest return", "bound"):
        table.add_column(heading, justify="right")
    for members in arguments.members:
        runs = [
            run
            for run in finished()
            if (run["dataset"], run["members"], run["updates"]) == (arguments.dataset, members, arguments.updates)
        ]
        if runs:
            table.add_row(
                str(members),
                " / ".join(f"{run['mean_q'][-1]:,.0f}" for run in runs),
                f"{statistics.median(run['largest_q'][-1] for run in runs):,.0f}",
                f"{statistics.median(run['spread'][-1] for run in runs):,.1f}",
                f"{runs[0]['largest_return']:,.0f}",
                f"{runs[0]['bound']:,.0f}",
            )
    Console().print(table)
    shown = [run for run in finished() if run["dataset"] == arguments.dataset and run["updates"] == arguments.updates]
    if shown:
        draw(shown)


if __name__ == "__main__":
    main()
