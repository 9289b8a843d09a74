"""Where the time of a refresh goes, against what the matrix products alone take.

    python benchmarks/refresh_time.py                                   # 100,000 transitions on the processor
    python benchmarks/refresh_time.py --device cuda --rows 1000000

HalfCheetah sizes (17 observations, 6 actions), two critics of 2 x 256, K = 3, 10 EM iterations, transitions on the
device. Each stage is timed by itself, between synchronisations, as the median over turns; `refresh` is the whole call.
The floor of the gradients is the bare products of four networks, forward and back to their inputs; that of the mixture
those of 11 E-steps and M-steps.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from scaling import ACTION, OBSERVATION, K, buffer_of
from torch import Tensor

from c4buffer import ClusteredReplayBuffer, Critics, MixtureClusterer, SingleClusterSampler, stacked_gradients
from c4buffer.clustering import ranks_of_means
from c4buffer.losses.covariance import decompose_cross_covariance

STEPS = 10
WIDTH = OBSERVATION + ACTION
NETWORKS = 4  # two critics, two targets


def seconds_of(call: Callable[[], object], device: torch.device, turns: int) -> float:
    times = []
    for _ in range(turns + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])  # the first warms up


def gradients_floor(rows: int, device: torch.device) -> None:
    size = min(rows, 4096 if device.type == "cpu" else 1 << 18)
    x = torch.randn(size, WIDTH, device=device)
    hidden, outer = torch.randn(256, 256, device=device), torch.randn(WIDTH, 256, device=device)
    for _ in range(NETWORKS):
        for start in range(0, rows, size):
            part = x[: min(size, rows - start)]
            ((part @ outer) @ hidden) @ hidden.T @ outer.T


def mixture_floor(rows: int, device: torch.device) -> None:
    size = min(rows, (1 << 18) // (K * 2 * WIDTH) if device.type == "cpu" else rows)
    x = torch.randn(K, size, 2 * WIDTH, device=device)
    whiten = torch.randn(K, 2 * WIDTH, 2 * WIDTH, device=device)
    for _ in range(STEPS + 1):
        for start in range(0, rows, size):
            part = x[:, : min(size, rows - start)]
            torch.bmm(part, whiten)
            torch.bmm(part.mT, part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device, rows = torch.device(arguments.device), arguments.rows

    host, critics = buffer_of(rows)
    for module in critics.modules:
        module.to(device)
    transitions = host._storage.rows(0, rows).to(device)
    clusterer = MixtureClusterer(K, max_iterations=STEPS, tolerance=0, warm_start=False)
    buffer = ClusteredReplayBuffer.from_transitions(
        transitions, clusterer=clusterer, device=device, storage="device", seed=0
    )
    embeddings: Tensor = stacked_gradients(critics, transitions)
    r = clusterer(embeddings)
    sampler = SingleClusterSampler(generator=torch.Generator().manual_seed(0))
    sampler.extend(rows)
    ranks = ranks_of_means(embeddings, r)
    pair = embeddings.chunk(2, dim=1)

    def gradients() -> Tensor:
        return stacked_gradients(Critics(critics.critic, critics.target), transitions)

    stages: dict[str, tuple[Callable[[], object], Callable[[], object] | None]] = {
        "gradients": (gradients, lambda: gradients_floor(rows, device)),
        "mixture": (lambda: clusterer(embeddings), lambda: mixture_floor(rows, device)),
        "ranks of means": (lambda: ranks_of_means(embeddings, r), None),
        "sampler": (lambda: sampler.assign(r, distances=ranks), None),
        "decomposition": (lambda: decompose_cross_covariance(pair[0], pair[1], r), None),
        "refresh": (lambda: buffer.refresh(critics), None),
    }
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{arguments.threads} threads"
    print(f"{rows:,} transitions, torch {torch.__version__}, {where}, milliseconds")
    for name, (call, floor) in stages.items():
        taken = seconds_of(call, device, arguments.turns)
        least = "" if floor is None else f"{1e3 * seconds_of(floor, device, arguments.turns):10.1f} floor"
        print(f"{name:15} {1e3 * taken:10.1f} {least}", flush=True)


if __name__ == "__main__":
    main()
