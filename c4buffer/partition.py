"""Responsibilities, cluster by cluster, with the sums that sampling needs kept exact under every change."""

from __future__ import annotations

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
        self.r = r
        self.ids = ids
        self.distances = distances
        self._labels: Tensor | None = None  # with room at the end
        self._labelled = 0
        self._members: Tensor | None = None
        self.walks = [torch.empty(0, dtype=torch.int64, device="cpu") for _ in ids]
        self.dissolved: dict[int, Partition] = {}
        self.tailed: Partition | None = None
        self._tables: dict[int, Tensor] = {}
        self.p = torch.zeros(len(ids), dtype=torch.float64, device="cpu") if p is None else p
        self._count()

    def state(self, size: int) -> dict[str, Any]:
        """All that drawing depends on, for a checkpoint of `size` rows."""
        return {
            "r": self.r[:, :size],
            "ids": self.ids,
            "distances": self.distances,
            "labels": self.labels,
            "walks": list(self.walks),
            "p": self.p,
            "sums": self.sums,
            "squares": self.squares,
            "counted": self.counted,
            "dissolved": [[z, child.state(size)] for z, child in self.dissolved.items()],
            "tailed": None if self.tailed is None else self.tailed.state(size),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], size: int) -> Partition:
        """What `state` gave for `size` rows, on memory of its own.

        Raises:
            ValueError: if its parts do not fit each other.
        """

        def own(value: Any) -> Any:
            return None if value is None else value.clone(memory_format=torch.contiguous_format)

        clusters = len(state["ids"])
        sums = ((clusters,), torch.float64)
        forms: dict[str, tuple[tuple[int, ...], torch.dtype]] = dict.fromkeys(("sums", "squares", "counted", "p"), sums)
        forms["r"] = ((clusters, size), state["r"].dtype if state["r"].is_floating_point() else torch.float32)
        if state["labels"] is not None:
            forms["labels"] = ((size,), torch.int64)
        for name, (shape, dtype) in forms.items():
            if state[name].shape != shape or state[name].dtype != dtype:
                fail(name, f"{dtype} {list(shape)}", f"{state[name].dtype} {shape_of(state[name])}")
        known = state["distances"]
        if known is not None and (known.ndim != 2 or len(known) != clusters or known.shape[1] > size):
            fail("distances", f"a shape of [{clusters}, at most {size}]", shape_of(known))
        r, labels = state["r"], state["labels"]
        if not bool(((r == UNASSIGNED) | ((r >= 0) & (r <= 1 + ROUNDING))).all()):
            fail("r", "numbers from 0 to 1, or -1 where a row is unassigned", "others")
        if labels is not None and len(labels) and not -1 <= int(labels.min()) <= int(labels.max()) < clusters:
            fail("labels", f"numbers from -1 to {clusters - 1}", f"{int(labels.min())} to {int(labels.max())}")
        if len(state["walks"]) != clusters or clusters == 0:
            fail("walks", f"one for each of {clusters} clusters, at least one", len(state["walks"]))
        for rows in state["walks"]:
            check_rows("walks", rows, size)
        partition = cls(own(state["r"]), own(state["ids"]), own(state["distances"]), p=own(state["p"]))
        partition.labels = own(state["labels"])
        partition.walks = [own(walk) for walk in state["walks"]]
        partition.sums, partition.squares, partition.counted = (own(state[n]) for n in ("sums", "squares", "counted"))
        partition.dissolved = {z: cls.from_state(child, size) for z, child in state["dissolved"]}
        partition.tailed = None if state["tailed"] is None else cls.from_state(state["tailed"], size)
        partition._changed()
        return partition

    def _count(self) -> None:
        """Sums over the assigned rows, anew."""
        self.assigned = int((self.r[0] >= 0).sum())
        self.sums = torch.zeros(len(self.r), dtype=torch.float64, device="cpu")
        self.squares = torch.zeros_like(self.sums)
        for part in self.r.split(BLOCK_ROWS, dim=1):
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
        r = self.r[:, :size] if rows is None else self.r[:, rows]
        result = torch.empty(r.shape[1], len(r), dtype=r.dtype, device="cpu")
        for part, known in zip(result.split(BLOCK_ROWS), r.split(BLOCK_ROWS, dim=1)):
            part.copy_(torch.where(known < 0, self.p.to(r.dtype).unsqueeze(1), known).T)
        return result

    def effective_sizes(self, size: int) -> Tensor:
        """n_z = (sum_i r_iz)^2 / sum_i r_iz^2, [K]; members, where rows are labelled."""
        if self.labels is not None:
            return self.members()
        unassigned = size - self.assigned
        sums = self.sums + unassigned * self.p  # not N p, which can round to less than whole rows
        squares = self.squares + unassigned * self.p.square()
        return sums.square() / squares.clamp(min=torch.finfo(torch.float64).tiny)

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
        if size > self.r.shape[1]:
            room = max(size, 2 * self.r.shape[1])
            r = torch.full((len(self.r), room), UNASSIGNED, dtype=self.r.dtype, device="cpu")
            r[:, : self.r.shape[1]] = self.r
            self.r = r
        if self._labels is not None:
            if size > len(self._labels):
                longer = torch.full((max(size, 2 * len(self._labels)),), -1, device="cpu")
                longer[: self._labelled] = self._labels[: self._labelled]
                self._labels = longer
            self._labelled = size
        self._changed()
        for child in self._derived():
            child.grow(size)

    def forget(self, rows: Tensor) -> None:
        """Rows (distinct) become unassigned."""
        old = self.r[:, rows]
        known = old[0] >= 0
        old = old[:, known].double()
        self.sums -= old.sum(dim=1)
        self.squares -= old.square().sum(dim=1)
        self.assigned -= int(known.sum())
        self.r[:, rows] = UNASSIGNED
        if bool((self.sums < self.counted / 2).any()):
            self._count()  # before the rounding of the subtractions can be seen in what is left
        else:
            self._changed()
        for child in self._derived():
            child.forget(rows)

    def _derived(self) -> list[Partition]:
        return [*self.dissolved.values(), *([self.tailed] if self.tailed is not None else [])]

    def without(self, z: int) -> Partition:
        """The partition with cluster z dropped and the others renormalised."""
        keep = all_but(z, len(self.ids))
        remains = torch.empty(len(keep), self.r.shape[1], dtype=self.r.dtype, device="cpu")
        distances = None if self.distances is None else self.distances[keep]
        for start in range(0, self.r.shape[1], BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            # r_iw / (1 - r_iz) in log space: what is left of r may be tiny, but not zero
            log_r = self.r[keep, block].clamp(min=0).double().log()
            left = torch.softmax(log_r, dim=0).to(self.r.dtype)
            unassigned = self.r[0, block] < 0
            lost = torch.isneginf(log_r).all(dim=0)
            if distances is not None and block.start < distances.shape[1] and bool((lost & ~unassigned).any()):
                rows = (lost & ~unassigned).nonzero().squeeze(1)
                nearest = distances[:, start + rows].argmin(dim=0)
                left[:, rows] = torch.nn.functional.one_hot(nearest, len(keep)).T.to(left.dtype)
                lost = unassigned
            left[:, unassigned | lost] = UNASSIGNED
            remains[:, block] = left
        p = self.p[keep]
        return Partition(remains, self.ids[keep], distances, p=p / p.sum() if bool(p.any()) else (p + 1) / len(p))

    def with_tails(self, numbers: Tensor, times: Tensor, clusters: Tensor) -> Partition:
        """Hard clusters, each with the rest of each trajectory after its last member; rows since then are unassigned.

        numbers, times, clusters: of the rows that there were when this clustering was made, [N]. What has become of
        the rows since does not change which were a trajectory's last members.
        """
        place = torch.full((int(max(clusters.max(), self.ids.max())) + 1,), -1, device="cpu")
        place[self.ids] = torch.arange(len(self.ids), device="cpu")
        labels = place[clusters]
        lost = (labels < 0).nonzero().squeeze(1)  # of clusters that were dissolved
        if self.distances is not None:
            labels[lost] = self.distances[:, lost].argmin(dim=0)
        members = torch.full_like(self.r, UNASSIGNED)
        members[:, : len(numbers)] = with_tails(labels, len(self.ids), numbers, times).to(self.r.dtype)
        members[:, (self.r < 0)[0]] = UNASSIGNED
        return Partition(members, self.ids, None, p=self.p)


def all_but(z: int, clusters: int) -> Tensor:
    """The numbers of the other clusters, in order."""
    numbers = torch.arange(clusters, device="cpu")
    return numbers[numbers != z]


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
