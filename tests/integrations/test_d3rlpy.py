"""C4 inside d3rlpy: nothing changes without it, and what it adds is exact."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import d3rlpy
import gymnasium
import numpy as np
import pytest
import torch
from c4buffer.integrations.d3rlpy import C4Config, critics_of, measure, transitions_of, wrap
from c4buffer.integrations.d3rlpy.dataset import from_mini_batch
from d3rlpy.algos import (
    PRDC,
    AWACConfig,
    BCConfig,
    BCQConfig,
    BEARConfig,
    CalQLConfig,
    CQLConfig,
    CRRConfig,
    DDPGConfig,
    DecisionTransformerConfig,
    DiscreteBCConfig,
    DiscreteBCQConfig,
    DiscreteCQLConfig,
    DiscreteSACConfig,
    DoubleDQNConfig,
    DQNConfig,
    IQLConfig,
    NFQConfig,
    PLASConfig,
    PLASWithPerturbationConfig,
    PRDCConfig,
    QLearningAlgoBase,
    RandomPolicyConfig,
    ReBRACConfig,
    SACConfig,
    TD3Config,
    TD3PlusBC,
    TD3PlusBCConfig,
)
from d3rlpy.algos.qlearning.torch import TD3PlusBCImpl
from d3rlpy.constants import ActionSpace
from d3rlpy.dataset import (
    Episode,
    FIFOBuffer,
    InfiniteBuffer,
    MixedReplayBuffer,
    MultiStepTransitionPicker,
    ReplayBuffer,
    TransitionMiniBatch,
    create_fifo_replay_buffer,
)
from d3rlpy.logging import FileAdapterFactory, NoopAdapterFactory
from d3rlpy.models.encoders import VectorEncoderFactory
from d3rlpy.models.q_functions import IQNQFunctionFactory, QRQFunctionFactory
from d3rlpy.preprocessing import MinMaxActionScaler, MultiplyRewardScaler, StandardObservationScaler

from c4buffer import ClusteredReplayBuffer, CovariancePenalty, Transitions, diagnose, stacked_gradients

SMALL = VectorEncoderFactory([16, 16])
QUIET: dict[str, Any] = {"show_progress": False, "logger_adapter": NoopAdapterFactory()}
CONTINUOUS = [
    TD3PlusBCConfig,
    IQLConfig,
    CQLConfig,
    TD3Config,
    SACConfig,
    DDPGConfig,
    AWACConfig,
    ReBRACConfig,
    PRDCConfig,
    CalQLConfig,
    BEARConfig,
    BCQConfig,
    CRRConfig,
    PLASConfig,
    PLASWithPerturbationConfig,
]
DISCRETE = [DQNConfig, DoubleDQNConfig, NFQConfig, DiscreteCQLConfig, DiscreteBCQConfig, DiscreteSACConfig]
ALL = [*CONTINUOUS, *DISCRETE]
WARM_UPS = {BCQConfig: "rl_start_step", PLASConfig: "warmup_steps", PLASWithPerturbationConfig: "warmup_steps"}


def episodes(count: int = 6, seed: int = 0, steps: int = 20, *, discrete: bool = False) -> list[Episode]:
    """Episodes of 3-dimensional observations and 2-dimensional (or 4) actions; every second one is terminated."""
    generator = np.random.default_rng(seed)

    def actions(rows: int) -> Any:
        if discrete:
            return generator.permutation(np.arange(rows) % 4).astype(np.int32).reshape(-1, 1)
        return generator.uniform(-1, 1, size=(rows, 2)).astype(np.float32)

    return [
        Episode(
            observations=generator.normal(size=(steps + i, 3)).astype(np.float32),
            actions=actions(steps + i),
            rewards=generator.normal(size=(steps + i, 1)).astype(np.float32),
            terminated=i % 2 == 0,
        )
        for i in range(count)
    ]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Transitions]:
    """Every batch that a clustered buffer hands out during the test."""
    batches: list[Transitions] = []
    sample = ClusteredReplayBuffer.sample

    def recording(buffer: ClusteredReplayBuffer, batch_size: int) -> Transitions:
        batches.append(sample(buffer, batch_size))
        return batches[-1]

    monkeypatch.setattr(ClusteredReplayBuffer, "sample", recording)
    return batches


def batches_given(algo: Any) -> list[Any]:
    """Every batch that the algorithm's updates are given from now on."""
    batches: list[Any] = []
    update = type(algo.impl).inner_update

    def keep(batch: Any, grad_step: int) -> Any:
        batches.append(batch)
        return update(algo.impl, batch, grad_step)

    algo.impl.inner_update = keep
    return batches


def dataset_of(parts: list[Episode], **options: Any) -> ReplayBuffer:
    return ReplayBuffer(options.pop("buffer", InfiniteBuffer()), episodes=parts, **options)


