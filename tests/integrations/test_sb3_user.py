"""What a user of SB3 does around a learn: subclasses, copies in callbacks, schedules, learning in pieces."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from c4buffer.integrations.sb3 import C4Callback, ClusteredReplayBuffer, attached, learn_offline, transitions_of
from c4buffer.integrations.sb3.callback import ATTACHED
from stable_baselines3 import DQN, SAC
from stable_baselines3.common.callbacks import BaseCallback, EveryNTimesteps
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv

from c4buffer import CovariancePenalty

from .test_sb3 import Toy, assert_equal, clustered

pytestmark = pytest.mark.filterwarnings("ignore:sampling stays uniform:UserWarning")


class At(BaseCallback):
    """Calls `act` with the model, once, at a step."""

    def __init__(self, step: int, act: Callable[[Any], Any]) -> None:
        super().__init__()
        self.step, self.act = step, act

    def _on_step(self) -> bool:
        if self.n_calls == self.step:
            self.act(self.model)
        return True


class Counting(CovariancePenalty):
    """Counts its calls."""

    calls = 0

    def __call__(self, *arguments: Any) -> torch.Tensor:
        self.calls += 1
        return super().__call__(*arguments)


def counting(weight: float = 0.1) -> Counting:
    return Counting(weight, scale="relative")


differing: list[np.ndarray] = []


class Marked(ClusteredReplayBuffer):
    """Holds a number of its own for each row, and reads it with the rows."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.marks = np.zeros((self.buffer_size, self.n_envs), dtype=np.float32)

    def add(self, obs: Any, next_obs: Any, action: Any, reward: Any, *arguments: Any, **options: Any) -> None:
        self.marks[self.pos] = reward
        super().add(obs, next_obs, action, reward, *arguments, **options)

    def _get_samples(self, batch_inds: Any, env: Any = None) -> Any:
        environments = np.random.randint(self.n_envs, size=len(batch_inds))
        differing.append(self.marks[batch_inds, environments] != self.rewards[batch_inds, environments])
        return super()._get_samples(batch_inds, env)


def test_a_subclass_reads_its_own_numbers_of_each_environment() -> None:
    differing.clear()
    model = clustered(SAC, DummyVecEnv([Toy] * 3), cls=Marked).learn(120, callback=C4Callback())
    assert model.replay_buffer.c4_metrics
    assert len(differing) > 30
    assert not np.concatenate(differing).any()


@pytest.mark.parametrize("penalty", [None, counting()])
def test_a_model_copied_while_it_learns_offline_steps_its_environment(penalty: Any) -> None:
    model, kept = clustered(SAC).learn(60), []

    def keep(model: Any) -> None:
        kept.extend([copy.deepcopy(model), copy.copy(model), type(model)("MlpPolicy", Toy(), device="cpu")])
        kept.append(pickle.loads(pickle.dumps(model)))

    callbacks = [At(5, keep), *([] if penalty is None else [C4Callback(penalty)])]
    learn_offline(model, transitions_of(model), 10, callback=callbacks)
    assert [type(each) for each in kept] == [SAC] * 4
    before = kept[0].replay_buffer.size()
    kept[0].learn(30)
    assert kept[0].replay_buffer.size() == before + 30


def test_a_model_is_pickled_while_it_learns_with_c4() -> None:
    made: list[Any] = []
    model = clustered(SAC)
    model.learn(40, callback=[C4Callback(counting()), At(40, lambda model: made.append(pickle.dumps(model)))])
    loaded = pickle.loads(made[0])
    assert type(loaded) is SAC
    assert loaded.num_timesteps == 40
    loaded.train(1, 16)


def test_a_penalty_may_be_raised_from_zero_and_lowered_to_it() -> None:
    penalty = counting(0)
    steps = [At(40, lambda _: setattr(penalty, "weight", 0.1)), At(60, lambda _: setattr(penalty, "weight", 0.0))]
    clustered(SAC).learn(100, callback=[C4Callback(penalty), *steps])
    assert penalty.calls == 20


def test_weight_zero_changes_nothing() -> None:
    models = [clustered(SAC).learn(60, callback=C4Callback(penalty)) for penalty in (None, counting(0))]
    assert_equal(*models)


def test_one_callback_in_a_learn() -> None:
    model = clustered(SAC)
    with pytest.raises(ValueError, match="callback: expected one C4Callback in a learn .*, got two"):
        model.learn(40, callback=[C4Callback(counting()), C4Callback()])
    assert type(model) is SAC
    assert model not in ATTACHED
    with pytest.raises(ValueError, match="callback: expected C4Callback itself, .*, got one inside EveryNTimesteps"):
        model.learn(40, callback=EveryNTimesteps(5, C4Callback()))
    assert type(model) is SAC


def test_what_a_with_attaches_is_there_again_after_a_learn_in_it() -> None:
    model, outer, inner = clustered(SAC).learn(30, callback=C4Callback()), counting(), counting()
    with attached(model, outer, penalty_every=2):
        model.learn(10, callback=C4Callback(inner), reset_num_timesteps=False)
        assert (outer.calls, inner.calls) == (0, 10)
        model.train(4, 16)
        assert (outer.calls, inner.calls) == (2, 10)
        with attached(model):
            model.train(4, 16)
        with pytest.raises(TypeError):
            model.train(None, 16)
        assert outer.calls == 2
        model.train(4, 16)
        assert (outer.calls, inner.calls) == (4, 10)
    assert type(model) is SAC
    assert "zero_grad" not in vars(model.critic.optimizer)


