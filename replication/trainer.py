"""Trains one run, resumes it, writes its record; and starts the missing runs of a grid in worker processes.

A run is a function of its config alone: initial weights, data order, synthesizer seeds, drawn paths and dropout come from
its seed, so that a run killed anywhere goes on from its newest checkpoint and ends, on a CPU with the same number of
threads, bit for bit as if it had not been. Methods share initial weights and data order.

What lies in `<output>/checkpoints/<profile>/<task>/<method>/seed_<n>/`: at most two checkpoints with their SHA-256, the
worker's log and its progress. It goes once the record is written.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from scrapl_lib.losses import JTFSLoss, SCRAPLLoss, p_loss
from scrapl_lib.optim import PSAGA, PAdam

from .baselines import EmbeddingLoss, MSSLoss, WeightsUnavailable
from .checkpoints import alone, checkpoint_folder
from .data import ThetaGrid, meso_seeds
from .measures import (
    audio_distances,
    convergence_step,
    drum_feature_distances,
    encodec_frames,
    frechet_distance,
    log_mel_statistics,
    theta_l1,
    total_variation,
)
from .path_probabilities import importance_folder, path_probabilities, saved_curvature
from .problem import check_device
from .records import (
    COLUMNS,
    IMPORTANCE,
    ROOT,
    Run,
    config_hash,
    load_runs,
    n_cores,
    read_record,
    read_run,
    run_folder,
    run_state,
    utc_now,
    write_bytes_atomic,
    write_run,
    write_text_atomic,
)
from .tasks import RunConfig, by_worth, grid, needs, run_cost

CHECKPOINT_EVERY_S = 120.0
STOP_S = {"smoke": 10.0, "quick": 60.0, "paper": 60.0}  # what a profile's runs need to come to a stop: see Budget
STOPPED = (os.EX_TEMPFAIL, -signal.SIGUSR1, -signal.SIGTERM)  # exit statuses of a worker that was stopped
PER_GPU, RUN_GIB = (
    4,
    8,
)  # runs at once on a CUDA device: at most so many, each with so much of its memory; see default_workers
CUDA_CHECK_EVERY = 20  # steps between looks at the loss on CUDA, where each look waits for the device
CHUNK = 64  # items at a time where no gradient is needed
# glibc gives large blocks back to the kernel after every use; fetching them again costs more than computing in them
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}


class RunFailed(RuntimeError):
    """A run that cannot go on (non-finite loss, out of memory): recorded as failed, not tried again."""


def default_device(profile: str) -> str:
    """cuda for the paper profile, cpu for the others."""
    return "cuda" if profile == "paper" else "cpu"


def default_workers(device: str) -> int:
    """Runs at once on a device that is here: one per core on a CPU. On a CUDA device, whose small kernels one run seldom fills,
    as many as find RUN_GIB GiB of its memory, at most PER_GPU and one per core: a guess, benchmarks/throughput.py measures."""
    place = torch.device(device)
    if place.type == "cpu":
        return n_cores()
    fit = torch.cuda.get_device_properties(place).total_memory // (RUN_GIB * 2**30)
    return max(1, min(PER_GPU, n_cores(), fit))


def make_deterministic(device: str) -> None:
    """Have this process compute the same bits again, on one type of device and with one version of PyTorch: by deterministic
    algorithms, and in full float32 (TF32 is for some GPUs only). Call it before anything is computed; it cannot be taken back.

    On a CPU an operation without such an algorithm raises RuntimeError; on CUDA a warning names it in the worker's log.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=torch.device(device).type != "cpu")
    torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


