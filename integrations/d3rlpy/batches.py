"""Where a fit's batches come from: a ClusteredReplayBuffer beside each of d3rlpy's own."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from d3rlpy.algos import BCQConfig, PLASConfig, PLASWithPerturbationConfig
from d3rlpy.dataset import MixedReplayBuffer, ReplayBufferBase
from d3rlpy.torch_utility import TorchMiniBatch

from c4buffer import ClusteredReplayBuffer, Critics, Every, Transitions
from c4buffer._checks import fail
from c4buffer.buffer_state import state_of

from .dataset import (
    Seen,
    has_images,
    returns_to_go_of,
    rows_since,
    scaled_observations,
    seen_of,
    stored_transitions_from,
    to_mini_batch,
    transitions_for_buffer,
)
from .frames import FrameBuffer, fill
from .online import ReturnsToGo, check_growing, check_secondary, rows_at_most

# updates before the critics learn, of the algorithms that hold them back (BEAR warms up its actor alone)
WARM_UPS = {BCQConfig: "rl_start_step", PLASConfig: "warmup_steps", PLASWithPerturbationConfig: "warmup_steps"}
OWN_OPTIONS = ("capacity", "n_clusters", "seed")  # of the buffer, which the adapter gives
SECOND = 0x7F4A7C15  # between the seeds of a mixed dataset's two buffers
RANK = 0x9E3779B9  # and between those of one training's processes; of a seed, a CPU generator takes the lower 32 bits


def fitter_call(algo: Any, dataset: Any, arguments: Any, options: Any) -> tuple[list[Any], dict[str, Any]]:
    """What d3rlpy's `fitter`, or yours, is given after a view of the dataset: evaluators get the dataset itself.

    What an evaluator draws is no batch of the training's.
    """
    ours = __name__.rpartition(".")[0]
    theirs = (kind for kind in type(algo).__mro__ if not kind.__module__.startswith(ours))
    fitter = next(vars(kind)["fitter"] for kind in theirs if "fitter" in vars(kind))
    names = list(inspect.signature(fitter).parameters)[2:]  # after the algorithm and the dataset
    arguments, options = list(arguments), dict(options)
    place = names.index("evaluators") if "evaluators" in names else len(arguments)

    def of_dataset(evaluator: Callable[[Any, Any], float]) -> Callable[[Any, Any], float]:
        return lambda algo, _: evaluator(algo, dataset)

    where: Any = (options, "evaluators") if place >= len(arguments) else (arguments, place)
    given = options.get("evaluators") if place >= len(arguments) else arguments[place]
    if given:
        where[0][where[1]] = {name: of_dataset(evaluator) for name, evaluator in given.items()}
    return arguments, options


@contextlib.contextmanager
def view_of(dataset: Any, sample: Callable[[int], Any]) -> Iterator[Any]:
    """The dataset as it is, in all that it holds and takes; only its batches are drawn elsewhere, while this lasts."""
    kind: Any = type(dataset)
    view: Any = object.__new__(_view_class(kind))
    view.__dict__ = dataset.__dict__
    view._c4_sample = sample  # beside that dictionary
    try:
        yield view
    finally:
        del view._c4_sample  # with the data behind it, whoever still knows the view


@functools.cache
def _view_class(kind: Any) -> type:
    """Made once for each kind of dataset, not for each fit: what a class of a fit's own held would stay."""
    drawn = property(lambda view: view._c4_sample)
    return type(kind.__name__, (kind,), {"__slots__": ("_c4_sample",), "sample_transition_batch": drawn})


def updated(algo: Any, update: Callable[[Any], dict[str, float]], batch: Any) -> dict[str, float]:
    """One update: d3rlpy's own, or from what is on the device and scaled already, as it is.

    That is a TorchMiniBatch, or a batch of `algo.c4_buffer`.
    """
    if isinstance(batch, Transitions):
        if algo.need_returns_to_go:
            fail("batch", "a batch of d3rlpy's, with its returns to go", "Transitions")
        batch = to_mini_batch(batch, algo)
    if not isinstance(batch, TorchMiniBatch):
        return update(batch)
    metrics: dict[str, float] = algo._impl.update(batch, algo._grad_step)
    algo._grad_step += 1
    return metrics


class UniformBatches:
    """Batches of one dataset, drawn uniformly, without per-transition Python; for a built algorithm."""

    def __init__(self, dataset: ReplayBufferBase, algo: Any) -> None:
        transitions, frames = transitions_for_buffer(dataset, algo)
        self._algo = algo
        self._buffer = _kind(frames)(
            len(transitions),
            n_clusters=1,
            seed=_seed_of_fit(torch.initial_seed(), algo),
            device=algo._device,
            storage="device",
            frame_stack=max(1, frames),
        )
        fill(self._buffer, transitions)

    def sample(self, batch_size: int) -> TorchMiniBatch:
        """So many rows."""
        return to_mini_batch(self._buffer.sample(batch_size), self._algo)


