"""Checkpoints: whole or not at all, nothing damaged is taken, and the batches go on as if nothing had happened."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from c4buffer import (
    ClusteredReplayBuffer,
    CovariancePenalty,
    Critics,
    Every,
    GaussianMixture,
    MixtureClusterer,
    OnDrift,
    ReducedClusterer,
    SklearnClusterer,
    Transitions,
    checkpoint,
)

from .conftest import numbered

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "without replacement": {"replacement": False},
    "hard": {"assignment": "hard", "refresh": Every(7)},
    "tails": {"trajectory_tail": True},
    "on drift": {"refresh": OnDrift(0.05, check_every=3, probe_size=50)},
    "reduced": {"max_dim": 5},
    "auto": {"n_clusters": "auto"},
    "many": {"n_clusters": 6},
}


def transitions(rows: int = 400, *, seed: int = 0) -> Transitions:
    generator = torch.Generator().manual_seed(seed)
    return Transitions(
        observations=torch.randn(rows, 3, generator=generator),
        actions=torch.randn(rows, 2, generator=generator),
        rewards=torch.randn(rows, generator=generator),
        next_observations=torch.randn(rows, 3, generator=generator),
        terminals=(torch.rand(rows, generator=generator) < 0.05).float(),
    )


def critics() -> Critics:
    torch.manual_seed(0)
    return Critics(nn.Bilinear(3, 2, 1), nn.Bilinear(3, 2, 1))


def buffer_of(**options: Any) -> ClusteredReplayBuffer:
    buffer = ClusteredReplayBuffer.from_transitions(transitions(), capacity=600, seed=1, **options)
    buffer.attach(critics())
    return buffer


def same(a: Transitions, b: Transitions) -> bool:
    pairs = zip(a.columns(), b.columns())
    return a.cluster == b.cluster and all(torch.equal(x, y) for (_, x), (_, y) in pairs)


def assert_goes_on(buffer: ClusteredReplayBuffer, twin: ClusteredReplayBuffer, *, batches: int = 30) -> None:
    for batch in range(batches):
        assert same(buffer.sample(64), twin.sample(64)), batch
        if batch == 10:
            for each in (buffer, twin):
                each.extend(transitions(300, seed=2))  # around the ring's end


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("batches", [0, 1, 12])
def test_batches_go_on_bit_for_bit_in_the_middle_of_a_block(case: str, batches: int, tmp_path: Path) -> None:
    buffer = buffer_of(**OPTIONS[case])
    for _ in range(batches):
        buffer.sample(64)
    buffer.save(tmp_path / "buffer")
    twin = ClusteredReplayBuffer.load(tmp_path / "buffer")
    twin.attach(critics())
    assert twin.last_report == buffer.last_report
    assert_goes_on(buffer, twin)


def test_the_steps_of_environments_are_linked_across_a_checkpoint(tmp_path: Path) -> None:
    def step(buffer: ClusteredReplayBuffer, number: int) -> None:
        value = torch.full((2, 1), float(number))
        buffer.add(value, value, value[:, 0], value + 1, torch.zeros(2), torch.tensor([0.0, float(number % 3 == 0)]))

    buffer = ClusteredReplayBuffer(50, seed=0, trajectory_tail=True)
    step(buffer, 1)
    buffer.save(tmp_path / "buffer")
    twin = ClusteredReplayBuffer.load(tmp_path / "buffer")
    for number in range(2, 9):
        step(buffer, number)
        step(twin, number)
    for (name, x), (_, y) in zip(buffer.sample(200).columns(), twin.sample(200).columns()):
        assert torch.equal(x, y), name


def test_observations_of_every_form_come_back(tmp_path: Path) -> None:
    def data(observations: Any) -> Transitions:
        rows = torch.arange(20)
        return Transitions(
            observations=observations,
            actions=rows % 3,
            rewards=rows.double(),
            next_observations=observations,
            terminals=torch.zeros(20),
        )

    images = torch.randint(0, 256, (20, 2, 4, 4), dtype=torch.uint8)
    for observations in (images, {"image": images, "speed": torch.randn(20, 3)}, (torch.randn(20, 1), images)):
        buffer = ClusteredReplayBuffer.from_transitions(data(observations), seed=0)
        buffer.save(tmp_path / "buffer")
        a, b = buffer.sample(9), ClusteredReplayBuffer.load(tmp_path / "buffer").sample(9)
        torch.testing.assert_close(dict(a.columns()), dict(b.columns()), rtol=0, atol=0)


def trained(batches: int, stops: set[int], path: Path) -> tuple[list[Tensor], list[Tensor]]:
    """Indices of all batches, and the parameters at the end, of a training that is saved and loaded at `stops`."""
    torch.manual_seed(0)
    q, target = nn.Bilinear(3, 2, 1), nn.Bilinear(3, 2, 1)
    optimizer = torch.optim.SGD(q.parameters(), lr=0.01)
    penalty = CovariancePenalty(0.1, scale="relative")
    buffer = buffer_of(refresh=Every(60))
    buffer.attach(Critics(q, target))
    drawn = []
    for step in range(batches):
        if step in stops:
            buffer.save(path)
            buffer = ClusteredReplayBuffer.load(path)
            buffer.attach(Critics(q, target))
        batch = buffer.sample(32)
        drawn.append(batch.indices)
        loss = (q(batch.observations, batch.actions).squeeze(1) - batch.rewards).square().mean()
        optimizer.zero_grad()
        (loss + penalty(Critics(q, target), batch)).backward()
        optimizer.step()
    return drawn, list(q.parameters())


def test_training_interrupted_at_ten_points_gives_the_same_batches_and_parameters(tmp_path: Path) -> None:
    expected, parameters = trained(500, set(), tmp_path / "buffer")
    stops = set(random.Random(0).sample(range(1, 500), 10))
    found, resumed = trained(500, stops, tmp_path / "buffer")
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert all(torch.equal(a, b) for a, b in zip(resumed, parameters))


# What no file can hold


def test_own_callables_are_asked_for_again(tmp_path: Path) -> None:
    from sklearn.cluster import KMeans

    options: dict[str, Any] = {
        "embedding": lambda _, batch: batch.observations,
        "clusterer": SklearnClusterer(KMeans(3, n_init=1, random_state=0)),
        "refresh": lambda step, _: step % 5 == 0,
    }
    buffer = buffer_of(**options)
    buffer.sample(64)
    buffer.save(tmp_path / "buffer")
    for missing in options:
        given = {name: value for name, value in options.items() if name != missing}
        with pytest.raises(ValueError, match=f"^{missing}: expected to be given, .* got nothing$"):
            ClusteredReplayBuffer.load(tmp_path / "buffer", **given)
    twin = ClusteredReplayBuffer.load(tmp_path / "buffer", **options)
    twin.attach(critics())
    assert_goes_on(buffer, twin)


def test_options_are_those_of_a_clusterer_that_reduces_itself() -> None:
    options: dict[str, Any] = {"refresh": None, "max_dim": 9}
    buffers = [
        buffer_of(clusterer=ReducedClusterer(MixtureClusterer(3), max_dim=4, reduction=reduction), **options)
        for reduction in ("pca", "projection")
    ]
    buffers[1].load_state_dict(buffers[1].state_dict())
    with pytest.raises(ValueError, match="^reduction: expected 'pca', as in the state, got 'projection'"):
        buffers[1].load_state_dict(buffers[0].state_dict())


class Named(ClusteredReplayBuffer):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)


def test_a_subclass_that_takes_any_option_is_loaded_with_some(tmp_path: Path) -> None:
    Named(10, seed=0).save(tmp_path / "buffer")
    assert isinstance(Named.load(tmp_path / "buffer", seed=3), Named)
    with pytest.raises(TypeError, match="capacite"):
        Named.load(tmp_path / "buffer", capacite=3)


def test_an_option_that_is_none_of_a_constructors_is_not_the_files_fault(tmp_path: Path) -> None:
    buffer_of().save(tmp_path / "buffer")
    with pytest.raises(TypeError, match="NoneType"):
        ClusteredReplayBuffer.load(tmp_path / "buffer", device=None)


def test_a_warm_clusterer_of_the_callers_own_starts_where_it_was(tmp_path: Path) -> None:
    buffer = buffer_of(clusterer=MixtureClusterer(2), refresh=Every(5))
    for _ in range(7):
        buffer.sample(64)
    buffer.save(tmp_path / "buffer")
    twin = ClusteredReplayBuffer.load(tmp_path / "buffer", clusterer=MixtureClusterer(2))
    twin.attach(critics())
    assert_goes_on(buffer, twin)


# What does not fit


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("capacity", 601),
        ("n_clusters", 4),
        ("embedding", "features"),
        ("max_dim", 7),
        ("reduction", "pca"),
        ("assignment", "hard"),
        ("replacement", False),
        ("trajectory_tail", True),
    ],
)
def test_a_state_of_other_options_is_refused_and_nothing_changes(name: str, value: Any) -> None:
    state = buffer_of().state_dict()
    other, twin = (
        ClusteredReplayBuffer(**{"capacity": 600, "seed": 5, "n_clusters": 3, name: value}) for _ in range(2)
    )
    for each in (other, twin):
        each.extend(transitions(seed=3))
    with pytest.raises(ValueError, match=f"^{name}: expected .* as in the state, got"):
        other.load_state_dict(state)
    assert same(other.sample(64), twin.sample(64))


def without(tree: Any, path: tuple[Any, ...], value: Any = None, *, drop: bool = False) -> Any:
    """A copy of nested dicts and lists, changed in one place."""
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    if len(path) > 1:
        copy[path[0]] = without(tree[path[0]], path[1:], value, drop=drop)
    elif drop:
        del copy[path[0]]
    else:
        copy[path[0]] = value
    return copy


DAMAGES: dict[str, Callable[[Any], Any]] = {
    "no storage": lambda s: without(s, ("storage",), drop=True),
    "no sampler": lambda s: without(s, ("sampler",), drop=True),
    "rows of another width": lambda s: without(s, ("storage", "rows", "float32"), torch.zeros(400, 2)),
    "fewer rows": lambda s: without(s, ("storage", "rows", "float32"), s["storage"]["rows"]["float32"][:5]),
    "an unknown dtype": lambda s: without(s, ("storage", "form", "rewards", "dtype"), "nonsense"),
    "a shape that fits no memory": lambda s: without(s, ("storage", "form", "rewards", "shape"), [10**15]),
    "indices out of range": lambda s: without(s, ("sampler", "ahead_rows"), [torch.tensor([400])]),
    "indices of another dtype": lambda s: without(s, ("sampler", "ahead_rows"), [torch.tensor([0.5])]),
    "another generator": lambda s: without(s, ("sampler", "generator"), torch.zeros(3, dtype=torch.uint8)),
    "clusters of other rows": lambda s: without(s, ("sampler", "partition", "r"), torch.ones(3, 7)),
    "sums of other clusters": lambda s: without(s, ("sampler", "partition", "sums"), torch.ones(2)),
    "no cluster": lambda s: without(s, ("sampler", "partition", "ids"), torch.empty(0, dtype=torch.int64)),
    "no columns": lambda s: without(s, ("storage", "form"), {}),
    "no rewards": lambda s: without(s, ("storage", "form", "rewards"), drop=True),
    "no squares": lambda s: without(s, ("sampler", "partition", "squares")),
    "sums in single precision": lambda s: without(s, ("sampler", "partition", "sums"), torch.ones(3)),
    "whole responsibilities": lambda s: without(s, ("sampler", "partition", "r"), torch.ones(3, 400).long()),
    "labels where rows are in several": lambda s: without(
        s, ("sampler", "partition", "labels"), torch.ones(400).long()
    ),
    "another size": lambda s: without(s, ("sampler", "size"), 12),
    "counters of text": lambda s: without(s, ("batches",), "many"),
    "a report of other fields": lambda s: without(s, ("report",), {"sizes": 1}),
    "a mixture of other fields": lambda s: without(s, ("clusterer", "clusterer", "mixture"), {"weight": 1}),
    "a list": lambda s: [],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_state_that_does_not_fit_itself_is_refused_and_nothing_changes(damage: str) -> None:
    buffer, twin = buffer_of(), buffer_of()
    for each in (buffer, twin):
        each.sample(64)
    state = DAMAGES[damage](buffer_of().state_dict() | {"sampler": buffer.state_dict()["sampler"]})
    if damage in ("a report of other fields", "a mixture of other fields"):
        state = DAMAGES[damage](buffer.state_dict())
    with pytest.raises(ValueError, match=": "):
        buffer.load_state_dict(state)
    assert_goes_on(buffer, twin, batches=5)


# Damaged files


def refused(path: Path) -> bool:
    began = time.perf_counter()
    with pytest.raises(ValueError, match="^path: expected"):
        ClusteredReplayBuffer.load(path)
    return time.perf_counter() - began < 1


def test_two_thousand_damaged_files_are_refused(tmp_path: Path) -> None:
    buffer = buffer_of()
    buffer.sample(64)
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    buffer.save(whole)
    content = whole.read_bytes()
    draw = random.Random(0)
    header = 8 + struct.unpack("<Q", content[:8])[0]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in range(2000):
        changed = bytearray(content)
        if case % 4 == 0:
            changed = changed[: draw.randrange(len(changed))]
        else:
            reach = (8, header, len(content))[case % 4 - 1]  # the length, the header, anywhere
            for _ in range(draw.choice((1, 1, 3, 100))):
                changed[draw.randrange(reach)] ^= 1 << draw.randrange(8)
        if bytes(changed) == content:
            continue
        damaged.write_bytes(changed)
        assert refused(damaged), case
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 * 1024  # KiB


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**40),
        struct.pack("<Q", 99_000_000) + b"{" + b" " * 100,
        b"",
        b"not one of ours at all",
    ],
)
def test_hostile_headers_are_refused(header: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(header)
    assert refused(tmp_path / "file")


@pytest.mark.parametrize("claim", ["tensor", "capacity"])
def test_files_that_claim_huge_sizes_with_a_right_checksum_are_refused(claim: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    state = buffer_of().state_dict()
    if claim == "capacity":
        state["options"]["capacity"] = 10**14
        state["storage"]["capacity"] = 10**14
    checkpoint.save(path, "ClusteredReplayBuffer", state)
    if claim != "capacity":
        content = path.read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + size])
        name = next(key for key in header if key != "__metadata__")
        header[name]["shape"] = [2**40]
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
        assert refused(path)
    else:
        with pytest.raises(ValueError, match="^capacity: expected one whose rows fit the memory"):
            ClusteredReplayBuffer.load(path)


def test_files_of_another_kind_version_or_maker_are_refused_by_name(tmp_path: Path, monkeypatch: Any) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "file"
    checkpoint.save(path, "Something", {"a": 1})
    with pytest.raises(ValueError, match="kind 'ClusteredReplayBuffer', got 'Something'"):
        ClusteredReplayBuffer.load(path)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="^path: expected a file of c4buffer, got another one"):
        ClusteredReplayBuffer.load(path)
    monkeypatch.setattr(checkpoint, "VERSION", 9)
    buffer_of().save(path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=f"version {checkpoint.VERSION}, got 9"):
        ClusteredReplayBuffer.load(path)
    with pytest.raises(FileNotFoundError):
        ClusteredReplayBuffer.load(tmp_path / "nothing")


def test_only_tensors_and_plain_values_are_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^state.a.1: expected a tensor, .* got GaussianMixture$"):
        checkpoint.save(tmp_path / "file", "kind", {"a": [1, GaussianMixture(2)]})
    assert list(tmp_path.iterdir()) == []


# Saving that fails


@pytest.mark.parametrize("case", OPTIONS)
def test_a_state_does_not_change_with_the_buffer_that_gave_it(case: str) -> None:
    buffer = buffer_of(**OPTIONS[case])
    buffer.attach(critics())
    for _ in range(5):
        buffer.sample(16)
    state = buffer.state_dict()
    expected = [buffer.sample(16).indices for _ in range(20)]
    rows = buffer.state_dict()["storage"]["rows"]
    buffer.extend(transitions(300, seed=1))
    buffer.refresh()
    buffer.load_state_dict(state)
    assert all(torch.equal(buffer.state_dict()["storage"]["rows"][name], part) for name, part in rows.items())
    for indices in expected:
        assert torch.equal(buffer.sample(16).indices, indices)


SAVER = """
import sys, torch
from c4buffer import ClusteredReplayBuffer, Transitions
rows = torch.zeros(3000, 4)
buffer = ClusteredReplayBuffer(3000, seed=0)
buffer.extend(Transitions(observations=rows, actions=rows, rewards=rows[:, 0], next_observations=rows,
                          terminals=rows[:, 0]))
