"""What a user of d3rlpy does around a fit: subclasses, settings changed between fits, many fits in one process."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import d3rlpy
import gymnasium
import numpy as np
import pytest
import torch
from c4buffer.integrations.d3rlpy import ACTIVEConfig, C4Config, wrap
from d3rlpy.algos import TD3, BCQConfig, CalQLConfig, DQNConfig, TD3Config, TD3PlusBCConfig
from d3rlpy.constants import LoggingStrategy
from d3rlpy.dataset import create_fifo_replay_buffer

from c4buffer import ClusteredReplayBuffer, Transitions

from .test_d3rlpy import QUIET, built, data_for, dataset_of, drawn, episodes, small

__all__ = ["drawn"]  # a fixture

ONE = {"n_steps": 1, "n_steps_per_epoch": 1, **QUIET}


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> weakref.WeakSet[Any]:
    """All ClusteredReplayBuffers that are; the cyclic garbage collector does nothing meanwhile."""
    buffers: weakref.WeakSet[Any] = weakref.WeakSet()
    make = ClusteredReplayBuffer.__init__

    def noted(self: Any, *arguments: Any, **options: Any) -> None:
        make(self, *arguments, **options)
        buffers.add(self)

    monkeypatch.setattr(ClusteredReplayBuffer, "__init__", noted)
    torch.optim.Adam([torch.zeros(1)])  # torch's first optimizer keeps those who made it
    gc.collect()
    gc.disable()
    yield buffers
    gc.enable()


@pytest.mark.parametrize(("kind", "kept"), [("c4", 1), ("active", 0), ("both", 1)])
def test_a_fit_leaves_no_copy_of_the_data_behind(kind: str, kept: int, alive: weakref.WeakSet[Any]) -> None:
    dataset = dataset_of(episodes())
    base = small(ACTIVEConfig, likelihood_target=-1.0) if kind != "c4" else small(TD3Config)
    algo = (base if kind == "active" else C4Config(base=base, n_clusters=2, seed=0)).create()
    for _ in range(4):
        algo.fit(dataset, **ONE)
    assert len(alive) == kept
    del algo
    assert len(alive) == 0


class MyTD3(TD3):
    """One whose `fitter` has a signature of its own."""

    def fitter(self, dataset: Any, n_steps: int, mine: int = 0, **options: Any) -> Iterator[Any]:
        self.seen = mine
        yield from super().fitter(dataset, n_steps, **options)


def test_a_fitter_of_your_own_is_called_as_you_call_it() -> None:
    dataset = dataset_of(episodes())
    algo = wrap(MyTD3(small(TD3Config), False, False), n_clusters=2, seed=0)
    found = algo.fit(dataset, evaluators={"rows": lambda _, data: data.transition_count}, **ONE)
    assert found[0][1]["rows"] == dataset.transition_count
    list(algo.fitter(dataset, 1, 7, n_steps_per_epoch=1, **QUIET))
    assert algo.seen == 7


@pytest.mark.parametrize("by_place", [False, True])
def test_evaluators_are_given_the_dataset_however_they_come(by_place: bool) -> None:
    dataset, given = dataset_of(episodes()), []

    def evaluator(algo: Any, data: Any) -> float:
        given.append(data)
        return 0.0

    algo = C4Config(base=small(TD3Config), n_clusters=2, seed=0).create()
    names = ("n_steps", "n_steps_per_epoch", "logging_steps", "logging_strategy", "experiment_name", "with_timestamp")
    values = (1, 1, 500, LoggingStrategy.EPOCH, None, True)
    if by_place:
        places = (*values, QUIET["logger_adapter"], False, 1, {"mine": evaluator})
        list(algo.fitter(dataset, *places))
    else:
        list(algo.fitter(dataset, **dict(zip(names, values)), evaluators={"mine": evaluator}, **QUIET))
    assert given == [dataset]


def test_a_setting_of_the_algorithm_is_not_set_on_c4s_config() -> None:
    config = C4Config(base=TD3PlusBCConfig())
    with pytest.raises(ValueError, match=r"^config.alpha: expected a field of C4Config; .* on config.base"):
        config.alpha = 1.0
    with pytest.raises(AttributeError, match=r"no attribute 'alpha'; the algorithm's own fields are config.base's"):
        _ = config.alpha
    config.base.alpha = 1.0
    config.batch_size = 7
    assert config.base.batch_size == 7


@pytest.mark.parametrize(
    ("name", "value"),
    [("penalty_every", 0), ("next_action", "polciy"), ("trace_weight", -1), ("penalty_scale", "none")],
)
def test_settings_changed_between_fits_are_checked_before_the_next(name: str, value: Any) -> None:
    dataset = dataset_of(episodes())
    algo = C4Config(base=small(TD3Config), n_clusters=2, seed=0).create()
    algo.fit(dataset, **ONE)
    buffer, steps = algo.c4_buffer, algo.grad_step
    setattr(algo.config, name, value)
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        algo.fit(dataset, **ONE)
    assert (algo.c4_buffer, algo.grad_step) == (buffer, steps)


def test_actives_settings_are_taken_by_the_next_fit_and_an_estimate_stays() -> None:
    dataset = dataset_of(episodes())
    algo = built(small(ACTIVEConfig, max_beta=2.0), dataset)
    estimate = algo.estimate_likelihood_target(dataset, updates=2)
    algo.fit(dataset, **ONE)
    temperature = algo.impl.modules.temperature
    assert temperature.target == estimate
    temperature.beta.data.fill_(1.5)
    algo.config.max_beta = 1.0
    algo.config.beta_learning_rate = 0.0
    algo.config.quantile = 0.25
    algo.fit(dataset, **ONE)
    assert temperature.target == estimate
    assert float(temperature.beta.detach()) == 1.0
    assert algo.impl._advantage.quantile == 0.25
    algo.config.likelihood_target = -7.0
    algo.fit(dataset, **ONE)
    assert temperature.target == -7.0
    algo.estimate_likelihood_target(dataset, updates=2)
    found = temperature.target
    algo.fit(dataset, **ONE)
    assert temperature.target == found
    algo.config.q_weight = -1
    with pytest.raises(ValueError, match=r"^q_weight: expected"):
        algo.fit(dataset, **ONE)


@pytest.mark.parametrize("name", ["inner_update", "compute_critic_loss", "update"])
def test_an_algorithm_whose_methods_were_replaced_is_refused(name: str) -> None:
    algo = built(small(TD3Config), dataset_of(episodes()))
    holder = algo if name == "update" else algo.impl
    setattr(holder, name, lambda *arguments: {})
    with pytest.raises(ValueError, match=r"^algo: expected"):
        wrap(algo)
    assert type(algo) is TD3


def test_an_update_takes_a_batch_of_the_buffer() -> None:
    dataset = dataset_of(episodes())
    algo = C4Config(base=small(TD3Config), n_clusters=2, seed=0).create()
    algo.fit(dataset, **ONE)
    metrics = algo.update(algo.c4_buffer.sample(16))
    assert np.isfinite(metrics["critic_loss"])
    assert algo.grad_step == 2
    calql = C4Config(base=small(CalQLConfig), n_clusters=2, seed=0).create()
    calql.fit(dataset, **ONE)
    with pytest.raises(ValueError, match=r"^batch: expected a batch of d3rlpy's, with its returns to go"):
        calql.update(calql.c4_buffer.sample(16))


def test_a_call_that_the_host_refuses_leaves_the_last_fits_buffer() -> None:
    algo = C4Config(base=small(TD3Config), n_clusters=2, seed=0).create()
    algo.fit(dataset_of(episodes()), **ONE)
    buffer = algo.c4_buffer
    with pytest.raises(AssertionError):
        algo.fit(dataset_of(episodes(discrete=True)), **ONE)
    assert algo.c4_buffer is buffer


@dataclasses.dataclass
class MyBCQConfig(BCQConfig):
    """One of the user's own."""

    @staticmethod
    def get_type() -> str:
        return "my_bcq"


