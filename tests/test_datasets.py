"""Datasets: D4RL's layout, and the two Hopper files that come with the repository."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from types import ModuleType

import h5py
import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from c4buffer import Transitions, load_d4rl, load_minari, plots

DATA = Path(__file__).parents[1] / "data"
FILES = [DATA / f"hopper-{policy}-10k.hdf5" for policy in ("medium-expert", "medium-replay")]


def columns(rows: int = 7) -> dict[str, np.ndarray]:
    """Three episodes: rows 0 to 2 end in a terminal, 3 and 4 by time limit, 5 and 6 are cut off."""
    index = np.arange(rows, dtype=np.float32)
    return {
        "observations": np.stack([index, 10 * index], axis=1),
        "actions": index[:, None] + 0.5,
        "rewards": -index,
        "terminals": index == 2,
        "timeouts": index == 4,
        "next_observations": np.stack([index + 0.25, 10 * index], axis=1),
    }


def written(path: Path, fields: dict[str, np.ndarray]) -> Path:
    with h5py.File(path / "data.hdf5", "w") as file:
        for name, values in fields.items():
            file[name] = values
    return path / "data.hdf5"


def test_all_fields_come_as_they_are(tmp_path: Path) -> None:
    fields = columns()
    loaded = load_d4rl(written(tmp_path, fields))
    expected = Transitions(**{name: torch.from_numpy(values) for name, values in fields.items()})
    for name, value in expected.columns():
        assert torch.equal(getattr(loaded, name), value), name
    assert loaded.rewards.dtype == torch.float32
    assert loaded.has_next_actions.tolist() == [1, 1, 0, 1, 0, 1, 0]
    assert loaded.next_actions.squeeze(1).tolist() == [1.5, 2.5, 2.5, 4.5, 4.5, 6.5, 6.5]


def test_without_timeouts_only_terminals_end_an_episode(tmp_path: Path) -> None:
    fields = columns()
    del fields["timeouts"]
    loaded = load_d4rl(str(written(tmp_path, fields)))
    assert loaded.timeouts.tolist() == [0, 0, 0, 0, 0, 0, 1]
    assert loaded.has_next_actions.tolist() == [1, 1, 0, 1, 1, 1, 0]


def test_without_next_observations_the_next_row_follows_and_ends_without_one_are_left_out(tmp_path: Path) -> None:
    fields = columns()
    del fields["next_observations"]
    loaded = load_d4rl(written(tmp_path, fields))
    rows = [0, 1, 2, 3, 5]  # 4 and 6 end without a terminal
    assert isinstance(loaded.observations, Tensor)
    assert isinstance(loaded.next_observations, Tensor)
    assert loaded.observations[:, 0].tolist() == rows
    assert loaded.next_observations[:, 0].tolist() == [row + 1 for row in rows]
    assert loaded.terminals.tolist() == [0, 0, 1, 0, 0]
    assert loaded.timeouts.tolist() == [0, 0, 0, 1, 1]  # the last rows that are left of their episodes
    assert loaded.next_actions.squeeze(1).tolist() == [1.5, 2.5, 2.5, 4.5, 6.5]
    assert loaded.has_next_actions.tolist() == [1, 1, 0, 1, 1]


@pytest.mark.parametrize("name", ["observations", "actions", "rewards", "terminals"])
def test_a_missing_field_is_named(tmp_path: Path, name: str) -> None:
    fields = columns()
    del fields[name]
    with pytest.raises(
        ValueError, match=rf"data\.hdf5: expected the fields observations, .*, got a file without {name}$"
    ):
        load_d4rl(written(tmp_path, fields))


def test_arrays_in_the_other_byte_order_are_read(tmp_path: Path) -> None:
    fields = {name: values.astype(values.dtype.newbyteorder(">")) for name, values in columns().items()}
    loaded, expected = load_d4rl(written(tmp_path, fields)), load_d4rl(written(tmp_path, columns()))
    for (name, one), (_, other) in zip(loaded.columns(), expected.columns(), strict=True):
        assert torch.equal(one, other), name


def test_a_file_in_which_no_row_is_followed_by_one_is_refused(tmp_path: Path) -> None:
    fields = {**columns(), "terminals": np.zeros(7, bool), "timeouts": np.ones(7, bool)}
    del fields["next_observations"]
    with pytest.raises(ValueError, match=r"hdf5: next_observations: expected them, or a row that is followed by one"):
        load_d4rl(written(tmp_path, fields))


def test_a_group_in_the_place_of_an_array_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, {name: values for name, values in columns().items() if name != "observations"})
    with h5py.File(path, "a") as file:
        file.create_group("observations").create_dataset("image", data=np.zeros(7))
    with pytest.raises(ValueError, match=r"hdf5: observations: expected an array \[N, ...\], got a group of image$"):
        load_d4rl(path)


def test_a_single_number_and_another_kind_of_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "data.hdf5"
    with h5py.File(path, "w") as file:
        for name in ("observations", "actions", "terminals"):
            file[name] = np.zeros((3, 1))
        file["rewards"] = 3.0
    with pytest.raises(ValueError, match=r"rewards: expected an array \[N, ...\], got a single number"):
        load_d4rl(path)
    path.write_text("no HDF5")
    with pytest.raises(ValueError, match="path: expected an HDF5 file in D4RL's layout, got another kind of file, .*5"):
        load_d4rl(path)
    with pytest.raises(FileNotFoundError):
        load_d4rl(tmp_path / "none.hdf5")


@pytest.mark.parametrize(
    ("package", "extra", "call"),
    [
        ("h5py", "data", lambda: load_d4rl("data.hdf5")),
        ("minari", "data", lambda: load_minari("mujoco/hopper/medium-v0")),
        ("matplotlib", "plots", lambda: plots.gradient_space({}, {})),
    ],
)
def test_a_package_that_is_missing_is_named_with_its_extra(
    package: str, extra: str, call: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'needs {package}: pip install "c4buffer\[{extra}\]"'):
        call()


def test_a_field_of_the_wrong_length_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^rewards: expected 7 rows, as many as observations, got 5$"):
        load_d4rl(written(tmp_path, columns() | {"rewards": np.zeros(5, dtype=np.float32)}))


# --- the files in data/ --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_holds_ten_thousand_consistent_transitions(path: Path) -> None:
    data = load_d4rl(path)
    assert isinstance(data.observations, Tensor)
    assert isinstance(data.next_observations, Tensor)
    assert data.observations.shape == data.next_observations.shape == (10_000, 11)
    assert data.actions.shape == (10_000, 3)
    assert float(data.actions.abs().max()) <= 1
    inside = (data.terminals + data.timeouts)[:-1] == 0
    assert torch.equal(data.next_observations[:-1][inside], data.observations[1:][inside])
    assert not bool((data.next_observations[:-1] == data.observations[1:]).all(dim=1)[~inside].any())
    assert bool(((data.terminals == 0) | (data.timeouts == 0)).all())
    linked = data.has_next_actions == 1
    assert torch.equal(linked[:-1], inside)
    assert not linked[-1]
    assert torch.equal(data.next_actions[:-1][inside], data.actions[1:][inside])
    assert 5 < int((~inside).sum()) < 1000


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_small_and_says_where_it_comes_from(path: Path) -> None:
    assert path.stat().st_size < 1_000_000
    with h5py.File(path) as file:
        assert file.attrs["source"] == path.name.replace("-10k", "")
        assert int(file.attrs["subset_seed"]) >= 0


# --- data/subset.py ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subset() -> ModuleType:
    spec = importlib.util.spec_from_file_location("subset", DATA / "subset.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LENGTHS = [10, 1, 30, 5, 54]


def trajectories(rows: np.ndarray) -> list[list[int]]:
    """Runs of rows of the same trajectory, in the order drawn."""
    owner = np.repeat(np.arange(len(LENGTHS)), LENGTHS)[rows]
    return [run.tolist() for run in np.split(rows, np.flatnonzero(np.diff(owner)) + 1)]


@pytest.mark.parametrize("transitions", [1, 37, 99, 100])
def test_subset_has_whole_distinct_trajectories_and_exactly_the_rows_asked_for(
    subset: ModuleType, transitions: int
) -> None:
    ends = np.cumsum(LENGTHS) - 1
    whole = [list(range(end - length + 1, end + 1)) for end, length in zip(ends, LENGTHS)]
    for seed in range(20):
        rows = subset.draw_rows(ends, transitions, seed)
        assert len(rows) == len(set(rows.tolist())) == transitions
        *complete, last = trajectories(rows)
        assert all(trajectory in whole for trajectory in complete)
        assert any(last == trajectory[: len(last)] for trajectory in whole)


def test_subset_draws_each_next_trajectory_in_proportion_to_its_length(subset: ModuleType) -> None:
    lengths = np.array([1, 2, 5])
    ends = np.cumsum(lengths) - 1
    owner = np.repeat(np.arange(3), lengths)
    drawn: Counter[tuple[int, ...]] = Counter()
    for seed in range(2000):
        rows = subset.draw_rows(ends, 8, seed)
        drawn[tuple(dict.fromkeys(owner[rows].tolist()))] += 1
    orders = list(permutations(range(3)))
    expected = [2000 * lengths[a] / 8 * lengths[b] / (8 - lengths[a]) for a, b, _ in orders]
    assert stats.chisquare([drawn[order] for order in orders], expected).pvalue > 0.001


def test_subset_refuses_more_than_the_file_holds(subset: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"^transitions: expected at most 100 .*, got 101$"):
        subset.draw_rows(np.cumsum(LENGTHS) - 1, 101, 0)


def test_subset_of_a_file_is_a_file_of_the_same_layout(
    subset: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = written(tmp_path, columns()), tmp_path / "small.hdf5"
    with h5py.File(source, "a") as file:
        file.attrs["env_id"] = "Hopper-v5"
    monkeypatch.setattr("sys.argv", ["subset.py", str(source), str(target), "--transitions", "4", "--seed", "3"])
    subset.main()
    with h5py.File(target) as file:
        assert dict(file.attrs) == {"env_id": "Hopper-v5", "source": "data.hdf5", "subset_seed": 3}
    small = load_d4rl(target)
    assert len(small) == 4
    assert bool((small.terminals[-1] + small.timeouts[-1]) == 1)
    assert isinstance(small.observations, Tensor)
    rows = small.observations[:, 0].long()
    assert rows.tolist() == subset.draw_rows(np.array([2, 4]), 4, 3).tolist()
    assert torch.equal(small.rewards, -rows.float())


def test_without_next_observations_terminals_stay_what_they_were(tmp_path: Path) -> None:
    index = np.arange(8, dtype=np.float32)
    fields = {
        "observations": index[:, None],
        "actions": index[:, None],
        "rewards": index,
        "terminals": np.isin(index, [1, 4]),
        "timeouts": np.isin(index, [1, 5]),  # row 1 is both, row 5 an episode of its own
    }
    with h5py.File(tmp_path / "data.hdf5", "w") as file:
        for name, values in fields.items():
            file[name] = values
    loaded = load_d4rl(tmp_path / "data.hdf5")
    assert loaded.rewards.tolist() == [0, 1, 2, 3, 4, 6]
    assert loaded.terminals.tolist() == [0, 1, 0, 0, 1, 0]
    assert loaded.timeouts.tolist() == [0, 1, 0, 0, 0, 1]