def small(config: type, **fields: Any) -> Any:
    """A config with small networks, few sampled actions and no warm-up."""
    names = {field.name for field in dataclasses.fields(config)}
    options = {name: SMALL for name in names if name.endswith("encoder_factory")}
    options.update(dict.fromkeys(names & {"n_action_samples", "n_mmd_action_samples", "n_target_samples"}, 3))
    options.update(dict.fromkeys(names & set(WARM_UPS.values()), 0))
    return config(**{"batch_size": 16, **options, **fields})


def data_for(config: type, count: int = 6) -> ReplayBuffer:
    return dataset_of(episodes(count, discrete=config in DISCRETE))


def built(config: Any, dataset: ReplayBuffer, seed: int = 0) -> Any:
    """The algorithm, its scalers fitted and its networks made from the seed."""
    d3rlpy.seed(seed)
    algo = config.create()
    for scaler in (algo.observation_scaler, algo.action_scaler, algo.reward_scaler):
        if scaler is not None and not scaler.built:
            scaler.fit_with_transition_picker(dataset.episodes, dataset.transition_picker)
    algo.build_with_dataset(dataset)
    if isinstance(algo, PRDC):  # its own `fit` does this before it trains
        steps = [dataset.transition_picker(*dataset.buffer[i]) for i in range(dataset.transition_count)]
        rows = [np.concatenate([algo._config.beta * step.observation, step.action]) for step in steps]
        algo._nbsr.fit(np.stack(rows))
    return algo


def mini_batch(dataset: ReplayBuffer, indices: Any) -> TransitionMiniBatch:
    return TransitionMiniBatch.from_transitions([dataset.transition_picker(*dataset.buffer[int(i)]) for i in indices])


def state_of(algo: Any) -> dict[str, Any]:
    """Every tensor that d3rlpy would save."""
    found: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[prefix] = value.clone()
        elif isinstance(value, dict):
            for key, part in value.items():
                walk(f"{prefix}.{key}", part)
        elif isinstance(value, (list, tuple)):
            for i, part in enumerate(value):
                walk(f"{prefix}.{i}", part)

    for name, module in algo.impl._checkpointer.modules.items():
        walk(name, module.state_dict())
    return found


def assert_same_state(one: Any, other: Any) -> None:
    first, second = state_of(one), state_of(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("config", ALL)
def test_one_cluster_and_no_penalty_equals_the_plain_algorithm_bit_for_bit(config: type) -> None:
    dataset = data_for(config)
    plain = built(small(config), dataset)
    wrapped = built(C4Config(base=small(config), n_clusters=1, penalty_weight=0), dataset)
    assert_same_state(plain, wrapped)
    batches = [mini_batch(dataset, np.random.default_rng(i).integers(100, size=16)) for i in range(20)]
    for algo in (plain, wrapped):
        d3rlpy.seed(1)
        for batch in batches:
            algo.update(batch)
    assert_same_state(plain, wrapped)


@pytest.mark.parametrize("config", ALL)
def test_fit_equals_the_plain_algorithm_fed_the_rows_that_were_drawn(config: type, drawn: list[Transitions]) -> None:
    dataset = data_for(config)

    def scaled() -> Any:
        scalers = {"observation_scaler": StandardObservationScaler(), "reward_scaler": MultiplyRewardScaler(0.5)}
        if config is PRDCConfig:  # its neighbours are looked up among scaled rows, which only its own `fit` knows
            scalers.pop("observation_scaler")
        elif config in CONTINUOUS:
            scalers["action_scaler"] = MinMaxActionScaler()
        return small(config, **scalers)

    plain = built(scaled(), dataset)
    wrapped = built(C4Config(base=scaled(), n_clusters=1, penalty_weight=0, seed=3), dataset)
    d3rlpy.seed(1)
    wrapped.fit(dataset, n_steps=20, n_steps_per_epoch=20, **QUIET)
    d3rlpy.seed(1)
    assert len(drawn) == 20
    for batch in drawn:
        plain.update(mini_batch(dataset, batch.indices))
    assert_same_state(plain, wrapped)


@pytest.mark.parametrize("config", ALL)
@pytest.mark.parametrize("scale", ["raw", "relative"])
def test_the_critics_gradient_is_that_of_the_loss_plus_the_penalty(config: type, scale: str) -> None:
    dataset = data_for(config)
    batch = mini_batch(dataset, range(40, 60))
    fields = {"penalty_weight": 0.7, "penalty_scale": scale, "penalty_every": 3}
    plain = built(small(config), dataset)
    wrapped = built(C4Config(base=small(config), **fields), dataset)
    before = copy.deepcopy(plain)
    gradients = []
    for algo in (plain, wrapped):
        d3rlpy.seed(1)
        algo.impl.q_function.zero_grad()
        algo.impl.modules.set_train()
        # the first half of an update: the critic's gradient, no step
        torch_batch = torch_batch_of(batch)
        algo.impl._c4_due = True
        target = algo.impl.compute_target(torch_batch)
        if config in DISCRETE[:-1]:
            loss = algo.impl.compute_loss(torch_batch, target).loss
        else:
            loss = algo.impl.compute_critic_loss(torch_batch, target)
            loss = loss if isinstance(loss, torch.Tensor) else loss.critic_loss
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in algo.impl.q_function.parameters()])
    seen = from_mini_batch(torch_batch_of(batch), discrete=config in DISCRETE)
    penalty = CovariancePenalty(0.7, scale=scale)(critics_of(before), seen)
    added = torch.autograd.grad(penalty, list(before.impl.q_function.parameters()), allow_unused=True)
    for without, with_it, extra in zip(*gradients, added):
        expected = without if extra is None else without + 3 * extra
        torch.testing.assert_close(with_it, expected, rtol=1e-5, atol=1e-6)


