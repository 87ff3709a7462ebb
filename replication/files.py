"""How files are written and locked: nobody ever reads half a file, and two processes do not do the same work."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from filelock import FileLock, Timeout

NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}  # what disks without locks answer


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write `data` to a temporary name in the same folder (made when missing), then rename: all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text_atomic(path: Path, text: str) -> None:
    """`write_bytes_atomic` of UTF-8 text with its line ends unchanged."""
    write_bytes_atomic(path, text.encode())


def csv_bytes(frame: pd.DataFrame) -> bytes:
    """A table as CSV without its index: floats with 9 significant digits, NaN as an empty cell, Unix line ends."""
    return frame.to_csv(index=False, float_format="%.9g", lineterminator="\n").encode()


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """`write_bytes_atomic` of `csv_bytes`."""
    write_bytes_atomic(path, csv_bytes(frame))


@contextlib.contextmanager
def locked(path: Path, waiting: str) -> Iterator[bool]:
    """Hold the lock file `path` (made when missing); while another process holds it, say `waiting` on stderr and wait.

    Yields whether it had to wait. The lock ends with the process, however that ends; the file stays. On a disk that
    supports no locks, which some network disks do not, a warning says so and the work goes on without.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, waited = FileLock(path, fallback_to_soft=False), False
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waited = True
            print(waiting, file=sys.stderr, flush=True)
            lock.acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        why = f"supports no locks ({error.strerror}): do not start this twice at once"
        print(f"warning: the disk of {path.parent} {why}", file=sys.stderr, flush=True)
    try:
        yield waited
    finally:
        lock.release()
