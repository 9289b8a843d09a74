"""What happens as the data grows: sampling to 1e8 rows, refreshing to 1e6, in time and in memory.

    python benchmarks/scaling.py                      # all of it, on one thread
    python benchmarks/scaling.py --only refresh --rows 10000 100000

`indices`: SingleClusterSampler.sample(256), microseconds of processor time a call, evenly shared clusters and lopsided
ones. `sample`: ClusteredReplayBuffer.sample(256) of HalfCheetah-sized transitions (17 observations, 6 actions).
`refresh`: two critics of 2 x 256, K = 3, 10 EM iterations; its peak memory is compared with the bytes of embeddings and
responsibilities. Each size runs in a process of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

from c4buffer import ClusteredReplayBuffer, Critics, MixtureClusterer, SingleClusterSampler, Transitions

SHARES = {"even": (0.4, 0.3, 0.3), "lopsided": (0.9, 0.06, 0.04)}
OBSERVATION, ACTION, K = 17, 6, 3
ROWS = {
    "indices": (10_000, 1_000_000, 100_000_000),
    "sample": (10_000, 100_000, 1_000_000),
    "refresh": (10_000, 31_623, 100_000, 316_228, 1_000_000),
}


def microseconds_a_call(call: object, calls: int = 640, turns: int = 9) -> float:
    """Median over turns, processor time."""
    times = []
    for _ in range(turns + 1):
        began = time.process_time()
        for _ in range(calls):
            call()  # type: ignore[operator]
        times.append((time.process_time() - began) / calls)
    return 1e6 * statistics.median(times[1:])


def measure_indices(rows: int) -> dict[str, float]:
    found = {}
    for name, shares in SHARES.items():
        sampler = SingleClusterSampler(generator=torch.Generator().manual_seed(0))
        sampler.extend(rows)
        r = torch.rand(rows, K, generator=torch.Generator().manual_seed(0))
        r *= torch.tensor(shares)
        r /= r.sum(dim=1, keepdim=True)
        sampler.assign(r)
        del r
        found[f"{name} us"] = microseconds_a_call(lambda sampler=sampler: sampler.sample(256))
    return found


def buffer_of(rows: int) -> tuple[ClusteredReplayBuffer, Critics]:
    generator = torch.Generator().manual_seed(0)
    data = Transitions(
        observations=torch.randn(rows, OBSERVATION, generator=generator),
        actions=torch.rand(rows, ACTION, generator=generator) * 2 - 1,
        rewards=torch.randn(rows, generator=generator),
        next_observations=torch.randn(rows, OBSERVATION, generator=generator),
        terminals=(torch.rand(rows, generator=generator) < 0.001).float(),
    )
    torch.manual_seed(0)

    class Q(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths = (OBSERVATION + ACTION, 256, 256)
            layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
            self.layers = nn.Sequential(*layers, nn.Linear(256, 1))

        def forward(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
            return self.layers(torch.cat([observations, actions], dim=1))

    critics = Critics([Q(), Q()], [Q(), Q()])
    clusterer = MixtureClusterer(K, max_iterations=10, tolerance=0, warm_start=False)
    return ClusteredReplayBuffer.from_transitions(data, clusterer=clusterer, seed=0), critics


def measure_sample(rows: int) -> dict[str, float]:
    buffer, _ = buffer_of(rows)
    uniform = microseconds_a_call(lambda: buffer.sample(256))
    generator = torch.Generator().manual_seed(0)
    r = torch.rand(rows, K, generator=generator)
    buffer._rows.sampler.assign(r / r.sum(dim=1, keepdim=True))
    return {"uniform us": uniform, "clustered us": microseconds_a_call(lambda: buffer.sample(256))}


def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def measure_refresh(rows: int) -> dict[str, float]:
    small, critics = buffer_of(3000)
    small.refresh(critics)  # what the first call loads and allocates is not counted
    buffer, critics = buffer_of(rows)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = resident()
    times = []
    for _ in range(1 if rows > 200_000 else 3):
        began = time.process_time()
        buffer.refresh(critics)
        times.append(time.process_time() - began)
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    embeddings, responsibilities = 4 * rows * 2 * (OBSERVATION + ACTION) / 2**20, 4 * rows * K / 2**20
    return {
        "seconds": min(times),
        "peak MB": peak - before,
        "embeddings MB": embeddings,
        "responsibilities MB": responsibilities,
    }


MEASURES = {"indices": measure_indices, "sample": measure_sample, "refresh": measure_refresh}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(MEASURES))
    parser.add_argument("--rows", type=int, nargs="+")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        print(json.dumps(MEASURES[arguments.only](arguments.rows[0])))
        return
    for name in [arguments.only] if arguments.only else MEASURES:
        found = {}
        for rows in arguments.rows or ROWS[name]:
            command = [sys.executable, __file__, "--only", name, "--rows", str(rows), "--one"]
            found[rows] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            values = "  ".join(f"{key} {value:.4g}" for key, value in found[rows].items())
            print(f"{name:8} {rows:>11,}  {values}", flush=True)
        if name == "refresh" and len(found) > 1:
            x, y = [math.log(rows) for rows in found], [math.log(record["seconds"]) for record in found.values()]
            print(f"{name:8} exponent {statistics.linear_regression(x, y).slope:.3f}")


if __name__ == "__main__":
    main()
