"""The seam: a runtime subclass of d3rlpy's algorithm, whose fits draw from a clustered buffer."""

import errno
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from d3rlpy.algos import (
    AWAC,
    BC,
    BCQ,
    BEAR,
    CQL,
    CRR,
    DDPG,
    DQN,
    IQL,
    NFQ,
    PLAS,
    PRDC,
    SAC,
    TD3,
    CalQL,
    DiscreteBC,
    DiscreteBCQ,
    DiscreteCQL,
    DiscreteRandomPolicy,
    DiscreteSAC,
    DoubleDQN,
    PLASWithPerturbation,
    QLearningAlgoBase,
    RandomPolicy,
    ReBRAC,
    TD3PlusBC,
)
from d3rlpy.algos.utility import assert_action_space_with_dataset, assert_action_space_with_env
from d3rlpy.dataset import MixedReplayBuffer, ReplayBufferBase, create_fifo_replay_buffer

from c4buffer import ClusteredReplayBuffer, Clusterer, Critics
from c4buffer._checks import fail

from .active import ACTIVE
from .batches import Batches, MixedBatches, fitter_call, updated, view_of
from .config import C4Config
from .implementation import arm_impl, bare, follow

CONTINUOUS = (
    DDPG,
    TD3,
    TD3PlusBC,
    ReBRAC,
    PRDC,
    SAC,
    AWAC,
    CQL,
    CalQL,
    BEAR,
    BCQ,
    CRR,
    PLAS,
    PLASWithPerturbation,
    IQL,
    ACTIVE,
)
DISCRETE = (DQN, DoubleDQN, NFQ, DiscreteCQL, DiscreteBCQ, DiscreteSAC)
SUPPORTED = (*CONTINUOUS, *DISCRETE)
ONLINE_CAPACITY = 1_000_000  # d3rlpy's own defaults of fit_online, for its buffer and its steps
WITHOUT_CRITIC = (BC, DiscreteBC, RandomPolicy, DiscreteRandomPolicy)


def wrap(algo: Any, **fields: Any) -> Any:
    """Put C4 into an algorithm that exists, built or not: its weights, optimizer state and step count are kept.

    The algorithm is changed in place and returned; nothing is changed if it is refused.

    Args:
        algo: a d3rlpy algorithm, or one of a subclass of yours.
        fields: those of `C4Config`, without `base`.

    Raises:
        ValueError: for an algorithm without a critic, one that is not supported, and one that is wrapped already.

    .. code-block:: python

        algo = wrap(TD3PlusBCConfig().create(), n_clusters=5)
    """
    if isinstance(algo, C4Algorithm):
        fail("algo", "an algorithm without C4", f"a {type(algo).__name__}, which is wrapped already")
    _check_supported(algo)
    return armed(algo, C4Config(base=algo.config, **fields))


def armed(algo: Any, config: C4Config) -> Any:
    """The algorithm, given C4's subclass and config."""
    _check_supported(algo)
    if algo.impl is not None:
        arm_impl(algo.impl, config)
    algo.__class__ = _algorithm_class(algo.__class__)
    algo._c4_config = config
    algo._c4_reported = None
    algo._c4_batches = None
    algo._c4_saved = None
    algo.c4_clusterer = None
    algo.c4_buffer_options = {}
    return algo


def _check_supported(algo: Any) -> None:
    name = type(algo).__name__
    if isinstance(algo, WITHOUT_CRITIC):
        fail("algo", "a Q-learning algorithm", f"{name}, which has no critic whose covariance could be controlled")
    if not isinstance(algo, QLearningAlgoBase):
        fail("algo", "a d3rlpy Q-learning algorithm, as create() makes one of a config", name)
    if not isinstance(algo, SUPPORTED):
        fail("algo", "one of " + ", ".join(sorted(cls.__name__ for cls in SUPPORTED)), name)
    if type(algo).update not in (QLearningAlgoBase.update, ACTIVE.update) or "update" in vars(algo):
        fail("algo", "d3rlpy's own `update`, as batches come as tensors", f"one of {name}'s")
    patched = vars(algo.impl).keys() & {"inner_update", "compute_critic_loss", "compute_loss"} if algo.impl else ()
    if patched:
        fail("algo", "methods of its classes, to which the penalty is added", f"{min(patched)} set on the object")


