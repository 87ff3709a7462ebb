"""Checkpoints of a run under way: the newest two, each with its SHA-256; a resumed run goes on bit for bit.

They lie in `<output>/checkpoints/<profile>/<task>/<method>/seed_<n>/`, beside a worker's log and progress, and go once
the record is written.
"""

from __future__ import annotations

import hashlib
import io
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scrapl_lib.losses import SCRAPLLoss

from .files import locked, write_bytes_atomic, write_text_atomic
from .records import ROOT, config_hash
from .tasks import RunConfig

# a training's own numbers, beside the states of encoder, optimizer, loss and random number generators
NUMBERS = ("step", "step_s", "history", "epoch_losses", "best_loss", "best_weights")


def checkpoint_folder(config: RunConfig, output: Path = ROOT) -> Path:
    """Where a run's checkpoints and progress are while it is under way; its log is beside the folder."""
    place = Path(config.profile, config.task, config.method, f"seed_{config.seed}")
    return Path(output).absolute() / "checkpoints" / place


def alone(folder: Path) -> AbstractContextManager[bool]:
    """Hold the lock of a run under way; a second process says that it waits, and waits."""
    return locked(folder.with_suffix(".lock"), f"another process computes {folder}: waiting for it")


def save_checkpoint(training: Any, folder: Path) -> None:
    """Write `step_<n>.pt` of a `Training` and its SHA-256; keep it and the one before. Later ones were refused."""
    name, keys, *rest = np.random.get_state()
    state = {number: getattr(training, number) for number in NUMBERS} | {
        "config_hash": config_hash(training.config.flat),
        "encoder": training.encoder.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "paths": training.loss.get_extra_state() if isinstance(training.loss, SCRAPLLoss) else None,
        "torch": torch.get_rng_state(),
        "numpy": (name, keys.tolist(), *rest),
        "cuda": torch.cuda.get_rng_state(training.device) if training.device.type == "cuda" else None,
    }
    buffer, path = io.BytesIO(), folder / f"step_{training.step:08d}.pt"
    torch.save(state, buffer)
    write_bytes_atomic(path, buffer.getvalue())
    write_text_atomic(path.with_suffix(".sha256"), hashlib.sha256(buffer.getvalue()).hexdigest())
    found = sorted(folder.glob("step_*.pt"))
    here = found.index(path)
    for old in found[: max(here - 1, 0)] + found[here + 1 :]:
        old.unlink()
        old.with_suffix(".sha256").unlink(missing_ok=True)


def load_checkpoint(training: Any, folder: Path) -> None:
    """Go on from the newest checkpoint that is whole and of this configuration; say on stderr which ones are not."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink()
    for path in sorted(folder.glob("step_*.pt"), reverse=True):
        try:
            data, digest = path.read_bytes(), path.with_suffix(".sha256").read_text()
            if hashlib.sha256(data).hexdigest() != digest:
                raise ValueError("its SHA-256 is not the one written beside it")
            # to the CPU, where states of generators must stay; load_state_dict moves what belongs on the device
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            if state["config_hash"] != config_hash(training.config.flat):
                raise ValueError("it was written with another configuration")
        except (OSError, ValueError) as error:
            print(f"checkpoint {path} is not used: {error}", file=sys.stderr, flush=True)
            continue
        for number in NUMBERS:
            setattr(training, number, state[number])
        training.epoch_losses = [loss.to(training.device) for loss in state["epoch_losses"]]
        training.encoder.load_state_dict(state["encoder"])
        training.optimizer.load_state_dict(state["optimizer"])
        if state["paths"] is not None:
            training.loss.set_extra_state(state["paths"])
        torch.set_rng_state(state["torch"])
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
        if state.get("cuda") is not None:
            torch.cuda.set_rng_state(state["cuda"], training.device)
        print(f"resumed from step {training.step}: {path}", file=sys.stderr, flush=True)
        return
