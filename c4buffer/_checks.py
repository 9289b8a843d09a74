"""Errors in one voice: the argument, what was expected, what came."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from typing import NoReturn

import torch
from torch import Tensor

CHECKED_ROWS = 1 << 16  # looked at together


def fail(argument: str, expected: str, got: object) -> NoReturn:
    """Raise ValueError: `argument: expected ..., got ...`."""
    raise ValueError(f"{argument}: expected {expected}, got {got}")


@contextmanager
def requiring(what: str, extra: str) -> Iterator[None]:
    """Imports that come with an extra of this package; an ImportError says with which."""
    try:
        yield
    except ImportError as error:
        message = f'{what} needs {error.name or "more"}: pip install "c4buffer[{extra}]"'
        raise ImportError(message, name=error.name) from error


def check_integer(argument: str, value: object, *, minimum: int) -> int:
    """The value as an int, when it is one (no bool) and at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        fail(argument, f"an integer of at least {minimum}", repr(value))
    return int(value)


def check_number(argument: str, value: object, *, minimum: float, exclusive: bool = False) -> float:
    """The value as a float, when it is finite and at least (above, if `exclusive`) `minimum`."""
    bound = "above" if exclusive else "at least"
    if isinstance(value, bool) or not isinstance(value, Real):
        fail(argument, f"a number {bound} {minimum:g}", repr(value))
    number = _as_float(value)
    inside = number > minimum if exclusive else number >= minimum
    if not inside or number == float("inf"):  # a NaN is never inside
        fail(argument, f"a finite number {bound} {minimum:g}", repr(value))
    return number


def is_finite_number(value: object) -> bool:
    """A real number (no bool), not NaN and not infinite."""
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(_as_float(value))


def _as_float(value: Real) -> float:
    """Infinite where an integer is too large for a float."""
    try:
        return float(value)
    except OverflowError:
        return -math.inf if value < 0 else math.inf


def check_fraction(argument: str, value: object, *, open_ends: bool = False) -> float:
    """The value as a float, when it is from 0 to 1; neither 0 nor 1 with `open_ends`."""
    number = check_number(argument, value, minimum=0, exclusive=open_ends)
    if number > 1 or (open_ends and number == 1):
        fail(argument, "a number above 0 and below 1" if open_ends else "a number from 0 to 1", repr(value))
    return number


def check_choice(argument: str, value: object, choices: tuple[str, ...]) -> None:
    """One of the names in `choices`."""
    if value not in choices:
        fail(argument, "one of " + ", ".join(map(repr, choices)), repr(value))


def check_finite(argument: str, values: Tensor, *, hint: str = "") -> None:
    """No NaN and no infinity in `values` [N, ...]; the error names the first bad row."""
    if not values.is_floating_point():
        return
    values = values.detach()
    # A sum is finite only if all its terms are, and needs no memory; it may overflow, so a bad one proves nothing.
    if math.isfinite(values.sum()):
        return
    rows = [
        start + (~torch.isfinite(part)).reshape(len(part), -1).any(dim=1).nonzero().squeeze(1)
        for start, part in zip(range(0, len(values), CHECKED_ROWS), values.split(CHECKED_ROWS))
    ]
    bad = torch.cat(rows) if rows else torch.empty(0, device="cpu")
    if len(bad):
        first = int(bad[0])
        row = values[first].reshape(-1)
        value = float(row[~torch.isfinite(row)][0])
        fail(argument, "finite values", f"{value} in row {first} ({len(bad)} of {len(values)} rows are bad){hint}")


def check_matrix(argument: str, value: object) -> Tensor:
    """The value, when it is a floating tensor [N, E] of finite numbers, not empty."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim != 2 or 0 in value.shape:
        got = f"{value.dtype} {shape_of(value)}" if isinstance(value, Tensor) else type(value).__name__
        fail(argument, "a floating tensor [N, E] with at least one row and column", got)
    check_finite(argument, value)
    return value


def shape_of(tensor: Tensor) -> str:
    """A shape as text: [256, 11]."""
    return str(list(tensor.shape))


def shape_or_type(value: object) -> str:
    """What came in place of a tensor of another shape."""
    return shape_of(value) if isinstance(value, Tensor) else type(value).__name__
