"""ACTIVE in d3rlpy: its losses on the host's networks, IQL as a special case, and what the host offers."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import warnings
from pathlib import Path
from typing import Any

import d3rlpy
import gymnasium
import numpy as np
import pytest
import torch
from c4buffer.integrations.d3rlpy import ACTIVEConfig, C4Config, critics_of, transitions_of
from c4buffer.integrations.d3rlpy.dataset import from_mini_batch
from d3rlpy.algos import IQLConfig
from d3rlpy.dataset import MixedReplayBuffer, create_fifo_replay_buffer
from d3rlpy.logging import FileAdapterFactory
from d3rlpy.models.encoders import EncoderFactory, VectorEncoderFactory
from d3rlpy.models.torch import VectorEncoder
from d3rlpy.preprocessing import MinMaxActionScaler, StandardObservationScaler, StandardRewardScaler
from torch import nn

from c4buffer import CovariancePenalty, VEnsemble

from .test_d3rlpy import (
    QUIET,
    SMALL,
    assert_same_state,
    batches_given,
    built,
    dataset_of,
    drawn,
    episodes,
    mini_batch,
    small,
    state_of,
    torch_batch_of,
    transitions_of_rows,
)
from .test_d3rlpy_host import First, image_episodes, pixel_config
from .test_d3rlpy_mixed import of_two_parts
from .test_d3rlpy_user import ONE

__all__ = ["drawn"]  # a fixture
FIXED: dict[str, Any] = {"likelihood_target": -1.0}


def active(**fields: Any) -> Any:
    return small(ACTIVEConfig, **{**FIXED, **fields})


def test_without_what_active_adds_it_is_iql_step_by_step() -> None:
    dataset = dataset_of(episodes())
    iql = built(small(IQLConfig, expectile=0.8, weight_temp=2.0, max_weight=20.0), dataset)
    same = built(
        active(n_members=1, q_weight=0.0, likelihood_target=None, tau=0.8, temperature=0.5, max_weight=20.0), dataset
    )
    for name in ("policy", "q_funcs", "targ_q_funcs"):
        getattr(same.impl.modules, name).load_state_dict(getattr(iql.impl.modules, name).state_dict())
    value, ensemble = iql.impl.modules.value_func, same.impl.modules.value_funcs
    linears = [module for module in value.modules() if isinstance(module, nn.Linear)]

    def pairs() -> Any:
        for linear, weight, bias in zip(linears, ensemble.weights, ensemble.biases):
            yield linear.weight.data.T, weight.data[0]
            yield linear.bias.data, bias.data[0, 0]

    for theirs, ours in pairs():
        ours.copy_(theirs)
    for i in range(20):
        batch = mini_batch(dataset, np.random.default_rng(i).integers(100, size=16))
        theirs, ours = iql.update(batch), same.update(batch)
        for name in ("critic_loss", "q_loss", "v_loss", "actor_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6)
    for name in ("policy", "q_funcs", "targ_q_funcs"):
        for one, other in zip(
            getattr(iql.impl.modules, name).parameters(), getattr(same.impl.modules, name).parameters()
        ):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)
    for theirs, ours in pairs():
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert same.impl.modules.temperature.beta.item() == 1


@pytest.mark.parametrize("value_loss", ["expectile", "sparse"])
def test_the_losses_are_the_papers_equations(value_loss: str) -> None:
    dataset = dataset_of(episodes())
    algo = built(
        active(
            value_loss=value_loss, n_members=3, tau=0.8, alpha=0.6, quantile=0.25, temperature=0.7, initial_beta=0.4
        ),
        dataset,
    )
    impl, batch = algo.impl, torch_batch_of(mini_batch(dataset, range(40, 60)))  # with terminals
    modules = impl.modules
    v, v_next = (modules.value_funcs(part).detach().numpy() for part in (batch.observations, batch.next_observations))
    with torch.no_grad():
        members = [q(batch.observations, batch.actions).q_value[:, 0].numpy() for q in modules.q_funcs]
        target_q = np.min(
            [q(batch.observations, batch.actions).q_value[:, 0].numpy() for q in modules.targ_q_funcs], axis=0
        )
    y = batch.rewards[:, 0].numpy() + 0.99 * (1 - batch.terminals[:, 0].numpy()) * v_next.min(axis=0)
    q_loss = sum(((q - y) ** 2).mean() for q in members)  # Eq. 4
    u = target_q - v
    if value_loss == "expectile":
        v_loss = (np.where(u < 0, 0.2, 0.8) * u**2).mean()  # Eq. 3
    else:
        x = u / 1.2 + 1
        v_loss = (np.maximum(x, 0) ** 2 + v / 0.6).mean()
    loss = impl.compute_critic_loss(batch, impl.compute_target(batch))
    assert loss.q_loss.item() == pytest.approx(q_loss, rel=1e-5)
    assert loss.v_loss.item() == pytest.approx(v_loss, rel=1e-5)
    assert loss.critic_loss.item() == pytest.approx(q_loss + v_loss, rel=1e-5)

    torch.manual_seed(3)
    found = impl.compute_actor_loss(batch, modules.policy(batch.observations))
    torch.manual_seed(3)
    action = modules.policy(batch.observations)
    mean, std = action.squashed_mu.detach(), action.logstd.exp().detach()
    density = torch.distributions.Normal(mean, std)
    log_prob = density.log_prob(batch.actions).sum(dim=1).numpy()
    taken = (mean + std * torch.randn_like(mean)).clamp(-1, 1)
    with torch.no_grad():
        q = np.min([q(batch.observations, taken).q_value[:, 0].numpy() for q in modules.targ_q_funcs], axis=0)
    weights = np.minimum(np.exp((target_q - np.quantile(v, 0.25, axis=0)) / 0.7), 100)  # Eq. 7
    expected = -q.mean() - 0.4 * (weights * log_prob).mean()  # Eq. 13
    assert found.actor_loss.item() == pytest.approx(expected, rel=1e-4)
    assert found.log_likelihood.item() == pytest.approx(log_prob.mean(), rel=1e-5)


def test_gradients_stop_where_they_should() -> None:
    dataset = dataset_of(episodes())
    algo = built(active(), dataset)
    impl, batch = algo.impl, torch_batch_of(mini_batch(dataset, range(20)))
    modules = impl.modules
    impl.compute_critic_loss(batch, impl.compute_target(batch)).critic_loss.backward()
    for name, moved in (("q_funcs", True), ("value_funcs", True), ("targ_q_funcs", False), ("policy", False)):
        gradients = [parameter.grad is not None for parameter in getattr(modules, name).parameters()]
        assert all(gradients) if moved else not any(gradients), name
    for optimizer in (modules.critic_optim, modules.actor_optim):
        optimizer.optim.zero_grad(set_to_none=True)
    impl.compute_actor_loss(batch, modules.policy(batch.observations)).actor_loss.backward()
    for name in ("q_funcs", "value_funcs", "targ_q_funcs", "temperature"):
        assert not any(parameter.grad is not None for parameter in getattr(modules, name).parameters()), name
    assert all(parameter.grad is not None for parameter in modules.policy.parameters())


def test_beta_moves_after_each_update_by_the_policys_likelihood() -> None:
    dataset = dataset_of(episodes())
    algo = built(active(likelihood_target=3.0, beta_learning_rate=0.1, initial_beta=1.0), dataset)
    metrics = algo.update(mini_batch(dataset, range(16)))
    assert metrics["temperature"] == pytest.approx(1 + 0.1 * (3 - metrics["log_likelihood"]), rel=1e-5)
    fixed = built(active(likelihood_target=None, initial_beta=0.7), dataset)
    assert fixed.update(mini_batch(dataset, range(16)))["temperature"] == pytest.approx(0.7)


@pytest.mark.parametrize("value_loss", ["expectile", "sparse"])
def test_fit_estimates_the_target_once_and_saves_it(value_loss: str, tmp_path: Path, monkeypatch: Any) -> None:
    from c4buffer.integrations.d3rlpy import active as module

    calls: list[Any] = []

    def estimate(*arguments: Any, **options: Any) -> float:
        calls.append(arguments)
        return real(*arguments, updates=20, **options)

    real = module.estimate_log_likelihood_target
    monkeypatch.setattr(module, "estimate_log_likelihood_target", estimate)
    dataset = dataset_of(episodes(10))
    config = small(
        ACTIVEConfig,
        value_loss=value_loss,
        observation_scaler=StandardObservationScaler(),
        action_scaler=MinMaxActionScaler(),
    )
    algo = config.create()
    results = algo.fit(dataset, n_steps=6, n_steps_per_epoch=3, **QUIET)
    assert len(calls) == 1
    scaled = calls[0][0]
    assert scaled.observations.mean(dim=0).abs().max() < 0.1
    assert scaled.actions.max() == 1
    metrics = results[-1][1]
    assert {"critic_loss", "q_loss", "v_loss", "actor_loss", "log_likelihood", "temperature"} <= set(metrics)
    assert all(map(math.isfinite, metrics.values()))
    target = algo.impl.modules.temperature.target
    assert target is not None

    algo.save(str(tmp_path / "active.d3"))
    loaded = d3rlpy.load_learnable(str(tmp_path / "active.d3"))
    assert type(loaded) is type(algo)
    assert json.loads(loaded.config.serialize()) == json.loads(algo.config.serialize())
    assert loaded.impl.modules.temperature.target == target
    assert_same_state(algo, loaded)
    observations = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    np.testing.assert_array_equal(algo.predict(observations), loaded.predict(observations))
    loaded.fit(dataset, n_steps=3, n_steps_per_epoch=3, **QUIET)
    assert len(calls) == 1  # what is known is not estimated again
    found = loaded.estimate_likelihood_target(dataset, method="quantile", quantile=0.1)
    assert loaded.impl.modules.temperature.target == found


def test_params_json_makes_the_same_algorithm_again(tmp_path: Path) -> None:
    algo = active(value_loss="sparse", n_members=2, quantile=0.1, max_beta=5.0).create()
    factory = FileAdapterFactory(root_dir=str(tmp_path))
    options = {"experiment_name": "run", "with_timestamp": False, "show_progress": False, "logger_adapter": factory}
    algo.fit(dataset_of(episodes()), n_steps=2, n_steps_per_epoch=2, **options)
    again = type(algo).from_json(str(tmp_path / "run" / "params.json"))
    assert again.config == algo.config
    assert again.config.likelihood_target == -1.0
    assert (tmp_path / "run" / "temperature.csv").exists()


@pytest.mark.parametrize("fields", [{}, {"n_clusters": 1, "penalty_weight": 0}])
def test_c4_and_active_compose(fields: dict[str, Any], tmp_path: Path, drawn: list[Any]) -> None:
    dataset = dataset_of(episodes(10))
    config = C4Config(base=active(), refresh_interval=4, penalty_every=1, seed=0, **fields)
    algo = built(config, dataset)
    plain = built(active(), dataset)
    d3rlpy.seed(1)
    algo.fit(dataset, n_steps=8, n_steps_per_epoch=8, **QUIET)
    algo.save(str(tmp_path / "both.d3"))
    assert_same_state(algo, d3rlpy.load_learnable(str(tmp_path / "both.d3")))
    if fields:
        d3rlpy.seed(1)
        for batch in drawn:
            plain.update(mini_batch(dataset, batch.indices))
        assert_same_state(plain, algo)
    else:
        assert {batch.cluster for batch in drawn} <= {0, 1, 2}
        assert algo.c4_buffer.last_report is not None


def test_the_penalty_in_active_is_its_own_gradient() -> None:
    dataset = dataset_of(episodes())
    plain = built(active(), dataset)
    wrapped = built(C4Config(base=active(), penalty_weight=0.7, penalty_every=1), dataset)
    before, batch = copy.deepcopy(plain), mini_batch(dataset, range(40, 60))
    gradients = []
    for algo in (plain, wrapped):
        algo.impl.q_function.zero_grad()
        if algo is wrapped:
            algo.impl._c4_due = True
        host = torch_batch_of(batch)
        algo.impl.compute_critic_loss(host, algo.impl.compute_target(host)).critic_loss.backward()
        gradients.append([parameter.grad.clone() for parameter in algo.impl.q_function.parameters()])
    penalty = CovariancePenalty(0.7, scale="relative")(critics_of(before), from_mini_batch(torch_batch_of(batch)))
    added = torch.autograd.grad(penalty, list(before.impl.q_function.parameters()), allow_unused=True)
    for without, with_it, extra in zip(*gradients, added):
        expected = without if extra is None else without + extra
        torch.testing.assert_close(with_it, expected, rtol=1e-5, atol=1e-6)


def test_members_of_other_networks_are_computed_one_by_one() -> None:
    dataset = dataset_of(episodes())
    other = VectorEncoderFactory([16, 16], activation="tanh")
    algo = built(active(value_encoder_factory=other, n_members=3), dataset)
    assert not isinstance(algo.impl.modules.value_funcs, VEnsemble)
    assert algo.impl.modules.value_funcs(torch.zeros(5, 3)).shape == (3, 5)
    algo.update(mini_batch(dataset, range(16)))
    assert isinstance(built(active(value_encoder_factory=SMALL), dataset).impl.modules.value_funcs, VEnsemble)
    pixels = dataset_of(image_episodes(discrete=False))
    image = built(pixel_config(ACTIVEConfig, **FIXED), pixels)
    image.fit(pixels, n_steps=2, n_steps_per_epoch=2, **QUIET)


def test_a_target_that_the_config_names_survives_loading(tmp_path: Path) -> None:
    dataset = dataset_of(episodes())
    for name, target in (("none", None), ("other", -7.0)):
        built(active(likelihood_target=target), dataset).save_model(str(tmp_path / name))
        algo = built(active(likelihood_target=-3.0), dataset)
        algo.load_model(str(tmp_path / name))
        assert algo.impl.modules.temperature.target == -3.0
    auto = built(active(likelihood_target="auto"), dataset)
    auto.load_model(str(tmp_path / "other"))
    assert auto.impl.modules.temperature.target == -7.0


def test_a_bound_of_beta_that_the_config_names_survives_loading(tmp_path: Path) -> None:
    dataset = dataset_of(episodes())
    built(active(initial_beta=5.0), dataset).save_model(str(tmp_path / "five"))
    algo = built(active(likelihood_target=None, initial_beta=0.5, max_beta=1.0), dataset)
    algo.load_model(str(tmp_path / "five"))
    assert algo.impl.modules.temperature.beta.item() == 1


def test_losses_follow_networks_that_change_between_two_calls() -> None:
    dataset = dataset_of(episodes())
    impl, batch = built(active(), dataset).impl, torch_batch_of(mini_batch(dataset, range(16)))
    first = impl.compute_critic_loss(batch, torch.zeros(16, 1)).v_loss.item()
    with torch.no_grad():
        for parameter in impl.modules.targ_q_funcs.parameters():
            parameter.mul_(3)
    assert impl.compute_critic_loss(batch, torch.zeros(16, 1)).v_loss.item() != pytest.approx(first, rel=1e-3)


def test_the_target_of_a_mixed_buffer_is_that_of_all_its_rows() -> None:
    primary, secondary = dataset_of(episodes()), dataset_of(episodes(seed=1))
    together = dataset_of([*episodes(), *episodes(seed=1)])
    algo = built(active(likelihood_target="auto"), primary)
    mixed = MixedReplayBuffer(primary, secondary, secondary_mix_ratio=0.5)
    expected = algo.estimate_likelihood_target(together, updates=10)
    assert algo.estimate_likelihood_target(mixed, updates=10) == expected


def test_targets_stay_frozen_after_an_export(tmp_path: Path) -> None:
    dataset = dataset_of(episodes())
    algo = built(active(), dataset)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        algo.save_policy(str(tmp_path / "policy.pt"))
    algo.update(mini_batch(dataset, range(16)))
    assert all(parameter.grad is None for parameter in algo.impl.modules.targ_q_funcs.parameters())


def test_online_training_needs_a_target() -> None:
    env = gymnasium.make("Pendulum-v1")
    with pytest.raises(ValueError, match="likelihood_target: expected a number, or a fit before fit_online"):
        small(ACTIVEConfig).create().fit_online(env, n_steps=5)
    algo = active().create()
    algo.fit_online(env, n_steps=40, n_steps_per_epoch=40, **QUIET)
    assert algo.grad_step > 10
    with pytest.raises(ValueError, match="algo: expected a built algorithm"):
        active().create().estimate_likelihood_target(dataset_of(episodes()))


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_update_before_h_d_is_known_changes_nothing_and_says_what_to_do(wrapped: bool) -> None:
    dataset = dataset_of(episodes())
    algo = built(C4Config(base=small(ACTIVEConfig), n_clusters=2) if wrapped else small(ACTIVEConfig), dataset)
    before = copy.deepcopy(state_of(algo))
    for batch in (mini_batch(dataset, range(16)), torch_batch_of(mini_batch(dataset, range(16)))):
        with pytest.raises(ValueError, match=r"likelihood_target: expected a number, or .*estimate_likelihood_target"):
            algo.update(batch)
    torch.testing.assert_close(state_of(algo), before, rtol=0, atol=0, equal_nan=True)  # H_D is NaN
    assert algo.grad_step == 0
    algo.estimate_likelihood_target(dataset, updates=5)
    algo.update(mini_batch(dataset, range(16)))


def test_beta_follows_an_estimate_that_was_asked_for() -> None:
    dataset = dataset_of(episodes())
    algo = built(active(likelihood_target=None), dataset)
    algo.estimate_likelihood_target(dataset, updates=5)
    assert algo.update(mini_batch(dataset, range(16)))["temperature"] != 1


def test_the_policys_q_is_taken_in_evaluation_mode() -> None:
    dataset = dataset_of(episodes())
    algo = built(active(critic_encoder_factory=VectorEncoderFactory([8], dropout_rate=0.5)), dataset)
    modes: list[tuple[bool, bool]] = []

    def note(module: nn.Module, *_: Any) -> None:
        modes.append((torch.is_grad_enabled(), module.training))

    for member in algo.impl.modules.targ_q_funcs:
        member.register_forward_hook(note)
    algo.update(mini_batch(dataset, range(16)))
    assert [training for with_graph, training in modes if with_graph] == [False, False]


def test_actions_at_the_edge_of_the_box_have_a_finite_likelihood() -> None:
    parts = episodes()
    for part in parts:
        part.actions[::2] = np.sign(part.actions[::2])
    dataset = dataset_of(parts)
    algo = built(active(), dataset)
    metrics = algo.update(mini_batch(dataset, range(16)))
    assert all(map(math.isfinite, metrics.values()))
    assert transitions_of_rows(dataset).actions.abs().max() == 1


def test_a_target_out_of_reach_is_warned_of() -> None:
    dataset = dataset_of(episodes())
    algo = built(active(likelihood_target=50.0, beta_learning_rate=1.0, max_beta=2.0), dataset)
    batch = mini_batch(dataset, range(16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(900):
            algo.update(batch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(150):
            algo.update(batch)
    assert [str(warning.message)[:31] for warning in caught] == ["beta has been at its maximum, 2"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_members": 0}, "n_members: expected an integer of at least 1, got 0"),
        ({"tau": 1.0}, "tau: expected a number above 0 and below 1, got 1.0"),
        ({"tau": 0.0}, "tau: expected a finite number above 0, got 0.0"),
        ({"eta": 1.5}, "eta: expected a number above 0 and at most 1, got 1.5"),
        ({"alpha": 0.0}, "alpha: expected a finite number above 0"),
        ({"quantile": 1.2}, "quantile: expected a number from 0 to 1"),
        ({"temperature": 0.0}, "temperature: expected a finite number above 0"),
        ({"value_loss": "huber"}, "value_loss: expected one of 'expectile', 'sparse', got 'huber'"),
        ({"likelihood_target": "high"}, "likelihood_target: expected one of 'auto', got 'high'"),
        ({"likelihood_target": math.nan}, "likelihood_target: expected a finite number, 'auto' or None, got nan"),
        ({"initial_beta": -1.0}, "initial_beta: expected a finite number at least 0, got -1.0"),
        ({"initial_beta": 3.0, "max_beta": 2.0}, "initial_beta: expected at most max_beta, 2.0, got 3.0"),
        ({"q_weight": -1.0}, "q_weight: expected a finite number at least 0"),
        ({"n_critics": 0}, "n_critics: expected an integer of at least 1"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ACTIVEConfig(**fields)


def test_discrete_actions_are_refused_with_a_reason() -> None:
    discrete = dataset_of(episodes(discrete=True))
    for call in (lambda algo: algo.fit(discrete, n_steps=2, **QUIET), lambda algo: algo.build_with_dataset(discrete)):
        with pytest.raises(ValueError, match="dataset: expected continuous actions, .* got discrete"):
            call(active().create())


def test_a_fits_batches_are_the_datasets_rows_all_alike_and_the_same_for_one_seed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dataset = dataset_of(episodes())
    monkeypatch.setattr(
        type(dataset), "sample_transition_batch", lambda *_: pytest.fail("one transition at a time is slow")
    )
    known = transitions_of(dataset)
    seen: list[list[torch.Tensor]] = []
    for _ in range(2):
        d3rlpy.seed(5)
        algo = built(active(), dataset)
        update, batches = algo.impl.update, []

        def recorded(batch: Any, step: int, update: Any = update, batches: Any = batches) -> Any:
            batches.append(torch.cat([batch.observations, batch.actions, batch.rewards, batch.terminals], dim=1))
            return update(batch, step)

        monkeypatch.setattr(algo.impl, "update", recorded)
        algo.fit(dataset, n_steps=300, n_steps_per_epoch=300, **QUIET)
        seen.append(batches)
    assert all(map(torch.equal, *seen))
    rows = torch.cat([known.observations, known.actions, known.rewards[:, None], known.terminals[:, None]], dim=1)
    drawn_rows = torch.cat(seen[0])
    matches = (drawn_rows[:, None] == rows[None]).all(dim=2)
    assert (matches.sum(dim=1) == 1).all()
    counts = matches.sum(dim=0).double()
    expected = len(drawn_rows) / len(rows)
    assert ((counts - expected) ** 2 / expected).sum() < len(rows) + 5 * math.sqrt(2 * len(rows))  # chi-squared


def test_rewards_and_observations_are_scaled_as_the_algorithm_says() -> None:
    dataset = dataset_of(episodes())
    scalers = {"observation_scaler": StandardObservationScaler(), "action_scaler": MinMaxActionScaler()}
    algo = active(**scalers).create("cpu")
    algo.fit(dataset, n_steps=1, n_steps_per_epoch=1, **QUIET)
    expected = transitions_of(dataset, algo)
    batches = []
    update = algo.impl.update
    algo.impl.update = lambda batch, step: (batches.append(batch), update(batch, step))[1]
    algo.fit(dataset, n_steps=2, n_steps_per_epoch=2, **QUIET)
    for batch in batches:
        found = (batch.observations[:, None] == expected.observations[None]).all(dim=2).any(dim=1)
        assert found.all()
        assert (batch.actions[:, None] == expected.actions[None]).all(dim=2).any(dim=1).all()


def test_a_subclass_that_samples_as_the_host_does_is_drawn_from_as_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    dataset = d3rlpy.dataset.MDPDataset(
        observations=generator.normal(size=(40, 3)).astype(np.float32),
        actions=generator.uniform(-1, 1, size=(40, 2)).astype(np.float32),
        rewards=generator.normal(size=40).astype(np.float32),
        terminals=(np.arange(40) % 10 == 9).astype(np.float32),
    )
    slow = d3rlpy.dataset.ReplayBuffer
    monkeypatch.setattr(slow, "sample_transition_batch", lambda *_: pytest.fail("one transition at a time is slow"))
    active(likelihood_target=-1.0).create().fit(dataset, n_steps=3, n_steps_per_epoch=3, **QUIET)


def test_a_subclass_of_the_hosts_buffer_goes_on_drawing_its_own_batches() -> None:
    calls: list[int] = []

    class Prioritised(d3rlpy.dataset.ReplayBuffer):
        def sample_transition_batch(self, batch_size: int) -> Any:
            calls.append(batch_size)
            return super().sample_transition_batch(batch_size)

    plain = dataset_of(episodes())
    dataset = Prioritised(d3rlpy.dataset.InfiniteBuffer(), episodes=plain.episodes)
    active().create().fit(dataset, n_steps=3, n_steps_per_epoch=3, **QUIET)
    assert calls == [16, 16, 16]


def test_a_sampling_or_a_picker_of_ones_own_is_asked_for_each_row() -> None:
    calls: list[str] = []

    class Weighted(d3rlpy.dataset.ReplayBuffer):
        def sample_transition(self) -> Any:
            calls.append("row")
            return super().sample_transition()

    class Noisy(d3rlpy.dataset.BasicTransitionPicker):
        def __call__(self, episode: Any, index: int) -> Any:
            calls.append("picked")
            return super().__call__(episode, index)

    plain = dataset_of(episodes())
    buffer = d3rlpy.dataset.InfiniteBuffer()
    for dataset, expected in (
        (Weighted(buffer, episodes=plain.episodes), "row"),
        (dataset_of(episodes(), transition_picker=Noisy()), "picked"),
    ):
        calls.clear()
        active().create().fit(dataset, n_steps=3, n_steps_per_epoch=3, **QUIET)
        assert calls.count(expected) >= 3 * 16


@pytest.mark.parametrize("limit", [1000, 30])
def test_rows_appended_during_a_fit_are_drawn_from_then_on(limit: int) -> None:
    rows = d3rlpy.dataset.FIFOBuffer(limit)  # of 30, as many are held after other rows have come
    dataset = d3rlpy.dataset.ReplayBuffer(rows, episodes=episodes(2))
    algo = active().create()
    seen: list[torch.Tensor] = []
    for epoch, _ in algo.fitter(dataset, n_steps=20, n_steps_per_epoch=10, **QUIET):
        if epoch == 1:
            known = dataset.transition_count
            later = episodes(3, seed=5)
            for episode in later:
                dataset.append_episode(episode)
            update = algo.impl.update

            def watched(batch: Any, step: int, update: Any = update) -> Any:
                seen.append(batch.observations)
                return update(batch, step)

            algo.impl.update = watched
    found = torch.cat(seen).unique(dim=0)
    new = torch.from_numpy(np.concatenate([episode.observations for episode in later]))
    assert (found[:, None] == new[None]).all(dim=2).any(dim=1).sum() > 10
    if limit > known:
        assert known < len(found) <= dataset.transition_count


def test_multi_step_targets_discount_by_their_steps() -> None:
    dataset = dataset_of(episodes())
    dataset._transition_picker = d3rlpy.dataset.MultiStepTransitionPicker(n_steps=3, gamma=0.9)
    algo = built(active(gamma=0.9, n_members=2), dataset)
    batch = torch_batch_of(mini_batch(dataset, range(60)))
    assert {1.0, 3.0} <= set(batch.intervals[:, 0].tolist())
    with torch.no_grad():
        v_next = algo.impl.modules.value_funcs(batch.next_observations).amin(dim=0)
        powers = torch.tensor([0.9**n for n in batch.intervals[:, 0].tolist()])
        y = batch.rewards[:, 0] + powers * (1 - batch.terminals[:, 0]) * v_next
        members = [q(batch.observations, batch.actions).q_value[:, 0] for q in algo.impl.modules.q_funcs]
        expected = sum(((q - y) ** 2).mean() for q in members)
    loss = algo.impl.compute_critic_loss(batch, algo.impl.compute_target(batch))
    assert loss.q_loss.item() == pytest.approx(float(expected), rel=1e-5)


def test_sparse_value_learning_with_one_member_and_fixed_temperature_is_sqls() -> None:
    """SQL's V and Q by formulas of our own, ten updates beside the algorithm's."""
    dataset = dataset_of(episodes())
    options: dict[str, Any] = {"n_members": 1, "q_weight": 0.0, "likelihood_target": None, "alpha": 0.7}
    algo = built(active(value_loss="sparse", **options), dataset)
    modules = algo.impl.modules
    q_funcs, targets = copy.deepcopy(modules.q_funcs), copy.deepcopy(modules.targ_q_funcs)
    v = copy.deepcopy(modules.value_funcs)
    optimizer = torch.optim.Adam([*q_funcs.parameters(), *v.parameters()], lr=algo.config.critic_learning_rate)

    def q_of(networks: Any, batch: Any) -> torch.Tensor:
        return torch.stack([q(batch.observations, batch.actions).q_value[:, 0] for q in networks])

    for i in range(10):
        rows = mini_batch(dataset, np.random.default_rng(i).integers(100, size=16))
        algo.update(rows)
        batch = torch_batch_of(rows)
        with torch.no_grad():
            y = batch.rewards[:, 0] + 0.99 * (1 - batch.terminals[:, 0]) * v(batch.next_observations)[0]
            data_q = q_of(targets, batch).amin(dim=0)
        values = v(batch.observations)[0]
        residual = (data_q - values) / (2 * 0.7) + 1
        sparse = torch.where(residual > 0, residual**2, torch.zeros_like(residual)) + values / 0.7
        loss = ((q_of(q_funcs, batch) - y) ** 2).mean(dim=1).sum() + sparse.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for target, live in zip(targets.parameters(), q_funcs.parameters()):
                target.lerp_(live, algo.config.eta)
    for ours, theirs in ((modules.q_funcs, q_funcs), (modules.value_funcs, v), (modules.targ_q_funcs, targets)):
        for one, other in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_actions_at_the_edge_of_the_box_train() -> None:
    dataset = dataset_of(episodes())
    for episode in dataset.episodes:
        episode.actions[:] = np.sign(episode.actions)
    algo = small(ACTIVEConfig, likelihood_target="auto").create()
    [(_, metrics)] = algo.fit(dataset, n_steps=20, n_steps_per_epoch=20, **QUIET)
    assert math.isfinite(algo.impl.modules.temperature.target)
    assert all(map(math.isfinite, metrics.values()))


def test_an_estimate_before_scalers_are_fitted_says_so() -> None:
    dataset = dataset_of(episodes())
    algo = active(observation_scaler=StandardObservationScaler()).create()
    with pytest.raises(ValueError, match="algo: expected a built algorithm"):
        algo.estimate_likelihood_target(dataset)
    algo.build_with_dataset(dataset)
    with pytest.raises(ValueError, match="algo: expected fitted scalers .*, got an unfitted observation_scaler"):
        algo.estimate_likelihood_target(dataset)


@dataclasses.dataclass
class Pretrained(EncoderFactory):
    """A perceptron like d3rlpy's own, with weights that were learned before."""

    def create(self, observation_shape: Any) -> Any:
        encoder = VectorEncoder(observation_shape, [16, 16])
        for parameter in encoder.parameters():
            nn.init.constant_(parameter, 0.5)
            parameter.requires_grad_(False)
        return encoder

    def create_with_action(self, *arguments: Any) -> Any:
        raise NotImplementedError

    @staticmethod
    def get_type() -> str:
        return "pretrained"


