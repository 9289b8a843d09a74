"""When to cluster again."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from c4buffer import (
    ClusteredReplayBuffer,
    Critics,
    Every,
    MixtureClusterer,
    OnDrift,
    ReducedClusterer,
    RefreshPolicy,
    Transitions,
    stacked_features,
    stacked_gradients,
)

from .conftest import numbered


def due(policy: RefreshPolicy, batches: int) -> list[int]:
    buffer = ClusteredReplayBuffer(1)
    return [step for step in range(batches) if policy(step, buffer)]


@pytest.mark.parametrize("n", [1, 3, 7])
def test_every_n_is_due_at_multiples_of_n(n: int) -> None:
    assert due(Every(n), 22) == list(range(0, 22, n))


def test_any_callable_is_a_policy() -> None:
    assert due(lambda step, buffer: step == buffer.capacity + 1, 5) == [2]


def test_every_says_what_it_is() -> None:
    assert repr(Every(50)) == "Every(50)"
    assert Every(50).n == 50


@pytest.mark.parametrize("n", [0, -1, 2.0, True, "3", None])
def test_every_needs_a_whole_number_from_one(n: Any) -> None:
    with pytest.raises(ValueError, match=r"^n: expected an integer of at least 1, got "):
        Every(n)


# Drift, of a buffer that says what it is told to


class FakeBuffer:
    """What OnDrift asks of a buffer; `likelihood` is what the probe set is said to have."""

    def __init__(self, rows: int = 1000) -> None:
        self.rows = rows
        self.likelihood = 0.0
        self.clustered = False
        self.last_report: Any = None
        self.probes: list[list[int]] = []

    def __len__(self) -> int:
        return self.rows

    def refresh(self) -> None:
        self.clustered, self.last_report = True, object()

    def log_likelihood_of(self, rows: Tensor) -> float:
        self.probes.append(rows.tolist())
        return self.likelihood


def asked(policy: OnDrift, buffer: Any, steps: Any, *, refresh: bool = True) -> list[int]:
    """The steps at which it is time, and the buffer refreshed then."""
    due_at = []
    for step in steps:
        if policy(step, buffer):
            due_at.append(step)
            if refresh:
                buffer.refresh()
    return due_at


def test_drift_refreshes_at_first_and_then_looks_every_so_many_batches() -> None:
    buffer, policy = FakeBuffer(), OnDrift(1.0, check_every=10)
    assert asked(policy, buffer, range(35)) == [0]
    assert len(buffer.probes) == 1 + 3  # the reference at step 1, and looks at 10, 20 and 30
    buffer.likelihood = -1.5
    assert asked(policy, buffer, range(35, 61)) == [40]  # and not at 50: the reference has been taken anew
    buffer.likelihood = -2.0
    assert asked(policy, buffer, range(61, 100)) == []
    assert len({tuple(probe) for probe in buffer.probes}) == 1


@pytest.mark.parametrize(("fall", "expected"), [(0.0, []), (0.99, []), (1.0, []), (1.01, [20]), (1e9, [20]), (-50, [])])
def test_only_a_fall_of_more_than_the_threshold_counts(fall: float, expected: list[int]) -> None:
    buffer, policy = FakeBuffer(), OnDrift(1.0, check_every=20)
    buffer.likelihood = 7.0
    assert asked(policy, buffer, range(15)) == [0]
    buffer.likelihood -= fall
    assert asked(policy, buffer, range(15, 30)) == expected


def test_small_falls_add_up_until_there_is_a_refresh() -> None:
    buffer, policy = FakeBuffer(), OnDrift(1.0, check_every=1)
    asked(policy, buffer, range(2))
    due_at = []
    for step in range(2, 20):
        buffer.likelihood -= 0.3
        due_at += asked(policy, buffer, [step])
    assert due_at == [5, 10, 15]  # the fourth fall, and one that goes into each new reference


def test_a_refresh_from_outside_gives_a_new_reference() -> None:
    buffer, policy = FakeBuffer(), OnDrift(1.0, check_every=10)
    asked(policy, buffer, range(5))
    buffer.likelihood = -5.0
    buffer.refresh()
    assert asked(policy, buffer, range(5, 40)) == []


def test_a_buffer_that_lost_its_clusters_is_due_at_once() -> None:
    buffer, policy = FakeBuffer(), OnDrift(1.0, check_every=100)
    asked(policy, buffer, range(5))
    buffer.clustered = False
    assert asked(policy, buffer, range(5, 9)) == [5]


@pytest.mark.parametrize(
    ("rows", "probe_size", "expected"), [(1000, 20, 20), (1000, 1, 1), (7, 20, 7), (1000, 512, 512)]
)
def test_the_probe_is_so_many_different_rows_drawn_by_the_seed(rows: int, probe_size: int, expected: int) -> None:
    def probe(seed: int) -> list[int]:
        buffer = FakeBuffer(rows)
        asked(OnDrift(1.0, probe_size=probe_size, seed=seed), buffer, range(2))
        return buffer.probes[0]

    state = torch.get_rng_state()
    assert len(set(probe(0))) == expected
    assert set(probe(0)) <= set(range(rows))
    assert probe(0) == probe(0)
    if 1 < expected < rows:
        assert probe(0) != probe(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_while_the_buffer_grows_drift_adds_up_and_looks_are_no_more_frequent() -> None:
    buffer, policy = FakeBuffer(10), OnDrift(1.0, check_every=10, probe_size=50)
    asked(policy, buffer, range(2))
    for step in range(2, 30):
        buffer.rows += 1
        assert not policy(step, buffer)
    assert len(buffer.probes) == 1 + 2
    buffer.likelihood = -2.0
    assert asked(policy, buffer, range(30, 40)) == [30]
    assert [len(probe) for probe in buffer.probes] == [10, 10, 10, 10, 38]  # drawn anew after the refresh
    buffer.rows = 500
    buffer.refresh()
    asked(policy, buffer, range(41, 43))
    assert len(buffer.probes[-1]) == 50
    buffer.rows = 1000
    buffer.refresh()
    asked(policy, buffer, range(43, 45))
    assert buffer.probes[-1] == buffer.probes[-2]  # there are enough


def test_given_to_another_buffer_it_starts_anew() -> None:
    first, second, policy = FakeBuffer(1000), FakeBuffer(30), OnDrift(1.0, check_every=10, probe_size=50)
    asked(policy, first, range(5))
    second.likelihood = -100.0
    second.refresh()
    assert asked(policy, second, range(5, 25)) == []
    assert max(second.probes[0]) < 30
    second.likelihood = -200.0
    assert asked(policy, second, range(25, 35)) == [30]
    assert asked(policy, first, range(35, 55)) == []


def test_a_look_that_fails_is_repeated() -> None:
    buffer, policy = FakeBuffer(), OnDrift(1.0, check_every=10)
    asked(policy, buffer, range(1))
    works = buffer.log_likelihood_of

    def fails(rows: Tensor) -> float:
        raise ValueError("diverged")

    buffer.log_likelihood_of = fails  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="diverged"):
        policy(1, buffer)  # type: ignore[arg-type]
    buffer.log_likelihood_of = works  # type: ignore[method-assign]
    buffer.likelihood = -9.0
    assert asked(policy, buffer, range(2, 25)) == []  # against the reference of step 2
    buffer.likelihood = -20.0
    assert asked(policy, buffer, range(25, 35)) == [30]


def test_drift_says_what_it_is() -> None:
    assert repr(OnDrift(0.5)) == "OnDrift(0.5, check_every=100, probe_size=512)"
    assert repr(OnDrift(2, check_every=3, probe_size=4)) == "OnDrift(2, check_every=3, probe_size=4)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0}, "threshold: expected a finite number above 0, got 0"),
        ({"threshold": -1.0}, "threshold: expected a finite number above 0, got -1.0"),
        ({"threshold": float("nan")}, "threshold: expected a finite number above 0, got nan"),
        ({"threshold": "1"}, "threshold: expected a number above 0, got '1'"),
        ({"check_every": 0}, "check_every: expected an integer of at least 1, got 0"),
        ({"probe_size": 0}, "probe_size: expected an integer of at least 1, got 0"),
        ({"probe_size": 1.5}, "probe_size: expected an integer of at least 1, got 1.5"),
        ({"seed": -1}, "seed: expected an integer of at least 0, got -1"),
    ],
)
def test_wrong_options_of_drift_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        OnDrift(**{"threshold": 1.0, **options})


# Drift, of a real buffer


def drifting(
    make_transitions: Callable[..., Transitions], make_critic: Callable[..., nn.Module], **options: Any
) -> tuple[ClusteredReplayBuffer, Any]:
    """A buffer that refreshes on drift, and the critic attached to it."""
    critic = make_critic(seed=1)
    options = {"refresh": OnDrift(1.0, check_every=5, probe_size=64), "n_clusters": 2, "seed": 0, **options}
    buffer = ClusteredReplayBuffer.from_transitions(make_transitions(300), **options)
    buffer.attach(Critics(critic, make_critic(seed=2)))
    return buffer, critic


def refreshed_at(buffer: ClusteredReplayBuffer, batches: int) -> list[int]:
    steps = []
    for step in range(batches):
        before = buffer.last_report
        buffer.sample(8)
        if buffer.last_report is not before:
            steps.append(step)
    return steps


@pytest.mark.parametrize("options", [{}, {"embedding": "features"}, {"max_dim": 4}, {"n_clusters": "auto"}])
def test_a_critic_that_stands_still_is_clustered_once_and_one_that_is_rescaled_again(
    options: dict[str, Any],
    make_transitions: Callable[..., Transitions],
    make_critic: Callable[..., nn.Module],
) -> None:
    buffer, critic = drifting(make_transitions, make_critic, **options)
    assert refreshed_at(buffer, 21) == [0]
    with torch.no_grad():
        rescaled = critic.first if options.get("embedding") == "features" else critic.last
        rescaled.weight.mul_(20)
    assert refreshed_at(buffer, 20) == [4]  # batch 25
    assert refreshed_at(buffer, 20) == []


def test_other_networks_put_in_place_of_the_first_are_drift(
    make_transitions: Callable[..., Transitions], make_critic: Callable[..., nn.Module]
) -> None:
    buffer, critic = drifting(make_transitions, make_critic, refresh=OnDrift(0.5, check_every=3))
    refreshed_at(buffer, 4)
    with torch.no_grad():
        critic.first.weight.copy_(make_critic(seed=9).first.weight * 3)
    assert refreshed_at(buffer, 6) == [2]


@pytest.mark.parametrize("embedding", ["gradients", "features", stacked_gradients])
def test_a_buffers_likelihood_is_that_of_the_embeddings_of_these_rows_as_they_are_now(
    embedding: Any, make_transitions: Callable[..., Transitions], make_critic: Callable[..., nn.Module]
) -> None:
    data = make_transitions(300)
    buffer, critic = drifting(make_transitions, make_critic, embedding=embedding)
    report = buffer.refresh()
    critics = Critics(critic, make_critic(seed=2))
    mixture = buffer.mixture
    assert mixture is not None
    read = stacked_features if embedding == "features" else stacked_gradients
    for rows in (torch.arange(300), torch.tensor([7]), torch.tensor([3, 3, 250])):
        expected = mixture.log_likelihood_of(read(critics, data[rows]))
        assert buffer.log_likelihood_of(rows) == pytest.approx(expected, rel=1e-5)
    assert buffer.log_likelihood_of(torch.arange(300)) == pytest.approx(report.log_likelihood, rel=1e-4)
    with torch.no_grad():
        critic.first.weight.mul_(3)
    moved = mixture.log_likelihood_of(read(critics, data[:50]))
    assert buffer.log_likelihood_of(torch.arange(50)) == pytest.approx(moved, rel=1e-5)
    assert buffer.mixture is mixture


def test_a_likelihood_needs_critics_and_a_refresh(
    make_transitions: Callable[..., Transitions], make_critic: Callable[..., nn.Module]
) -> None:
    buffer = ClusteredReplayBuffer.from_transitions(make_transitions(30), seed=0)
    with pytest.raises(ValueError, match="^critics: expected a Critics record, given or attached, got None"):
        buffer.log_likelihood_of(torch.arange(3))
    buffer.attach(Critics(make_critic(seed=1), make_critic(seed=2)))
    with pytest.raises(ValueError, match="^log_likelihood_of: expected a refresh before it, got no clusters"):
        buffer.log_likelihood_of(torch.arange(3))


def test_drift_needs_a_clusterer_with_a_likelihood(
    make_transitions: Callable[..., Transitions], make_critic: Callable[..., nn.Module]
) -> None:
    class Halves:
        def __call__(self, embeddings: Tensor, previous: Tensor | None) -> Tensor:
            return torch.full((len(embeddings), 2), 0.5)

    message = "clusterer: expected one with log_likelihood_of(embeddings), by which OnDrift decides, got Halves"
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        drifting(make_transitions, make_critic, clusterer=Halves())
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        drifting(make_transitions, make_critic, clusterer=ReducedClusterer(Halves()))
    buffer, _ = drifting(make_transitions, make_critic, refresh=None, clusterer=Halves())
    buffer.sample(8)
    with pytest.raises(
        ValueError, match="^" + re.escape("clusterer: expected one with log_likelihood_of(embeddings), got")
    ):
        buffer.log_likelihood_of(torch.arange(3))


def test_drift_between_a_refresh_and_the_next_batch_is_seen(
    make_transitions: Callable[..., Transitions], make_critic: Callable[..., nn.Module]
) -> None:
    for refreshes_itself in (True, False):
        buffer, critic = drifting(make_transitions, make_critic, refresh=OnDrift(1.0, check_every=1))
        if refreshes_itself:
            buffer.sample(8)
        else:
            buffer.refresh()
        report = buffer.last_report
        for parameter in critic.parameters():
            parameter.data *= 3
        buffer.sample(8)
        assert buffer.last_report is not report


def test_a_warm_clusterer_and_one_policy_for_two_buffers(
    make_transitions: Callable[..., Transitions], make_critic: Callable[..., nn.Module]
) -> None:
    policy = OnDrift(1.0, check_every=5, probe_size=64)
    buffers = [
        drifting(make_transitions, make_critic, refresh=policy, clusterer=MixtureClusterer(2))[0] for _ in range(2)
    ]
    assert [refreshed_at(buffer, 11) for buffer in (*buffers, *buffers)] == [[0], [0], [], []]


def test_a_ring_whose_rows_are_all_new_is_due_at_once_and_drift_goes_on_from_there(
    make_transitions: Callable[..., Transitions], make_critic: Callable[..., nn.Module]
) -> None:
    buffer, critic = drifting(make_transitions, make_critic)
    assert refreshed_at(buffer, 3) == [0]
    buffer.extend(make_transitions(300, seed=9))
    assert refreshed_at(buffer, 1) == [0]
    assert refreshed_at(buffer, 17) == []
    with torch.no_grad():
        critic.last.weight.mul_(20)
    assert refreshed_at(buffer, 10) == [4]  # batch 25


def test_rows_of_another_kind_in_the_places_of_the_probe_are_drift(
    make_transitions: Callable[..., Transitions], make_critic: Callable[..., nn.Module]
) -> None:
    buffer, _ = drifting(make_transitions, make_critic, refresh=OnDrift(1.0, check_every=1, probe_size=64))
    assert refreshed_at(buffer, 5) == [0]
    like = make_transitions(150, seed=3)
    buffer.extend(like)
    assert refreshed_at(buffer, 5) == []
    assert isinstance(like.observations, Tensor)
    buffer.extend(like.replace(actions=4 * like.actions, observations=4 * like.observations))
    assert refreshed_at(buffer, 5) == [0]


def test_saved_right_after_a_refresh_it_takes_the_new_reference_when_it_is_loaded() -> None:
    buffer, policy = FakeBuffer(), OnDrift(1.0, check_every=10)
    asked(policy, buffer, range(5))
    buffer.likelihood = -5.0
    assert asked(policy, buffer, range(5, 11)) == [10]
    resumed = OnDrift(**policy.options())
    resumed.load_state_dict(policy.state_dict(), buffer)  # type: ignore[arg-type]
    for each in (policy, resumed):
        assert asked(each, buffer, range(11, 41), refresh=False) == []


def test_an_interrupted_refresh_leaves_clusters_and_mixture_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    buffer = ClusteredReplayBuffer.from_transitions(numbered(60), n_clusters=2, seed=0)
    q = nn.Bilinear(1, 1, 1)
    buffer.refresh(Critics(q, q))
    mixture, before = buffer.mixture, buffer.responsibilities
    monkeypatch.setattr(buffer._rows.sampler, "assign", interrupted)
    with pytest.raises(KeyboardInterrupt):
        buffer.refresh(Critics(nn.Bilinear(1, 1, 1), q))
    assert mixture is not None
    assert buffer.mixture is not None
    assert torch.equal(buffer.mixture.means, mixture.means)
    assert torch.equal(buffer.responsibilities, before)


def test_a_clusterer_that_fails_after_it_found_a_mixture_keeps_the_one_before(
    make_transitions: Callable[..., Transitions], make_critic: Callable[..., nn.Module]
) -> None:
    class Failing(MixtureClusterer):
        fails = False

        def __call__(self, embeddings: Tensor, previous: Tensor | None = None) -> Tensor:
            found = super().__call__(embeddings, previous)
            if self.fails:
                raise RuntimeError("of its own")
            return found

    clusterer = Failing(2)
    buffer, critic = drifting(make_transitions, make_critic, refresh=None, clusterer=clusterer)
    buffer.sample(8)
    before, mixture = copy.deepcopy(buffer), buffer.mixture
    clusterer.fails = True
    with pytest.raises(RuntimeError, match="of its own"):
        buffer.refresh(Critics(make_critic(5, seed=7), critic))
    assert mixture is not None
    assert buffer.mixture is not None
    assert torch.equal(buffer.mixture.means, mixture.means)
    for _ in range(5):
        assert torch.equal(buffer.sample(8).observations, before.sample(8).observations)
