"""What comes as a field of transitions, as a checked tensor: the error names the field and the first bad row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._checks import check_finite, fail, shape_of
from .observations import Observations, observation_leaves


def as_tensor(argument: str, value: Any) -> Tensor:
    """A tensor, an array or a list of real numbers as a tensor; the error names the argument."""
    if isinstance(value, Tensor):
        tensor = value
    else:
        if hasattr(value, "__array__"):  # which torch would read number by number
            value = np.asarray(value)
        if isinstance(value, np.ndarray):
            if not value.dtype.isnative:
                value = value.astype(value.dtype.newbyteorder("="))
            if not value.flags.writeable or min(value.strides, default=0) < 0:
                value = value.copy()  # torch shares neither
        try:
            tensor = torch.as_tensor(value)
        except (RuntimeError, TypeError, ValueError) as error:
            fail(argument, "numbers in one shape", f"{type(value).__name__} ({error})")
    if tensor.is_complex():
        fail(argument, "real numbers", tensor.dtype)
    if tensor.layout != torch.strided:
        fail(argument, "a dense tensor", tensor.layout)
    return tensor


def as_observations(argument: str, value: Any) -> Observations:
    """[N, *O], or a dict or tuple of such, finite."""
    if isinstance(value, Mapping):
        observations: Observations = {key: as_tensor(f"{argument}[{key!r}]", leaf) for key, leaf in value.items()}
    elif isinstance(value, tuple):
        observations = tuple(as_tensor(f"{argument}[{place}]", leaf) for place, leaf in enumerate(value))
    else:
        observations = as_tensor(argument, value)
    leaves = observation_leaves(observations)
    if not leaves:
        fail(argument, "at least one tensor", "an empty structure")
    for leaf in leaves:
        if leaf.ndim < 2:
            fail(argument, "[N, ...] with at least one axis after N", shape_of(leaf))
        if len(leaf) != len(leaves[0]):
            fail(argument, f"{len(leaves[0])} rows in every part", f"{len(leaf)} in one")
        check_finite(argument, leaf)
    return observations


def check_same_form(
    one: Observations,
    other: Observations,
    *,
    rows: bool = True,
    argument: str = "next_observations",
    of: str = "observations",
) -> None:
    """Same structure, shapes and dtypes; `rows=False` lets the number of rows differ."""

    def form(observations: Observations) -> str:
        leaves = [
            f"[{', '.join(map(str, leaf.shape if rows else ['N', *leaf.shape[1:]]))}] {leaf.dtype}"
            for leaf in observation_leaves(observations)
        ]
        if isinstance(observations, Mapping):
            return "{" + ", ".join(f"{key!r}: {leaf}" for key, leaf in zip(sorted(observations), leaves)) + "}"
        return f"({', '.join(leaves)})" if isinstance(observations, tuple) else leaves[0]

    if form(one) != form(other):
        fail(argument, f"the form of {of}, {form(one)}", form(other))


def as_actions(argument: str, value: Any, rows: int) -> Tensor:
    """Continuous ones [rows, A], finite, or discrete ones [rows] as int64."""
    actions = as_tensor(argument, value)
    if actions.is_floating_point():
        if actions.ndim != 2:
            fail(
                argument,
                "[N, A] for continuous or integer [N] for discrete actions",
                f"{actions.dtype} {shape_of(actions)}",
            )
        check_finite(argument, actions)
    else:
        if actions.dtype == torch.bool:
            fail(argument, "floating or integer values", "bool")
        actions = as_scalars(argument, actions, rows).long()
    if len(actions) != rows:
        fail(argument, f"{rows} rows, as many as observations", len(actions))
    return actions


def as_scalars(argument: str, value: Any, rows: int) -> Tensor:
    """[rows] or [rows, 1] as [rows]."""
    scalars = as_tensor(argument, value)
    if scalars.ndim == 2 and scalars.shape[1] == 1:
        scalars = scalars.squeeze(1)
    if scalars.ndim != 1:
        fail(argument, "[N] or [N, 1]", shape_of(scalars))
    if len(scalars) != rows:
        fail(argument, f"{rows} rows, as many as observations", len(scalars))
    return scalars


def as_flags(argument: str, value: Any, rows: int, *, like: Tensor) -> Tensor:
    """[N] or [N, 1] of zeros and ones as [N] in the dtype of `like`; the error names the argument."""
    flags = as_scalars(argument, value, rows).to(like)
    if bool((flags * (flags - 1)).any()):
        wrong = ((flags != 0) & (flags != 1)).nonzero()
        fail(argument, "0 or 1", f"{float(flags[wrong[0, 0]])} in row {int(wrong[0, 0])}")
    return flags


def as_intervals(value: Any, rows: int, *, like: Tensor) -> Tensor:
    """[rows] or [rows, 1] of whole numbers from 1 as [rows], in the dtype of `like`."""
    intervals = as_scalars("intervals", value, rows).to(like)
    wrong = (~((intervals >= 1) & (intervals == intervals.floor()) & intervals.isfinite())).nonzero()
    if len(wrong):
        fail("intervals", "whole numbers from 1", f"{float(intervals[wrong[0, 0]])} in row {int(wrong[0, 0])}")
    return intervals
