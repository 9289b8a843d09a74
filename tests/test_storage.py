"""The ring: what it holds after any writes, what it refuses, and that nothing drawn from it is a view."""

from __future__ import annotations

import copy
import errno
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import c4buffer.storage as storage_file
from c4buffer import ClusteredReplayBuffer, Transitions
from c4buffer.files import own_folder
from c4buffer.observations import observation_leaves
from c4buffer.storage import RingStorage

from .conftest import numbered

CPU = torch.device("cpu")


def counted(start: int, count: int, **fields: Any) -> Transitions:
    """Rows start, start + 1, ...: every field tells its row."""
    row = torch.arange(start, start + count)
    columns: dict[str, Any] = {
        "observations": torch.stack([row, -row], dim=1).float(),
        "actions": row.float().unsqueeze(1) + 0.5,
        "rewards": row.float() * 10,
        "next_observations": torch.stack([row, -row], dim=1).float() + 1,
        "terminals": (row % 3 == 2).float(),
        "timeouts": (row % 3 != 2).float(),  # every row is an end, so that none is closed on the way
        "next_actions": row.float().unsqueeze(1) + 0.25,
        "has_next_actions": (row % 2).float(),
        "intervals": (row % 4 + 1).float(),
    }
    return Transitions(**{**columns, **fields})


def images(start: int, count: int) -> Tensor:
    return torch.arange(start, start + count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 2, 3, 3).contiguous()


FORMS: dict[str, Any] = {
    "vector": lambda start, count: counted(start, count).observations,
    "uint8 image": images,
    "dict": lambda start, count: {"b": images(start, count), "a": counted(start, count).observations},
    "tuple": lambda start, count: (counted(start, count).observations, images(start, count)),
}


def in_form(form: str, start: int, count: int, **fields: Any) -> Transitions:
    return counted(
        start, count, observations=FORMS[form](start, count), next_observations=FORMS[form](start + 1, count), **fields
    )


def leaves(transitions: Transitions) -> list[Tensor]:
    return [leaf for _, value in transitions.columns() for leaf in observation_leaves(value)]


