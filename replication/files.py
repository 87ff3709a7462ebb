"""How files are written and locked: nobody ever reads half a file, and two processes do not do the same work."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
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


def kept_array(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """What `make` makes, kept in an .npy file with its SHA-256 at the end: mapped into memory, which processes share.

    A file that is not as it was written is made again, an array that cannot be written goes unkept; both are said on
    stderr. Of processes that want the same file at once one makes it, the others wait.
    """
    if (x := _as_written(path)) is not None:
        return x
    try:
        with locked(path.with_suffix(".lock"), f"another process makes {path}: waiting for it"):
            if (x := _as_written(path)) is not None:
                return x
            if path.exists():
                print(f"{path} is not what was written there: making it again", file=sys.stderr, flush=True)
            for leftover in path.parent.glob(f".{path.name}.*.tmp"):
                leftover.unlink()
            file, x = io.BytesIO(), make()
            np.save(file, x)
            write_bytes_atomic(path, file.getvalue() + hashlib.sha256(file.getvalue()).digest())
    except OSError as error:
        print(f"{path} cannot be written and is not kept: {error}", file=sys.stderr, flush=True)
    kept = _as_written(path)
    return kept if kept is not None else make() if x is None else x


def _as_written(path: Path) -> np.ndarray | None:
    """The array of a file of `kept_array`; None if it is not there or not as it was written."""
    with contextlib.suppress(OSError, ValueError):
        data = np.memmap(path, np.uint8, "r")
        if hashlib.sha256(data[:-32]).digest() == data[-32:].tobytes():
            return np.load(path, mmap_mode="c")
    return None
