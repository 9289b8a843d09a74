"""Batches drawn before they are asked for, copied to a GPU while it computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch

from .observations import observation_leaves
from .transitions import Transitions


def drawn_ahead(
    batches: Iterator[Callable[[], Transitions]], count: int, device: torch.device
) -> Iterator[Transitions]:
    """What the functions in `batches` return, each called `count` results before its own is handed out.

    On a CUDA device they run on a stream of their own, after what the caller's stream was given up to then.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    waiting: deque[tuple[Transitions, Any]] = deque()

    def call(draw: Callable[[], Transitions]) -> None:
        if stream is None:
            waiting.append((draw(), None))
            return
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            batch = draw()
            waiting.append((batch, stream.record_event()))

    def hand_out() -> Transitions:
        batch, ready = waiting.popleft()
        if ready is not None:
            current = torch.cuda.current_stream(device)
            current.wait_event(ready)
            leaves = [leaf for _, value in batch.columns() for leaf in observation_leaves(value)]
            for leaf in leaves if batch.indices is None else [*leaves, batch.indices]:
                leaf.record_stream(current)  # its memory is not given away while this stream reads it
        return batch

    failed: Exception | None = None
    try:
        for draw in islice(batches, count):
            call(draw)
        for draw in batches:
            call(draw)
            yield hand_out()
    except Exception as error:
        failed = error  # told when what was drawn before it has been handed out
    while waiting:
        yield hand_out()
    if failed is not None:
        raise failed
