"""Pictures of a training run: what the critic learned, what its gradients share, and how they cluster."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec

import torch
from torch import Tensor

from ._checks import check_finite, fail, requiring, shape_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .diagnostics import Diagnosis

# Okabe and Ito's colours, told apart by everybody.
RUN_COLOURS = ("#6b7280", "#0072b2", "#d55e00", "#009e73", "#cc79a7")
CLUSTER_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#f0e442", "#000000")
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}

TINIEST = 1e-30  # of an axis

History = Mapping[str, Sequence[float]]
P = ParamSpec("P")


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """`draw` in the house's style; the user's own settings are left alone."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with requiring("a figure", "plots"):
            from matplotlib import rc_context

        with rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


@_styled
def training_curves(runs: Mapping[str, History], *, largest_return: float | None = None) -> Figure:
    """Mean Q, TD loss (both on a log scale, a Q that is not positive on a symmetric one) and normalised score of runs.

    Args:
        runs: by name: `updates`, `mean_q`, `td_loss` [T], and `evaluated`, `scores` [S].
        largest_return: the largest discounted return in the data, drawn as a line that an honest Q stays near.
    """
    figure, (q_axes, loss_axes, score_axes) = _figure(3, width=13.5, height=3.9)
    for (name, run), colour in zip(runs.items(), itertools.cycle(RUN_COLOURS)):
        q_axes.plot(run["updates"], run["mean_q"], color=colour, label=name)
        loss_axes.plot(run["updates"], run["td_loss"], color=colour, label=name)
        score_axes.plot(run["evaluated"], run["scores"], color=colour, label=name, marker="o", markersize=4)
    if largest_return is not None:
        q_axes.axhline(largest_return, color="#111827", linestyle=":", label="largest return in the data")
    positive = all(q > 0 for run in runs.values() for q in run["mean_q"] if math.isfinite(q))
    q_axes.set(title="Mean Q on the data", yscale="log" if positive else "symlog")
    loss_axes.set(title="TD loss on the data", yscale="log")
    score_axes.set(title="Normalised score")
    if all(score >= 0 for run in runs.values() for score in run["scores"]):
        score_axes.set_ylim(bottom=0)
    _label_updates(q_axes, loss_axes, score_axes)
    q_axes.legend(loc="lower right")
    return figure


@_styled
def cross_covariance_split(runs: Mapping[str, History]) -> Figure:
    """||C||_F over the updates of several runs, side by side, split into within and between clusters (Theorem 2).

    Args:
        runs: by name: `updates`, `total`, `within`, `between` and `correlation` [T].
    """
    figure, axes = _figure(len(runs) + 1, width=4.5 * (len(runs) + 1), height=3.9)
    for panel, (name, run), colour in zip(axes, runs.items(), itertools.cycle(RUN_COLOURS)):
        panel.plot(run["updates"], run["total"], color="#111827", label=r"total $\|C\|_F$")
        panel.plot(run["updates"], run["within"], color="#e69f00", label=r"within $\|E[C_Z]\|_F$")
        panel.plot(run["updates"], run["between"], color="#0072b2", label=r"between $\|Cov(\mu'_Z, \mu_Z)\|_F$")
        panel.set(title=f"{name}: cross-covariance", yscale="log")
        axes[-1].plot(run["updates"], run["correlation"], color=colour, label=name)
    low = min(panel.get_ylim()[0] for panel in axes[:-1])
    high = max(panel.get_ylim()[1] for panel in axes[:-1])
    for panel in axes[:-1]:
        panel.set_ylim(low, high)
    axes[0].legend(loc="lower right")
    axes[-1].set(title=r"Correlation $\|C\|_F\,/\,\sqrt{tr\Sigma'\;tr\Sigma}$", ylim=(0, 1))
    axes[-1].legend(loc="best")
    _label_updates(*axes)
    return figure