class Training:
    """One run in memory. `run()` trains it to its end; `history`, `test()` and `step_ms()` are its results.

    probs: path probabilities (P,), see `path_probabilities`; None: uniform.
    """

    def __init__(self, config: RunConfig, device: torch.device, probs: Tensor | None = None) -> None:
        self.config, self.device = config, device
        torch.manual_seed(config.seed)
        np.random.seed(config.seed)
        self.encoder = config.encoder().to(device)
        self.synth = config.synth()
        self.data = config.data()
        self.theta = (
            self.data.theta.to(device) if isinstance(self.data, ThetaGrid) else None
        )  # of sounds nobody knows it
        self.loss = self._make_loss()
        if probs is not None:
            self.loss.probs = probs
        self.optimizer = self._make_optimizer()
        self.x, self.features = self._render()
        self.S = self._scatter() if config.loss == "jtfs" else None
        self.validation: list[dict] | None = None
        self.heard: dict | None = None
        self.step = 0
        self.step_s: list[float] = []
        self.stopping = False  # a report may set it: a checkpoint is written as soon as it can be, and the process ends
        self.look_every = 1 if device.type == "cpu" else CUDA_CHECK_EVERY
        self.untimed_steps, self.timer_s = 0, 0.0
        self.history: list[tuple[int, str, str, float, float]] = []
        self.epoch_losses: list[Tensor] = []
        self.val_theta_l1 = math.nan
        self.best_loss, self.best_weights = math.inf, self._weights()
        n = config.batch_size * config.accumulate
        self.steps_per_epoch = len(self.data.batches("train", n))
        self.n_steps = config.epochs * self.steps_per_epoch

    def _make_loss(self) -> torch.nn.Module | Callable:
        c = self.config
        if c.loss == "p_loss":
            return p_loss
        if c.loss == "jtfs":
            return JTFSLoss(**c.transform())
        if c.loss == "scrapl":
            return SCRAPLLoss(**c.transform(), seed=c.seed)
        if c.loss.startswith("mss_"):
            return MSSLoss(c.loss).to(self.device)
        return EmbeddingLoss(c.loss, c.sample_rate_hz).to(self.device)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        c = self.config
        options = {"lr": c.lr, "betas": (c.beta1, c.beta2), "eps": c.eps, "weight_decay": c.weight_decay}
        if c.optimizer == "adamw":
            return torch.optim.AdamW(self.encoder.parameters(), **options)
        return {"padam": PAdam, "psaga": PSAGA}[c.optimizer](self.encoder.parameters(), self.loss, **options)

    @torch.no_grad()
    def _render(self) -> tuple[Tensor, Tensor]:
        """Audio (N, 1, samples) and features of the whole data set, made once."""
        if self.theta is None:
            x = functional.pad(self.data.x.to(self.device), (self.config.common_delay, 0))
        else:
            pairs = zip(self.theta.split(CHUNK), self.data.seed.split(CHUNK), strict=True)
            x = torch.cat([self.synth(theta, seeds) for theta, seeds in pairs])
        return x, torch.cat([self.encoder.features(part) for part in x.split(CHUNK)])

    @torch.no_grad()
    def _scatter(self) -> Tensor:
        """JTFS of the references, which come again in every epoch, made once: (N, paths, log-frequency, frames); that of
        test items, which are never trained on, is left empty."""
        known = [items for fold in (self.data.train, self.data.val) for items in fold.split(CHUNK)]
        S = torch.empty(0)
        for items in known:
            part = self.loss.jtfs(self.x[items])
            S = S if len(S) else torch.full((len(self.x), *part.shape[1:]), math.nan, device=self.device)
            S[items] = part
        return S

    def _weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.encoder.state_dict().items()}

    def _batch_loss(self, items: Tensor, seeds: Tensor, **options: object) -> Tensor:
        items = items.to(
            self.device, non_blocking=True
        )  # indexing with a CPU tensor would wait for the device, each time
        theta_hat = self.encoder(self.features[items])
        if self.config.loss == "p_loss":
            return p_loss(theta_hat, self.theta[items])
        if self.S is not None:
            options["S"] = self.S[items]
        return self.loss(self.synth(theta_hat, seeds), self.x[items], **options)

    # ---- training -----------------------------------------------------------------------------------------------

    def run(self, report: Report | None = None, after_step: Callable[[], None] | None = None) -> None:
        """Train to the end from wherever this is. Raises RunFailed for a loss or gradient that is not finite."""
        if self.step == 0:
            self._validate()
        while self.step < self.n_steps:
            epoch, position = divmod(self.step, self.steps_per_epoch)
            batches = self.data.batches(
                "train", self.config.batch_size * self.config.accumulate, epoch, self.config.seed
            )
            for items in batches[position:]:
                self._train_step(items)
                if self.step % self.steps_per_epoch == 0:
                    self._log("train", "loss", float(torch.stack(self.epoch_losses).mean()))
                    self.epoch_losses = []
                    self._validate()
                if report is not None:
                    report(self)
                if after_step is not None:
                    after_step()

    def _train_step(self, items: Tensor) -> None:
        c = self.config
        if self.untimed_steps == 0:
            self.timer_s = time.perf_counter()
        self.step += 1
        self.untimed_steps += 1
        self.encoder.train()
        self.optimizer.zero_grad(set_to_none=True)
        seeds = meso_seeds(c.seed, self.step, len(items))
        mean = torch.zeros((), device=self.device)
        for part, part_seeds in zip(items.split(c.batch_size), seeds.split(c.batch_size), strict=True):
            loss = self._batch_loss(part, part_seeds) / c.accumulate
            (c.gradient_scale * loss).backward()
            mean += loss.detach()
        look = self.stopping or self.step % self.look_every == 0 or self.step % self.steps_per_epoch == 0
        if look:
            self._check_finite(mean)
        if c.lr_end is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = c.lr + (c.lr_end - c.lr) * (self.step - 1) / max(self.n_steps - 1, 1)
        self.optimizer.step()
        self.epoch_losses.append(mean)
        if look:
            elapsed_s = time.perf_counter() - self.timer_s
            self.step_s += [elapsed_s / self.untimed_steps] * self.untimed_steps
            self.untimed_steps = 0

    def _check_finite(self, loss: Tensor) -> None:
        largest = torch.nn.utils.get_total_norm(
            [w.grad for w in self.encoder.parameters() if w.grad is not None], math.inf
        )
        if not (torch.isfinite(loss) and torch.isfinite(largest)):
            path = getattr(self.loss, "path_idx", None)
            where = f"step {self.step}" + ("" if path is None else f", path {path}")
            if self.untimed_steps > 1:
                where = f"one of steps {self.step - self.untimed_steps + 1} to {self.step}"
            raise RunFailed(f"nonfinite at {where}: loss {float(loss)}, largest gradient {float(largest)}")

    def _log(self, split: str, metric: str, value: float) -> None:
        self.history.append((self.step, split, metric, value, sum(self.step_s)))

    @torch.no_grad()
    def _estimate(self, items: Tensor) -> Tensor:
        self.encoder.eval()
        return torch.cat([self.encoder(self.features[part]) for part in items.split(CHUNK)])

    def _theta_l1(self, theta_hat: Tensor, items: Tensor) -> dict[str, float]:
        per_parameter = theta_l1(theta_hat, self.theta[items]).tolist()
        names = [f"theta_{parameter.name}_l1" for parameter in self.synth.parameters]
        return {"theta_synth_l1": sum(per_parameter) / len(names)} | dict(zip(names, per_parameter, strict=True))

    def _validate(self) -> None:
        """Parameter errors and loss on the validation fold, always with the same synthesizer seeds, the same paths (one per
        batch, drawn from the sampling probabilities) and the same random resolutions: epochs differ by the weights alone."""
        if self.theta is not None:
            errors = self._theta_l1(self._estimate(self.data.val), self.data.val)
            for metric, value in errors.items():
                self._log("val", metric, value)
            self.val_theta_l1 = errors["theta_synth_l1"]
        loss = self._validation_loss()
        self._log("val", "loss", loss)
        if loss < self.best_loss:
            self.best_loss, self.best_weights = loss, self._weights()

    def val_words(self) -> str:
        """The last validation in a word: error of theta, or, where that is not known, the loss."""
        losses = [row[3] for row in self.history if row[1:3] == ("val", "loss")]
        return f"{self.val_theta_l1:.0f}‰" if self.theta is not None else f"{losses[-1]:.3g}" if losses else "none yet"

    @torch.no_grad()
    def _validation_loss(self) -> float:
        c, batches = self.config, self.data.batches("val", self.config.batch_size)
        if self.validation is None:
            self.validation = [{}] * len(batches)
            if c.loss == "scrapl":
                generator = torch.Generator().manual_seed(c.seed)
                paths = torch.multinomial(self.loss.probs, len(batches), replacement=True, generator=generator).tolist()
                self.validation = [
                    {"path_idx": p, "S": self.loss.jtfs.path(self.x[items], p)} for p, items in zip(paths, batches)
                ]
        numpy_state = np.random.get_state()
        np.random.seed(c.seed)
        total = 0.0
        for number, (items, option) in enumerate(zip(batches, self.validation, strict=True)):
            seeds = meso_seeds(c.seed, number, len(items), "val")
            total += float(self._batch_loss(items, seeds, **option)) * len(items)
        np.random.set_state(numpy_state)
        return total / len(self.data.val)

    # ---- results ------------------------------------------------------------------------------------------------

    def test(self) -> pd.DataFrame:
        """Test values of the weights with the lowest validation loss: columns metric, value, unit."""
        self.encoder.load_state_dict(self.best_weights)
        rows = self._test_sounds() if self.theta is None else self._test_parameters()
        return pd.DataFrame(rows, columns=COLUMNS["test.csv"])

    def _test_parameters(self) -> list[tuple]:
        items = self.data.test
        theta_hat = self._estimate(items)
        rows = [(metric, value, "permille") for metric, value in self._theta_l1(theta_hat, items).items()]
        names = {"theta_synth": "val"} | {f"theta_{p.name}": f"theta_{p.name}" for p in self.synth.parameters}
        for name, shown in names.items():
            validated = [(row[0], row[3]) for row in self.history if row[1:3] == ("val", f"{name}_l1")]
            steps, values = zip(*validated, strict=True)
            if name == "theta_synth" and self.config.epochs > 1:
                rows.append(("val_total_variation", total_variation(values[1:]), "permille"))
            if (converged := convergence_step(steps, values)) is not None:
                rows.append((f"{shown}_convergence_steps", converged, "steps"))
        chosen = torch.linspace(0, len(items) - 1, min(self.config.n_audio_test, len(items))).round().long()
        seeds = meso_seeds(self.config.seed, 0, len(chosen), "test")
        with torch.no_grad():
            pairs = zip(theta_hat[chosen].split(CHUNK), seeds.split(CHUNK), strict=True)
            x_hat = torch.cat([self.synth(theta, part) for theta, part in pairs])
        jtfs = JTFSLoss(**self.config.transform())
        distances = audio_distances(x_hat, self.x[items[chosen]], ["jtfs", "mss_log_linear"], jtfs=jtfs, batch_size=8)
        rows += [(f"{name}_distance", value, "1") for name, value in distances.items()]
        return rows

    def _test_sounds(self) -> list[tuple]:
        """Reconstructions as they are, without a random shift, against the sounds (section 8). Of each kind of drum, what was
        estimated for the first test sound is kept, as `heard`, for listening."""
        c, items = self.config, self.data.test
        theta_hat = self._estimate(items)
        with torch.no_grad():
            parts = theta_hat.split(CHUNK)
            x_hat = torch.cat([self.synth.render(theta, torch.zeros(len(theta), dtype=torch.long)) for theta in parts])
        x = self.x[items]
        jtfs = self.loss if c.loss == "jtfs" else JTFSLoss(**c.transform())
        values = {
            f"{name}_distance": value
            for name, value in audio_distances(x_hat, x, ["jtfs", "mss_log_linear"], jtfs=jtfs, batch_size=8).items()
        }
        x_hat, x = (audio[..., c.common_delay :] for audio in (x_hat, x))
        features = drum_feature_distances(x_hat, x, c.sample_rate_hz)
        values |= {f"{name}_l1": value for name, value in features.items()}
        values["frechet_log_mel"] = frechet_distance(
            *(log_mel_statistics(audio, c.sample_rate_hz) for audio in (x_hat, x))
        )
        with contextlib.suppress(WeightsUnavailable):
            values["fad_encodec"] = frechet_distance(*(encodec_frames(audio, c.sample_rate_hz) for audio in (x_hat, x)))
        first = {self.data.kinds[item]: row for row, item in reversed(list(enumerate(items.tolist())))}
        self.heard = {self.data.names[items[row]]: theta_hat[row].tolist() for _, row in sorted(first.items())}
        return [(metric, value, "1") for metric, value in values.items()]

    def history_table(self) -> pd.DataFrame:
        """Training and validation values: columns step, split, metric, value, wall_s (time in training steps)."""
        return pd.DataFrame(self.history, columns=COLUMNS["history.csv"])

    def step_ms(self) -> dict[str, float] | None:
        """Median, quartiles and number of the training steps' durations in milliseconds; the first step is left out."""
        if len(self.step_s) < 2:
            return None
        q25, median, q75 = np.percentile(np.array(self.step_s[1:]) * 1000, [25, 50, 75])
        return {"median": float(median), "q25": float(q25), "q75": float(q75), "n": len(self.step_s) - 1}

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def state(self) -> dict:
        """Everything a resumed run needs, in types that `torch.load(weights_only=True)` reads."""
        name, keys, *rest = np.random.get_state()
        state = {
            "config_hash": config_hash(self.config.flat),
            "encoder": self.encoder.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "step_s": self.step_s,
            "history": self.history,
            "epoch_losses": self.epoch_losses,
            "val_theta_l1": self.val_theta_l1,
            "best_loss": self.best_loss,
            "best_weights": self.best_weights,
            "torch": torch.get_rng_state(),
            "numpy": (name, keys.tolist(), *rest),
            "paths": self.loss.get_extra_state() if self.config.loss == "scrapl" else None,
        }
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def load_state(self, state: dict) -> None:
        """Take over what `state()` of a training of the same config returned."""
        self.encoder.load_state_dict(state["encoder"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in ("step", "step_s", "history", "epoch_losses", "val_theta_l1", "best_loss", "best_weights"):
            setattr(self, name, state[name])
        if state["paths"] is not None:
            self.loss.set_extra_state(state["paths"])
        torch.set_rng_state(state["torch"].cpu())
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"].cpu(), self.device)


Report = Callable[[Training], None]  # called after every step; may raise to stop at once, or set `stopping`


def save_checkpoint(training: Training, folder: Path) -> None:
    """Write `step_<n>.pt` and its SHA-256, atomically; keep it and the one before. Those of later steps were refused."""
    buffer = io.BytesIO()
    torch.save(training.state(), buffer)
    data = buffer.getvalue()
    path = folder / f"step_{training.step:08d}.pt"
    write_bytes_atomic(path, data)
    write_text_atomic(path.with_suffix(".sha256"), hashlib.sha256(data).hexdigest())
    found = sorted(folder.glob("step_*.pt"))
    kept = [old for old in found if old <= path][-2:]
    for old in set(found) - set(kept):
        old.unlink()
        old.with_suffix(".sha256").unlink(missing_ok=True)


def load_checkpoint(training: Training, folder: Path) -> None:
    """Go on from the newest checkpoint that is whole and of this configuration; say which ones are not."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink()
    for path in sorted(folder.glob("step_*.pt"), reverse=True):
        try:
            data, digest = path.read_bytes(), path.with_suffix(".sha256").read_text()
            if hashlib.sha256(data).hexdigest() != digest:
                raise ValueError("its SHA-256 is not the one written beside it")
            state = torch.load(io.BytesIO(data), map_location=training.device, weights_only=True)
            if state["config_hash"] != config_hash(training.config.flat):
                raise ValueError("it was written with another configuration")
        except (OSError, ValueError) as error:
            print(f"checkpoint {path} is not used: {error}", file=sys.stderr, flush=True)
        else:
            training.load_state(state)
            print(f"resumed from step {training.step}: {path}", file=sys.stderr, flush=True)
            return


def train(
    config: RunConfig,
    output: Path = ROOT,
    device: str = "cpu",
    report: Report | None = None,
    checkpoint_every_s: float = CHECKPOINT_EVERY_S,
) -> Run:
    """Train one run to its end, from its newest checkpoint if there is one, and write its record.

    A finished or failed run is returned as it is. `report` is called after every step; where it sets `stopping`, a checkpoint
    is written and the process ends with status os.EX_TEMPFAIL.

    Raises: ValueError for a missing device, a stale record in the way or missing path probabilities; BrokenRecord for a
    broken record.
    """
    place = check_device(device)
    folder = run_folder(config.profile, config.task, config.method, config.seed, output)
    checkpoints = checkpoint_folder(config, output)
    with alone(checkpoints):
        state = run_state(folder, config_hash(config.flat))
        if state == "stale":
            raise ValueError(f"{folder} holds a record of another configuration: delete that folder to run it again")
        if state == "missing":
            _train(config, folder, checkpoints, place, report, checkpoint_every_s, output)
        shutil.rmtree(checkpoints, ignore_errors=True)
    return read_run(folder)


def _train(
    config: RunConfig,
    folder: Path,
    checkpoints: Path,
    device: torch.device,
    report: Report | None,
    checkpoint_every_s: float,
    output: Path,
) -> None:
    start_utc, status, saved_s = utc_now(), "ok", time.monotonic()
    probs, drawn_from = None, {}
    if config.method == "scrapl":
        probs, (record, _) = path_probabilities(config, output), read_record(importance_folder(config, output))
        drawn_from = {"probabilities_sha256": record["files"]["probabilities.csv"]["sha256"]}
    training, test, heard = None, pd.DataFrame([], columns=COLUMNS["test.csv"]), {}

    def after_step() -> None:
        nonlocal saved_s
        due = training.stopping or training.step == training.n_steps or time.monotonic() - saved_s >= checkpoint_every_s
        if training.untimed_steps == 0 and due:
            save_checkpoint(training, checkpoints)
            saved_s = time.monotonic()
            if training.stopping:
                sys.exit(os.EX_TEMPFAIL)

    try:
        training = Training(config, device, probs)
        load_checkpoint(training, checkpoints)
        training.run(report, after_step)
        test = training.test()
        if training.heard is not None:
            heard["heard"] = training.heard
    except RunFailed as error:
        status = f"failed:{error}"
    except (torch.OutOfMemoryError, MemoryError) as error:
        status = f"failed:out of memory: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    history = training.history_table() if training else pd.DataFrame([], columns=COLUMNS["history.csv"])
    write_run(
        folder,
        status=status,
        config=config.flat,
        history=history,
        test=test,
        start_utc=start_utc,
        device=device,
        threads=torch.get_num_threads(),
        train_step_ms=training.step_ms() if training else None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **drawn_from,
        **heard,
    )


# ---- many runs --------------------------------------------------------------------------------------------------------


def watch_parent() -> Callable[[], None]:
    """A function that ends the worker when the process that started it is gone."""
    parent = os.getppid()

    def watch() -> None:
        if os.getppid() != parent:
            sys.exit("stopped: the process that started this worker is gone")

    return watch


def write_progress(path: Path) -> Report:
    """A report that writes step, number of steps, loss and validation error to `path`, twice a second at most; it ends
    the worker when the process that started it is gone, and stops the training once SIGUSR1 asks for it."""
    last_s, watch, asked = 0.0, watch_parent(), []
    signal.signal(signal.SIGUSR1, lambda *_: asked.append(True))

    def report(training: Training) -> None:
        nonlocal last_s
        watch()
        training.stopping = bool(asked)
        if time.monotonic() - last_s > 0.5:
            last_s = time.monotonic()
            loss = float(training.epoch_losses[-1]) if training.epoch_losses else None
            progress = {"step": training.step, "of": training.n_steps, "loss": loss, "val": training.val_words()}
            write_text_atomic(path, json.dumps(progress))

    return report


@functools.cache
def _n_paths(config: RunConfig) -> int:
    return SCRAPLLoss(**config.transform()).n_paths


class Worker:
    """One run in a process of its own, or the path probabilities of a task: all, or of `paths` such as "0-99".

    apart: in a process group of its own, so that signals to that of the caller do not reach it.
    """

    def __init__(
        self,
        config: RunConfig,
        output: Path,
        device: str,
        deterministic: bool = False,
        paths: str = "",
        apart: bool = False,
    ) -> None:
        self.config, self.output, self.folder = config, output, checkpoint_folder(config, output)
        self.name = f"{config.task}/{config.method}/" + (f"paths {paths}" if paths else f"seed {config.seed}")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = self.folder.with_name(f"{self.folder.name}{paths and '_' + paths}.log")
        of_run = ["run", "--method", config.method, "--seeds", str(config.seed)]
        command = [
            sys.executable,
            "-m",
            "replication",
            *(["importance"] if config.method == IMPORTANCE else of_run),
            "--worker",
            "--task",
            config.task,
            "--profile",
            config.profile,
            "--device",
            device,
            "--output",
            str(output),
            *(["--deterministic"] if deterministic else []),
            *(["--paths", paths] if paths else []),
        ]
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if device == "cpu" else {}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env=os.environ | KEEP_MEMORY | threads,
                process_group=0 if apart else None,
            )

    def progress(self) -> dict:
        try:
            if self.config.method == IMPORTANCE:
                n_done = len(saved_curvature(self.config, self.output))
                return {"step": n_done, "of": _n_paths(self.config), "loss": None, "val": ""}
            return json.loads((self.folder / "progress.json").read_text())
        except (OSError, ValueError):
            return {"step": 0, "of": 1, "loss": None, "val": ""}

    def words(self) -> str:
        """What is in its log."""
        with contextlib.suppress(FileNotFoundError):  # another process may have finished this run and tidied up
            return self.log.read_text(errors="replace").strip()
        return ""

    def crash(self) -> str:
        """What is to be said of its crash."""
        last = (self.words().splitlines() or ["nothing in its log"])[-1]
        return f"{self.name} crashed (exit status {self.process.returncode}: {last}); log: {self.log}"


@dataclass
class Budget:
    """Time for a call of `ensure_runs`.

    stop_s before its end the workers are asked to stop: each writes a checkpoint after the step that it is at. So that it comes
    to one, none is started with less than three times stop_s to go. What still runs when a fifth of stop_s is left is ended.

    end_s: when it is over, on the clock time.monotonic(). left: the call lists here which runs it stopped or did not start.
    """

    end_s: float
    stop_s: float
    left: list[RunConfig] = field(default_factory=list)


def kept_of(config: RunConfig, output: Path = ROOT) -> str:
    """How much there is of a run under way, or of path probabilities, for the next call to go on from; "" for nothing."""
    folder = checkpoint_folder(config, output)
    if config.method == IMPORTANCE:
        n_paths = len(saved_curvature(config, output))
        return f"{n_paths} paths" if n_paths else ""
    steps = [int(path.stem.removeprefix("step_")) for path in folder.glob("step_*.pt")]
    return f"step {max(steps)}" if steps else ""


def states(configs: Iterable[RunConfig], output: Path = ROOT) -> dict[RunConfig, str]:
    """What is on disk of each run: done, failed, stale or missing. Raises BrokenRecord."""
    return {c: run_state(run_folder(c.profile, c.task, c.method, c.seed, output), config_hash(c.flat)) for c in configs}


def runs_on_disk(task: str, profile: str = "quick", output: Path = ROOT) -> list[Run]:
    """The finished and failed runs of a task's grid; stale ones are left out with a warning. Raises BrokenRecord."""
    expected = {(c.method, c.seed): config_hash(c.flat) for c in grid(task, profile)}
    return load_runs(profile, task, expected, output)


def ensure_runs(
    tasks: Iterable[str],
    methods: Iterable[str] | None = None,
    seeds: Iterable[int] | None = None,
    profile: str = "quick",
    output: Path = ROOT,
    device: str | None = None,
    workers: int | None = None,
    budget: Budget | None = None,
    deterministic: bool = False,
    jobs: Callable[[list[RunConfig]], None] | None = None,
) -> list[Run]:
    """Compute what is missing of a grid, each run in a worker process of one thread, and return what is then on disk.

    Runs with theta-IS wait for their path probabilities, which are computed beside the other runs. A worker that crashes
    costs its own run: it is named with the last line of its log, the others go on, and the next call takes it up from
    its checkpoint. Runs that failed (status "failed:...") are not tried again, stale ones are named and
    left alone: delete a run's folder to ask for it anew.

    The dearest run comes first, so that the whole grid is done soonest; with a budget they come `by_worth`.

    Args:
        tasks, methods, seeds: of the grid; None means all of the profile.
        output: folder that holds results/ and checkpoints/. device: cpu or cuda; None: what the profile wants.
        workers: processes at once; None: see `default_workers`.
        budget: when to stop, checkpoints written; None: when all is done.
        deterministic: see `make_deterministic`.
        jobs: what computes these runs instead of workers of this machine, such as `cluster.Jobs`, which knows the device, how many
            at once and whether deterministic; with it, device, workers, budget and deterministic are not looked at.
    Raises:
        ValueError: unknown names, workers below 1, or a device that is not here; BrokenRecord.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if jobs is None:
        check_device(device or "cpu")
    output = Path(output).absolute()
    seeds = None if seeds is None else list(seeds)
    methods = None if methods is None else list(methods)
    configs = [config for task in tasks for config in grid(task, profile, methods, seeds)]
    found = states(configs, output)
    for config in (c for c, state in found.items() if state == "stale"):
        folder = run_folder(config.profile, config.task, config.method, config.seed, output)
        print(
            f"stale, not used: {folder} was made with another configuration; delete it to run it again", file=sys.stderr
        )
    missing = sorted((c for c, state in found.items() if state == "missing"), key=lambda c: (-run_cost(c), c.seed))
    if missing:
        if jobs is None:
            device = device or default_device(profile)
            check_device(device)
        needed = states(dict.fromkeys(needs(c) for c in missing if c.method == "scrapl"), output)
        if stale := [c for c, state in needed.items() if state not in ("done", "missing")]:
            print(
                *(f"{c.task}: no scrapl runs, the path probabilities are {needed[c]}" for c in stale),
                sep="\n",
                file=sys.stderr,
            )
            missing = [c for c in missing if needs(c) not in stale]
        order = [c for c, state in needed.items() if state == "missing"] + missing
        if budget is not None:
            done = {c: state for c, state in found.items() if state == "done"}
            order = by_worth(done | dict.fromkeys(order, "missing"))
        if jobs is None:
            _run_all(
                order,
                output,
                device,
                workers or default_workers(device),
                budget or Budget(math.inf, 0.0),
                deterministic,
            )
        else:
            jobs(order)
    runs = []
    for task in dict.fromkeys(config.task for config in configs):
        expected = {(c.method, c.seed): config_hash(c.flat) for c in configs if c.task == task and found[c] != "stale"}
        runs += load_runs(profile, task, expected, output)
    return runs


def _run_all(
    missing: list[RunConfig], output: Path, device: str, n_workers: int, budget: Budget, deterministic: bool
) -> None:
    """Run all in workers, in the order given, except that a run waits for the path probabilities it needs."""
    waiting, running, crashed = list(missing), [], []
    finished, asked = 0.0, False
    bar_format = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    interval_s = 0.5 if sys.stderr.isatty() else 10
    bar = tqdm(
        total=sum(map(run_cost, missing)), desc=f"{len(missing)} runs", bar_format=bar_format, mininterval=interval_s
    )
    try:
        while waiting or running:
            left_s = budget.end_s - time.monotonic()
            if left_s < 3 * budget.stop_s:
                budget.left += waiting
                waiting = []
            if left_s < budget.stop_s and not asked:
                asked = True
                for worker in running:
                    worker.process.send_signal(signal.SIGUSR1)
            if left_s < budget.stop_s / 5:
                for worker in running:
                    worker.process.terminate()
            under_way = {*waiting, *(worker.config for worker in running)}
            free = [c for c in waiting if needs(c) not in under_way][: n_workers - len(running)]
            running += [Worker(c, output, device, deterministic) for c in free]
            waiting = [c for c in waiting if c not in free]
            time.sleep(0.2)
            for worker in [w for w in running if w.process.poll() is not None]:
                running.remove(worker)
                status = worker.process.returncode
                if stopped := asked and status in STOPPED:
                    budget.left.append(worker.config)
                else:
                    finished += run_cost(worker.config)
                if status and not stopped:
                    crashed.append(worker)
                    bar.write(worker.crash(), file=sys.stderr)
                    if any(needs(c) == worker.config for c in waiting):
                        bar.write(
                            f"{worker.config.task}: no scrapl runs, the path probabilities are missing", file=sys.stderr
                        )
                        waiting = [c for c in waiting if needs(c) != worker.config]
                else:
                    if words := worker.words():
                        bar.write(f"{worker.name}: {words}", file=sys.stderr)
                    worker.log.unlink(missing_ok=True)
            progress = [(w, w.progress()) for w in running]
            bar.n = min(bar.total, finished + sum(run_cost(w.config) * p["step"] / p["of"] for w, p in progress))
            now = "; ".join(
                f"{w.config.method} {w.config.seed}: loss {p['loss']:.3g}, val {p['val']}"
                for w, p in progress
                if p["loss"] is not None
            )
            n_done = len(missing) - len(waiting) - len(running) - len(budget.left)
            bar.set_postfix_str(f"{n_done} done; {now}", refresh=False)
            bar.update(0)
    finally:
        for worker in running:
            worker.process.terminate()
        for worker in running:
            worker.process.wait()
        bar.close()
    if crashed:
        names = ", ".join(worker.name for worker in crashed)
        print(
            f"{len(crashed)} of {len(missing)} runs crashed: {names}; the same command tries them again",
            file=sys.stderr,
        )
