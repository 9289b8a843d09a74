"""A million sample calls with additions and 200 refreshes: does memory grow, do calls slow down?

    python benchmarks/soak.py                         # about ten minutes on one thread

HalfCheetah-sized transitions in a ring of 10,000 that is full from the start, two critics of 2 x 64 that train a little
between refreshes. After a tenth of the calls (by then everything that is kept has been allocated) and at the end:
anonymous resident memory and the median time of a call.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time

import torch
from torch import nn
from tqdm import trange

from c4buffer import ClusteredReplayBuffer, Critics, Every, Transitions

OBSERVATION, ACTION, CAPACITY, BATCH = 17, 6, 10_000, 256


def transitions_of(rows: int, generator: torch.Generator) -> Transitions:
    return Transitions(
        observations=torch.randn(rows, OBSERVATION, generator=generator),
        actions=torch.rand(rows, ACTION, generator=generator) * 2 - 1,
        rewards=torch.randn(rows, generator=generator),
        next_observations=torch.randn(rows, OBSERVATION, generator=generator),
        terminals=(torch.rand(rows, generator=generator) < 0.01).float(),
    )


class Q(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(OBSERVATION + ACTION, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
        )

    def forward(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = self.layers(torch.cat([observations, actions], dim=1))
        return value


def resident_bytes() -> int:
    gc.collect()
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--refreshes", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    buffer = ClusteredReplayBuffer.from_transitions(
        transitions_of(CAPACITY, generator), refresh=Every(arguments.calls // arguments.refreshes), seed=0
    )
    critics = [Q(), Q()]
    buffer.attach(Critics(critics, critics))
    optimiser = torch.optim.Adam([parameter for q in critics for parameter in q.parameters()], lr=1e-3)
    times: list[float] = []
    medians: list[float] = []
    memory: list[int] = []
    refreshes, last = 0, None
    for call in trange(1, arguments.calls + 1, mininterval=10):
        began = time.process_time()
        batch = buffer.sample(BATCH)
        times.append(time.process_time() - began)
        if buffer.last_report is not last:
            refreshes, last = refreshes + 1, buffer.last_report
        if call % 100 == 0:
            buffer.extend(transitions_of(10, generator))
        if call % 500 == 0:
            loss = sum((q(batch.observations, batch.actions) - batch.rewards).square().mean() for q in critics)
            optimiser.zero_grad()
            torch.as_tensor(loss).backward()
            optimiser.step()
        if call % (arguments.calls // 10) == 0:
            medians.append(1e6 * statistics.median(times))
            times.clear()
            memory.append(resident_bytes())
    print(f"{arguments.calls:,} calls, {refreshes} refreshes, {len(buffer):,} transitions held")
    print("after each tenth: anonymous resident MB", " ".join(f"{size / 2**20:.1f}" for size in memory))
    print("median microseconds a call", " ".join(f"{taken:.1f}" for taken in medians))
    print(f"memory at the end over that after the first tenth: {memory[-1] / memory[0]:.4f}")


if __name__ == "__main__":
    main()
