"""Classes that a model wears for a time, over its own."""

from __future__ import annotations

import functools
from typing import Any

from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm


class Worn(OffPolicyAlgorithm):
    """What others are made from, copied models, loaded ones and pickles among them, is of the model's own class."""

    def __new__(cls, *arguments: Any, **options: Any) -> Any:
        return own_class(cls)(*arguments, **options)

    def __reduce_ex__(self, protocol: Any) -> Any:
        recipe: Any = super().__reduce_ex__(protocol)
        return object.__new__, (own_class(type(self)),), *recipe[2:]


@functools.cache
def worn_over(worn: type[Worn], base: Any) -> Any:
    """A class with the name of `base`, which it is worn over."""
    return type(base.__name__, (worn, base), {"__module__": base.__module__})


def own_class(worn: Any) -> Any:
    """The class under all that is worn."""
    while issubclass(worn, Worn):
        worn = worn.__bases__[1]
    return worn
