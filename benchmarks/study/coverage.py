"""How often the report's bootstrap interval holds the truth: tables simulated from what a grid's pairs were like.

    python benchmarks/study/coverage.py first

Of each arm, the paired differences of each dataset are taken for normal, with the mean and standard deviation that they
have; so many pairs are drawn anew, and their interval is asked whether it holds the interquartile mean of both datasets
together, which a large sample tells. Beside it, the same with the datasets' means made equal.
"""

from __future__ import annotations

import argparse

import numpy as np
from report import FEWEST, RESULTS, finished_runs, interquartile_mean, interval, paired_differences

TABLES = 1500  # simulated; the share has a standard deviation of about one in a hundred
LARGE = 1_000_000  # pairs of each dataset, for the truth


def coverage(means: np.ndarray, deviations: np.ndarray, pairs: int, rng: np.random.Generator) -> float:
    """The share of intervals, each from so many pairs of each dataset, that hold the truth."""
    truth = interquartile_mean(np.concatenate([rng.normal(m, s, LARGE) for m, s in zip(means, deviations)]))
    held = 0
    for _ in range(TABLES):
        low, high = interval([rng.normal(m, s, pairs) for m, s in zip(means, deviations)])
        held += low <= truth <= high
    return held / TABLES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid")
    parser.add_argument("--arms", nargs="+", help="only these")
    parser.add_argument("--base", help="compare bases in place of arms, with this one as the baseline")
    arguments = parser.parse_args()
    records = finished_runs(RESULTS / f"{arguments.grid}.jsonl")
    if arguments.base:  # a grid that compares bases: they take the place of arms
        records = [{**record, "base": "", "arm": record["base"]} for record in records]
    baseline = arguments.base or "plain"
    names = arguments.arms or sorted({record["arm"] for record in records} - {baseline})
    rng = np.random.default_rng(0)
    print("| arm | means of the differences | standard deviations | as they are | means made equal |")
    print("| --- | --- | --- | --- | --- |")
    for arm in names:
        strata = paired_differences(records, arm, baseline)
        if len(strata) < 2 or min(map(len, strata)) < FEWEST:
            continue
        means, deviations = np.array([s.mean() for s in strata]), np.array([s.std(ddof=1) for s in strata])
        pairs = min(map(len, strata))
        shares = coverage(means, deviations, pairs, rng), coverage(0 * means, deviations, pairs, rng)
        told = " | ".join(", ".join(f"{value:.0f}" for value in values) for values in (means, deviations))
        print(f"| {arm} | {told} | {shares[0]:.2f} | {shares[1]:.2f} |")


if __name__ == "__main__":
    main()