def test_value_networks_are_what_a_factory_of_ones_own_makes() -> None:
    algo = built(active(value_encoder_factory=Pretrained(), n_members=2), dataset_of(episodes()))
    frozen = [parameter for parameter in algo.impl.modules.value_funcs.parameters() if not parameter.requires_grad]
    assert len(frozen) == 8
    assert all(bool((parameter == 0.5).all()) for parameter in frozen)


@pytest.mark.parametrize("named", [-3.0, "auto"])
def test_a_target_set_on_the_config_is_saved_and_the_next_fit_takes_it(named: Any, tmp_path: Path) -> None:
    dataset = dataset_of(episodes())
    algo = built(active(likelihood_target=-1.0), dataset)
    algo.config.likelihood_target = named
    algo.save(str(tmp_path / "algo"))
    assert algo.impl.modules.temperature.target == -1.0
    loaded: Any = d3rlpy.load_learnable(str(tmp_path / "algo"))
    assert loaded.impl.modules.temperature.target == (None if named == "auto" else named)
    assert loaded.impl.waits_for_target == (named == "auto")


def test_a_target_from_a_file_is_not_estimated_again(tmp_path: Path) -> None:
    dataset = dataset_of(episodes())
    built(active(likelihood_target=-7.0), dataset).save_model(str(tmp_path / "seven"))
    algo = built(active(likelihood_target=-1.0), dataset)
    algo.config.likelihood_target = "auto"
    algo.load_model(str(tmp_path / "seven"))
    algo.fit(dataset, n_steps=1, n_steps_per_epoch=1, **QUIET)
    assert algo.impl.modules.temperature.target == -7.0


