"""OGBench: the same trajectories in its regular form, its compact form and its files give the same transitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from c4buffer import load_ogbench

STATES = np.array([0, 1, 2, 3, 10, 11, 12])  # two trajectories, of three and of two transitions


def states() -> dict[str, np.ndarray]:
    """A row a state, as OGBench's files have it; the task is solved in states 1 and 11."""
    return {
        "observations": np.stack([STATES, -STATES], axis=1).astype(np.float32),
        "actions": (STATES[:, None] / 100).astype(np.float32),
        "rewards": np.where(np.isin(STATES, [1, 11]), 0, -1).astype(np.float32),
        "masks": np.where(np.isin(STATES, [1, 11]), 0, 1).astype(np.float32),
        "terminals": np.array([0, 0, 0, 1, 0, 0, 1], dtype=np.float32),
    }


def compact() -> dict[str, np.ndarray]:
    """A row a state; the last two of a trajectory are terminals, and its last is no transition."""
    fields = states()
    return fields | {"valids": 1 - fields["terminals"], "terminals": np.array([0, 0, 1, 1, 0, 1, 1], dtype=np.float32)}


def regular() -> dict[str, np.ndarray]:
    """A row a transition, with s'."""
    fields = states()
    kept = fields["terminals"] == 0
    return {name: column[kept] for name, column in fields.items()} | {
        "next_observations": fields["observations"][[1, 2, 3, 5, 6]],
        "terminals": np.array([0, 0, 1, 0, 1], dtype=np.float32),
    }


def file(fields: dict[str, np.ndarray], folder: Path) -> Path:
    np.savez(folder / "data.npz", **fields)
    return folder / "data.npz"


@pytest.mark.parametrize("form", [states, compact, regular])
@pytest.mark.parametrize("from_file", [False, True])
def test_every_form_gives_the_same_transitions(form: Any, from_file: bool, tmp_path: Path) -> None:
    data = load_ogbench(file(form(), tmp_path) if from_file else form())
    assert isinstance(data.observations, Tensor)
    assert isinstance(data.next_observations, Tensor)
    assert data.observations.tolist() == [[row, -row] for row in (0, 1, 2, 10, 11)]
    assert data.next_observations.tolist() == [[row, -row] for row in (1, 2, 3, 11, 12)]
    assert data.rewards.tolist() == [-1, 0, -1, -1, 0]
    assert data.terminals.tolist() == [0, 1, 0, 0, 1]  # where the task is solved
    assert data.timeouts.tolist() == [0, 0, 1, 0, 0]  # where a trajectory ends without that
    assert data.has_next_actions.tolist() == [1, 0, 0, 1, 0]
    torch.testing.assert_close(data.next_actions.squeeze(1), torch.tensor([0.01, 0.01, 0.02, 0.11, 0.11]))


def test_a_last_state_that_is_not_marked_has_no_transition_either() -> None:
    fields = states()
    fields["terminals"][-1] = 0
    assert load_ogbench(fields).rewards.tolist() == [-1, 0, -1, -1, 0]


def test_pixels_and_discrete_actions_stay_what_they_are() -> None:
    fields = regular()
    fields["observations"] = np.zeros((5, 8, 8, 3), dtype=np.uint8)
    fields["next_observations"] = np.ones((5, 8, 8, 3), dtype=np.uint8)
    fields["actions"] = np.arange(5, dtype=np.int32)
    data = load_ogbench(fields)
    assert isinstance(data.observations, Tensor)
    assert data.observations.dtype == torch.uint8
    assert data.actions.tolist() == [0, 1, 2, 3, 4]


def test_data_without_a_task_are_refused_with_a_hint() -> None:
    fields = regular()
    del fields["rewards"], fields["masks"]
    with pytest.raises(ValueError, match=r"^dataset: expected .*singletask.*, got one without rewards, masks"):
        load_ogbench(fields)


@pytest.mark.parametrize("name", ["observations", "masks", "valids"])
def test_a_field_of_another_length_is_named(name: str) -> None:
    fields = compact()
    with pytest.raises(ValueError, match=rf"^{name}: expected 7 rows, as many as terminals, got 6$"):
        load_ogbench(fields | {name: fields[name][:-1]})


@pytest.mark.parametrize("form", [states, compact, regular])
def test_columns_of_scalars_do_as_well(form: Any) -> None:
    fields = form()
    columns = {name: fields[name][:, None] for name in ("terminals", "masks", "valids", "rewards") if name in fields}
    one, other = load_ogbench(fields), load_ogbench(fields | columns)
    for (name, expected), (_, found) in zip(one.columns(), other.columns()):
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("form", [compact, regular])
@pytest.mark.parametrize("name", ["terminals", "masks"])
def test_flags_that_are_none_are_named(form: Any, name: str) -> None:
    fields = form()
    fields[name][1] = 2
    with pytest.raises(ValueError, match=rf"^{name}: expected 0 or 1, got 2.0 in row 1$"):
        load_ogbench(fields)


@pytest.mark.parametrize("name", ["masks", "terminals", "observations"])
def test_a_single_number_in_the_place_of_an_array_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: expected an array \[N, ...\], got a single number"):
        load_ogbench({**states(), name: np.float32(1)})


def test_of_a_file_nothing_is_read_but_the_fields(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, **states(), infos=np.array([{"a": 1}], dtype=object))  # type: ignore[arg-type]
    assert len(load_ogbench(path)) == 5
    np.save(tmp_path / "array.npy", np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"dataset: expected a mapping or an .npz file, got an array \[3, 2\]"):
        load_ogbench(tmp_path / "array.npy")


def test_tensors_stay_where_they_are_under_another_default_device() -> None:
    with torch.device("meta"):
        data = load_ogbench({name: torch.from_numpy(column) for name, column in regular().items()})
    assert {column.device.type for column in (data.terminals, data.timeouts, data.rewards)} == {"cpu"}


def test_no_rows_are_told() -> None:
    for form in (states, regular):
        with pytest.raises(ValueError, match="^observations: expected at least one transition, got none$"):
            load_ogbench({name: column[:0] for name, column in form().items()})


def test_double_precision_becomes_the_default_dtype() -> None:
    fields = {name: column.astype(np.float64) for name, column in regular().items()}
    data = load_ogbench(fields)
    assert isinstance(data.observations, Tensor)
    assert {data.observations.dtype, data.actions.dtype, data.rewards.dtype} == {torch.float32}
