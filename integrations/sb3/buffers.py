"""Stable-Baselines3's replay buffers with single-cluster batches: rows are chosen here, and read by the host's code."""

from __future__ import annotations

import copy
import time
import warnings
import weakref
from collections.abc import Callable
from operator import itemgetter
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from c4buffer import Critics, ReducedClusterer, SingleClusterSampler
from c4buffer._checks import check_choice, check_integer, fail
from c4buffer.clustering import ranks_of_means
from c4buffer.embedding import embed_rows
from c4buffer.reduction import reducing
from c4buffer.refresh import UNKNOWN, covariance_norms

from .reading import AtEnvironments, joined, picked, transitions_of_samples

GOAL_KEYS = {"observation", "achieved_goal", "desired_goal"}
LIVE = {"_critics": None, "_network": None, "_sampler": None, "_batch": None, "_clusterer": None}  # never copied
ROW_BY_ROW = (ReplayBuffer._get_samples, DictReplayBuffer._get_samples)
INDEXED = (*ROW_BY_ROW, NStepReplayBuffer._get_samples)  # by positions and environments, whatever they read
TRIES = 8  # to find rows of a cluster that can be sampled, before all are looked at


class _Clustered(ReplayBuffer):
    """What the four buffers share; their arguments are told at the first, `ClusteredReplayBuffer`."""

    _critics: Critics | None
    _network: weakref.ref[Any] | None  # of the critics that rows were clustered by
    _sampler: SingleClusterSampler | None
    _batch: Any
    _clusterer: ReducedClusterer
    _generator: torch.Generator | None

    def __init__(
        self,
        *arguments: Any,
        n_clusters: int | Literal["auto"] = 3,
        embedding: str = "gradients",
        refresh_interval: int | None = None,
        assignment: str = "soft",
        replacement: bool = True,
        c4_seed: int | None = None,
        **options: Any,
    ) -> None:
        if n_clusters != "auto":
            n_clusters = check_integer("n_clusters", n_clusters, minimum=1)
        check_choice("embedding", embedding, ("gradients", "features"))
        check_choice("assignment", assignment, ("soft", "hard"))
        if refresh_interval is not None:
            check_integer("refresh_interval", refresh_interval, minimum=1)
        if c4_seed is not None:
            check_integer("c4_seed", c4_seed, minimum=0)
        space = options.get("observation_space", arguments[1] if len(arguments) > 1 else None)
        if space is not None:
            self._check_space(space)
        super().__init__(*arguments, **options)
        if n_clusters != "auto" and n_clusters > self.buffer_size * self.n_envs:
            fail("n_clusters", f"at most the {self.buffer_size * self.n_envs} transitions of the buffer", n_clusters)
        self._generator = None
        self.n_clusters = n_clusters
        self.embedding: Any = embedding
        self.refresh_interval = refresh_interval
        self.assignment: Any = assignment
        self.replacement = replacement
        self.c4_seed = c4_seed
        self.c4_metrics: dict[str, float] = {}
        self.cluster = -1
        self._warned = False
        self._since_refresh = 0
        vars(self).update(LIVE)

    @classmethod
    def _check_space(cls, space: spaces.Space[Any]) -> None:
        """Of the observations, by which SB3 would fail further on."""
        keyed = issubclass(cls, DictReplayBuffer)
        if isinstance(space, spaces.Dict) != keyed:
            other = "ClusteredReplayBuffer" if keyed else "ClusteredDictReplayBuffer or ClusteredHerReplayBuffer"
            expected = f"{'a Dict' if keyed else 'no Dict'} for a {cls.__name__}; {other} is for the others"
            fail("observation_space", expected, repr(space))

    def bind(self, critics: Critics, *, seed: int | None = None) -> None:
        """From now on, cluster by these critics; clusters by the networks of the last binding stay until they are due.

        Args:
            critics: as `critics_of(model)` gives them.
            seed: where `c4_seed` is None. None: torch's initial seed.
        """
        if self._generator is None:  # another binding goes on with the random numbers of the last one
            seed = self.c4_seed if self.c4_seed is not None else seed
            self._generator = torch.Generator().manual_seed(torch.initial_seed() if seed is None else seed)
        network = next(iter(critics.modules), None)
        known = network is not None and self._network is not None and self._network() is network
        self._critics, self._network = critics, None if network is None else weakref.ref(network)
        if not known or self._sampler is None or self._sampler.size != self._stored_rows():
            self.forget_clusters()

    def unbind(self) -> None:
        """Sample uniformly again, and hold nothing of the model but its clusters."""
        self._critics = self._batch = None
        self.cluster = -1

    def is_bound_to(self, critics: Critics) -> bool:
        """Whether these critics, and no others, are those of the last `bind`."""
        return self._critics is critics

    def forget_clusters(self) -> None:
        """While bound, cluster anew with the next batch, as after other rows have been put in than by `add`."""
        self.c4_metrics = {}
        self._since_refresh = 0
        self._sampler = None
        if self._critics is not None:
            assert self._generator is not None
            self._sampler = SingleClusterSampler(
                generator=self._generator, assignment=self.assignment, replacement=self.replacement
            )
            self._sampler.extend(self._stored_rows())
            self._clusterer = reducing(None, self.n_clusters, generator=self._generator)

    def take_batch(self) -> Any:
        """What `sample` gave last, while bound, once; for the penalty."""
        batch, self._batch = self._batch, None
        return batch

    @property
    def probabilities(self) -> torch.Tensor:
        """p_z, [K]: the shares of the clusters, those of the last `learn` after it."""
        if self._sampler is None or not self._sampler.clustered:
            fail("probabilities", "a buffer that has been clustered", "one without clusters")
        return self._sampler.probabilities

    def add(self, *arguments: Any, **options: Any) -> None:
        """The host's `add`; the rows that it overwrites lose their cluster."""
        overwrites, first = self.full, self.pos * self.n_envs
        self.timeouts[self.pos] = 0  # the host writes them only where it handles them
        super().add(*arguments, **options)
        if self._sampler is not None and overwrites:
            self._sampler.overwrite(torch.arange(first, first + self.n_envs, device="cpu"))
        elif self._sampler is not None:
            self._sampler.extend(self.n_envs)

    def sample(self, batch_size: int, env: Any = None) -> Any:
        """`batch_size` rows of one cluster, once there are clusters; the host's own rows before, and with K = 1."""
        if self._critics is None or self._sampler is None:
            self._warn_once()
            return super().sample(batch_size, env=env)
        rows = self._stored_rows()
        too_few = not self.replacement and batch_size > rows
        if self.n_clusters == 1 or too_few:
            self.cluster = -1
            self._batch = super().sample(batch_size, env=env)
            return self._batch
        if self._sampler.size != rows:  # filled by other means than `add`
            self.forget_clusters()
        if not self._sampler.clustered or self._since_refresh >= (self.refresh_interval or max(1000, rows // 10)):
            self._refresh(env)
        self._since_refresh += 1
        chosen = self._valid_rows(batch_size) if self._sampler.clustered else None
        if chosen is None:  # too few rows to cluster, or none that can be sampled, which the host says
            self.cluster = -1
            self._batch = super().sample(batch_size, env=env)
        else:
            self._batch = self._training_samples(chosen, env)
        return self._batch

    def _refresh(self, env: Any) -> None:
        """Cluster all rows by the critics as they are."""
        assert self._critics is not None
        assert self._sampler is not None
        started = time.perf_counter()
        rows = np.flatnonzero(self._is_valid(np.arange(self._stored_rows())))
        if len(rows) < (2 if self.n_clusters == "auto" else self.n_clusters):
            return
        state = np.random.get_state()  # the host's reading draws from the global generator
        try:
            embeddings, projected = embed_rows(
                self.embedding,
                self._critics,
                len(rows),
                lambda start, stop: transitions_of_samples(self._samples(rows[start:stop], env)),
                device=torch.device(self.device),
                max_dim=self._clusterer.max_dim,
            )
        finally:
            np.random.set_state(state)
        found = self._clusterer(embeddings, None)
        places, stored = torch.from_numpy(rows), self._stored_rows()
        responsibilities = found.mean(dim=0).cpu().expand(stored, -1).clone()
        responsibilities[places] = found.cpu()
        ranks = ranks_of_means(embeddings, found).cpu()
        distances = torch.zeros(stored, ranks.shape[1], dtype=ranks.dtype, device="cpu")
        distances[places] = ranks
        self._sampler.assign(responsibilities, distances=distances)
        if len(rows) < stored:  # rows that can not be sampled now are as those that no clustering has seen
            self._sampler.overwrite(torch.from_numpy(np.setdiff1d(np.arange(stored), rows, assume_unique=True)))
        self._since_refresh = 0
        norms = UNKNOWN if projected else covariance_norms(embeddings, found)
        self.c4_metrics = {
            "cross_covariance": norms[0],
            "within_cross_covariance": norms[1],
            "between_cross_covariance": norms[2],
            "smallest_probability": float(self._sampler.probabilities.min()),
            "refresh_seconds": time.perf_counter() - started,
        }

    def _valid_rows(self, batch_size: int) -> np.ndarray | None:
        """Rows of one cluster; those that can not be sampled just now are drawn again, from those that can. Or None."""
        assert self._sampler is not None
        drawn, self.cluster = self._sampler.sample(batch_size)
        chosen: np.ndarray = drawn.numpy()
        left = np.flatnonzero(~self._is_valid(chosen))
        if len(left) == 0:
            return chosen
        chosen = chosen.copy()
        for _ in range(TRIES):
            more = self._sampler.rows_of(self.cluster, 2 * len(left), batch_size=batch_size).numpy()
            more = more[self._is_valid(more)][: len(left)]
            chosen[left[: len(more)]] = more
            left = left[len(more) :]
            if len(left) == 0:
                return chosen
        # hardly any row of the cluster can be sampled: a look at all of them
        rows = np.flatnonzero(self._is_valid(np.arange(self._stored_rows())))
        if len(rows) == 0:
            return None
        ids, responsibilities, _ = self._sampler.partition_for(batch_size)
        weights = responsibilities[torch.from_numpy(rows), int((ids == self.cluster).nonzero())].double()
        if float(weights.sum()) == 0:
            weights = torch.ones(len(rows), dtype=torch.float64, device="cpu")
        uniforms = torch.rand(len(left), dtype=torch.float64, generator=self._generator, device="cpu")
        ends = weights.cumsum(dim=0)
        places = torch.searchsorted(ends, uniforms * ends[-1], right=True).clamp(max=len(rows) - 1)
        chosen[left] = rows[places.numpy()]
        return chosen

    def _stored_rows(self) -> int:
        return (self.buffer_size if self.full else self.pos) * self.n_envs

    def _is_valid(self, rows: np.ndarray) -> np.ndarray:
        """Whether these rows [M] may be sampled: all but the one that a memory-optimised buffer writes next."""
        if self.optimize_memory_usage and self.full:
            return np.asarray(rows // self.n_envs != self.pos)
        return np.ones(len(rows), dtype=bool)

    def _training_samples(self, rows: np.ndarray, env: Any) -> Any:
        return self._samples(rows, env)

    def _samples(self, rows: np.ndarray, env: Any) -> Any:
        """The host's reading of these rows [M], row = position * n_envs + environment, in their order."""
        if self.n_envs == 1:
            return self._get_samples(rows, env=env)
        # the host draws the environment itself: it is shown one, of all rows where no row's reading hangs on another
        if type(self)._get_samples in ROW_BY_ROW and not self.optimize_memory_usage:
            return self._as_one(lambda part: part.reshape(-1, 1, *part.shape[2:]))._get_samples(rows, env=env)
        positions, environments = np.divmod(rows, self.n_envs)
        if type(self)._get_samples in INDEXED:
            return self._as_one(lambda held: AtEnvironments(held, environments))._get_samples(positions, env=env)
        order, samples = [], []
        for e in np.unique(environments):
            places = np.flatnonzero(environments == e)
            order.append(places)
            samples.append(self._as_one(itemgetter(np.s_[:, e : e + 1]))._get_samples(positions[places], env=env))
        return picked(joined(samples), np.argsort(np.concatenate(order)))

    def _as_one(self, shown: Callable[[np.ndarray], Any]) -> Any:
        """A buffer of one environment, whose arrays show the own ones, those of a subclass too."""
        one = copy.copy(self)
        one.n_envs = 1
        for name, held in vars(self).items():
            if isinstance(held, dict) and any(map(self._has_rows, held.values())):
                setattr(one, name, {k: shown(part) if self._has_rows(part) else part for k, part in held.items()})
            elif self._has_rows(held):
                setattr(one, name, shown(held))
        return one

    def _has_rows(self, held: Any) -> bool:
        return isinstance(held, np.ndarray) and held.shape[:2] == (self.buffer_size, self.n_envs)

    def _warn_once(self) -> None:
        if not self._warned and self.n_clusters != 1:
            self._warned = True
            warnings.warn(
                "sampling stays uniform until the buffer knows the critics: learn(..., callback=C4Callback())",
                stacklevel=3,
            )

    def __copy__(self) -> Any:
        view = object.__new__(type(self))
        vars(view).update({**vars(self), **LIVE})
        return view

    def __getstate__(self) -> dict[str, Any]:
        inherited = getattr(super(), "__getstate__", None)
        state = inherited() if inherited is not None else None
        return {**(state if isinstance(state, dict) else vars(self)), **LIVE, "_generator": None}


class ClusteredReplayBuffer(_Clustered):
    """SB3's ReplayBuffer whose batches come from one cluster each, while a `C4Callback` or `attached` binds it.

    .. code-block:: python

        clustered = dict(replay_buffer_class=ClusteredReplayBuffer, replay_buffer_kwargs=dict(n_clusters=3))
        model = SAC("MlpPolicy", env, **clustered)
        model.learn(100_000, callback=C4Callback())

    Args:
        n_clusters: K, 3 unless given. With one, batches are the host's own. "auto": at each clustering the K of the
            lowest BIC.
        embedding: what is clustered, "gradients" (unless given) or "features".
        refresh_interval: batches between clusterings, over the ends of `learn`s too. None: max(1000, N // 10).
        assignment: "soft" (unless given) or "hard".
        replacement: within a cluster, True unless given. Without it, batches are the host's own until there are rows
            for one.
        c4_seed: of the buffer's own generator. None: the model's seed, or torch's initial one.
    """


class ClusteredDictReplayBuffer(_Clustered, DictReplayBuffer):
    """The same, arguments too, for dictionaries of observations ("MultiInputPolicy")."""


class ClusteredNStepReplayBuffer(_Clustered, NStepReplayBuffer):
    """The same with n-step returns; give `n_steps` and `gamma` in `replay_buffer_kwargs`, as SB3 does not pass them."""


class ClusteredHerReplayBuffer(_Clustered, HerReplayBuffer):
    """The same with hindsight: rows are clustered with the goals that they had; a batch's relabelled share follows."""

    @classmethod
    def _check_space(cls, space: spaces.Space[Any]) -> None:
        keys = set(space.spaces) if isinstance(space, spaces.Dict) else set()
        if not keys >= GOAL_KEYS:
            fail("observation_space", f"a Dict with {', '.join(sorted(GOAL_KEYS))}, for hindsight", repr(space))

    def _is_valid(self, rows: np.ndarray) -> np.ndarray:
        """Rows of whole episodes."""
        ended: np.ndarray = self.ep_length.reshape(-1)[rows] > 0
        return ended

    def _samples(self, rows: np.ndarray, env: Any) -> Any:
        return self._get_real_samples(*np.divmod(rows, self.n_envs), env)

    def _training_samples(self, rows: np.ndarray, env: Any) -> Any:
        positions, environments = np.divmod(rows, self.n_envs)
        virtual = int(self.her_ratio * len(rows))
        relabelled = self._get_virtual_samples(positions[:virtual], environments[:virtual], env)
        real = self._get_real_samples(positions[virtual:], environments[virtual:], env)
        return joined([real, relabelled])
