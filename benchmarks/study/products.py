"""Matrix products of float32 by oneDNN where torch would ask MKL.

MKL gives processors of other makers than its own kernels for AVX2; oneDNN, which torch carries too, gives them those
for AVX-512: a product of 256 x 256 matrices takes 150 us in place of 315 us on an AMD EPYC of 2.6 GHz. The numbers
differ in rounding alone. A study of many runs gains a third of its time; it is the same for all arms.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 64  # of a product's three sizes; below, MKL is as fast


def use_onednn() -> bool:
    """Take over torch's `mm` and `addmm` on the CPU in this process, if this torch was built with oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return False
    library.impl("mm", mm, "CPU", allow_override=True)
    library.impl("addmm", addmm, "CPU", allow_override=True)
    return True


library = torch.library.Library("aten", "IMPL")  # the kernels stay as long as this lives


def suits(left: Tensor, right: Tensor) -> bool:
    """A product that oneDNN does faster."""
    return left.dtype == torch.float32 and min(*left.shape, right.shape[1]) >= SMALLEST


def mm(left: Tensor, right: Tensor) -> Tensor:
    """left @ right."""
    if suits(left, right):
        return torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")
    return torch.mm(left, right, out=left.new_empty(left.shape[0], right.shape[1]))


def addmm(bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta bias + alpha left @ right."""
    if beta == alpha == 1 and bias.ndim == 1 and suits(left, right):
        return torch.ops.mkldnn._linear_pointwise(left, right.t(), bias, "none", [], "")
    out = left.new_empty(left.shape[0], right.shape[1])
    return torch.addmm(bias, left, right, beta=beta, alpha=alpha, out=out)
