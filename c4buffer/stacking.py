"""What is clustered of critics: pairs of gradients or of features, transitions -> [N, 2D], some rows at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._checks import check_finite, check_integer, fail
from .critics import Critics, check_critics, member_features
from .gradients import mean_gradient
from .inference import eagerly, outside_inference_mode
from .memory import bytes_made, parts_of, rows_at_once
from .transitions import Transitions

CHUNK_ROWS = 4096  # rows whose gradients are taken at once: the activations of a 256-wide layer fit the cache
FEW_ROWS = 512  # a batch that is taken whole
PROBE_ROWS = 8


@outside_inference_mode
def stacked_gradients(critics: Critics, batch: Transitions, *, chunk_size: int | None = None) -> Tensor:
    """The pairs of input gradients that C4 clusters: y = [g', g], [N, 2D].

    g = grad_x Q(x) at x = (s, a) flattened; g' = (1 - d) grad_x' Q_target(x') at x' = (s', a'). For an ensemble Q is
    the members' mean. With discrete actions x = s. No graph is kept; modes, parameter gradients and statistics of the
    networks stay as they are.

    Args:
        critics: the critic and its target.
        batch: N transitions, on the critics' device.
        chunk_size: rows that are differentiated at once. None: as many as an eighth of the free memory holds, up to
            4,096 on a processor.

    Raises:
        ValueError: if a critic returns another shape than `Critics` names, or a value or gradient is not finite.
    """
    return _in_chunks(_stacked_gradients_of_chunk, critics, batch, chunk_size, "gradients")


@outside_inference_mode
def stacked_features(critics: Critics, batch: Transitions, *, chunk_size: int | None = None) -> Tensor:
    """The pairs of last hidden layers, y = [f', f], [N, 2F]: what C4's published code clusters by default.

    f = features of the critic at (s, a), f' = features of the target at (s', a'). The features of an ensemble's members
    stand side by side, so that F is their sum.

    Raises:
        ValueError: if there are no features to read, or they are not [B, F] and finite.
    """
    return _in_chunks(_stacked_features_of_chunk, critics, batch, chunk_size, "features")


def rows_for(critics: Critics, batch: Transitions, embedding: str = "gradients") -> int:
    """How many rows like these to embed at once: by what the networks make of a few of them, and by the free memory."""
    read = _stacked_gradients_of_chunk if embedding == "gradients" else _stacked_features_of_chunk
    if len(batch) < 2 * PROBE_ROWS:
        return CHUNK_ROWS
    with critics.evaluating(), eagerly():
        try:
            few = bytes_made(lambda: read(critics, batch[:PROBE_ROWS]))
            twice = bytes_made(lambda: read(critics, batch[: 2 * PROBE_ROWS]))
        except Exception:  # whatever is wrong is said by the pass itself, of all the rows
            return CHUNK_ROWS
    per_row = max(1, (twice - few) // PROBE_ROWS)
    return rows_at_once(per_row, batch.rewards.device, cached=CHUNK_ROWS)


def _in_chunks(
    read: Callable[[Critics, Transitions], Tensor],
    critics: Critics,
    batch: Transitions,
    chunk_size: int | None,
    embedding: str,
) -> Tensor:
    check_critics(critics)
    if len(batch) == 0:
        fail("batch", "at least one transition", "none")
    if chunk_size is None:
        chunk_size = len(batch) if len(batch) <= FEW_ROWS else rows_for(critics, batch, embedding)
    check_integer("chunk_size", chunk_size, minimum=1)
    if len(batch) <= chunk_size:
        with critics.evaluating():
            return read(critics, batch)
    stacked: Tensor | None = None
    with critics.evaluating():
        for start, stop in parts_of(len(batch), chunk_size):
            part = read(critics, batch[start:stop])
            if stacked is None:
                stacked = part.new_empty(len(batch), part.shape[1])
            stacked[start:stop] = part
    assert stacked is not None
    return stacked


def _stacked_gradients_of_chunk(critics: Critics, batch: Transitions) -> Tensor:
    g = mean_gradient(critics.critic, *critics.inputs(batch), name="critic")
    target_g = mean_gradient(critics.target, *critics.next_inputs(batch), name="target")
    return torch.cat([target_g * (1 - batch.terminals.to(target_g)).unsqueeze(1), g], dim=1)


def _stacked_features_of_chunk(critics: Critics, batch: Transitions) -> Tensor:
    with torch.no_grad():
        f = member_features(critics, critics.critic, *critics.inputs(batch), name="critic")
        target_f = member_features(critics, critics.target, *critics.next_inputs(batch), name="target")
    stacked = torch.cat([*target_f, *f], dim=1)
    check_finite("features", stacked, hint="; has the training diverged?")
    return stacked
