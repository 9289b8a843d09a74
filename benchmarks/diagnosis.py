"""The papers' quantities in the course of a training: `diagnose` on TD3+BC, plain and with C4's default.

    python benchmarks/diagnosis.py              # train, diagnose and draw: some ten minutes
    python benchmarks/diagnosis.py --draw       # only draw, from benchmarks/results/diagnosis.json

d3rlpy's TD3+BC on 10,000 transitions of hopper medium-expert, 40,000 updates, diagnosed every 2,000 over all the data:
with the data's next actions, as C4 clusters, and with those of the policy, which the algorithm bootstraps from. Both
arms are split by a mixture of three components, fitted anew each time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from staleness import prepared

from c4buffer import Diagnosis, MixtureClusterer, diagnose, plots, stacked_gradients

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "diagnosis.json"
PICTURES = ROOT.parent / "docs" / "images"
UPDATES, EVERY = 40_000, 2_000
ARMS = ("plain", "c4")


def train(arm: str, seed: int) -> dict[str, Any]:
    """Two diagnoses at each point of one training: with the data's next actions and with the policy's."""
    from c4buffer.integrations.d3rlpy import critics_of, transitions_of

    dataset, algo, options = prepared(arm, seed)
    found: dict[str, Any] = {"arm": arm, "updates": [], "dataset": [], "policy": [], "seconds": []}
    for epoch, _ in algo.fitter(dataset, n_steps=UPDATES, n_steps_per_epoch=EVERY, **options):
        transitions = transitions_of(dataset, algo)
        critics = critics_of(algo)
        r = MixtureClusterer(3)(stacked_gradients(critics, transitions))
        found["updates"].append(epoch * EVERY)
        began = time.process_time()
        found["dataset"].append(dataclasses.asdict(diagnose(critics, transitions, responsibilities=r)))
        found["seconds"].append(time.process_time() - began)
        followed = critics_of(algo, next_action="policy")
        found["policy"].append(dataclasses.asdict(diagnose(followed, transitions, responsibilities=r)))
    return found


def draw(found: list[dict[str, Any]]) -> None:
    for run in found:
        figure = plots.diagnosis(run["updates"], [Diagnosis(**each) for each in run["dataset"]])
        figure.savefig(PICTURES / f"diagnosis_{run['arm']}.png")


def table(found: list[dict[str, Any]]) -> str:
    """At the end of training, a column an arm and choice of a'."""
    columns = [(run["arm"], actions, run[actions][-1]) for run in found for actions in ("dataset", "policy")]
    lines = ["| | " + " | ".join(f"{arm}, a' of the {actions}" for arm, actions, _ in columns) + " |"]
    lines.append("| --- |" + " --- |" * len(columns))
    for name in columns[0][2]:
        lines.append(f"| `{name}` | " + " | ".join(f"{values[name]:.4g}" for _, _, values in columns) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="from the results that are there")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.draw:
        RESULTS.write_text(json.dumps([train(arm, options.seed) for arm in ARMS]) + "\n")
    found = json.loads(RESULTS.read_text())
    draw(found)
    print(table(found))


if __name__ == "__main__":
    main()
