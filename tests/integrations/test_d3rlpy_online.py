"""C4 in d3rlpy's online training: every batch is what d3rlpy's own picker gives of the same rows when it is drawn."""

from __future__ import annotations

import dataclasses
from typing import Any

import d3rlpy
import gymnasium
import numpy as np
import pytest
import torch
from c4buffer.integrations.d3rlpy import C4Config
from c4buffer.integrations.d3rlpy.batches import Batches
from c4buffer.integrations.d3rlpy.online import ReturnsToGo, rows_at_most
from d3rlpy.algos import CalQLConfig, DQNConfig, SACConfig, TD3Config
from d3rlpy.dataset import (
    BasicTransitionPicker,
    Episode,
    FIFOBuffer,
    MixedReplayBuffer,
    MultiStepTransitionPicker,
    ReplayBuffer,
    SparseRewardTransitionPicker,
    create_fifo_replay_buffer,
    create_infinite_replay_buffer,
)
from d3rlpy.preprocessing import (
    ConstantShiftRewardScaler,
    MinMaxActionScaler,
    MinMaxObservationScaler,
    PixelObservationScaler,
)
from d3rlpy.torch_utility import TorchMiniBatch

from c4buffer import Transitions, storage

from .test_d3rlpy import QUIET, assert_same_state, dataset_of, drawn, mini_batch, small

__all__ = ["drawn"]  # a fixture
FIELDS = (
    *("observations", "actions", "rewards", "next_observations", "next_actions"),
    *("returns_to_go", "terminals", "intervals"),
)
FAILURE = -49.5


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Networks, and so clusters, that are the same in every run."""
    d3rlpy.seed(0)


class Sparse(gymnasium.Env[Any, Any]):
    """Random observations; every other episode ends with a reward, the others are cut off without one."""

    observation_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)

    def __init__(self, *, discrete: bool = False) -> None:
        box = gymnasium.spaces.Box(-2, 2, (2,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(4) if discrete else box
        self.action_space.seed(0)
        self.generator = np.random.default_rng(0)
        self.episode = self.calls = 0

    def observation(self) -> Any:
        self.calls += 1
        return self.generator.uniform(-1, 1, size=3).astype(np.float32)

    def reset(self, **options: Any) -> Any:
        self.steps = 0
        self.episode += 1
        return self.observation(), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        solved = self.episode % 2 == 0
        last = self.steps == 7 + self.episode % 3
        return self.observation(), float(solved and last), solved and last, last and not solved, {}


class Ahead:
    """A picker of one's own, which reads the whole episode."""

    def __call__(self, episode: Any, index: int) -> Any:
        step = BasicTransitionPicker()(episode, index)
        return dataclasses.replace(step, reward=step.reward + len(episode))


def offline(picker: Any = None) -> Any:
    """Sparse rewards at the ends of three of six episodes."""
    generator = np.random.default_rng(0)
    parts = []
    for i in range(6):
        rewards = np.zeros((9 + i, 1), np.float32)
        rewards[-1] = i % 2 == 0
        observations = generator.uniform(-1, 1, size=(9 + i, 3)).astype(np.float32)
        actions = generator.uniform(-2, 2, size=(9 + i, 2)).astype(np.float32)
        parts.append(Episode(observations=observations, actions=actions, rewards=rewards, terminated=i % 2 == 0))
    return dataset_of(parts, transition_picker=picker)


def with_scalers(config: type, **fields: Any) -> Any:
    return small(
        config,
        observation_scaler=MinMaxObservationScaler(np.full(3, -1, np.float32), np.full(3, 1, np.float32)),
        reward_scaler=ConstantShiftRewardScaler(shift=-5, multiplier=10.0, multiply_first=True),
        **fields,
    )


class Draw:
    """A share of a batch, and d3rlpy's own record of the same rows, made when it was drawn."""

    def __init__(self, batches: Any, mine: Any, slots: Any) -> None:
        host, algo, buffer = batches._dataset, batches._algo, batches.buffer
        written, dropped = buffer._storage.written, buffer._storage.written - host.transition_count
        rows = [written - 1 - (written - 1 - slot) % buffer.capacity - dropped for slot in slots.tolist()]
        self.host, self.mine, self.rows = host, mine, [host.buffer[row] for row in rows]
        self.under_way = [episode is host._writer._active_episode for episode, _ in self.rows]
        self.theirs = TorchMiniBatch.from_batch(
            mini_batch(host, rows),
            gamma=algo.gamma,
            compute_returns_to_go=algo.need_returns_to_go,
            device=algo._device,
            observation_scaler=algo.observation_scaler,
            action_scaler=algo.action_scaler,
            reward_scaler=algo.reward_scaler,
        )

    def check(self) -> None:
        for name in FIELDS:
            assert torch.equal(getattr(self.mine, name), getattr(self.theirs, name)), name