@pytest.mark.parametrize("fit_first", [True, False])
def test_a_bound_of_beta_may_be_lowered_below_where_it_began(fit_first: bool, tmp_path: Path) -> None:
    dataset = dataset_of(episodes())
    algo = built(active(likelihood_target=-1.0), dataset)
    algo.config.max_beta = 0.5
    if fit_first:
        algo.fit(dataset, n_steps=1, n_steps_per_epoch=1, **QUIET)
        assert algo.impl.modules.temperature.beta.item() <= 0.5
    algo.save(str(tmp_path / "algo"))
    loaded: Any = d3rlpy.load_learnable(str(tmp_path / "algo"))
    assert loaded.impl.modules.temperature.beta.item() <= 0.5


def test_a_fit_takes_discount_and_rate_and_refuses_other_networks() -> None:
    dataset = dataset_of(episodes())
    algo = built(active(likelihood_target=-1.0), dataset)
    algo.config.gamma, algo.config.eta = 0.5, 0.25
    algo.fit(dataset, n_steps=1, n_steps_per_epoch=1, **QUIET)
    assert (algo.impl._gamma, algo.impl._tau) == (0.5, 0.25)
    for name in ("n_members", "n_critics"):
        before = getattr(algo.config, name)
        setattr(algo.config, name, before + 1)
        with pytest.raises(
            ValueError, match=f"^{name}: expected {before}, as the networks were built, got {before + 1}$"
        ):
            algo.fit(dataset, n_steps=1, n_steps_per_epoch=1, **QUIET)
        setattr(algo.config, name, before)


