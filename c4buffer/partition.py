"""Responsibilities, cluster by cluster, with the sums that sampling needs kept exact under every change."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ._checks import check_finite, fail, shape_of
from .trajectories import with_tails

UNASSIGNED = -1.0
ROUNDING = 1e-6  # by so much responsibilities in float32 may miss what they should be
BLOCK_ROWS = 1 << 18  # worked on at once, so that memory beyond the clustering does not grow with the rows


class Partition:
    """Responsibilities of K clusters, column by column, and the sums that sampling needs, exact under every change.

    r: [K, n], -1 where a row is unassigned (n is at least the number of rows).
    distances: [K, N], of each row to each cluster's mean, or any numbers in the order of those.
    p: what it is while no row is assigned, [K]; from the first that is, the mean over those. None: zeros.
    """

    def __init__(self, r: Tensor, ids: Tensor, distances: Tensor | None, *, p: Tensor | None = None) -> None:
        self._r: Tensor | None = r
        self.distances = distances
        self._begin(ids, p)
        self._count()

    def _begin(self, ids: Tensor, p: Tensor | None) -> None:
        self.ids = ids
        self._labels: Tensor | None = None  # with room at the end
        self._labelled = 0
        self._members: Tensor | None = None
        self.walks = [torch.empty(0, dtype=torch.int64, device="cpu") for _ in ids]
        self.tailed: Partition | None = None
        self._tables: dict[int, Tensor] = {}
        self.p = torch.zeros(len(ids), dtype=torch.float64, device="cpu") if p is None else p

    @property
    def r(self) -> Tensor:
        """[K, n], -1 where a row is unassigned."""
        assert self._r is not None
        return self._r

    @property
    def room(self) -> int:
        """n."""
        return self.r.shape[1]

    def of(self, rows: slice | Tensor) -> Tensor:
        """r of some rows, [K, M], -1 where one is unassigned; a view of `r`, or not."""
        return self.r[:, rows]

    def nearest(self, rows: Tensor) -> Tensor | None:
        """The cluster whose mean is nearest to each of some rows, [M]; None where no distances are known."""
        return None if self.distances is None else self.distances[:, rows].argmin(dim=0)

    def state(self, size: int) -> dict[str, Any]:
        """All that drawing depends on, for a checkpoint of `size` rows."""
        return {"r": self.r[:, :size], "distances": self.distances, **self._state(size)}

    def _state(self, size: int) -> dict[str, Any]:
        return {
            "ids": self.ids,
            "labels": self.labels,
            "walks": list(self.walks),
            "p": self.p,
            "sums": self.sums,
            "squares": self.squares,
            "counted": self.counted,
            "tailed": None if self.tailed is None else self.tailed.state(size),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], size: int) -> Partition:
        """What `state` gave for `size` rows, on memory of its own.

        Raises:
            ValueError: if its parts do not fit each other.
        """
        clusters, r, known = len(state["ids"]), state["r"], state["distances"]
        _check_form("r", r, (clusters, size), r.dtype if r.is_floating_point() else torch.float32)
        if not bool(((r == UNASSIGNED) | ((r >= 0) & (r <= 1 + ROUNDING))).all()):
            fail("r", "numbers from 0 to 1, or -1 where a row is unassigned", "others")
        if known is not None and (known.ndim != 2 or len(known) != clusters or known.shape[1] > size):
            fail("distances", f"a shape of [{clusters}, at most {size}]", shape_of(known))
        partition = cls(_own(r), _own(state["ids"]), _own(known), p=_own(state["p"]))
        partition._restore(state, size)
        return partition

    def _restore(self, state: dict[str, Any], size: int) -> None:
        """All but the responsibilities."""
        clusters, labels = len(self.ids), state["labels"]
        for name in ("sums", "squares", "counted", "p"):
            _check_form(name, state[name], (clusters,), torch.float64)
            check_finite(name, state[name])
        if labels is not None:
            _check_form("labels", labels, (size,), torch.int64)
            if len(labels) and not -1 <= int(labels.min()) <= int(labels.max()) < clusters:
                fail("labels", f"numbers from -1 to {clusters - 1}", f"{int(labels.min())} to {int(labels.max())}")
        if len(state["walks"]) != clusters or clusters == 0:
            fail("walks", f"one for each of {clusters} clusters, at least one", len(state["walks"]))
        for rows in state["walks"]:
            check_rows("walks", rows, size)
        for name in ("sums", "squares"):
            found: Tensor = getattr(self, name)  # as counted when this was made
            if bool(((state[name] - found).abs() > ROUNDING * (1 + found)).any()):
                fail(name, f"those of the responsibilities, {found.tolist()}", state[name].tolist())
        self.labels = _own(labels)
        self.walks = [_own(walk) for walk in state["walks"]]
        self.sums, self.squares, self.counted, self.p = (_own(state[n]) for n in ("sums", "squares", "counted", "p"))
        self.tailed = None if state["tailed"] is None else Partition.from_state(state["tailed"], size)
        self._changed()

    def recount(self) -> None:
        """All that follows from the responsibilities and the labels, anew."""
        self.tailed, self._members = None, None
        self._count()

    def _count(self) -> None:
        """Sums over the assigned rows, anew."""
        self.assigned = 0
        self.sums = torch.zeros(len(self.ids), dtype=torch.float64, device="cpu")
        self.squares = torch.zeros_like(self.sums)
        for start in range(0, self.room, BLOCK_ROWS):
            part = self.of(slice(start, start + BLOCK_ROWS))
            self.assigned += int((part[0] >= 0).sum())
            here = part.clamp(min=0).double()  # a float32 loses the squares of what is below 1e-23
            self.sums += here.sum(dim=1)
            self.squares += here.square().sum(dim=1)
        self.counted = self.sums.clone()
        self._changed()

    def _changed(self) -> None:
        # Unassigned rows take r_i = p, so p is the mean over the assigned ones; without any, what it was.
        if self.assigned > 0:
            self.p = self.sums / self.assigned
        self.cumulative_p = self.p.cumsum(dim=0)
        self._tables.clear()

    def responsibilities(self, size: int, rows: Tensor | None = None) -> Tensor:
        """[size, K], or [M, K] for given rows."""
        count = size if rows is None else len(rows)
        result = torch.empty(count, len(self.ids), dtype=self.dtype, device="cpu")
        for start in range(0, count, BLOCK_ROWS):
            block = slice(start, min(start + BLOCK_ROWS, count))
            known = self.of(block if rows is None else rows[block])
            result[block] = torch.where(known < 0, self.p.to(known).unsqueeze(1), known).T
        return result

    @property
    def dtype(self) -> torch.dtype:
        """Of the responsibilities."""
        return self.r.dtype

    def effective_sizes(self, size: int) -> Tensor:
        """n_z = (sum_i r_iz)^2 / sum_i r_iz^2, [K]; members, where rows are labelled."""
        if self.labels is not None:
            return self.members()
        unassigned = size - self.assigned
        sums = self.sums + unassigned * self.p  # not N p, which can round to less than whole rows
        squares = self.squares + unassigned * self.p.square()
        sizes: Tensor = sums.square() / squares.clamp(min=torch.finfo(torch.float64).tiny)
        return sizes

    @property
    def labels(self) -> Tensor | None:
        """The cluster of each row, where each row is in one; -1 before it has been drawn."""
        return None if self._labels is None else self._labels[: self._labelled]

    @labels.setter
    def labels(self, labels: Tensor | None) -> None:
        self._labels = labels
        self._labelled = 0 if labels is None else len(labels)
        self._members = None

    def relabel(self, rows: Tensor, labels: Tensor) -> None:
        """Rows (distinct) go to other clusters, where each row is in one."""
        assert self._labels is not None
        if self._members is not None:
            old = self._labels[rows]
            left, came = (torch.bincount(part, minlength=len(self.ids)) for part in (old[old >= 0], labels))
            self._members += came - left
        self._labels[rows] = labels

    def members(self) -> Tensor:
        """Rows in each cluster, [K], float64, where each row is in one."""
        assert self.labels is not None
        if self._members is None:
            drawn = self.labels[self.labels >= 0]  # the others are still to be
            self._members = torch.bincount(drawn, minlength=len(self.ids)).double()
        return self._members

    def table(self, z: int, size: int) -> Tensor:
        """Cumulative weights of cluster z, [size], float64."""
        if z not in self._tables:
            weights = self.r[z, :size].double()
            self._tables[z] = torch.where(weights < 0, self.p[z], weights).cumsum(dim=0)
        return self._tables[z]

    def grow(self, size: int) -> None:
        """Rows were appended; they are unassigned."""
        if self._r is not None and size > self._r.shape[1]:
            longer = self._r.new_full((len(self._r), max(size, 2 * self._r.shape[1])), UNASSIGNED)
            longer[:, : self._r.shape[1]] = self._r
            self._r = longer
        if self._labels is not None:
            if size > len(self._labels):
                more = torch.full((max(size, 2 * len(self._labels)),), -1, device="cpu")
                more[: self._labelled] = self._labels[: self._labelled]
                self._labels = more
            self._labelled = size
        self._changed()
        if self.tailed is not None:
            self.tailed.grow(size)

    def erase(self, rows: Tensor) -> None:
        """Rows become unassigned, where r is held; `subtract` follows."""
        if self._r is not None:
            self._r[:, rows] = UNASSIGNED

    def subtract(self, r: Tensor) -> None:
        """Rows that had these responsibilities [K, M] have none any more."""
        known = r[0] >= 0
        old = r[:, known].double()
        self.sums -= old.sum(dim=1)
        self.squares -= old.square().sum(dim=1)
        self.assigned -= int(known.sum())
        if bool((self.sums < self.counted / 2).any()):
            self._count()  # before the rounding of the subtractions can be seen in what is left
        else:
            self._changed()

    def with_tails(self, numbers: Tensor, times: Tensor, clusters: Tensor) -> Partition:
        """Hard clusters, each with the rest of each trajectory after its last member; rows since then are unassigned.

        numbers, times, clusters: of the rows that there were when this clustering was made, [N]. What has become of
        the rows since does not change which were a trajectory's last members.
        """
        place = torch.full((int(max(clusters.max(), self.ids.max())) + 1,), -1, device="cpu")
        place[self.ids] = torch.arange(len(self.ids), device="cpu")
        labels = place[clusters]
        lost = (labels < 0).nonzero().squeeze(1)  # of clusters that were dissolved
        nearest = self.nearest(lost)
        if nearest is not None:
            labels[lost] = nearest
        members = torch.full((len(self.ids), self.room), UNASSIGNED, dtype=self.dtype, device="cpu")
        members[:, : len(numbers)] = with_tails(labels, len(self.ids), numbers, times).to(self.dtype)
        for start in range(0, self.room, BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            members[:, block][:, self.of(block)[0] < 0] = UNASSIGNED
        return Partition(members, self.ids, None, p=self.p)


def forget(partitions: Iterable[Partition], rows: Tensor) -> None:
    """Rows (distinct) become unassigned, in a partition and in those with fewer clusters at once."""
    family = [part for each in partitions for part in (each, each.tailed) if part is not None]
    before = [part.of(rows) for part in family]  # of all, as some read what others hold
    for part in family:
        part.erase(rows)
    for part, old in zip(family, before):
        part.subtract(old)


def _own(value: Any) -> Any:
    """A copy, whatever it was a part of."""
    return None if value is None else value.clone(memory_format=torch.contiguous_format)


def _check_form(argument: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if value.shape != shape or value.dtype != dtype:
        fail(argument, f"{dtype} {list(shape)}", f"{value.dtype} {shape_of(value)}")


def check_responsibilities(responsibilities: object, rows: int) -> None:
    """Floating [rows, K], not negative, rows that sum to one (to 1e-3)."""
    expected = f"a floating tensor [N, K] with N = {rows}"
    if not isinstance(responsibilities, Tensor):
        fail("responsibilities", expected, type(responsibilities).__name__)
    shape = responsibilities.shape
    if len(shape) != 2 or len(responsibilities) != rows or 0 in shape or not responsibilities.is_floating_point():
        fail("responsibilities", expected, f"{responsibilities.dtype} {shape_of(responsibilities)}")
    check_finite("responsibilities", responsibilities)
    lowest = float(responsibilities.min())
    miss = max(float((part.sum(dim=1) - 1).abs().max()) for part in responsibilities.split(BLOCK_ROWS))
    if lowest < 0 or miss > 1e-3:
        got = f"{lowest:g}" if lowest < 0 else f"rows that miss it by {miss:g}"
        fail("responsibilities", "values from 0, rows that sum to one", got)


def check_rows(argument: str, rows: Tensor, size: int) -> None:
    """Indices of `size` rows: int64 [M]."""
    if rows.dtype != torch.int64 or rows.ndim != 1:
        fail(argument, "int64 indices [M]", f"{rows.dtype} {shape_of(rows)}")
    if len(rows) and not (int(rows.min()) >= 0 and int(rows.max()) < size):
        fail(argument, f"indices of {size} rows", f"{int(rows.min())} to {int(rows.max())}")
