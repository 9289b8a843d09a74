"""What d3rlpy offers goes on working on an algorithm with C4 in it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
import socket
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import d3rlpy
import gymnasium
import numpy as np
import pytest
import torch
from c4buffer.integrations.d3rlpy import ACTIVEConfig, C4Config, critics_of, measure, transitions_of, wrap
from d3rlpy.algos import BCQConfig, CQLConfig, DiscreteCQLConfig, DQNConfig, IQLConfig, SACConfig, TD3PlusBCConfig
from d3rlpy.constants import LoggingStrategy
from d3rlpy.dataset import Episode, FrameStackTransitionPicker, MultiStepTransitionPicker, ReplayBuffer
from d3rlpy.logging import (
    CombineAdapterFactory,
    FileAdapterFactory,
    TensorboardAdapterFactory,
    WanDBAdapterFactory,
)
from d3rlpy.metrics import AverageValueEstimationEvaluator, EnvironmentEvaluator, TDErrorEvaluator
from d3rlpy.models.encoders import PixelEncoderFactory, VectorEncoderFactory
from d3rlpy.ope import FQE, DiscreteFQE, FQEConfig
from d3rlpy.preprocessing import (
    PixelObservationScaler,
    StandardObservationScaler,
    TupleObservationScaler,
)
from torch import multiprocessing

from c4buffer import Transitions, diagnose, stacked_gradients

from .test_d3rlpy import (
    ALL,
    DISCRETE,
    QUIET,
    assert_same_state,
    built,
    data_for,
    dataset_of,
    drawn,
    episodes,
    mini_batch,
    small,
)

__all__ = ["drawn"]  # a fixture
PIXELS = PixelEncoderFactory(filters=[[4, 3, 2], [4, 3, 2]], feature_size=8)
C4_METRICS = {
    "c4_penalty",
    "c4_cross_covariance",
    "c4_within_cross_covariance",
    "c4_between_cross_covariance",
    "c4_smallest_probability",
    "c4_log_likelihood",
    "c4_refresh_seconds",
}


def image_episodes(count: int = 4, *, discrete: bool, channels: int = 2, size: int = 16) -> list[Episode]:
    generator = np.random.default_rng(0)
    return [
        Episode(
            observations=generator.integers(0, 256, size=(15, channels, size, size), dtype=np.uint8),
            actions=(np.arange(15).reshape(-1, 1) % 3).astype(np.int32)
            if discrete
            else generator.uniform(-1, 1, size=(15, 2)).astype(np.float32),
            rewards=generator.normal(size=(15, 1)).astype(np.float32),
            terminated=i % 2 == 0,
        )
        for i in range(count)
    ]


def pixel_config(config: type, **fields: Any) -> Any:
    names = {field.name for field in dataclasses.fields(config)}
    encoders = {name: PIXELS for name in names if name.endswith("encoder_factory")}
    return config(**{"batch_size": 16, "observation_scaler": PixelObservationScaler(), **encoders, **fields})


@pytest.mark.parametrize("config", [DQNConfig, DiscreteCQLConfig, TD3PlusBCConfig, IQLConfig])
def test_pixels_train_as_in_the_plain_algorithm_and_stay_bytes_in_the_buffer(
    config: type, drawn: list[Transitions]
) -> None:
    dataset = dataset_of(image_episodes(discrete=config in DISCRETE))
    plain = built(pixel_config(config), dataset)
    wrapped = built(C4Config(base=pixel_config(config), n_clusters=1, penalty_weight=0, seed=0), dataset)
    d3rlpy.seed(1)
    wrapped.fit(dataset, n_steps=4, n_steps_per_epoch=4, **QUIET)
    assert all(batch.observations.dtype == torch.uint8 for batch in drawn)
    d3rlpy.seed(1)
    for batch in drawn:
        plain.update(mini_batch(dataset, batch.indices))
    assert_same_state(plain, wrapped)


@pytest.mark.parametrize("next_action", ["dataset", "policy"])
@pytest.mark.parametrize("config", [DQNConfig, TD3PlusBCConfig])
def test_pixels_are_clustered_by_the_gradients_that_training_sees(config: type, next_action: str) -> None:
    dataset = dataset_of(image_episodes(discrete=config in DISCRETE))
    algo = C4Config(
        base=pixel_config(config), n_clusters=2, next_action=next_action, refresh_interval=3, penalty_every=1, seed=0
    ).create()
    seen: list[torch.Tensor] = []

    def keep(embeddings: torch.Tensor, previous: Any) -> torch.Tensor:
        seen.append(embeddings)
        return torch.full((len(embeddings), 2), 0.5)

    algo.c4_clusterer = keep
    algo.c4_buffer_options = {"max_dim": 2048}
    results = algo.fit(dataset, n_steps=3, n_steps_per_epoch=3, **QUIET)
    assert np.isfinite(results[0][1]["c4_penalty"])
    algo.c4_buffer.refresh()  # by the networks as they are now
    scaled = transitions_of(dataset, algo)
    assert scaled.observations.max() <= 1
    expected = stacked_gradients(critics_of(algo, next_action=next_action), scaled)
    torch.testing.assert_close(seen[-1], expected)


def test_tuple_observations_train_and_their_scaler_is_applied(drawn: list[Transitions]) -> None:
    parts = [
        Episode(
            observations=[part.observations, part.observations[:, :2]],
            actions=part.actions,
            rewards=part.rewards,
            terminated=part.terminated,
        )
        for part in episodes()
    ]
    dataset = dataset_of(parts)

    scaler = TupleObservationScaler([StandardObservationScaler(), StandardObservationScaler()])
    config = small(
        TD3PlusBCConfig,
        actor_encoder_factory=First([16, 16]),
        critic_encoder_factory=First([16, 16]),
        observation_scaler=scaler,
    )
    algo = C4Config(base=config, n_clusters=2, refresh_interval=3, penalty_every=1, seed=0).create()
    algo.create_impl(((3,), (2,)), 2)
    results = algo.fit(dataset, n_steps=4, n_steps_per_epoch=4, **QUIET)
    assert np.isfinite(results[0][1]["c4_penalty"])
    assert {batch.cluster for batch in drawn} <= {0, 1}
    everything = transitions_of(dataset, algo).observations
    assert all(float(leaf.mean().abs()) < 0.2 for leaf in everything)
    assert all(torch.equal(batch.observations[0], everything[0][batch.indices]) for batch in drawn)


@dataclasses.dataclass()
class First(VectorEncoderFactory):
    """Encodes the first part of a tuple alone."""

    def create(self, observation_shape: Any) -> Any:
        return FirstOf(super().create(observation_shape[0]))

    def create_with_action(self, observation_shape: Any, action_size: int, discrete_action: bool = False) -> Any:
        return FirstOf(super().create_with_action(observation_shape[0], action_size, discrete_action))

    @staticmethod
    def get_type() -> str:
        return "first_of_tuple"


class FirstOf(torch.nn.Module):
    """An encoder of the first part of a tuple."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Any, *action: Any) -> Any:
        return self.inner(x[0], *action)


