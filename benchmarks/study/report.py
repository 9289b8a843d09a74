"""Tables and figures of a grid, from its results file alone.

    python benchmarks/study/report.py first

Writes results/GRID.md, GRID_scores.png and GRID_curves.png. Differences are paired: the same dataset and seed, with the
arm and without. Intervals are 95%, from a stratified bootstrap (runs resampled within each dataset), where there are at
least three pairs of each dataset. From so few they are too narrow: `coverage.py` tells how often such an interval holds
the truth. Student's intervals, of one dataset's pairs, are wide, and hold what they promise of normal differences.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from arms import GRIDS
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from run import RESULTS, finished_runs, key_of, settings_of
from scipy.stats import bootstrap, pearsonr, rankdata, spearmanr, trim_mean, ttest_1samp

BASELINE = "plain"
FEWEST = 3  # pairs of a dataset, for an interval
COLOURS = ("#6b7280", "#e69f00", "#56b4e9", "#009e73", "#000000", "#0072b2", "#cc79a7", "#d55e00")
CURVES = {
    "scores": "score, mean of five evaluations",
    "mean_q": "mean Q",
    "td_loss": "TD loss",
    "between": "between-cluster cross-covariance",
    "correlation": "correlation",
    "gradient_norm": "gradient norm",
}
QUANTITIES = {
    "td_loss": "TD loss",
    "total": "cross-covariance",
    "within": "within",
    "between": "between",
    "correlation": "correlation",
    "gradient_norm": "gradient norm",
}
LOGARITHMIC = ("mean_q", "td_loss", "between", "gradient_norm")
LINES = ("-", "--", ":", "-.")  # one for each round of the colours


def interquartile_mean(values: np.ndarray, axis: int = -1) -> Any:
    """The mean of the middle half."""
    return trim_mean(values, 0.25, axis=axis)


def interval(strata: Sequence[np.ndarray], statistic: Any = interquartile_mean) -> tuple[float, float]:
    """A stratified bootstrap interval of a statistic of all strata together; NaN with fewer than three of any."""
    if min(map(len, strata), default=0) < FEWEST:
        return float("nan"), float("nan")

    def together(*samples: np.ndarray, axis: int = -1) -> Any:
        return statistic(np.concatenate(samples, axis=axis), axis=axis)

    found = bootstrap(
        strata, together, method="percentile", n_resamples=2000, rng=np.random.default_rng(0), vectorized=True
    ).confidence_interval
    return float(found.low), float(found.high)


def paired_differences(records: list[dict[str, Any]], arm: str, baseline: str = BASELINE) -> list[np.ndarray]:
    """Score of the arm minus the baseline's of the same seed: one array a dataset."""
    scores = {(r["dataset"], r["base"], r["seed"], r["arm"]): r["score"] for r in records}
    strata: dict[tuple[str, str], list[float]] = {}
    for (dataset, base, seed, name), score in scores.items():
        plain = scores.get((dataset, base, seed, baseline))
        if name == arm and plain is not None:
            strata.setdefault((dataset, base), []).append(score - plain)
    return [np.array(values) for values in strata.values()]


def mean_difference(records: list[dict[str, Any]], arm: str, baseline: str) -> str:
    """Of one dataset's pairs."""
    strata = paired_differences(records, arm, baseline)
    return f"{np.concatenate(strata).mean():+.1f}" if strata else "none"


def students_interval(differences: np.ndarray) -> str:
    """Of the mean difference of one dataset's pairs, 95%."""
    if len(differences) < FEWEST:
        return "too few"
    found = ttest_1samp(differences, 0).confidence_interval(0.95)
    return f"{found.low:+.0f} to {found.high:+.0f}"


