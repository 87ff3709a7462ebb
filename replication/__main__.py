"""Command line: python -m replication run | importance | status | compare | notebook | doctor (see --help of each)."""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
from pathlib import Path
from statistics import mean

import pandas as pd

from . import __started_s__, doctor
from .jobs import EXECUTORS, SLURM, Jobs
from .notebooks import NotebookFailed, notebook_names, run_notebook, run_notebooks
from .path_probabilities import compute_importance
from .records import IMPORTANCE, ROOT, BrokenRecord, hours_of, read_record, read_run, run_folder
from .tasks import (
    METHODS,
    NOT_RUN,
    PROFILES,
    TASKS,
    RunConfig,
    check_name,
    grid,
    importance_config,
    make_config,
    methods_of,
    needs,
    step_cost,
)
from .trainer import (
    PER_GPU,
    RUN_GIB,
    STOP_S,
    Budget,
    checkpoint_folder,
    default_device,
    ensure_runs,
    kept_of,
    make_deterministic,
    runs_on_disk,
    states,
    train,
    watch_parent,
    write_progress,
)


def _seeds(text: str, what: str = "seeds") -> list[int]:
    """ "0-4" or "0,3,7" or both -> list of seeds."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        try:
            found = range(int(first), int(last if dash else first) + 1)
            if found.stop - found.start > 10**6:
                raise argparse.ArgumentTypeError(f"{part!r} is more than a million {what}")
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{what} are numbers and ranges such as 0-4 or 0,2,5; got {text!r}"
            ) from None
        if not found:
            raise argparse.ArgumentTypeError(f"the range {part!r} is empty; write the smaller number first")
        seeds += found
    return list(dict.fromkeys(seeds))


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"a budget is a positive number of minutes such as 25 or 7.5; got {text!r}")
    return minutes


def _option(text: str) -> tuple[str, int | str]:
    """ "NAME=VALUE", numbers as numbers."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"an option of sbatch is NAME=VALUE such as partition=gpu; got {text!r}")
    return name, int(value) if value.isdecimal() else value


def _jobs(args: argparse.Namespace, workers: int | None = None) -> Jobs | None:
    """What submits jobs, if the command line asks for them."""
    if args.executor is None:
        if args.parts is not None or args.slurm:
            raise ValueError("--parts and --slurm are for jobs: add --executor slurm")
        return None
    return Jobs(
        args.executor,
        args.profile,
        args.output,
        args.device,
        workers,
        args.deterministic,
        1 if args.parts is None else args.parts,
        dict(args.slurm),
    )


def _run(args: argparse.Namespace) -> int:
    methods = None if args.method is None else [name.strip() for name in args.method.split(",")]
    suited = [task for task in TASKS if set(methods or ()) <= set(methods_of(task))]
    tasks = [name.strip() for name in args.task.split(",")] if args.task else suited or TASKS
    if args.worker:
        if args.deterministic:
            make_deterministic(args.device)
        config = make_config(tasks[0], methods[0], args.seeds[0], args.profile)
        progress = checkpoint_folder(config, args.output) / "progress.json"
        train(config, args.output, args.device, write_progress(progress))
        return 0
    wanted = dict.fromkeys(config for task in tasks for config in grid(task, args.profile, methods, args.seeds))
    jobs, budget, before = _jobs(args, args.workers), None, None
    if args.budget_minutes is not None:
        if jobs:
            raise ValueError(
                "--budget-minutes is for workers of this machine; what limits a job is --slurm time=MINUTES"
            )
        budget = Budget(args.started_s + 60 * args.budget_minutes, STOP_S[args.profile])
        before = states(wanted, args.output)
    runs = ensure_runs(
        tasks,
        methods,
        args.seeds,
        args.profile,
        args.output,
        args.device,
        args.workers,
        budget,
        args.deterministic,
        jobs,
    )
    failed = [run for run in runs if not run.ok]
    print(
        f"{len(runs) - len(failed)} of {len(wanted)} runs finished, {len(failed)} failed, in {args.output / 'results'}"
    )
    for run in failed:
        print(f"  {run.task}/{run.method}/seed {run.seed}: {run.status}")
    left = {} if budget is None else wanted.keys() & budget.left
    if budget is not None:
        print(_balance(args, before, states(wanted, args.output), budget))
    return 0 if len(runs) + len(left) == len(wanted) else 1


