"""Pictures: what is drawn, and that the user's matplotlib stays as it was."""

from __future__ import annotations

import dataclasses
from typing import Any

import matplotlib as mpl
import pytest
import torch

from c4buffer import Diagnosis, plots

RUN = {
    "updates": [1000, 2000],
    "mean_q": [10.0, 300.0],
    "td_loss": [1.0, 5.0],
    "evaluated": [2000],
    "scores": [42.0],
    "total": [1.0, 2.0],
    "within": [0.5, 0.6],
    "between": [0.8, 1.7],
    "correlation": [0.2, 0.9],
}


def test_training_curves_draws_every_run_in_every_panel_and_the_largest_return() -> None:
    figure = plots.training_curves({"plain": RUN, "C4": RUN}, largest_return=341.0)
    q_axes, loss_axes, score_axes = figure.axes
    assert [len(axes.lines) for axes in figure.axes] == [3, 2, 2]
    assert q_axes.get_yscale() == loss_axes.get_yscale() == "log"
    assert score_axes.get_yscale() == "linear"
    assert list(q_axes.lines[0].get_ydata()) == RUN["mean_q"]


def test_negative_values_and_scores_are_inside_their_panels() -> None:
    run = {**RUN, "mean_q": [-30.0, -10.0], "evaluated": [1000, 2000], "scores": [-5.0, -1.0]}
    q_axes, _, score_axes = plots.training_curves({"plain": RUN, "C4": run}).axes
    for axes, values in ((q_axes, run["mean_q"]), (score_axes, run["scores"])):
        bottom, top = axes.get_ylim()
        assert bottom < min(values)
        assert max(values) < top


def test_cross_covariance_split_draws_total_within_and_between_on_one_scale() -> None:
    figure = plots.cross_covariance_split({"plain": RUN, "C4": {**RUN, "total": [10.0, 20.0]}})
    plain, c4, correlation = figure.axes
    assert [list(line.get_ydata()) for line in plain.lines] == [RUN["total"], RUN["within"], RUN["between"]]
    assert plain.get_ylim() == c4.get_ylim()
    assert len(correlation.lines) == 2


def test_gradient_space_colours_rows_by_their_likeliest_cluster() -> None:
    torch.manual_seed(0)
    y = torch.cat([torch.randn(30, 4) - 9, torch.randn(20, 4) + 9])
    r = torch.zeros(50, 2)
    r[:30, 0] = r[30:, 1] = 1
    (panel,) = plots.gradient_space({"C4": y}, {"C4": r}).axes
    first, second = (points.get_offsets().data for points in panel.collections)
    assert (len(first), len(second)) == (30, 20)
    assert (first[:, 0] > 0).all() != (second[:, 0] > 0).all()  # the first component separates them


def test_gradient_space_refuses_responsibilities_of_other_rows() -> None:
    with pytest.raises(ValueError, match=r"responsibilities: expected \[N, K\] with N = 5, got \[4, 2\]"):
        plots.gradient_space({"C4": torch.randn(5, 4)}, {"C4": torch.ones(4, 2)})


@pytest.mark.parametrize(
    ("embeddings", "responsibilities", "message"),
    [
        ({}, {}, r"responsibilities: expected the names of embeddings, at least one \(none\), got none"),
        ({"a": torch.randn(5, 4)}, {"b": torch.ones(5, 2)}, r"responsibilities: expected the names .* \(a\), got b"),
        ({"a": torch.randn(5, 1)}, {"a": torch.ones(5, 2)}, r"embeddings: expected \[N, E\] with at least two rows"),
        ({"a": torch.randn(1, 4)}, {"a": torch.ones(1, 2)}, r"embeddings: expected \[N, E\] with at least two rows"),
        ({"a": torch.full((5, 4), torch.nan)}, {"a": torch.ones(5, 2)}, "embeddings: expected finite values"),
        ({"a": torch.randn(5, 4)}, {"a": torch.ones(5)}, r"responsibilities: expected \[N, K\] with N = 5, got \[5\]"),
    ],
)
def test_gradient_space_refuses_what_it_can_not_draw(embeddings: Any, responsibilities: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plots.gradient_space(embeddings, responsibilities)


def test_diagnosis_draws_what_each_theorem_names_over_the_updates() -> None:
    names = [field.name for field in dataclasses.fields(Diagnosis)]
    found = [Diagnosis(**{name: float(scale * i + 1) for i, name in enumerate(names)}) for scale in (1, 2)]
    figure = plots.diagnosis([1000, 2000], found)
    drawn = {tuple(line.get_ydata()) for panel in figure.axes for line in panel.lines}
    missing = {name for name in names if (getattr(found[0], name), getattr(found[1], name)) not in drawn}
    assert [len(panel.lines) for panel in figure.axes] == [4, 3, 3, 2]
    assert missing == {
        *("correlation", "gradient_norm", "target_gradient_norm", "td_mean", "td_variance"),
        *("value_spread", "smallest_effective_size", "largest_effective_size"),
    }
    with pytest.raises(ValueError, match="diagnoses: expected as many as updates, 1, and at least one, got 2"):
        plots.diagnosis([1000], found)


def test_the_users_settings_are_left_alone() -> None:
    before = dict(mpl.rcParams)
    plots.training_curves({"C4": RUN})
    assert dict(mpl.rcParams) == before


def test_more_runs_than_colours_are_all_drawn() -> None:
    run = {name: [1.0, 2.0] for name in ("updates", "mean_q", "td_loss", "evaluated", "scores")}
    figure = plots.training_curves({f"run {i}": run for i in range(7)})
    assert len(figure.axes[0].lines) == 7
    split = {name: [1.0, 2.0] for name in ("updates", "total", "within", "between", "correlation")}
    figure = plots.cross_covariance_split({f"run {i}": split for i in range(7)})
    assert all(len(panel.lines) for panel in figure.axes)


def test_of_gradients_wider_than_their_rows_the_plane_is_the_same() -> None:
    y = torch.randn(30, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 13)
    wide = torch.cat([y, y, y], dim=1)  # three times the same directions: the same plane, sqrt(3) as far
    (narrow, shares), (plane, wide_shares) = plots._principal_plane(y), plots._principal_plane(wide)
    assert torch.allclose(plane.abs(), 3**0.5 * narrow.abs())
    assert wide_shares == pytest.approx(shares)
