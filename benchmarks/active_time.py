"""What ACTIVE costs in time: its `fit` and its updates over those of d3rlpy's IQL, and its V-ensemble in two ways.

    python benchmarks/active_time.py
    python benchmarks/active_time.py --threads 1 --device cuda

All take turns in one process; a ratio is taken within each turn and the median over turns is what counts. Batches of
256, hopper's dimensions, networks of d3rlpy's defaults (2 x 256). A `fit` also draws its batches, from 10,000
transitions: d3rlpy's own one transition at a time, ACTIVE's from the dataset's columns.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from c4buffer import VEnsemble, expectile_value_loss, load_d4rl
from c4buffer.losses import value_ensemble

DATA = Path(__file__).parent.parent / "data" / "hopper-medium-expert-10k.hdf5"
OBSERVATIONS, ACTIONS, BATCH = 11, 3, 256


def fits(device: str) -> dict[str, Callable[[], None]]:
    """One update within a `fit`, drawing its batch included."""
    d3rlpy, ACTIVEConfig = hosts()
    data = load_d4rl(DATA)
    names = ("observations", "actions", "rewards", "terminals", "timeouts")
    dataset = d3rlpy.dataset.MDPDataset(**{name: getattr(data, name).numpy() for name in names})

    def updating(config: Any) -> Callable[[], None]:
        fitter = config.create(f"{device}:0").fitter(
            dataset,
            n_steps=10**9,
            n_steps_per_epoch=1,
            show_progress=False,
            logger_adapter=d3rlpy.logging.NoopAdapterFactory(),
        )
        return lambda: next(fitter)  # type: ignore[return-value]

    return {
        "IQL": updating(d3rlpy.algos.IQLConfig()),
        "ACTIVE-I, m = 4": updating(ACTIVEConfig(likelihood_target=-1.0)),
        "ACTIVE-S, m = 4": updating(ACTIVEConfig(likelihood_target=-1.0, value_loss="sparse")),
    }


def hosts() -> tuple[Any, Any]:
    """d3rlpy, without its greeting and its log lines, and ACTIVEConfig."""
    with contextlib.redirect_stderr(io.StringIO()):
        import d3rlpy
    import structlog
    from c4buffer.integrations.d3rlpy import ACTIVEConfig

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    return d3rlpy, ACTIVEConfig


def algorithms(device: str) -> dict[str, Callable[[], None]]:
    """One update of each."""
    d3rlpy, ACTIVEConfig = hosts()
    batch = d3rlpy.torch_utility.TorchMiniBatch(
        observations=torch.randn(BATCH, OBSERVATIONS, device=device),
        actions=torch.rand(BATCH, ACTIONS, device=device) * 2 - 1,
        rewards=torch.randn(BATCH, 1, device=device),
        next_observations=torch.randn(BATCH, OBSERVATIONS, device=device),
        next_actions=torch.rand(BATCH, ACTIONS, device=device),
        returns_to_go=torch.zeros(BATCH, 1, device=device),
        terminals=torch.zeros(BATCH, 1, device=device),
        intervals=torch.ones(BATCH, 1, device=device),
        device=f"{device}:0",
    )
    configs = {
        "IQL": d3rlpy.algos.IQLConfig(),
        "ACTIVE-I, m = 1": ACTIVEConfig(n_members=1, likelihood_target=-1.0),
        "ACTIVE-I, m = 4": ACTIVEConfig(n_members=4, likelihood_target=-1.0),
        "ACTIVE-S, m = 4": ACTIVEConfig(n_members=4, likelihood_target=-1.0, value_loss="sparse"),
        "ACTIVE-I, m = 10": ACTIVEConfig(n_members=10, likelihood_target=-1.0),
    }

    def updating(config: Any) -> Callable[[], None]:
        algo = config.create(f"{device}:0")
        algo.create_impl((OBSERVATIONS,), ACTIONS)
        steps = iter(range(10**9))
        return lambda: algo.impl.update(batch, next(steps))

    return {name: updating(config) for name, config in configs.items()}


def ensembles(device: str, members: int, width: int) -> dict[str, Callable[[], None]]:
    """One step of the V-ensemble's training, by both of its ways."""
    observations, q = torch.randn(BATCH, OBSERVATIONS, device=device), torch.randn(BATCH, device=device)

    def stepping(forward: Callable[[VEnsemble], torch.Tensor]) -> Callable[[], None]:
        ensemble = VEnsemble(OBSERVATIONS, n_members=members, hidden=(width, width)).to(device)
        optimizer = torch.optim.Adam(ensemble.parameters())

        def step() -> None:
            optimizer.zero_grad()
            expectile_value_loss(q, forward(ensemble), tau=0.9).backward()
            optimizer.step()

        return step

    def together(ensemble: VEnsemble) -> torch.Tensor:
        kinds = (ensemble.weights, ensemble.biases, ensemble.scales, ensemble.shifts)
        expanded = observations.expand(members, *observations.shape)
        return value_ensemble._perceptron(expanded, *map(list, kinds))

    return {"as it is": stepping(lambda ensemble: ensemble(observations)), "all members at once": stepping(together)}


def timed(calls: dict[str, Callable[[], None]], turns: int, repeats: int, device: str) -> list[dict[str, float]]:
    """Milliseconds of one call, by turn."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    for call in calls.values():
        for _ in range(repeats):
            call()
    measured = []
    for _ in range(turns):
        measured.append({})
        for name, call in calls.items():
            wait()
            started = time.perf_counter()
            for _ in range(repeats):
                call()
            wait()
            measured[-1][name] = 1000 * (time.perf_counter() - started) / repeats
    return measured


def shown(title: str, measured: list[dict[str, float]]) -> Table:
    """A row for each, as ratios to the first."""
    table = Table(title=title)
    for heading in ("", "ms", "ratio", "least to most"):
        table.add_column(heading, justify="right" if heading else "left")
    first = next(iter(measured[0]))
    for name in measured[0]:
        ratios = sorted(turn[name] / turn[first] for turn in measured)
        table.add_row(
            name,
            f"{statistics.median(turn[name] for turn in measured):.2f}",
            f"{statistics.median(ratios):.2f}",
            f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=None, help="torch's threads; left as they are by default")
    parser.add_argument("--turns", type=int, default=15)
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    console = Console()
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {arguments.device}")
    measured = timed(fits(arguments.device), arguments.turns, 20, arguments.device)
    console.print(shown("one update of a fit", measured))
    measured = timed(algorithms(arguments.device), arguments.turns, 20, arguments.device)
    console.print(shown("one update", measured))
    for members, width in ((4, 256), (10, 256), (10, 64)):
        measured = timed(ensembles(arguments.device, members, width), arguments.turns, 20, arguments.device)
        console.print(shown(f"one step of V alone, m = {members}, 2 x {width}", measured))


if __name__ == "__main__":
    main()
