"""ClusteredReplayBuffer: transitions, their clustering, and single-cluster batches of them."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
from collections.abc import Iterator
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import torch
from torch import Tensor

from ._checks import check_choice, check_fraction, check_integer, fail
from .buffer_state import KIND, OWN, copied, loaded, outline_of, restore, state_of
from .checkpoint import save
from .clustered_rows import ClusteredRows
from .clustering import Clusterer
from .critics import Critics, check_critics
from .embedding import Embedding
from .files import own_folder
from .inference import outside_inference_mode
from .mixture import MixtureResult
from .prefetch import drawn_ahead
from .reduction import Reduction
from .refresh import RefreshPolicy, RefreshReport
from .steps import step_of
from .storage import RingStorage
from .trajectories import Neighbours, Trajectories
from .transitions import Transitions
from .windows import Windows

B = TypeVar("B", bound="ClusteredReplayBuffer")


class ClusteredReplayBuffer:
    """A replay buffer whose batches come from one cluster each, so that batches carry no between-cluster covariance.

    `attach` a critic, and `sample` re-clusters by itself when it is due; or call `refresh`. Until the first refresh,
    batches are uniform and their `cluster` is -1. Over batches every transition stays equally likely (see
    `SingleClusterSampler`).

    Args:
        capacity: transitions held; then the oldest are overwritten.
        n_clusters: K, for the default clusterer; "auto" for the K of the lowest BIC, at each refresh.
        embedding: what is clustered: "gradients" (`stacked_gradients`), "features" (`stacked_features`) or a callable
            `(critics, transitions) -> [N, E]`.
        refresh: when to cluster again: `Every(n)` or any `(step, buffer) -> bool`. None: max(1000, N // 10) batches
            after the last refresh, N being the transitions held then; the first as soon as critics are attached.
        clusterer: how to cluster. None: `MixtureClusterer(n_clusters, warm_start=False)`. One serves one buffer, as it
            keeps what it found last.
        max_dim: embeddings of more columns are reduced to so many before they are clustered (see `ReducedClusterer`);
            those of more than 8,192, as gradients by pixels, are projected as soon as they are computed.
        reduction: how: "projection" (random directions) or "pca".
        assignment: "soft": a transition is drawn with each cluster by its responsibility; "hard": with its arg-max one.
        replacement: within a cluster.
        trajectory_tail: as in C4's published code, each cluster also holds the rest of each trajectory after its last
            member there, and is drawn in proportion to its size. Gives up uniformity: late transitions are drawn more
            often. Clusters are hard then, and need `replacement`.
        n_steps: transitions sampled, and clustered, span so many steps: r = sum_k gamma^k r_k, s' and a' those of the
            last, `intervals` how many there are: fewer where a trajectory ends or the newest row is reached. What is
            stored must be single steps, trajectory by trajectory.
        discount: gamma, for `n_steps` above 1.
        frame_stack: images [C, H, W] in the observations are stored one by one, and sampled, and clustered, as the last
            so many of their trajectory, [frame_stack * C, H, W], the newest last; zeros where there is none earlier.
        device: of the sampled batches.
        storage: "memory" keeps the transitions in RAM, "device" on `device`, "memmap" in files, which may be larger
            than the RAM. "pinned" is "memory" for a CUDA `device`: batches go there by way of page-locked memory, and
            nothing waits for them.
        growing: allocate memory as transitions come, twice as much each time, rather than all that `capacity` takes
            with the first: for a capacity that may never be reached. Batches are the same. While it grows, what was
            allocated and what will be are held at once (but for "memmap", whose files are made longer). Trajectories,
            which `n_steps`, `frame_stack` and `trajectory_tail` follow, take 16 bytes a row of the capacity at once.
        folder: for "memmap", where the files are made; None for the system's place for temporary ones. They go with the
            buffer: `save` is what keeps data.
        seed: of the buffer's own generator. None: torch.initial_seed(). Global generators are not touched.

    >>> t = Transitions(observations=torch.randn(100, 3), actions=torch.randn(100, 1), rewards=torch.zeros(100),
    ...                 next_observations=torch.randn(100, 3), terminals=torch.zeros(100))
    >>> buffer = ClusteredReplayBuffer.from_transitions(t, n_clusters=2, seed=0)
    >>> q = torch.nn.Bilinear(3, 1, 1)
    >>> buffer.attach(Critics(q, q))
    >>> buffer.sample(32).observations.shape
    torch.Size([32, 3])
    """

    @outside_inference_mode
    def __init__(
        self,
        capacity: int,
        *,
        n_clusters: int | Literal["auto"] = 3,
        embedding: Union[Literal["gradients", "features"], Embedding] = "gradients",
        refresh: RefreshPolicy | None = None,
        clusterer: Clusterer | None = None,
        max_dim: int = 256,
        reduction: Reduction = "projection",
        assignment: Literal["soft", "hard"] = "soft",
        replacement: bool = True,
        trajectory_tail: bool = False,
        n_steps: int = 1,
        discount: float = 0.99,
        frame_stack: int = 1,
        device: torch.device | str = "cpu",
        storage: Literal["memory", "pinned", "device", "memmap"] = "memory",
        growing: bool = False,
        folder: str | os.PathLike[str] | None = None,
        seed: int | None = None,
    ) -> None:
        capacity = check_integer("capacity", capacity, minimum=1)
        n_steps = check_integer("n_steps", n_steps, minimum=1)
        discount = check_fraction("discount", discount)
        frame_stack = check_integer("frame_stack", frame_stack, minimum=1)
        check_choice("storage", storage, ("memory", "pinned", "device", "memmap"))
        if storage == "pinned" and torch.device(device).type != "cuda":
            fail("storage", "another than 'pinned', unless device is a CUDA device", f"device {str(device)!r}")
        if folder is not None and (storage != "memmap" or not Path(folder).is_dir()):
            expected = "a folder that exists" if storage == "memmap" else "None, unless storage is 'memmap'"
            fail("folder", expected, repr(os.fspath(folder)))

        self._rows = ClusteredRows(
            n_clusters=n_clusters,
            embedding=embedding,
            refresh=refresh,
            clusterer=clusterer,
            max_dim=max_dim,
            reduction=reduction,
            assignment=assignment,
            replacement=replacement,
            trajectory_tail=trajectory_tail,
            seed=seed,
        )
        self.capacity = capacity
        self.n_clusters = self._rows.n_clusters
        self.device = torch.device(device)
        self._folder = folder
        self._growing = bool(growing)
        self._storage = self._new_storage(storage)
        self._trajectories = Trajectories(capacity) if trajectory_tail else None
        self._windows: Windows | None = None
        if n_steps > 1 or frame_stack > 1:
            self._windows = Windows(self._storage, n_steps=n_steps, discount=discount, frame_stack=frame_stack)
        self._critics: Critics | None = None
        self._taken_in = 0  # rows ever written that all parts have heard of
        self._last_rows: dict[int, int] = {}  # of each environment: its last row while that waits for a', or -1
        self._options = {
            "capacity": capacity,
            "n_clusters": self.n_clusters,
            "embedding": embedding if isinstance(embedding, str) else OWN,
            "refresh": outline_of(refresh),
            "clusterer": None if clusterer is None else OWN,
            "max_dim": self._rows.clusterer.max_dim,
            "reduction": self._rows.clusterer.reduction,
            "assignment": assignment,
            "replacement": bool(replacement),
            "trajectory_tail": bool(trajectory_tail),
            "n_steps": n_steps,
            "discount": discount,
            "frame_stack": frame_stack,
            "storage": storage,
            "growing": self._growing,
        }

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        ForkingPickler.register(cls, _in_bytes)

    def _new_storage(self, storage: str) -> RingStorage:
        device = self.device if storage == "device" else torch.device("cpu")
        ring = partial(RingStorage, self.capacity, device=device, target=self.device, growing=self._growing)
        if storage != "memmap":
            return ring(pinned=storage == "pinned")
        mapped = ring()
        # A folder of its own inside the one given, so that a state can be loaded beside what is held.
        mapped.folder = own_folder(mapped, self._folder)
        return mapped

    @classmethod
    def from_transitions(cls: type[B], transitions: Transitions, **options: Any) -> B:
        """A buffer that holds `transitions`; its capacity is their number, unless given."""
        buffer = cls(options.pop("capacity", len(transitions)), **options)
        buffer.extend(transitions)
        return buffer

    def __len__(self) -> int:
        return len(self._storage)

    @outside_inference_mode
    def extend(self, transitions: Transitions) -> None:
        """Append transitions as they are, next actions included; of more than `capacity`, the last.

        Raises:
            ValueError: if they do not have the form of the transitions held.
        """
        if not isinstance(transitions, Transitions):
            fail("transitions", "a Transitions record", type(transitions).__name__)
        if len(transitions) == 0:
            return
        slots = self._write(transitions)
        for follower in self._followers():
            follower.extend(slots, (transitions.terminals + transitions.timeouts).cpu() > 0)
        self._taken_in = self._storage.written

    def _write(self, transitions: Transitions) -> Tensor:
        self._catch_up()
        if self._windows is not None:
            self._windows.check(transitions)
        slots = self._storage.write(transitions)
        self._recluster(slots)
        return slots

    def _recluster(self, slots: Tensor) -> None:
        """Rows were written there."""
        sampler = self._rows.sampler
        overwritten = slots[slots < sampler.size]
        if len(overwritten):
            sampler.overwrite(overwritten)
        if len(self) > sampler.size:
            sampler.extend(len(self) - sampler.size)

    def _catch_up(self) -> None:
        """After an interrupt in the middle of an addition: what was written is held, next to nothing."""
        written = self._storage.written
        if self._taken_in == written:
            return
        missed = torch.arange(max(self._taken_in, written - self.capacity), written, device="cpu") % self.capacity
        self._recluster(missed)
        for follower in self._followers():
            follower.catch_up(missed, written)
        self._last_rows = {}
        self._taken_in = written

    @outside_inference_mode
    def add(
        self,
        observations: Any,
        actions: Any,
        rewards: Any,
        next_observations: Any,
        terminals: Any,
        timeouts: Any = None,
    ) -> None:
        """Append one step: of one environment (scalar reward), or of E environments (a leading axis E on everything).

        The next action of each row is the action that its environment takes in the step after; a terminal, a timeout
        and the newest row have none. What is float64 and no tensor comes in torch's default dtype; all are cast to the
        dtypes of the transitions held.

        Args:
            observations, next_observations: [...] or [E, ...], or dicts and tuples of such.
            actions: [A] or [E, A]; discrete: an integer or [E].
            rewards, terminals, timeouts: numbers or [E]; flags 0 or 1.

        An environment is known by its place: give all, in the same order, at each call. When their number changes, all
        trajectories under way end where they are.

        Raises:
            ValueError: for shapes, dtypes and flags that do not fit, and values that are not finite.
        """
        step = step_of(observations, actions, rewards, next_observations, terminals, timeouts)
        step = self._storage.cast(step)
        first = self._storage.written
        slots = self._write(step)
        if len(self._last_rows) not in (0, len(step)):  # which environment is which is not known
            self._last_rows = {}
            for follower in self._followers():
                follower.cut()
        for environment, action in enumerate(step.actions):
            row = self._last_rows.get(environment, -1)
            if row >= 0 and self._storage.holds(row):
                self._storage.link(row, action)
        done = ((step.terminals + step.timeouts) > 0).cpu()
        for follower in self._followers():
            follower.add(slots, done)
        self._last_rows = {e: -1 if done[e] else first + e for e in range(len(step))}
        self._taken_in = self._storage.written

    def attach(self, critics: Critics) -> None:
        """From now on, `sample` re-clusters by these critics when the refresh policy says so.

        Raises:
            ValueError: for anything but `Critics`.
        """
        self._critics = _checked_critics(critics)

    @outside_inference_mode
    def sample(self, batch_size: int) -> Transitions:
        """A batch of copies, [batch_size, ...] on `device`, from one cluster.

        Raises:
            ValueError: from an empty buffer, or for more than it holds when drawing without replacement; and where
                `refresh` raises, when one is due.
        """
        self._catch_up()
        batch_size = self._rows.sampler.check(batch_size)
        if self._critics is not None and self._rows.due(self):
            self.refresh()
        slots, cluster = self._rows.sample(batch_size)
        return self._gather(slots, cluster)

    def _gather(self, slots: Tensor, cluster: int = -1) -> Transitions:
        return (self._storage if self._windows is None else self._windows).gather(slots, cluster=cluster)

    def _followers(self) -> list[Trajectories | Neighbours]:
        """What keeps track of trajectories."""
        neighbours = None if self._windows is None else self._windows.neighbours
        return [follower for follower in (self._trajectories, neighbours) if follower is not None]

    def batches(self, batch_size: int, *, steps: int | None = None, prefetch: int = 0) -> Iterator[Transitions]:
        """`steps` batches, one after the other, as `sample` gives them; without end where `steps` is None.

        Args:
            batch_size, steps: numbers of rows and of batches.
            prefetch: so many batches are drawn ahead: on a CUDA device, they are copied there on a stream of their own
                while the training goes on (with storage="pinned"). A refresh then reads critics that are that many
                batches younger, rows that are added are drawn that many batches later, and a buffer that was saved goes
                on after the batches drawn ahead.

        >>> rows = torch.zeros(10, 1)
        >>> data = Transitions(observations=rows, actions=rows, rewards=rows, next_observations=rows, terminals=rows)
        >>> buffer = ClusteredReplayBuffer.from_transitions(data)
        >>> [len(batch) for batch in buffer.batches(4, steps=2)]
        [4, 4]
        """
        if steps is not None:
            steps = check_integer("steps", steps, minimum=0)
        prefetch = check_integer("prefetch", prefetch, minimum=0)
        batch_size = self._rows.sampler.check(batch_size)
        calls = itertools.count() if steps is None else range(steps)
        if prefetch == 0:
            return (self.sample(batch_size) for _ in calls)
        return drawn_ahead((partial(self.sample, batch_size) for _ in calls), prefetch, self.device)

    @outside_inference_mode
    def refresh(self, critics: Critics | None = None) -> RefreshReport:
        """Cluster all transitions by the critics given, or by those attached. When it fails, batches go on as before.

        Raises:
            ValueError: without critics; before any data; and for critics that return a wrong shape or a value that is
                not finite.

        Warns:
            UserWarning: for fewer distinct embeddings than clusters; there are as many clusters then.
        """
        critics = _checked_critics(self._critics if critics is None else critics)
        self._catch_up()
        trajectories = None if self._trajectories is None else self._trajectories.of(len(self))
        self._rows.adopt(self)
        report = self._rows.refresh(critics, self.rows, device=self.device, trajectories=trajectories)
        if self._critics is not None:
            self._rows.note(self)
        return report

    @outside_inference_mode
    def rows(self, start: int = 0, stop: int | None = None) -> Transitions:
        """Copies of the transitions held at `indices` `start` to `stop` - 1, as batches have them, on `device`.

        Args:
            start, stop: stop None for all that follow. The newest is the last until more than `capacity` have come.

        Raises:
            ValueError: for rows that are not held.
        """
        self._catch_up()
        stop = len(self) if stop is None else check_integer("stop", stop, minimum=1)
        start = check_integer("start", start, minimum=0)
        if not start < stop <= len(self):
            fail("rows", f"at least one of the {len(self)} transitions held", f"{start} to {stop}")
        if self._windows is not None:
            return self._gather(torch.arange(start, stop, device="cpu"))
        return self._storage.rows(start, stop).to(self.device)

    @outside_inference_mode
    def log_likelihood_of(self, rows: Tensor) -> float:
        """How well the last clustering describes what the attached critics are now.

        Args:
            rows: indices [M], int64, of transitions held.

        Returns:
            The mean over these transitions of the log-likelihood of their embeddings, taken anew.

        Raises:
            ValueError: without attached critics, before the first refresh, or for a clusterer without a likelihood.
        """
        self._catch_up()
        return self._rows.log_likelihood_of(rows, _checked_critics(self._critics), self._gather, device=self.device)

    def seed(self, seed: int) -> None:
        """From here on, draw as a buffer of this seed would: of copies that were made alike, each its own batches."""
        self._rows.reseed(check_integer("seed", seed, minimum=0))

    def state_dict(self) -> dict[str, Any]:
        """Everything that the batches to come depend on but the critics: transitions, clusters, generator, counters.

        Nested dicts, lists and tuples of tensors and plain values: copies, but for transitions in memory-mapped files,
        which may be larger than the RAM. `save` needs no copies.
        """
        self._catch_up()
        return copied(state_of(self))

    @outside_inference_mode
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the buffer that gave `state` was, batch for batch; on any device. Attach the critics again.

        Raises:
            ValueError: for a state of another form, or of a buffer of other options; this one is unchanged then.
        """
        restore(self, state)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `state_dict` to one file, atomically: when that fails, the file that was there is whole.

        Raises:
            OSError: when the file can not be written.
        """
        self._catch_up()
        save(path, KIND, state_of(self))

    @classmethod
    @outside_inference_mode
    def load(cls: type[B], path: str | os.PathLike[str], **options: Any) -> B:
        """The buffer that was saved to `path`. Nothing in the file is run.

        Args:
            path: what `save` wrote.
            options: those to change: `device`, `storage`, and `seed`, for other batches than the saved buffer's; and
                those that no file can hold, when the buffer had its own: `embedding`, `clusterer`, `refresh`.

        Raises:
            OSError: without such a file.
            ValueError: for a file that is damaged, foreign or of another version; for an option that must be given.
        """
        buffer: B = loaded(cls, path, options)
        return buffer

    @property
    def clustered(self) -> bool:
        """Whether transitions are held that a refresh has seen: from the first on, until all have been overwritten.

        Then each takes r_i = p, and the next batch makes a refresh due, if no policy was given that says otherwise.
        """
        return self._rows.sampler.clustered

    @property
    def responsibilities(self) -> Tensor:
        """r, [N, K], as it stands: rows that no refresh has seen have r_i = p. ValueError before the first refresh."""
        self._catch_up()
        return self._rows.sampler.responsibilities

    @property
    def probabilities(self) -> Tensor:
        """p_z = mean_i r_iz, [K], float64, before any dissolving. ValueError before the first refresh."""
        self._catch_up()
        return self._rows.sampler.probabilities

    @property
    def cluster_sizes(self) -> Tensor:
        """N p_z, [K], float64: the number of transitions in each cluster (fractional when soft).

        ValueError before the first refresh.
        """
        return len(self) * self.probabilities

    @property
    def mixture(self) -> MixtureResult | None:
        """The clusterer's mixture; None before the first refresh, or if it has none.

        In units of the embeddings; above `max_dim` columns, in those of what they were reduced to.
        """
        return self._rows.clusterer.mixture

    @property
    def last_report(self) -> RefreshReport | None:
        """The report of the last refresh."""
        return self._rows.last_report


def _in_bytes(buffer: ClusteredReplayBuffer) -> tuple[Any, ...]:
    """For another process, which would share the memory of tensors, and the changes to it, without this.

    Critics do not go along: there, they would be copies that nobody trains.
    """
    alone = copy.copy(buffer)
    alone._critics = None
    return pickle.loads, (pickle.dumps(alone),)


ForkingPickler.register(ClusteredReplayBuffer, _in_bytes)


def _checked_critics(critics: object) -> Critics:
    return check_critics(critics, "a Critics record, given or attached")
