"""A d3rlpy dataset's rows are its buffer's, whatever was appended to that, and take no more room than they need."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from c4buffer.integrations.d3rlpy import ACTIVEConfig, C4Config, critics_of, frames, transitions_of
from c4buffer.integrations.d3rlpy import dataset as conversion
from c4buffer.integrations.d3rlpy import dataset_of as episodes_of
from c4buffer.integrations.d3rlpy.batches import Batches, UniformBatches
from c4buffer.integrations.d3rlpy.dataset import rows_since, seen_of
from c4buffer.integrations.d3rlpy.frames import FrameBuffer
from c4buffer.integrations.d3rlpy.rows import rows_of, runs_of
from d3rlpy.algos import CalQLConfig, DQNConfig, TD3PlusBCConfig
from d3rlpy.dataset import (
    BasicTransitionPicker,
    Episode,
    FIFOBuffer,
    FrameStackTransitionPicker,
    InfiniteBuffer,
    ReplayBuffer,
)
from d3rlpy.preprocessing import (
    MinMaxActionScaler,
    MultiplyRewardScaler,
    PixelObservationScaler,
    StandardObservationScaler,
)
from d3rlpy.torch_utility import TorchMiniBatch

from c4buffer import Transitions, stacked_features, stacked_gradients

from .test_d3rlpy import QUIET, assert_same_state, batches_given, built, dataset_of, drawn, episodes, mini_batch, small
from .test_d3rlpy_host import image_episodes, pixel_config

__all__ = ["drawn"]  # a fixture
FIELDS = {
    "observations": "observation",
    "actions": "action",
    "rewards": "reward",
    "next_observations": "next_observation",
    "next_actions": "next_action",
    "terminals": "terminal",
}


class OwnPicker(BasicTransitionPicker):
    """The basic one under another name, which is asked for every row."""


class OwnBuffer(InfiniteBuffer):
    """One whose rows are read by their numbers."""


def plain(**options: Any) -> ReplayBuffer:
    return dataset_of(episodes(), **options)


def with_dropped_rows(**options: Any) -> ReplayBuffer:
    return dataset_of(episodes(), buffer=FIFOBuffer(limit=50), **options)


def with_a_dropped_repeat(**options: Any) -> ReplayBuffer:
    return dataset_of([*episodes(2)] * 3, buffer=FIFOBuffer(limit=57), **options)


def repeated_side_by_side(**options: Any) -> ReplayBuffer:
    first, *rest = episodes(3)
    return dataset_of([first] * 5 + rest, **options)


def repeated_with_others_between(**options: Any) -> ReplayBuffer:
    return dataset_of([*episodes(3), *episodes(1, seed=1)] * 2 + episodes(1, seed=1), **options)


def interleaved(limit: int | None = None, **options: Any) -> ReplayBuffer:
    """Steps of one episode, with whole episodes in between; then an episode under way."""
    whole, between, again = episodes(3)
    dataset = dataset_of([between], buffer=FIFOBuffer(limit) if limit else InfiniteBuffer(), **options)
    for step in range(len(whole)):
        if step in (4, 5, 11):
            dataset.append_episode(again if step == 11 else between)
        dataset.append(whole.observations[step], whole.actions[step], whole.rewards[step])
    dataset.clip_episode(True)
    for step in range(6):
        dataset.append(again.observations[step], again.actions[step], again.rewards[step])
    return dataset


def interleaved_and_dropped(**options: Any) -> ReplayBuffer:
    return interleaved(limit=50, **options)


def read_by_number(**options: Any) -> ReplayBuffer:
    first, second = episodes(2)
    return dataset_of([first, first, second], buffer=OwnBuffer(), **options)


DATASETS = [
    plain,
    with_dropped_rows,
    with_a_dropped_repeat,
    repeated_side_by_side,
    repeated_with_others_between,
    interleaved,
    interleaved_and_dropped,
    read_by_number,
]


def assert_row(transitions: Transitions, row: int, picked: Any) -> None:
    """Row `row` is one that the host's picker gave."""
    for name, its_name in FIELDS.items():
        expected = np.asarray(getattr(picked, its_name), dtype=np.float32)
        np.testing.assert_array_equal(getattr(transitions, name)[row].reshape(expected.shape).numpy(), expected, name)