@pytest.fixture
def draws(drawn: list[Transitions], monkeypatch: pytest.MonkeyPatch) -> list[Draw]:
    found: list[Draw] = []
    sample = Batches.sample

    def recording(batches: Batches, batch_size: int) -> Any:
        mine = sample(batches, batch_size)
        found.append(Draw(batches, mine, drawn[-1].indices))
        return mine

    monkeypatch.setattr(Batches, "sample", recording)
    return found


PICKERS: dict[str, Any] = {
    "basic": lambda: (BasicTransitionPicker(), False),
    "basic, written at termination": lambda: (BasicTransitionPicker(), True),
    "sparse": lambda: (SparseRewardTransitionPicker(failure_return=FAILURE), False),
    "multi-step": lambda: (MultiStepTransitionPicker(n_steps=3, gamma=0.9), True),
    "one's own": lambda: (Ahead(), True),
}


@pytest.mark.parametrize("limit", [1000, 40])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", PICKERS)
def test_calql_sees_what_the_hosts_picker_gives_when_a_batch_is_drawn(
    name: str, mixed: bool, limit: int, draws: list[Draw]
) -> None:
    picker, at_termination = PICKERS[name]()
    env = Sparse()
    host = create_fifo_replay_buffer(limit, env=env, transition_picker=picker, write_at_termination=at_termination)
    data = offline(picker)
    buffer = MixedReplayBuffer(host, data, secondary_mix_ratio=0.5) if mixed else host
    base = with_scalers(CalQLConfig, action_scaler=MinMaxActionScaler())
    algo = C4Config(base=base, n_clusters=2, refresh_interval=10, seed=0).create()
    algo.fit_online(env, buffer, n_steps=100, n_steps_per_epoch=100, update_start_step=15, random_steps=10, **QUIET)
    own = [draw for draw in draws if draw.host is host]
    assert algo.grad_step == len(own) > 60
    assert len(draws) == (2 if mixed else 1) * len(own)
    for draw in draws:
        draw.check()
    under_way = sum(any(draw.under_way) for draw in own)
    assert under_way == 0 if at_termination else under_way > 10
    returns = torch.cat([draw.mine.returns_to_go for draw in own])
    assert len(returns.unique()) > (5 if name == "sparse" else 10)
    if name == "sparse":
        assert bool((returns == np.float32(10 * FAILURE - 5)).any())


def test_of_a_row_under_way_the_returns_reach_to_the_newest_step(draws: list[Draw]) -> None:
    env = Sparse()
    host = create_infinite_replay_buffer(env=env)
    base = small(CalQLConfig, reward_scaler=ConstantShiftRewardScaler(shift=1.0))
    C4Config(base=base, seed=0).create().fit_online(env, host, n_steps=60, n_steps_per_epoch=60, **QUIET)
    seen: dict[Any, set[float]] = {}
    for draw in draws:
        draw.check()
        for row, returned in zip(draw.rows, draw.mine.returns_to_go[:, 0].tolist()):
            seen.setdefault((id(row[0]), row[1]), set()).add(returned)
    assert max(map(len, seen.values())) > 3  # one row, as its episode grew


@pytest.mark.parametrize("config", [SACConfig, DQNConfig])
@pytest.mark.parametrize("picker", ["sparse", "multi-step"])
def test_so_do_algorithms_without_returns(config: type, picker: str, draws: list[Draw]) -> None:
    env = Sparse(discrete=config is DQNConfig)
    ahead, at_termination = PICKERS[picker]()
    host = create_fifo_replay_buffer(60, env=env, transition_picker=ahead, write_at_termination=at_termination)
    algo = C4Config(base=with_scalers(config), n_clusters=2, refresh_interval=10, seed=0).create()
    algo.fit_online(env, host, n_steps=120, n_steps_per_epoch=120, update_interval=2, n_updates=2, **QUIET)
    assert len(draws) > 80
    for draw in draws:
        draw.check()
    intervals = {int(n) for draw in draws for n in draw.mine.intervals}
    assert intervals == ({1, 2, 3} if at_termination else {1})