def test_a_training_that_diverges_says_so() -> None:
    dataset = dataset_of(episodes())
    algo = built(active(likelihood_target=-1.0, critic_learning_rate=1e30, actor_learning_rate=1e30), dataset)
    with pytest.raises(ValueError, match="has the training diverged. Scale the rewards, or lower the learning rates"):
        algo.fit(dataset, n_steps=30, n_steps_per_epoch=30, **QUIET)


def test_empty_data_are_refused_and_an_empty_part_is_none() -> None:
    dataset = dataset_of(episodes())
    algo = built(active(likelihood_target=-1.0), dataset)
    empty = d3rlpy.dataset.create_fifo_replay_buffer(10, env=gymnasium.make("Pendulum-v1"))
    with pytest.raises(ValueError, match="^dataset: expected at least one transition, got an empty dataset$"):
        algo.fit(empty, n_steps=1, n_steps_per_epoch=1, **QUIET)
    alone = algo.estimate_likelihood_target(dataset, updates=2)
    assert algo.estimate_likelihood_target(MixedReplayBuffer(empty, dataset, 0.5), updates=2) == alone


def test_a_second_fit_draws_other_rows() -> None:
    dataset = dataset_of(episodes())
    algo = built(active(), dataset)
    given = batches_given(algo)
    for _ in range(2):
        algo.fit(dataset, **ONE)
    assert not torch.equal(given[0].observations, given[1].observations)


