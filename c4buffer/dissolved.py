"""A partition less the clusters that are too small for a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import fail
from .partition import BLOCK_ROWS, UNASSIGNED, Partition


class Less(Partition):
    """A partition with some clusters dropped and the others renormalised: r_iw / sum_v r_iv over those kept.

    A row that no kept cluster explains goes to the nearest kept mean; it is unassigned where no distances are known.
    Read from the whole partition as it is asked for; `r`, all of it, is made once rows are drawn from it.

    Args:
        whole: with all clusters.
        keep: those that stay, [K].
    """

    def __init__(self, whole: Partition, keep: Tensor) -> None:
        self._whole = whole
        self._keep = keep
        self._r = None
        p = whole.p[keep]
        self._begin(whole.ids[keep], p / p.sum() if bool(p.any()) else (p + 1) / len(p))
        self._count()

    @classmethod
    def of_state(cls, whole: Partition, state: dict[str, Any], size: int) -> Less:
        """What `state` gave for `size` rows, of a partition that was restored before; ValueError as there."""
        keep = torch.isin(whole.ids, state["ids"]).nonzero().squeeze(1)
        if not torch.equal(whole.ids[keep], state["ids"]):
            fail("dissolved", f"clusters among {whole.ids.tolist()}", state["ids"].tolist())
        less = cls(whole, keep)
        less._restore(state, size)
        return less

    @property
    def r(self) -> Tensor:
        if self._r is None:
            made = torch.empty(len(self._keep), self.room, dtype=self.dtype, device="cpu")
            for start in range(0, self.room, BLOCK_ROWS):
                block = slice(start, start + BLOCK_ROWS)
                made[:, block] = self.of(block)
            self._r = made
        return self._r

    @property
    def room(self) -> int:
        return self._whole.room

    @property
    def dtype(self) -> torch.dtype:
        return self._whole.dtype

    def of(self, rows: slice | Tensor) -> Tensor:
        if self._r is not None:
            return self._r[:, rows]
        known = self._whole.of(rows)[self._keep]
        unassigned = known[0] < 0
        weights = known.double().clamp_(min=0)  # what is left of r may be tiny, but a float64 divides it
        mass = weights[0].clone()
        for part in weights[1:]:
            mass += part  # in one order, however many rows are asked for
        left = (weights / mass).to(known.dtype)
        lost = ((mass == 0) & ~unassigned).nonzero().squeeze(1)
        if len(lost):
            nearest = self.nearest(rows[lost] if isinstance(rows, Tensor) else (rows.start or 0) + lost)
            left[:, lost] = UNASSIGNED
            if nearest is not None:
                left[:, lost] = torch.nn.functional.one_hot(nearest, len(left)).T.to(left.dtype)
        left[:, unassigned] = UNASSIGNED
        return left

    def nearest(self, rows: Tensor) -> Tensor | None:
        distances = self._whole.distances
        return None if distances is None else distances[:, rows][self._keep].argmin(dim=0)

    def state(self, size: int) -> dict[str, Any]:
        """All but the responsibilities, which are the whole partition's."""
        return self._state(size)
