"""H_D by quantiles of the clone's likelihoods, and by their mean, for the data that come with the project.

    python benchmarks/likelihood_targets.py                      # the table of docs/active.md, some minutes
    python benchmarks/likelihood_targets.py hopper-medium-expert

The policy is that of ACTIVE with d3rlpy, observations standardised.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import math
from pathlib import Path

import structlog
from rich.console import Console
from rich.table import Table

from c4buffer import load_d4rl

with contextlib.redirect_stderr(io.StringIO()):
    import d3rlpy
from c4buffer.integrations.d3rlpy import ACTIVEConfig

DATA = Path(__file__).parents[1] / "data"
NAMES = ("hopper-medium-expert", "hopper-medium-replay", "hopper-medium", "halfcheetah-medium-replay")
QUANTILES = (0.05, 0.1, 0.25, 0.5)


def targets_of(name: str) -> list[float]:
    """The uniform policy's likelihood, the clone's mean one, and the quantiles, in nats per action."""
    data = load_d4rl(DATA / f"{name}-10k.hdf5")
    fields = ("observations", "actions", "rewards", "terminals", "timeouts")
    dataset = d3rlpy.dataset.MDPDataset(**{field: getattr(data, field).numpy() for field in fields})
    scaler = d3rlpy.preprocessing.StandardObservationScaler()
    scaler.fit_with_transition_picker(dataset.episodes, dataset.transition_picker)
    algo = ACTIVEConfig(observation_scaler=scaler).create("cpu")
    algo.build_with_dataset(dataset)
    mean = algo.estimate_likelihood_target(dataset, method="fraction", fraction=1.0)
    quantiles = [algo.estimate_likelihood_target(dataset, quantile=quantile) for quantile in QUANTILES]
    return [-data.actions.shape[1] * math.log(2), mean, *quantiles]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[*NAMES, "walker2d-medium-expert"])
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    table = Table(title="Log-likelihoods of held-out actions, nats")
    for heading in ("data", "uniform", "clone, mean", *(f"{quantile:.0%}" for quantile in QUANTILES)):
        table.add_column(heading, no_wrap=True)
    for name in parser.parse_args().names:
        table.add_row(name, *(f"{target:.2f}" for target in targets_of(name)))
    Console().print(table)


if __name__ == "__main__":
    main()
