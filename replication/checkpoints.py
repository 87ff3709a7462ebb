"""Where a run's checkpoints are, and that only one process computes it."""

from __future__ import annotations

import contextlib
import fcntl
import sys
from collections.abc import Iterator
from pathlib import Path

from .records import ROOT
from .tasks import RunConfig


def checkpoint_folder(config: RunConfig, output: Path = ROOT) -> Path:
    """Where a run's checkpoints, log and progress are while it is under way."""
    return (
        Path(output).absolute() / "checkpoints" / config.profile / config.task / config.method / f"seed_{config.seed}"
    )


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a run under way; a second process says that it waits, and waits."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process computes {folder}: waiting for it", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
