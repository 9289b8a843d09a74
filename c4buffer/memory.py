"""How many rows to take at once: what fits the cache of a processor, or a share of a GPU's free memory."""

from __future__ import annotations

import os

import torch

SHARE = 8  # of the free memory, one part in so many is used at once
UNKNOWN = 1 << 31  # bytes taken as free where the system does not tell
WHOLE_DEVICE = 1 << 27  # floats at once on a GPU: enough to keep it busy


def free_bytes(device: torch.device) -> int:
    """Memory that could be allocated on `device` now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return UNKNOWN


def rows_at_once(bytes_per_row: int, device: torch.device, *, cached: int, fewest: int = 1) -> int:
    """Rows of a pass that needs `bytes_per_row` of memory.

    Args:
        bytes_per_row: at least 1.
        device: where the pass runs.
        cached: the most rows on a processor, where more than the cache holds is slower.
        fewest: rows taken even where memory is short.
    """
    most = cached if device.type == "cpu" else max(cached, 4 * WHOLE_DEVICE // bytes_per_row)
    return max(fewest, min(most, free_bytes(device) // SHARE // bytes_per_row))
