"""How often to refresh, and with how many clusters: what a clustering is still worth some updates later.

    python benchmarks/staleness.py              # train, measure and draw: some ten minutes
    python benchmarks/staleness.py --draw       # only draw, from benchmarks/results/staleness.json

TD3+BC by d3rlpy, plain and with C4's default penalty, trains on 10,000 transitions of hopper medium-expert. At several
points T of the training the transitions are clustered; their responsibilities are then kept, as a buffer keeps them,
and set against the gradients that the critics have n updates later:

- removed: 1 - ||E[C_Z]|| / ||C||, the part of the cross-covariance that single-cluster batches do not carry
  (Theorem 2), with the clustering of n updates before, and with one made now;
- drift: how much less likely the gradients are under the old mixture than they were when it was fitted (what OnDrift
  looks at), in nats per transition;
- seconds of a refresh: the gradients and the mixture.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from c4buffer import MixtureClusterer, decompose_cross_covariance, load_d4rl, stacked_gradients

ROOT = Path(__file__).parent
DATA = ROOT.parent / "data" / "hopper-medium-expert-10k.hdf5"
RESULTS = ROOT / "results" / "staleness.json"
PICTURE = ROOT.parent / "docs" / "images" / "staleness.png"
POINTS = (1_000, 2_000, 4_000, 8_000, 12_000, 16_000)
LAGS = (0, 50, 100, 200, 500, 1_000, 2_000, 4_000)
CLUSTERS = (2, 3, 5, 8)
ARMS = ("plain", "C4")


def prepared(arm: str, seed: int) -> tuple[Any, Any, dict[str, Any]]:
    """The dataset, TD3+BC of an arm, and the options of a quiet fit."""
    with contextlib.redirect_stderr(io.StringIO()):
        import d3rlpy
    import structlog
    from c4buffer.integrations.d3rlpy import C4Config

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    data = load_d4rl(DATA)
    names = ("observations", "actions", "rewards", "terminals", "timeouts")
    dataset = d3rlpy.dataset.MDPDataset(**{name: getattr(data, name).numpy() for name in names})
    d3rlpy.seed(seed)
    scaler = d3rlpy.preprocessing.StandardObservationScaler()
    config: Any = d3rlpy.algos.TD3PlusBCConfig(observation_scaler=scaler)
    algo = (config if arm == "plain" else C4Config(base=config, seed=seed)).create("cpu")
    return dataset, algo, {"show_progress": False, "logger_adapter": d3rlpy.logging.NoopAdapterFactory()}


def snapshots(arm: str, seed: int) -> tuple[dict[int, Tensor], float, float]:
    """Stacked gradients [N, 2D] by update, seconds of taking them once, and seconds of an update."""
    from c4buffer.integrations.d3rlpy import critics_of, transitions_of

    dataset, algo, options = prepared(arm, seed)
    wanted = {point + lag for point in POINTS for lag in LAGS}
    taken: dict[int, Tensor] = {}
    reading, training, began = [], 0.0, time.process_time()
    for epoch, _ in algo.fitter(dataset, n_steps=max(wanted), n_steps_per_epoch=50, **options):
        training += time.process_time() - began
        if 50 * epoch in wanted:
            transitions = transitions_of(dataset, algo)
            began = time.process_time()
            taken[50 * epoch] = stacked_gradients(critics_of(algo), transitions)
            reading.append(time.process_time() - began)
        began = time.process_time()
    return taken, statistics.median(reading), training / max(wanted)


def removed(gradients: Tensor, responsibilities: Tensor) -> float:
    """1 - ||E[C_Z]||_F / ||C||_F."""
    target_g, g = gradients.double().chunk(2, dim=1)
    total, within, _ = decompose_cross_covariance(target_g, g, responsibilities.double())
    return 1 - float(torch.linalg.matrix_norm(within) / torch.linalg.matrix_norm(total))


def measure(seed: int) -> dict[str, Any]:
    records, updates, gradients_seconds = [], {}, {}
    for arm in ARMS:
        taken, gradients_seconds[arm], updates[arm] = snapshots(arm, seed)
        for clusters in CLUSTERS:
            now: dict[int, float] = {}
            for point in POINTS:
                clusterer = MixtureClusterer(clusters, warm_start=False)
                began = time.process_time()
                r = clusterer(taken[point])
                seconds = time.process_time() - began
                mixture = clusterer.mixture
                assert mixture is not None
                for lag in LAGS:
                    step = point + lag
                    if step not in now:
                        now[step] = removed(taken[step], MixtureClusterer(clusters, warm_start=False)(taken[step]))
                    records.append(
                        {
                            "arm": arm,
                            "clusters": clusters,
                            "point": point,
                            "lag": lag,
                            "removed": removed(taken[step], r),
                            "removed_now": now[step],
                            "drift": mixture.log_likelihood - mixture.log_likelihood_of(taken[step]),
                            "mixture_seconds": seconds,
                        }
                    )
    return {"seed": seed, "update_seconds": updates, "gradients_seconds": gradients_seconds, "records": records}


def mean_of(found: dict[str, Any], name: str, **where: Any) -> float:
    chosen = [r[name] for r in found["records"] if all(r[key] == value for key, value in where.items())]
    return statistics.fmean(chosen)


def table(found: dict[str, Any]) -> str:
    lines = []
    for arm in ARMS:
        update, gradients = found["update_seconds"][arm], found["gradients_seconds"][arm]
        lines.append(f"{arm}: {1e3 * update:.1f} ms an update; the gradients of a refresh {gradients:.2f} s")
        lines.append("| K | mixture, s | removed at once | " + " | ".join(f"after {lag:,}" for lag in LAGS[1:]) + " |")
        lines.append("| --- | --- | --- |" + " --- |" * len(LAGS[1:]))
        for clusters in CLUSTERS:
            seconds = mean_of(found, "mixture_seconds", arm=arm, clusters=clusters, lag=0)
            values = [mean_of(found, "removed", arm=arm, clusters=clusters, lag=lag) for lag in LAGS]
            lines.append(
                f"| {clusters} | {seconds:.2f} | " + " | ".join(f"{100 * value:.0f}%" for value in values) + " |"
            )
        drift = [mean_of(found, "drift", arm=arm, clusters=3, lag=lag) for lag in LAGS]
        lines.append("| drift, K = 3 | | " + " | ".join(f"{value:.1f}" for value in drift) + " |")
    return "\n".join(lines)


def draw(found: dict[str, Any]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.6), constrained_layout=True)
    colours = dict(zip(CLUSTERS, ("#9ecae1", "#4292c6", "#08519c", "#041f4a")))
    for axis, arm in zip(axes, ARMS):
        for clusters in CLUSTERS:
            values = [100 * mean_of(found, "removed", arm=arm, clusters=clusters, lag=lag) for lag in LAGS]
            axis.plot(LAGS, values, marker="o", ms=3, color=colours[clusters], label=f"K = {clusters}")
        axis.set_title(f"critics of TD3+BC, {arm}")
        axis.set_ylabel("cross-covariance removed, %")
        axis.set_ylim(0, 100)
        axis.set_xscale("symlog", linthresh=50, linscale=0.5)
        axis.set_xlim(-10, 5000)
        axis.set_xticks([0, 50, 200, 1000, 4000], ["0", "50", "200", "1,000", "4,000"])
        axis.set_xlabel("updates since the refresh")
    axes[0].legend(frameon=False, ncols=2, loc="lower left")
    intervals = [lag for lag in LAGS if lag]
    for clusters in CLUSTERS:
        cost = found["gradients_seconds"]["plain"] + mean_of(
            found, "mixture_seconds", arm="plain", clusters=clusters, lag=0
        )
        share = [100 * cost / (interval * found["update_seconds"]["plain"]) for interval in intervals]
        axes[2].loglog(intervals, share, marker="o", ms=3, color=colours[clusters])
    axes[2].set_title("what it costs to refresh so often")
    axes[2].set_ylabel("% of training time")
    axes[2].set_yticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"])
    axes[2].set_xticks([50, 200, 1000, 4000], ["50", "200", "1,000", "4,000"])
    axes[2].set_xlabel("updates between refreshes")
    for axis in axes:
        axis.minorticks_off()
        axis.grid(color="#e5e7eb")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draw", action="store_true", help="from what was measured before")
    arguments = parser.parse_args()
    if not arguments.draw:
        torch.set_num_threads(1)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(measure(arguments.seed)))
    found = json.loads(RESULTS.read_text())
    print(table(found))
    draw(found)


if __name__ == "__main__":
    main()