def torch_batch_of(batch: TransitionMiniBatch) -> Any:
    return d3rlpy.torch_utility.TorchMiniBatch.from_batch(batch, 0.99, False, "cpu:0")


def test_the_penalty_is_applied_on_every_kth_update_only() -> None:
    dataset = dataset_of(episodes())
    algo = built(C4Config(base=small(TD3PlusBCConfig), penalty_every=3), dataset)
    applied = ["c4_penalty" in algo.update(mini_batch(dataset, range(i, i + 16))) for i in range(7)]
    assert applied == [True, False, False, True, False, False, True]


def test_fit_clusters_draws_from_one_cluster_and_reports(drawn: list[Transitions]) -> None:
    dataset = dataset_of(episodes(20))
    algo = C4Config(base=small(TD3PlusBCConfig), n_clusters=2, refresh_interval=5, penalty_every=1, seed=0).create()
    results = algo.fit(dataset, n_steps=20, n_steps_per_epoch=10, **QUIET)
    assert {batch.cluster for batch in drawn} == {0, 1}
    metrics = results[-1][1]
    names = {name for name in metrics if name.startswith("c4_")}
    assert names == {
        "c4_penalty",
        "c4_cross_covariance",
        "c4_within_cross_covariance",
        "c4_between_cross_covariance",
        "c4_smallest_probability",
        "c4_log_likelihood",
        "c4_refresh_seconds",
    }
    assert all(np.isfinite(metrics[name]) for name in names)
    assert algo.c4_buffer.probabilities.sum() == pytest.approx(1)
    assert "sample_transition_batch" not in vars(dataset)


@pytest.mark.parametrize(
    "fields",
    [
        {"embedding": "features", "penalty_kind": "feature"},
        {"next_action": "policy", "penalty_scale": "correlation"},
        {"penalty_weight": 0, "n_clusters": 1},
    ],
)
@pytest.mark.parametrize("config", ALL)
def test_every_option_trains_every_algorithm(config: type, fields: dict[str, Any]) -> None:
    algo = C4Config(base=small(config), refresh_interval=3, penalty_every=2, **fields).create()
    results = algo.fit(
        data_for(config, 10),
        n_steps=6,
        n_steps_per_epoch=6,
        **QUIET,
    )
    metrics = results[0][1]
    assert all(np.isfinite(value) for value in metrics.values())


def test_wrap_keeps_weights_optimizer_state_and_step_count_of_a_trained_algorithm() -> None:
    dataset = dataset_of(episodes())
    algo = built(small(TD3PlusBCConfig), dataset)
    for i in range(5):
        algo.update(mini_batch(dataset, range(i, i + 16)))
    before, unwrapped = state_of(algo), copy.deepcopy(algo)
    wrapped = wrap(algo, n_clusters=2, penalty_weight=0)
    assert wrapped is algo
    assert isinstance(wrapped, TD3PlusBC)
    assert wrapped.grad_step == 5
    after = state_of(wrapped)
    assert all(torch.equal(before[name], after[name]) for name in before)
    for other in (unwrapped, wrapped):
        d3rlpy.seed(2)
        other.update(mini_batch(dataset, range(16)))
    assert_same_state(unwrapped, wrapped)


def test_wrap_of_an_unbuilt_algorithm_trains_like_the_config() -> None:
    dataset = dataset_of(episodes(10))
    d3rlpy.seed(0)
    one = wrap(small(TD3PlusBCConfig).create(), n_clusters=2, seed=0)
    quiet = {"n_steps": 5, "n_steps_per_epoch": 5, **QUIET}
    one.fit(dataset, **quiet)
    d3rlpy.seed(0)
    other = C4Config(base=small(TD3PlusBCConfig), n_clusters=2, seed=0).create()
    other.fit(dataset, **quiet)
    assert_same_state(one, other)


