"""What is clustered: an embedding [N, E] of transitions, read off the critics some rows at a time."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal, Union

import torch
from torch import Tensor

from ._checks import check_finite, fail, shape_of
from .critics import Critics
from .inference import noise_of_its_own
from .memory import parts_of
from .stacking import CHUNK_ROWS, PROBE_ROWS, rows_for, stacked_features, stacked_gradients
from .transitions import Transitions

Embed = Callable[[Critics, Transitions], Tensor]
Embedding = Union[Literal["gradients", "features"], Embed]

WIDEST_NORMS = 1024  # columns of a covariance whose norms a refresh takes
WIDEST = 8192  # columns that are kept for all rows at once; gradients by pixels have tens of thousands

EMBEDDINGS: dict[str, Callable[..., Tensor]] = {"gradients": stacked_gradients, "features": stacked_features}


def embed_rows(
    embedding: Embedding,
    critics: Critics,
    rows: int,
    read: Callable[[int, int], Transitions],
    *,
    device: torch.device,
    max_dim: int,
) -> tuple[Tensor, bool]:
    """The embeddings [rows, E] of the transitions that `read(start, stop)` gives, on `device`; whether projected.

    Of more than 8,192 columns, and more than `max_dim`, `max_dim` are kept: of each half [g'] and [g], which stand for
    the same directions, the same Gaussian random directions. Half precision is widened to float32, in which mixtures
    can be fitted. What a policy draws comes from torch's generators seeded with 0, which stand afterwards as they stood
    before.

    Raises:
        ValueError: for a callable that returns something else, or values that are not finite.
    """
    embeddings: Tensor | None = None
    directions: Tensor | None = None
    halves = 2 if isinstance(embedding, str) else 1
    if isinstance(embedding, str):
        with noise_of_its_own(device):
            size = rows_for(critics, read(0, min(2 * PROBE_ROWS, rows)).to(device), embedding)
        embed: Embed = functools.partial(EMBEDDINGS[embedding], chunk_size=size)
    else:
        embed, size = embedding, CHUNK_ROWS
    with noise_of_its_own(device):
        for start, stop in parts_of(rows, size):
            part = read(start, stop).to(device)
            chunk = embed(critics, part)
            _check(chunk, len(part))
            if chunk.dtype in (torch.float16, torch.bfloat16):
                chunk = chunk.float()
            if chunk.shape[1] > max(WIDEST, max_dim):
                if directions is None:
                    directions = _directions(chunk.shape[1] // halves, max(1, max_dim // halves)).to(chunk)
                chunk = torch.cat([half @ directions for half in chunk.detach().chunk(halves, dim=1)], dim=1)
            if embeddings is None:
                embeddings = chunk.new_empty(rows, chunk.shape[1])
            embeddings[start:stop] = chunk.detach()
    assert embeddings is not None
    return embeddings, directions is not None


def _directions(columns: int, kept: int) -> Tensor:
    """[columns, kept], the same each time: y R keeps lengths and angles to about 1 / sqrt(kept)."""
    return torch.randn(columns, kept, generator=torch.Generator().manual_seed(0), device="cpu") / math.sqrt(kept)


def _check(embeddings: object, rows: int) -> None:
    expected = f"a floating tensor [N, E] with N = {rows}"
    if not isinstance(embeddings, Tensor):
        fail("embedding", expected, type(embeddings).__name__)
    if embeddings.ndim != 2 or len(embeddings) != rows or not embeddings.is_floating_point():
        fail("embedding", expected, f"{embeddings.dtype} {shape_of(embeddings)}")
    check_finite("embedding", embeddings)