def test_a_warm_up_is_known_in_a_config_of_your_own() -> None:
    d3rlpy.base.register_learnable(MyBCQConfig)
    base = small(MyBCQConfig)
    base.rl_start_step = 3
    algo = C4Config(base=base, n_clusters=2, seed=0).create()
    algo.fit(dataset_of(episodes()), n_steps=3, n_steps_per_epoch=3, **QUIET)
    assert not algo.c4_buffer.clustered
    algo.fit(dataset_of(episodes()), n_steps=2, n_steps_per_epoch=2, **QUIET)
    assert algo.c4_buffer.clustered


def test_images_take_no_reference_to_the_algorithm(alive: weakref.WeakSet[Any]) -> None:
    rng = np.random.default_rng(0)
    parts = [
        d3rlpy.dataset.Episode(
            rng.integers(0, 256, (12, 1, 36, 36), dtype=np.uint8),
            rng.integers(0, 3, (12, 1)).astype(np.int32),
            rng.normal(size=(12, 1)).astype(np.float32),
            terminated=True,
        )
        for _ in range(2)
    ]
    scaler = d3rlpy.preprocessing.PixelObservationScaler()
    algo = C4Config(base=DQNConfig(batch_size=8, observation_scaler=scaler), n_clusters=2, seed=0).create()
    algo.fit(dataset_of(parts), **ONE)
    critics = algo.c4_critics
    del algo
    assert len(alive) == 0
    assert torch.is_tensor(critics.encode(torch.zeros(2, 1, 36, 36, dtype=torch.uint8)))


