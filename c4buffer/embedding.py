"""What is clustered: an embedding [N, E] of transitions, read off the critics some rows at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, Union

import torch
from torch import Tensor

from ._checks import check_finite, fail, shape_of
from .critics import CHUNK_ROWS, PROBE_ROWS, Critics, rows_for, stacked_features, stacked_gradients
from .transitions import Transitions

Embed = Callable[[Critics, Transitions], Tensor]
Embedding = Union[Literal["gradients", "features"], Embed]

EMBEDDINGS: dict[str, Callable[..., Tensor]] = {"gradients": stacked_gradients, "features": stacked_features}


def embed_rows(
    embedding: Embedding,
    critics: Critics,
    rows: int,
    read: Callable[[int, int], Transitions],
    *,
    device: torch.device,
) -> Tensor:
    """The embeddings [rows, E] of the transitions that `read(start, stop)` gives, on `device`.

    Raises:
        ValueError: for a callable that returns something else, or values that are not finite.
    """
    if isinstance(embedding, str):
        size = rows_for(critics, read(0, min(2 * PROBE_ROWS, rows)).to(device), embedding)
        embed: Embed = functools.partial(EMBEDDINGS[embedding], chunk_size=size)
    else:
        embed, size = embedding, CHUNK_ROWS
    embeddings: Tensor | None = None
    for start in range(0, rows, size):
        part = read(start, min(start + size, rows)).to(device)
        chunk = embed(critics, part)
        _check(chunk, len(part))
        if embeddings is None:
            embeddings = chunk.new_empty(rows, chunk.shape[1])
        embeddings[start : start + len(chunk)] = chunk.detach()
    assert embeddings is not None
    return embeddings


def _check(embeddings: object, rows: int) -> None:
    expected = f"a floating tensor [N, E] with N = {rows}"
    if not isinstance(embeddings, Tensor):
        fail("embedding", expected, type(embeddings).__name__)
    if embeddings.ndim != 2 or len(embeddings) != rows or not embeddings.is_floating_point():
        fail("embedding", expected, f"{embeddings.dtype} {shape_of(embeddings)}")
    check_finite("embedding", embeddings)