@pytest.mark.parametrize("picker", [BasicTransitionPicker(), OwnPicker()])
@pytest.mark.parametrize("made", DATASETS)
def test_rows_are_those_of_the_hosts_buffer(made: Any, picker: Any) -> None:
    dataset = made(transition_picker=picker)
    transitions = transitions_of(dataset)
    assert len(transitions) == dataset.transition_count
    for i in range(dataset.transition_count):
        assert_row(transitions, i, dataset.transition_picker(*dataset.buffer[i]))


@pytest.mark.parametrize("picker", [BasicTransitionPicker(), OwnPicker()])
@pytest.mark.parametrize("made", DATASETS)
def test_a_trajectory_ends_where_the_next_row_is_not_the_next_step(made: Any, picker: Any) -> None:
    dataset = made(transition_picker=picker)
    transitions = transitions_of(dataset)
    rows = [dataset.buffer[i] for i in range(dataset.transition_count)]
    follows = [one[0] is two[0] and two[1] == one[1] + 1 for one, two in itertools.pairwise(rows)]
    assert (transitions.terminals + transitions.timeouts).tolist() == [float(not goes_on) for goes_on in follows] + [1]


def test_an_oversampled_dataset_has_all_its_rows_in_one_run_for_each_repeat() -> None:
    dataset = repeated_side_by_side()
    assert len(dataset.episodes) == 3
    assert len(transitions_of(dataset)) == 142
    assert len(runs_of(rows_of(dataset))) == 7


@pytest.mark.parametrize("made", DATASETS)
def test_returns_to_go_are_those_of_the_rows_drawn(made: Any, drawn: list[Transitions]) -> None:
    dataset = made()
    base = small(CalQLConfig, reward_scaler=MultiplyRewardScaler(0.5))
    algo = built(C4Config(base=base, n_clusters=2, seed=0), dataset)
    seen = batches_given(algo)
    algo.fit(dataset, n_steps=3, n_steps_per_epoch=3, **QUIET)
    for batch, rows in zip(seen, drawn, strict=True):
        for i, row in enumerate(rows.indices.tolist()):
            picked = dataset.transition_picker(*dataset.buffer[row])
            np.testing.assert_array_equal(batch.observations[i].numpy(), picked.observation)
            np.testing.assert_array_equal(batch.rewards[i].numpy(), 0.5 * picked.reward)
            rewards = 0.5 * picked.rewards_to_go
            powers = (0.99 ** np.arange(len(rewards))).astype(np.float32).reshape(-1, 1)
            np.testing.assert_array_equal(batch.returns_to_go[i].numpy(), np.sum(powers * rewards, axis=0))
    assert torch.equal(batch.returns_to_go, conversion.returns_to_go_of(dataset, algo)[rows.indices])


def test_parts_of_observations_are_repeated_together() -> None:
    parts = [
        Episode(
            observations=[part.observations, part.observations[:, :2]],
            actions=part.actions,
            rewards=part.rewards,
            terminated=part.terminated,
        )
        for part in episodes(2)
    ]
    dataset = dataset_of([parts[0], *parts, parts[0]])
    transitions = transitions_of(dataset)
    for i in range(dataset.transition_count):
        picked = dataset.transition_picker(*dataset.buffer[i])
        for name in ("observations", "next_observations"):
            for part, expected in zip(getattr(transitions, name), getattr(picked, FIELDS[name]), strict=True):
                np.testing.assert_array_equal(part[i].numpy(), expected)


def framed(parts: list[Episode], n_frames: int = 4, **options: Any) -> ReplayBuffer:
    return dataset_of(parts, transition_picker=FrameStackTransitionPicker(n_frames), **options)


def repeated_images(**options: Any) -> ReplayBuffer:
    """Episodes of colour images, terminated and not, some twice; the last is shorter than a stack."""
    first, second, third = image_episodes(3, discrete=True)
    short = Episode(third.observations[:3], third.actions[:3], third.rewards[:3], terminated=False)
    return framed([first, first, second, third, second, short], **options)


def two_images(**options: Any) -> ReplayBuffer:
    """Observations of two images, one of them in floats."""
    parts = []
    for part in image_episodes(discrete=True, channels=1):
        images: Any = [part.observations, (part.observations[:, :, ::2] / 255).astype(np.float32)]
        parts.append(Episode(images, part.actions, part.rewards, part.terminated))
    return framed(parts, **options)