number = 0
while True:
    number += 1
    buffer._rows.batches = number
    buffer.save(sys.argv[1])
    print(number, flush=True)
"""


@pytest.mark.parametrize("kills", [3])
def test_a_process_killed_while_it_saves_leaves_one_of_the_last_two_states(kills: int, tmp_path: Path) -> None:
    path = tmp_path / "buffer"
    draw = random.Random(0)
    for _ in range(kills * int(os.environ.get("C4BUFFER_KILLS", "1"))):
        command = [sys.executable, "-c", SAVER, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as saver:
            assert saver.stdout is not None
            saver.stdout.readline()
            time.sleep(draw.uniform(0, 0.2))
            saver.send_signal(signal.SIGKILL)
            printed = saver.stdout.read().split()
        last = int(printed[-1]) if printed else 1
        assert ClusteredReplayBuffer.load(path)._rows.batches in (last, last + 1)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "buffer"
    buffer_of().save(path)
    old = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, hard))
    try:
        with pytest.raises(OSError, match="buffer"):
            buffer_of().save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["buffer"]


@pytest.mark.parametrize("refusal", ["open", "replace"])
def test_a_folder_that_refuses_leaves_the_old_file(refusal: str, tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "buffer"
    buffer_of().save(path)
    old = path.read_bytes()

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(checkpoint.os, refusal, refuse)
    with pytest.raises(PermissionError):
        buffer_of().save(path)
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["buffer"]


def test_a_missing_folder_is_the_systems_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        buffer_of().save(tmp_path / "nowhere" / "buffer")


def test_a_new_file_has_the_usual_permissions_and_an_old_one_keeps_its_own(tmp_path: Path) -> None:
    path, usual = tmp_path / "buffer", tmp_path / "usual"
    usual.write_text("")
    buffer_of().save(path)
    assert path.stat().st_mode == usual.stat().st_mode
    path.chmod(0o600)
    buffer_of().save(path)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("policy", [{}, {"probe": None}, {"probe": torch.tensor([999])}, {"reference": "x"}])
def test_a_policy_that_does_not_fit_is_refused_and_nothing_changes(policy: dict[str, Any]) -> None:
    buffer, other = (buffer_of(refresh=OnDrift(0.05, check_every=3, probe_size=50)) for _ in range(2))
    for each in (buffer, other):
        for _ in range(5):
            each.sample(64)
    state = other.state_dict()
    twin = buffer_of(refresh=OnDrift(0.05, check_every=3, probe_size=50))
    twin.load_state_dict(buffer.state_dict())
    with pytest.raises(ValueError, match="state|probe|reference"):
        twin.load_state_dict({**state, "policy": policy and {**state["policy"], **policy}})
    assert_goes_on(buffer, twin)


def test_drift_starts_anew_with_the_state_of_a_buffer_that_had_another_policy() -> None:
    buffer = buffer_of(refresh=OnDrift(0.05, probe_size=300))
    for _ in range(3):
        buffer.sample(64)
    small = ClusteredReplayBuffer.from_transitions(transitions(30), capacity=600, seed=1)
    small.refresh(critics())
    buffer.load_state_dict(small.state_dict())
    for _ in range(3):
        assert len(buffer.sample(8)) == 8


def test_tails_of_a_loaded_state_are_its_own() -> None:
    buffer, twin = (buffer_of(trajectory_tail=True) for _ in range(2))
    buffer.sample(64)
    state = buffer.state_dict()
    twin.load_state_dict(state)
    for part in state["sampler"]["trajectories"]:
        part.fill_(0)
    again = buffer_of(trajectory_tail=True)
    again.sample(64)
    twin.extend(transitions(50, seed=3))
    again.extend(transitions(50, seed=3))
    assert torch.equal(twin.sample(64).indices, again.sample(64).indices)


def test_a_loaded_mixture_of_another_covariance_is_no_start(tmp_path: Path) -> None:
    buffer = buffer_of(clusterer=MixtureClusterer(3))
    buffer.sample(64)
    buffer.save(tmp_path / "buffer")
    twin = ClusteredReplayBuffer.load(tmp_path / "buffer", clusterer=MixtureClusterer(3, covariance="diag"))
    twin.refresh(critics())
    assert twin.mixture is not None
    assert twin.mixture.covariance == "diag"


def test_a_clusterers_own_generator_goes_on_where_it_stood(tmp_path: Path) -> None:
    def clusterer() -> MixtureClusterer:
        generator = torch.Generator().manual_seed(5)
        return MixtureClusterer(4, generator=generator, warm_start=False, max_iterations=1)

    buffer = buffer_of(clusterer=clusterer())
    buffer.refresh()
    buffer.save(tmp_path / "buffer")
    twin = ClusteredReplayBuffer.load(tmp_path / "buffer", clusterer=clusterer())
    twin.attach(critics())
    for each in (buffer, twin):
        each.refresh()
    assert torch.equal(buffer.responsibilities, twin.responsibilities)


@pytest.mark.parametrize(("options", "named"), [({"capacite": 1}, "capacite")])
def test_options_that_a_file_has_or_nobody_knows_are_refused(options: Any, named: str, tmp_path: Path) -> None:
    buffer_of().save(tmp_path / "buffer")
    with pytest.raises(ValueError, match=rf"^options: expected names among capacity, .*, got {named}$"):
        ClusteredReplayBuffer.load(tmp_path / "buffer", **options)


def test_names_that_look_alike_in_a_file_are_kept_apart(tmp_path: Path) -> None:
    state = {"a.b": torch.ones(2), "a": {"b": torch.zeros(3)}}
    checkpoint.save(tmp_path / "file", "kind", state)
    loaded = checkpoint.load(tmp_path / "file", "kind")
    assert loaded["a.b"].tolist() == [1, 1]
    assert loaded["a"]["b"].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="^state: expected keys that are strings, got 3$"):
        checkpoint.save(tmp_path / "file", "kind", {3: 1})


def test_a_loaded_buffer_holds_nothing_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "buffer"
    buffer = buffer_of(max_dim=5)
    buffer.refresh()
    buffer.save(path)
    loaded = ClusteredReplayBuffer.load(path)
    means = loaded.mixture.means.clone()
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(loaded.mixture.means, means)


def test_a_link_goes_on_leading_to_the_file_that_is_saved(tmp_path: Path) -> None:
    link, target = tmp_path / "link", tmp_path / "elsewhere" / "buffer"
    target.parent.mkdir()
    link.symlink_to(target)
    for _ in range(2):
        buffer_of().save(link)
        assert link.is_symlink()
        assert len(ClusteredReplayBuffer.load(target)) == 400


def test_a_counter_that_is_no_number_is_refused() -> None:
    buffer = ClusteredReplayBuffer.from_transitions(numbered(), seed=0)
    with pytest.raises(ValueError, match="^state: expected what state_dict gave, got OverflowError"):
        buffer.load_state_dict(buffer.state_dict() | {"batches": math.inf})


def test_clusters_of_other_rows_than_those_stored_are_refused() -> None:
    buffer, other = (ClusteredReplayBuffer(20, seed=0) for _ in range(2))
    buffer.extend(numbered(20))
    other.extend(numbered(12))
    state = buffer.state_dict() | {"storage": other.state_dict()["storage"]}
    with pytest.raises(ValueError, match="^state: expected clusters of the 12 transitions held, got 20$"):
        buffer.load_state_dict(state)


def test_a_policy_that_is_made_from_ours_is_the_callers_own(tmp_path: Path) -> None:
    class Once(Every):
        def __call__(self, step: int, buffer: Any) -> bool:
            return step == 0

    ClusteredReplayBuffer.from_transitions(numbered(), refresh=Once(3)).save(tmp_path / "buffer")
    with pytest.raises(ValueError, match="^refresh: expected to be given, as the saved buffer had its own"):
        ClusteredReplayBuffer.load(tmp_path / "buffer")
    assert len(ClusteredReplayBuffer.load(tmp_path / "buffer", refresh=Once(3))) == 20


def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*paths: Any) -> None:
        raise KeyboardInterrupt

    checkpoint.save(tmp_path / "file", "number", {"x": torch.ones(2)})
    monkeypatch.setattr(checkpoint.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path / "file", "number", {"x": torch.zeros(2)})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert checkpoint.load(tmp_path / "file", "number")["x"].tolist() == [1, 1]


def test_a_document_without_a_bottom_is_refused(tmp_path: Path) -> None:
    document = "[" * 100_000
    digest = hashlib.blake2b(document.encode()).hexdigest()
    metadata = {"format": checkpoint.FORMAT, "document": document, "digest": digest}
    save_file({"x": torch.zeros(1)}, tmp_path / "file", metadata)
    with pytest.raises(ValueError, match="^path: expected a file that was saved whole"):
        ClusteredReplayBuffer.load(tmp_path / "file")


@pytest.mark.parametrize("change", [lambda x: x.reshape(3, 2), lambda x: x.view(torch.int32)])
def test_tensors_of_the_same_bytes_in_another_form_are_refused(change: Any, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "file", "numbers", {"x": torch.arange(6.0).view(2, 3)})
    with safe_open(tmp_path / "file", framework="pt") as file:
        metadata, names = file.metadata(), file.keys()
        tensors = {name: change(file.get_tensor(name)) for name in names}
    save_file(tensors, tmp_path / "file", metadata)
    with pytest.raises(ValueError, match="^path: expected an undamaged file, got one with damaged tensors"):
        checkpoint.load(tmp_path / "file", "numbers")