def test_d3rlpys_own_fine_tuning_of_calql_runs_wrapped(draws: list[Draw]) -> None:
    picker = SparseRewardTransitionPicker(failure_return=FAILURE)
    env, data = Sparse(), offline(picker)
    algo = C4Config(base=with_scalers(CalQLConfig, max_q_backup=True), n_clusters=2, seed=0).create()
    algo.fit(data, n_steps=4, n_steps_per_epoch=4, **QUIET)
    online = create_fifo_replay_buffer(1000, env=env, transition_picker=picker)
    mixed = MixedReplayBuffer(primary_replay_buffer=online, secondary_replay_buffer=data, secondary_mix_ratio=0.5)
    algo.fit_online(env, mixed, n_steps=60, n_steps_per_epoch=20, n_updates=20, update_interval=20, **QUIET)
    assert algo.grad_step == 4 + 60
    assert len(draws) == 4 + 2 * 60
    for draw in draws:
        draw.check()
    assert {len(draw.rows) for draw in draws[4:]} == {8}


def test_steps_taken_before_the_training_belong_to_its_episode(draws: list[Draw]) -> None:
    env = Sparse()
    host = create_infinite_replay_buffer(env=env, write_at_termination=True)
    for _ in range(30):
        host.append(env.observation(), env.action_space.sample(), 1.0)
    algo = C4Config(base=small(CalQLConfig), n_clusters=2, seed=0).create()
    algo.fit_online(env, host, n_steps=40, n_steps_per_epoch=40, **QUIET)
    assert len(draws) > 20
    for draw in draws:
        draw.check()
    assert draws[0].host.transition_count <= algo.c4_buffer.capacity


def test_returns_of_an_ended_episode_are_computed_once() -> None:
    calls: list[int] = []

    class Counting(BasicTransitionPicker):
        def __call__(self, episode: Any, index: int) -> Any:
            calls.append(index)
            return super().__call__(episode, index)

    host = create_fifo_replay_buffer(4, env=Sparse(), transition_picker=Counting())
    algo = small(CalQLConfig, gamma=0.5).create()
    returns = ReturnsToGo(host, algo, 4)
    for reward in (1.0, 2.0, 4.0):
        host.append(np.zeros(3, np.float32), np.zeros(2, np.float32), reward)
    returns.extend(0)
    slots = torch.tensor([1, 0, 1])
    for _ in range(2):
        assert returns[slots].tolist() == [[4.0], [3.0], [4.0]]
    assert calls == [1, 0, 1] * 2
    host.append(np.zeros(3, np.float32), np.zeros(2, np.float32), 8.0)
    assert returns[slots].tolist() == [[6.0], [4.0], [6.0]]
    host.clip_episode(True)
    returns.extend(2)
    calls.clear()
    for _ in range(2):
        assert returns[torch.arange(4)].tolist() == [[4.0], [6.0], [8.0], [8.0]]
    assert calls == [0, 1, 2, 3]
    for reward in (3.0, 5.0, 7.0):  # two more rows: the oldest two go
        host.append(np.zeros(3, np.float32), np.zeros(2, np.float32), reward)
    returns.extend(2)
    assert returns[torch.arange(4)].tolist() == [[7.25], [8.5], [8.0], [8.0]]


def nested(env: Any) -> Any:
    host = create_fifo_replay_buffer(100, env=env)
    return MixedReplayBuffer(host, host, secondary_mix_ratio=0.5)


