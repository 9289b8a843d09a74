"""Embeddings that are too wide to be kept are projected as they are read."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from c4buffer import ClusteredReplayBuffer, Critics, Transitions, embedding, refresh, stacked_gradients
from c4buffer.embedding import embed_rows

from .conftest import MakeTransitions, numbered


def wide_data(rows: int = 60, pixels: int = 50) -> tuple[Transitions, Critics]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, rows, 1, 5, pixels // 5, generator=generator)
    transitions = Transitions(
        observations=images[0],
        actions=torch.randint(3, (rows,), generator=generator),
        rewards=torch.zeros(rows),
        next_observations=images[1],
        terminals=torch.zeros(rows),
    )
    torch.manual_seed(0)
    critics = [nn.Sequential(nn.Flatten(), nn.Linear(pixels, 16), nn.Tanh(), nn.Linear(16, 3)) for _ in range(2)]
    return transitions, Critics(*critics)


def rows_of(transitions: Transitions) -> Any:
    return lambda start, stop: transitions[start:stop]


@pytest.mark.parametrize("chunk_rows", [7, 1000])
def test_both_halves_are_projected_on_the_same_directions(monkeypatch: pytest.MonkeyPatch, chunk_rows: int) -> None:
    transitions, critics = wide_data()
    full = stacked_gradients(critics, transitions)
    assert full.shape == (60, 100)
    monkeypatch.setattr(embedding, "rows_for", lambda *_: chunk_rows)
    monkeypatch.setattr(embedding, "WIDEST", 99)
    kept, projected = embed_rows("gradients", critics, 60, rows_of(transitions), device=torch.device("cpu"), max_dim=20)
    assert projected
    assert kept.shape == (60, 20)
    directions = embedding._directions(50, 10)
    expected = torch.cat([full[:, :50] @ directions, full[:, 50:] @ directions], dim=1)
    torch.testing.assert_close(kept, expected)
    again, _ = embed_rows("gradients", critics, 60, rows_of(transitions), device=torch.device("cpu"), max_dim=20)
    assert torch.equal(kept, again)


def test_lengths_and_angles_are_about_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    transitions, critics = wide_data(pixels=500)
    full = stacked_gradients(critics, transitions)
    monkeypatch.setattr(embedding, "WIDEST", 99)
    kept, _ = embed_rows("gradients", critics, 60, rows_of(transitions), device=torch.device("cpu"), max_dim=512)
    products = kept @ kept.T / (full @ full.T).diagonal().mean()
    expected = full @ full.T / (full @ full.T).diagonal().mean()
    assert (products - expected).abs().mean() < 0.1


def test_embeddings_that_are_narrow_enough_stay_as_they_are() -> None:
    transitions, critics = wide_data()
    kept, projected = embed_rows("gradients", critics, 60, rows_of(transitions), device=torch.device("cpu"), max_dim=2)
    assert not projected
    torch.testing.assert_close(kept, stacked_gradients(critics, transitions))


def test_a_buffer_clusters_them(monkeypatch: pytest.MonkeyPatch) -> None:
    transitions, critics = wide_data()
    monkeypatch.setattr(embedding, "WIDEST", 99)
    buffer = ClusteredReplayBuffer.from_transitions(transitions, n_clusters=2, max_dim=10, seed=0)
    report = buffer.refresh(critics)
    assert buffer.mixture.means.shape == (2, 10)
    assert math.isnan(report.total)  # the norm of a projection's covariance is another one
    buffer.attach(critics)
    assert torch.isfinite(torch.tensor(buffer.log_likelihood_of(torch.arange(20))))

    def own(critics: Critics, batch: Transitions) -> torch.Tensor:
        return batch.observations.flatten(1).repeat(1, 3)

    other = ClusteredReplayBuffer.from_transitions(transitions, n_clusters=2, max_dim=10, embedding=own, seed=0)
    other.refresh(critics)
    assert other.mixture.means.shape == (2, 10)


def test_norms_of_wide_covariances_are_not_taken(
    make_transitions: MakeTransitions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refresh, "WIDEST_NORMS", 7)
    for width, known in ((5, True), (6, False)):  # of gradients by 7 and by 8 columns
        critic = torch.nn.Bilinear(width, 2, 1)
        buffer = ClusteredReplayBuffer.from_transitions(make_transitions(40, width, 2), n_clusters=2, seed=0)
        assert math.isfinite(buffer.refresh(Critics(critic, critic)).total) == known


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype: torch.dtype) -> None:
    rows = numbered(9)
    kept, _ = embed_rows(
        lambda critics, batch: batch.observations.to(dtype),
        Critics(abs, abs),
        9,
        lambda a, b: rows[a:b],
        device=torch.device("cpu"),
        max_dim=4,
    )
    assert kept.dtype == torch.float32
    assert torch.equal(kept, rows.observations)


def test_embeddings_have_no_graph() -> None:
    rows, scale = numbered(9), torch.ones((), requires_grad=True)
    kept, _ = embed_rows(
        lambda critics, batch: scale * batch.observations,
        Critics(abs, abs),
        9,
        lambda a, b: rows[a:b],
        device=torch.device("cpu"),
        max_dim=4,
    )
    assert not kept.requires_grad