def float_images(**options: Any) -> ReplayBuffer:
    parts = [
        Episode((part.observations / 100 - 1).astype(np.float32), part.actions, part.rewards, part.terminated)
        for part in image_episodes(discrete=True)
    ]
    return framed(parts, **options)


def dropped_images(**options: Any) -> ReplayBuffer:
    """The oldest rows are gone, but not the frames that the host stacks."""
    return framed(image_episodes(discrete=True), buffer=FIFOBuffer(limit=40), **options)


def vectors(**options: Any) -> ReplayBuffer:
    return framed(episodes(discrete=True), **options)


class OwnStacks(FrameStackTransitionPicker):
    """Under another name, by which it may do anything."""


def stacks_of_its_own() -> ReplayBuffer:
    return dataset_of(image_episodes(discrete=True), transition_picker=OwnStacks(4))


def algo_for(rows: ReplayBuffer, scaler: Any = None) -> Any:
    """DQN that is not trained: only its scalers and its device are asked for."""
    observation_scaler = scaler and scaler()
    if scaler is StandardObservationScaler:  # d3rlpy's own fit of it takes no stacks
        stacks = transitions_of(rows).observations.numpy()
        observation_scaler = StandardObservationScaler(mean=stacks.mean(axis=0), std=stacks.std(axis=0))
    base = pixel_config(DQNConfig, observation_scaler=observation_scaler, reward_scaler=MultiplyRewardScaler(0.3))
    return C4Config(base=base, n_clusters=2, seed=0).create()


def assert_hosts_batch(batch: TorchMiniBatch, rows: ReplayBuffer, indices: torch.Tensor, algo: Any) -> None:
    scalers = {name: getattr(algo, name) for name in ("observation_scaler", "action_scaler", "reward_scaler")}
    expected = TorchMiniBatch.from_batch(mini_batch(rows, indices), algo.gamma, False, "cpu:0", **scalers)
    for name in ("observations", "actions", "rewards", "next_observations", "next_actions", "terminals", "intervals"):
        one, other = getattr(batch, name), getattr(expected, name)
        for part, its_part in zip(*([value] if torch.is_tensor(value) else value for value in (one, other))):
            assert torch.equal(part, its_part), name


@pytest.mark.parametrize("scaler", [None, PixelObservationScaler, StandardObservationScaler])
@pytest.mark.parametrize("storage", ["device", "memory", "memmap"])
@pytest.mark.parametrize("n_frames", [1, 2, 4])
def test_single_frames_are_held_and_batches_are_the_hosts(
    n_frames: int, storage: str, scaler: Any, drawn: list[Transitions]
) -> None:
    rows = repeated_images(n_frames=n_frames)
    algo = algo_for(rows, scaler)
    algo.c4_buffer_options = {"storage": storage}
    batches = Batches(rows, algo)
    batch = batches.sample(400)
    assert isinstance(batches.buffer, FrameBuffer)
    assert_hosts_batch(batch, rows, drawn[0].indices, algo)
    assert (batch.terminals == 1).any()
    held = batches.buffer.state_dict()["storage"]["rows"]["uint8"]
    assert held.nbytes == 2 * rows.transition_count * 2 * 16 * 16


@pytest.mark.parametrize("made", [two_images, float_images])
def test_other_images_are_held_one_by_one_too(made: Any, drawn: list[Transitions]) -> None:
    rows = made()
    algo = algo_for(rows)
    batches = Batches(rows, algo)
    assert_hosts_batch(batches.sample(400), rows, drawn[0].indices, algo)
    assert isinstance(batches.buffer, FrameBuffer)


@pytest.mark.parametrize(
    ("made", "scaler"),
    [
        (dropped_images, PixelObservationScaler),
        (stacks_of_its_own, PixelObservationScaler),
        (float_images, StandardObservationScaler),
        (vectors, StandardObservationScaler),
        (vectors, None),
    ],
)
def test_the_hosts_stacks_are_held_where_the_buffers_would_be_others(
    made: Any, scaler: Any, drawn: list[Transitions]
) -> None:
    rows = made()
    algo = algo_for(rows, scaler)
    batches = Batches(rows, algo)
    assert_hosts_batch(batches.sample(400), rows, drawn[0].indices, algo)
    assert not isinstance(batches.buffer, FrameBuffer)