def table_by_dataset(records: list[dict[str, Any]], arms: Sequence[str], baseline: str = BASELINE) -> list[str]:
    """Markdown rows: of each arm and dataset, the mean of the paired differences, its interval, and P(better)."""
    datasets = sorted({record["dataset"] for record in records})
    columns = [f"{dataset}: {what}" for dataset in datasets for what in ("difference", "95% (t)", "P(better)")]
    lines = [f"| arm, less {baseline} | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for arm in arms:
        cells = []
        for dataset in datasets:
            here = [record for record in records if record["dataset"] == dataset]
            strata = paired_differences(here, arm, baseline)
            if strata:
                pairs = np.concatenate(strata)
                better = probability_of_improvement(here, arm, baseline)
                cells += [f"{pairs.mean():+.1f} ({len(pairs)})", students_interval(pairs), f"{better:.2f}"]
            else:
                cells += ["not run", "", ""]
        if arm != baseline:
            lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


def probability_of_improvement(records: list[dict[str, Any]], arm: str, baseline: str = BASELINE) -> float:
    """That a run of the arm scores better than a run of the baseline on the same dataset, ties counting half."""
    parts = []
    for dataset in sorted({record["dataset"] for record in records}):
        here = [record for record in records if record["dataset"] == dataset]
        mine = np.array([record["score"] for record in here if record["arm"] == arm])
        plain = np.array([record["score"] for record in here if record["arm"] == baseline])
        if len(mine) and len(plain):
            difference = mine[:, None] - plain[None, :]
            parts.append(np.mean((difference > 0) + 0.5 * (difference == 0)))
    return float(np.mean(parts)) if parts else float("nan")


def of_bases(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same runs with base algorithms in the place of arms, to be compared with each other."""

    def name(record: dict[str, Any]) -> str:
        return record["base"] if record["arm"] == BASELINE else f"{record['base']}, {record['arm']}"

    return [{**record, "arm": name(record), "base": ""} for record in records]


def table(records: list[dict[str, Any]], arms: Sequence[str], baseline: str = BASELINE) -> list[str]:
    """Markdown rows: scores by dataset, and what is paired with the baseline."""
    datasets = sorted({record["dataset"] for record in records})
    lines = [
        "| arm | "
        + " | ".join(datasets)
        + f" | difference to {baseline}, mean of each | of all (IQM) | 95% | P(better) "
        "| diverged |",
        "| --- |" + " --- |" * (len(datasets) + 5),
    ]
    for arm in arms:
        mine = [record for record in records if record["arm"] == arm]
        if not mine:
            continue
        cells = []
        for dataset in datasets:
            scores = [str(round(r["score"])) for r in sorted(mine, key=lambda r: r["seed"]) if r["dataset"] == dataset]
            cells.append(" / ".join(scores) or "not run")
        strata = paired_differences(records, arm, baseline)
        if arm == baseline or not strata:
            cells += ["", "", "", ""]
        else:
            low, high = interval(strata)
            together = np.concatenate(strata)
            cells += [
                " / ".join(mean_difference([r for r in records if r["dataset"] == d], arm, baseline) for d in datasets),
                f"{interquartile_mean(together):+.1f} ({len(together)} pairs)",
                "too few" if np.isnan(low) else f"{low:+.1f} to {high:+.1f}",
                f"{probability_of_improvement(records, arm, baseline):.2f}",
            ]
        cells.append(f"{sum(record['diverged'] for record in mine)} of {len(mine)}")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


def table_of_quantities(records: list[dict[str, Any]], arms: Sequence[str]) -> list[str]:
    """Markdown rows: medians over seeds, of the second half of the evaluations and of the largest mean Q ever."""
    lines = [
        "| dataset | arm | runs | largest mean Q / largest return | " + " | ".join(QUANTITIES.values()) + " |",
        "| --- |" + " --- |" * (len(QUANTITIES) + 3),
    ]
    for dataset, arm in itertools.product(sorted({record["dataset"] for record in records}), arms):
        runs = [record for record in records if (record["dataset"], record["arm"]) == (dataset, arm)]
        if runs:
            values = [
                [largest_q(run), *(np.nanmedian(run[name][len(run[name]) // 2 :]) for name in QUANTITIES)]
                for run in runs
            ]
            cells = [f"{value:.3g}" for value in np.nanmedian(values, axis=0)]
            lines.append(f"| {dataset} | {arm} | {len(runs)} | " + " | ".join(cells) + " |")
    return lines


def table_of_evaluations(records: list[dict[str, Any]], arms: Sequence[str]) -> list[str]:
    """Markdown rows: each run's mean over the first half of its evaluations, and over the second."""
    datasets = sorted({record["dataset"] for record in records})
    columns = [f"{dataset}, {which}" for dataset in datasets for which in ("first half", "second half")]
    lines = ["| arm | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for arm in arms:
        cells = []
        for dataset in datasets:
            runs = [record for record in records if (record["dataset"], record["arm"]) == (dataset, arm)]
            runs.sort(key=lambda record: record["seed"])
            for half in (0, 1):
                parts = [np.array_split(run["scores"], 2)[half] for run in runs]
                cells.append(" / ".join(f"{np.mean(part) + 0.0:.0f}" for part in parts) or "not run")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


def early(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs scored by the mean of the first half of their evaluations."""
    return [{**record, "score": float(np.mean(np.array_split(record["scores"], 2)[0]))} for record in records]


def evaluation_noise(records: list[dict[str, Any]]) -> float:
    """Standard deviation of one evaluation of a run about its neighbours, in the second half, pooled over runs."""
    # Var(x_t+1 - x_t) = 2 sigma^2 where evaluations differ by chance alone
    steps = [np.diff(record["scores"][len(record["scores"]) // 2 :]) for record in records]
    return float(np.sqrt(np.square(np.concatenate(steps)).mean() / 2))


def table_of_values_and_scores(records: list[dict[str, Any]]) -> list[str]:
    """Markdown rows: whether runs whose Q stays low score better: over all of a dataset, between arms and within."""
    lines = [
        "| dataset | runs | rank correlation, all runs | of arm means | within arms "
        "| mean score, Q diverged | Q did not |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for dataset in sorted({record["dataset"] for record in records}):
        runs = [record for record in records if record["dataset"] == dataset]
        values = np.array([[largest_q(run), run["score"]] for run in runs])
        cells = [f"{found:+.2f}" if found is not None else "too few" for found in rank_correlations(runs, values)]
        for diverged in (True, False):
            scores = [run["score"] for run in runs if run["diverged"] is diverged]
            cells.append(f"{round(np.mean(scores))} ({len(scores)})" if scores else "none")
        lines.append(f"| {dataset} | {len(runs)} | " + " | ".join(cells) + " |")
    return lines


def rank_correlations(runs: Sequence[dict[str, Any]], values: np.ndarray) -> list[float | None]:
    """Spearman's, of two columns: over all runs, of the arms' means, and Pearson's of ranks less their arm's mean."""
    names = np.array([run["arm"] for run in runs])
    arms = np.unique(names)
    means = np.array([values[names == arm].mean(axis=0) for arm in arms])
    ranks = rankdata(values, axis=0)
    several = [ranks[names == arm] for arm in arms if np.sum(names == arm) > 1]
    within = np.concatenate([np.empty((0, 2)), *(part - part.mean(axis=0) for part in several)])
    return [
        float(spearmanr(*values.T).statistic) if len(values) > 2 else None,
        float(spearmanr(*means.T).statistic) if len(means) > 2 else None,
        float(pearsonr(*within.T).statistic) if len(within) > 2 and within.std(axis=0).all() else None,
    ]


def largest_q(record: dict[str, Any]) -> float:
    """The largest mean Q ever, over the largest discounted return in the data; infinite for a run that broke."""
    if record.get("broke"):
        return float("inf")
    return float(np.nanmax(record["mean_q"]) / record["largest_return"])


def style(i: int) -> dict[str, Any]:
    """Colour and line of the i-th arm."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i // len(COLOURS) % len(LINES)]}


def draw_scores(records: list[dict[str, Any]], arms: Sequence[str]) -> Figure:
    """Every run a point, the interquartile mean a bar, a panel a dataset."""
    datasets = sorted({record["dataset"] for record in records})
    figure = Figure(figsize=(5.5 * len(datasets), 0.45 * len(arms) + 1.6), dpi=130, layout="constrained")
    panels = figure.subplots(1, len(datasets), squeeze=False, sharey=True)[0]
    for panel, dataset in zip(panels, datasets):
        for i, arm in enumerate(arms):
            scores = np.array([r["score"] for r in records if r["arm"] == arm and r["dataset"] == dataset])
            if len(scores):
                colour = COLOURS[i % len(COLOURS)]
                panel.barh(i, interquartile_mean(scores), color=colour, alpha=0.35)
                panel.plot(scores, [i] * len(scores), "o", color=colour, markersize=5)
        panel.set(title=dataset, xlabel="normalised score, mean of the last five evaluations")
        panel.set_yticks(range(len(arms)), arms)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="x", color="#e5e7eb")
        panel.set_axisbelow(True)
    panels[0].set_ylim(len(arms) - 0.4, -0.6)  # the first at the top
    return figure


def draw_curves(records: list[dict[str, Any]], arms: Sequence[str]) -> Figure:
    """Median over seeds of what was measured in training: a column a dataset, a row a quantity."""
    datasets = sorted({record["dataset"] for record in records})
    figure = Figure(figsize=(4.4 * len(datasets), 2.6 * len(CURVES)), dpi=110, layout="constrained")
    panels = figure.subplots(len(CURVES), len(datasets), squeeze=False, sharex="col")
    for column, dataset in zip(panels.T, datasets):
        column[0].set_title(dataset)
        column[-1].set_xlabel("updates")
        for panel, (name, label) in zip(column, CURVES.items()):
            off: list[Any] = []
            for i, arm in enumerate(arms):
                runs = [record for record in records if record["arm"] == arm and record["dataset"] == dataset]
                if not runs:
                    continue
                curve = np.nanmedian([run[name] for run in runs], axis=0)
                times = np.array(runs[0]["evaluated_at"])
                if name == "scores":  # an evaluation alone is too noisy to be seen in
                    width = min(5, len(curve))
                    curve, times = np.convolve(curve, np.full(width, 1 / width), "valid"), times[width - 1 :]
                if all(run["diverged"] for run in runs):  # does not count for the limits
                    off.append((times, curve, style(i)))
                    continue
                panel.plot(times, curve, **style(i))
            panel.set_ylabel(label if dataset == datasets[0] else "")
            if name in LOGARITHMIC:
                panel.set_yscale("log")
            limits = panel.get_ylim()
            for times, curve, look in off:
                panel.plot(times, curve, **look)
            if panel.lines and len(off) < len(panel.lines) and name in LOGARITHMIC:
                panel.set_ylim(limits)
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(color="#e5e7eb")
    handles = [Line2D([], [], label=arm, **style(i)) for i, arm in enumerate(arms)]
    figure.legend(handles=handles, loc="outside lower center", ncols=2 * len(datasets), frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", choices=sorted(GRIDS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    grid = GRIDS[arguments.grid]
    wanted = {key_of(settings) for settings in settings_of(grid)}
    records = [
        record for record in finished_runs(arguments.results / f"{arguments.grid}.jsonl") if key_of(record) in wanted
    ]
    if not records:
        raise SystemExit(f"no finished run in {arguments.results / arguments.grid}.jsonl; start run.py first")
    own = len(records)
    arms = list(grid.arms)
    for other in grid.beside:
        arms = [name for name in GRIDS[other].arms if name not in arms] + arms
        known = {key_of(settings) for settings in settings_of(GRIDS[other])}
        records += [
            record
            for record in finished_runs(arguments.results / f"{other}.jsonl")
            if key_of(record) in known
            and (record["updates"], record["episodes"]) == (grid.updates, grid.episodes)
            and record["dataset"] in grid.datasets
            and record["base"] in grid.bases
        ]
    baseline = grid.baseline
    if len(grid.bases) > 1:
        records, baseline = of_bases(records), grid.bases[0]
        arms = list(dict.fromkeys([*grid.bases, *(record["arm"] for record in records)]))
    arms = [arm for arm in arms if any(record["arm"] == arm for record in records)]
    baselines = [name for name in dict.fromkeys((baseline, BASELINE)) if name in arms]
    lines = [
        f"# Study `{arguments.grid}`: {own} of {len(wanted)} runs",
        "",
        f"{grid.updates:,} updates, evaluated every {grid.evaluate_every:,} on {grid.episodes} episodes; a run's score "
        "is the mean of its last five evaluations, seeds side by side. Made by `report.py` from the results file.",
        "",
        *table(records, arms, baseline),
        "",
        "## By dataset",
        "",
        "Mean of the paired differences (pairs in brackets), Student's interval, and the probability that a run of the "
        "arm scores better.",
        "",
        *(line for name in baselines for line in [*table_by_dataset(records, arms, name), ""]),
        "## How much of a score is chance",
        "",
        "Standard deviation of one evaluation about its neighbours, in the second half of the runs, and that of the "
        "mean of five such, which is a run's score: "
        + "; ".join(
            f"{dataset} {noise:.0f} and {noise / np.sqrt(5):.0f}"
            for dataset in sorted({record["dataset"] for record in records})
            for noise in [evaluation_noise([record for record in records if record["dataset"] == dataset])]
        )
        + ". Means over more evaluations, seeds side by side:",
        "",
        *table_of_evaluations(records, arms),
        "",
        "The same differences by the first half of the evaluations, in place of the last five:",
        "",
        *(line for name in baselines for line in [*table_by_dataset(early(records), arms, name), ""]),
        "## Value, loss and cross-covariance",
        "",
        "Medians over the second half of the evaluations, and over seeds; the largest mean Q is that of the whole run.",
        "",
        *table_of_quantities(records, arms),
        "",
        "## Does a Q that stays low go with a better score?",
        "",
        "Spearman's rank correlation of a run's largest mean Q and its score: over all runs of a dataset, of the arms' "
        "means, and of ranks less their arm's mean. Runs of one arm are alike, so that no p value is given. A run has "
        "diverged if its mean Q was ever above three times the data's largest discounted return (runs in brackets).",
        "",
        *table_of_values_and_scores(records),
    ]
    (arguments.results / f"{arguments.grid}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    for name, figure in {"scores": draw_scores(records, arms), "curves": draw_curves(records, arms)}.items():
        figure.savefig(arguments.results / f"{arguments.grid}_{name}.png")


if __name__ == "__main__":
    main()
