"""beta and E[log pi] from several starts: the dual descent of ACTIVE's Eq. 14 finds the same place.

    python benchmarks/temperature_starts.py             # run what is missing, append to results, draw the picture

ACTIVE-I in d3rlpy on 10,000 transitions of hopper medium-expert, H_D at 0.8 of the way to the clone's mean likelihood,
which the policy can reach and exceed; all else at the defaults but for beta's start.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import sys
from pathlib import Path
from typing import Any

from c4buffer import load_d4rl

sys.path.append(str(Path(__file__).parent / "study"))
from products import use_onednn

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "temperature_starts.jsonl"
PICTURE = ROOT / "docs" / "images" / "temperature.png"
STARTS = (0.0, 1.0, 3.0, 10.0)
EVERY = 100


def learn(start: float, updates: int) -> dict[str, Any]:
    """Train from one start; beta and the mean log-likelihood over every 100 updates."""
    with contextlib.redirect_stderr(io.StringIO()):
        import d3rlpy
    import structlog
    from c4buffer.integrations.d3rlpy import ACTIVEConfig

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    data = load_d4rl(ROOT / "data" / "hopper-medium-expert-10k.hdf5")
    names = ("observations", "actions", "rewards", "terminals", "timeouts")
    dataset = d3rlpy.dataset.MDPDataset(**{name: getattr(data, name).numpy() for name in names})
    d3rlpy.seed(0)
    algo = ACTIVEConfig(
        initial_beta=start,
        observation_scaler=d3rlpy.preprocessing.StandardObservationScaler(),
        reward_scaler=d3rlpy.preprocessing.ReturnBasedRewardScaler(multiplier=1000.0),
    ).create("cpu")
    for scaler in (algo.observation_scaler, algo.reward_scaler):
        scaler.fit_with_transition_picker(dataset.episodes, dataset.transition_picker)
    algo.build_with_dataset(dataset)
    algo.estimate_likelihood_target(dataset, fraction=0.8)
    epochs = algo.fit(
        dataset,
        n_steps=updates,
        n_steps_per_epoch=EVERY,
        show_progress=False,
        logger_adapter=d3rlpy.logging.NoopAdapterFactory(),
    )
    return {
        "start": start,
        "updates": updates,
        "target": algo.impl.modules.temperature.target,
        "beta": [metrics["temperature"] for _, metrics in epochs],
        "log_likelihood": [metrics["log_likelihood"] for _, metrics in epochs],
    }


def draw(runs: list[dict[str, Any]]) -> None:
    """Both curves of each start, and H_D."""
    from matplotlib import pyplot, rc_context

    from c4buffer.plots import RUN_COLOURS, STYLE

    with rc_context(STYLE):
        figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.9))
        for run, colour in zip(runs, RUN_COLOURS):
            updates = [EVERY * (i + 1) for i in range(len(run["beta"]))]
            for axis, name in zip(axes, ("beta", "log_likelihood")):
                axis.plot(updates, run[name], color=colour, label=f"from beta = {run['start']:g}", linewidth=1.4)
        axes[0].set(title="Cloning temperature", xlabel="updates", ylabel="beta")
        axes[0].set_yscale("symlog", linthresh=0.1)
        axes[1].axhline(runs[0]["target"], color="black", linestyle="--", linewidth=1.2, label="H_D")
        axes[1].set(title="Log-likelihood of the data's actions", xlabel="updates", ylabel="E[log pi(a | s)], nats")
        low = min(min(run["log_likelihood"][10:]) for run in runs)
        axes[1].set_ylim(bottom=max(low, runs[0]["target"] - 8))
        axes[1].legend()
        PICTURE.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(PICTURE, dpi=120)


def finished(updates: int) -> list[dict[str, Any]]:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return [run for run in map(json.loads, lines) if run["updates"] == updates]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=6_000)
    arguments = parser.parse_args()
    use_onednn()
    for start in STARTS:
        if start not in {run["start"] for run in finished(arguments.updates)}:
            run = learn(start, arguments.updates)
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a") as file:
                file.write(json.dumps(run) + "\n")
    draw(finished(arguments.updates))


if __name__ == "__main__":
    main()