def test_a_frame_stack_that_was_asked_for_joins_the_pickers_stacks() -> None:
    rows = repeated_images(n_frames=2)
    algo = algo_for(rows, PixelObservationScaler)
    algo.c4_buffer_options = {"frame_stack": 3}
    batches = Batches(rows, algo)
    assert batches.sample(8).observations.shape[1] == 2 * 2 * 3


def test_transitions_of_gives_the_stacks() -> None:
    rows = repeated_images()
    transitions = transitions_of(rows)
    assert transitions.observations.shape[1:] == (8, 16, 16)
    for i in range(rows.transition_count):
        assert_row(transitions, i, rows.transition_picker(*rows.buffer[i]))


@pytest.mark.parametrize("embedding", ["gradients", "features"])
def test_stacks_are_clustered_as_the_host_has_them(embedding: str) -> None:
    rows = repeated_images()
    algo = C4Config(base=pixel_config(DQNConfig), n_clusters=2, embedding=embedding, seed=0).create()
    seen: list[torch.Tensor] = []

    def keep(embeddings: torch.Tensor, previous: Any) -> torch.Tensor:
        seen.append(embeddings)
        return torch.full((len(embeddings), 2), 0.5)

    algo.c4_clusterer = keep
    algo.c4_buffer_options = {"max_dim": 4096}
    algo.fit(rows, n_steps=2, n_steps_per_epoch=2, **QUIET)
    algo.c4_buffer.refresh()
    embed = {"gradients": stacked_gradients, "features": stacked_features}[embedding]
    torch.testing.assert_close(seen[-1], embed(critics_of(algo), transitions_of(rows, algo)))


def test_an_embedding_of_ones_own_is_shown_the_hosts_rows() -> None:
    rows = repeated_images()
    algo = C4Config(base=pixel_config(DQNConfig), n_clusters=2, seed=0).create()
    shown: list[Transitions] = []

    def embed(critics: Any, batch: Transitions) -> torch.Tensor:
        shown.append(batch)
        return torch.randn(len(batch), 2, generator=torch.Generator().manual_seed(0))

    algo.c4_buffer_options = {"embedding": embed}
    algo.fit(rows, n_steps=1, n_steps_per_epoch=1, **QUIET)
    seen = Transitions.concatenate(shown)
    assert len(seen) == rows.transition_count
    for i in range(len(seen)):
        assert_row(seen, i, rows.transition_picker(*rows.buffer[i]))


def test_active_draws_uniformly_from_single_frames() -> None:
    rows = framed(image_episodes(discrete=False))
    base = pixel_config(ACTIVEConfig, action_scaler=MinMaxActionScaler(), likelihood_target=0.0)
    algo = built(base, rows)
    batches = UniformBatches(rows, algo)
    indices: list[torch.Tensor] = []
    sample = batches._buffer.sample

    def keep(batch_size: int) -> Transitions:
        batch = sample(batch_size)
        indices.append(batch.indices)
        return batch

    batches._buffer.sample = keep  # type: ignore[method-assign,assignment]
    assert_hosts_batch(batches.sample(100), rows, indices[0], algo)
    assert isinstance(batches._buffer, FrameBuffer)


def test_a_fit_of_frames_is_resumed_batch_for_batch(tmp_path: Path, drawn: list[Transitions]) -> None:
    rows = repeated_images()

    def fresh() -> Any:
        config = C4Config(base=pixel_config(DQNConfig), n_clusters=2, refresh_interval=3, penalty_every=2, seed=0)
        algo = built(config, rows)
        algo.c4_buffer_options = {"storage": "memory"}
        return algo

    whole = fresh()
    for epoch, _ in whole.fitter(rows, n_steps=8, n_steps_per_epoch=1, **QUIET):
        if epoch == 4:
            whole.save_model(str(tmp_path / "model.pt"))
            whole.c4_buffer.save(tmp_path / "buffer.safetensors")
    halves = fresh()
    halves.load_model(str(tmp_path / "model.pt"))
    halves.set_grad_step(4)
    halves.c4_resume(tmp_path / "buffer.safetensors")
    halves.fit(rows, n_steps=4, n_steps_per_epoch=4, **QUIET)
    for first, second in zip(drawn[4:8], drawn[8:], strict=True):
        assert first.cluster == second.cluster
        assert torch.equal(first.indices, second.indices)
        assert torch.equal(first.observations, second.observations)
        assert torch.equal(first.next_observations, second.next_observations)
    assert_same_state(whole, halves)

    others = fresh()
    others.c4_resume(tmp_path / "buffer.safetensors")
    with pytest.raises(ValueError, match="expected"):
        others.fit(repeated_images(n_frames=2), n_steps=1, n_steps_per_epoch=1, **QUIET)


