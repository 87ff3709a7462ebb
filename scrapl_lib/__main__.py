"""Command line: python -m scrapl_lib run | importance | status | notebook (see --help of each)."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

import pandas as pd

from .execute import NotebookFailed, notebook_names, run_notebook, run_notebooks
from .experiments import METHODS, NOT_RUN, PROFILES, TASKS, check_name, grid, importance_config, make_config, methods_of
from .records import IMPORTANCE, ROOT, BrokenRecord
from .training import (
    checkpoint_folder,
    compute_importance,
    default_device,
    ensure_runs,
    states,
    train,
    watch_parent,
    write_progress,
)


def _seeds(text: str, what: str = "seeds") -> list[int]:
    """"0-4" or "0,3,7" or both -> list of seeds."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        try:
            found = range(int(first), int(last if dash else first) + 1)
            if len(found) > 10**6:
                raise argparse.ArgumentTypeError(f"{part!r} is more than a million {what}")
        except ValueError:
            raise argparse.ArgumentTypeError(f"{what} are numbers and ranges such as 0-4 or 0,2,5; got {text!r}") from None
        if not found:
            raise argparse.ArgumentTypeError(f"the range {part!r} is empty; write the smaller number first")
        seeds += found
    return list(dict.fromkeys(seeds))


def _run(args: argparse.Namespace) -> int:
    methods = None if args.method is None else [name.strip() for name in args.method.split(",")]
    suited = [task for task in TASKS if set(methods or ()) <= set(methods_of(task))]
    tasks = [name.strip() for name in args.task.split(",")] if args.task else suited or TASKS
    if args.worker:
        config = make_config(tasks[0], methods[0], args.seeds[0], args.profile)
        progress = checkpoint_folder(config, args.output) / "progress.json"
        train(config, args.output, args.device, write_progress(progress))
        return 0
    wanted = {config for task in tasks for config in grid(task, args.profile, methods, args.seeds)}
    runs = ensure_runs(tasks, methods, args.seeds, args.profile, args.output, args.device, args.workers)
    failed = [run for run in runs if not run.ok]
    print(f"{len(runs) - len(failed)} of {len(wanted)} runs finished, {len(failed)} failed, in {args.output / 'results'}")
    for run in failed:
        print(f"  {run.task}/{run.method}/seed {run.seed}: {run.status}")
    return 0 if len(runs) == len(wanted) else 1


def _importance(args: argparse.Namespace) -> int:
    for task in args.task.split(","):
        watch = watch_parent() if args.worker else None
        state = compute_importance(task, args.profile, args.output, args.device, args.paths, watch)
        if not args.worker:
            print(f"path probabilities of {task}, profile {args.profile}: {state}")
    return 0


def _status(args: argparse.Namespace) -> int:
    check_name("profile", args.profile, PROFILES)
    for task in TASKS:
        rows = {}
        for method in methods_of(task):
            found = list(states(grid(task, args.profile, [method]), args.output).values()) if method not in NOT_RUN else []
            counts = {state: found.count(state) for state in ("done", "failed", "stale", "missing")}
            rows[method] = counts | {"note": f"not run: {NOT_RUN[method]}" if method in NOT_RUN else ""}
        found = list(states([importance_config(task, args.profile)], args.output).values())
        rows[IMPORTANCE] = {state: found.count(state) for state in counts} | {"note": "path probabilities of scrapl"}
        print(f"{task}, profile {args.profile}: runs by method\n{pd.DataFrame(rows).T.to_string()}\n")
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
    whole = argparse.ArgumentParser(prog="python -m scrapl_lib", description="Train, look at and show the experiments.")
    commands = whole.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--profile", default="quick", help=f"{', '.join(PROFILES)} (default quick)")
    common.add_argument("--output", type=lambda text: Path(text).absolute(), default=ROOT,
                        help="folder that holds results/, figures/ and checkpoints/ (default: the project)")  # fmt: skip

    run = commands.add_parser("run", parents=[common], help="train what is missing of a grid; again to resume")
    run.add_argument("--task", help=f"comma-separated; default those whose tables have the methods. {', '.join(TASKS)}")
    run.add_argument("--method", help=f"comma-separated; default all. {', '.join(METHODS)}")
    run.add_argument("--seeds", type=_seeds, help="0-4 or 0,2,5; default: those of the profile")
    run.add_argument("--device", help="cpu or cuda (default: cuda for the paper profile, else cpu)")
    run.add_argument("--workers", type=int, help="runs at once (default: one per core, one on CUDA)")
    run.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    run.set_defaults(function=_run)

    importance = commands.add_parser("importance", parents=[common], help="path probabilities of theta-importance sampling "
                                     "(run computes what it needs of them); again to resume")  # fmt: skip
    importance.add_argument("--task", default=",".join(TASKS), help=f"comma-separated; default all. {', '.join(TASKS)}")
    importance.add_argument("--paths", type=lambda text: _seeds(text, "paths"),
                            help="0-99 or 0,7: only these. Whoever finds all parts in checkpoints/ puts them together")  # fmt: skip
    importance.add_argument("--device", help="cpu or cuda (default: cuda for the paper profile, else cpu)")
    importance.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    importance.set_defaults(function=_importance)

    status = commands.add_parser("status", parents=[common], help="which runs are done, failed, stale or missing")
    status.set_defaults(function=_status)

    notebook = commands.add_parser("notebook", parents=[common], help="execute notebooks strictly through papermill")
    notebook.add_argument("names", nargs="*", help="such as 05_granular; default all, in order")
    notebook.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE", help="a notebook's parameter")
    notebook.set_defaults(function=_notebook)
    return whole


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
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
    sys.exit(main())
