"""Responsibilities -> single-cluster index batches."""

from __future__ import annotations

from collections import deque
from typing import Literal

import torch
from torch import Tensor

from ._checks import check_finite, check_integer, fail, shape_of

BLOCK_INDICES = 1 << 14  # drawn ahead at most, and at most BLOCK_BATCHES batches
BLOCK_BATCHES = 64
PROPOSALS = 1 << 18  # at once, in rejection
SMALLEST_SHARE_BY_REJECTION = 1 / 16  # below it, a table of cumulative weights
UNASSIGNED = -1.0


class SingleClusterSampler:
    """Draws index batches, each from one cluster, so that over batches every row is equally likely.

    One batch: z ~ Cat(p), p_z = mean_i r_iz; then B indices with replacement, P(i) = r_iz / sum_j r_jz. As
    sum_z p_z r_iz / sum_j r_jz = 1/N, no row is favoured. Rows that no clustering has seen (added or overwritten since)
    take r_i = p. Before any clustering, rows are drawn uniformly and the cluster is -1.

    Without replacement, each row belongs to one cluster z_i ~ Cat(r_i), drawn once per clustering, and each cluster is
    walked in random order (z ~ its share of the rows; a rest smaller than a batch is shuffled in again).

    For a batch size that the smallest cluster can not fill, clusters are dissolved: while the smallest effective size
    n_z = (sum_i r_iz)^2 / sum_i r_iz^2 is under the batch size, that cluster is dropped and the rest renormalised in
    log space; a row that no remaining cluster explains goes to the nearest remaining mean.

    Args:
        generator: on the CPU; the only source of randomness. 53-bit uniforms, drawn ahead in blocks.
        assignment: "soft", or "hard": each row belongs to its arg-max cluster, p formed after that.
        replacement: within a cluster.
    """

    def __init__(
        self,
        *,
        generator: torch.Generator,
        assignment: Literal["soft", "hard"] = "soft",
        replacement: bool = True,
    ) -> None:
        self.generator = generator
        self.assignment = assignment
        self.replacement = replacement
        self.size = 0
        self._partition: _Partition | None = None
        self._everything = torch.empty(0, dtype=torch.int64)  # the walk over all rows, before any clustering
        self._ahead: deque[tuple[Tensor, int]] = deque()
        self._ahead_for = 0
        self._block = 1

    @property
    def responsibilities(self) -> Tensor:
        """r as it stands, [N, K]: unassigned rows have r_i = p."""
        return self._clustered().responsibilities(self.size)

    @property
    def probabilities(self) -> Tensor:
        """p_z = mean_i r_iz as it stands, [K], float64, before any dissolving."""
        return self._clustered().p.clone()

    @property
    def clustered(self) -> bool:
        """Whether there are clusters to draw from."""
        return self._partition is not None

    def extend(self, rows: int) -> None:
        """Rows were appended at the end."""
        self.size += rows
        if self._partition is not None:
            self._partition.grow(self.size)
            self._label(self._partition, torch.arange(self.size - rows, self.size))
        self._forget_ahead()

    def overwrite(self, rows: Tensor) -> None:
        """Rows [M] hold new transitions."""
        rows = rows.unique()
        if self._partition is not None:
            self._partition.forget(rows)
            if self._partition.assigned == 0:
                self._partition = None
            else:
                self._label(self._partition, rows)
        self._forget_ahead()

    def assign(self, responsibilities: Tensor, *, distances: Tensor | None = None) -> None:
        """Take a clustering of all rows.

        Args:
            responsibilities: [N, K], not negative, rows that sum to one; float32 or float64.
            distances: of each row to each cluster's mean, [N, K], for rows that dissolving leaves without a cluster.
                None: such rows take r_i = p.
        """
        check_responsibilities(responsibilities, self.size)
        # Exactly one, or rows would be drawn as often as their sum says.
        r = (responsibilities / responsibilities.sum(dim=1, keepdim=True)).detach().T.cpu()
        if self.assignment == "hard":
            r = torch.nn.functional.one_hot(r.argmax(dim=0), len(r)).T.to(r.dtype)
        d = None if distances is None else distances.T.float().cpu().contiguous()
        self._partition = _Partition(r.contiguous(), torch.arange(len(r)), d)
        if not self.replacement:
            self._partition.labels = torch.full((self.size,), -1)
            self._label(self._partition, torch.arange(self.size))
        self._forget_ahead()

    def sample(self, batch_size: int) -> tuple[Tensor, int]:
        """Row indices [batch_size], int64, and the cluster they come from (-1: no clustering yet)."""
        check_integer("batch_size", batch_size, minimum=1)
        if self.size == 0:
            fail("buffer", "transitions to draw from", "an empty buffer")
        if not self.replacement:
            return self._walk(batch_size)
        if self._ahead_for != batch_size:
            self._forget_ahead()
            self._ahead_for = batch_size
        if not self._ahead:
            self._draw_ahead(batch_size)
        return self._ahead.popleft()

    def partition_for(self, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """What batches of this size are drawn from, clusters too small for it dissolved.

        Returns:
            Cluster ids [K'], responsibilities [N, K'] and probabilities [K'].
        """
        partition = self._partition_for(batch_size)
        return partition.ids, partition.responsibilities(self.size), partition.p

    def _clustered(self) -> _Partition:
        if self._partition is None:
            fail("buffer", "a refresh before its clusters are asked for", "no clusters")
        return self._partition

    def _partition_for(self, batch_size: int) -> _Partition:
        partition = self._clustered()
        while len(partition.ids) > 1:
            sizes = partition.effective_sizes(self.size)
            smallest = int(sizes.argmin())
            if float(sizes[smallest]) >= batch_size:
                break
            partition = self._without(partition, smallest)
        return partition

    def _without(self, partition: _Partition, z: int) -> _Partition:
        """The partition without its z-th cluster, made once and then kept in step with it."""
        known = partition.dissolved.get(z)
        if known is None:
            known = partition.dissolved[z] = partition.without(z)
            if partition.labels is not None:
                remaining = torch.cat([torch.arange(z), torch.arange(z + 1, len(partition.ids))])
                known.labels = torch.searchsorted(remaining, partition.labels)
                homeless = (partition.labels == z).nonzero().squeeze(1)
                self._label(known, homeless)
        return known

    def _label(self, partition: _Partition, rows: Tensor) -> None:
        """Without replacement: z_i ~ Cat(r_i) for rows, in the partition and in those dissolved from it."""
        if partition.labels is None:
            return
        cumulative = partition.responsibilities(self.size, rows).double().cumsum(dim=1)
        u = torch.rand(len(rows), 1, generator=self.generator, dtype=torch.float64)
        labels = (u * cumulative[:, -1:] >= cumulative).sum(dim=1).clamp(max=len(partition.ids) - 1)
        partition.relabel(rows, labels)
        for child in partition.dissolved.values():
            self._label(child, rows)

    def _forget_ahead(self) -> None:
        self._ahead.clear()
        self._block = 1

    def _uniforms(self, count: int) -> Tensor:
        return torch.rand(count, generator=self.generator, dtype=torch.float64)

    def _uniform_rows(self, count: int) -> Tensor:
        return (self._uniforms(count) * self.size).long().clamp_(max=self.size - 1)

    def _draw_ahead(self, batch_size: int) -> None:
        """Fill the queue: one batch after a change (of size, too), then twice as many each time until the next."""
        batches = max(1, min(self._block, BLOCK_INDICES // batch_size))
        self._block = min(2 * self._block, BLOCK_BATCHES)
        if self._partition is None:
            rows = self._uniform_rows(batches * batch_size)
            self._ahead.extend((part, -1) for part in rows.split(batch_size))
            return
        partition = self._partition_for(batch_size)
        u = self._uniforms(batches) * partition.cumulative_p[-1]
        drawn = torch.searchsorted(partition.cumulative_p, u, right=True).clamp_(max=len(partition.ids) - 1)
        counts = torch.bincount(drawn, minlength=len(partition.ids)).tolist()
        pools = [
            iter(self._draw_rows(partition, z, count * batch_size).split(batch_size)) if count else iter(())
            for z, count in enumerate(counts)
        ]
        ids = partition.ids.tolist()
        self._ahead.extend((next(pools[z]), ids[z]) for z in drawn.tolist())

    def _draw_rows(self, partition: _Partition, z: int, count: int) -> Tensor:
        """`count` rows with P(i) = r_iz / sum_j r_jz."""
        if len(partition.ids) == 1:
            return self._uniform_rows(count)
        p = float(partition.p[z])
        if p < SMALLEST_SHARE_BY_REJECTION:
            table = partition.table(z, self.size)
            rows = torch.searchsorted(table, self._uniforms(count) * table[-1], right=True)
            return rows.clamp_(max=self.size - 1)
        accepted: list[Tensor] = []
        missing = count
        while missing > 0:
            # i uniform, accepted with r_iz: one in 1 / p_z is.
            proposed = self._uniform_rows(min(PROPOSALS, int(1.1 * missing / p) + 16))
            weight = partition.r[z].index_select(0, proposed)
            weight = torch.where(weight < 0, p, weight)
            accepted.append(proposed[self._uniforms(len(proposed)) < weight][:missing])
            missing -= len(accepted[-1])
        return accepted[0] if len(accepted) == 1 else torch.cat(accepted)

    def _walk(self, batch_size: int) -> tuple[Tensor, int]:
        if batch_size > self.size:
            fail("batch_size", f"at most the {self.size} transitions held, without replacement", batch_size)
        if self._partition is None:
            rows, self._everything = self._next_of_walk(self._everything, batch_size)
            return rows, -1
        partition = self._partition_for(batch_size)
        shares = partition.members().cumsum(dim=0)
        z = int(torch.searchsorted(shares, self._uniforms(1) * shares[-1], right=True).clamp(max=len(shares) - 1))
        rows, partition.walks[z] = self._next_of_walk(partition.walks[z], batch_size, partition.labels, z)
        return rows, int(partition.ids[z])

    def _next_of_walk(
        self, walk: Tensor, batch_size: int, labels: Tensor | None = None, z: int = 0
    ) -> tuple[Tensor, Tensor]:
        """The next rows of a walk that are still in cluster z, and what is left of it; a new walk where too few are."""
        for chunk in (walk[: 2 * batch_size], walk):
            inside = torch.arange(len(chunk)) if labels is None else (labels[chunk] == z).nonzero().squeeze(1)
            if len(inside) >= batch_size:
                taken = inside[:batch_size]
                return chunk[taken], walk[int(taken[-1]) + 1 :]
        members = torch.arange(self.size) if labels is None else (labels == z).nonzero().squeeze(1)
        walk = members[torch.randperm(len(members), generator=self.generator)]
        return walk[:batch_size], walk[batch_size:]


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
    miss = float((responsibilities.sum(dim=1) - 1).abs().max())
    if lowest < 0 or miss > 1e-3:
        got = f"{lowest:g}" if lowest < 0 else f"rows that miss it by {miss:g}"
        fail("responsibilities", "values from 0, rows that sum to one", got)


class _Partition:
    """Responsibilities of K clusters, column by column, and the sums that sampling needs, exact under every change.

    r: [K, n], -1 where a row is unassigned (n is at least the number of rows).
    """

    def __init__(self, r: Tensor, ids: Tensor, distances: Tensor | None) -> None:
        self.r = r
        self.ids = ids
        self.distances = distances
        self.labels: Tensor | None = None
        self._members: Tensor | None = None
        self.walks = [torch.empty(0, dtype=torch.int64) for _ in ids]
        self.dissolved: dict[int, _Partition] = {}
        self._tables: dict[int, Tensor] = {}
        self._count()

    def _count(self) -> None:
        """Sums over the assigned rows, anew."""
        here = self.r.clamp(min=0).double()  # a float32 loses the squares of what is below 1e-23
        self.assigned = int((self.r[0] >= 0).sum())
        self.sums = here.sum(dim=1)
        self.squares = here.square().sum(dim=1)
        self.counted = self.sums.clone()
        self._changed()

    def _changed(self) -> None:
        # Unassigned rows take r_i = p, so p is the mean over the assigned ones.
        self.p = self.sums / max(1, self.assigned)
        self.cumulative_p = self.p.cumsum(dim=0)
        self._tables.clear()

    def responsibilities(self, size: int, rows: Tensor | None = None) -> Tensor:
        """[size, K], or [M, K] for given rows."""
        r = self.r[:, :size] if rows is None else self.r[:, rows]
        return torch.where(r < 0, self.p.to(r.dtype).unsqueeze(1), r).T.contiguous()

    def effective_sizes(self, size: int) -> Tensor:
        """n_z = (sum_i r_iz)^2 / sum_i r_iz^2, [K]; members, where rows are labelled."""
        if self.labels is not None:
            return self.members()
        unassigned = size - self.assigned
        sums = self.sums + unassigned * self.p  # not N p, which can round to less than whole rows
        squares = self.squares + unassigned * self.p.square()
        return sums.square() / squares.clamp(min=torch.finfo(torch.float64).tiny)

    def relabel(self, rows: Tensor, labels: Tensor) -> None:
        """Rows (distinct) go to other clusters, where each row is in one."""
        assert self.labels is not None
        self.labels[rows] = labels
        self._members = None

    def members(self) -> Tensor:
        """Rows in each cluster, [K], float64, where each row is in one."""
        assert self.labels is not None
        if self._members is None:
            self._members = torch.bincount(self.labels, minlength=len(self.ids)).double()
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
            r = torch.full((len(self.r), room), UNASSIGNED, dtype=self.r.dtype)
            r[:, : self.r.shape[1]] = self.r
            self.r = r
        if self.labels is not None:
            self.labels = torch.cat([self.labels, torch.full((size - len(self.labels),), -1)])
        self._changed()
        for child in self.dissolved.values():
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
        for child in self.dissolved.values():
            child.forget(rows)

    def without(self, z: int) -> _Partition:
        """The partition with cluster z dropped and the others renormalised."""
        keep = torch.cat([torch.arange(z), torch.arange(z + 1, len(self.ids))])
        r = self.r[keep]
        unassigned = self.r[0] < 0
        # r_iw / (1 - r_iz) in log space: what is left of r may be tiny, but not zero
        log_r = r.clamp(min=0).double().log()
        remains = torch.softmax(log_r, dim=0).to(r.dtype)
        lost = torch.isneginf(log_r).all(dim=0) & ~unassigned
        distances = None if self.distances is None else self.distances[keep]
        if distances is not None and bool(lost.any()):
            rows = lost.nonzero().squeeze(1)
            nearest = distances[:, rows].argmin(dim=0)
            remains[:, rows] = torch.nn.functional.one_hot(nearest, len(keep)).T.to(r.dtype)
            lost = torch.zeros_like(lost)
        remains[:, unassigned | lost] = UNASSIGNED
        return _Partition(remains, self.ids[keep], distances)
