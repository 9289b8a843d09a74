"""Products of batches of matrices, on a processor by oneDNN where they are large enough, and memory for them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

FEWEST_MULTIPLICATIONS = 1 << 20  # of one product: below, starting it costs more than is gained
MOST_SUMMED = 4096  # numbers in one sum: of more, threads may each sum a part, and their number would be seen


class Buffers:
    """Memory for a chunk, its differences and one product at a time.

    Fresh tensors of a megabyte cost more than the arithmetic on them: the system takes their pages back and has to
    clear them each time.
    """

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.held: dict[str, Tensor] = {}

    def chunk(self, *shape: int) -> Tensor:
        """For u, [E, n]."""
        return self._view("chunk", shape)

    def differences(self, *shape: int) -> Tensor:
        """For u - mu_z, [K, E, n]."""
        return self._view("differences", shape)

    def products(self, *shape: int) -> Tensor:
        """For what is made of the differences, [K, E, n]."""
        return self._view("products", shape)

    def _view(self, name: str, shape: tuple[int, ...]) -> Tensor:
        floats = math.prod(shape)
        if name not in self.held or len(self.held[name]) < floats:
            self.held[name] = self.like.new_empty(floats)
        return self.held[name][:floats].view(shape)


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left [K, M, n] @ right [K, n, P] into `out` [K, M, P] or a new tensor, without a gradient.

    torch asks MKL, which gives processors of other makers than its own half of what they can do with AVX-512. oneDNN,
    which torch carries too, does not look at the maker: where torch has it, it is asked.
    """
    if _linear is None or not _suits(left, right):
        return torch.bmm(left, right, out=out)
    if out is None:
        out = left.new_empty(len(left), left.shape[1], right.shape[2])
    for z in range(len(left)):
        out[z] = _linear(left[z].contiguous(), right[z].T)
    return out


def _suits(left: Tensor, right: Tensor) -> bool:
    return (
        left.device.type == "cpu"
        and left.dtype == torch.float32
        and left.shape[2] <= MOST_SUMMED
        and left[0].numel() * right.shape[2] >= FEWEST_MULTIPLICATIONS
        # strides that oneDNN has no kernel for cost it a factor of a hundred
        and (right[0].is_contiguous() or right[0].T.is_contiguous())
    )


def _find_linear() -> Callable[[Tensor, Tensor], Tensor] | None:
    """oneDNN's x [M, n], w [P, n] -> x w^T, which torch keeps for its compiler; None where it would be no faster."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return None
    try:
        operator = torch.ops.mkldnn._linear_pointwise
        operator(torch.ones(2, 2, device="cpu"), torch.ones(2, 2, device="cpu"), None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return None
    return lambda x, w: operator(x, w, None, "none", [], "")


_linear = _find_linear()
