"""Rows by their numbers: drawn one cluster at a time, and clustered again when it is due."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor

from ._checks import check_choice, check_integer, check_number, fail
from .clustering import Clusterer
from .critics import Critics
from .embedding import EMBEDDINGS, Embedding, embed_rows
from .inference import in_full_precision
from .partition import check_rows
from .reduction import Reduction, reducing
from .refresh import OnDrift, RefreshPolicy, RefreshReport, refreshed
from .sampling import SingleClusterSampler
from .transitions import Transitions

Read = Callable[[int, int], Transitions]


class ClusteredRows:
    """What replay buffers share, of whatever host: they hold the rows, and give a way to read them.

    Args:
        n_clusters, embedding, refresh, clusterer, max_dim, reduction, assignment, replacement, trajectory_tail, seed:
            as those of `ClusteredReplayBuffer`.
    """

    def __init__(
        self,
        *,
        n_clusters: int | Literal["auto"],
        embedding: Embedding,
        refresh: RefreshPolicy | None,
        clusterer: Clusterer | None,
        max_dim: int = 256,
        reduction: Reduction = "projection",
        assignment: Literal["soft", "hard"],
        replacement: bool,
        trajectory_tail: bool = False,
        seed: int | None,
    ) -> None:
        if n_clusters != "auto":
            n_clusters = check_integer("n_clusters", n_clusters, minimum=1)
        if not callable(embedding):
            check_choice("embedding", embedding, tuple(EMBEDDINGS))
        if refresh is not None and not callable(refresh):
            fail("refresh", "a callable or None, as Every(1000)", repr(refresh))
        if isinstance(refresh, OnDrift):
            refresh.check_clusterer(clusterer)
        check_choice("assignment", assignment, ("soft", "hard"))
        if trajectory_tail and not replacement:
            fail("trajectory_tail", "replacement=True, as a transition can be in several clusters", "replacement=False")
        if seed is not None:
            seed = check_integer("seed", seed, minimum=0)
        self.generator = torch.Generator().manual_seed(torch.initial_seed() if seed is None else seed)
        self.clusterer = reducing(clusterer, n_clusters, generator=self.generator, max_dim=max_dim, reduction=reduction)
        self.policy = refresh
        self.sampler = SingleClusterSampler(
            generator=self.generator, assignment="hard" if trajectory_tail else assignment, replacement=replacement
        )
        self.n_clusters = n_clusters
        self.batches = 0
        self.last_report: RefreshReport | None = None
        self._embedding = embedding
        self._next_refresh = 0  # the batch before which one is due, where no policy was given

    def sample(self, batch_size: int) -> tuple[Tensor, int]:
        """Row numbers [batch_size], int64, and their cluster; -1 before the first clustering."""
        rows, cluster = self.sampler.sample(batch_size)
        self.batches += 1
        return rows, cluster

    def due(self, holder: Any) -> bool:
        """Whether to cluster before the next batch, by the policy, which is shown `holder`."""
        if self.policy is not None:
            return self.policy(self.batches, holder)
        # Counted from the last refresh: while N grows, multiples of N // 10 can follow each other batch by batch.
        lost = self.last_report is not None and not self.sampler.clustered  # every row has been overwritten
        return lost or self.batches >= self._next_refresh

    @in_full_precision
    def refresh(
        self,
        critics: Critics,
        read: Read,
        *,
        device: torch.device,
        trajectories: tuple[Tensor, Tensor] | None = None,
    ) -> RefreshReport:
        """Cluster all rows by the critics as they are (see `refreshed`). When it fails, batches go on as before."""
        rows = self.sampler.size
        if rows == 0:
            fail("refresh", "transitions to cluster", "an empty buffer")
        self.last_report = refreshed(
            self.sampler,
            self.clusterer,
            self._embedding,
            critics,
            read,
            device=device,
            trajectories=trajectories,
        )
        self._next_refresh = self.batches + max(1000, rows // 10)
        return self.last_report

    def adopt(self, holder: Any) -> None:
        """Before a refresh: a policy that was copied together with its holder still knows it by the last report."""
        if isinstance(self.policy, OnDrift):
            self.policy.adopt(holder)

    def note(self, holder: Any) -> None:
        """After a refresh by the critics that batches are drawn for: what `OnDrift` compares the next ones with."""
        if isinstance(self.policy, OnDrift):
            self.policy.note(holder)

    @in_full_precision
    def log_likelihood_of(
        self, rows: Tensor, critics: Critics, read: Callable[[Tensor], Transitions], *, device: torch.device
    ) -> float:
        """Mean over rows [M], int64, of the log-likelihood of their embeddings, taken anew, in the last mixture."""
        if not self.sampler.clustered:
            fail("log_likelihood_of", "a refresh before it", "no clusters")
        rows = rows.cpu()
        check_rows("rows", rows, self.sampler.size)
        if len(rows) == 0:
            fail("rows", "at least one index", "none")
        embeddings, _ = embed_rows(
            self._embedding,
            critics,
            len(rows),
            lambda start, stop: read(rows[start:stop]),
            device=device,
            max_dim=self.clusterer.max_dim,
        )
        return self.clusterer.log_likelihood_of(embeddings)

    def reseed(self, seed: int) -> None:
        """Draw on as one of this seed would."""
        self.generator.manual_seed(seed)
        self.sampler.forget_ahead()
        self.sampler.forget_walks()

    def draw_from(self, generator: torch.Generator) -> None:
        """Draw on from this one, on the CPU: batches to come are drawn anew.

        But for another one that stands where the last does, as after loading: then what was drawn ahead is kept.
        """
        if generator is self.generator or not torch.equal(generator.get_state(), self.generator.get_state()):
            self.sampler.forget_ahead()
            self.sampler.forget_walks()
        self.clusterer.draw_from(generator, instead_of=self.generator)
        self.generator = self.sampler.generator = generator

    def clear(self, holder: Any) -> None:
        """Nothing is held any more."""
        if isinstance(self.policy, OnDrift) and self.policy.serves(holder):
            self.policy.forget()
        self.sampler = self._another_sampler(self.generator)
        self.last_report = None
        self.batches = self._next_refresh = 0

    def state(self, holder: Any) -> dict[str, Any]:
        """All that the batches to come depend on but the rows and the critics; of its own tensors."""
        report, policy = self.last_report, self.policy
        return {
            "sampler": self.sampler.state(),
            "clusterer": self.clusterer.state_dict(),
            "policy": policy.state_dict() if isinstance(policy, OnDrift) and policy.serves(holder) else None,
            "batches": self.batches,
            "next_refresh": self._next_refresh,
            "report": None if report is None else asdict(report),
        }

    def restore(self, state: dict[str, Any], holder: Any, *, size: int | None = None) -> None:
        """Take what `state` gave, from one of the same options: all of it, or nothing when it fails.

        Args:
            state: the clusterer's part of it is kept as it is, the others are copied.
            holder: what the policy is shown.
            size: rows held, where that is known.
        """
        sampler = self._another_sampler(torch.Generator())
        sampler.restore(state["sampler"])
        if size is not None and sampler.size != size:
            fail("state", f"clusters of the {size} transitions held", sampler.size)
        report = None if state["report"] is None else RefreshReport(**state["report"])
        batches, next_refresh = int(state["batches"]), int(state["next_refresh"])
        policy = state["policy"]
        if policy is not None:
            check_rows("probe", policy["probe"], sampler.size)
            check_number("reference", policy["reference"], minimum=-math.inf)
            bool(policy["compared"])
        before = self.clusterer.state_dict()
        try:
            self.clusterer.load_state_dict(state["clusterer"])
        except BaseException:
            self.clusterer.load_state_dict(before)
            raise
        # nothing fails from here on
        self.generator.set_state(sampler.generator.get_state())  # the clusterer draws from it, too
        sampler.generator = self.generator
        self.sampler, self.last_report = sampler, report
        self.batches, self._next_refresh = batches, next_refresh
        if isinstance(self.policy, OnDrift):
            self.policy.load_state_dict(policy, holder)

    def _another_sampler(self, generator: torch.Generator) -> SingleClusterSampler:
        return SingleClusterSampler(
            generator=generator, assignment=self.sampler.assignment, replacement=self.sampler.replacement
        )
