"""Work that is the same under `torch.inference_mode`, as acting loops use it, `torch.autocast` and `torch.compile`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
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


def eagerly() -> AbstractContextManager[object]:
    """Compiled networks run as they were written. Where nobody compiles, the compiler is not imported."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def noise_of_its_own(device: torch.device, *, seed: int = 0) -> Iterator[None]:
    """torch's generators, of the processor and of `device` alone, seeded alike each time and put back after."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which moves those of all devices
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