@_styled
def diagnosis(updates: Sequence[float], diagnoses: Sequence[Diagnosis]) -> Figure:
    """What `diagnose` found in the course of a run: Theorem 1, Theorem 2, Eq. 10 and Observation 1, a panel each.

    Args:
        updates: [T], when each diagnosis was made.
        diagnoses: [T].
    """
    if len(updates) != len(diagnoses) or not diagnoses:
        fail("diagnoses", f"as many as updates, {len(updates)}, and at least one", len(diagnoses))
    figure, axes = _figure(4, width=18, height=3.9)
    panels: list[dict[str, tuple[str, str]]] = [
        {
            "target_term": ("#0072b2", "A, of the target"),
            "critic_term": ("#009e73", "B, of the critic"),
            "cross_term": ("#d55e00", "C, cross term"),
            "shift_variance": ("#111827", "A + B - C"),
        },
        {
            "total": ("#111827", r"total $\|C\|_F$"),
            "within": ("#e69f00", r"within $\|E[C_Z]\|_F$"),
            "between": ("#0072b2", r"between $\|Cov(\mu'_Z, \mu_Z)\|_F$"),
        },
        {
            "cluster_bound": ("#111827", r"$\sqrt{tr\Sigma'_z\;tr\Sigma_z}$"),
            "cluster_norm": ("#0072b2", r"$\|C_z\|_2$"),
            "cluster_cross": ("#d55e00", r"$|w'^T C_z w|$"),
        },
        {
            "variance_cosine": ("#0072b2", r"with $\nabla Var[\delta]$"),
            "mean_cosine": ("#d55e00", r"with $\nabla (E[\delta])^2$"),
        },
    ]
    for panel, lines in zip(axes, panels):
        for name, (colour, label) in lines.items():
            panel.plot(
                updates, [getattr(each, name) for each in diagnoses], color=colour, label=label, marker="o", ms=3
            )
        panel.legend(loc="best")
    largest = max(abs(getattr(each, name)) for each in diagnoses for name in panels[0])
    axes[0].set(title="Variance by a shift (Theorem 1)")
    axes[0].set_yscale("symlog", linthresh=max(largest, TINIEST) / 1000)  # the cross term may be negative
    axes[1].set(title="Cross-covariance (Theorem 2)", yscale="log")
    axes[2].set(title="Mean over clusters (Eq. 10)", yscale="log")
    axes[3].set(title=r"Cosine of $\nabla E[\delta^2]$", ylim=(-1.05, 1.05))
    _label_updates(*axes)
    return figure


@_styled
def gradient_space(
    embeddings: Mapping[str, Tensor], responsibilities: Mapping[str, Tensor], *, columns: int | None = None
) -> Figure:
    """Stacked gradients, a panel a name, each in its own first two principal components and coloured by cluster.

    Args:
        embeddings: by name: y = [g', g], [N, 2D].
        responsibilities: by name: r, [N, K]; the colour is that of the arg-max.
        columns: panels in a row. None: all of them.
    """
    if len(embeddings) == 0 or embeddings.keys() != responsibilities.keys():
        names = [", ".join(each) or "none" for each in (embeddings, responsibilities)]
        fail("responsibilities", f"the names of embeddings, at least one ({names[0]})", names[1])
    columns = columns or len(embeddings)
    rows = -(-len(embeddings) // columns)
    figure, axes = _figure(columns, rows=rows, width=6 * columns, height=4.6 * rows)
    for panel, (name, y) in zip(axes, embeddings.items()):
        r = responsibilities[name]
        if y.ndim != 2 or len(y) < 2 or y.shape[1] < 2:
            fail("embeddings", "[N, E] with at least two rows and two columns", shape_of(y))
        check_finite("embeddings", y)
        if r.ndim != 2 or len(r) != len(y):
            fail("responsibilities", f"[N, K] with N = {len(y)}", shape_of(r))
        points, explained = _principal_plane(y)
        labels = r.argmax(dim=1).cpu()
        limits = torch.quantile(points, torch.tensor([0.005, 0.995], dtype=points.dtype, device="cpu"), dim=0)
        for z in range(r.shape[1]):
            here = points[labels == z]
            colour, label = CLUSTER_COLOURS[z % len(CLUSTER_COLOURS)], f"cluster {z}: {len(here):,}"
            panel.scatter(here[:, 0], here[:, 1], s=5, alpha=0.45, linewidths=0, color=colour, label=label)
        margin = 0.08 * (limits[1] - limits[0])
        low, high = (limits[0] - margin).tolist(), (limits[1] + margin).tolist()
        panel.set(
            title=name,
            xlabel=f"first principal component ({explained[0]:.0%})",
            ylabel=f"second ({explained[1]:.0%})",
            xlim=(low[0], high[0]),
            ylim=(low[1], high[1]),
        )
        for handle in panel.legend(loc="best", markerscale=3).legend_handles:
            if handle is not None:
                handle.set_alpha(1)
    return figure


def _principal_plane(y: Tensor) -> tuple[Tensor, list[float]]:
    """Standardised rows in their first two principal components, [N, 2], and the shares of variance explained."""
    y = y.double()
    scale = y.std(dim=0)
    y = (y - y.mean(dim=0)) / torch.where(scale > 0, scale, torch.ones_like(scale))
    if y.shape[1] > len(y):  # as by pixels
        u, lengths, _ = torch.linalg.svd(y, full_matrices=False)
        return (u[:, :2] * lengths[:2]).cpu(), (lengths[:2].square() / lengths.square().sum()).tolist()
    values, vectors = torch.linalg.eigh(y.T @ y)
    return (y @ vectors[:, -2:].flip(1)).cpu(), (values[-2:].flip(0) / values.sum()).tolist()


def _figure(columns: int, *, rows: int = 1, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure and its panels, row by row."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(width, height), dpi=130)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _label_updates(*axes: Axes) -> None:
    for panel in axes:
        panel.set_xlabel("updates")
        panel.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value else "0")