def test_what_is_saved_after_a_change_between_fits_loads(tmp_path: Path) -> None:
    dataset = dataset_of(episodes())
    algo = C4Config(base=small(ACTIVEConfig, likelihood_target=-1.0), n_clusters=2, seed=0).create()
    algo.fit(dataset, **ONE)
    algo.config.base.likelihood_target = -3.0
    algo.config.base.max_beta = 1.5
    algo.fit(dataset, **ONE)
    algo.save(str(tmp_path / "algo.d3"))
    again = d3rlpy.load_learnable(str(tmp_path / "algo.d3"))
    assert again.impl.modules.temperature.target == -3.0
    assert again.impl.modules.temperature.maximum == 1.5


def test_an_environment_that_the_host_refuses_leaves_the_last_fits_buffer() -> None:
    algo = C4Config(base=small(TD3Config), n_clusters=2, seed=0).create()
    algo.fit(dataset_of(episodes()), **ONE)
    buffer, env = algo.c4_buffer, gymnasium.make("CartPole-v1")
    with pytest.raises(AssertionError):
        algo.fit_online(env, create_fifo_replay_buffer(100, env=env), **QUIET)
    assert algo.c4_buffer is buffer


def test_a_q_functions_loss_that_was_replaced_is_refused() -> None:
    algo = built(small(DQNConfig), data_for(DQNConfig))
    algo.impl.compute_loss = lambda *arguments: None
    with pytest.raises(
        ValueError, match=r"^algo: expected methods of its classes, .*, got compute_loss set on the obj"
    ):
        wrap(algo)


class Keeping(TD3):
    """One that keeps what its `fitter` was given."""

    kept: list[Any]

    def fitter(self, dataset: Any, *arguments: Any, **options: Any) -> Iterator[Any]:
        self.kept = [*getattr(self, "kept", []), dataset]
        yield from super().fitter(dataset, *arguments, **options)


def test_a_view_that_is_kept_keeps_no_data(alive: weakref.WeakSet[Any]) -> None:
    dataset = dataset_of(episodes())
    algo = wrap(Keeping(small(TD3Config), False, False), n_clusters=2, seed=0)
    for _ in range(3):
        algo.fit(dataset, **ONE)
    assert len(algo.kept) == 3
    assert len(alive) == 1


def test_a_fit_from_the_disk_is_resumed(tmp_path: Path, drawn: list[Transitions]) -> None:
    dataset = dataset_of(episodes())
    found = []
    for piece in ("whole", "resumed"):
        algo = built(C4Config(base=small(TD3Config), n_clusters=2, seed=0), dataset)
        (tmp_path / piece).mkdir()
        algo.c4_buffer_options = {"storage": "memmap", "folder": tmp_path / piece}
        if piece == "resumed":
            algo.load_model(str(tmp_path / "model"))
            algo.set_grad_step(3)
            algo.c4_resume(tmp_path / "buffer")
        else:
            algo.fit(dataset, n_steps=3, n_steps_per_epoch=3, **QUIET)
            algo.c4_buffer.save(tmp_path / "buffer")
            algo.save_model(str(tmp_path / "model"))
            found.append([algo.c4_buffer.sample(16).indices.tolist() for _ in range(2)])
            continue
        drawn.clear()
        algo.fit(dataset, n_steps=2, n_steps_per_epoch=2, **QUIET)
        found.append([batch.indices.tolist() for batch in drawn])
    assert found[0] == found[1]
