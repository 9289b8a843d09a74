"""The buffer against other buffers: sampling, extending, memory.

    pip install d3rlpy stable-baselines3 torchrl cpprb tianshou
    python benchmarks/peers.py                        # all of it, on one thread

Transitions of HalfCheetah's size (17 observations, 6 actions, float32). `sample` is the time of one batch as the
library gives it, microseconds, median over turns in which the libraries take turns; `uniform` is c4buffer before its
first refresh, `clustered` after one. `extend` is transitions a second, a thousand at a time into a buffer of 100,000,
over and over (`step`: one at a time). `memory` is what the buffer's process grew by, over the bytes of the data. What
is not installed is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

OBSERVATION, ACTION, EPISODE = 17, 6, 1000
BATCHES, SIZES = (256, 4096), (10_000, 1_000_000)
EXTENDED, AT_ONCE = 100_000, 1_000
Arrays = dict[str, np.ndarray]


def data_of(rows: int) -> Arrays:
    """Episodes of 1,000 transitions that end by a time limit."""
    generator = np.random.default_rng(0)
    observations = generator.standard_normal((rows + 1, OBSERVATION), dtype=np.float32)
    return {
        "observations": observations[:-1].copy(),
        "actions": generator.uniform(-1, 1, (rows, ACTION)).astype(np.float32),
        "rewards": generator.standard_normal(rows, dtype=np.float32),
        "next_observations": observations[1:].copy(),
        "terminals": np.zeros(rows, np.float32),
        "timeouts": (np.arange(1, rows + 1) % EPISODE == 0).astype(np.float32),
    }


def c4buffer_transitions(data: Arrays) -> Any:
    from c4buffer import Transitions

    return Transitions(**{name: torch.from_numpy(value) for name, value in data.items()})


def c4buffer(data: Arrays, *, clustered: bool = False) -> Callable[[int], Any]:
    from c4buffer import ClusteredReplayBuffer, Critics

    def partition(embeddings: torch.Tensor, previous: torch.Tensor | None) -> torch.Tensor:
        r = torch.rand(len(embeddings), 3, generator=torch.Generator().manual_seed(0))
        return r / r.sum(dim=1, keepdim=True)

    transitions = c4buffer_transitions(data)
    buffer = ClusteredReplayBuffer.from_transitions(
        transitions, clusterer=partition, embedding=lambda critics, rows: rows.rewards.unsqueeze(1), seed=0
    )
    if clustered:
        q = torch.nn.Bilinear(OBSERVATION, ACTION, 1)
        buffer.refresh(Critics(q, q))
    return buffer.sample


def d3rlpy(data: Arrays) -> Callable[[int], Any]:
    from d3rlpy.dataset import MDPDataset

    rewards = data["rewards"].reshape(-1, 1)
    dataset = MDPDataset(data["observations"], data["actions"], rewards, data["terminals"], data["timeouts"])
    return dataset.sample_transition_batch


def stable_baselines3(data: Arrays) -> Callable[[int], Any]:
    from gymnasium.spaces import Box
    from stable_baselines3.common.buffers import ReplayBuffer

    spaces = [Box(-np.inf, np.inf, (n,), np.float32) for n in (OBSERVATION, ACTION)]
    buffer = ReplayBuffer(len(data["rewards"]), *spaces, device="cpu")
    buffer.observations[:, 0], buffer.next_observations[:, 0] = data["observations"], data["next_observations"]
    buffer.actions[:, 0], buffer.rewards[:, 0] = data["actions"], data["rewards"]
    buffer.dones[:, 0], buffer.timeouts[:, 0] = data["timeouts"], data["timeouts"]
    buffer.full = True
    return buffer.sample


def torchrl_buffer(rows: int) -> Any:
    from torchrl.data import LazyTensorStorage, ReplayBuffer
    from torchrl.data.replay_buffers.samplers import RandomSampler

    return ReplayBuffer(storage=LazyTensorStorage(rows), sampler=RandomSampler(), batch_size=256)


def torchrl_rows(data: Arrays) -> Any:
    from tensordict import TensorDict

    return TensorDict({name: torch.from_numpy(value) for name, value in data.items()}, [len(data["rewards"])])


def torchrl(data: Arrays) -> Callable[[int], Any]:
    buffer = torchrl_buffer(len(data["rewards"]))
    buffer.extend(torchrl_rows(data))
    return buffer.sample


def cpprb_buffer(rows: int) -> Any:
    from cpprb import ReplayBuffer

    shapes = {"observations": OBSERVATION, "actions": ACTION, "next_observations": OBSERVATION}
    fields = {name: {"shape": n} for name, n in shapes.items()}
    return ReplayBuffer(rows, {**fields, **{name: {} for name in ("rewards", "terminals", "timeouts")}})


def cpprb(data: Arrays) -> Callable[[int], Any]:
    buffer = cpprb_buffer(len(data["rewards"]))
    buffer.add(**data)
    return buffer.sample


def tianshou(data: Arrays) -> Callable[[int], Any]:
    from tianshou.data import ReplayBuffer

    ends, truncated = data["terminals"].astype(bool), data["timeouts"].astype(bool)
    buffer = ReplayBuffer.from_data(
        data["observations"],
        data["actions"],
        data["rewards"],
        ends,
        truncated,
        ends | truncated,
        data["next_observations"],
    )
    return buffer.sample


SAMPLERS: dict[str, Callable[[Arrays], Callable[[int], Any]]] = {
    "uniform": c4buffer,
    "clustered": lambda data: c4buffer(data, clustered=True),
    "d3rlpy": d3rlpy,
    "stable-baselines3": stable_baselines3,
    "torchrl": torchrl,
    "cpprb": cpprb,
    "tianshou": tianshou,
}


def installed() -> list[str]:
    found = []
    for name in SAMPLERS:
        try:
            version("c4buffer" if name in ("uniform", "clustered") else name)
            found.append(name)
        except PackageNotFoundError:
            print(f"{name} is not installed", file=sys.stderr)
    return found


def time_of(call: Callable[[], Any], calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - began) / calls


def compare_sampling(rows: int, turns: int) -> None:
    data = data_of(rows)
    samplers = {name: SAMPLERS[name](data) for name in installed()}
    for batch_size in BATCHES:
        times: dict[str, list[float]] = {name: [] for name in samplers}
        for turn in range(turns + 1):
            for name, sample in samplers.items():
                seconds = time_of(partial(sample, batch_size), 5 if name == "d3rlpy" else 200)
                if turn > 0:
                    times[name].append(seconds)
        clustered = times["clustered"]
        for name, taken in times.items():
            ratio = statistics.median(theirs / ours for theirs, ours in zip(taken, clustered))
            print(f"{rows:9,} {batch_size:6} {name:18} {1e6 * statistics.median(taken):10.1f} {ratio:8.2f}", flush=True)


def compare_extending(turns: int) -> None:
    from c4buffer import ClusteredReplayBuffer

    data = data_of(AT_ONCE)
    rows = c4buffer_transitions(data)
    single = {name: value[0] for name, value in data.items()}
    ours, ours_by_step = ClusteredReplayBuffer(EXTENDED, seed=0), ClusteredReplayBuffer(EXTENDED, seed=0)
    calls: dict[tuple[str, str], Callable[[], Any]] = {
        ("extend", "c4buffer"): lambda: ours.extend(rows),
        ("step", "c4buffer"): lambda: ours_by_step.add(**single),
    }
    names = installed()
    if "torchrl" in names:
        theirs, theirs_by_step = torchrl_buffer(EXTENDED), torchrl_buffer(EXTENDED)
        tensordict = torchrl_rows(data)
        step = tensordict[0]
        calls["extend", "torchrl"] = lambda: theirs.extend(tensordict)
        calls["step", "torchrl"] = lambda: theirs_by_step.add(step)
    if "cpprb" in names:
        ring, ring_by_step = cpprb_buffer(EXTENDED), cpprb_buffer(EXTENDED)
        calls["extend", "cpprb"] = lambda: ring.add(**data)
        calls["step", "cpprb"] = lambda: ring_by_step.add(**single)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for turn in range(turns + 1):
        for key, call in calls.items():
            seconds = time_of(call, 200)
            if turn > 0:
                times[key].append(seconds)
    for (what, name), taken in times.items():
        rate = (AT_ONCE if what == "extend" else 1) / statistics.median(taken)
        print(f"{what:16} {name:18} {rate:12,.0f} transitions a second", flush=True)


def resident_bytes() -> int:
    """Anonymous memory of this process, once the allocator has given back what is free."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