def test_q_of_the_data_is_never_that_of_another_update() -> None:
    dataset = dataset_of(episodes())
    algo, batch = built(active(), dataset), torch_batch_of(mini_batch(dataset, range(16)))
    algo.update(batch)

    def value_loss() -> float:
        return algo.impl.compute_critic_loss(batch, torch.zeros(16, 1)).v_loss.item()

    before = value_loss()
    for parameter in algo.impl.modules.targ_q_funcs.parameters():
        parameter.data.mul_(3)
    assert value_loss() != pytest.approx(before, rel=1e-3)
    expected = value_loss()
    assert algo.update(batch)["v_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_sampling_that_was_put_on_the_dataset_is_asked() -> None:
    dataset, calls = dataset_of(episodes()), []
    sample = dataset.sample_transition_batch
    dataset.sample_transition_batch = lambda size: (calls.append(size), sample(size))[1]
    active().create().fit(dataset, n_steps=3, n_steps_per_epoch=3, **QUIET)
    assert calls == [16] * 3


def test_q_weight_is_the_weight_of_q_in_the_policys_loss() -> None:
    dataset = dataset_of(episodes())
    algo, batch = built(active(), dataset), torch_batch_of(mini_batch(dataset, range(16)))
    losses = []
    for weight in (0.0, 1.0, 2.0):
        algo.config.q_weight = weight
        torch.manual_seed(0)
        losses.append(
            algo.impl.compute_actor_loss(batch, algo.impl.modules.policy(batch.observations)).actor_loss.item()
        )
    assert losses[1] != pytest.approx(losses[0], abs=1e-4)
    assert losses[2] - losses[0] == pytest.approx(2 * (losses[1] - losses[0]), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "scaler"), [("action_scaler", MinMaxActionScaler()), ("reward_scaler", StandardRewardScaler())]
)
def test_an_estimate_names_whichever_scaler_is_not_fitted(name: str, scaler: Any) -> None:
    dataset = dataset_of(episodes())
    algo = active(**{name: copy.deepcopy(scaler)}).create()
    algo.build_with_dataset(dataset)
    with pytest.raises(ValueError, match=f"^algo: expected fitted scalers .*, got an unfitted {name}"):
        algo.estimate_likelihood_target(dataset)


