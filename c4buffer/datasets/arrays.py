"""Arrays of files -> tensors that networks take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..fields import as_tensor


def as_network_input(field: str, values: Any) -> Tensor:
    """Floating values in torch's default dtype; bytes and integers as they are.

    Raises:
        ValueError: for what is no array of numbers; names the field.
    """
    tensor = as_tensor(field, values)
    return tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor
