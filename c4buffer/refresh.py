"""Clustering again: how, when, and what was found."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ._checks import check_integer, check_number, fail
from .clustering import ranks_of_means
from .critics import Critics
from .embedding import WIDEST_NORMS, Embedding, embed_rows
from .losses.covariance import decompose_cross_covariance
from .partition import check_responsibilities
from .reduction import ReducedClusterer
from .sampling import SingleClusterSampler
from .transitions import Transitions

if TYPE_CHECKING:
    from .buffer import ClusteredReplayBuffer

UNKNOWN = (float("nan"),) * 3  # norms


@dataclass(frozen=True)
class RefreshReport:
    """What a refresh found.

    Args:
        sizes: N p_z, the number of transitions in each cluster (fractional when soft).
        probabilities: p_z.
        iterations: EM steps; 0 for a clusterer that does not tell.
        log_likelihood: mean over the transitions, of the embeddings in their own units, or of what they were reduced
            to; NaN likewise.
        seconds: wall time of embedding, clustering and assigning.
        total, within, between: Frobenius norms of C = Cov(g', g) over all transitions, of E[C_Z] and of
            Cov(mu'_Z, mu_Z) (Theorem 2). NaN for an embedding that is not a pair, for g of more than 1,024 columns,
            and for a single transition.
    """

    sizes: tuple[float, ...]
    probabilities: tuple[float, ...]
    iterations: int
    log_likelihood: float
    seconds: float
    total: float
    within: float
    between: float


def refreshed(
    sampler: SingleClusterSampler,
    clusterer: ReducedClusterer,
    embedding: Embedding,
    critics: Critics,
    read: Callable[[int, int], Transitions],
    *,
    device: torch.device,
    trajectories: tuple[Tensor, Tensor] | None = None,
) -> RefreshReport:
    """Cluster all of a sampler's rows by the critics as they are; from then on it draws from these clusters.

    When it fails, the sampler draws as before.

    Args:
        sampler: of N rows; it gives the clusterer the responsibilities that it has.
        clusterer: what clusters the embeddings.
        embedding: what is clustered: "gradients", "features" or a callable.
        critics: the critic and its target.
        read: `read(start, stop)` gives these rows; they are read once and not kept.
        device: the critics'.
        trajectories: of each row the number of its trajectory and its time (see `SingleClusterSampler.assign`).

    Raises:
        ValueError: for critics that return a wrong shape or a value that is not finite.
    """
    started, rows = time.perf_counter(), sampler.size
    embeddings, projected = embed_rows(embedding, critics, rows, read, device=device, max_dim=clusterer.max_dim)
    before = clusterer.state_dict()
    try:
        responsibilities = clusterer(embeddings, sampler.responsibilities if sampler.clustered else None)
        if isinstance(responsibilities, Tensor) and not responsibilities.is_floating_point():
            responsibilities = responsibilities.to(embeddings.dtype)  # hard clusters, as one_hot gives them
        check_responsibilities(responsibilities, rows)
        ranks = ranks_of_means(embeddings, responsibilities) if responsibilities.shape[1] > 1 else None
        sampler.assign(responsibilities, distances=ranks, trajectories=trajectories)
    except BaseException:
        clusterer.load_state_dict(before)  # what it found is not in force
        raise
    known = isinstance(embedding, str) and rows > 1 and not projected
    norms = covariance_norms(embeddings, sampler.responsibilities) if known else UNKNOWN
    mixture = clusterer.mixture
    return RefreshReport(
        sizes=tuple((rows * sampler.probabilities).tolist()),
        probabilities=tuple(sampler.probabilities.tolist()),
        iterations=mixture.iterations if mixture else 0,
        log_likelihood=mixture.log_likelihood if mixture else float("nan"),
        seconds=time.perf_counter() - started,
        total=norms[0],
        within=norms[1],
        between=norms[2],
    )


def covariance_norms(embeddings: Tensor, responsibilities: Tensor) -> tuple[float, ...]:
    """||total||_F, ||within||_F and ||between||_F of embeddings [g', g], by Theorem 2; NaN for very wide ones."""
    if embeddings.shape[1] > 2 * WIDEST_NORMS:
        return UNKNOWN
    target, online = embeddings.chunk(2, dim=1)
    parts = decompose_cross_covariance(target, online, responsibilities.to(embeddings))
    return tuple(float(torch.linalg.matrix_norm(part)) for part in parts)


@runtime_checkable
class RefreshPolicy(Protocol):
    """Anything that can be called so."""

    def __call__(self, step: int, buffer: Any, /) -> bool:
        """Whether to cluster before batch number `step` (from 0) is drawn from this buffer, or by this sampler."""
        ...  # pragma: no cover


class Every:
    """Cluster before batches 0, n, 2n, ... are drawn.

    Args:
        n: number of batches, at least 1.
    """

    def __init__(self, n: int) -> None:
        self.n = check_integer("n", n, minimum=1)

    def __call__(self, step: int, buffer: object) -> bool:
        return step % self.n == 0

    def options(self) -> dict[str, Any]:
        """What another one like this is made of."""
        return {"n": self.n}

    def __repr__(self) -> str:
        return f"Every({self.n})"


class OnDrift:
    """Cluster when the clustering no longer describes what the critics have become.

    A probe set of transitions is drawn once, or at each refresh while the buffer holds too few. After each refresh the
    mean log-likelihood of its embeddings under the new mixture is noted; when, later, fresh embeddings of what the
    buffer holds at the same indices are less likely by more than the threshold, it is time: rows of another kind that
    have overwritten them count as drift, too. Gradients that grow together do, though the clusters may still be good;
    those that shrink may not.

    One policy serves one buffer; given to another, it starts anew.

    Args:
        threshold: fall of the mean log-likelihood, in nats per transition; above 0. How large it gets by when depends
            on the critics and on the width of the embeddings: see the page on refreshing.
        check_every: batches between two looks.
        probe_size: transitions looked at, at least 1; all, where there are fewer. One look costs their gradients.
        seed: of the draw of the probe set.
    """

    def __init__(self, threshold: float, *, check_every: int = 100, probe_size: int = 512, seed: int = 0) -> None:
        self.threshold = check_number("threshold", threshold, minimum=0, exclusive=True)
        self.check_every = check_integer("check_every", check_every, minimum=1)
        self.probe_size = check_integer("probe_size", probe_size, minimum=1)
        self.seed = check_integer("seed", seed, minimum=0)
        self._buffer: weakref.ref[ClusteredReplayBuffer] | None
        self._report: RefreshReport | None
        self._probe: Tensor
        self.forget()

    def __call__(self, step: int, buffer: ClusteredReplayBuffer) -> bool:
        self.adopt(buffer)
        if buffer.last_report is None or not buffer.clustered:
            return True
        if self.note(buffer) or step % self.check_every:
            return False
        return self._reference - buffer.log_likelihood_of(self._probe) > self.threshold

    def note(self, buffer: ClusteredReplayBuffer) -> bool:
        """Note how likely the probe set is under the last clustering, if that is new; whether it was."""
        self.adopt(buffer)
        report = buffer.last_report
        if self._buffer is None or self._buffer() is not buffer:
            self.forget()
            self._buffer = weakref.ref(buffer)
        if report is self._report:
            return False
        if len(self._probe) < min(self.probe_size, len(buffer)):
            self._probe = self._drawn(len(buffer))
        self._reference = buffer.log_likelihood_of(self._probe)
        self._report = report
        return True

    def adopt(self, buffer: ClusteredReplayBuffer) -> None:
        """Serve the buffer that this was copied together with, whose last report is the one that was noted."""
        if self._buffer is None and self._report is not None and self._report is buffer.last_report:
            self._buffer = weakref.ref(buffer)

    @staticmethod
    def check_clusterer(clusterer: object) -> None:
        """ValueError for a clusterer that has no likelihood to compare; None is the default one."""
        inner = getattr(clusterer, "clusterer", clusterer)  # of a ReducedClusterer, which has as much as its own has
        if inner is not None and not hasattr(inner, "log_likelihood_of"):
            name = getattr(inner, "__name__", type(inner).__name__)
            fail("clusterer", "one with log_likelihood_of(embeddings), by which OnDrift decides", name)

    def options(self) -> dict[str, Any]:
        """What another one like this is made of."""
        names = ("threshold", "check_every", "probe_size", "seed")
        return {name: getattr(self, name) for name in names}

    def __getstate__(self) -> dict[str, Any]:
        """For a copy or a pickle, which goes to the copy of the buffer."""
        return {**self.__dict__, "_buffer": None}

    def serves(self, buffer: object) -> bool:
        """Whether what it has noted is of this buffer; of a copy, it is of the buffer's copy."""
        return self._buffer is None or self._buffer() is buffer

    def forget(self) -> None:
        """Start anew."""
        self._buffer, self._report = None, None
        self._probe, self._reference = torch.empty(0, dtype=torch.int64, device="cpu"), 0.0

    def state_dict(self) -> dict[str, Any]:
        """The probe set and its likelihood after the last refresh."""
        compared = self._report is not None
        if self._buffer is not None:  # as it is in a copy
            buffer = self._buffer()
            compared = buffer is not None and self._report is buffer.last_report
        return {"probe": self._probe, "reference": self._reference, "compared": compared}

    def load_state_dict(self, state: dict[str, Any] | None, buffer: ClusteredReplayBuffer) -> None:
        """Take what `state_dict` gave, for `buffer` as it is now; from None, of another policy's buffer, start anew."""
        self.forget()
        if state is not None:
            self._buffer, self._probe, self._reference = weakref.ref(buffer), state["probe"].clone(), state["reference"]
            self._report = buffer.last_report if state["compared"] else None

    def _drawn(self, rows: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randperm(rows, generator=generator, device="cpu")[: self.probe_size].sort().values

    def __repr__(self) -> str:
        return f"OnDrift({self.threshold:g}, check_every={self.check_every}, probe_size={self.probe_size})"