def test_a_second_fit_draws_other_batches_and_the_first_is_reproducible(drawn: list[Transitions]) -> None:
    dataset = dataset_of(episodes(10))
    quiet = {"n_steps": 4, "n_steps_per_epoch": 4, **QUIET}
    for _ in range(2):
        d3rlpy.seed(0)
        algo = C4Config(base=small(TD3PlusBCConfig), seed=5).create()
        algo.fit(dataset, **quiet)
    first, second = drawn[:4], drawn[4:8]
    assert torch.equal(first[0].indices, second[0].indices)
    algo.fit(dataset, **quiet)
    assert not torch.equal(drawn[8].indices, second[0].indices)


@pytest.mark.parametrize("config", ALL)
def test_what_is_saved_comes_back_with_the_same_predictions(config: type, tmp_path: Path) -> None:
    dataset = data_for(config)
    algo = C4Config(base=small(config), n_clusters=2, seed=0).create()
    algo.fit(dataset, n_steps=3, n_steps_per_epoch=3, **QUIET)
    algo.save(str(tmp_path / "algo.d3"))
    loaded = d3rlpy.load_learnable(str(tmp_path / "algo.d3"))
    assert type(loaded) is type(algo)
    assert json.loads(loaded.config.serialize()) == json.loads(algo.config.serialize())
    observations = np.random.default_rng(1).normal(size=(8, 3)).astype(np.float32)
    actions = np.arange(8).reshape(-1, 1) % 4 if config in DISCRETE else np.full((8, 2), 0.5, np.float32)
    found = []
    for each in (algo, loaded):
        d3rlpy.seed(0)  # BCQ, BEAR and CRR draw their actions
        found.append((each.predict(observations), each.predict_value(observations, actions)))
    for one, other in zip(*found):
        np.testing.assert_array_equal(one, other)
    assert_same_state(algo, loaded)


@pytest.mark.parametrize("config", sorted(WARM_UPS, key=lambda cls: cls.__name__))
def test_clusters_wait_until_the_critics_learn(config: type, drawn: list[Transitions]) -> None:
    dataset = data_for(config)
    base = small(config, **{WARM_UPS[config]: 7})
    algo = built(C4Config(base=base, n_clusters=2, penalty_every=1, seed=0), dataset)
    before = next(algo.impl.q_function.parameters()).detach().clone()
    moved = []
    for _ in algo.fitter(dataset, n_steps=12, n_steps_per_epoch=1, **QUIET):
        moved.append(not torch.equal(before, next(algo.impl.q_function.parameters())))
    assert moved == [False] * 7 + [True] * 5
    assert [batch.cluster >= 0 for batch in drawn] == moved


def test_bear_whose_actor_alone_warms_up_has_clusters_from_the_start(drawn: list[Transitions]) -> None:
    algo = C4Config(base=small(BEARConfig, warmup_steps=7), n_clusters=2, penalty_every=1, seed=0).create()
    algo.fit(data_for(BEARConfig), n_steps=9, n_steps_per_epoch=9, **QUIET)
    assert all(batch.cluster >= 0 for batch in drawn)


@pytest.mark.parametrize(
    ("config", "q_function"),
    [
        (TD3PlusBCConfig, QRQFunctionFactory),
        (SACConfig, QRQFunctionFactory),
        (DQNConfig, QRQFunctionFactory),
        (DQNConfig, IQNQFunctionFactory),
        (DiscreteCQLConfig, IQNQFunctionFactory),
    ],
)
def test_distributional_q_functions_are_clustered_by_their_mean(config: type, q_function: Any) -> None:
    algo = C4Config(
        base=small(config, q_func_factory=q_function()), refresh_interval=3, penalty_every=1, n_clusters=2
    ).create()
    results = algo.fit(data_for(config), n_steps=6, n_steps_per_epoch=6, **QUIET)
    assert results[0][1]["c4_penalty"] > 0


def test_save_load_and_continue(tmp_path: Path) -> None:
    dataset = dataset_of(episodes(10))
    config = small(TD3PlusBCConfig, observation_scaler=StandardObservationScaler())
    algo = C4Config(base=config, n_clusters=2, penalty_weight=0.3, seed=0).create()
    quiet = {"n_steps": 5, "n_steps_per_epoch": 5, **QUIET}
    algo.fit(dataset, **quiet)
    algo.save(str(tmp_path / "algo.d3"))
    loaded = d3rlpy.load_learnable(str(tmp_path / "algo.d3"))
    assert type(loaded) is type(algo)
    assert_same_state(algo, loaded)
    observations = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    np.testing.assert_array_equal(algo.predict(observations), loaded.predict(observations))
    assert json.loads(loaded.config.serialize()) == json.loads(algo.config.serialize())
    assert loaded.config.penalty_weight == 0.3
    loaded.fit(dataset, **quiet)
    assert loaded.grad_step == 5
    assert not torch.equal(next(loaded.impl.q_function.parameters()), next(algo.impl.q_function.parameters())), (
        "training did not go on"
    )


