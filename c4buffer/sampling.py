"""Responsibilities -> single-cluster index batches."""

from __future__ import annotations

from collections import deque
from typing import Any, Literal

import torch
from torch import Tensor

from ._checks import check_integer, fail
from .dissolved import Less
from .drawing import rows_of_clusters, uniform_rows, uniforms
from .partition import BLOCK_ROWS, Partition, check_responsibilities, check_rows, forget

BLOCK_INDICES = 1 << 14  # drawn ahead at most, and at most BLOCK_BATCHES batches
BLOCK_BATCHES = 64
SETTLED = 1 / 8  # of the rows; when so many indices were drawn since the last change, tables pay


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

    Exact at any size that memory holds, to 1e8 rows and more. Memory: K responsibilities a row (4 K bytes in float32)
    and K ranks (K bytes); 8 bytes a row for each cluster of a share below 1/16 that is drawn from a table of cumulative
    weights; 16 bytes a row without replacement; the first again, less the clusters dissolved, for each batch size that
    dissolves some; and 128 kB of rows drawn ahead for each cluster.

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
        self.replacement = bool(replacement)
        self.size = 0
        self._partition: Partition | None = None
        self._dissolved: dict[tuple[int, ...], Less] = {}  # by the ids that are kept
        self._trajectories: tuple[Tensor, Tensor, Tensor] | None = None  # numbers, times, clusters; when assigned
        # the walk over all rows, before any clustering
        self._everything = torch.empty(0, dtype=torch.int64, device="cpu")
        self._ahead: deque[tuple[Tensor, int]] = deque()
        self._ahead_for = 0
        self._block = 1
        self._drawn = 0  # indices, since the last change
        self._pools: list[Tensor] = []  # of each cluster, rows that were drawn with it and not yet given out
        self._changing = False  # still, after an interrupt: what does not follow from r is to be made anew

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
        """Whether a row is held that a clustering has seen. When the last is overwritten, p stays as it was."""
        return self._partition is not None and self._clustered().assigned > 0

    def extend(self, rows: int) -> None:
        """Rows were appended at the end."""
        size = self.size + rows
        partitions = self._partitions()
        self._changing = True
        for partition in partitions:
            partition.grow(size)
            self._label(partition, torch.arange(self.size, size, device="cpu"))
        self.forget_ahead()
        self.size, self._changing = size, False  # last: an interrupt before leaves what another call puts right

    def overwrite(self, rows: Tensor) -> None:
        """Rows [M] hold new transitions."""
        rows, partitions = rows.unique(), self._partitions()
        self._changing = True
        forget(partitions, rows)
        for partition in partitions:
            self._label(partition, rows)
            self._rehouse(partition)
        self.forget_ahead()
        self._changing = False

    def assign(
        self,
        responsibilities: Tensor,
        *,
        distances: Tensor | None = None,
        trajectories: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Take a clustering of all rows.

        Args:
            responsibilities: [N, K], not negative, rows that sum to one; float32 or float64, 16 bits are widened.
            distances: of each row to each cluster's mean, or any numbers in the order of those, [N, K], for rows that
                dissolving leaves without a cluster. None: such rows take r_i = p.
            trajectories: of each row the number of its trajectory and its place in the order of time, int64 [N] each.
                Given, each cluster is drawn with the rest of each trajectory after its last member there, in proportion
                to its size, and rows are not equally likely. For assignment="hard" with replacement.
        """
        if isinstance(responsibilities, Tensor) and responsibilities.dtype in (torch.float16, torch.bfloat16):
            responsibilities = responsibilities.float()  # in which rows sum to one closely enough
        check_responsibilities(responsibilities, self.size)
        if trajectories is not None and not (self.replacement and self.assignment == "hard"):
            fail("trajectories", "None, unless assignment='hard' with replacement", "some")
        r = torch.empty(responsibilities.shape[1], self.size, dtype=responsibilities.dtype, device="cpu")
        for start, part in zip(range(0, self.size, BLOCK_ROWS), responsibilities.detach().split(BLOCK_ROWS)):
            if self.assignment == "hard":
                part = torch.zeros_like(part).scatter_(1, part.argmax(dim=1, keepdim=True), 1)
            # Exactly one, or rows would be drawn as often as their sum says.
            r[:, start : start + len(part)] = (part / part.sum(dim=1, keepdim=True)).T
        d = None if distances is None else distances.T.cpu().contiguous()
        partition = Partition(r, torch.arange(len(r), device="cpu"), d)
        # copies: the ring numbers its rows anew, while the clusters are those of these rows
        places = None if trajectories is None else (trajectories[0].clone(), trajectories[1].clone(), r.argmax(dim=0))
        if not self.replacement:
            partition.labels = torch.full((self.size,), -1, device="cpu")
            self._label(partition, torch.arange(self.size, device="cpu"))
        self.forget_ahead()
        # at once: an interrupt before leaves the clusters that there were
        self._partition, self._dissolved, self._trajectories, self._changing = partition, {}, places, False

    def state(self) -> dict[str, Any]:
        """All that the batches to come depend on, for a checkpoint."""
        self._settle()
        return {
            "assignment": self.assignment,
            "replacement": self.replacement,
            "size": self.size,
            "generator": self.generator.get_state(),
            "partition": None if self._partition is None else self._partition.state(self.size),
            "dissolved": [less.state(self.size) for less in self._dissolved.values()],
            "trajectories": self._trajectories,
            "everything": self._everything,
            "ahead_rows": [rows for rows, _ in self._ahead],
            "ahead_clusters": [cluster for _, cluster in self._ahead],
            "ahead_for": self._ahead_for,
            "block": self._block,
            "drawn": self._drawn,
            "pools": list(self._pools),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take what `state` gave, from a sampler of the same options."""
        for name in ("assignment", "replacement"):
            if state[name] != getattr(self, name):
                fail(name, repr(state[name]), repr(getattr(self, name)))
        size = state["size"]
        partition = None if state["partition"] is None else Partition.from_state(state["partition"], size)
        less = [] if partition is None else [Less.of_state(partition, part, size) for part in state["dissolved"]]
        if partition is not None and (partition.labels is None) == (not self.replacement):
            fail("labels", "those of the rows" if partition.labels is None else "none, with replacement", "the other")
        for rows in (state["everything"], *state["ahead_rows"], *state["pools"]):
            check_rows("rows drawn ahead", rows, size)
        if any((each.labels is None) == (not self.replacement) for each in less):
            fail("labels", "those of the rows, or none with replacement", "others in what is dissolved")
        block = check_integer("block", state["block"], minimum=1)
        ahead_for = check_integer("ahead_for", state["ahead_for"], minimum=0)
        drawn_since = check_integer("drawn", state["drawn"], minimum=0)
        drawn, clusters = state["ahead_rows"], state["ahead_clusters"]
        known = [-1] if partition is None else partition.ids.tolist()
        if len(drawn) != len(clusters) or any(len(rows) != ahead_for for rows in drawn) or set(clusters) - set(known):
            fail("rows drawn ahead", f"batches of {ahead_for}, each with its cluster", "others")
        trajectories = state["trajectories"]
        if trajectories is not None:
            numbers, times, places = (part.clone() for part in trajectories)
            if not numbers.shape == times.shape == places.shape or numbers.ndim != 1 or len(numbers) > size:
                fail("trajectories", f"those of at most {size} rows", "others")
            check_rows("trajectories", places, len(state["partition"]["ids"]))
        self.generator.set_state(state["generator"].clone())
        self._partition, self.size = partition, size
        self._dissolved = {tuple(each.ids.tolist()): each for each in less}
        self._trajectories = None if trajectories is None else (numbers, times, places)
        self._everything = state["everything"].clone()
        self._ahead = deque(zip([rows.clone() for rows in drawn], clusters))
        self._ahead_for, self._block, self._drawn = ahead_for, block, drawn_since
        self._pools = [rows.clone() for rows in state["pools"]]

    def sample(self, batch_size: int) -> tuple[Tensor, int]:
        """Row indices [batch_size], int64, and the cluster they come from (-1: no clustering yet)."""
        batch_size = self.check(batch_size)
        self._settle()
        if not self.replacement:
            return self._walk(batch_size)
        if self._ahead_for != batch_size:
            self.forget_ahead()
            self._ahead_for = batch_size
        if not self._ahead:
            self._draw_ahead(batch_size)
        return self._ahead.popleft()

    def rows_of(self, cluster: int, count: int, *, batch_size: int) -> Tensor:
        """More rows [count] of a cluster that `sample(batch_size)` gave, with replacement: P(i) = r_iz / sum_j r_jz."""
        partition = self._partition_for(batch_size)
        counts = (partition.ids == cluster) * count
        return torch.cat(self._draw_rows(partition, counts.tolist()))

    def check(self, batch_size: int) -> int:
        """The size as an int; ValueError for a batch that can not be drawn, whatever the clusters."""
        batch_size = check_integer("batch_size", batch_size, minimum=1)
        if self.size == 0:
            fail("buffer", "transitions to draw from", "an empty buffer")
        if not self.replacement and batch_size > self.size:
            fail("batch_size", f"at most the {self.size} transitions held, without replacement", batch_size)
        return batch_size

    def partition_for(self, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """What batches of this size are drawn from, clusters too small for it dissolved.

        Returns:
            Cluster ids [K'], responsibilities [N, K'] and probabilities [K'].
        """
        partition = self._partition_for(batch_size)
        return partition.ids, partition.responsibilities(self.size), partition.p / partition.p.sum()

    def _clustered(self) -> Partition:
        if self._partition is None:
            fail("buffer", "a refresh before its clusters are asked for", "no clusters")
        self._settle()
        return self._partition

    def _settle(self) -> None:
        """After an interrupt in the middle of a change: rows that r does not know are unassigned, all else follows."""
        if self._changing:
            self._dissolved = {}
            if self._partition is not None:
                self._partition.recount()
            self.forget_ahead()
            self._changing = False

    def _partitions(self) -> list[Partition]:
        """With all clusters, and with some dissolved."""
        self._settle()
        return [] if self._partition is None else [self._partition, *self._dissolved.values()]

    def _partition_for(self, batch_size: int) -> Partition:
        partition = self._clustered()
        clusters = len(partition.ids)
        chain: dict[tuple[int, ...], Less] = {}
        while len(partition.ids) > 1:
            sizes = partition.effective_sizes(self.size)
            smallest = int(sizes.argmin())
            if float(sizes[smallest]) >= batch_size:
                break
            partition = less = self._without(partition, smallest)
            chain[tuple(less.ids.tolist())] = less
        if len(self._dissolved) > clusters:  # with time, others have gone first
            self._dissolved = chain
        if self._trajectories is None:
            return partition
        if partition.tailed is None:
            partition.tailed = partition.with_tails(*self._trajectories)
        return partition.tailed

    def _without(self, partition: Partition, z: int) -> Less:
        """The partition without its z-th cluster, made once and then kept in step with it."""
        kept = (torch.arange(len(partition.ids), device="cpu") != z).nonzero().squeeze(1)
        ids = tuple(partition.ids[kept].tolist())
        if ids not in self._dissolved:
            whole = self._clustered()
            keep = torch.isin(whole.ids, partition.ids[kept]).nonzero().squeeze(1)
            less = Less(whole, keep)
            if partition.labels is not None:
                less.labels = torch.searchsorted(kept, partition.labels)
                self._label(less, (partition.labels == z).nonzero().squeeze(1))
            self._dissolved[ids] = less
        return self._dissolved[ids]

    def _label(self, partition: Partition, rows: Tensor) -> None:
        """Without replacement: z_i ~ Cat(r_i) for rows."""
        if partition.labels is None:
            return
        cumulative = partition.responsibilities(self.size, rows).double().cumsum(dim=1)
        u = torch.rand(len(rows), 1, generator=self.generator, dtype=torch.float64, device="cpu")
        labels = (u * cumulative[:, -1:] >= cumulative).sum(dim=1).clamp(max=len(partition.ids) - 1)
        partition.relabel(rows, labels)

    def _rehouse(self, partition: Partition) -> None:
        """Without replacement: rows that no clustering has seen leave clusters that lost all who belonged to them."""
        if partition.labels is None:
            return
        if bool(((partition.p == 0) & (partition.members() > 0)).any()):
            self._label(partition, (partition.p == 0)[partition.labels].nonzero().squeeze(1))

    def forget_walks(self) -> None:
        """Without replacement: rows to come are shuffled anew."""
        self._everything = self._everything[:0]
        for partition in self._partitions():
            partition.walks = [walk[:0] for walk in partition.walks]

    def forget_ahead(self) -> None:
        """Batches to come are drawn by everything as it is now."""
        self._ahead.clear()
        self._pools.clear()
        self._block = 1
        self._drawn = 0

    def _draw_ahead(self, batch_size: int) -> None:
        """Fill the queue: one batch after a change (of size, too), then twice as many each time until the next."""
        batches = max(1, min(self._block, BLOCK_INDICES // batch_size))
        self._block = min(2 * self._block, BLOCK_BATCHES)
        if self._partition is None:
            rows = uniform_rows(batches * batch_size, self.size, self.generator)
            self._ahead.extend((part, -1) for part in rows.split(batch_size))
            return
        partition = self._partition_for(batch_size)
        u = uniforms(batches, self.generator) * partition.cumulative_p[-1]
        drawn = torch.searchsorted(partition.cumulative_p, u, right=True).clamp_(max=len(partition.ids) - 1)
        counts = torch.bincount(drawn, minlength=len(partition.ids)) * batch_size
        pools = [iter(rows.split(batch_size)) for rows in self._draw_rows(partition, counts.tolist())]
        ids = partition.ids.tolist()
        self._ahead.extend((next(pools[z]), ids[z]) for z in drawn.tolist())

    def _draw_rows(self, partition: Partition, counts: list[int]) -> list[Tensor]:
        """So many rows of each cluster."""
        self._drawn += sum(counts)
        return rows_of_clusters(
            partition,
            counts,
            self._pools,
            size=self.size,
            generator=self.generator,
            settled=self._drawn > SETTLED * self.size,
            overlapping=self._trajectories is not None,  # with tails a row can be in several clusters
        )

    def _walk(self, batch_size: int) -> tuple[Tensor, int]:
        if self._partition is None:
            rows, self._everything = self._next_of_walk(self._everything, batch_size)
            return rows, -1
        partition = self._partition_for(batch_size)
        shares = partition.members().cumsum(dim=0)
        u = uniforms(1, self.generator) * shares[-1]
        z = int(torch.searchsorted(shares, u, right=True).clamp(max=len(shares) - 1))
        rows, partition.walks[z] = self._next_of_walk(partition.walks[z], batch_size, partition.labels, z)
        return rows, int(partition.ids[z])

    def _next_of_walk(
        self, walk: Tensor, batch_size: int, labels: Tensor | None = None, z: int = 0
    ) -> tuple[Tensor, Tensor]:
        """The next rows of a walk that are still in cluster z, and what is left of it; a new walk where too few are."""
        for chunk in (walk[: 2 * batch_size], walk):
            whole = torch.ones(len(chunk), dtype=torch.bool, device="cpu")
            inside = (whole if labels is None else labels[chunk] == z).nonzero().squeeze(1)
            if len(inside) >= batch_size:
                taken = inside[:batch_size]
                return chunk[taken], walk[int(taken[-1]) + 1 :]
        members = torch.arange(self.size, device="cpu") if labels is None else (labels == z).nonzero().squeeze(1)
        walk = members[torch.randperm(len(members), generator=self.generator, device="cpu")]
        return walk[:batch_size], walk[batch_size:]
