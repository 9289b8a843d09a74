"""Files of a buffer's own: with their room reserved on the disk, and gone with the buffer."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import weakref
from multiprocessing.util import Finalize
from pathlib import Path


def reserve(path: Path, size: int) -> None:
    """Make a file so many bytes long, on the disk: writing to a full one, through a mapping, would end the process.

    Raises:
        OSError: where there is no room for it.
    """
    if size - (path.stat().st_size if path.exists() else 0) > shutil.disk_usage(path.parent).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # before the disk is filled in vain
    with path.open("ab") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except (AttributeError, OSError) as error:  # a system, or a file system, that reserves nothing
            if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
            file.truncate(size)


def own_folder(owner: object, parent: str | os.PathLike[str] | None) -> Path:
    """A new folder in `parent` (None: where the system has its temporary files), which goes with its owner.

    Or with the process that made it, those of `multiprocessing` included, which end without `atexit`. In a forked one,
    which has the owner too, nothing is removed: the files are not its own.
    """
    folder = Path(tempfile.mkdtemp(prefix="c4buffer-", dir=parent))
    weakref.finalize(owner, Finalize(None, shutil.rmtree, (folder,), {"ignore_errors": True}, exitpriority=0))
    return folder
