"""Runs as jobs of submitit: on a SLURM cluster, or in processes of this machine, which stand for one.

One run is one job, and so is each part of a task's path probabilities. A job starts the worker that the command line starts
without a cluster, and what it computes is the same. A job that comes to its time limit, or must make way for another, has its
worker write a checkpoint and is put into the queue again, where it goes on; one that crashes costs itself only.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from scrapl_lib.losses import SCRAPLLoss

from .records import IMPORTANCE
from .tasks import RunConfig, needs
from .trainer import STOP_S, Worker, check_device, default_workers

EXECUTORS = ("local", "slurm")
SLURM = {"job_name": "scrapl", "time": 240, "cpus_per_task": 2, "mem": "16GB", "signal_delay_s": 120}  # time in minutes
REQUEUES = 1000  # of a job that came to its time limit


class Job:
    """What a job computes, pickled by submitit: a run, or the path probabilities of `paths` such as "0-99" (all: "")."""

    def __init__(self, config: RunConfig, output: Path, device: str, deterministic: bool, paths: str = "") -> None:
        self.config, self.arguments = config, (config, output, device, deterministic, paths)
        self.worker: Worker | None = None

    def __call__(self) -> None:
        """Raises RuntimeError if the worker crashes."""
        self.worker = Worker(*self.arguments, apart=True)
        while self.worker.process.poll() is None:
            time.sleep(0.2)
        if self.worker.process.returncode:
            raise RuntimeError(self.worker.crash())
        print(self.worker.words(), file=sys.stderr)
        self.worker.log.unlink(missing_ok=True)

    def checkpoint(self):
        """submitit calls this at the job's time limit, or when it must make way, and puts what it returns into the queue."""
        from submitit.helpers import DelayedSubmission

        if self.worker is not None:
            self.worker.process.send_signal(signal.SIGUSR1)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.worker.process.wait(STOP_S[self.config.profile])
            self.worker.process.kill()
        return DelayedSubmission(Job(*self.arguments))


class Jobs:
    """Submits missing runs and waits for them, as `ensure_runs` wants it of its `jobs`.

    Args:
        executor: "slurm", or "local" for processes of this machine.
        profile, output: the jobs' logs are in <output>/checkpoints/<profile>/jobs_* until all have succeeded.
        device: "cpu", or "cuda" for a GPU each (local: all share the first).
        workers: jobs at once; None: as many as SLURM wants, local: as `default_workers` says.
        deterministic: see `make_deterministic`.
        parts: jobs among which the path probabilities of a task are divided; at most one per path.
        slurm: options of sbatch as submitit names them, in place of or beside those in `SLURM`, such as {"partition": "gpu"}.
    Raises:
        ValueError: no submitit, no SLURM, no such device, fewer than 1 of something, an unknown option; it says what to do.
    """

    def __init__(
        self,
        executor: str,
        profile: str,
        output: Path,
        device: str,
        workers: int | None = None,
        deterministic: bool = False,
        parts: int = 1,
        slurm: Mapping[str, object] | None = None,
    ) -> None:
        try:
            import submitit
        except ImportError as error:
            raise ValueError("an executor needs submitit: pip install '.[cluster]'") from error
        if device not in ("cpu", "cuda"):
            raise ValueError(f"each job has its own GPU: device must be cpu or cuda, got {device!r}")
        for name, value in {"workers": workers, "parts": parts}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if executor == "slurm" and not (shutil.which("srun") and shutil.which("sbatch")):
            raise ValueError(
                "slurm needs SLURM's sbatch and srun, which are not here: call it on a login node, or use local"
            )
        self.kind, self.at_once = submitit.SlurmExecutor, sys.maxsize
        own = {"gpus_per_node": 1} if device == "cuda" else {}
        self.parameters = SLURM | own | {"array_parallelism": workers or 256} | dict(slurm or {})
        if unknown := set(self.parameters) - (known := submitit.SlurmExecutor._valid_parameters()):
            raise ValueError(
                f"submitit knows no option {', '.join(sorted(unknown))} of sbatch; it knows {', '.join(sorted(known))}"
            )
        if not isinstance(self.parameters["time"], int) or self.parameters["time"] < 1:
            raise ValueError(f"time must be a whole number of minutes, at least 1, got {self.parameters['time']!r}")
        if executor == "local":
            check_device(device)
            self.kind, self.at_once = submitit.LocalExecutor, workers or default_workers(device)
            self.parameters["timeout_min"] = self.parameters["time"]
        self.arguments, self.parts = (output, device, deterministic), parts
        self.folder = output / "checkpoints" / profile / f"jobs_{time.strftime('%Y%m%d_%H%M%S')}_{os.getpid()}"

    def _jobs_of(self, config: RunConfig) -> list[Job]:
        if config.method != IMPORTANCE or self.parts == 1:
            return [Job(config, *self.arguments)]
        paths = np.arange(SCRAPLLoss(**config.transform()).n_paths)
        return [
            Job(config, *self.arguments, f"{part[0]}-{part[-1]}")
            for part in np.array_split(paths, self.parts)
            if len(part)
        ]

    def __call__(self, missing: list[RunConfig]) -> None:
        """Submit the jobs of all, in this order, a run's once the path probabilities it needs are there; return when all have
        ended. What crashed is said on stderr, with its log. Stopped by an exception such as Ctrl-C, it cancels what is under way.

        Raises: ValueError for an option that submitit does not know."""
        executor = self.kind(self.folder, max_num_timeout=REQUEUES)
        try:
            executor.update_parameters(**self.parameters)
        except (ValueError, TypeError) as error:
            raise ValueError(f"submitit refuses one of {self.parameters}: {error}") from error
        waiting, running, n_crashed = [job for config in missing for job in self._jobs_of(config)], {}, 0
        n_jobs = len(waiting)
        _say(f"{n_jobs} jobs; logs: {self.folder}")
        try:
            while waiting or running:
                under_way = {job.config for job in (*waiting, *running)}
                free = [job for job in waiting if needs(job.config) not in under_way][: self.at_once - len(running)]
                if free:
                    running |= zip(free, executor.submit_array(free))
                    waiting = [job for job in waiting if job not in free]
                time.sleep(0.5)
                for job in [job for job, submitted in running.items() if submitted.done()]:
                    submitted = running.pop(job)
                    if (error := submitted.exception()) is not None:
                        n_crashed += 1
                        said = re.findall("^RuntimeError: (.*)", str(error), re.MULTILINE)
                        _say(
                            f"job {submitted.job_id}: {said[-1] if said else f'killed; log: {submitted.paths.stderr}'}"
                        )
                        if any(needs(other.config) == job.config for other in waiting):
                            _say(f"{job.config.task}: no scrapl runs, the path probabilities are missing")
                            waiting = [other for other in waiting if needs(other.config) != job.config]
                    _say(f"{n_jobs - len(waiting) - len(running)} of {n_jobs} jobs done")
        except BaseException:
            for submitted in running.values():
                submitted.cancel(check=False)
            raise
        if n_crashed:
            _say(f"{n_crashed} of {n_jobs} jobs crashed; the same command tries them again")
        else:
            shutil.rmtree(self.folder, ignore_errors=True)


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)
