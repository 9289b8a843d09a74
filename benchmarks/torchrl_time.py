"""What single-cluster batches cost inside TorchRL: its RandomSampler against ClusterSampler, in the same replay buffer.

    python benchmarks/torchrl_time.py       # on one thread, a minute

Transitions of HalfCheetah's size under TorchRL's own keys, in a LazyTensorStorage; microseconds of one batch, median
over turns in which the samplers take turns; three soft clusters, which are not made again meanwhile. "before" is
ClusterSampler before it knows critics.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from typing import Any

import torch
from peers import ACTION, BATCHES, OBSERVATION, SIZES, c4buffer_transitions, data_of, time_of

CALLS = 200


def buffer_of(data: Any, sampler: Any) -> Any:
    from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(len(data)), sampler=sampler)
    buffer.extend(data)
    return buffer


def soft_clusters(embeddings: torch.Tensor, previous: torch.Tensor | None) -> torch.Tensor:
    r = torch.rand(len(embeddings), 3, generator=torch.Generator().manual_seed(0))
    return r / r.sum(dim=1, keepdim=True)


def main() -> None:
    from c4buffer.integrations.torchrl import ClusterSampler, tensordict_of
    from torchrl.data.replay_buffers.samplers import RandomSampler

    from c4buffer import Critics, Every

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    q = torch.nn.Bilinear(OBSERVATION, ACTION, 1)
    print(f"{'rows':>9} {'batch':>6} {'random':>8} {'before':>8} {'clustered':>9}")
    for rows in SIZES:
        data = tensordict_of(c4buffer_transitions(data_of(rows)))
        sampler = ClusterSampler(
            clusterer=soft_clusters,
            embedding=lambda critics, rows: rows.rewards.unsqueeze(1),
            refresh=Every(10**9),
            seed=0,
        )
        sampler.attach(Critics(q, q))
        samplers = {"random": RandomSampler(), "before": ClusterSampler(seed=0), "clustered": sampler}
        buffers = {name: buffer_of(data, each) for name, each in samplers.items()}
        for batch_size in BATCHES:
            times: dict[str, list[float]] = {name: [] for name in buffers}
            for turn in range(arguments.turns + 1):
                for name, buffer in buffers.items():
                    seconds = time_of(partial(buffer.sample, batch_size), CALLS)
                    if turn > 0:
                        times[name].append(seconds)
            shown = " ".join(f"{1e6 * statistics.median(taken):8.0f}" for taken in times.values())
            print(f"{rows:9,} {batch_size:6} {shown}", flush=True)


if __name__ == "__main__":
    main()