class Batches:
    """Batches of one dataset, from single clusters.

    Args:
        dataset: d3rlpy's buffer.
        algo: the wrapped algorithm that trains; by its first batch it is built and its scalers are fitted.
        n_steps: None for a dataset that stays as it is; else of the environment that fills it, while it is followed.
        saved: file of a buffer to go on from.
        seed_offset: to tell this buffer's random numbers from another's.
    """

    def __init__(
        self,
        dataset: ReplayBufferBase,
        algo: Any,
        *,
        n_steps: int | None = None,
        saved: str | os.PathLike[str] | None = None,
        seed_offset: int = 0,
    ) -> None:
        self.buffer: ClusteredReplayBuffer | None = None
        self._dataset = dataset
        self._algo: Any = weakref.proxy(algo)  # it holds these: the data wait for no garbage collector
        self._capacity: int | None = None  # of a buffer that grows
        self._saved = saved
        self._seed_offset = seed_offset
        self._seen: Seen | None = None
        self._returns_to_go: torch.Tensor | ReturnsToGo | None = None
        self._attached: Any = None  # the implementation object whose critics the buffer has
        self._images = False
        if n_steps is not None:
            check_growing(dataset)
            self._capacity = rows_at_most(dataset, n_steps)
            self._empty()  # so that what the buffer's options refuse is refused before the environment is stepped

    def sample(self, batch_size: int) -> TorchMiniBatch:
        """So many rows, from one cluster once there are clusters."""
        if self.buffer is None:
            self.buffer = self._filled() if self._capacity is None else self._empty()
        if self._capacity is not None:
            self._follow(self.buffer)
        if self._attached is not self._algo.impl and self._can_cluster(batch_size):
            self.buffer.attach(self.critics)
            if self._warm_up > 0 and not self.buffer.clustered:  # whatever batch it is
                self.buffer.refresh()
            self._attached = self._algo.impl
        batch = self.buffer.sample(batch_size)
        assert batch.indices is not None
        returns_to_go = None if self._returns_to_go is None else self._returns_to_go[batch.indices]
        return to_mini_batch(batch, self._algo, returns_to_go)

    def _filled(self) -> ClusteredReplayBuffer:
        own_stacks = "frame_stack" in self._algo.c4_buffer_options
        transitions, frames = transitions_for_buffer(self._dataset, self._algo, frames=not own_stacks)
        if self._algo.need_returns_to_go:
            self._returns_to_go = returns_to_go_of(self._dataset, self._algo)
        buffer = self._new_buffer(len(transitions), frames)
        fill(buffer, transitions)
        self._images = has_images(transitions.observations)
        if self._saved is not None:
            self._go_on(buffer, self._saved)
            self._algo._c4_saved = None
        return buffer

    def _empty(self) -> ClusteredReplayBuffer:
        assert self._capacity is not None
        if self._algo.need_returns_to_go:
            self._returns_to_go = ReturnsToGo(self._dataset, self._algo, self._capacity)
        return self._new_buffer(self._capacity)

    def _follow(self, buffer: ClusteredReplayBuffer) -> None:
        """Take over what has been appended since the last batch."""
        start, stop = rows_since(self._dataset, self._seen), self._dataset.transition_count
        if stop > buffer.capacity:
            expected = f"at most {buffer.capacity} transitions, those held at first and one a step; create_fifo_replay_"
            fail("buffer", f"{expected}buffer(limit) makes one for what is appended besides", stop)
        if start < stop:
            transitions = stored_transitions_from(self._dataset, start, self._algo)
            buffer.extend(transitions)
            if isinstance(self._returns_to_go, ReturnsToGo):
                self._returns_to_go.extend(start)
            self._images = has_images(transitions.observations)
            self._seen = seen_of(self._dataset)

    def _go_on(self, buffer: ClusteredReplayBuffer, path: str | os.PathLike[str]) -> None:
        """The saved buffer's clusters, generator and counters, over the same transitions."""
        options = {**self._options(), "device": "cpu", "storage": "memory", "folder": None}  # no second copy on a GPU
        state = state_of(ClusteredReplayBuffer.load(path, **options))
        if not _same(state["storage"], state_of(buffer)["storage"]):
            fail("dataset", f"the transitions of the buffer in {path}, scaled as they were", "others")
        buffer.load_state_dict(state)

    def _new_buffer(self, capacity: int, frames: int = 0) -> ClusteredReplayBuffer:
        config = self._algo.config
        seed = torch.initial_seed() if config.seed is None else config.seed
        return _kind(frames)(
            capacity,
            n_clusters=config.n_clusters,
            seed=_seed_of_fit(seed + self._seed_offset, self._algo),
            **{"frame_stack": max(1, frames), **self._options()},
        )

    def _options(self) -> dict[str, Any]:
        config, given = self._algo.config, self._algo.c4_buffer_options
        known = [name for name in inspect.signature(ClusteredReplayBuffer).parameters if name not in OWN_OPTIONS]
        if not isinstance(given, dict) or not given.keys() <= set(known):
            got = ", ".join(map(str, given)) if isinstance(given, dict) else type(given).__name__
            fail("c4_buffer_options", f"a dict of options among {', '.join(known)} (others are C4Config's)", got)
        options = {
            "embedding": config.embedding,
            "refresh": None if config.refresh_interval is None else Every(config.refresh_interval),
            "clusterer": self._algo.c4_clusterer,
            "discount": self._algo.gamma,
            "device": self._algo._device,
            "storage": "device",
            "growing": self._capacity is not None,  # of the million that fit_online asks for, few may ever come
            **given,
        }
        if self._seed_offset:  # policies and clusterers remember, and what they remember is of one buffer
            options.update({name: _another(options[name]) for name in ("clusterer", "refresh")})
        return options

    @property
    def critics(self) -> Critics:
        """The algorithm's critics, shown images as they see them in training."""
        critics: Critics = self._algo.impl.c4_critics
        if not self._images:
            return critics
        scale = functools.partial(scaled_observations, scaler=self._algo.observation_scaler)
        policy = None if critics.policy is None else _Scaled(critics.policy, scale)
        return Critics(critics.critic, critics.target, policy=policy, features=critics.features, encode=scale)

    def _can_cluster(self, batch_size: int) -> bool:
        fewest = max(batch_size, self._algo.config.fewest_rows)
        if self._capacity is not None and len(self.buffer or ()) < fewest:
            return False
        return bool(self._algo.grad_step >= self._warm_up)

    @property
    def _warm_up(self) -> int:
        """Updates before the critics learn, and have gradients worth clustering."""
        base = self._algo.config.base
        return next((int(getattr(base, name)) for kind, name in WARM_UPS.items() if isinstance(base, kind)), 0)