def test_params_json_makes_the_same_algorithm_again(tmp_path: Path) -> None:
    algo = C4Config(base=small(IQLConfig), n_clusters=5, next_action="policy").create()
    algo.fit(
        dataset_of(episodes(10)),
        n_steps=2,
        n_steps_per_epoch=2,
        show_progress=False,
        experiment_name="run",
        with_timestamp=False,
        logger_adapter=FileAdapterFactory(root_dir=str(tmp_path)),
    )
    again = d3rlpy.algos.IQL.from_json(str(tmp_path / "run" / "params.json"))
    assert type(again) is type(algo)
    assert again.config.n_clusters == 5
    assert again.config.next_action == "policy"
    assert again.batch_size == 16
    assert (tmp_path / "run" / "c4_cross_covariance.csv").exists()


def test_transitions_of_equals_what_the_picker_gives() -> None:
    for dataset in (dataset_of(episodes()), dataset_of(episodes(), buffer=FIFOBuffer(limit=50))):
        transitions = transitions_of(dataset)
        expected = mini_batch(dataset, range(dataset.transition_count))
        assert len(transitions) == dataset.transition_count
        for name in ("observations", "actions", "next_observations", "next_actions"):
            np.testing.assert_array_equal(getattr(transitions, name).numpy(), getattr(expected, name))
        for name in ("rewards", "terminals"):
            np.testing.assert_array_equal(getattr(transitions, name).numpy(), getattr(expected, name)[:, 0])


def test_transitions_of_marks_the_ends_of_episodes_and_what_has_a_next_action() -> None:
    transitions = transitions_of(dataset_of(episodes(3)))  # 20 steps terminated, 20 (of 21) not, 22 terminated
    ends = torch.zeros(62)
    ends[[19, 39, 61]] = 1
    assert torch.equal(transitions.terminals + transitions.timeouts, ends)
    assert transitions.timeouts.nonzero().tolist() == [[39]]
    assert torch.equal(transitions.has_next_actions, 1 - transitions.terminals)


def test_transitions_of_discrete_actions_are_integers() -> None:
    parts = [
        Episode(
            observations=np.zeros((5, 3), dtype=np.float32),
            actions=np.arange(5).reshape(5, 1) % 3,
            rewards=np.zeros((5, 1), dtype=np.float32),
            terminated=True,
        )
    ]
    transitions = transitions_of(dataset_of(parts))
    assert transitions.actions.dtype == torch.int64
    assert transitions.actions.tolist() == [0, 1, 2, 0, 1]


def test_transitions_of_a_multi_step_picker_and_of_tuple_observations() -> None:
    dataset = dataset_of(episodes(), transition_picker=MultiStepTransitionPicker(n_steps=3, gamma=0.99))
    transitions = transitions_of(dataset)
    expected = mini_batch(dataset, range(dataset.transition_count))
    np.testing.assert_array_equal(transitions.intervals.numpy(), expected.intervals[:, 0])
    ends = np.cumsum([episode.transition_count for episode in dataset.episodes]) - 1
    truncated = [end for end, episode in zip(ends, dataset.episodes) if not episode.terminated]
    assert transitions.timeouts.nonzero().squeeze(1).tolist() == truncated
    np.testing.assert_array_equal(transitions.next_observations.numpy(), expected.next_observations)

    pairs = [
        Episode(
            observations=[part.observations, part.observations[:, :2]],
            actions=part.actions,
            rewards=part.rewards,
            terminated=part.terminated,
        )
        for part in episodes()
    ]
    transitions = transitions_of(dataset_of(pairs))
    assert isinstance(transitions.observations, tuple)
    assert [leaf.shape[1] for leaf in transitions.observations] == [3, 2]


def test_global_generators_move_as_without_c4() -> None:
    dataset = dataset_of(episodes(10))
    algo = built(C4Config(base=small(DDPGConfig), n_clusters=2, seed=0), dataset)
    torch.manual_seed(5)
    np.random.seed(5)
    numpy_state = np.random.get_state()[1].copy()
    torch_state = torch.get_rng_state().clone()
    algo.fit(dataset, n_steps=5, n_steps_per_epoch=5, **QUIET)
    assert torch.equal(torch_state, torch.get_rng_state())
    np.testing.assert_array_equal(numpy_state, np.random.get_state()[1])


