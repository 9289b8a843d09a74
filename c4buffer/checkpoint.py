"""One file for a state of tensors and plain values: atomic, checked, without pickle."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._checks import fail

FORMAT = "c4buffer"
VERSION = 2
PLAIN = (bool, int, float, str, type(None))
FOREIGN = "a file that was saved whole by c4buffer and not changed"
HASHED_BYTES = 1 << 24  # at once


def save(path: str | os.PathLike[str], kind: str, state: Any) -> None:
    """Write `state` to one file: all of it, or the file that was there before stays as it is.

    A safetensors file; what is not a tensor is JSON in its header, with a checksum of each tensor and of the whole.

    Args:
        path: the file; its folder must exist.
        kind: what it is a state of; `load` asks for the same.
        state: nested dicts (string keys), lists and tuples of tensors and of bool, int, float, str and None.

    Raises:
        OSError: when the file can not be written, with no file left behind.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    tree = _outlined(state, tensors, "state")
    document = json.dumps({"kind": kind, "version": VERSION, "state": tree, "tensors": _descriptions(tensors)})
    metadata = {"format": FORMAT, "document": document, "digest": hashlib.blake2b(document.encode()).hexdigest()}
    target = Path(os.path.realpath(path))  # of a link, what it leads to
    name = str(target.parent / f".{target.name}.{secrets.token_hex(8)}.part")
    # with the permissions of the file that is replaced, or those that a new one gets here
    mode = target.stat().st_mode & 0o777 if target.exists() else None
    handle = os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666 if mode is None else mode)
    try:
        mode = os.fstat(handle).st_mode & 0o777 if mode is None else mode
    finally:
        os.close(handle)
    try:
        save_file(tensors, name, metadata)
        with open(name, "r+b") as file:
            os.fsync(file.fileno())
        os.chmod(name, mode)
        os.replace(name, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(name)
        if type(error).__name__ == "SafetensorError":  # how it reports what the system refuses
            raise OSError(f"{target}: {error}") from error
        raise
    _sync_folder(target.parent)


def load(path: str | os.PathLike[str], kind: str) -> Any:
    """What `save` wrote.

    Raises:
        OSError: when there is no such file, or it can not be read.
        ValueError: for a file that is damaged, of another format, version or kind.
    """
    from safetensors import SafetensorError, safe_open

    with open(path, "rb"):
        pass  # missing and forbidden files are the system's errors, not damaged ones
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                fail("path", f"a file of {FORMAT}", f"another one, {path}")
            document = metadata.get("document", "")
            if hashlib.blake2b(document.encode()).hexdigest() != metadata.get("digest"):
                fail("path", "an undamaged file", f"one with a damaged header, {path}")
            outline = json.loads(document)
            for name, expected in (("version", VERSION), ("kind", kind)):
                if outline[name] != expected:
                    fail("path", f"a file of {name} {expected!r}", f"{outline[name]!r}, {path}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        if _descriptions(tensors) != outline["tensors"]:
            fail("path", "an undamaged file", f"one with damaged tensors, {path}")
        return _restored(outline["state"], tensors)
    except (SafetensorError, KeyError, TypeError, IndexError, RecursionError, UnicodeError) as error:
        return fail("path", FOREIGN, f"{path}: {error}")
    except json.JSONDecodeError as error:
        return fail("path", FOREIGN, f"{path}: {error}")


def _outlined(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """`value` in JSON's terms; its tensors go to `tensors`."""
    if isinstance(value, Tensor):
        tensor = value.detach().cpu().contiguous()
        for other, known in tensors.items():  # a file holds each byte once
            if tensor.numel() and known.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
                if (known.data_ptr(), known.shape, known.dtype) == (tensor.data_ptr(), tensor.shape, tensor.dtype):
                    return {"tensor": other}
                tensor = tensor.clone()
        while name in tensors:  # {"a.b": ..., "a": {"b": ...}}
            name += "'"
        tensors[name] = tensor
        return {"tensor": name}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                fail(name, "keys that are strings", repr(key))
        return {"dict": {key: _outlined(entry, tensors, f"{name}.{key}") for key, entry in value.items()}}
    if isinstance(value, (list, tuple)):
        entries = [_outlined(entry, tensors, f"{name}.{index}") for index, entry in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": entries}
    if isinstance(value, PLAIN):
        return value
    return fail(name, "a tensor, a plain value or a container of such", type(value).__name__)


def _restored(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((form, content),) = tree.items()
    if form == "tensor":
        return tensors[content]
    if form == "dict":
        return {key: _restored(entry, tensors) for key, entry in content.items()}
    entries = [_restored(entry, tensors) for entry in content]
    return tuple(entries) if form == "tuple" else entries


def _descriptions(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Shape, dtype and checksum of each."""
    return {name: [list(t.shape), str(t.dtype), _checksum(t)] for name, t in tensors.items()}


def _checksum(tensor: Tensor) -> str:
    digest = hashlib.blake2b(digest_size=16)
    flat = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8, device="cpu")
    for part in flat.split(HASHED_BYTES):
        digest.update(part.numpy().data)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make the renaming last; some systems have nothing to do for that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
