"""How many rows to take at once: what fits the cache of a processor, or a share of a GPU's free memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SHARE = 8  # of the free memory, one part in so many is used at once
UNKNOWN = 1 << 31  # bytes whose share is used where the system does not tell
GPU_ROWS = 1 << 18  # enough to keep a GPU busy
GPU_FLOATS = 1 << 27
MEMINFO = "/proc/meminfo"


def free_bytes(device: torch.device) -> int | None:
    """Memory that could be allocated on `device` now; None where the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open(MEMINFO) as lines:  # Linux: with what its file cache would give back
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def rows_at_once(bytes_per_row: int, device: torch.device, *, cached: int) -> int:
    """Rows of a pass that makes `bytes_per_row`: what a share of the free memory holds.

    Args:
        bytes_per_row: at least 1.
        device: where the pass runs.
        cached: the most rows on a processor, where more than the cache holds is slower.
    """
    most = cached if device.type == "cpu" else GPU_ROWS
    return min(most, _share_of(device, bytes_per_row))


def parts_of(rows: int, size: int) -> Iterator[tuple[int, int]]:
    """Where passes over so many rows start and stop; the last takes in a single row that is left.

    Of one row a critic's `squeeze` leaves no axis.
    """
    most, start = size + (size > 1), 0
    while start < rows:
        stop = rows if rows - start <= most else start + size
        yield start, stop
        start = stop


def floats_at_once(device: torch.device, *, cached: int) -> int:
    """Floats of a pass over a matrix: `cached` on a processor, a share of the free memory on a GPU."""
    if device.type == "cpu":
        return cached
    return max(cached, min(GPU_FLOATS, _share_of(device, 4)))


def _share_of(device: torch.device, size: int) -> int:
    """How many things of so many bytes, at least one: a power of two.

    A little more or less free memory makes the same chunks then, with the same rounding and the same noise of a policy.
    """
    free = free_bytes(device)
    fitting = max(1, (UNKNOWN if free is None else free) // SHARE // size)
    return 1 << (fitting.bit_length() - 1)


def bytes_made(run: Callable[[], object]) -> int:
    """Of all tensors that are computed while `run` runs; more than is ever held at once."""
    making = _Making()
    with making:
        run()
    return making.total


class _Making(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total: int = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(value, Tensor):
                self.total += value.numel() * value.element_size()
        return result
