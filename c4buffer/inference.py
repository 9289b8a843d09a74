"""Work that is the same under `torch.inference_mode`, as acting loops use it, and under `torch.autocast`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

KINDS = ("cpu", "cuda", "mps", "xpu")  # of devices that autocast knows


def outside_inference_mode(function: Callable[P, R]) -> Callable[P, R]:
    """The function, whose tensors can be changed and differentiated later on, whatever mode it is called in."""

    @functools.wraps(function)
    def run(*arguments: P.args, **options: P.kwargs) -> R:
        if not torch.is_inference_mode_enabled():
            return function(*arguments, **options)
        with torch.inference_mode(False):
            return function(*arguments, **options)

    return run


def without_autocast(kind: str) -> AbstractContextManager[object]:
    """No autocast on devices of this kind: sums of products in 16 bits overflow, and lose what tells clusters apart."""
    autocasting = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if autocasting else nullcontext()


def in_full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """The function, without autocast on any device."""

    @functools.wraps(function)
    def run(*arguments: P.args, **options: P.kwargs) -> R:
        with ExitStack() as stack:
            for kind in KINDS:
                stack.enter_context(without_autocast(kind))
            return function(*arguments, **options)

    return run