@pytest.mark.parametrize(
    "picker", [MultiStepTransitionPicker(n_steps=3, gamma=0.99), FrameStackTransitionPicker(n_frames=3)]
)
def test_batches_of_other_pickers_are_theirs(picker: Any, drawn: list[Transitions]) -> None:
    frames = isinstance(picker, FrameStackTransitionPicker)
    parts = image_episodes(discrete=True, channels=1) if frames else episodes(discrete=True)
    dataset = dataset_of(parts, transition_picker=picker)
    base = pixel_config(DQNConfig) if frames else small(DQNConfig)
    plain, wrapped = built(base, dataset), built(C4Config(base=base, n_clusters=1, penalty_weight=0, seed=0), dataset)
    d3rlpy.seed(1)
    wrapped.fit(dataset, n_steps=4, n_steps_per_epoch=4, **QUIET)
    assert drawn[0].observations.shape[1] == 3
    d3rlpy.seed(1)
    for batch in drawn:
        plain.update(mini_batch(dataset, batch.indices))
    assert_same_state(plain, wrapped)


@pytest.mark.parametrize("config", ALL)
def test_from_json_makes_every_algorithm_again(config: type, tmp_path: Path) -> None:
    algo = C4Config(base=small(config), n_clusters=2, penalty_every=3, trace_weight=0.5, seed=4).create()
    factory = FileAdapterFactory(root_dir=str(tmp_path))
    options = {"experiment_name": "run", "with_timestamp": False, "show_progress": False, "logger_adapter": factory}
    algo.fit(data_for(config), n_steps=2, n_steps_per_epoch=1, **options)
    again = type(algo).from_json(str(tmp_path / "run" / "params.json"))
    assert type(again) is type(algo)
    assert again.config == algo.config
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {f"{name}.csv" for name in C4_METRICS} <= names
    assert {"model_1.d3", "model_2.d3"} <= names
    d3rlpy.load_learnable(str(tmp_path / "run" / "model_2.d3"))