class C4Algorithm(QLearningAlgoBase):
    """What C4 adds to an algorithm. Internals read `_config`, the base; saving reads `config`, the C4Config.

    Attributes:
        c4_clusterer: how to cluster, for a fit that starts after it is set. None: the buffer's own way.
        c4_buffer_options: more options of the ClusteredReplayBuffer, as `{"assignment": "hard"}`, for a fit that starts
            after they are set. Like the clusterer, they are not saved with the algorithm.
    """

    _c4_config: C4Config
    _c4_reported: Any
    _c4_batches: Batches | MixedBatches | None
    _c4_saved: str | os.PathLike[str] | None
    c4_clusterer: Clusterer | None
    c4_buffer_options: dict[str, Any]

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {**self.__dict__, "_c4_batches": None, "_c4_reported": None}  # no copies of the data
        return bare, (_algorithm_class, type(self).__bases__[1]), state

    @property
    def config(self) -> Any:
        return self._c4_config

    @property
    def c4_buffer(self) -> ClusteredReplayBuffer | None:
        """The buffer of the running or last fit; of a MixedReplayBuffer, the primary's. None before its first batch."""
        return None if self._c4_batches is None else self._c4_batches.buffer

    @property
    def c4_secondary_buffer(self) -> ClusteredReplayBuffer | None:
        """The same for the secondary of a MixedReplayBuffer."""
        return self._c4_batches.secondary.buffer if isinstance(self._c4_batches, MixedBatches) else None

    @property
    def c4_critics(self) -> Critics | None:
        """The critics as they read the rows of `c4_buffer`, whose images are not scaled yet; None where that is."""
        batches = self._c4_batches
        return None if batches is None or batches.buffer is None else batches.critics

    def inner_create_impl(self, observation_shape: Any, action_size: int) -> None:
        super().inner_create_impl(observation_shape, action_size)
        arm_impl(self._impl, self._c4_config)

    def fitter(self, dataset: Any, *arguments: Any, **options: Any) -> Iterator[tuple[int, dict[str, float]]]:
        """d3rlpy's `fitter`, drawing its batches from a ClusteredReplayBuffer of the dataset."""
        if not isinstance(dataset, ReplayBufferBase):
            fail("dataset", "a d3rlpy dataset, as dataset_of(transitions) makes one", type(dataset).__name__)
        mixed = isinstance(dataset, MixedReplayBuffer)
        if mixed:
            self._c4_check_fresh("fit with a MixedReplayBuffer")
        if dataset.transition_count == 0:
            fail("dataset", "at least one transition", "an empty dataset")
        assert_action_space_with_dataset(self, dataset.dataset_info)
        self._c4_start(MixedBatches(dataset, self) if mixed else Batches(dataset, self, saved=self._c4_saved))
        given, named = fitter_call(self, dataset, arguments, options)
        with self._c4_view(dataset) as view:
            yield from super().fitter(view, *given, **named)

    def fit_online(self, env: Any, buffer: Any = None, *arguments: Any, **options: Any) -> None:
        """d3rlpy's `fit_online`, drawing its batches from a ClusteredReplayBuffer that takes what `buffer` takes.

        Raises:
            ValueError: before the environment is stepped, for a buffer whose rows may still change after they have
                appeared: with a picker that looks ahead of the newest step, as the multi-step one does, unless it
                writes at termination.
        """
        buffer = create_fifo_replay_buffer(ONLINE_CAPACITY, env=env) if buffer is None else buffer
        n_steps = options.get("n_steps", arguments[1] if len(arguments) > 1 else ONLINE_CAPACITY)
        self._c4_check_fresh("fit_online")
        kind = MixedBatches if isinstance(buffer, MixedReplayBuffer) else Batches
        batches = kind(buffer, self, n_steps=n_steps)
        assert_action_space_with_env(self, env)  # as the host will, before the last fit's buffer is let go
        self._c4_start(batches)
        with self._c4_view(buffer) as view:
            super().fit_online(env, view, *arguments, **options)

    def c4_resume(self, path: str | os.PathLike[str]) -> None:
        """Let the next `fit` go on, batch for batch, where the buffer that was saved to `path` stood.

        The rest is d3rlpy's own: `load_model` for networks and optimizers, `set_grad_step` for the step count; and
        torch's generator, from which many algorithms draw noise.

        Args:
            path: what `algo.c4_buffer.save(path)` wrote during or after a fit of the same dataset.

        Raises:
            FileNotFoundError: where there is none.
            ValueError: from that `fit`, for a file that is damaged or of other transitions or options.

        .. code-block:: python

            algo.save_model("model.pt")
            algo.c4_buffer.save("buffer.safetensors")
            ...
            algo.build_with_dataset(dataset)
            algo.load_model("model.pt")
            algo.set_grad_step(50_000)
            algo.c4_resume("buffer.safetensors")
            algo.fit(dataset, n_steps=50_000)
        """
        if not Path(path).is_file():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
        self._c4_saved = path

    def update(self, batch: Any) -> dict[str, float]:
        """One update from a TransitionMiniBatch, from a TorchMiniBatch, or from a batch of `c4_buffer`."""
        metrics: dict[str, float] = updated(self, super().update, batch)
        buffer = self.c4_secondary_buffer if self.c4_buffer is None else self.c4_buffer  # a share may be none
        report = None if buffer is None else buffer.last_report
        if report is not None and report is not self._c4_reported:
            self._c4_reported = report
            metrics.update(
                c4_cross_covariance=report.total,
                c4_within_cross_covariance=report.within,
                c4_between_cross_covariance=report.between,
                c4_smallest_probability=min(report.probabilities),
                c4_log_likelihood=report.log_likelihood,
                c4_refresh_seconds=report.seconds,
            )
        return metrics

    def _c4_check_fresh(self, call: str) -> None:
        if self._c4_saved is not None:
            fail("c4_resume", "a fit of one dataset after it", call)

    def _c4_start(self, batches: Batches | MixedBatches) -> None:
        """A fit with these batches, and with the config's settings as they stand."""
        self._c4_config.__post_init__()  # they may have been set since it was made
        self._c4_batches = batches
        if self._impl is not None:
            follow(self._impl, self._c4_config)

    def _c4_view(self, dataset: Any) -> Any:
        assert self._c4_batches is not None
        return view_of(dataset, self._c4_batches.sample)


@functools.cache
def _algorithm_class(base: Any) -> type:
    return type(f"C4{base.__name__}", (C4Algorithm, base), {"__module__": __name__, "__doc__": base.__doc__})
