"""Trains one run: the loop (`Training.steps`), and from a config to its record (`train`).

A run is a function of its config alone: initial weights, data order, synthesizer seeds, drawn paths and dropout come
from its seed, so that a run killed anywhere goes on from its newest checkpoint and ends, on a CPU with the same number
of threads, bit for bit as if it had not been. Methods share initial weights and data order.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from scrapl_lib.losses import SCRAPLLoss, p_loss

from .checkpoints import alone, checkpoint_folder, load_checkpoint, save_checkpoint
from .data import meso_seeds
from .evaluate import evaluate
from .files import write_text_atomic
from .path_probabilities import path_probabilities
from .problem import CHUNK, Problem, check_device
from .records import COLUMNS, ROOT, Run, config_hash, read_run, run_folder, run_state, utc_now, write_run
from .references import drawn, kept_references
from .tasks import RunConfig, needs

CHECKPOINT_EVERY_S = 120.0
LOOK_EVERY = {"cpu": 1, "cuda": 20}  # steps between looks at the loss; on CUDA each look waits for the device


class RunFailed(RuntimeError):
    """A run that cannot go on, for its loss or gradient is not finite: recorded as failed, not tried again."""


class Training(Problem):
    """One run in memory: a problem, its optimizer, and how far it has come.

    Attributes: step, of n_steps; step_s, the seconds of each; history, rows of history.csv; best_weights, those of the
    lowest validation loss, best_loss. looked: whether the loss of the last step was looked at, which on CUDA happens
    every `look_every` steps; only then may a checkpoint be taken. stopping: set it, and the next step is looked at.
    """

    def __init__(self, config: RunConfig, device: torch.device | str = "cpu", probs: Tensor | None = None) -> None:
        super().__init__(config, device, probs)
        self.optimizer = config.make_optimizer(self.encoder.parameters(), self.loss)
        self.steps_per_epoch = len(self.data.batches("train", config.batch_size * config.accumulate))
        self.n_steps = config.epochs * self.steps_per_epoch
        self.look_every = LOOK_EVERY[self.device.type]
        self.stopping, self.looked = False, True
        self.step, self.step_s = 0, []
        self.history: list[tuple[int, str, str, float, float]] = []
        self.epoch_losses: list[Tensor] = []
        self.best_loss, self.best_weights = math.inf, self.weights()
        self.S = self._references() if config.loss == "jtfs" else None
        self.kept: dict[int, Tensor] = {}
        self._validation: list[dict] | None = None

    def steps(self) -> Iterator[int]:
        """Train from wherever this is to the end of the last epoch; yield the number of every step once it is taken.

        Raises RunFailed for a loss or gradient that is not finite.
        """
        c = self.config
        if self.step == 0:
            self.validate()
        for epoch in range(self.step // self.steps_per_epoch, c.epochs):
            batches = self.data.batches("train", c.batch_size * c.accumulate, epoch, c.seed)
            for items in batches[self.step % self.steps_per_epoch :]:
                # the batch; its reconstructions get synthesizer seeds that no reference was rendered with
                if self.looked:
                    untimed, start_s = 0, time.perf_counter()
                self.step, untimed = self.step + 1, untimed + 1
                seeds = meso_seeds(c.seed, self.step, len(items))

                # forward and backward, in parts of batch_size
                self.encoder.train()
                self.optimizer.zero_grad(set_to_none=True)
                loss = torch.zeros((), device=self.device)
                for part, part_seeds in zip(items.split(c.batch_size), seeds.split(c.batch_size), strict=True):
                    part_loss = self.batch_loss(part, part_seeds) / c.accumulate
                    (c.gradient_scale * part_loss).backward()
                    loss += part_loss.detach()

                # a look at what came out, and the update
                epoch_ends = self.step % self.steps_per_epoch == 0
                self.looked = self.stopping or epoch_ends or self.step % self.look_every == 0
                if self.looked:
                    self.check_finite(loss, untimed)
                if c.lr_end is not None:
                    for group in self.optimizer.param_groups:
                        group["lr"] = c.lr + (c.lr_end - c.lr) * (self.step - 1) / max(self.n_steps - 1, 1)
                self.optimizer.step()
                self.epoch_losses.append(loss)
                if self.looked:
                    self.step_s += [(time.perf_counter() - start_s) / untimed] * untimed

                # validation
                if epoch_ends:
                    self._log("train", "loss", float(torch.stack(self.epoch_losses).mean()))
                    self.epoch_losses = []
                    self.validate()
                yield self.step

    def batch_loss(self, items: Tensor, seeds: Tensor, **options: object) -> Tensor:
        """Loss of the data set's `items`, reconstructed with synthesizer seeds `seeds`. options: of a SCRAPL loss."""
        items = items.to(self.device, non_blocking=True)  # an index on the CPU would wait for the device, each time
        theta_hat = self.encoder(self.features[items])
        if self.config.loss == "p_loss":
            return p_loss(theta_hat, self.theta[items])
        if self.S is not None:
            options["S"] = self.S[items]
        elif self.kept and not options:
            path = self.loss.draw()
            options = {"path_idx": path, "S": drawn(self.kept, items, self.loss.draws[path])}
        return self.loss(self.synth(theta_hat, seeds), self.x[items], **options)

    def keep_references(self, folder: Path, report: Callable[[float], object] = lambda share: None) -> None:
        """Take the references' coefficients from files, see `kept_references`, where that pays: on a CPU, for SCRAPL on
        a grid of sounds. (Drums: 12 MB a sound at the paper's size, and few steps.)"""
        if isinstance(self.loss, SCRAPLLoss) and self.theta is not None and self.device.type == "cpu":
            with torch.no_grad():
                self.kept = kept_references(self.loss.jtfs, self.x, self.data.train, folder, report)

    @torch.no_grad()
    def _references(self) -> Tensor:
        """JTFS of the references, which come again in every epoch, made once: (N, paths, log-frequency, frames).

        That of test items, which are never trained on, is left empty."""
        S = torch.empty(0)
        for items in [*self.data.train.split(CHUNK), *self.data.val.split(CHUNK)]:
            part = self.loss.jtfs(self.x[items])
            S = S if len(S) else torch.full((len(self.x), *part.shape[1:]), math.nan, device=self.device)
            S[items] = part
        return S

    def check_finite(self, loss: Tensor, n_steps: int) -> None:
        """Raise RunFailed unless loss and gradients are finite; n_steps: since the last look."""
        gradients = [w.grad for w in self.encoder.parameters() if w.grad is not None]
        largest = torch.nn.utils.get_total_norm(gradients, math.inf)
        if not (torch.isfinite(loss) and torch.isfinite(largest)):
            path = getattr(self.loss, "path_idx", None)
            where = f"step {self.step}" + ("" if path is None else f", path {path}")
            where = where if n_steps == 1 else f"one of steps {self.step - n_steps + 1} to {self.step}"
            raise RunFailed(f"nonfinite at {where}: loss {float(loss)}, largest gradient {float(largest)}")

    @torch.no_grad()
    def validate(self) -> None:
        """Log parameter errors and loss on the validation fold, and keep the weights of the lowest loss.

        Always with the same synthesizer seeds, paths (one per batch, drawn from the sampling probabilities) and random
        resolutions: epochs differ by the weights alone.
        """
        c, items_of_fold = self.config, self.data.val
        if self.theta is not None:
            for metric, value in self.theta_errors(self.estimate(items_of_fold), items_of_fold).items():
                self._log("val", metric, value)
        batches, total = self.data.batches("val", c.batch_size), 0.0
        if self._validation is None:
            self._validation = [{}] * len(batches)
            if isinstance(self.loss, SCRAPLLoss):
                generator = torch.Generator().manual_seed(c.seed)
                paths = torch.multinomial(self.loss.probs, len(batches), replacement=True, generator=generator).tolist()
                references = [self.loss.coefficients(self.x[items], path) for path, items in zip(paths, batches)]
                self._validation = [{"path_idx": path, "S": S} for path, S in zip(paths, references)]
        self.encoder.eval()
        numpy_state = np.random.get_state()
        np.random.seed(c.seed)
        for number, (items, options) in enumerate(zip(batches, self._validation, strict=True)):
            seeds = meso_seeds(c.seed, number, len(items), "val")
            total += float(self.batch_loss(items, seeds, **options)) * len(items)
        np.random.set_state(numpy_state)
        loss = total / len(items_of_fold)
        self._log("val", "loss", loss)
        if loss < self.best_loss:
            self.best_loss, self.best_weights = loss, self.weights()

    def _log(self, split: str, metric: str, value: float) -> None:
        self.history.append((self.step, split, metric, value, sum(self.step_s)))

    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.encoder.state_dict().items()}

    def history_table(self) -> pd.DataFrame:
        """Training and validation values: columns step, split, metric, value, wall_s (time in training steps)."""
        return pd.DataFrame(self.history, columns=COLUMNS["history.csv"])

    def step_ms(self) -> dict[str, float] | None:
        """Median, quartiles and number of the training steps' durations in milliseconds; the first step is left out."""
        if len(self.step_s) < 2:
            return None
        q25, median, q75 = np.percentile(np.array(self.step_s[1:]) * 1000, [25, 50, 75])
        return {"median": float(median), "q25": float(q25), "q75": float(q75), "n": len(self.step_s) - 1}


