"""Runs many things at once, each in a process of its own: on this machine, or on a SLURM cluster through submitit.

A process computes one run, or the path probabilities of a task, or a part of these, by the same command everywhere. One
that crashes costs itself only, and the next call goes on from its checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from .checkpoints import checkpoint_folder
from .problem import check_device, default_device, default_workers
from .records import IMPORTANCE, ROOT, Run, read_run, run_folder
from .status import n_paths, progress_of, states
from .tasks import RunConfig, by_worth, grid, needs, run_cost

STOP_S = {"smoke": 10.0, "quick": 60.0, "paper": 60.0}  # what a profile's runs need to come to a stop: see Budget
STOPPED = (os.EX_TEMPFAIL, -signal.SIGUSR1, -signal.SIGTERM)  # exit statuses of a worker that was stopped
# glibc gives large blocks back to the kernel after every use; fetching them again costs more than computing in them
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}
SLURM = {"job_name": "scrapl", "time": 240, "cpus_per_task": 2, "mem": "16GB", "signal_delay_s": 120}  # time in minutes
QUEUED, REQUEUES = 256, 1000  # jobs in the queue at once; how often one may come to its time limit
EXECUTORS = ("local", "slurm")  # of submitit


@dataclass
class Command:
    """A worker's command, which submitit calls in a job, and again, in another job, if this one must make way."""

    words: list[str]

    def __call__(self) -> None:
        subprocess.run(self.words, check=True, process_group=0)

    def checkpoint(self) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@dataclass
class Running:
    """A process or job at work: status() is its exit status, None while it runs; send(SIGUSR1) asks a process to write
    a checkpoint and end, send(SIGTERM) ends it."""

    config: RunConfig
    name: str
    log: Path
    status: Callable[[], int | None]
    send: Callable[[int], object]

    def words(self) -> str:
        """What is in its log, without what submitit has to say of a crash."""
        with contextlib.suppress(FileNotFoundError):  # another process may have finished this run and tidied up
            return self.log.read_text(encoding="utf-8", errors="replace").partition("submitit ERROR")[0].strip()
        return ""


@dataclass
class Budget:
    """Time for a call of `ensure_runs`, which ends at end_s on the clock time.monotonic().

    stop_s seconds before its end the workers are asked to stop, each with a checkpoint after the step that it is at;
    none is started with less than three times stop_s to go, and what still runs when a fifth of it is left is ended.
    left: the call lists here which runs it stopped or did not start.
    """

    end_s: float = math.inf
    stop_s: float = 0.0
    left: list[RunConfig] = field(default_factory=list)