def assert_same_rows(one: Transitions, other: Transitions) -> None:
    assert len(leaves(one)) == len(leaves(other))
    for a, b in zip(leaves(one), leaves(other)):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def everything(storage: RingStorage) -> Transitions:
    return storage.gather(torch.arange(len(storage)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(capacity=st.integers(1, 8), counts=st.lists(st.integers(1, 20), min_size=1, max_size=8))
def test_ring_holds_what_a_plain_list_holds_over_any_wraps(capacity: int, counts: list[int]) -> None:
    storage = RingStorage(capacity, device=CPU)
    oracle: list[int] = []  # the row in each slot
    written = 0
    for count in counts:
        slots = storage.write(counted(written, count))
        for row in range(written, written + count):
            if row < capacity:
                oracle.append(row)
            else:
                oracle[row % capacity] = row
        last = range(max(written, written + count - capacity), written + count)
        assert slots.tolist() == [row % capacity for row in last]
        written += count
        assert len(storage) == len(oracle) == min(written, capacity)
        expected = counted(0, written)[torch.tensor(oracle)]
        assert_same_rows(everything(storage), expected)
        assert_same_rows(storage.rows(0, len(storage)), expected)
        assert [row for row in range(written + 1) if storage.holds(row)] == sorted(oracle)


@pytest.fixture
def from_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rings that grow begin with a single row."""
    monkeypatch.setattr(storage_file, "FEWEST_ROWS", 1)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("counts", [[1] * 20, [3, 1, 5, 2, 1, 1, 6], [2, 40, 3], [11, 11], [1, 10, 1]])
def test_a_growing_ring_holds_what_a_whole_one_holds(
    counts: list[int], form: str, mapped: bool, tmp_path: Path, from_one_row: None
) -> None:
    whole = RingStorage(11, device=CPU)
    growing = RingStorage(11, device=CPU, growing=True, folder=tmp_path if mapped else None)
    written = 0
    for count in counts:
        rows = in_form(form, written, count)
        assert torch.equal(growing.write(rows), whole.write(rows))
        written += count
        if written % 2:
            for ring in (growing, whole):
                ring.link(written - 1, torch.tensor([0.125]))
        assert_same_rows(everything(growing), everything(whole))
        assert_same_rows(growing.rows(0, len(growing)), whole.rows(0, len(whole)))
        assert len(growing) <= growing.room <= min(11, max(2 * len(growing), 1))
        assert_same_state(growing.state(), whole.state())


def assert_same_state(one: Any, other: Any) -> None:
    assert {**one, "rows": None} == {**other, "rows": None}
    assert one["rows"].keys() == other["rows"].keys()
    for name, rows in one["rows"].items():
        assert torch.equal(rows, other["rows"][name])


def test_a_growing_ring_doubles_its_room_up_to_the_capacity(from_one_row: None) -> None:
    ring = RingStorage(11, device=CPU, growing=True)
    rooms = []
    for row in range(14):
        ring.write(counted(row, 1))
        rooms.append(ring.room)
    assert rooms == [1, 2, 4, 4, 8, 8, 8, 8, *[11] * 6]


def test_a_growing_ring_allocates_little_for_a_huge_capacity() -> None:
    ring = RingStorage(1 << 50, device=CPU, growing=True)
    ring.write(in_form("uint8 image", 0, 3))
    assert ring.room == storage_file.FEWEST_ROWS
    assert_same_rows(everything(ring), in_form("uint8 image", 0, 3))
    other = RingStorage(1 << 50, device=CPU, growing=True)
    other.restore(ring.state())
    assert other.room == storage_file.FEWEST_ROWS
    assert_same_rows(everything(other), everything(ring))


@pytest.mark.parametrize("fails_at", [0, 1])
def test_a_ring_that_can_not_grow_is_as_it_was(
    fails_at: int, from_one_row: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = RingStorage(11, device=CPU, growing=True)
    ring.write(in_form("uint8 image", 0, 4))
    before = everything(ring)
    allocated, calls = RingStorage._allocated, iter(range(9))

    def scarce(ring: RingStorage, *arguments: Any) -> Tensor:
        if next(calls) == fails_at:
            raise RuntimeError("not enough memory")
        return allocated(ring, *arguments)

    monkeypatch.setattr(RingStorage, "_allocated", scarce)
    with pytest.raises(RuntimeError, match="not enough memory"):
        ring.write(in_form("uint8 image", 4, 1))
    monkeypatch.undo()
    assert len(ring) == ring.written == ring.room == 4
    assert_same_rows(everything(ring), before)
    ring.write(in_form("uint8 image", 4, 9))
    assert_same_rows(everything(ring), in_form("uint8 image", 0, 13)[torch.tensor([11, 12, *range(2, 11)])])


def test_every_byte_of_a_file_outlasts_its_growth(tmp_path: Path, from_one_row: None) -> None:
    ring = RingStorage(8, device=CPU, growing=True, folder=tmp_path)
    rows = counted(0, 8, observations=torch.full((8, 2), 0.1))
    for row in range(8):
        ring.write(rows[row : row + 1])
        assert (tmp_path / "float32.rows").stat().st_size == ring.room * 4 * 11
    assert_same_rows(everything(ring), rows)


def test_a_growing_ring_takes_no_file_of_another_buffer(tmp_path: Path) -> None:
    (tmp_path / "float32.rows").write_bytes(b"data")
    ring = RingStorage(4, device=CPU, growing=True, folder=tmp_path)
    with pytest.raises(ValueError, match="folder: expected one without the files of another buffer"):
        ring.write(counted(0, 1))
    assert (tmp_path / "float32.rows").read_bytes() == b"data"


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_observation_comes_back_with_its_structure_and_dtype(form: str) -> None:
    storage = RingStorage(4, device=CPU)
    storage.write(in_form(form, 0, 3))
    storage.write(in_form(form, 3, 3))
    rows = torch.tensor([4, 5, 2, 3])
    held = everything(storage)
    assert_same_rows(held, in_form(form, 0, 6)[rows])
    assert type(held.observations) is type(FORMS[form](0, 1))


def test_discrete_actions_stay_int64() -> None:
    storage = RingStorage(2, device=CPU)
    storage.write(counted(0, 3, actions=torch.tensor([3, 1, 2]), next_actions=torch.tensor([1, 2, 2])))
    held = everything(storage)
    assert held.actions.tolist() == [2, 1]
    assert held.next_actions.tolist() == [2, 2]
    assert held.actions.dtype == held.next_actions.dtype == torch.int64


def test_more_rows_than_capacity_leaves_the_last() -> None:
    storage = RingStorage(3, device=CPU)
    assert storage.write(counted(0, 10)).tolist() == [1, 2, 0]
    assert everything(storage).rewards.tolist() == [90.0, 70.0, 80.0]


def test_one_row_ring_holds_the_newest() -> None:
    storage = RingStorage(1, device=CPU)
    for start in range(3):
        assert storage.write(counted(start, 1)).tolist() == [0]
        assert everything(storage).rewards.tolist() == [10.0 * start]
    storage.write(counted(3, 5))
    assert everything(storage).rewards.tolist() == [70.0]


@pytest.mark.parametrize("form", FORMS)
def test_gathered_rows_are_copies(form: str) -> None:
    storage = RingStorage(5, device=CPU)
    storage.write(in_form(form, 0, 5))
    for leaf in leaves(everything(storage)):
        leaf.zero_()
    assert_same_rows(everything(storage), in_form(form, 0, 5))


def test_written_rows_are_copies() -> None:
    storage = RingStorage(5, device=CPU)
    given = counted(0, 5)
    storage.write(given)
    for leaf in leaves(given):
        leaf.zero_()
    assert_same_rows(everything(storage), counted(0, 5))


def test_gathered_rows_name_their_slots_and_cluster() -> None:
    storage = RingStorage(5, device=CPU)
    storage.write(counted(0, 5))
    batch = storage.gather(torch.tensor([3, 3, 0]), cluster=2)
    assert batch.indices is not None
    assert batch.indices.tolist() == [3, 3, 0]
    assert batch.cluster == 2
    assert batch.rewards.tolist() == [30.0, 30.0, 0.0]


def test_link_reaches_one_row_only() -> None:
    storage = RingStorage(4, device=CPU)
    storage.write(counted(0, 6, has_next_actions=torch.zeros(6)))
    storage.link(4, torch.tensor([-1.0]))
    held = everything(storage)
    assert held.next_actions.squeeze(1).tolist() == [-1.0, 5.25, 2.25, 3.25]
    assert held.has_next_actions.tolist() == [1.0, 0.0, 0.0, 0.0]


def test_rows_and_their_slots_live_on_the_device_of_the_storage() -> None:
    storage = RingStorage(4, device=torch.device("meta"))
    storage.write(in_form("dict", 0, 6))
    batch = storage.gather(torch.tensor([1, 2]))
    assert batch.indices is not None
    assert {leaf.device.type for leaf in [*leaves(batch), batch.indices]} == {"meta"}


# Fields of one dtype share a row


def of_many_dtypes(form: str, count: int, *, seed: int = 0) -> Transitions:
    """Random rows: images of bytes, float16 and float32 vectors, flags, int64 actions or float64 ones."""
    generator = torch.Generator().manual_seed(seed)

    def bytes_of(*shape: int) -> Tensor:
        return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator)

    def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(count, *shape, generator=generator, dtype=torch.float64).to(dtype)

    def observations() -> Any:
        parts: dict[str, Tensor] = {
            "z": floats(2, 3),
            "image": bytes_of(3, 4, 5),
            "a": floats(1, dtype=torch.float64),
            "flag": bytes_of(2) > 127,
            "half": floats(2, dtype=torch.float16),
            "count": bytes_of(1).long(),
        }
        return {
            "one": parts["image"],
            "vector": floats(3, dtype=torch.float64),
            "dict": parts,
            "tuple": tuple(parts.values()),
            "empty part": {"none": floats(0), "some": floats(2), "no image": bytes_of(3, 0, 2)},
        }[form]

    discrete = form in ("one", "tuple")
    return Transitions(
        observations=observations(),
        actions=bytes_of().long() % 4 if discrete else floats(2, dtype=torch.float64),
        rewards=floats(dtype=torch.float64 if form == "vector" else torch.float32),
        next_observations=observations(),
        terminals=bytes_of() > 200,
        timeouts=bytes_of() > 127,
        intervals=bytes_of() % 5 + 1,
    )


DTYPES = ("one", "vector", "dict", "tuple", "empty part")


@pytest.mark.parametrize("form", DTYPES)
def test_fields_of_any_dtypes_are_gathered_as_they_were(form: str) -> None:
    data, storage = of_many_dtypes(form, 23), RingStorage(10, device=CPU)
    for start in range(0, 23, 6):
        storage.write(data[start : start + 6])
    held = torch.tensor([20, 21, 22, *range(13, 20)])
    assert_same_rows(everything(storage), data[held])
    assert_same_rows(storage.rows(2, 9), data[held[2:9]])
    slots = torch.randint(0, 10, (50,), generator=torch.Generator().manual_seed(0))
    batch = storage.gather(slots)
    assert_same_rows(batch, data[held[slots]])
    assert [name for name, _ in batch.columns()] == [name for name, _ in data.columns()]
    for got, expected in zip(leaves(batch), leaves(data)):
        assert got.shape[1:] == expected.shape[1:]


@pytest.mark.parametrize("form", DTYPES)
def test_a_row_takes_the_bytes_of_its_fields_and_no_more(form: str) -> None:
    data, storage = of_many_dtypes(form, 3), RingStorage(10, device=CPU)
    storage.write(data)
    raw = sum(leaf.element_size() * leaf[0].numel() for leaf in leaves(data))
    allocated = {
        rows.untyped_storage().data_ptr(): rows.untyped_storage().nbytes() for rows in storage.state()["rows"].values()
    }
    assert sum(allocated.values()) == 10 * raw
    dtypes = {leaf.dtype for leaf in leaves(data) if leaf[0].numel()}
    assert len([size for size in allocated.values() if size]) == len(dtypes)


@pytest.mark.parametrize("form", DTYPES)
def test_neither_the_storage_nor_another_field_sees_what_is_written_to_a_field(form: str) -> None:
    data, storage = of_many_dtypes(form, 8), RingStorage(8, device=CPU)
    storage.write(data)
    held = {rows.untyped_storage().data_ptr() for rows in storage.state()["rows"].values() if rows.numel()}
    for changed in range(len(leaves(data))):
        batch = storage.gather(torch.arange(8)) if changed % 2 else storage.rows(0, 8)
        assert not held & {leaf.untyped_storage().data_ptr() for leaf in leaves(batch) if leaf.numel()}
        leaves(batch)[changed].fill_(1)
        for place, (got, expected) in enumerate(zip(leaves(batch), leaves(data))):
            assert torch.equal(got, torch.ones_like(got) if place == changed else expected)
    assert_same_rows(everything(storage), data)


def test_a_link_changes_the_next_action_of_one_row_and_nothing_else() -> None:
    data, storage = of_many_dtypes("dict", 8), RingStorage(8, device=CPU)
    storage.write(data)
    storage.link(3, torch.tensor([7.0, 8.0], dtype=torch.float64))
    expected = of_many_dtypes("dict", 8)
    expected.next_actions[3] = torch.tensor([7.0, 8.0], dtype=torch.float64)
    expected.has_next_actions[3] = 1
    assert_same_rows(everything(storage), expected)


def test_a_dict_whose_keys_come_in_another_order_is_the_same() -> None:
    data, storage = of_many_dtypes("dict", 8), RingStorage(8, device=CPU)
    storage.write(data[:5])
    assert isinstance(data.observations, dict)
    turned = dict(reversed(data.observations.items()))
    storage.write(data.replace(observations=turned)[5:])
    assert_same_rows(everything(storage), data)


def both(observations: Any) -> dict[str, Any]:
    return {"observations": observations, "next_observations": observations}


OTHER_FORMS: dict[str, tuple[str, dict[str, Any], str]] = {
    "wider observations": (
        "vector",
        both(torch.zeros(2, 7)),
        r"^observations: expected rows like those stored, \[2\] torch.float32, got \[7\] torch.float32$",
    ),
    "float64 observations": ("vector", both(torch.zeros(2, 2).double()), "^observations: .*float32, got .*float64$"),
    "wider actions": (
        "vector",
        {"actions": torch.zeros(2, 4), "next_actions": torch.zeros(2, 4)},
        r"^actions: expected .*\[1\] torch.float32, got \[4\] torch.float32$",
    ),
    "discrete actions": (
        "vector",
        {"actions": torch.zeros(2).long(), "next_actions": torch.zeros(2).long()},
        r"^actions: expected .*\[1\] torch.float32, got \[\] torch.int64$",
    ),
    "float64 rewards": ("vector", {"rewards": torch.zeros(2).double()}, "^rewards: .*float32, got .*float64$"),
    "other keys": ("dict", both({"a": torch.zeros(2, 2), "c": images(0, 2)}), "^observations: .*'b'.*, got .*'c'"),
    "tuple for dict": ("dict", both((torch.zeros(2, 2), images(0, 2))), r"^observations: .*\{'a'.*, got \("),
    "tuple for tensor": ("vector", both((torch.zeros(2, 2),)), r"^observations: .*\[2\] torch.float32, got \("),
}


@pytest.mark.parametrize("case", OTHER_FORMS)
def test_rows_of_another_form_are_refused_and_nothing_changes(case: str) -> None:
    form, fields, message = OTHER_FORMS[case]
    storage = RingStorage(4, device=CPU)
    storage.write(in_form(form, 0, 3))
    other = {"observations": FORMS[form](0, 2), "next_observations": FORMS[form](1, 2), **fields}
    with pytest.raises(ValueError, match=message):
        storage.write(counted(0, 2, **other))
    assert len(storage) == storage.written == 3
    assert_same_rows(everything(storage), in_form(form, 0, 3))
    assert storage.write(in_form(form, 3, 1)).tolist() == [3]


def test_files_are_not_removed_by_a_forked_process_and_grow_back_whole(tmp_path: Path) -> None:
    ring = RingStorage(100_000, device=CPU, growing=True)
    ring.folder = own_folder(ring, tmp_path)
    rows = torch.ones(3000, 2)
    data = Transitions(
        observations=rows, actions=rows, rewards=rows[:, 0], next_observations=rows, terminals=rows[:, 0]
    )
    ring.write(data)
    child = os.fork()
    if child == 0:
        del ring
        os._exit(0)
    os.waitpid(child, 0)
    assert ring.folder.is_dir()
    for file in ring.folder.iterdir():
        file.unlink()  # as what cleans temporary files does
    ring.write(data)
    ring.write(data)
    assert float(ring.rows(0, 9000).observations.min()) == 1


def make_and_end(folder: Path, made: Any) -> None:
    globals()["kept"] = ClusteredReplayBuffer(100, storage="memmap", folder=folder)
    made.put(len(list(folder.iterdir())))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_files_go_with_the_process_that_made_them(method: str, tmp_path: Path) -> None:
    context: Any = multiprocessing.get_context(method)
    made = context.SimpleQueue()
    process = context.Process(target=make_and_end, args=(tmp_path, made))
    process.start()
    process.join(120)
    assert (process.exitcode, made.get()) == (0, 1)
    assert list(tmp_path.iterdir()) == []


def test_where_the_system_does_not_tell_how_much_memory_is_free_a_state_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = torch.ones(3, 2)
    data = Transitions(
        observations=rows, actions=rows, rewards=rows[:, 0], next_observations=rows, terminals=rows[:, 0]
    )
    monkeypatch.setattr(storage_file, "free_bytes", lambda device: None)
    assert len(copy.deepcopy(ClusteredReplayBuffer.from_transitions(data))) == 3


def test_rows_that_the_disk_can_not_hold_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=10_000))
    buffer = ClusteredReplayBuffer(1000, storage="memmap", folder=tmp_path)
    rows = torch.ones(3, 2)
    data = Transitions(
        observations=rows, actions=rows, rewards=rows[:, 0], next_observations=rows, terminals=rows[:, 0]
    )
    with pytest.raises(ValueError, match="capacity: expected one whose rows fit the disk of"):
        buffer.extend(data)
    assert len(buffer) == 0


def one_part(rows: int = 3) -> Transitions:
    part = torch.ones(rows, 2)
    return Transitions(
        observations=torch.ones(rows, 4, dtype=torch.uint8),
        actions=part,
        rewards=part[:, 0],
        next_observations=torch.ones(rows, 4, dtype=torch.uint8),
        terminals=part[:, 0],
    )


def test_a_disk_that_is_full_meanwhile_leaves_no_files_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reserved: list[int] = []

    def reserve(file: int, start: int, size: int) -> None:
        reserved.append(size)
        if len(reserved) == 2:  # of the second dtype's rows
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", reserve, raising=False)
    buffer = ClusteredReplayBuffer(1000, storage="memmap", folder=tmp_path)
    with pytest.raises(ValueError, match="capacity: expected one whose rows fit the disk of"):
        buffer.extend(one_part())
    assert len(reserved) == 2
    assert not list(tmp_path.glob("*/*.rows"))
    monkeypatch.undo()
    buffer.extend(one_part())
    assert len(buffer) == 3


def test_where_nothing_is_reserved_files_are_made_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reserve(file: int, start: int, size: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", reserve, raising=False)
    buffer = ClusteredReplayBuffer(1000, storage="memmap", folder=tmp_path)
    buffer.extend(one_part())
    assert buffer.sample(4).observations.tolist() == [[1] * 4] * 4


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="files are sparse on this system")
def test_memory_mapped_rows_are_reserved_on_the_disk(tmp_path: Path) -> None:
    buffer = ClusteredReplayBuffer(100_000, storage="memmap", folder=tmp_path)
    buffer.extend(one_part())
    for path in tmp_path.glob("*/*.rows"):
        assert path.stat().st_blocks * 512 >= path.stat().st_size > 100_000


def test_a_capacity_beyond_the_memory_is_loaded_while_its_rows_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = ClusteredReplayBuffer(100_000, seed=0)
    buffer.extend(one_part())
    buffer.save(tmp_path / "buffer")
    monkeypatch.setattr(storage_file, "free_bytes", lambda device: 10_000)
    loaded = ClusteredReplayBuffer.load(tmp_path / "buffer")
    assert torch.equal(loaded.sample(8).indices, buffer.sample(8).indices)
    monkeypatch.setattr(storage_file, "free_bytes", lambda device: 10)
    with pytest.raises(ValueError, match="capacity: expected one whose rows fit the memory of cpu"):
        ClusteredReplayBuffer.load(tmp_path / "buffer")


def test_rows_saved_in_another_dtype_are_refused() -> None:
    ring = RingStorage(20, device=torch.device("cpu"))
    ring.write(numbered(3))
    state = ring.state()
    state["rows"]["float32"] = state["rows"]["float32"].double()
    with pytest.raises(ValueError, match=r"^rows: expected torch.float32 \[3, 9\], got torch.float64 \[3, 9\]$"):
        RingStorage(20, device=torch.device("cpu")).restore(state)


def test_rows_beyond_the_memory_are_loaded_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = ClusteredReplayBuffer.from_transitions(numbered(), seed=0)
    buffer.save(tmp_path / "buffer")
    monkeypatch.setattr(storage_file, "free_bytes", lambda device: 10)
    loaded = ClusteredReplayBuffer.load(tmp_path / "buffer", storage="memmap", folder=tmp_path)
    assert torch.equal(loaded.sample(8).rewards, buffer.sample(8).rewards)
