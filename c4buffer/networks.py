"""The networks that a callable is made of."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FunctionType, ModuleType
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

MOST_PARTS = 1000  # of a container that is looked into; one of more is a log or a memory


def modules_behind(part: Any, depth: int = 4) -> list[nn.Module]:
    """The networks that a callable is, holds, or names in its body; found within `depth` steps."""
    if isinstance(part, nn.Module):
        return [part]
    held: Iterable[Any] = ()
    if isinstance(part, (list, tuple, Mapping)) and len(part) > MOST_PARTS:
        return []
    if isinstance(part, (list, tuple)):
        held = part
    elif isinstance(part, functools.partial):
        held = [part.func, *part.args, *part.keywords.values()]
    elif inspect.ismethod(part):
        held = [part.__self__]
    elif isinstance(part, Mapping):
        held = part.values()
    elif inspect.isfunction(part):
        named = [part.__globals__[name] for name in part.__code__.co_names if name in part.__globals__]
        held = [*_closed_over(part), *named]
    elif hasattr(part, "__dict__") and not isinstance(part, (type, ModuleType)):
        held, depth = vars(part).values(), min(depth, 2)  # an agent holds networks, but also environments and data
    return [module for value in held for module in modules_behind(value, depth - 1)] if depth else []


@contextmanager
def evaluating(modules: Iterable[nn.Module], *, and_others: bool = False) -> Iterator[None]:
    """These modules in eval mode (no dropout, no batch statistics moved), each one's own mode restored after.

    Args:
        modules: those that are known.
        and_others: any other that this thread calls meanwhile, too, from its call on.
    """
    training: list[nn.Module] = []
    hook: RemovableHandle | None = None
    here = threading.get_ident()

    def met(module: nn.Module, _: Any = None) -> None:
        if module.training and threading.get_ident() == here:
            training.append(module)  # first, so that an interrupt between the two loses nothing
            module.training = False

    def restore() -> None:
        if hook is not None:
            hook.remove()
        for module in training:
            module.training = True

    try:
        for module in modules:
            met(module)
        hook = register_module_forward_pre_hook(met) if and_others else None
        yield
    finally:
        try:
            restore()
        except BaseException:  # Ctrl-C: once more, from its beginning
            restore()
            raise


def _closed_over(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # a name that is not assigned yet
            yield cell.cell_contents