def measure_memory(rows: int) -> dict[str, float]:
    """In a process of its own: filled in parts, clustered once, sampled from."""
    from c4buffer import ClusteredReplayBuffer, Critics

    part = c4buffer_transitions(data_of(AT_ONCE))
    raw = sum(value.numel() * value.element_size() for _, value in part.columns()) / AT_ONCE
    q = torch.nn.Bilinear(OBSERVATION, ACTION, 1)

    def partition(embeddings: torch.Tensor, previous: torch.Tensor | None) -> torch.Tensor:
        return torch.full((len(embeddings), 3), 1 / 3)

    def filled(capacity: int) -> Any:
        buffer = ClusteredReplayBuffer(
            capacity, clusterer=partition, embedding=lambda critics, rows: rows.rewards.unsqueeze(1), seed=0
        )
        for _ in range(capacity // AT_ONCE):
            buffer.extend(part)
        buffer.refresh(Critics(q, q))
        buffer.sample(256)
        return buffer

    filled(10_000)
    before = resident_bytes()
    buffer = filled(rows)
    grown = resident_bytes() - before
    return {"raw": raw, "grown": grown / len(buffer), "ratio": grown / len(buffer) / raw}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--only", choices=("sample", "extend", "memory"))
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(json.dumps(measure_memory(arguments.memory_of)))
        return
    names = [name for name in installed() if name not in ("uniform", "clustered")]
    print(", ".join(f"{name} {version(name)}" for name in ("torch", "c4buffer", *names)))
    if arguments.only in (None, "sample"):
        print(f"{'rows':>9} {'batch':>6} {'library':18} {'us':>10} {'/clustered':>8}")
        for rows in SIZES:
            compare_sampling(rows, arguments.turns)
    if arguments.only in (None, "extend"):
        compare_extending(arguments.turns)
    if arguments.only in (None, "memory"):
        command = [sys.executable, __file__, "--memory-of", str(SIZES[-1])]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(f"memory: {found['raw']:.0f} bytes of data a transition, {found['grown']:.1f} held: {found['ratio']:.3f}")


if __name__ == "__main__":
    main()
