"""ACTIVE as one of d3rlpy's own algorithms, which `ACTIVEConfig` makes."""

from collections.abc import Iterator
from typing import Any

import torch
from d3rlpy.algos import QLearningAlgoBase
from d3rlpy.constants import ActionSpace
from d3rlpy.dataset import MixedReplayBuffer, ReplayBuffer
from d3rlpy.models.builders import create_continuous_q_function, create_normal_policy
from d3rlpy.models.q_functions import MeanQFunctionFactory
from d3rlpy.torch_utility import wrap_model_by_ddp

from c4buffer import Transitions, estimate_log_likelihood_target
from c4buffer._checks import fail, is_finite_number

from .active_config import ACTIVEConfig
from .active_implementation import ACTIVEImpl, ACTIVEModules
from .active_networks import PolicyDensity, new_value_functions
from .batches import UniformBatches, fitter_call, updated, view_of
from .dataset import rows_since, seen_of, stored_transitions_of

DENSITY = {"min_logstd": -5.0, "max_logstd": 2.0, "use_std_parameter": True}  # of the policy, as IQL's in d3rlpy


class ACTIVE(QLearningAlgoBase[ACTIVEImpl, ACTIVEConfig]):
    """ACTIVE in d3rlpy's terms; made by `ACTIVEConfig.create`."""

    def inner_create_impl(self, observation_shape: Any, action_size: int) -> None:
        config, ddp = self._config, self._enable_ddp
        policy = self._new_policy(observation_shape, action_size, ddp)
        critics = [
            create_continuous_q_function(
                observation_shape,
                action_size,
                config.critic_encoder_factory,
                MeanQFunctionFactory(),
                n_ensembles=config.n_critics,
                device=self._device,
                enable_ddp=ddp,
            )
            for _ in range(2)
        ]
        (q_funcs, forwarder), (targ_q_funcs, targ_forwarder) = critics
        value_funcs = new_value_functions(observation_shape, config.value_encoder_factory, config.n_members)
        value_funcs = value_funcs.to(self._device)
        value_funcs = wrap_model_by_ddp(value_funcs) if ddp else value_funcs
        group = torch.distributed.group.WORLD if ddp else None
        modules = ACTIVEModules(
            policy=policy,
            q_funcs=q_funcs,
            targ_q_funcs=targ_q_funcs,
            value_funcs=value_funcs,
            temperature=config.make_controller(group).to(self._device),
            actor_optim=config.actor_optim_factory.create(
                policy.named_modules(), lr=config.actor_learning_rate, compiled=self.compiled
            ),
            critic_optim=config.critic_optim_factory.create(
                [*q_funcs.named_modules(), *value_funcs.named_modules()],
                lr=config.critic_learning_rate,
                compiled=self.compiled,
            ),
        )
        self._impl = ACTIVEImpl(
            observation_shape=observation_shape,
            action_size=action_size,
            modules=modules,
            q_func_forwarder=forwarder,
            targ_q_func_forwarder=targ_forwarder,
            gamma=config.gamma,
            tau=config.eta,
            compiled=self.compiled,
            device=self._device,
            config=config,
        )

    def fitter(self, dataset: Any, *arguments: Any, **options: Any) -> Iterator[tuple[int, dict[str, float]]]:
        """d3rlpy's `fitter`, with batches from the dataset's columns; before the first, H_D is estimated if need be.

        They are read anew when rows have been appended. A MixedReplayBuffer's batches, those of a dataset with a
        sampling, or a transition picker, of its own, and C4's, are taken as they come.

        Raises:
            ValueError: for discrete actions.
        """
        _check_continuous(dataset)
        if dataset.transition_count == 0:
            fail("dataset", "at least one transition", "an empty dataset")
        self._follow()
        drawn_elsewhere = not _draws_as_the_host(dataset)
        batches: Any = None
        newest: Any = None

        def sample(batch_size: int) -> Any:
            nonlocal batches, newest
            self._know_target(dataset)
            if drawn_elsewhere:
                return dataset.sample_transition_batch(batch_size)
            if rows_since(dataset, newest) < dataset.transition_count:
                batches, newest = UniformBatches(dataset, self), seen_of(dataset)
            return batches.sample(batch_size)

        given, named = fitter_call(self, dataset, arguments, options)
        with view_of(dataset, sample) as view:
            yield from super().fitter(view, *given, **named)

    def update(self, batch: Any) -> dict[str, float]:
        """d3rlpy's `update`; a TorchMiniBatch is taken as it is, on the device and scaled.

        Raises:
            ValueError: where H_D is still to be estimated, as a fit does with its data; nothing is changed then.
        """
        return updated(self, super().update, batch)

    def fit_online(self, env: Any, *arguments: Any, **options: Any) -> None:
        """d3rlpy's `fit_online`.

        Raises:
            ValueError: where H_D is still to be estimated, for which there are no data.
        """
        if self._waits_for_target:
            fail("likelihood_target", "a number, or a fit before fit_online", "'auto'")
        self._follow()
        super().fit_online(env, *arguments, **options)

    def build_with_dataset(self, dataset: Any) -> None:
        """d3rlpy's.

        Raises:
            ValueError: for discrete actions.
        """
        _check_continuous(dataset)
        super().build_with_dataset(dataset)

    def get_action_type(self) -> ActionSpace:
        return ActionSpace.CONTINUOUS

    def estimate_likelihood_target(self, dataset: Any, **options: Any) -> float:
        """H_D from a dataset, for this algorithm's density and scalers; beta follows it from now on.

        Where the config has a number, or None, `load_model` puts that back.

        Args:
            dataset: d3rlpy's ReplayBuffer, or a MixedReplayBuffer, of which all rows count alike; networks must be
                built, and scalers fitted, as `fit` does.
            options: those of `estimate_log_likelihood_target`.
        """
        if self._impl is None:
            fail("algo", "a built algorithm (call build_with_dataset or fit first)", "one without networks")
        for name in ("observation_scaler", "action_scaler", "reward_scaler"):
            scaler = getattr(self, name)
            if scaler is not None and not scaler.built:
                fail(
                    "algo", "fitted scalers (scaler.fit_with_transition_picker, or a fit before)", f"an unfitted {name}"
                )
        shape, size = self._impl.observation_shape, self._impl.action_size
        mixed = isinstance(dataset, MixedReplayBuffer)
        parts = [dataset.primary_replay_buffer, dataset.secondary_replay_buffer] if mixed else [dataset]
        parts = [part for part in parts if part.transition_count > 0] or parts
        found = estimate_log_likelihood_target(
            Transitions.concatenate([stored_transitions_of(part, self) for part in parts]),
            lambda: PolicyDensity(self._new_policy(shape, size, False), self),
            **options,
        )
        if self._enable_ddp:  # ranks may have other data, and must have one H_D
            mean = torch.tensor(found, dtype=torch.float64, device=self._device)
            torch.distributed.all_reduce(mean)
            found = float(mean) / torch.distributed.get_world_size()
        self._impl.modules.temperature.target = found
        return found

    def save(self, fname: str) -> None:
        """d3rlpy's `save`."""
        self._lower_initial_beta()
        super().save(fname)

    def _lower_initial_beta(self) -> None:
        """To a `max_beta` that was set below it since, or the saved config could not be read."""
        config = self._config
        if self._impl is not None and is_finite_number(config.max_beta):
            config.initial_beta = min(config.initial_beta, config.max_beta)

    def _follow(self) -> None:
        """Before a fit: the config's settings as they stand."""
        self._lower_initial_beta()
        self._config.__post_init__()
        if self._impl is not None:
            self._impl.follow()

    def _know_target(self, dataset: Any) -> None:
        if self._waits_for_target:
            self.estimate_likelihood_target(dataset)

    @property
    def _waits_for_target(self) -> bool:
        """Whether H_D is still to be estimated."""
        return self._config.likelihood_target == "auto" and (self._impl is None or self._impl.waits_for_target)

    def _new_policy(self, observation_shape: Any, action_size: int, ddp: bool) -> Any:
        return create_normal_policy(
            observation_shape,
            action_size,
            self._config.actor_encoder_factory,
            device=self._device,
            enable_ddp=ddp,
            **DENSITY,
        )


def _draws_as_the_host(dataset: Any) -> bool:
    """Whether each of its batches is of uniform rows, read by one of d3rlpy's own pickers."""
    if isinstance(dataset, MixedReplayBuffer):
        return False
    for name in ("sample_transition_batch", "sample_transition"):
        if getattr(type(dataset), name) is not getattr(ReplayBuffer, name) or name in vars(dataset):
            return False
    return type(dataset.transition_picker).__module__.split(".")[0] == "d3rlpy"


def _check_continuous(dataset: Any) -> None:
    if dataset.dataset_info.action_space != ActionSpace.CONTINUOUS:
        fail("dataset", "continuous actions, which have a density", "discrete ones")
