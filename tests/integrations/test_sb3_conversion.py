"""Replay buffers of SB3's as Transitions, as d3rlpy's datasets, and in files without pickle."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from c4buffer.integrations import d3rlpy as ours_d3rlpy
from c4buffer.integrations.sb3 import (
    C4Callback,
    attached,
    critics_of,
    fill_replay_buffer,
    learn_offline,
    load_replay_buffer,
    save_replay_buffer,
    transitions_of,
)
from gymnasium import spaces
from stable_baselines3 import DQN, SAC, TD3
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from c4buffer import Transitions, diagnose, stacked_gradients
from c4buffer.observations import observation_leaves

from .test_sb3 import Goal, Toy, assert_equal, clustered, model_of
from .test_sb3_edges import put
from .test_sb3_offline import data, offline_model


def assert_same(one: Transitions, other: Transitions, *, but: tuple[str, ...] = (), tolerance: float = 0.0) -> None:
    for (name, first), (_, second) in zip(one.columns(), other.columns()):
        if name not in but:
            torch.testing.assert_close(first, second, atol=tolerance, rtol=0, msg=name)


@pytest.mark.parametrize("discrete", [False, True])
def test_what_is_filled_in_comes_out(discrete: bool) -> None:
    transitions = data(discrete=discrete)
    model = offline_model(DQN if discrete else SAC)
    fill_replay_buffer(model, transitions)
    assert_same(transitions_of(model), transitions, tolerance=1e-6)


@pytest.mark.parametrize("discrete", [False, True])
def test_diagnose_reads_a_model(discrete: bool) -> None:
    model = offline_model(DQN if discrete else SAC)
    fill_replay_buffer(model, data(discrete=discrete))
    transitions = transitions_of(model, seen=True)
    found = diagnose(critics_of(model), transitions)
    target_g, g = stacked_gradients(critics_of(model), transitions).double().chunk(2, dim=1)
    c = (target_g - target_g.mean(dim=0)).T @ (g - g.mean(dim=0)) / len(g)
    assert found.total == pytest.approx(float(c.norm()), rel=1e-6)
    assert found.variance_cosine**2 <= 1


def test_rows_of_environments_come_one_environment_after_the_other() -> None:
    seen: list[list[Any]] = [[], []]

    class Recorded(Toy):
        def __init__(self, rows: list[Any]) -> None:
            super().__init__()
            self.rows = rows
            self.noise = np.random.default_rng(len(seen[0]))

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            self.last, info = super().reset(seed=seed)
            return self.last, info

        def step(self, action: Any) -> Any:
            observation, reward, terminated, truncated, info = super().step(action)
            self.rows.append((self.last, action, reward, observation, terminated, truncated and not terminated))
            self.last = observation
            return observation, reward, terminated, truncated, info

    env = DummyVecEnv([lambda rows=rows: Recorded(rows) for rows in seen])
    model = model_of(SAC, env, learning_starts=1000).learn(120)
    found = transitions_of(model)
    expected = [np.stack([np.asarray(row[i], np.float32) for rows in seen for row in rows]) for i in range(6)]
    np.testing.assert_array_equal(found.observations, expected[0])
    np.testing.assert_allclose(found.actions, expected[1], atol=1e-6)
    np.testing.assert_array_equal(found.rewards, expected[2])
    np.testing.assert_array_equal(found.next_observations, expected[3])
    np.testing.assert_array_equal(found.terminals, expected[4])
    timeouts = expected[5].copy()
    for last in (59, 119):  # where an environment's rows stop
        timeouts[last] = 1 - expected[4][last]
    np.testing.assert_array_equal(found.timeouts, timeouts)


@pytest.mark.parametrize("memory_optimised", [False, True])
def test_a_ring_that_went_round_is_read_oldest_first(memory_optimised: bool) -> None:
    options: dict[str, Any] = {"buffer_size": 50, "learning_starts": 1000}
    if memory_optimised:
        options |= {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}
    model = model_of(SAC, **options).learn(130)
    whole = model_of(SAC, **{**options, "buffer_size": 500}).learn(130)
    found, expected = transitions_of(model), transitions_of(whole)
    rows = 49 if memory_optimised else 50
    assert len(found) == rows
    assert_same(found, expected[len(expected) - rows :])


def test_hindsight_and_normalised_buffers_give_what_they_were_given() -> None:
    env = VecNormalize(DummyVecEnv([Toy]))
    model = model_of(SAC, env, learning_starts=1000).learn(40)
    plain = model_of(SAC, learning_starts=1000).learn(40)
    assert_same(transitions_of(model), transitions_of(plain), tolerance=1e-5)  # SB3 itself rounds at episodes' ends
    goals = model_of(
        SAC, BitFlippingEnv(continuous=True), policy="MultiInputPolicy", replay_buffer_class=HerReplayBuffer
    )
    found = transitions_of(goals.learn(30))
    assert set(found.observations) == {"observation", "achieved_goal", "desired_goal"}  # type: ignore[arg-type]
    assert len(found) == 30


def test_d3rlpy_and_sb3_hand_over_to_each_other() -> None:
    transitions = data()
    dataset = ours_d3rlpy.dataset_of(transitions)
    assert len(dataset.episodes) == 15
    there = ours_d3rlpy.transitions_of(dataset)
    model = offline_model(SAC)
    fill_replay_buffer(model, there)
    back = ours_d3rlpy.transitions_of(ours_d3rlpy.dataset_of(transitions_of(model)))
    terminal = transitions.terminals > 0
    for found in (there, back):
        assert_same(found[~terminal], transitions[~terminal], but=("next_actions", "has_next_actions"), tolerance=1e-6)
        assert_same(
            found[terminal],
            transitions[terminal],
            but=("next_actions", "has_next_actions", "next_observations"),
            tolerance=1e-6,
        )


@pytest.mark.parametrize("discrete", [False, True])
def test_rows_in_any_order_make_a_dataset(discrete: bool) -> None:
    """Where a row does not follow the one before it, an episode ends, and nothing is lost."""
    transitions = data(discrete=discrete)
    mixed = transitions[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    found = ours_d3rlpy.transitions_of(ours_d3rlpy.dataset_of(mixed, action_size=6 if discrete else None))
    live = mixed.terminals == 0
    assert_same(found[live], mixed[live], but=("timeouts", "has_next_actions"))
    assert torch.equal(found.terminals, mixed.terminals)
    assert torch.equal(found.observations, mixed.observations)  # type: ignore[arg-type]


def test_datasets_keep_images_tuples_and_the_number_of_actions() -> None:
    transitions = data(20, discrete=True)
    images = torch.randint(255, (20, 1, 8, 8), dtype=torch.uint8)
    pair = transitions.replace(
        observations=(images, transitions.observations), next_observations=(images + 1, transitions.next_observations)
    )
    dataset = ours_d3rlpy.dataset_of(pair, action_size=9)
    assert dataset.dataset_info.action_size == 9
    assert [np.dtype(each) for each in dataset.dataset_info.observation_signature.dtype] == [np.uint8, np.float32]
    assert torch.equal(ours_d3rlpy.transitions_of(dataset).observations[0], images.float())
    for wrong, options, message in (
        (transitions, {"action_size": 2}, "action_size: expected at least 4"),
        (data(20), {"action_size": 3}, "action_size: expected 2"),
        (transitions.replace(intervals=torch.full((20,), 2)), {}, "transitions: expected single steps"),
        (
            transitions.replace(
                observations={"a": transitions.observations}, next_observations={"a": transitions.next_observations}
            ),
            {},
            "transitions: expected observations as a tensor or a tuple",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            ours_d3rlpy.dataset_of(wrong, **options)


KINDS: dict[str, Any] = {
    "plain": lambda: model_of(SAC),
    "clustered": lambda: clustered(SAC),
    "dict": lambda: model_of(SAC, Toy("dict"), policy="MultiInputPolicy"),
    "image": lambda: model_of(DQN, Toy("image", discrete=True), policy="CnnPolicy", buffer_size=60),
    "four environments": lambda: model_of(SAC, DummyVecEnv([Toy] * 4)),
    "memory-optimised": lambda: model_of(
        SAC, optimize_memory_usage=True, replay_buffer_kwargs={"handle_timeout_termination": False}
    ),
    "hindsight": lambda: model_of(
        SAC, BitFlippingEnv(continuous=True), policy="MultiInputPolicy", replay_buffer_class=HerReplayBuffer
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("round_the_ring", [False, True])
def test_a_file_brings_everything_back(kind: str, round_the_ring: bool, tmp_path: Path) -> None:
    model = KINDS[kind]()
    model.learning_starts = 100_000
    model.learn(model.buffer_size * 2 + 40 if round_the_ring else 40)
    save_replay_buffer(model, tmp_path / "buffer")
    other = KINDS[kind]()
    load_replay_buffer(other, tmp_path / "buffer", truncate_last_traj=False)
    one, two = (vars(each.replay_buffer) for each in (model, other))
    assert (one["pos"], one["full"]) == (two["pos"], two["full"])
    drawn = []
    for buffer in (model.replay_buffer, other.replay_buffer):
        np.random.seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a clustered buffer stays uniform
            drawn.append(buffer.sample(64))
    for a, b in zip(*drawn):
        assert a is b is None or all(map(torch.equal, observation_leaves(a), observation_leaves(b)))


def test_training_goes_on_from_a_file_as_from_the_buffer(tmp_path: Path) -> None:
    def go_on(model: Any) -> Any:
        np.random.seed(1)
        torch.manual_seed(1)
        model.train(10, 16)
        return model

    model = model_of(SAC).learn(60)
    model.save(tmp_path / "model")
    save_replay_buffer(model, tmp_path / "buffer")
    loaded = SAC.load(tmp_path / "model", env=Toy(), device="cpu")
    load_replay_buffer(loaded, tmp_path / "buffer")
    loaded.set_logger(model.logger)
    assert_equal(go_on(model), go_on(loaded))


def test_hindsight_may_end_the_open_episode(tmp_path: Path) -> None:
    model, other = (
        model_of(SAC, Goal(), policy="MultiInputPolicy", replay_buffer_class=HerReplayBuffer) for _ in range(2)
    )
    model.learn(32)  # two episodes of 12 steps, and 8 of another
    save_replay_buffer(model, tmp_path / "buffer")
    with pytest.warns(UserWarning, match="last trajectory in the replay buffer will be truncated"):
        load_replay_buffer(other, tmp_path / "buffer")
    assert (model.replay_buffer._current_ep_start[0], other.replay_buffer.pos) == (24, 32)
    assert other.replay_buffer._current_ep_start[0] == other.replay_buffer.pos
    records = model_of(
        SAC,
        BitFlippingEnv(continuous=True),
        policy="MultiInputPolicy",
        replay_buffer_class=HerReplayBuffer,
        replay_buffer_kwargs={"copy_info_dict": True},
    )
    with pytest.raises(ValueError, match="model: expected copy_info_dict=False"):
        save_replay_buffer(records, tmp_path / "other")


def test_bound_buffers_cluster_anew_after_other_rows_came(tmp_path: Path) -> None:
    model = clustered(SAC, Toy(), policy_kwargs={"net_arch": [8]})
    model.learn(60, callback=C4Callback())
    save_replay_buffer(model, tmp_path / "buffer")
    with attached(model):
        model.train(1, 8)
        assert model.replay_buffer.cluster >= 0
        load_replay_buffer(model, tmp_path / "buffer")
        with pytest.raises(ValueError, match="probabilities: expected a buffer that has been clustered"):
            _ = model.replay_buffer.probabilities
        model.train(1, 8)
        assert model.replay_buffer.probabilities.shape == (3,)


def test_files_that_do_not_belong_are_refused_and_nothing_changes(tmp_path: Path) -> None:
    class Boom:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "pickle").write_bytes(pickle.dumps(Boom()))
    small = model_of(SAC, buffer_size=100).learn(30)
    save_replay_buffer(small, tmp_path / "small")
    whole = (tmp_path / "small").read_bytes()
    (tmp_path / "cut").write_bytes(whole[:-10])
    (tmp_path / "changed").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    model = model_of(SAC).learn(30)
    before = transitions_of(model)
    for name, message in (
        ("pickle", "path: expected a file that was saved whole"),
        ("cut", "path: expected a file that was saved whole"),
        ("changed", "path: expected an undamaged file"),
        ("small", "path: expected the file of a replay buffer with .*500.*, got .*100"),
    ):
        with pytest.raises(ValueError, match=message):
            load_replay_buffer(model, tmp_path / name)
    assert not (tmp_path / "ran").exists()
    assert_same(transitions_of(model), before)
    with pytest.raises(OSError, match="missing"):
        load_replay_buffer(model, tmp_path / "missing")


@pytest.mark.parametrize("handle_timeouts", [True, False])
def test_rows_that_do_not_follow_each_other_end_episodes(handle_timeouts: bool) -> None:
    """So n-step returns do not run over them, nor next actions."""
    transitions = data()[::5]
    options = {"handle_timeout_termination": handle_timeouts}
    model = offline_model(SAC, n_steps=3, gamma=0.9, replay_buffer_kwargs=options)
    fill_replay_buffer(model, transitions)
    found = model.replay_buffer._get_samples(np.arange(60))
    torch.testing.assert_close(found.rewards[:, 0], transitions.rewards)
    assert not found.dones.any()
    assert_same(
        transitions_of(model), transitions, but=("timeouts", "next_actions", "has_next_actions"), tolerance=1e-6
    )
    assert transitions_of(model).has_next_actions.sum() == 0
    whole = offline_model(SAC, n_steps=3, gamma=0.9)
    fill_replay_buffer(whole, data())
    r = data().rewards
    assert float(whole.replay_buffer._get_samples(np.array([3])).rewards) == pytest.approx(
        float(r[3] + 0.9 * r[4] + 0.81 * r[5])
    )


def test_episodes_cut_by_another_learn_are_not_linked() -> None:
    model = model_of(SAC, learning_starts=1000).learn(40)
    found = transitions_of(model.learn(40))
    assert found.timeouts[39] + found.terminals[39] == 1
    assert found.has_next_actions[39] == 0
    assert found.has_next_actions[38] == 1 - found.terminals[38] - found.timeouts[38]


def test_observations_that_the_space_can_not_hold_are_refused() -> None:
    model = model_of(DQN, Toy("image", discrete=True), policy="CnnPolicy", buffer_size=60)
    images = torch.rand(20, 1, 36, 36)
    transitions = data(20, discrete=True).replace(observations=images, next_observations=images)
    with pytest.raises(ValueError, match="transitions: expected observations that uint8 can hold, got float32 with"):
        fill_replay_buffer(model, transitions)
    whole = (images * 255).round()
    fill_replay_buffer(model, transitions.replace(observations=whole, next_observations=whole))
    assert torch.equal(transitions_of(model).observations, whole.to(torch.uint8))  # type: ignore[arg-type]
    keyed = model_of(SAC, Toy("dict"), policy="MultiInputPolicy")
    with pytest.raises(ValueError, match="transitions: expected observations as the model's spaces have it"):
        fill_replay_buffer(keyed, data().replace(actions=data().actions.clamp(-1, 1)))


def test_a_file_of_another_action_box_and_many_environments(tmp_path: Path) -> None:
    class Wide(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.action_space = spaces.Box(-2, 5, (2,), dtype=np.float32)

    env = VecNormalize(DummyVecEnv([Wide]))
    model = model_of(TD3, env)
    model.learning_starts = 100_000
    model.learn(60)
    found = transitions_of(model, seen=True)
    samples = model.replay_buffer._get_samples(np.arange(60), env=env)
    assert torch.equal(found.observations, samples.observations)
    assert torch.equal(found.next_observations, samples.next_observations)
    assert torch.equal(found.actions, samples.actions)
    torch.testing.assert_close(found.rewards, samples.rewards.squeeze(1))
    assert torch.equal(found.terminals, samples.dones.squeeze(1))
    assert not torch.allclose(found.actions, transitions_of(model).actions)


IN_THE_BOX = data().replace(actions=data().actions.clamp(-1, 1), next_actions=data().next_actions.clamp(-1, 1))


def test_what_a_buffer_can_not_take_is_named() -> None:
    rows = data()
    pair = rows.replace(
        observations=(rows.observations, rows.observations), next_observations=(rows.observations, rows.observations)
    )
    goals = model_of(SAC, Goal(), policy="MultiInputPolicy", replay_buffer_class=HerReplayBuffer)
    beyond = data(discrete=True)
    for model, transitions, message in (
        (offline_model(SAC), rows.replace(intervals=torch.full((300,), 3)), "transitions: expected single steps"),
        (
            offline_model(SAC),
            rows.replace(actions=torch.zeros(300, 3), next_actions=torch.zeros(300, 3)),
            r"transitions: expected actions of Box.*N, 3\]",
        ),
        (offline_model(SAC), pair, "transitions: expected observations as a tensor or a dict, .*, got a tuple"),
        (offline_model(DQN), beyond.replace(actions=beyond.actions + 2), "transitions: expected actions in Discrete"),
        (model_of(SAC, DummyVecEnv([Toy] * 2)), IN_THE_BOX, "model: expected one environment, .*, got 2, and False"),
        (
            goals,
            IN_THE_BOX,
            "model: expected one with a replay buffer of transitions, without hindsight, got SAC with Her",
        ),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            fill_replay_buffer(model, transitions)
        assert model.replay_buffer.size() == 0
    with pytest.raises(ValueError, match=r"^model: expected a replay buffer with at least one row, got an empty one"):
        transitions_of(offline_model(SAC))


def test_dictionaries_are_filled_in_and_come_out() -> None:
    def parts(held: Any) -> Any:
        return {"a": held, "b": held[:, :2] * 2}

    transitions = IN_THE_BOX.replace(
        observations=parts(IN_THE_BOX.observations), next_observations=parts(IN_THE_BOX.next_observations)
    )
    model = model_of(SAC, Toy("dict"), policy="MultiInputPolicy")
    fill_replay_buffer(model, transitions)
    assert_same(transitions_of(model), transitions, tolerance=1e-6)
    learn_offline(model, transitions, 2)
    assert transitions.timeouts[4] == 0
    model.replay_buffer.next_observations["b"][4] += 1  # the next row does not go on there
    assert transitions_of(model).timeouts[4] == 1


def test_as_many_rows_as_a_buffer_holds_fill_it() -> None:
    model = offline_model(SAC, buffer_size=300)
    fill_replay_buffer(model, data())
    assert (model.replay_buffer.full, model.replay_buffer.pos, model.replay_buffer.size()) == (True, 0, 300)
    assert_same(transitions_of(model), data(), tolerance=1e-6)


def test_a_bound_buffer_that_is_filled_anew_is_clustered_anew() -> None:
    model = clustered(SAC)
    fill_replay_buffer(model, IN_THE_BOX)
    with attached(model):
        model.replay_buffer.sample(16)
        assert len(model.replay_buffer.probabilities) == 3
        fill_replay_buffer(model, IN_THE_BOX.replace(observations=IN_THE_BOX.observations + 1))
        with pytest.raises(ValueError, match="probabilities: expected a buffer that has been clustered"):
            _ = model.replay_buffer.probabilities


def test_actions_that_rounding_put_outside_the_box_are_taken() -> None:
    model = model_of(SAC)
    fill_replay_buffer(model, IN_THE_BOX.replace(actions=IN_THE_BOX.actions * (1 + 1e-6)))
    assert model.replay_buffer.size() == 300


def test_without_timeouts_every_end_is_an_end_as_when_rows_are_added() -> None:
    model = offline_model(SAC, replay_buffer_kwargs={"handle_timeout_termination": False})
    fill_replay_buffer(model, data())
    ends = (data().terminals + data().timeouts).numpy()
    np.testing.assert_array_equal(model.replay_buffer.dones[:300, 0], ends)


class Wide(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.action_space = spaces.Box(-2, 5, (2,), dtype=np.float32)


def test_a_file_of_another_action_box_is_refused(tmp_path: Path) -> None:
    model = model_of(SAC).learn(25)
    save_replay_buffer(model, tmp_path / "buffer")
    with pytest.raises(ValueError, match=r"path: expected .*'action_space': .*\[-2.0, -2.0\] to \[5.0, 5.0\]"):
        load_replay_buffer(model_of(SAC, Wide()), tmp_path / "buffer")


def test_a_file_leaves_none_of_the_rows_that_were_there(tmp_path: Path) -> None:
    model, other = model_of(SAC), model_of(SAC)
    put(model.replay_buffer, 20)
    put(other.replay_buffer, 50)
    save_replay_buffer(model, tmp_path / "buffer")
    load_replay_buffer(other, tmp_path / "buffer")
    for name in ("observations", "next_observations", "actions", "rewards", "dones", "timeouts"):
        np.testing.assert_array_equal(getattr(other.replay_buffer, name), getattr(model.replay_buffer, name))