def test_settings_count_from_the_next_online_training_on() -> None:
    env = gymnasium.make("Pendulum-v1", max_episode_steps=20)
    algo = active().create()
    options = {"n_steps": 3, "n_steps_per_epoch": 3, **QUIET}
    algo.fit_online(env, create_fifo_replay_buffer(50, env=env), **options)
    algo.config.quantile, algo.config.max_beta = 0.25, 5.0
    algo.fit_online(env, create_fifo_replay_buffer(50, env=env), **options)
    assert algo.impl._advantage.quantile == 0.25
    assert algo.impl.modules.temperature.maximum == 5.0


def test_h_d_of_images_is_estimated() -> None:
    dataset = dataset_of(image_episodes(discrete=False))
    algo = built(pixel_config(ACTIVEConfig), dataset)
    assert np.isfinite(algo.estimate_likelihood_target(dataset, updates=2))


def test_h_d_of_observations_of_several_parts_is_estimated() -> None:
    dataset, encoder = of_two_parts(), First([16])
    names = ("actor_encoder_factory", "critic_encoder_factory", "value_encoder_factory")
    algo = active(likelihood_target="auto", **dict.fromkeys(names, encoder)).create()
    algo.create_impl(((3,), (2,)), 2)
    seen: list[Any] = []
    new_policy = algo._new_policy

    def watched(*arguments: Any) -> Any:
        policy = new_policy(*arguments)
        policy.register_forward_pre_hook(lambda module, inputs: seen.append(type(inputs[0])))
        return policy

    algo._new_policy = watched
    assert np.isfinite(algo.estimate_likelihood_target(dataset, updates=2))
    assert set(seen) == {list}  # as d3rlpy's networks are given them


def test_rates_and_networks_are_the_configs() -> None:
    dataset = dataset_of(episodes())
    algo = built(active(eta=1.0, n_critics=3, actor_learning_rate=0.02, critic_learning_rate=0.03), dataset)
    modules = algo.impl.modules
    assert len(modules.q_funcs) == len(modules.targ_q_funcs) == 3
    assert modules.actor_optim.optim.param_groups[0]["lr"] == 0.02
    assert modules.critic_optim.optim.param_groups[0]["lr"] == 0.03
    algo.update(mini_batch(dataset, range(16)))
    for target, live in zip(modules.targ_q_funcs.parameters(), modules.q_funcs.parameters()):
        torch.testing.assert_close(target, live)


def test_numbers_of_numpy_go_to_json() -> None:
    numbers = {"quantile": np.float32(0.25), "temperature": np.float64(2.0), "max_weight": np.int64(50)}
    found = json.loads(small(ACTIVEConfig, **numbers).serialize())
    assert (found["quantile"], found["temperature"], found["max_weight"]) == (0.25, 2.0, 50.0)