def fit(config: RunConfig, device: torch.device | str = "cpu") -> Training:
    """Train in memory, without record or checkpoints, and return what came of it."""
    training = Training(config, device)
    for _ in training.steps():
        pass
    return training


def train(config: RunConfig, output: Path = ROOT, device: str = "cpu") -> Run:
    """`train_steps` to the end of the run; a finished or failed one is returned as it is."""
    for _ in train_steps(config, output, device):
        pass
    return read_run(run_folder(config.profile, config.task, config.method, config.seed, output))


def train_steps(
    config: RunConfig, output: Path = ROOT, device: str = "cpu", checkpoint_every_s: float | None = None
) -> Iterator[Training]:
    """Train one run, from its newest checkpoint if there is one, and write its record. Yields the training after every
    step, and takes a checkpoint, if one is due, when asked to go on.

    checkpoint_every_s: None is CHECKPOINT_EVERY_S. Whoever sets `stopping` of the training gets a checkpoint as soon as
    one can be taken, and no more steps and no record. The run's lock is held until this ends or is closed.

    Raises: ValueError for a missing device, a stale record in the way or missing path probabilities; BrokenRecord.
    """
    place = check_device(device)
    folder = run_folder(config.profile, config.task, config.method, config.seed, output)
    checkpoints = checkpoint_folder(config, output)
    with alone(checkpoints):
        state = run_state(folder, config_hash(config.flat))
        if state == "stale":
            raise ValueError(f"{folder} holds a record of another configuration: delete that folder to run it again")
        if state == "missing":
            start_utc, status, saved_s = utc_now(), "ok", time.monotonic()
            every_s = CHECKPOINT_EVERY_S if checkpoint_every_s is None else checkpoint_every_s
            history, test = (pd.DataFrame([], columns=columns) for columns in COLUMNS.values())
            probs, more, training = None, {}, None
            if needs(config):
                probs, more["probabilities_sha256"] = path_probabilities(config, output)
            try:
                training = Training(config, place, probs)
                training.keep_references(Path(output, "cache").absolute(), functools.partial(_say, checkpoints))
                load_checkpoint(training, checkpoints)
                for step in training.steps():
                    yield training
                    due = step == training.n_steps or time.monotonic() - saved_s >= every_s
                    if training.looked and (training.stopping or due):
                        save_checkpoint(training, checkpoints)
                        saved_s = time.monotonic()
                        if training.stopping:
                            return
                training.encoder.load_state_dict(training.best_weights)
                test, heard = evaluate(training, training.history)
                more |= heard
            except RunFailed as error:
                status = f"failed:{error}"
            except (torch.OutOfMemoryError, MemoryError) as error:
                status = f"failed:out of memory: {(str(error).splitlines() or [type(error).__name__])[0]}"
            if training:
                history = training.history_table()
            about = {"status": status, "config": config.flat, "start_utc": start_utc, "device": place}
            about["train_step_ms"] = training.step_ms() if training else None
            write_run(folder, history=history, test=test, **about, **more)
        shutil.rmtree(checkpoints, ignore_errors=True)


def _say(checkpoints: Path, share: float) -> None:
    """Have the bar of all runs tell how many of the references are there."""
    write_text_atomic(checkpoints / "progress.json", json.dumps({"done": 0.0, "words": f"references {share:.0%}"}))