def test_clusters_are_made_when_they_are_due_however_a_training_is_cut_into_learns() -> None:
    made = []
    for pieces in (1, 12):
        model, refreshes = clustered(SAC, buffer={"refresh_interval": 50, "c4_seed": 0}), []
        buffer = model.replay_buffer
        refresh = buffer._refresh
        buffer._refresh = lambda env, made=refreshes, refresh=refresh: (made.append(1), refresh(env))
        for _ in range(pieces):
            model.learn(240 // pieces, callback=C4Callback(), reset_num_timesteps=False)
        assert buffer._critics is None
        made.append(len(refreshes))
    assert made == [5, 5]


def test_rows_that_come_between_two_learns_belong_to_each_cluster_in_its_share() -> None:
    model = clustered(SAC, buffer={"refresh_interval": 10**6})
    buffer = model.replay_buffer
    model.learn(60, callback=C4Callback())
    model.learn(20, reset_num_timesteps=False)
    after = buffer.probabilities
    with attached(model):
        r, p = buffer._sampler.responsibilities, buffer.probabilities
    assert torch.equal(p, after)
    assert len(r) == 80
    torch.testing.assert_close(r[60:].double(), p.expand(20, -1), rtol=0, atol=1e-6)
    buffer.reset()
    with attached(model):
        assert buffer._sampler.size == 0


def test_another_critic_is_clustered_by_anew() -> None:
    model = clustered(SAC, buffer={"refresh_interval": 10**6}).learn(60, callback=C4Callback())
    other = clustered(SAC, seed=1)
    other.replay_buffer = model.replay_buffer
    with attached(model):
        assert model.replay_buffer._sampler.clustered
    with attached(other):
        assert not model.replay_buffer._sampler.clustered


def test_a_penalty_in_which_nothing_learns_adds_nothing() -> None:
    options: dict[str, Any] = {"n_clusters": 1, "policy_kwargs": {"net_arch": []}}
    penalty = CovariancePenalty(0.1, kind="feature")  # of the observations themselves, as there is no hidden layer
    models = [clustered(DQN, **options).learn(40, callback=C4Callback(each)) for each in (penalty, None)]
    assert_equal(*models)


class Frozen(BaseFeaturesExtractor):
    """A feature extractor that lets no gradient through."""

    def __init__(self, space: Any) -> None:
        super().__init__(space, 8)
        self.layer = torch.nn.Linear(3, 8)

    @torch.no_grad()
    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layer(observations)
        return found


def test_a_critic_without_gradients_by_its_observations_is_refused() -> None:
    model = clustered(DQN, policy_kwargs={"features_extractor_class": Frozen})
    with pytest.raises(ValueError, match="values that depend on observations or actions, got values that depend on n"):
        model.learn(40, callback=C4Callback())


class Clearing(SAC):
    """A training of one's own, which clears gradients by the network."""

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        for _ in range(gradient_steps):
            batch: Any = self.replay_buffer.sample(batch_size)  # type: ignore[union-attr]
            self.critic.zero_grad()
            sum(q.square().mean() for q in self.critic(batch.observations, batch.actions)).backward()
            self.critic.optimizer.step()


def test_a_training_that_takes_no_penalty_is_told() -> None:
    with pytest.warns(UserWarning, match="no penalty is added: train draws batches, but") as told:
        clustered(Clearing).learn(40, callback=C4Callback(counting()))
    assert len(told) == 1


def test_settings_that_a_callback_changes_offline_stay() -> None:
    model = clustered(SAC).learn(40)
    callbacks = [C4Callback(), At(2, lambda model: setattr(model, "learning_starts", 7))]
    learn_offline(model, transitions_of(model), 5, callback=callbacks)
    assert model.learning_starts == 7
    model.gradient_steps = 0
    rows = model.replay_buffer.rewards.copy()
    with pytest.raises(ValueError, match="model: expected gradient_steps of at least 1, or -1 for one, got 0"):
        learn_offline(model, transitions_of(model)[:5], 5)
    assert np.array_equal(rows, model.replay_buffer.rewards)


def test_a_learn_in_which_the_optimizer_was_replaced_leaves_nothing_behind() -> None:
    def replace(model: Any) -> None:
        model.critic.optimizer = torch.optim.AdamW(model.critic.parameters(), lr=1e-4)

    model = clustered(SAC)
    model.learn(50, callback=[C4Callback(counting()), At(40, replace)])
    assert type(model) is SAC
    assert model not in ATTACHED
    assert "zero_grad" not in vars(model.critic.optimizer)


class Peeking(SAC):
    """Looks at one more batch after it has trained."""

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        super().train(gradient_steps, batch_size)
        self.replay_buffer.sample(batch_size)  # type: ignore[union-attr]


def test_a_training_that_draws_more_batches_than_it_needs_is_not_told() -> None:
    penalty = counting()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clustered(Peeking).learn(40, callback=C4Callback(penalty))
    assert penalty.calls == 20
