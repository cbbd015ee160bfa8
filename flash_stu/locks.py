"""Locks between processes that end with the process that has them, however it dies."""

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import Literal, overload

_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}  # from file systems that have none


@overload
def lock(path: Path, wait: Literal[True]) -> int: ...
@overload
def lock(path: Path, wait: Literal[False] = False) -> int | None: ...
def lock(path: Path, wait: bool = False) -> int | None:
    """Lock a file, which is made if needed; whoever holds the lock may delete it.

    Args:
        path: the file.
        wait: for the process that has the lock.

    Returns:
        a descriptor for `unlock`; the lock ends with this process, and its forks, at the latest. None if another
        process has the lock.

    Raises:
        OSError: if the file cannot be opened.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return descriptor
            os.close(descriptor)
            raise
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its last holder has deleted it


def unlock(descriptor: int) -> None:
    """Release what `lock` returned."""
    with suppress(OSError):  # closing alone leaves it to processes that were forked meanwhile
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
