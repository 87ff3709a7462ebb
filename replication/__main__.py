"""Command line: python -m replication run | importance | status | compare | notebook | doctor (see --help of each)."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from . import __started_s__, doctor
from .checkpoints import checkpoint_folder
from .files import write_text_atomic
from .jobs import EXECUTORS, SLURM, STOP_S, Budget, Pool, ensure_runs
from .notebooks import NotebookFailed, notebook_names, run_notebook, run_notebooks
from .path_probabilities import compute_importance
from .problem import PER_GPU, RUN_GIB, default_device, make_deterministic
from .records import ROOT
from .status import kept_of, overview, runs_on_disk, states
from .tasks import (
    METHODS,
    NOT_RUN,
    PROFILES,
    TASKS,
    check_name,
    grid,
    importance_config,
    make_config,
    methods_of,
    needs,
)
from .trainer import train_steps

PARENT = os.getppid()

# ---- arguments ------------------------------------------------------------------------------------------------------


def _seeds(text: str, what: str = "seeds") -> list[int]:
    """ "0-4" or "0,3,7" or both -> list of seeds."""
    seeds: list[int] = []
    for first, dash, last in (part.partition("-") for part in text.split(",")):
        try:
            found = range(int(first), int(last if dash else first) + 1)
        except ValueError:
            found = range(0)
        if not 0 < found.stop - found.start <= 10**6:
            form = "numbers and ranges such as 0-4 or 0,2,5, the smaller number first, at most a million"
            raise argparse.ArgumentTypeError(f"{what} are {form}; got {text!r}")
        seeds += found
    return list(dict.fromkeys(seeds))


def _minutes(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"a budget is a positive number of minutes such as 25 or 7.5; got {text!r}")


def _option(text: str) -> tuple[str, int | str]:
    """ "NAME=VALUE", numbers as numbers."""
    name, _, value = text.partition("=")
    if not (name and value):
        raise argparse.ArgumentTypeError(f"an option of sbatch is NAME=VALUE such as partition=gpu; got {text!r}")
    return name, int(value) if value.isdecimal() else value


def _folder(text: str) -> Path:
    """Absolute, for other processes may work in other folders."""
    return Path(text).expanduser().absolute()


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


HELP = {
    "deterministic": "the same bits again on one type of device and version of PyTorch; on a CPU they are so anyway",
    "executor": "submit jobs through submitit, one per run, and wait for them (local: jobs are processes here)",
    "slurm": "with --executor: an option of sbatch, such as partition=gpu; several times. Default "
    f"{' '.join(f'{name}={value}' for name, value in SLURM.items())} (time: minutes)",
    "workers": f"runs at once (default: one per core of a CPU, one per {RUN_GIB} GiB of a GPU's memory, at most "
    f"{PER_GPU}); with --executor slurm: jobs in the queue at once (256)",
    "budget": "stop after so long, start-up included. One seed of every task and method comes first, then a second, "
    "and so on, in each round the cheap before the dear. Shortly before the end the runs under way write checkpoints, "
    f"from which the same command goes on ({', '.join(f'{name}: {stop_s:g} s' for name, stop_s in STOP_S.items())}); "
    "none is started in the last three times as long. Exit status 1 if a run crashed or is stale",
    "importance": "path probabilities of theta-importance sampling (run computes what it needs of them)",
    "paths": "0-99 or 0,7: only these, in this process. Whoever finds all parts in checkpoints/ puts them together",
    "status": "task by method: how many runs are done, failed, stale and missing, hours spent on them and to go",
    "compare": "every cell of Tables 1 to 9 and every claim: ours, the paper's, verdict, as 09_report_card writes them",
    "doctor": "versions, devices, disk, weights and records: a fix for all that is wrong; exit status 1 if anything is",
}


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    whole = argparse.ArgumentParser(prog="python -m replication", description="Train and show the experiments.")
    commands = whole.add_subparsers(dest="command", required=True)
    where, common, computing = (argparse.ArgumentParser(add_help=False) for _ in range(3))
    where.add_argument("--output", type=_folder, default=ROOT, help="folder of results, figures and checkpoints")
    common.add_argument("--profile", default="quick", help=f"{', '.join(PROFILES)} (default quick)")
    computing.add_argument("--device", help="cpu or cuda (default: cuda for the paper profile, else cpu)")
    computing.add_argument("--deterministic", action="store_true", help=HELP["deterministic"])
    computing.add_argument("--executor", choices=EXECUTORS, help=HELP["executor"])
    computing.add_argument("--parts", type=int, default=1, metavar="N", help="processes per task's path probabilities")
    computing.add_argument("--slurm", type=_option, action="append", metavar="NAME=VALUE", help=HELP["slurm"])
    computing.add_argument("--workers", type=int, metavar="N", help=HELP["workers"])
    computing.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)

    def command(name: str, function: Callable, help: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        added = commands.add_parser(name, parents=[where, *parents], help=help)
        added.set_defaults(function=function)
        return added

    run = command("run", _run, "train what is missing of a grid; again to resume", common, computing)
    run.add_argument("--task", type=_names, help=f"comma-separated; default: all with the method. {', '.join(TASKS)}")
    run.add_argument("--method", type=_names, help=f"comma-separated; default all. {', '.join(METHODS)}")
    run.add_argument("--seeds", type=_seeds, help="0-4 or 0,2,5; default: those of the profile")
    run.add_argument("--budget-minutes", type=_minutes, metavar="MINUTES", help=HELP["budget"])
    importance = command("importance", _importance, HELP["importance"], common, computing)
    importance.add_argument("--task", type=_names, default=list(TASKS), help="comma-separated; default all")
    importance.add_argument("--paths", type=functools.partial(_seeds, what="paths"), help=HELP["paths"])
    command("status", _status, HELP["status"], common)
    command("compare", _compare, HELP["compare"], common)
    notebook = command("notebook", _notebook, "execute notebooks strictly through papermill", common)
    notebook.add_argument("names", nargs="*", help="such as 05_granular; default all, in order")
    notebook.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE", help="of a notebook")
    command("doctor", lambda args: doctor.report(args.output), HELP["doctor"])
    return whole


# ---- commands -------------------------------------------------------------------------------------------------------


def _pool(args: argparse.Namespace) -> Pool:
    if args.slurm and args.executor is None:
        raise ValueError("--slurm is for jobs: add --executor slurm")
    where = (args.output, args.device, args.workers, args.deterministic, args.parts)
    return Pool(*where, args.executor, dict(args.slurm or []))


def _run(args: argparse.Namespace) -> int:
    suited = [task for task in TASKS if set(args.method or ()) <= set(methods_of(task))]
    tasks = args.task or suited or TASKS
    if args.worker:
        return _work(args)
    wanted = dict.fromkeys(config for task in tasks for config in grid(task, args.profile, args.method, args.seeds))
    if args.executor and args.budget_minutes:
        raise ValueError("--budget-minutes is for processes of this machine; what limits a job is --slurm time=MINUTES")
    pool, budget = _pool(args), None
    if args.budget_minutes is not None:
        budget = Budget(args.started_s + 60 * args.budget_minutes, STOP_S[args.profile])
        before = states(wanted, args.output)
    runs = ensure_runs(tasks, args.method, args.seeds, args.profile, args.output, args.device, budget, pool)
    failed = [run for run in runs if not run.ok]
    n_ok = len(runs) - len(failed)
    print(f"{n_ok} of {len(wanted)} runs finished, {len(failed)} failed, in {args.output / 'results'}")
    for run in failed:
        print(f"  {run.task}/{run.method}/seed {run.seed}: {run.status}")
    if budget is None:
        return 0 if len(runs) == len(wanted) else 1
    print(f"budget of {args.budget_minutes:g} minutes: {_balance(before, states(wanted, args.output), budget, args)}")
    return 0 if len(runs) + len(wanted.keys() & budget.left) == len(wanted) else 1


def _work(args: argparse.Namespace) -> int:
    """What a worker does: train one run, write its progress twice a second at most, and stop, a checkpoint written,
    once SIGUSR1 asks for it."""
    config = make_config(args.task[0], args.method[0], args.seeds[0], args.profile)
    asked: list[bool] = []
    said_s = 0.0
    signal.signal(signal.SIGUSR1, lambda *_: asked.append(True))
    for training in train_steps(config, args.output, args.device):
        training.stopping = bool(asked)
        if time.monotonic() - said_s > 0.5:
            said_s = time.monotonic()
            loss = f"loss {training.epoch_losses[-1]:.3g}, " if training.epoch_losses else ""  # none after an epoch
            last = {metric: value for _, split, metric, value, _ in training.history if split == "val"}
            val = f"{last['theta_synth_l1']:.0f}‰" if "theta_synth_l1" in last else f"{last['loss']:.3g}"
            progress = {"done": training.step / training.n_steps, "words": f"{loss}val {val}"}
            write_text_atomic(checkpoint_folder(config, args.output) / "progress.json", json.dumps(progress))
    return os.EX_TEMPFAIL if asked and training.stopping else 0


def _end_with_parent() -> None:
    """End this worker, whatever it is at, when the process that started it is gone; files are written atomically."""
    while os.getppid() == PARENT:
        time.sleep(1)
    print("stopped: the process that started this worker is gone", file=sys.stderr, flush=True)
    os._exit(1)


def _balance(before: dict, after: dict, budget: Budget, args: argparse.Namespace) -> str:
    """What was done within the budget, what is under way and what is missing; before and after: state by run."""
    missing = [config for config, state in after.items() if state == "missing"]
    kept = {c: kept_of(c, args.output) for c in dict.fromkeys([*missing, *filter(None, map(needs, missing))])}
    under_way = ", ".join(f"{c.task}/{c.method}/seed {c.seed} at {words}" for c, words in kept.items() if words)
    n_done, n_missing = list(before.values()).count("missing") - len(missing), sum(not kept[c] for c in missing)
    too_short = 60 * args.budget_minutes <= 3 * budget.stop_s
    next_ = f"; none is started in the last {3 * budget.stop_s:g} s" if too_short else "; the same command goes on"
    return f"{n_done} runs done; under way: {under_way or 'none'}; {n_missing} missing{next_ if missing else ''}"


def _importance(args: argparse.Namespace) -> int:
    configs = [importance_config(task, args.profile) for task in args.task]
    if args.paths is not None and (args.executor or args.parts > 1):
        raise ValueError("--paths is for this process; --parts N divides all paths among N others")
    if args.executor or args.parts > 1:
        _pool(args).run([config for config, state in states(configs, args.output).items() if state != "done"])
        found = list(states(configs, args.output).values())
    else:
        where, watch = (args.output, args.device, args.paths), (lambda: None) if args.worker else None
        found = [compute_importance(task, args.profile, *where, watch) for task in args.task]
    for task, state in zip(args.task, found, strict=True) if not args.worker else ():
        print(f"path probabilities of {task}, profile {args.profile}: {state}")
    return 1 if {"missing", "stale"} & {*found} else 0


def _status(args: argparse.Namespace) -> int:
    print(overview(args.profile, args.output))
    return 0


def _compare(args: argparse.Namespace) -> int:
    from . import report_card, tables

    profiles = report_card.compared(args.profile)
    runs = {name: [run for task in TASKS for run in runs_on_disk(task, name, args.output)] for name in profiles}
    for name, (table, caption) in report_card.comparison(runs, NOT_RUN, args.profile, args.output).items():
        print(tables.as_markdown(table, name, args.profile, caption))
    return 0


def _notebook(args: argparse.Namespace) -> int:
    parameters = dict(item.partition("=")[::2] for item in args.parameter)
    if wrong := [item for item in args.parameter if "=" not in item]:
        raise ValueError(f"-p takes name=value, got {wrong[0]!r}")
    if len(args.names) == 1:
        written = [run_notebook(*args.names, parameters, args.profile, args.output)]
    else:
        written = run_notebooks(args.names or notebook_names(), parameters, args.profile, args.output)
    print("executed: " + ", ".join(map(str, written)))
    for folder in (args.output / f"results/{args.profile}/tables", args.output / f"figures/{args.profile}"):
        if files := sorted(path.name for path in folder.glob("*") if path.is_file()):
            print(f"{folder}: {', '.join(files)}")
    card = args.output / f"results/{args.profile}/tables/report_card.md"
    if not args.names and card.is_file():
        print(f"\n{card.read_text(encoding='utf-8')}")
    return 0


def main(arguments: list[str] | None = None, started_s: float | None = None) -> int:
    """started_s: when the command began, on the clock time.monotonic(); None: now."""
    now_s = time.monotonic()
    for stream in (sys.stdout, sys.stderr):  # in another encoding than UTF-8 a sign that it lacks becomes a "?"
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    args = parser().parse_args(arguments, argparse.Namespace(started_s=now_s if started_s is None else started_s))
    if os.environ.get("TR808_DIR"):
        os.environ["TR808_DIR"] = str(_folder(os.environ["TR808_DIR"]))
    try:
        check_name("profile", getattr(args, "profile", "quick"), PROFILES)
        if args.command in ("run", "importance"):
            args.device = args.device or default_device(args.profile)
            if args.deterministic and (args.worker or args.command == "importance"):
                make_deterministic(args.device)
        if getattr(args, "worker", False):
            threading.Thread(target=_end_with_parent, daemon=True).start()
        return args.function(args)
    except BrokenPipeError:  # whoever read the output has seen enough
        sys.stdout = None
        return 128 + signal.SIGPIPE
    except (ValueError, TypeError, OSError, NotebookFailed) as error:
        if getattr(args, "worker", False):
            raise  # its log wants the traceback
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_status", 2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the checkpoints", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main(started_s=__started_s__))