@pytest.mark.parametrize("block", [7, 10_000])
def test_columns_are_scaled_block_by_block_as_the_host_scales_them(
    block: int, monkeypatch: pytest.MonkeyPatch, drawn: list[Transitions]
) -> None:
    monkeypatch.setattr(conversion, "BLOCK_ROWS", block)
    monkeypatch.setattr(frames, "BLOCK_ROWS", block)
    rows = plain()
    scalers = {
        "observation_scaler": StandardObservationScaler(),
        "action_scaler": MinMaxActionScaler(),
        "reward_scaler": MultiplyRewardScaler(0.3),
    }
    algo = built(C4Config(base=small(TD3PlusBCConfig, **scalers), n_clusters=2, seed=0), rows)
    sizes: list[int] = []
    transformed = conversion._transformed

    def counted(scaler: Any, values: torch.Tensor) -> Any:
        sizes.append(len(values))
        return transformed(scaler, values)

    monkeypatch.setattr(conversion, "_transformed", counted)
    before = [episode.observations.copy() for episode in rows.episodes]
    assert_hosts_batch(Batches(rows, algo).sample(300), rows, drawn[0].indices, algo)
    assert sum(sizes) == 5 * rows.transition_count
    assert max(sizes) == min(block, rows.transition_count)
    for episode, kept in zip(rows.episodes, before):
        np.testing.assert_array_equal(episode.observations, kept)  # the columns are copies


def test_a_picker_that_refines_the_basic_one_is_asked() -> None:
    class Doubled(BasicTransitionPicker):
        def __call__(self, episode: Any, index: int) -> Any:
            step = super().__call__(episode, index)
            return dataclasses.replace(step, reward=2 * step.reward)

    plain, doubled = (transitions_of(dataset_of(episodes(), transition_picker=p)) for p in (None, Doubled()))
    assert torch.equal(doubled.rewards, 2 * plain.rewards)


def test_a_buffer_that_orders_its_rows_itself_is_asked_for_them() -> None:
    class Backwards(InfiniteBuffer):
        def __getitem__(self, index: int) -> Any:
            return super().__getitem__(self.transition_count - 1 - index)

    plain, backwards = (transitions_of(dataset_of(episodes(), buffer=b)) for b in (InfiniteBuffer(), Backwards()))
    assert torch.equal(backwards.rewards, plain.rewards.flip(0))


def test_rows_that_come_a_second_time_are_new() -> None:
    dataset = dataset_of(episodes())
    seen, rows = seen_of(dataset), dataset.transition_count
    assert rows_since(dataset, seen) == rows
    dataset.append_episode(dataset.episodes[-1])
    assert dataset.transition_count > rows == rows_since(dataset, seen)


def test_an_empty_dataset_has_no_transitions() -> None:
    step = dataclasses.replace(episodes(1, steps=1)[0], terminated=False)
    with pytest.raises(ValueError, match=r"^dataset: expected at least one transition, got an empty dataset"):
        transitions_of(dataset_of([step]))


def test_returns_to_go_of_a_dataset_made_of_transitions_are_sums_of_their_rewards() -> None:
    rows = Transitions(
        observations=torch.randn(6, 3),
        actions=torch.rand(6, 2),
        rewards=torch.arange(1.0, 7),
        next_observations=torch.randn(6, 3),
        terminals=torch.zeros(6),
        timeouts=torch.tensor([0, 0, 1, 0, 0, 1.0]),
    )
    dataset = episodes_of(rows)
    found = [float(dataset.transition_picker(*dataset.buffer[i]).rewards_to_go.sum()) for i in range(6)]
    assert found == rows.rewards.tolist()