class Pool:
    """Processes at work, so many at once: of this machine, or jobs of submitit.

    Args:
        device: cpu, cuda or cuda:<n>; jobs take no number, each has its own GPU.
        workers: how many at once; None: `default_workers`, of SLURM jobs `QUEUED`.
        deterministic: see `make_deterministic`.
        parts: processes among which the path probabilities of a task are divided; at most one per path.
        executor: "slurm", "local" (jobs as processes of this machine, to try them out); None: no jobs.
        slurm: options of sbatch as submitit names them, in place of or beside those in `SLURM`: {"partition": "gpu"}.
    Raises: ValueError for a number below 1, a device that is not here, no submitit, no SLURM, an unknown option.
    """

    def __init__(
        self,
        output: Path,
        device: str,
        workers: int | None = None,
        deterministic: bool = False,
        parts: int = 1,
        executor: str | None = None,
        slurm: Mapping[str, object] | None = None,
    ) -> None:
        for name, value in {"workers": workers, "parts": parts}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if executor is not None and device not in ("cpu", "cuda"):
            raise ValueError(f"each job has its own GPU: device must be cpu or cuda, got {device!r}")
        if executor != "slurm":
            check_device(device)
        self.output, self.device, self.deterministic, self.parts = Path(output).absolute(), device, deterministic, parts
        self.environment = KEEP_MEMORY | ({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if device == "cpu" else {})
        self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.at_once = workers or (QUEUED if executor == "slurm" else default_workers(device))
        self.logs = self.output / "checkpoints" / f"jobs_{time.strftime('%Y%m%d_%H%M%S')}_{os.getpid()}"
        self.executor = executor and self._executor(executor, SLURM | dict(slurm or {}))

    def _executor(self, kind: str, options: dict[str, Any]) -> Any:
        import submitit

        if kind == "slurm" and not (shutil.which("srun") and shutil.which("sbatch")):
            where = "call it on a login node, or use local"
            raise ValueError(f"slurm needs SLURM's sbatch and srun, which are not here: {where}")
        options |= {"gpus_per_node": 1} if self.device == "cuda" else {}
        options["setup"] = [f"export {name}={shlex.quote(value)}" for name, value in self.environment.items()]
        executor = {"slurm": submitit.SlurmExecutor, "local": submitit.LocalExecutor}[kind](self.logs, REQUEUES)
        try:
            if not isinstance(options["time"], int) or options["time"] < 1:
                raise ValueError(f"time is in minutes, a whole number of at least 1, got {options['time']!r}")
            executor.update_parameters(**options | ({"timeout_min": options["time"]} if kind == "local" else {}))
        except (ValueError, TypeError) as error:
            raise ValueError(f"submitit refuses one of {options}: {' '.join(str(error).split())}") from error
        return executor

    def start(self, config: RunConfig, paths: str = "") -> Running:
        """Start what computes a run, or path probabilities: all, or `paths` such as "0-99".

        A process has a group of its own, so that signals to ours do not reach it, and our working folder.
        """
        of_run = f"run --method {config.method} --seeds {config.seed}"
        words = f"-P -m replication {'importance' if config.method == IMPORTANCE else of_run} --worker"
        words += f" --task {config.task} --profile {config.profile} --device {self.device}"
        words += " --deterministic" * self.deterministic + f" --paths {paths}" * bool(paths)
        command = [sys.executable, *words.split(), "--output", str(self.output)]
        name = f"{config.task}/{config.method}/" + (f"paths {paths}" if paths else f"seed {config.seed}")
        if self.executor:
            job = self.executor.submit(Command(command))

            def status() -> int | None:
                return None if not job.done() else int(job.exception() is not None)

            return Running(config, name, job.paths.stderr, status, lambda _: job.cancel(check=False))
        folder = checkpoint_folder(config, self.output)
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = folder.with_name(f"{folder.name}{paths and '_' + paths}.log")
        with open(log, "wb") as file:
            streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
            process = subprocess.Popen(command, env=os.environ | self.environment, process_group=0, **streams)
        return Running(config, name, log, process.poll, process.send_signal)

    def run(self, missing: Iterable[RunConfig], budget: Budget | None = None) -> None:
        """Run all in the order given, except that a run waits for the path probabilities it needs.

        What crashed is said on stderr, with its log. An exception such as Ctrl-C ends what is under way.
        """
        budget, missing = budget or Budget(), list(missing)
        waiting = [(config, paths) for config in missing for paths in self._parts_of(config)]
        running, crashed, n_all = [], [], len(waiting)
        layout, every_s = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}", 0.5 if sys.stderr.isatty() else 10
        bar = tqdm(total=sum(map(run_cost, missing)), bar_format=f"{n_all} runs {layout}", mininterval=every_s)
        say = functools.partial(bar.write, file=sys.stderr)
        try:
            while waiting or running:
                left_s = budget.end_s - time.monotonic()
                if left_s < 3 * budget.stop_s:
                    budget.left += [config for config, _ in waiting]
                    waiting = []
                for each in running if left_s < budget.stop_s else []:
                    each.send(signal.SIGTERM if left_s < budget.stop_s / 5 else signal.SIGUSR1)
                unfinished = {*(config for config, _ in waiting), *(each.config for each in running)}
                free = [work for work in waiting if needs(work[0]) not in unfinished]
                for work in free[: self.at_once - len(running)]:
                    waiting.remove(work)
                    running.append(self.start(*work))
                time.sleep(1.0 if self.executor else 0.2)
                for each in [each for each in running if each.status() is not None]:
                    running.remove(each)
                    status, words = each.status(), each.words()
                    if status and not (left_s < budget.stop_s and status in STOPPED):
                        crashed.append(each.name)
                        last = (words.splitlines() or ["nothing in its log"])[-1]
                        say(f"{each.name} crashed (exit status {status}: {last}); log: {each.log}")
                        if any(needs(config) == each.config for config, _ in waiting):
                            say(f"{each.config.task}: no scrapl runs, the path probabilities are missing")
                            waiting = [work for work in waiting if needs(work[0]) != each.config]
                        continue
                    budget.left += [each.config] if status else []
                    if not self.executor:
                        each.log.unlink(missing_ok=True)
                        if words:
                            say(f"{each.name}: {words}")
                progress = {each.config: progress_of(each.config, self.output) for each in running}
                to_go = sum(run_cost(config) for config in {*(config for config, _ in waiting)} - {*progress})
                to_go += sum(run_cost(config) * (1 - done) for config, (done, _) in progress.items())
                bar.n = bar.total - to_go
                bar.set_postfix_str("; ".join(words for _, words in progress.values() if words), refresh=False)
                bar.update(0)
        finally:
            for each in running:
                each.send(signal.SIGTERM)
            while not self.executor and any(each.status() is None for each in running):
                time.sleep(0.02)
            bar.close()
        if crashed:
            what = f"{len(crashed)} of {n_all} runs crashed: {', '.join(crashed)}"
            print(f"{what}; the same command tries them again", file=sys.stderr)
        elif self.executor:
            shutil.rmtree(self.logs, ignore_errors=True)

    def _parts_of(self, config: RunConfig) -> list[str]:
        """The path probabilities of a task in parts, such as "0-99"; what is not divided is a part named ""."""
        if config.method != IMPORTANCE or self.parts == 1:
            return [""]
        divided = np.array_split(range(n_paths(config)), min(self.parts, n_paths(config)))
        return [f"{part[0]}-{part[-1]}" for part in divided]


