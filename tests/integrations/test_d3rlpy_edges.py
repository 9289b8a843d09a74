"""C4 inside d3rlpy, where somebody changes, inspects or misuses something."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import d3rlpy
import gymnasium
import numpy as np
import pytest
import torch
from c4buffer.integrations.d3rlpy import ACTIVEConfig, C4Config, critics_of, measure, measuring, transitions_of
from c4buffer.integrations.d3rlpy import dataset_of as episodes_of
from c4buffer.integrations.d3rlpy.reading import networks_of
from c4buffer.integrations.d3rlpy.sharing import can_be_shared
from d3rlpy.algos import (
    BCQConfig,
    BEARConfig,
    CRRConfig,
    DiscreteCQLConfig,
    DiscreteSACConfig,
    DQNConfig,
    IQLConfig,
    PLASConfig,
    SACConfig,
    TD3Config,
    TD3PlusBCConfig,
)
from d3rlpy.base import LearnableConfig
from d3rlpy.dataset import Episode, InfiniteBuffer, ReplayBuffer
from d3rlpy.models.encoders import VectorEncoderFactory
from d3rlpy.models.q_functions import IQNQFunctionFactory
from d3rlpy.ope import FQEConfig
from d3rlpy.preprocessing import PixelObservationScaler, StandardObservationScaler
from torch import nn

from c4buffer import CovariancePenalty, Transitions, stacked_gradients

from .test_d3rlpy import QUIET, built, data_for, dataset_of, drawn, episodes, mini_batch, small
from .test_d3rlpy_user import ONE

__all__ = ["drawn"]  # a fixture


@pytest.mark.parametrize("config", [BCQConfig, BEARConfig, CRRConfig, PLASConfig, TD3Config])
def test_the_policys_action_leaves_generators_and_batch_statistics_as_they_were(config: type) -> None:
    dataset = dataset_of(episodes())
    encoder = VectorEncoderFactory([8], use_batch_norm=True)
    base = small(config)
    for field in dataclasses.fields(base):
        if field.name.endswith("encoder_factory"):
            setattr(base, field.name, encoder)
    algo = built(base, dataset)
    networks = [getattr(algo.impl.modules, field.name) for field in dataclasses.fields(algo.impl.modules)]
    networks = [network for network in networks if isinstance(network, torch.nn.Module)]
    assert all(network.training for network in networks)
    before = [value.clone() for network in networks for value in network.state_dict().values()]
    torch_state = torch.get_rng_state().clone()
    stacked_gradients(critics_of(algo, next_action="policy"), transitions_of(dataset, algo))
    assert torch.equal(torch_state, torch.get_rng_state())
    after = [value for network in networks for value in network.state_dict().values()]
    assert all(map(torch.equal, before, after))
    assert all(network.training for network in networks)


@pytest.mark.parametrize(
    ("config", "greedy"),
    [(DQNConfig, 32), (DiscreteCQLConfig, 32), (TD3Config, 64), (SACConfig, 64)],  # d3rlpy itself trains no others
)
def test_implicit_quantiles_are_measured_with_as_many_as_the_loss_has_in_training(config: type, greedy: int) -> None:
    dataset = data_for(config)
    algo = built(small(config, q_func_factory=IQNQFunctionFactory(n_greedy_quantiles=greedy)), dataset)
    state = torch.get_rng_state().clone()
    measured = measure(algo, transitions_of(dataset, algo))
    assert torch.equal(state, torch.get_rng_state())
    assert all(np.isfinite(value) for value in measured.values())
    assert measured["td_loss"] > 0


def test_what_is_measured_does_not_depend_on_how_many_rows_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = dataset_of(episodes())
    algo = built(small(TD3Config, target_smoothing_sigma=0.0), dataset)
    transitions = transitions_of(dataset, algo)
    whole = measure(algo, transitions)
    monkeypatch.setattr(measuring, "CHUNK_ROWS", 7)
    assert measure(algo, transitions) == pytest.approx(whole, rel=1e-4)


def test_what_is_changed_in_the_base_later_is_saved_and_loaded(tmp_path: Path) -> None:
    algo = built(C4Config(base=small(TD3Config)), dataset_of(episodes()))
    algo.config.base.batch_size = 32
    assert algo.config.batch_size == 32
    algo.save(str(tmp_path / "algo.d3"))
    loaded = d3rlpy.load_learnable(str(tmp_path / "algo.d3"))
    assert loaded.config.base.batch_size == loaded.config.batch_size == 32


@pytest.mark.parametrize(
    "config",
    [
        C4Config(base=small(TD3Config), n_clusters=2, seed=0),
        small(ACTIVEConfig, likelihood_target=-1.0),
        C4Config(base=small(ACTIVEConfig, likelihood_target=-1.0), n_clusters=2, seed=0),
    ],
    ids=["C4", "ACTIVE", "both"],
)
def test_an_evaluator_is_given_the_dataset_itself(config: Any) -> None:
    dataset = dataset_of(episodes(10))
    algo = config.create()
    seen = []

    def evaluator(trained: Any, given: Any) -> float:
        assert given is dataset
        batch = given.sample_transition_batch(4)
        seen.append(trained.predict(batch.observations).shape)
        return 1.5

    results = algo.fit(dataset, n_steps=4, n_steps_per_epoch=2, evaluators={"own": evaluator}, **QUIET)
    assert seen == [(4, 2), (4, 2)]
    assert [metrics["own"] for _, metrics in results] == [1.5, 1.5]


def test_a_resumption_that_was_refused_waits_for_the_next_fit(tmp_path: Path) -> None:
    dataset = dataset_of(episodes(10))
    algo = built(C4Config(base=small(TD3Config), n_clusters=2, seed=0), dataset)
    algo.fit(dataset, n_steps=3, n_steps_per_epoch=3, **QUIET)
    algo.c4_buffer.save(tmp_path / "buffer.safetensors")
    algo.c4_resume(tmp_path / "buffer.safetensors")
    for _ in range(2):
        with pytest.raises(ValueError, match="dataset: expected the transitions of the buffer"):
            algo.fit(dataset_of(episodes(10, seed=1)), n_steps=3, n_steps_per_epoch=3, **QUIET)
    algo.fit(dataset, n_steps=3, n_steps_per_epoch=3, **QUIET)
    algo.fit(dataset_of(episodes(10, seed=1)), n_steps=3, n_steps_per_epoch=3, **QUIET)  # and only for one


@pytest.mark.parametrize("options", [{"n_clusters": 4}, {"seed": 1}, {"capacity": 10}, {"assignmet": "hard"}])
def test_options_that_the_buffer_does_not_take_are_refused(options: dict[str, Any]) -> None:
    algo = C4Config(base=small(TD3Config)).create()
    algo.c4_buffer_options = options
    with pytest.raises(ValueError, match=f"c4_buffer_options: expected a dict of .*got {next(iter(options))}"):
        algo.fit(dataset_of(episodes()), n_steps=2, n_steps_per_epoch=2, **QUIET)


def test_as_many_clusters_as_the_data_ask_for(tmp_path: Path) -> None:
    algo = C4Config(base=small(TD3Config), n_clusters="auto", refresh_interval=2, seed=0).create()
    algo.fit(dataset_of(episodes()), n_steps=4, n_steps_per_epoch=4, **QUIET)
    assert algo.c4_buffer.clustered
    algo.save(str(tmp_path / "algo.d3"))
    assert d3rlpy.load_learnable(str(tmp_path / "algo.d3")).config.n_clusters == "auto"
    with pytest.raises(ValueError, match="n_clusters"):
        C4Config(base=small(TD3Config), n_clusters="many")


def test_a_plain_function_can_be_the_penalty() -> None:
    dataset = dataset_of(episodes(10))
    algo = built(C4Config(base=small(TD3Config), penalty_every=2, seed=0), dataset)
    algo.impl.c4_penalty = lambda critics, batch: 3.0 * batch.rewards.square().mean()
    results = algo.fit(dataset, n_steps=4, n_steps_per_epoch=4, **QUIET)
    assert results[0][1]["c4_penalty"] > 0


def test_scalers_that_are_not_fitted_are_named() -> None:
    algo = TD3PlusBCConfig(observation_scaler=StandardObservationScaler()).create()
    with pytest.raises(ValueError, match="algo: expected one whose scalers have been fitted.*got a Standard"):
        transitions_of(dataset_of(episodes()), algo)


def test_fitted_q_evaluation_is_no_base() -> None:
    with pytest.raises(ValueError, match="base: expected the config of an algorithm, got FQEConfig"):
        C4Config(base=FQEConfig()).create()


class Annealed(CovariancePenalty):
    """Half of it."""

    def __call__(self, critics: Any, batch: Any) -> torch.Tensor:
        return 0.5 * super().__call__(critics, batch)


class Weighted:
    """A penalty with a weight that says what it likes."""

    def __init__(self, weight: Any) -> None:
        self.weight = weight

    def __call__(self, critics: Any, batch: Any) -> torch.Tensor:
        return torch.tensor(2.0)


@pytest.mark.parametrize("penalty", [Annealed(0.5), Weighted(-1.0), Weighted(torch.ones(2))])
def test_a_penalty_is_called_whatever_else_it_is(penalty: Any) -> None:
    dataset = dataset_of(episodes(10))
    algo = built(C4Config(base=small(TD3Config), penalty_every=1, seed=0), dataset)
    algo.impl.c4_penalty = penalty
    assert algo.fit(dataset, n_steps=2, n_steps_per_epoch=2, **QUIET)[0][1]["c4_penalty"] > 0


@pytest.mark.parametrize(("result", "got"), [(0.0, "float"), (torch.zeros(1), r"\[1\]"), (None, "NoneType")])
def test_a_penalty_that_is_no_number_is_named(result: Any, got: str) -> None:
    for config in (DQNConfig, TD3Config):
        dataset = data_for(config)
        algo = built(C4Config(base=small(config)), dataset)
        algo.impl.c4_penalty = lambda critics, batch: result
        with pytest.raises(ValueError, match=rf"c4_penalty: expected a callable .* of one number, \[\], got {got}"):
            algo.fit(dataset, n_steps=1, n_steps_per_epoch=1, **QUIET)


def test_a_fit_takes_the_configs_settings_as_they_stand_and_leaves_a_penalty_of_ones_own() -> None:
    dataset = dataset_of(episodes(10))
    algo = built(C4Config(base=small(TD3Config), n_clusters=2, penalty_every=1, seed=0), dataset)
    made = algo.impl.c4_penalty
    made.weight = 0.3  # an annealing
    algo.fit(dataset, n_steps=1, n_steps_per_epoch=1, **QUIET)
    assert algo.impl.c4_penalty is made
    algo.config.penalty_weight, algo.config.penalty_scale, algo.config.next_action = 0.7, "correlation", "policy"
    assert "c4_penalty" in algo.fit(dataset, n_steps=1, n_steps_per_epoch=1, **QUIET)[0][1]
    assert (algo.impl.c4_penalty.weight, algo.impl.c4_penalty.scale) == (0.7, "correlation")
    assert algo.impl.c4_critics.policy is not None
    algo.config.penalty_weight = 0.0
    assert "c4_penalty" not in algo.fit(dataset, n_steps=1, n_steps_per_epoch=1, **QUIET)[0][1]
    algo.impl.c4_penalty = own = Weighted(1.0)
    algo.config.penalty_weight = 0.2
    assert "c4_penalty" in algo.fit(dataset, n_steps=1, n_steps_per_epoch=1, **QUIET)[0][1]
    assert algo.impl.c4_penalty is own


def test_fields_that_every_config_has_are_the_bases() -> None:
    base = TD3Config(batch_size=128)
    config = C4Config(base)
    algo = config.create()
    algo.config.batch_size = 7
    assert (algo.batch_size, base.batch_size, config.batch_size) == (7, 7, 7)
    base.gamma = 0.5
    assert C4Config.deserialize(config.serialize()) == config
    assert dataclasses.replace(config, base=DQNConfig()).batch_size == 32
    assert {field.name for field in dataclasses.fields(LearnableConfig)} == {
        name for name, value in vars(C4Config).items() if type(value).__name__ == "_OfBase"
    }


def test_rewards_of_several_steps_are_discounted_by_the_algorithms_gamma(drawn: list[Transitions]) -> None:
    dataset = dataset_of(episodes(10))
    algo = C4Config(base=small(TD3Config, gamma=0.5), n_clusters=1, seed=0).create()
    algo.c4_buffer_options = {"n_steps": 3}
    algo.fit(dataset, n_steps=2, n_steps_per_epoch=2, **QUIET)
    rows = transitions_of(dataset)
    ends = (rows.terminals + rows.timeouts).tolist()
    for batch in drawn:
        for start, reward in zip(batch.indices.tolist(), batch.rewards.tolist()):
            expected, factor = 0.0, 1.0
            for row in range(start, start + 3):
                expected += factor * float(rows.rewards[row])
                factor *= 0.5
                if ends[row]:
                    break
            assert reward == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("config", [TD3Config, SACConfig, IQLConfig, BCQConfig, DiscreteSACConfig])
def test_measure_leaves_dropout_and_batch_statistics_alone_and_does_not_depend_on_the_mode(config: type) -> None:
    dataset = data_for(config)
    base = small(config)
    for field in dataclasses.fields(base):
        if field.name.endswith("encoder_factory"):
            setattr(base, field.name, VectorEncoderFactory([8], use_batch_norm=True, dropout_rate=0.3))
    algo = built(base, dataset)
    networks = networks_of(algo.impl)
    networks.train()
    before = {name: value.clone() for name, value in networks.state_dict().items()}
    training = measure(algo, transitions_of(dataset, algo))
    assert all(torch.equal(value, before[name]) for name, value in networks.state_dict().items())
    assert all(network.training for network in networks.modules())
    networks.eval()
    assert measure(algo, transitions_of(dataset, algo)) == training


def test_measure_scales_images_as_a_buffer_stores_them() -> None:
    rng = np.random.default_rng(0)
    parts = [
        Episode(
            rng.integers(0, 256, (12, 1, 36, 36), dtype=np.uint8),
            rng.integers(0, 3, (12, 1)).astype(np.int32),
            rng.normal(size=(12, 1)).astype(np.float32),
            terminated=bool(i % 2),
        )
        for i in range(3)
    ]
    dataset = dataset_of(parts)
    base = DQNConfig(batch_size=16, observation_scaler=PixelObservationScaler())
    algo = C4Config(base=base, n_clusters=2, seed=0).create()
    algo.fit(dataset, n_steps=1, n_steps_per_epoch=1, **QUIET)
    stored = algo.c4_buffer.rows()
    assert stored.observations.dtype == torch.uint8
    measured = measure(algo, stored)
    assert measured == measure(algo, transitions_of(dataset, algo))

    target_g, g = stacked_gradients(critics_of(algo), transitions_of(dataset, algo)).double().chunk(2, dim=1)
    target_g, g = target_g - target_g.mean(dim=0), g - g.mean(dim=0)
    total = float((target_g.T @ g / len(g)).norm())  # by 1,296 pixels, of 36 rows
    bound = float(target_g.norm() * g.norm() / len(g))
    assert measured["total"] == pytest.approx(total)
    assert measured["correlation"] == pytest.approx(total / bound)
    assert abs(measured["within"] - measured["between"]) <= measured["total"] * (1 + 1e-9)
    assert measured["total"] <= (measured["within"] + measured["between"]) * (1 + 1e-9)


def test_networks_made_anew_in_a_fit_are_clustered_by() -> None:
    dataset = dataset_of(episodes(10))
    algo = built(C4Config(base=small(TD3Config), n_clusters=2, seed=0), dataset)

    def anew(algo: Any, epoch: int, step: int) -> None:
        if step == 2:
            algo.create_impl((3,), 2)

    algo.fit(dataset, n_steps=4, n_steps_per_epoch=4, callback=anew, **QUIET)
    assert algo.c4_buffer._critics is algo.impl.c4_critics


def test_a_refused_fit_leaves_the_last_ones_buffer() -> None:
    dataset = dataset_of(episodes(10))
    algo = C4Config(base=small(TD3Config), n_clusters=2, seed=0).create()
    algo.fit(dataset, n_steps=1, n_steps_per_epoch=1, **QUIET)
    buffer = algo.c4_buffer
    empty = ReplayBuffer(InfiniteBuffer(), env=gymnasium.make("Pendulum-v1"))
    with pytest.raises(ValueError, match="dataset: expected at least one transition, got an empty dataset"):
        algo.fit(empty, n_steps=1, n_steps_per_epoch=1, **QUIET)
    assert algo.c4_buffer is buffer


def test_a_dataset_shares_no_memory_with_the_transitions_it_was_made_of() -> None:
    transitions = transitions_of(dataset_of(episodes(4)))
    made = episodes_of(transitions)
    before = [(episode.observations.copy(), episode.actions.copy()) for episode in made.episodes]
    transitions.observations.mul_(5)
    transitions.actions.mul_(5)
    for episode, (observations, actions) in zip(made.episodes, before):
        assert np.array_equal(episode.observations, observations)
        assert np.array_equal(episode.actions, actions)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda algo, dataset: measure(algo, dataset), "transitions: expected Transitions.*got ReplayBuffer"),
        (lambda algo, dataset: transitions_of(3), "dataset: expected a d3rlpy dataset, got int"),
        (lambda algo, dataset: episodes_of(dataset), "transitions: expected Transitions, got ReplayBuffer"),
        (lambda algo, dataset: algo.fit(3, n_steps=1, **QUIET), "dataset: expected a d3rlpy dataset, as .*, got int"),
        (lambda algo, dataset: critics_of(algo, next_action="polcy"), "next_action: expected one of .*got 'polcy'"),
    ],
)
def test_what_is_of_another_kind_is_named(call: Any, message: str) -> None:
    dataset = dataset_of(episodes())
    with pytest.raises(ValueError, match=message):
        call(built(C4Config(base=small(TD3Config)), dataset), dataset)


def test_a_seed_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^seed: expected an integer of at least 0, got -1"):
        C4Config(base=small(TD3Config), seed=-1)


@pytest.mark.parametrize(("name", "value"), [("penalty_every", 3), ("trace_weight", 2.5), ("penalty_kind", "feature")])
def test_each_setting_of_the_penalty_counts_from_the_next_fit(name: str, value: Any) -> None:
    dataset = dataset_of(episodes())
    algo = C4Config(base=small(TD3Config), n_clusters=2, seed=0).create()
    algo.fit(dataset, **ONE)
    setattr(algo.config, name, value)
    algo.fit(dataset, **ONE)
    impl = algo.impl
    assert value == (
        impl._c4_every if name == "penalty_every" else getattr(impl.c4_penalty, name.split("penalty_")[-1])
    )


def test_discrete_sac_reports_the_penalty_of_its_own_updates_alone() -> None:
    dataset = data_for(DiscreteSACConfig)
    algo = built(C4Config(base=small(DiscreteSACConfig), penalty_every=2), dataset)
    assert ["c4_penalty" in algo.update(mini_batch(dataset, range(16))) for _ in range(4)] == [True, False] * 2


def test_what_is_measured_does_not_depend_on_the_trainings_random_numbers() -> None:
    dataset = dataset_of(episodes())
    algo = built(small(SACConfig), dataset)
    transitions = transitions_of(dataset, algo)
    measured = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        measured.append(measure(algo, transitions))
    assert measured[0] == measured[1]


def test_measure_splits_by_as_many_clusters_as_asked_for_and_takes_critics_without_gradients() -> None:
    dataset = dataset_of(episodes())
    algo = built(small(TD3Config), dataset)
    transitions = transitions_of(dataset, algo)
    one = measure(algo, transitions, n_clusters=1)
    assert one["between"] == pytest.approx(0, abs=1e-9 * one["total"])
    assert measure(algo, transitions, n_clusters=4)["between"] > 1e-3 * one["total"]
    for parameter in algo.impl.modules.q_funcs.parameters():
        parameter.data.zero_()
    assert measure(algo, transitions)["correlation"] == 0


def test_a_forward_pass_is_not_shared_by_networks_of_ones_own() -> None:
    class Noisy(nn.Module):  # in training alone, as dropout is
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.randn_like(x) if self.training else x

    q_functions = built(small(TD3Config), dataset_of(episodes())).impl.modules.q_funcs
    assert can_be_shared(q_functions)
    q_functions[0].encoder._layers.append(Noisy())
    assert not can_be_shared(q_functions)


def test_an_update_leaves_no_hooks_on_the_networks() -> None:
    dataset = dataset_of(episodes())
    algo = built(C4Config(base=small(TD3Config), penalty_every=1), dataset)
    assert "c4_penalty" in algo.update(mini_batch(dataset, range(16)))
    assert not any(q._forward_hooks or q._forward_pre_hooks for q in algo.impl.modules.q_funcs)