def _balance(
    args: argparse.Namespace, before: dict[RunConfig, str], after: dict[RunConfig, str], budget: Budget
) -> str:
    """What was done within the budget, what is under way and what is missing, in a line."""
    missing = [config for config, state in after.items() if state == "missing"]
    kept = {c: kept_of(c, args.output) for c in dict.fromkeys([*missing, *filter(None, map(needs, missing))])}
    under_way = ", ".join(f"{c.task}/{c.method}/seed {c.seed} at {words}" for c, words in kept.items() if words)
    n_done = list(before.values()).count("missing") - len(missing)
    too_short = 60 * args.budget_minutes <= 3 * budget.stop_s
    what_next = f"; none is started in the last {3 * budget.stop_s:g} s" if too_short else "; the same command goes on"
    return (
        f"budget of {args.budget_minutes:g} minutes: {n_done} runs done; under way: {under_way or 'none'}; "
        f"{sum(not kept[c] for c in missing)} missing{what_next if missing else ''}"
    )


def _importance(args: argparse.Namespace) -> int:
    if jobs := _jobs(args):
        if args.paths is not None:
            raise ValueError("--paths is for one process; for jobs, --parts N divides all paths among N of them")
        found = states([importance_config(task, args.profile) for task in args.task.split(",")], args.output)
        if missing := [config for config, state in found.items() if state != "done"]:
            jobs(missing)
        for config, state in (found := states(found, args.output)).items():
            print(f"path probabilities of {config.task}, profile {args.profile}: {state}")
        return 0 if set(found.values()) == {"done"} else 1
    if args.deterministic:
        make_deterministic(args.device)
    for task in args.task.split(","):
        watch = watch_parent() if args.worker else None
        state = compute_importance(task, args.profile, args.output, args.device, args.paths, watch)
        if not args.worker:
            print(f"path probabilities of {task}, profile {args.profile}: {state}")
    return 0


def _hours_of_a_run(method: str, known: dict[str, list[float]]) -> float:
    """Hours that a run of a task takes: the mean of the method's own in `known`, {method: hours of its finished runs}, else what
    those of the other methods say by `step_cost`; nan without any."""
    others = (hours / step_cost(other) for other in known if other != IMPORTANCE for hours in known[other])
    found = known.get(method) or [step_cost(method) * hours for hours in others]
    return mean(found) if found else math.nan


def _tally(task: str, profile: str, output: Path) -> pd.DataFrame:
    """What is on disk of a task: a row per method and for the path probabilities, with how many are done, failed, stale and
    missing, and with the hours spent on the done and failed ones and to go for the missing (nan: unknown)."""
    rows, known = {}, {}
    for config, state in states([*grid(task, profile), importance_config(task, profile)], output).items():
        row = rows.setdefault(config.method, dict.fromkeys(("done", "failed", "stale", "missing", "spent"), 0))
        row[state] += 1
        if state in ("done", "failed"):
            folder = run_folder(profile, task, config.method, config.seed, output)
            hours = hours_of(read_record(folder)[0]) if config.method == IMPORTANCE else read_run(folder).hours
            row["spent"] += hours
            if state == "done":
                known.setdefault(config.method, []).append(hours)
    for method, row in rows.items():
        row["to_go"] = row["missing"] * _hours_of_a_run(method, known) if row["missing"] else 0
    return pd.DataFrame(rows).T


def _hours(value: float) -> str:
    return "?" if math.isnan(value) else "0" if value == 0 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _cell(n: pd.Series) -> str:
    stale = f"+{n['stale']:.0f} stale" if n["stale"] else ""
    return f"{n['done']:.0f}/{n['failed']:.0f}/{n['missing']:.0f}{stale} {_hours(n['spent'])}+{_hours(n['to_go'])}"