def test_models_are_saved_and_loaded_between_plain_and_wrapped(tmp_path: Path) -> None:
    dataset = dataset_of(episodes())
    wrapped = built(C4Config(base=small(IQLConfig), seed=0), dataset)
    wrapped.fit(dataset, n_steps=3, n_steps_per_epoch=3, **QUIET)
    wrapped.save_model(str(tmp_path / "model.pt"))
    plain = built(small(IQLConfig), dataset, seed=9)
    plain.load_model(str(tmp_path / "model.pt"))
    assert_same_state(plain, wrapped)
    plain.save_model(str(tmp_path / "plain.pt"))
    other = built(C4Config(base=small(IQLConfig)), dataset, seed=5)
    other.load_model(str(tmp_path / "plain.pt"))
    assert_same_state(plain, other)


def test_a_fit_is_resumed_batch_for_batch(tmp_path: Path, drawn: list[Transitions]) -> None:
    dataset = dataset_of(episodes(10))

    def fresh() -> Any:
        base = small(TD3PlusBCConfig, observation_scaler=StandardObservationScaler())
        return built(C4Config(base=base, n_clusters=2, refresh_interval=4, penalty_every=2, seed=0), dataset)

    steps = {"n_steps_per_epoch": 1, **QUIET}
    whole = fresh()
    for epoch, _ in whole.fitter(dataset, n_steps=12, **steps):
        if epoch == 6:
            whole.save_model(str(tmp_path / "model.pt"))
            whole.c4_buffer.save(tmp_path / "buffer.safetensors")
            noise = torch.get_rng_state()
    halves = fresh()
    halves.load_model(str(tmp_path / "model.pt"))
    halves.set_grad_step(6)
    halves.c4_resume(tmp_path / "buffer.safetensors")
    torch.set_rng_state(noise)
    halves.fit(dataset, n_steps=6, **steps)
    for first, second in zip(drawn[6:12], drawn[12:]):
        assert first.cluster == second.cluster
        assert torch.equal(first.indices, second.indices)
    assert_same_state(whole, halves)

    halves.c4_resume(tmp_path / "buffer.safetensors")
    with pytest.raises(ValueError, match="dataset: expected the transitions of the buffer in .*, got others"):
        halves.fit(dataset_of(episodes(10, seed=1)), n_steps=6, **steps)
    other = built(C4Config(base=small(TD3PlusBCConfig), n_clusters=3), dataset)
    other.c4_resume(tmp_path / "buffer.safetensors")
    with pytest.raises(ValueError, match="expected"):
        other.fit(dataset, n_steps=6, **steps)
    other.c4_resume(tmp_path / "buffer.safetensors")
    with pytest.raises(ValueError, match="c4_resume: expected a fit of one dataset after it, got fit_online"):
        other.fit_online(gymnasium.make("Pendulum-v1"), n_steps=5)


def test_a_fit_that_is_resumed_while_it_warms_up_clusters_when_the_whole_one_does(
    tmp_path: Path, drawn: list[Transitions]
) -> None:
    dataset = dataset_of(episodes(10))

    def fresh() -> Any:
        return built(C4Config(base=small(BCQConfig, rl_start_step=5), refresh_interval=1000, seed=0), dataset)

    whole = fresh()
    for epoch, _ in whole.fitter(dataset, n_steps=8, n_steps_per_epoch=1, **QUIET):
        if epoch == 3:
            whole.save_model(str(tmp_path / "model.pt"))
            whole.c4_buffer.save(tmp_path / "buffer.safetensors")
    resumed = fresh()
    resumed.load_model(str(tmp_path / "model.pt"))
    resumed.set_grad_step(3)
    resumed.c4_resume(tmp_path / "buffer.safetensors")
    resumed.fit(dataset, n_steps=5, n_steps_per_epoch=5, **QUIET)
    assert [batch.cluster >= 0 for batch in drawn[3:8]] == [batch.cluster >= 0 for batch in drawn[8:]]
    assert drawn[-1].cluster >= 0