class MixedBatches:
    """Batches of a MixedReplayBuffer: its two shares, each from one cluster of its own buffer's transitions."""

    def __init__(self, dataset: MixedReplayBuffer, algo: Any, *, n_steps: int | None = None) -> None:
        self._ratio = dataset._secondary_mix_ratio
        if n_steps is not None and self._ratio > 0:
            check_secondary(dataset.secondary_replay_buffer)
        self.primary = Batches(dataset.primary_replay_buffer, algo, n_steps=n_steps)
        self.secondary = Batches(dataset.secondary_replay_buffer, algo, seed_offset=SECOND)

    @property
    def buffer(self) -> ClusteredReplayBuffer | None:
        """The primary's."""
        return self.primary.buffer

    @property
    def critics(self) -> Critics:
        """As they read the primary's rows."""
        return self.primary.critics

    def sample(self, batch_size: int) -> TorchMiniBatch:
        """d3rlpy's own shares: the primary's, rounded down, and the secondary's."""
        first = int((1 - self._ratio) * batch_size)
        shares = ((self.primary, first), (self.secondary, batch_size - first))
        return _joined([batches.sample(rows) for batches, rows in shares if rows > 0])


class _Scaled(torch.nn.Module):
    """A policy of what the networks see as one of what is stored."""

    def __init__(self, policy: Callable[[Any], torch.Tensor], scale: Callable[[Any], Any]) -> None:
        super().__init__()
        self.policy, self.scale = policy, scale

    def forward(self, observations: Any) -> torch.Tensor:
        return self.policy(self.scale(observations))


def _kind(frames: int) -> type[ClusteredReplayBuffer]:
    return FrameBuffer if frames > 0 else ClusteredReplayBuffer


def _another(remembering: Any) -> Any:
    """One like it with a memory of its own; its ranks talk through the same process group."""
    group = getattr(getattr(remembering, "clusterer", remembering), "process_group", None)
    return copy.deepcopy(remembering, {id(group): group})


def _seed_of_fit(seed: int, algo: Any) -> int:
    """A second fit of one algorithm draws other batches, and so does each rank."""
    return int((seed + algo.grad_step + _rank(algo) * RANK) % 2**63)


def _rank(algo: Any) -> int:
    return torch.distributed.get_rank() if algo._enable_ddp and torch.distributed.is_initialized() else 0


def _joined(parts: list[TorchMiniBatch]) -> TorchMiniBatch:
    if len(parts) == 1:
        return parts[0]
    names = [field.name for field in dataclasses.fields(parts[0]) if field.name not in ("device", "numpy_batch")]

    def join(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        if isinstance(values[0], list):
            return [torch.cat(leaves) for leaves in zip(*values)]
        return torch.cat(values)

    return TorchMiniBatch(**{name: join(name) for name in names}, device=parts[0].device)


def _same(one: Any, other: Any) -> bool:
    """Whether two states are equal, tensor by tensor."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other.to(one.device))
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)