def _status(args: argparse.Namespace) -> int:
    check_name("profile", args.profile, PROFILES)
    tallies, matrix = {task: _tally(task, args.profile, args.output) for task in TASKS}, {}
    for task, tally in tallies.items():
        not_run = dict.fromkeys(NOT_RUN.keys() & methods_of(task), "not run")
        matrix[tuple(task.partition("_")[::2])] = not_run | tally.apply(_cell, axis=1).to_dict()
    print(f"profile {args.profile}: done/failed/missing, hours spent+to go\n")
    print(pd.DataFrame(matrix).reindex([*METHODS, IMPORTANCE]).fillna("").to_string())
    whole = pd.concat(tallies)
    n, unknown = whole.sum(), whole.loc[whole["to_go"].isna(), "missing"].sum()
    besides = f" and {unknown:.0f} times ?" if unknown else ""
    print(
        f"\nin all {n['done']:.0f} done, {n['failed']:.0f} failed, {n['stale']:.0f} stale, {n['missing']:.0f} missing; "
        f"{_hours(n['spent'])} hours spent, {_hours(n['to_go'])} to go{besides}"
    )
    print(
        "Hours are one worker's. Spent: by the records, which know of an interrupted run its training steps or its last part.\n"
        "To go: by the finished runs of the task and method, else roughly by those of its other methods; ?: there are none."
    )
    for method, why in NOT_RUN.items():
        print(f"{method} not run: {why}")
    return 0


def _compare(args: argparse.Namespace) -> int:
    from . import compare, tables

    profiles = compare.compared(check_name("profile", args.profile, PROFILES))
    runs = {name: [run for task in TASKS for run in runs_on_disk(task, name, args.output)] for name in profiles}
    for name, (table, caption) in compare.comparison(runs, NOT_RUN, args.profile, args.output).items():
        print(tables.as_markdown(table, name, args.profile, caption))
    return 0