def test_measure_is_the_hosts_own_value_and_loss_and_theorem_2_on_all_the_data() -> None:
    dataset = dataset_of(episodes())
    algo = built(small(TD3Config, target_smoothing_sigma=0.0), dataset)
    transitions = transitions_of(dataset, algo)
    state = torch.get_rng_state().clone()
    measured = measure(algo, transitions, n_clusters=2)
    assert torch.equal(state, torch.get_rng_state())

    q = algo.predict_value(transitions.observations.numpy(), transitions.actions.numpy())
    assert measured["mean_q"] == pytest.approx(q.mean(), rel=1e-5)
    impl = algo.impl
    with torch.no_grad():
        next_action = impl.modules.targ_policy(transitions.next_observations).squashed_mu
        members = [f.compute_expected_q for f in impl._targ_q_func_forwarder.forwarders]
        next_q = torch.min(*(member(transitions.next_observations, next_action).squeeze(1) for member in members))
        target = transitions.rewards + 0.99 * (1 - transitions.terminals) * next_q
        members = [f.compute_expected_q for f in impl._q_func_forwarder.forwarders]
        errors = [member(transitions.observations, transitions.actions).squeeze(1) - target for member in members]
    assert measured["td_loss"] == pytest.approx(float(torch.stack(errors).square().mean()), rel=1e-5)

    target_g, g = stacked_gradients(critics_of(algo), transitions).double().chunk(2, dim=1)
    c = np.cov(target_g.numpy().T, g.numpy().T, ddof=0)[:5, 5:]
    assert measured["total"] == pytest.approx(np.linalg.norm(c), rel=1e-5)
    bound = np.sqrt(target_g.numpy().var(axis=0).sum() * g.numpy().var(axis=0).sum())
    assert measured["correlation"] == pytest.approx(np.linalg.norm(c) / bound, rel=1e-5)
    assert measured["gradient_norm"] == pytest.approx(np.sqrt((g.numpy() ** 2).sum(axis=1).mean()), rel=1e-5)


def test_diagnose_reads_a_wrapped_algorithm_and_its_buffer() -> None:
    dataset = dataset_of(episodes())
    algo = built(C4Config(base=small(TD3Config), n_clusters=2, seed=0), dataset)
    algo.fit(dataset, n_steps=5, n_steps_per_epoch=5, **QUIET)
    found, measured = diagnose(critics_of(algo), algo.c4_buffer), measure(algo, transitions_of(dataset, algo))
    for name in ("total", "correlation", "gradient_norm", "target_gradient_norm"):  # whatever the clusters
        assert getattr(found, name) == pytest.approx(measured[name], rel=1e-5), name
    assert found.variance_cosine**2 <= 1
    assert found.largest_effective_size < len(algo.c4_buffer)  # the buffer's two clusters


def test_clusterer_and_penalty_may_be_replaced() -> None:
    class Quadratic:
        weight = 1.0

        def __call__(self, critics: Any, batch: Transitions) -> torch.Tensor:
            return 0.0 * critics.critic[0](batch.observations, batch.actions).sum() + 7.0

    dataset = dataset_of(episodes(10))
    algo = built(C4Config(base=small(TD3PlusBCConfig), penalty_every=1), dataset)
    algo.c4_clusterer = lambda embeddings, previous: torch.eye(2)[torch.arange(len(embeddings)) % 2]
    algo.impl.c4_penalty = Quadratic()
    results = algo.fit(dataset, n_steps=2, n_steps_per_epoch=2, **QUIET)
    assert algo.c4_buffer.probabilities.tolist() == pytest.approx([0.5, 0.5], abs=0.01)
    assert results[0][1]["c4_penalty"] == pytest.approx(7.0)


def test_the_buffer_takes_more_options(drawn: list[Transitions]) -> None:
    algo = C4Config(base=small(TD3PlusBCConfig), n_clusters=2, seed=0).create()
    algo.c4_buffer_options = {"assignment": "hard"}
    algo.fit(dataset_of(episodes()), n_steps=3, n_steps_per_epoch=3, **QUIET)
    assert set(algo.c4_buffer.responsibilities.unique().tolist()) == {0.0, 1.0}
    for batch in drawn:
        assert set(algo.c4_buffer.responsibilities[batch.indices].argmax(dim=1).tolist()) == {batch.cluster}


def test_deepcopy_and_copy_policy_from_work_on_a_wrapped_algorithm() -> None:
    dataset = dataset_of(episodes())
    algo = built(C4Config(base=small(TD3PlusBCConfig)), dataset)
    twin = copy.deepcopy(algo)
    twin.update(mini_batch(dataset, range(16)))
    other = built(small(TD3PlusBCConfig), dataset, seed=9)
    other.copy_policy_from(algo)
    for mine, theirs in zip(other.impl.policy.parameters(), algo.impl.policy.parameters()):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("config", [BCConfig, DiscreteBCConfig, RandomPolicyConfig])
