"""A sampler for TorchRL's replay buffers: rows of one cluster each time."""

import copy
import math
import pickle
import threading
import warnings
from abc import ABCMeta
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Literal, Union

import numpy as np
import torch
from torch import Tensor
from torchrl.data.replay_buffers.samplers import Sampler
from torchrl.data.replay_buffers.storages import Storage

from c4buffer import Clusterer, Critics, OnDrift, RefreshPolicy, RefreshReport, Transitions
from c4buffer._checks import fail
from c4buffer.checkpoint import load, save
from c4buffer.clustered_rows import ClusteredRows
from c4buffer.critics import check_critics
from c4buffer.embedding import EMBEDDINGS, Embedding
from c4buffer.inference import outside_inference_mode

from .rows import DEFAULT_KEYS, Keys, coordinates, stored

KIND = "ClusterSampler"  # of a file
FILE = "cluster_sampler.safetensors"


class _KeepsReplacement(type(Sampler)):  # type: ignore[misc]
    """TorchRL takes `replacement=False` for the name of another class; here it is an option."""

    def __call__(cls, *arguments: Any, **options: Any) -> Any:
        return ABCMeta.__call__(cls, *arguments, **options)


class ClusterSampler(Sampler, metaclass=_KeepsReplacement):
    """Batches from one cluster each; every stored row stays equally likely over batches.

    Until critics are attached, batches are uniform. The batch's cluster is in its info, and so under "cluster" in what
    a TensorDictReplayBuffer samples; -1 before the first clustering.

    Args:
        n_clusters: K. "auto": at each clustering the K of the lowest BIC.
        embedding: what is clustered: "gradients", "features" or a callable `(critics, transitions) -> [N, E]`.
        refresh: when to cluster again: `Every(n)`, `OnDrift(threshold)` or any `(step, sampler) -> bool`. None:
            max(1000, N // 10) batches after the last time, the first as soon as critics are attached.
        clusterer: how. None: `MixtureClusterer(n_clusters, warm_start=False)`.
        max_dim: embeddings of more columns are reduced to so many before they are clustered.
        assignment: "soft" or "hard".
        replacement: within a cluster.
        keys: where the stored tensordicts have what.
        seed: of the sampler's own generator. None: torch.initial_seed(). With the buffer's `generator=` or `set_rng` it
            draws from the one given instead, if that is on the CPU.

    .. code-block:: python

        sampler = ClusterSampler(n_clusters=3)
        buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(10_000), sampler=sampler, batch_size=256)
        buffer.extend(data)
        sampler.attach(critics_of(loss))
        batch = buffer.sample()
    """

    def __init__(
        self,
        n_clusters: int | Literal["auto"] = 3,
        *,
        embedding: Union[Literal["gradients", "features"], Embedding] = "gradients",
        refresh: RefreshPolicy | None = None,
        clusterer: Clusterer | None = None,
        max_dim: int = 256,
        assignment: Literal["soft", "hard"] = "soft",
        replacement: bool = True,
        keys: Keys = DEFAULT_KEYS,
        seed: int | None = None,
    ) -> None:
        self._rows = ClusteredRows(
            n_clusters=n_clusters,
            embedding=embedding,
            refresh=refresh,
            clusterer=clusterer,
            max_dim=max_dim,
            assignment=assignment,
            replacement=replacement,
            seed=seed,
        )
        self.n_clusters = self._rows.n_clusters
        self.keys = keys
        self._embedding = embedding if isinstance(embedding, str) else "the caller's own"
        self._critics: Critics | None = None
        self._transform: Callable[[Any], Any] | None = None
        self._storage: Storage | None = None
        self._warned = False
        self._thread: int | None = None  # in which critics were attached, and are trained
        self._lock = threading.RLock()

    def attach(self, critics: Critics, *, transform: Callable[[Any], Any] | None = None) -> None:
        """From now on, `sample` clusters by these critics when the refresh policy says so.

        In this thread alone: a buffer with `prefetch` draws all batches but the first in others, where reading the
        critics would race with their training. There, call `refresh` in the training loop; a warning says so once.

        Args:
            critics: as `critics_of(loss)` gives them.
            transform: what the buffer does to its batches before the critics see them, `buffer.transform`.
        """
        check_critics(critics)
        if transform is not None and not callable(transform):
            fail("transform", "a callable or None", repr(transform))
        self._critics, self._transform, self._thread = critics, transform, threading.get_ident()

    @outside_inference_mode
    def sample(self, storage: Storage, batch_size: int) -> tuple[Any, dict[str, Any]]:
        """Row indices [batch_size] as the storage takes them, and {"cluster": int64 [batch_size]}."""
        with self._lock:
            self._follow(storage)
            if self._critics is not None:
                self._refresh_if_due()
            rows, cluster = self._rows.sample(batch_size)
        index = coordinates(rows, storage)
        first = index[0] if isinstance(index, tuple) else index
        return index, {"cluster": torch.full_like(first, cluster)}

    def _refresh_if_due(self) -> None:
        """Where the critics are trained; elsewhere they may be in the middle of an update, and are not looked at."""
        if self._thread in (None, threading.get_ident()):
            if self._rows.due(self):
                self.refresh()
        elif not self._warned and (isinstance(self._rows.policy, OnDrift) or self._rows.due(self)):
            self._warned = True
            warnings.warn(
                "batches are drawn in another thread than the critics were attached in (prefetch), where clustering "
                "would race with the training: call the sampler's refresh() in the training loop, when it is due",
                stacklevel=2,
            )

    @outside_inference_mode
    def refresh(self, critics: Critics | None = None) -> RefreshReport:
        """Cluster all stored rows, by the critics given or by those attached; batches of a buffer must have begun.

        Raises:
            ValueError: without critics, before the first batch, and for critics of the wrong form.
        """
        critics = check_critics(self._critics if critics is None else critics, "a Critics record, given or attached")
        with self._lock:
            storage = self._followed()
            self._follow(storage)
            self._rows.adopt(self)
            report = self._rows.refresh(
                critics,
                lambda start, stop: self._stored(storage, torch.arange(start, stop, device="cpu"), critics),
                device=_device_of(critics),
            )
            if self._critics is not None:
                self._rows.note(self)
            return report

    @outside_inference_mode
    def log_likelihood_of(self, rows: Tensor) -> float:
        """Mean over rows [M], int64, of how likely the last mixture finds them by now, in nats; for `OnDrift`."""
        if self._critics is None:
            fail("log_likelihood_of", "attached critics", "none")
        storage, critics = self._followed(), self._critics
        return self._rows.log_likelihood_of(
            rows, critics, lambda some: self._stored(storage, some, critics), device=_device_of(critics)
        )

    def _stored(self, storage: Storage, rows: Tensor, critics: Critics) -> Transitions:
        """Rows as the critics read them: a' is looked up where the data's may be taken."""
        linked = critics.policy is None or self._embedding not in EMBEDDINGS
        return stored(storage, rows, self.keys, self._transform, linked=linked)

    def __len__(self) -> int:
        return self._rows.sampler.size

    @property
    def clustered(self) -> bool:
        """Whether rows are held that a clustering has seen."""
        return self._rows.sampler.clustered

    @property
    def responsibilities(self) -> Tensor:
        """r, [N, K], as it stands: rows written since the last clustering have r_i = p."""
        return self._rows.sampler.responsibilities

    @property
    def probabilities(self) -> Tensor:
        """p_z = mean_i r_iz, [K], float64."""
        return self._rows.sampler.probabilities

    @property
    def last_report(self) -> RefreshReport | None:
        """The report of the last clustering."""
        return self._rows.last_report

    def add(self, index: Any) -> None:
        """TorchRL wrote one row, or one for each environment."""
        self._written(index)

    def extend(self, index: Any) -> None:
        """TorchRL wrote rows: [M], or [M, axes] of a storage with several."""
        self._written(index)

    def mark_update(self, index: Any, *, storage: Storage | None = None) -> None:
        """TorchRL wrote rows, by this buffer's writer or by that of another one with the same storage."""
        if self._storage is None:
            self._storage = storage
        one_axis = storage is None or storage.ndim == 1
        if isinstance(index, slice) and one_axis:
            index = torch.arange(len(self), device="cpu")[index]
        axes = index.ndim if isinstance(index, (np.ndarray, Tensor)) else 1
        if isinstance(index, (int, list, np.ndarray, Tensor)) and (one_axis or axes == 2):
            self._written(index)
        elif len(self):  # nobody can tell which rows these are
            self._empty()

    def state_dict(self) -> dict[str, Any]:
        """All that the batches to come depend on but the critics: clusters, generator, counters."""
        return copy.deepcopy({"options": self._options(), **self._rows.state(self)})

    @outside_inference_mode
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the sampler that gave it was, with a storage that holds what its storage held.

        Raises:
            ValueError: for a state of another form, or of other options; this sampler is unchanged then.
        """
        try:
            for name, value in self._options().items():
                if state_dict["options"][name] != value:
                    fail(name, f"{state_dict['options'][name]!r}, as in the state", repr(value))
            clusterer = copy.deepcopy(state_dict["clusterer"])  # which may lie in a file
            self._rows.restore({**state_dict, "clusterer": clusterer}, self)
        except (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError) as error:
            fail("state_dict", "what state_dict gave", f"{type(error).__name__}: {error}")

    def dumps(self, path: Any) -> None:
        """Write the state into a folder, for the buffer's `dumps`; without pickle."""
        Path(path).mkdir(parents=True, exist_ok=True)
        save(Path(path) / FILE, KIND, self.state_dict())

    def loads(self, path: Any) -> None:
        """Take what `dumps` wrote.

        Raises:
            ValueError: for a file that is damaged or of another kind.
        """
        self.load_state_dict(load(Path(path) / FILE, KIND))

    def __repr__(self) -> str:
        return f"ClusterSampler(n_clusters={self.n_clusters}, rows={len(self)}, clustered={self.clustered})"

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_critics", "_transform", "_storage", "_thread", "_lock")
        return {**vars(self), **dict.fromkeys(left_out)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({**state, "_lock": threading.RLock()})

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        ForkingPickler.register(cls, _in_bytes)

    @property
    def _rng(self) -> torch.Generator:
        return self._rows.generator

    @_rng.setter
    def _rng(self, generator: torch.Generator | None) -> None:
        if generator is not None and generator.device.type == "cpu":
            self._rows.draw_from(generator)

    def _options(self) -> dict[str, Any]:
        """Those that the meaning of a state depends on."""
        max_dim = self._rows.clusterer.max_dim
        return {"n_clusters": self.n_clusters, "max_dim": max_dim, "embedding": self._embedding}

    def _empty(self) -> None:
        """Nothing is held any more."""
        self._rows.clear(self)
        self._warned = False

    def _follow(self, storage: Storage) -> None:
        """Take in how many rows there are; another storage than before, or one that was emptied, is a new beginning."""
        if (self._storage is not None and storage is not self._storage) or len(storage) < len(self):
            self._empty()
        self._storage = storage
        if len(storage) > len(self):
            self._rows.sampler.extend(len(storage) - len(self))

    def _followed(self) -> Storage:
        if self._storage is None:
            fail("storage", "a batch sampled by its buffer before", "none yet")
        return self._storage

    @outside_inference_mode
    def _written(self, index: Any) -> None:
        """Rows that were overwritten lose their cluster; those that came are counted with the next batch."""
        if not len(self) or index is None:  # a writer that keeps the best rows gives None for another
            return
        rows = torch.as_tensor(index, device="cpu")
        if rows.ndim == 2:  # coordinates
            if self._storage is None:  # loaded, and not yet asked for a batch: nobody can tell which rows these are
                self._empty()
                return
            shape = (1, *self._storage.shape[1:])
            rows = sum(column * math.prod(shape[axis + 1 :]) for axis, column in enumerate(rows.unbind(1)))
        rows = rows.reshape(-1)
        overwritten = rows[(rows >= 0) & (rows < len(self))]  # -1: not written, by the same writer
        with self._lock:
            if len(overwritten):
                self._rows.sampler.overwrite(overwritten)


def parameters_of(critics: Critics) -> Iterator[Tensor]:
    """Those of the networks, in the order in which the critics hold them."""
    return (parameter for module in critics.modules for parameter in module.parameters())


def _device_of(critics: Critics) -> torch.device:
    """Where the networks are."""
    return next((parameter.device for parameter in parameters_of(critics)), torch.device("cpu"))


def _in_bytes(sampler: ClusterSampler) -> tuple[Any, ...]:
    """For another process, which would share the memory of tensors, and the changes to it, without this."""
    return pickle.loads, (pickle.dumps(sampler),)


ForkingPickler.register(ClusterSampler, _in_bytes)