def _notebook(args: argparse.Namespace) -> int:
    parameters = {}
    for item in args.parameter:
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"-p takes name=value, got {item!r}")
        parameters[name] = value
    check_name("profile", args.profile, PROFILES)
    if len(args.names) == 1:
        written = [run_notebook(*args.names, parameters, args.profile, args.output)]
    else:
        written = run_notebooks(args.names or notebook_names(), parameters, args.profile, args.output)
    print("executed: " + ", ".join(str(path) for path in written))
    for folder in (f"results/{args.profile}/tables", f"figures/{args.profile}"):
        files = sorted(path.name for path in (args.output / folder).glob("*") if path.is_file())
        if files:
            print(f"{args.output / folder}: {', '.join(files)}")
    card = args.output / "results" / args.profile / "tables" / "report_card.md"
    if not args.names and card.is_file():
        print(f"\n{card.read_text()}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    whole = argparse.ArgumentParser(
        prog="python -m replication", description="Train, look at and show the experiments."
    )
    commands = whole.add_subparsers(dest="command", required=True)
    where = argparse.ArgumentParser(add_help=False)
    where.add_argument(
        "--output",
        type=lambda text: Path(text).absolute(),
        default=ROOT,
        help="folder that holds results/, figures/ and checkpoints/ (default: the project)",
    )
    common = argparse.ArgumentParser(add_help=False, parents=[where])
    common.add_argument("--profile", default="quick", help=f"{', '.join(PROFILES)} (default quick)")

    computing = argparse.ArgumentParser(add_help=False, parents=[common])
    computing.add_argument("--device", help="cpu or cuda (default: cuda for the paper profile, else cpu)")
    computing.add_argument(
        "--deterministic",
        action="store_true",
        help="the same bits again on one type of device and one version "
        "of PyTorch (on a CPU they are so anyway); run.json says so",
    )
    computing.add_argument(
        "--executor",
        choices=EXECUTORS,
        help="submit jobs through submitit, one per run, and wait for them, "
        "rather than start workers (local: in processes of this machine, to try it out)",
    )
    computing.add_argument(
        "--parts", type=int, metavar="N", help="with --executor: jobs for a task's path probabilities (1)"
    )
    known = " ".join(f"{name}={value}" for name, value in SLURM.items())
    computing.add_argument(
        "--slurm",
        type=_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="with --executor: an "
        f"option of sbatch, such as partition=gpu; several times. Default {known} (time: minutes)",
    )
    computing.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)

    run = commands.add_parser("run", parents=[computing], help="train what is missing of a grid; again to resume")
    run.add_argument("--task", help=f"comma-separated; default those whose tables have the methods. {', '.join(TASKS)}")
    run.add_argument("--method", help=f"comma-separated; default all. {', '.join(METHODS)}")
    run.add_argument("--seeds", type=_seeds, help="0-4 or 0,2,5; default: those of the profile")
    run.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="runs at once, which share the device (default: one per core on a "
        f"CPU; on CUDA one per {RUN_GIB} GiB of its memory, at most {PER_GPU}); with --executor slurm: jobs at once "
        "(256)",
    )
    stop_s = ", ".join(f"{profile}: {stop_s:g} s" for profile, stop_s in STOP_S.items())
    run.add_argument(
        "--budget-minutes",
        type=_minutes,
        metavar="MINUTES",
        help="stop after so long, start-up included, with exit "
        "status 0 (1: a run crashed or is stale). One seed of every task and method comes first, then a second one, "
        "and so on, in each round the cheap before the dear. Shortly before the end the runs under way are asked to "
        f"write checkpoints, from which the same command goes on ({stop_s}); so that a run comes to its first, none "
        "is started in the last three times as long",
    )
    run.set_defaults(function=_run)

    importance = commands.add_parser(
        "importance",
        parents=[computing],
        help="path probabilities of theta-importance sampling (run computes what it needs of them); again to resume",
    )
    importance.add_argument("--task", default=",".join(TASKS), help=f"comma-separated; default all. {', '.join(TASKS)}")
    importance.add_argument(
        "--paths",
        type=lambda text: _seeds(text, "paths"),
        help="0-99 or 0,7: only these. Whoever finds all parts in checkpoints/ puts them together",
    )
    importance.set_defaults(function=_importance)

    status = commands.add_parser(
        "status",
        parents=[common],
        help="task by method: how many runs are done, failed, stale and missing, hours spent on them and to go",
    )
    status.set_defaults(function=_status)

    compare = commands.add_parser(
        "compare",
        parents=[common],
        help="every cell of Tables 1 to 9 and every claim: ours, the paper's, verdict, as 09_report_card writes them",
    )
    compare.set_defaults(function=_compare)

    notebook = commands.add_parser("notebook", parents=[common], help="execute notebooks strictly through papermill")
    notebook.add_argument("names", nargs="*", help="such as 05_granular; default all, in order")
    notebook.add_argument(
        "-p", "--parameter", action="append", default=[], metavar="NAME=VALUE", help="a notebook's parameter"
    )
    notebook.set_defaults(function=_notebook)

    check = commands.add_parser(
        "doctor",
        parents=[where],
        help="versions, devices, disk, weights and records, and what is wrong "
        "with a fix for each; exit status 1 if something needed is",
    )
    check.set_defaults(function=lambda args: doctor.report(args.output))
    return whole


def main(arguments: list[str] | None = None, started_s: float | None = None) -> int:
    """started_s: when the command began, on the clock time.monotonic(); None: now."""
    now_s = time.monotonic()
    args = parser().parse_args(arguments, argparse.Namespace(started_s=now_s if started_s is None else started_s))
    if args.command in ("run", "importance") and args.device is None:
        args.device = default_device(args.profile)
    try:
        return args.function(args)
    except BrokenPipeError:  # whoever read the output has seen enough
        sys.stdout = None
        return 128 + signal.SIGPIPE
    except (ValueError, TypeError, OSError, BrokenRecord, NotebookFailed) as error:
        if getattr(args, "worker", False):
            raise  # its log wants the traceback
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_status", 2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the checkpoints", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main(started_s=__started_s__))