def test_algorithms_without_a_critic_are_refused_with_the_reason(config: type) -> None:
    with pytest.raises(ValueError, match="algo: expected a Q-learning algorithm, got .* which has no critic"):
        wrap(config().create())
    with pytest.raises(ValueError, match="has no critic"):
        C4Config(base=config()).create()


def test_other_algorithms_are_refused() -> None:
    with pytest.raises(
        ValueError,
        match="algo: expected a d3rlpy Q-learning algorithm, as create.* of a config, got DecisionTransformer",
    ):
        wrap(DecisionTransformerConfig().create())

    class Other(QLearningAlgoBase):
        """It may have no ensemble of Q-functions."""

    algo = TD3PlusBCConfig().create()
    algo.__class__ = Other
    with pytest.raises(ValueError, match="algo: expected one of ACTIVE, AWAC, BCQ, BEAR, .*, got Other"):
        wrap(algo)


def test_a_subclass_of_ones_own_is_wrapped_and_keeps_what_it_changes() -> None:
    losses = []

    class OwnImpl(TD3PlusBCImpl):
        def compute_critic_loss(self, batch: Any, q_tpn: torch.Tensor) -> Any:
            loss = super().compute_critic_loss(batch, q_tpn)
            losses.append(float(loss.critic_loss.detach()))
            return loss

    class Own(TD3PlusBC):
        def inner_create_impl(self, observation_shape: Any, action_size: int) -> None:
            super().inner_create_impl(observation_shape, action_size)
            self._impl.__class__ = OwnImpl

    algo = wrap(Own(small(TD3PlusBCConfig), "cpu", False), n_clusters=2, penalty_every=1)
    metrics = algo.fit(dataset_of(episodes()), n_steps=4, n_steps_per_epoch=4, **QUIET)[-1][1]
    assert isinstance(algo, Own)
    assert isinstance(algo.impl, OwnImpl)
    assert metrics["critic_loss"] == pytest.approx(np.mean(losses) + metrics["c4_penalty"])


