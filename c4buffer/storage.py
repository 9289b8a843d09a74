"""Where transitions live: a ring of rows, allocated at once or as they come."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._checks import check_finite, fail
from .files import own_folder, reserve
from .inference import outside_inference_mode
from .layout import form_of, from_layout, name_of, to_layout
from .memory import free_bytes
from .observations import map_observations, observation_leaves, with_leaves
from .transitions import COLUMNS, Transitions

FEWEST_ROWS = 1024  # allocated at first by a ring that grows


class RingStorage:
    """Up to `capacity` transitions on one device; the oldest are overwritten. Allocated by the first rows written.

    A ring that grows allocates rows as they come, twice as many each time, up to `capacity`. Nothing is overwritten
    before that is reached, and a row's slot stays the same.

    All fields of one dtype share a row, so that a batch is one gather for each dtype.

    Args:
        capacity: rows.
        device: where the rows live.
        target: where gathered rows go; None for `device`.
        pinned: by way of page-locked memory, from which a GPU takes them without the processor waiting.
        folder: keep them in files there, which may be larger than the memory; None for memory. Files that are there
            already are not touched. The files are the ring's own and are no checkpoint; a copy of the ring makes
            others, in a folder beside this one.
        growing: allocate as rows come. In memory, old rows and new are held at once while they are copied.
    """

    def __init__(
        self,
        capacity: int,
        *,
        device: torch.device,
        target: torch.device | None = None,
        pinned: bool = False,
        folder: Path | None = None,
        growing: bool = False,
    ) -> None:
        self.capacity = capacity
        self.device = device
        self.target = device if target is None else target
        self.pinned = pinned
        self.folder = folder
        self.growing = growing
        self.room = 0  # rows allocated
        self.written = 0  # rows ever written; row j of them is in slot j % capacity
        self._rows: dict[torch.dtype, Tensor] = {}  # [room, floats of all fields]
        self._widths: dict[torch.dtype, tuple[list[int], int]] = {}  # of the wide fields; how many scalars follow them
        self._columns: dict[str, Any] = {}  # views into the rows

    def __getstate__(self) -> dict[str, Any]:
        """For a copy or a pickle: the rows held, without the views and the files, which are this ring's."""
        names = ("capacity", "device", "target", "pinned", "folder", "growing")
        state = self.state()
        state["rows"] = {name: rows.clone() for name, rows in state["rows"].items()}
        return {"options": {name: getattr(self, name) for name in names}, "state": state}

    @outside_inference_mode
    def __setstate__(self, state: dict[str, Any]) -> None:
        folder = state["options"]["folder"]
        self.__init__(**{**state["options"], "folder": None})  # type: ignore[misc]  # an object without a state
        if folder is not None:
            self.folder = own_folder(self, folder.parent if folder.parent.is_dir() else None)
        self.restore(state["state"])

    def __len__(self) -> int:
        return min(self.written, self.capacity)

    def cast(self, transitions: Transitions) -> Transitions:
        """The same transitions, floating values in the floating dtypes of the rows stored."""
        columns = transitions.columns()
        cast = {name: _cast(name, value, self._columns.get(name, value)) for name, value in columns}
        return Transitions.unchecked(cast)

    @torch.no_grad()
    def write(self, transitions: Transitions) -> Tensor:
        """Append rows; of more than fit, the last. Returns their slots, int64, in the order of the rows."""
        self._check_form(transitions)
        rows = len(transitions)
        kept = transitions if rows <= self.capacity else transitions[rows - self.capacity :]
        written = self.written + rows
        start = (written - len(kept)) % self.capacity
        try:
            self._make_room(kept, min(written, self.capacity))
            self._put(kept, start)
            self.written = written
        except BaseException:
            if self.written == 0:
                self._release()
            elif written > self.capacity == self.room:  # old rows may be overwritten in part, and must be whole
                self._put(kept, start)
                self.written = written
            raise
        return torch.arange(start, start + len(kept), device="cpu") % self.capacity

    def _put(self, transitions: Transitions, start: int) -> None:
        """Into the slots from `start` on, around the end of the ring."""
        head = min(len(transitions), self.capacity - start)
        for name, value in transitions.columns():
            for target, source in zip(observation_leaves(self._columns[name]), observation_leaves(value)):
                target[start : start + head] = source[:head]
                if head < len(transitions):
                    target[: len(transitions) - head] = source[head:]

    def holds(self, row: int) -> bool:
        """Whether the `row`-th row ever written has not been overwritten yet."""
        return self.written - self.capacity <= row < self.written

    @torch.no_grad()
    def link(self, row: int, action: Tensor) -> None:
        """Give the `row`-th row ever written its next action."""
        slot = row % self.capacity
        self._columns["next_actions"][slot] = action
        self._columns["has_next_actions"][slot] = 1

    def gather(self, slots: Tensor, *, cluster: int = -1) -> Transitions:
        """Copies of the rows in `slots`, int64 [B], on `target`."""
        index = slots.to(self.device)
        parts = {dtype: _parts(self._gathered(rows, index), *self._widths[dtype]) for dtype, rows in self._rows.items()}

        def take(leaf: Tensor) -> Tensor:
            wide, scalars = parts[leaf.dtype]
            if leaf.ndim == 1:
                return next(scalars)
            return next(wide) if leaf.ndim == 2 else next(wide).unflatten(1, leaf.shape[1:])

        columns = {
            name: take(value) if isinstance(value, Tensor) else map_observations(take, value)
            for name, value in self._columns.items()
        }
        return Transitions.unchecked(columns, indices=self.sent(index), cluster=cluster)

    def sent(self, values: Tensor) -> Tensor:
        """To `target`; by way of page-locked memory nothing waits for the copy."""
        if self.target == self.device:
            return values
        if self.pinned and not values.is_pinned():
            values = values.pin_memory()
        return values.to(self.target, non_blocking=self.pinned)

    def _gathered(self, rows: Tensor, index: Tensor) -> Tensor:
        if self.target == self.device:
            return rows.index_select(0, index)
        taken = torch.empty(len(index), rows.shape[1], dtype=rows.dtype, pin_memory=self.pinned, device="cpu")
        torch.index_select(rows, 0, index, out=taken)
        return self.sent(taken)

    def column(self, name: str, slots: Tensor) -> Any:
        """Copies of one field of the rows in `slots`."""
        index = slots.to(self.device)
        return map_observations(lambda leaf: leaf.index_select(0, index), self._columns[name])

    def rows(self, start: int, stop: int) -> Transitions:
        """Copies of the rows in slots `start` to `stop` - 1, on `device`."""
        columns = {
            name: map_observations(lambda leaf: leaf[start:stop].clone(), value)
            for name, value in self._columns.items()
        }
        return Transitions.unchecked(columns, indices=torch.arange(start, stop, device=self.device))

    def state(self) -> dict[str, Any]:
        """The rows held and their form, for a checkpoint; views, to be copied or written at once."""
        return {
            "capacity": self.capacity,
            "written": self.written,
            "form": {name: to_layout(value) for name, value in self._columns.items()},
            "rows": {name_of(dtype): rows[: len(self)] for dtype, rows in self._rows.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take what `state` gave, into a ring that is empty."""
        if state["capacity"] != self.capacity:
            fail("capacity", str(state["capacity"]), self.capacity)
        held = min(state["written"], self.capacity)
        if set(state["form"]) != (set(COLUMNS) if held else set()):
            fail("form", f"those of {held} rows", ", ".join(state["form"]) or "no columns")
        if state["form"]:
            columns = {name: from_layout(form) for name, form in state["form"].items()}
            # A processor's memory is taken as it is written: of room for more rows, only those that come.
            room = held if self.device.type == "cpu" else self._room_for(held)
            needed = room * sum(
                math.prod(leaf.shape[1:]) * leaf.element_size()
                for value in columns.values()
                for leaf in observation_leaves(value)
            )
            free = None if self.folder is not None else free_bytes(self.device)
            if free is not None and needed > free:
                fail("capacity", f"one whose rows fit the memory of {self.device}", f"{needed / 2**30:.1f} GiB")
            try:
                self._make_room(Transitions.unchecked(columns), held)
            except (RuntimeError, MemoryError) as error:  # more than any machine could promise
                fail("capacity", f"one whose rows fit the memory of {self.device}", f"{self.capacity} ({error})")
            for dtype, rows in self._rows.items():
                saved = state["rows"][name_of(dtype)]
                if saved.dtype != dtype or saved.shape != (held, rows.shape[1]):
                    fail("rows", f"{dtype} {[held, rows.shape[1]]}", f"{saved.dtype} {list(saved.shape)}")
                rows[:held] = saved.to(self.device)
        self.written = state["written"]

    def _make_room(self, transitions: Transitions, rows: int) -> None:
        """For so many rows of this form, those held included."""
        if not self._columns:
            try:
                self._allocate(transitions, self._room_for(rows))
            except BaseException:
                self._release()
                raise
        elif rows > self.room:
            self._grow(self._room_for(rows))

    def _room_for(self, rows: int) -> int:
        return min(self.capacity, max(rows, 2 * self.room, FEWEST_ROWS)) if self.growing else self.capacity

    def _allocate(self, transitions: Transitions, room: int) -> None:
        """Rows for transitions of this form."""
        leaves = [leaf for _, value in transitions.columns() for leaf in observation_leaves(value)]
        dtypes = list(dict.fromkeys(leaf.dtype for leaf in leaves))
        for path in map(self._file, dtypes) if self.folder is not None else ():
            if path.exists():
                fail("folder", "one without the files of another buffer", str(path))
        rows: dict[torch.dtype, Tensor] = {}
        for dtype in dtypes:
            mine = [leaf for leaf in leaves if leaf.dtype == dtype]
            wide = [math.prod(leaf.shape[1:]) for leaf in mine if leaf.ndim > 1]
            self._widths[dtype] = wide, len(mine) - len(wide)
            rows[dtype] = self._allocated(dtype, room, sum(wide) + len(mine) - len(wide))
        self._lay_out(rows, room, transitions)

    def _release(self) -> None:
        """Be as before the first rows."""
        for dtype in self._widths if self.folder is not None else ():
            self._file(dtype).unlink(missing_ok=True)
        self._columns, self._rows, self._widths, self.room = {}, {}, {}, 0

    def _grow(self, room: int) -> None:
        """More rows, the first of them those held; all or, when memory fails, none."""
        rows = {}
        for dtype, old in self._rows.items():
            kept = self.folder is not None and self._file(dtype).exists()  # with what was in it
            rows[dtype] = self._allocated(dtype, room, old.shape[1])
            if not kept:
                rows[dtype][: len(self)] = old[: len(self)]
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # a batch may be on its way, on a stream of its own
        self._lay_out(rows, room, Transitions.unchecked(self._columns))

    def _lay_out(self, rows: dict[torch.dtype, Tensor], room: int, transitions: Transitions) -> None:
        """The columns as views of the rows, in one order."""
        views = {dtype: _parts(part, *self._widths[dtype]) for dtype, part in rows.items()}

        def view(leaf: Tensor) -> Tensor:
            part = next(views[leaf.dtype][leaf.ndim == 1])
            return part.view(room, *leaf.shape[1:])

        columns = {name: map_observations(view, value) for name, value in transitions.columns()}
        self._columns, self._rows, self.room = columns, rows, room

    def _allocated(self, dtype: torch.dtype, room: int, width: int) -> Tensor:
        if self.folder is None:
            return torch.empty(room, width, dtype=dtype, device=self.device)
        path = self._file(dtype)
        needed, before = room * width * dtype.itemsize, path.stat().st_size if path.exists() else 0
        try:
            reserve(path, needed)
        except OSError as error:
            if before > 0:
                os.truncate(path, before)
            else:
                path.unlink(missing_ok=True)
            if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise
            fail("capacity", f"one whose rows fit the disk of {self.folder}", f"{(needed - before) / 2**30:.1f} GiB")
        rows = torch.from_file(str(path), shared=True, size=room * width, dtype=dtype)
        return rows.view(room, width)

    def _file(self, dtype: torch.dtype) -> Path:
        assert self.folder is not None
        return self.folder / f"{name_of(dtype)}.rows"

    def _check_form(self, transitions: Transitions) -> None:
        for name, stored in self._columns.items():
            value = getattr(transitions, name)
            if isinstance(value, Tensor) and isinstance(stored, Tensor):
                same = value.dtype == stored.dtype and value.shape[1:] == stored.shape[1:]
            else:
                same = form_of(value) == form_of(stored)
            if not same:
                fail(name, f"rows like those stored, {form_of(stored)}", form_of(value))


def _parts(rows: Tensor, wide: list[int], scalars: int) -> tuple[Iterator[Tensor], Iterator[Tensor]]:
    """Views of rows [n, floats]: [n, width] of each wide field, and [n] of each scalar one behind them."""
    *parts, rest = rows.split_with_sizes([*wide, scalars], dim=1)
    return iter(parts), iter(rest.unbind(1))


def _cast(name: str, value: Any, stored: Any) -> Any:
    if isinstance(value, Tensor) and isinstance(stored, Tensor) and value.dtype == stored.dtype:
        return value
    leaves, kept = observation_leaves(value), observation_leaves(stored)
    if len(leaves) != len(kept):
        return value  # to be refused by its form
    both = [(leaf, like.dtype) for leaf, like in zip(leaves, kept)]
    floating = [leaf.is_floating_point() and dtype.is_floating_point for leaf, dtype in both]
    found = [leaf.to(dtype) if cast else leaf for (leaf, dtype), cast in zip(both, floating)]
    for leaf, given in zip(found, leaves):
        if leaf.dtype != given.dtype:
            check_finite(name, leaf, hint=f", as {leaf.dtype}, which the buffer holds")
    return with_leaves(value, found)
