"""C4 inside d3rlpy, where somebody changes, inspects or misuses something."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import d3rlpy
import numpy as np
import pytest
import torch
from c4buffer.integrations.d3rlpy import ACTIVEConfig, C4Config, critics_of, measure, measuring, transitions_of
from d3rlpy.algos import (
    BCQConfig,
    BEARConfig,
    CRRConfig,
    DiscreteCQLConfig,
    DQNConfig,
    PLASConfig,
    SACConfig,
    TD3Config,
    TD3PlusBCConfig,
)
from d3rlpy.models.encoders import VectorEncoderFactory
from d3rlpy.models.q_functions import IQNQFunctionFactory
from d3rlpy.ope import FQEConfig
from d3rlpy.preprocessing import StandardObservationScaler

from c4buffer import stacked_gradients

from .test_d3rlpy import QUIET, built, data_for, dataset_of, episodes, small


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
    with pytest.raises(ValueError, match=f"c4_buffer_options: expected options among .*got {next(iter(options))}"):
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