REFUSED: dict[str, Any] = {
    "looks ahead": (
        lambda env: create_fifo_replay_buffer(100, env=env, transition_picker=MultiStepTransitionPicker(3, 0.99)),
        "one with a Basic.* or FrameStack.* or SparseReward.*, or with write_at_termination=True, as each row is read "
        "once, when it appears, and others may look ahead of the newest step, got MultiStepTransitionPicker",
    ),
    "picker of one's own": (
        lambda env: create_fifo_replay_buffer(100, env=env, transition_picker=Ahead()),
        "one with a Basic.*, got Ahead",
    ),
    "primary looks ahead": (
        lambda env: MixedReplayBuffer(
            create_fifo_replay_buffer(100, env=env, transition_picker=Ahead()), offline(Ahead()), 0.5
        ),
        "one with a Basic.*, got Ahead",
    ),
    "primary mixed": (
        lambda env: MixedReplayBuffer(nested(env), offline(), 0.5),
        "a ReplayBuffer, or a MixedReplayBuffer with one as primary, as what it takes is followed, got MixedReplayBu",
    ),
    "secondary mixed": (
        lambda env: MixedReplayBuffer(create_fifo_replay_buffer(100, env=env), nested(env), 0.5),
        "a MixedReplayBuffer of two ReplayBuffers, as a share comes from one, got a secondary mixed again",
    ),
    "secondary too small": (nested, "a secondary with at least one transition, got none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_followed_is_refused_before_the_environment_is_touched(case: str) -> None:
    make, message = REFUSED[case]
    env = Sparse()
    algo = C4Config(base=small(CalQLConfig)).create()
    with pytest.raises(ValueError, match="^buffer: expected " + message):
        algo.fit_online(env, make(env), n_steps=100, **QUIET)
    assert env.calls == 0
    assert algo.impl is None


def test_so_are_options_that_the_buffer_refuses() -> None:
    env = Sparse()
    algo = C4Config(base=small(SACConfig)).create()
    algo.c4_buffer_options = {"assignment": "harder"}
    with pytest.raises(ValueError, match="assignment: expected one of 'soft', 'hard', got 'harder'"):
        algo.fit_online(env, n_steps=100, **QUIET)
    assert env.calls == 0


def test_a_secondary_of_which_nothing_is_drawn_may_be_empty(draws: list[Draw]) -> None:
    env = Sparse()
    host = create_fifo_replay_buffer(100, env=env)
    mixed = MixedReplayBuffer(host, create_fifo_replay_buffer(100, env=env), secondary_mix_ratio=0.0)
    algo = C4Config(base=small(SACConfig), n_clusters=2, seed=0).create()
    algo.fit_online(env, mixed, n_steps=40, n_steps_per_epoch=40, **QUIET)
    assert len(draws) == algo.grad_step > 10


def trained_online(limit: int, *, growing: bool) -> Any:
    torch.manual_seed(0)
    np.random.seed(0)
    env = Sparse()
    host = create_fifo_replay_buffer(limit, env=env)
    algo = C4Config(base=small(SACConfig), n_clusters=2, refresh_interval=20, seed=0).create()
    algo.c4_buffer_options = {"growing": growing}
    algo.fit_online(env, host, n_steps=130, n_steps_per_epoch=130, random_steps=20, **QUIET)
    return algo


@pytest.mark.parametrize("limit", [1000, 70])
def test_a_buffer_that_grows_gives_the_batches_of_one_whole_from_the_start(
    limit: int, drawn: list[Transitions], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "FEWEST_ROWS", 4)
    grown, whole = trained_online(limit, growing=True), trained_online(limit, growing=False)
    assert_same_state(grown, whole)
    assert len(drawn) % 2 == 0
    for one, other in zip(drawn[: len(drawn) // 2], drawn[len(drawn) // 2 :]):
        assert one.cluster == other.cluster
        for (name, first), (_, second) in zip(one.columns(), other.columns()):
            assert torch.equal(first, second), name
        assert torch.equal(one.indices, other.indices)
    assert grown.c4_buffer.capacity == whole.c4_buffer.capacity == limit
    assert grown.c4_buffer.last_report.sizes == whole.c4_buffer.last_report.sizes


@pytest.mark.parametrize("limit", [None, 1000])
def test_what_a_callback_appends_is_followed_or_refused_by_name(limit: int | None) -> None:
    env = Sparse()
    host = create_infinite_replay_buffer(env=env) if limit is None else create_fifo_replay_buffer(limit, env=env)
    demonstration = offline().episodes[0]
    algo = C4Config(base=small(SACConfig), n_clusters=2, refresh_interval=20, seed=0).create()

    def append(algo: Any, epoch: int, step: int) -> None:
        if step in (25, 26, 45):  # one episode, the same each time
            host.append_episode(demonstration)

    options = dict(n_steps=60, n_steps_per_epoch=60, callback=append, **QUIET)
    if limit is None:
        with pytest.raises(ValueError, match="buffer: expected at most 60 transitions, .*create_fifo_replay_buffer"):
            algo.fit_online(env, host, **options)
    else:
        algo.fit_online(env, host, **options)
        assert len(algo.c4_buffer) in (host.transition_count, host.transition_count - 1)  # a step after the last update
        rows = algo.c4_buffer.rows()
        for row in range(len(rows)):
            given = host.transition_picker(*host.buffer[row])
            assert torch.equal(rows.actions[row], torch.as_tensor(given.action))


def test_a_buffer_of_ones_own_kind_keeps_its_count() -> None:
    class Counting(ReplayBuffer):
        count = 0

        def append(self, *arguments: Any) -> None:
            self.count += 1
            super().append(*arguments)

    env = Sparse()
    host = Counting(FIFOBuffer(1000), env=env)
    algo = C4Config(base=small(SACConfig), n_clusters=2, seed=0).create()
    algo.fit_online(env, host, n_steps=40, n_steps_per_epoch=40, **QUIET)
    assert host.count == 40


class Frames(gymnasium.Env[Any, Any]):
    """Atari's observations: four frames of 84 x 84 bytes."""

    observation_space = gymnasium.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    action_space = gymnasium.spaces.Discrete(4)
    frames = np.random.default_rng(0).integers(0, 256, size=(20, 4, 84, 84), dtype=np.uint8)
    steps = 0

    def reset(self, **options: Any) -> Any:
        return self.frames[0], {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        return self.frames[self.steps % 20], 1.0, self.steps % 20 == 19, False, {}


def test_images_with_d3rlpys_default_of_a_million_rows_take_no_more_memory_than_came() -> None:
    algo = C4Config(base=DQNConfig(batch_size=4), n_clusters=2, seed=0).create()

    def stop(algo: Any, epoch: int, step: int) -> None:
        if step == 12:
            raise InterruptedError("a million steps are not waited for")

    with pytest.raises(InterruptedError):
        algo.fit_online(Frames(), callback=stop, **QUIET)
    assert algo.grad_step > 5
    assert algo.c4_buffer.capacity == 1_000_000
    ring = algo.c4_buffer._storage
    assert ring.room == storage.FEWEST_ROWS
    assert sum(rows.nbytes for rows in ring._rows.values()) < 60e6  # of 56 GB


def test_online_steps_may_be_given_by_place() -> None:
    env = gymnasium.make("Pendulum-v1", max_episode_steps=20)
    algo = C4Config(base=small(TD3Config), n_clusters=2, seed=0).create()

    def check(algo: Any, epoch: int, step: int) -> None:
        assert step <= 30

    algo.fit_online(env, create_infinite_replay_buffer(env=env), None, 30, 30, callback=check, **QUIET)
    assert algo.c4_buffer.capacity == 30


def test_critics_of_an_online_training_are_none_before_its_first_batch() -> None:
    env = gymnasium.make("Pendulum-v1", max_episode_steps=20)
    algo = C4Config(base=small(TD3Config), n_clusters=2, seed=0).create()
    seen: list[tuple[bool, bool]] = []

    def keep(algo: Any, epoch: int, step: int) -> None:
        seen.append((algo.c4_buffer is None, algo.c4_critics is None))

    options = {"n_steps": 30, "n_steps_per_epoch": 30, "update_start_step": 20, "callback": keep}
    algo.fit_online(env, create_fifo_replay_buffer(100, env=env), **options, **QUIET)
    assert seen[0] == (True, True)
    assert seen[-1] == (False, False)
    assert all(buffer == critics for buffer, critics in seen)


def test_images_online_are_clustered_as_training_sees_them() -> None:
    algo = C4Config(
        base=DQNConfig(batch_size=4, observation_scaler=PixelObservationScaler()), n_clusters=2, seed=0
    ).create()
    env = Frames()
    algo.fit_online(env, create_fifo_replay_buffer(50, env=env), n_steps=12, n_steps_per_epoch=12, **QUIET)
    rows = algo.c4_buffer.rows()
    assert rows.observations.dtype == torch.uint8
    assert algo.c4_critics.encode is not None
    torch.testing.assert_close(algo.c4_critics.encode(rows.observations), rows.observations.float() / 255)


def test_a_buffer_without_steps_to_come_has_room_for_one() -> None:
    assert rows_at_most(create_infinite_replay_buffer(env=gymnasium.make("Pendulum-v1")), 0) == 1