def test_a_subclass_whose_critic_learns_by_other_code_is_warned_about_once() -> None:
    class OwnImpl(TD3PlusBCImpl):
        def update_critic(self, batch: Any) -> dict[str, float]:
            if self.learns:
                sum(parameter.sum() for parameter in self.q_function.parameters()).backward()
                self._modules.critic_optim.step()
            return {}

        learns = False

    algo = TD3PlusBC(small(TD3PlusBCConfig), "cpu", False)
    algo.create_impl((3,), 2)
    algo.impl.__class__ = OwnImpl
    wrap(algo, n_clusters=1, penalty_every=1)
    batch = mini_batch(dataset_of(episodes()), range(8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        algo.update(batch)  # a critic that does not learn yet
        OwnImpl.learns = True
        with pytest.raises(UserWarning, match="no penalty is added: OwnImpl trains its critic without compute_critic_"):
            algo.update(batch)
        algo.update(batch)


def test_a_subclass_with_an_update_of_its_own_is_refused() -> None:
    class Own(TD3PlusBC):
        def update(self, batch: Any) -> dict[str, float]:
            return super().update(batch)

    with pytest.raises(ValueError, match="algo: expected d3rlpy's own `update`, .*, got one of Own"):
        wrap(Own(small(TD3PlusBCConfig), "cpu", False))


def test_a_second_wrap_is_refused_and_changes_nothing() -> None:
    algo = wrap(small(TD3PlusBCConfig).create(), n_clusters=2)
    with pytest.raises(
        ValueError, match="algo: expected an algorithm without C4, got a C4TD3PlusBC, which is wrapped already"
    ):
        wrap(algo, n_clusters=7)
    assert algo.config.n_clusters == 2
    with pytest.raises(ValueError, match="base: expected a config without C4"):
        C4Config(base=C4Config(base=TD3PlusBCConfig()))


def test_a_refused_wrap_leaves_the_algorithm_as_it_was() -> None:
    algo = small(TD3PlusBCConfig).create()
    with pytest.raises(ValueError, match="n_clusters: expected an integer of at least 1, got 0"):
        wrap(algo, n_clusters=0)
    assert type(algo) is TD3PlusBC


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base": None}, "base: expected a d3rlpy config"),
        ({"embedding": "values"}, "embedding: expected one of 'gradients', 'features', got 'values'"),
        ({"penalty_weight": -1}, "penalty_weight: expected a finite number at least 0, got -1"),
        ({"penalty_weight": float("nan")}, "penalty_weight: expected a finite number"),
        ({"penalty_every": 0}, "penalty_every: expected an integer of at least 1, got 0"),
        ({"next_action": "best"}, "next_action: expected one of"),
        ({"batch_size": 32}, "batch_size: expected to be set on base, got 32"),
        ({"observation_scaler": StandardObservationScaler()}, "observation_scaler: expected to be set on base"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        C4Config(**{"base": TD3PlusBCConfig(), **fields})


def test_datasets_and_calls_that_do_not_fit_are_refused() -> None:
    one = dataset_of(episodes())
    with pytest.raises(ValueError, match="dataset: expected one ReplayBuffer"):
        transitions_of(MixedReplayBuffer(one, dataset_of(episodes(seed=1)), secondary_mix_ratio=0.5))
    with pytest.raises(ValueError, match="algo: expected a built algorithm"):
        critics_of(small(TD3PlusBCConfig).create())
    algo = BCConfig(batch_size=16).create()
    algo.create_impl((3,), 2)
    with pytest.raises(ValueError, match="algo: expected one with an ensemble of Q-functions, got BC"):
        critics_of(algo)
    ahead = dataset_of(episodes(), transition_picker=MultiStepTransitionPicker(n_steps=3, gamma=0.99))
    with pytest.raises(ValueError, match="buffer: expected one with a BasicTransitionPicker or Frame.*, got MultiStep"):
        C4Config(base=small(SACConfig)).create().fit_online(None, ahead)


@pytest.mark.parametrize("limit", [None, 40])
@pytest.mark.parametrize(("config", "name"), [(SACConfig, "Pendulum-v1"), (DQNConfig, "CartPole-v1")])
def test_online_batches_are_rows_of_what_the_environment_gave(
    config: type, name: str, limit: int | None, drawn: list[Transitions]
) -> None:
    env = gymnasium.make(name, max_episode_steps=30)
    env.reset(seed=0)
    host = create_fifo_replay_buffer(limit or 1000, env=env)
    held: list[Transitions] = []
    algo = C4Config(base=small(config), n_clusters=2, refresh_interval=10, penalty_every=1, seed=0).create()

    def keep(algo: Any, epoch: int, step: int) -> None:
        if algo.c4_buffer is not None:
            assert len(algo.c4_buffer) == host.transition_count
            held.append(transitions_of_rows(host))

    algo.fit_online(
        env,
        host,
        n_steps=120,
        n_steps_per_epoch=60,
        update_start_step=20,
        random_steps=15,
        **QUIET,
        callback=keep,
    )
    assert len(drawn) == len(held) > 80
    for batch, rows in zip(drawn, held):
        known = {row_key(rows, i) for i in range(len(rows))}
        assert {row_key(batch, i) for i in range(len(batch))} <= known
    assert {batch.cluster for batch in drawn} == {0, 1}
    newest = row_key(held[-1], len(held[-1]) - 1)
    everything = algo.c4_buffer.sample(500)
    assert newest in {row_key(everything, i) for i in range(500)}


def transitions_of_rows(dataset: ReplayBuffer) -> Transitions:
    rows = [dataset.transition_picker(*dataset.buffer[i]) for i in range(dataset.transition_count)]
    actions = torch.as_tensor(np.stack([row.action for row in rows]))
    next_actions = torch.as_tensor(np.stack([row.next_action for row in rows]))
    if dataset.dataset_info.action_space == ActionSpace.DISCRETE:
        actions, next_actions = actions.squeeze(1).long(), next_actions.squeeze(1).long()
    return Transitions(
        observations=np.stack([row.observation for row in rows]).astype(np.float32),
        actions=actions,
        rewards=np.stack([row.reward for row in rows]).astype(np.float32),
        next_observations=np.stack([row.next_observation for row in rows]).astype(np.float32),
        terminals=np.array([row.terminal for row in rows], np.float32),
        next_actions=next_actions,
    )


def row_key(rows: Transitions, i: int) -> tuple[Any, ...]:
    names = ("observations", "actions", "rewards", "next_observations", "terminals", "next_actions")
    return tuple(tuple(getattr(rows, name)[i].reshape(-1).tolist()) for name in names)


def test_online_training_without_a_buffer_makes_d3rlpys_own() -> None:
    algo = C4Config(base=small(SACConfig), n_clusters=2, seed=0).create()
    quiet = {"n_steps_per_epoch": 30, **QUIET}
    algo.fit_online(gymnasium.make("Pendulum-v1"), n_steps=30, **quiet)
    assert algo.c4_buffer.capacity == 1_000_000
    assert algo.grad_step > 5


def test_more_clusters_than_transitions_are_as_many_as_there_are_transitions() -> None:
    algo = C4Config(base=small(TD3PlusBCConfig), n_clusters=300).create()
    with pytest.warns(UserWarning, match="300 components for .* distinct rows"):
        algo.fit(
            dataset_of(episodes()),
            n_steps=1,
            n_steps_per_epoch=1,
            **QUIET,
        )
