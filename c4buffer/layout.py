"""The form of a row, shapes and dtypes in the structure that it comes in: to be compared, and to be saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ._checks import fail


def form_of(value: Any) -> Any:
    """Shape and dtype of a row, in the structure that it comes in."""
    if isinstance(value, Mapping):
        return {key: form_of(value[key]) for key in sorted(value)}
    if isinstance(value, tuple):
        return tuple(form_of(leaf) for leaf in value)
    return f"{list(value.shape[1:])} {value.dtype}"


def to_layout(value: Any) -> Any:
    """Shapes and dtypes of a row as plain values, in the structure that it comes in."""
    if isinstance(value, Mapping):
        return {"dict": {key: to_layout(value[key]) for key in sorted(value)}}
    if isinstance(value, tuple):
        return {"tuple": [to_layout(leaf) for leaf in value]}
    return {"shape": list(value.shape[1:]), "dtype": name_of(value.dtype)}


def from_layout(layout: Any) -> Any:
    """No rows, in the form of a layout."""
    if "dict" in layout:
        return {key: from_layout(part) for key, part in layout["dict"].items()}
    if "tuple" in layout:
        return tuple(from_layout(part) for part in layout["tuple"])
    dtype = getattr(torch, layout["dtype"], None)
    if not isinstance(dtype, torch.dtype):
        fail("dtype", "one of torch's", repr(layout["dtype"]))
    return torch.empty(0, *layout["shape"], dtype=dtype, device="cpu")


def name_of(dtype: torch.dtype) -> str:
    """As torch has it: "float32"."""
    return str(dtype).removeprefix("torch.")