def test_online_a_truncated_episodes_last_row_is_a_timeout() -> None:
    env = gymnasium.make("Pendulum-v1", max_episode_steps=10)
    algo = C4Config(base=small(SACConfig), n_clusters=2, seed=0).create()
    algo.fit_online(env, n_steps=45, n_steps_per_epoch=45, **QUIET)
    rows = algo.c4_buffer.sample(400)
    ended = {tuple(row) for row, timeout in zip(rows.observations.tolist(), rows.timeouts.tolist()) if timeout}
    assert len(ended) == 4


@pytest.mark.parametrize("config", [TD3PlusBCConfig, IQLConfig, SACConfig, DQNConfig])
@pytest.mark.parametrize("form", ["policy.pt", "policy.onnx"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # torch will drop both ways of export
def test_the_exported_policy_is_the_plain_algorithms(
    config: type, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form.endswith("onnx"):  # torch's newer exporter takes no scripted function, which d3rlpy hands it
        monkeypatch.setattr(torch.onnx, "export", functools.partial(torch.onnx.export, dynamo=False))
    dataset = data_for(config)
    algo = built(C4Config(base=small(config)), dataset)
    plain = built(small(config), dataset)
    algo.save_policy(str(tmp_path / f"c4-{form}"))
    plain.save_policy(str(tmp_path / form))
    if form.endswith("onnx"):
        import onnx

        graphs = [onnx.load(tmp_path / name).graph for name in (form, f"c4-{form}")]
        assert [i.raw_data for i in graphs[0].initializer] == [i.raw_data for i in graphs[1].initializer]
        assert [node.op_type for node in graphs[0].node] == [node.op_type for node in graphs[1].node]
        return
    policy = torch.jit.load(str(tmp_path / f"c4-{form}"))
    observations = np.random.default_rng(0).normal(size=(1, 3)).astype(np.float32)
    np.testing.assert_allclose(
        policy(torch.from_numpy(observations)).detach().numpy(), algo.predict(observations), rtol=1e-6
    )


def test_networks_and_optimizers_are_copied_from_plain_to_wrapped_and_back() -> None:
    dataset = dataset_of(episodes())
    plain = built(small(TD3PlusBCConfig), dataset)
    plain.update(mini_batch(dataset, range(16)))
    for source, other in (
        (plain, built(C4Config(base=small(TD3PlusBCConfig)), dataset, seed=7)),
        (wrap(built(small(TD3PlusBCConfig), dataset, seed=8)), plain),
    ):
        other.copy_policy_from(source)
        other.copy_q_function_from(source)
        for part in ("policy", "q_function"):
            pairs = zip(getattr(other.impl, part).parameters(), getattr(source.impl, part).parameters())
            assert all(torch.equal(*pair) for pair in pairs)
    source = built(C4Config(base=small(TD3PlusBCConfig)), dataset)
    source.update(mini_batch(dataset, range(16)))
    target = built(small(TD3PlusBCConfig), dataset, seed=5)
    target.copy_policy_optim_from(source)
    target.copy_q_function_optim_from(source)
    for part in ("policy_optim", "q_function_optim"):
        states = [getattr(algo.impl, part).state_dict()["state"] for algo in (source, target)]
        assert states[0].keys() == states[1].keys()
        assert states[0]
        for key, state in states[0].items():
            assert torch.equal(state["exp_avg"], states[1][key]["exp_avg"])


@pytest.mark.parametrize("config", [TD3PlusBCConfig, DQNConfig])
def test_fitted_q_evaluation_of_a_wrapped_policy_is_that_of_the_plain_one(config: type) -> None:
    dataset = data_for(config)
    values = []
    for algo in (built(small(config), dataset), built(C4Config(base=small(config)), dataset)):
        d3rlpy.seed(3)
        evaluation = (DiscreteFQE if config in DISCRETE else FQE)(algo=algo, config=FQEConfig(batch_size=8))
        evaluation.fit(dataset, n_steps=3, n_steps_per_epoch=3, **QUIET)
        batch = mini_batch(dataset, range(10))
        values.append(evaluation.predict_value(batch.observations, batch.actions))
    np.testing.assert_array_equal(*values)


def test_evaluators_and_callbacks_are_called_with_the_wrapped_algorithm() -> None:
    dataset = dataset_of(episodes())
    algo = built(C4Config(base=small(TD3PlusBCConfig), n_clusters=2, seed=0), dataset)
    called: list[Any] = []
    results = algo.fit(
        dataset,
        n_steps=4,
        n_steps_per_epoch=2,
        evaluators={"td": TDErrorEvaluator(), "value": AverageValueEstimationEvaluator()},
        callback=lambda algo, epoch, step: called.append((algo, epoch, step)),
        epoch_callback=lambda algo, epoch, step: called.append((algo, epoch, step)),
        logging_strategy=LoggingStrategy.EPOCH,
        **QUIET,
    )
    assert [call[1:] for call in called] == [(1, 1), (1, 2), (1, 2), (2, 3), (2, 4), (2, 4)]
    assert all(call[0] is algo for call in called)
    assert results[-1][1]["td"] == TDErrorEvaluator()(algo, dataset)
    assert np.isfinite(results[-1][1]["value"])

    pendulum = gymnasium.make("Pendulum-v1", max_episode_steps=5)
    online = C4Config(base=small(SACConfig), seed=0).create()
    online.fit_online(pendulum, n_steps=30, n_steps_per_epoch=30, eval_env=pendulum, eval_n_trials=1, **QUIET)
    assert np.isfinite(EnvironmentEvaluator(pendulum, n_trials=1)(online, None))


class Recorder:
    """Stands in for the writers of TensorBoard and of Weights & Biases."""

    written: dict[str, float]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.config: dict[str, Any] = {}

    def add_scalar(self, name: str, value: float, epoch: int) -> None:
        self.written[name] = value

    def log(self, values: dict[str, float], step: int) -> None:
        self.written.update(values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *arguments, **options: None


def test_every_logger_writes_the_metrics_of_c4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[dict[str, float]] = []

    def recorder(*arguments: Any, **options: Any) -> Recorder:
        made = Recorder()
        made.written = {}
        written.append(made.written)
        return made

    board, wandb = types.ModuleType("tensorboardX"), types.ModuleType("wandb")
    board.SummaryWriter, wandb.init = recorder, recorder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorboardX", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    dataset = dataset_of(episodes())
    algo = built(C4Config(base=small(TD3PlusBCConfig), n_clusters=2, penalty_every=1, seed=0), dataset)
    adapters = [
        FileAdapterFactory(root_dir=str(tmp_path)),
        TensorboardAdapterFactory(root_dir=str(tmp_path)),
        WanDBAdapterFactory(project="c4"),
    ]
    algo.fit(
        dataset,
        n_steps=2,
        n_steps_per_epoch=1,
        show_progress=False,
        experiment_name="run",
        with_timestamp=False,
        logger_adapter=CombineAdapterFactory(adapters),
    )
    assert len(written) == 2
    for values in written:
        assert {name.removeprefix("metrics/") for name in values} >= C4_METRICS
    assert {f"{name}.csv" for name in C4_METRICS} <= {path.name for path in (tmp_path / "run").iterdir()}


def _train_on_rank(rank: int, port: int, name: str, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    config = {cls.__name__: cls for cls in (*ALL, ACTIVEConfig)}[name]
    d3rlpy.seed(0)
    dataset = data_for(config)
    fields: dict[str, Any] = {"n_clusters": 2, "refresh_interval": 3, "penalty_every": 2, "seed": 0}
    if config is IQLConfig:
        fields.update(embedding="features", penalty_kind="feature")
    algo = C4Config(base=small(config), **fields).create(False, enable_ddp=True)
    algo.fit(dataset, n_steps=8, n_steps_per_epoch=8, **QUIET)
    state = [parameter.detach().clone() for parameter in algo.impl.q_function.parameters()]
    if config is ACTIVEConfig:
        temperature = algo.impl.modules.temperature
        state += [temperature.beta.detach(), torch.tensor(temperature.target)]
    torch.save([state, algo.c4_buffer.sample(50).indices], f"{folder}/{rank}.pt")
    measure(algo, transitions_of(dataset, algo))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("config", [TD3PlusBCConfig, IQLConfig, CQLConfig, DQNConfig, ACTIVEConfig])
def test_two_ranks_end_with_the_same_networks_and_draw_batches_of_their_own(config: type, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(_train_on_rank, args=(port, config.__name__, str(tmp_path)), nprocs=2)
    (first, drawn_first), (second, drawn_second) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for one, other in zip(first, second):
        assert torch.equal(one, other)
    assert not torch.equal(drawn_first, drawn_second)


TORCHRUN = """
import sys

import d3rlpy
import torch
from c4buffer import load_d4rl
from c4buffer.integrations.d3rlpy import C4Config, dataset_of

rank = d3rlpy.distributed.init_process_group("gloo")
d3rlpy.seed(0)
dataset = dataset_of(load_d4rl(sys.argv[1])[:200])
base = d3rlpy.algos.TD3PlusBCConfig(batch_size=32)
algo = C4Config(base=base, n_clusters=2, penalty_every=1, seed=0).create(False, enable_ddp=True)
algo.fit(dataset, n_steps=4, n_steps_per_epoch=4, logger_adapter=d3rlpy.logging.NoopAdapterFactory())
weights = [parameter.detach() for parameter in algo.impl.q_function.parameters()]
torch.save([weights, algo.c4_buffer.sample(50).indices], f"{sys.argv[2]}/{rank}.pt")
d3rlpy.distributed.destroy_process_group()
"""


def test_the_launcher_of_distributed_trainings_starts_wrapped_ones(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TORCHRUN)
    data = Path(__file__).parents[2] / "data" / "hopper-medium-expert-10k.hdf5"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(tmp_path / "train.py"), str(data), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (first, drawn_first), (second, drawn_second) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(map(torch.equal, first, second))
    assert not torch.equal(drawn_first, drawn_second)


def test_a_dataset_that_was_dumped_and_loaded_gives_the_same_transitions(tmp_path: Path) -> None:
    dataset = dataset_of(episodes())
    with (tmp_path / "data.h5").open("w+b") as file:
        dataset.dump(file)
    with (tmp_path / "data.h5").open("rb") as file:
        loaded = ReplayBuffer.load(file, d3rlpy.dataset.InfiniteBuffer())
    for name in ("observations", "actions", "rewards", "terminals", "next_actions"):
        assert torch.equal(getattr(transitions_of(loaded), name), getattr(transitions_of(dataset), name))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda algo: pickle.loads(pickle.dumps(algo))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("config", ALL)
def test_a_copy_or_pickle_trains_on_as_the_algorithm_does_and_holds_no_data(config: type, copied: Any) -> None:
    dataset = data_for(config)
    algo = built(C4Config(base=small(config), n_clusters=2, refresh_interval=2, seed=0), dataset)
    algo.fit(dataset, n_steps=3, n_steps_per_epoch=3, **QUIET)
    twin = copied(algo)
    assert type(twin) is type(algo)
    assert algo.c4_buffer is not None
    assert twin.c4_buffer is None
    assert_same_state(twin, algo)
    for each in (algo, twin):
        d3rlpy.seed(3)
        each.fit(dataset, n_steps=3, n_steps_per_epoch=3, **QUIET)
    assert_same_state(twin, algo)
    assert twin.grad_step == algo.grad_step == 6


def test_a_pickle_is_read_by_another_process(tmp_path: Path) -> None:
    algo = built(C4Config(base=small(DQNConfig), n_clusters=5), data_for(DQNConfig))
    (tmp_path / "algo.pkl").write_bytes(pickle.dumps(algo))
    program = (
        "import pickle, sys; a = pickle.load(open(sys.argv[1], 'rb')); print(type(a).__name__, a.config.n_clusters)"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, str(tmp_path / "algo.pkl")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["C4DQN", "5"]


@pytest.mark.parametrize("config", [TD3PlusBCConfig, DQNConfig])
def test_diagnose_reads_a_buffer_of_images_as_the_networks_see_them(config: type) -> None:
    dataset = dataset_of(image_episodes(discrete=config in DISCRETE))
    algo = built(C4Config(base=pixel_config(config), n_clusters=2, seed=0), dataset)
    assert algo.c4_critics is None
    algo.fit(dataset, n_steps=2, n_steps_per_epoch=2, **QUIET)
    found = diagnose(algo.c4_critics, algo.c4_buffer)
    r = algo.c4_buffer.responsibilities
    expected = diagnose(critics_of(algo), transitions_of(dataset, algo), responsibilities=r)
    for name in ("td_mean", "td_variance", "variance_cosine", "total", "gradient_norm"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-4), name


@pytest.mark.parametrize("config", [C4Config, ACTIVEConfig])
def test_numbers_of_numpy_are_saved_as_numbers(config: Any) -> None:
    fields: dict[str, Any] = {"likelihood_target": np.float32(-1.5), "n_members": np.int64(3), "alpha": np.float32(0.5)}
    if config is C4Config:
        fields = {"base": small(TD3PlusBCConfig), "n_clusters": np.int64(4), "penalty_weight": np.float32(0.25)}
    read = config.deserialize(config(**fields).serialize())
    for name, value in fields.items():
        assert name == "base" or getattr(read, name) == value