def ensure_runs(
    tasks: Iterable[str],
    methods: Iterable[str] | None = None,
    seeds: Iterable[int] | None = None,
    profile: str = "quick",
    output: Path = ROOT,
    device: str | None = None,
    budget: Budget | None = None,
    pool: Pool | None = None,
) -> list[Run]:
    """Compute what is missing of a grid, each run in a process of its own, and return what is then on disk.

    Runs with theta-IS wait for their path probabilities, which are computed beside the other runs. Runs that failed
    (status "failed:...") are not tried again, stale ones are named and left alone: delete a run's folder to ask for it
    anew. The dearest run comes first, so that the whole grid is done soonest; with a budget they come `by_worth`.

    Args:
        tasks, methods, seeds: of the grid; None means all of the profile.
        output: folder that holds results/ and checkpoints/. device: cpu or cuda; None: what the profile wants.
        budget: when to stop, checkpoints written; None: when all is done.
        pool: what computes; None: as many processes of this machine as `default_workers` says.
    Raises: ValueError for unknown names and for a device that is not here; BrokenRecord.
    """
    output, device = Path(output).absolute(), device or default_device(profile)
    methods, seeds = (None if names is None else list(names) for names in (methods, seeds))
    configs = [config for task in tasks for config in grid(task, profile, methods, seeds)]
    found = states(configs, output)
    for config in (c for c, state in found.items() if state == "stale"):
        folder = run_folder(config.profile, config.task, config.method, config.seed, output)
        why = "was made with another configuration; delete it to run it again"
        print(f"stale, not used: {folder} {why}", file=sys.stderr)
    missing = sorted((c for c, state in found.items() if state == "missing"), key=lambda c: (-run_cost(c), c.seed))
    if missing:
        needed = states(dict.fromkeys(needs(c) for c in missing if needs(c)), output)
        stale = [c for c, state in needed.items() if state not in ("done", "missing")]
        for c in stale:
            print(f"{c.task}: no scrapl runs, the path probabilities are {needed[c]}", file=sys.stderr)
        missing = [c for c in missing if needs(c) not in stale]
        order = [c for c, state in needed.items() if state == "missing"] + missing
        if budget is not None:
            done = {c: state for c, state in found.items() if state == "done"}
            order = by_worth(done | dict.fromkeys(order, "missing"))
        (pool or Pool(output, device)).run(order, budget)
    there = [c for c, state in states(found, output).items() if state in ("done", "failed")]
    tasks = list(dict.fromkeys(config.task for config in configs))
    there.sort(key=lambda c: (tasks.index(c.task), c.method, c.seed))
    return [read_run(run_folder(c.profile, c.task, c.method, c.seed, output)) for c in there]
