"""Runs per hour when 1, 2, 4, 8 workers share a device: `python benchmarks/throughput.py --profile paper --device
cuda`.

Each worker is a process that trains a run of its own seed. All first make the filters of every path and take `--warm`
steps; then, together, they train for `--seconds`. Runs per hour are the steps per second of all of them, over the steps
of a run: start-up, validation and test, which depend otherwise on how many share the device, are not counted. On a CPU
the workers divide the cores among them: `--workers 1 2` on two cores compares one run on two threads with two runs, a
thread each (as `run` has them).
Written: <output>/results/bench/throughput_<profile>_<device>.csv and .json (settings, provenance); the smoke profile's
numbers mean nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from replication.files import write_csv, write_text_atomic
from replication.jobs import KEEP_MEMORY
from replication.problem import check_device, default_device, default_workers
from replication.records import ROOT, n_cores, provenance, utc_now
from replication.tasks import make_config
from replication.trainer import Training
from scrapl_lib.losses import SCRAPLLoss


def worker(task: str, method: str, profile: str, device: str, seed: int, warm: int, seconds: float) -> None:
    """Says "ready" after `warm` steps, trains for `seconds` from the next line of stdin on, says steps, seconds, steps
    of a run."""
    config = make_config(task, method, seed, profile)
    training = Training(replace(config, epochs=10**6), check_device(device))
    if isinstance(training.loss, SCRAPLLoss):
        with torch.no_grad():
            for path in range(training.loss.n_paths):  # a path's filters are made when it is first drawn
                training.loss.coefficients(training.x[:1], path)
    steps = training.steps()
    while len(training.step_s) < warm:
        next(steps)
    before = len(training.step_s)
    print("ready", flush=True)
    sys.stdin.readline()
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s or len(training.step_s) == before:
        next(steps)
    timed = training.step_s[before:]  # without validation, which would come at other times in other workers
    print(len(timed), sum(timed), config.epochs * training.steps_per_epoch, flush=True)


def measure(n: int, arguments: list[str], device: str) -> dict[str, float]:
    """Of n workers at once: runs per hour, and a worker's mean milliseconds per step."""
    n_threads = max(1, n_cores() // n)
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(n_threads)) if device == "cpu" else {}
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, *arguments, "--seed", str(seed)],
            stdin=subprocess.PIPE,
            text=True,
            stdout=subprocess.PIPE,
            env=os.environ | KEEP_MEMORY | threads,
        )
        for seed in range(n)
    ]
    try:
        if any(each.stdout.readline() != "ready\n" for each in workers):
            raise RuntimeError(f"one of {n} workers ended before it was ready, its words are above")
        for each in workers:
            print("go", file=each.stdin, flush=True)
        found = [[float(number) for number in each.communicate()[0].split()] for each in workers]
    finally:
        for each in workers:
            each.kill()
    rates = [steps / seconds for steps, seconds, _ in found]
    measured = {"runs_per_hour": 3600 * sum(rates) / found[0][2], "step_ms": 1000 * n / sum(rates)}
    return {"workers": n, "threads": n_threads if device == "cpu" else None} | measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="granular")
    parser.add_argument("--method", default="scrapl_no_theta_is", help="not scrapl, which needs its path probabilities")
    parser.add_argument("--profile", default="smoke")
    parser.add_argument("--device")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--warm", type=int, default=20, help="steps before the measurement")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--output", type=Path, default=ROOT)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = args.device or default_device(args.profile)
    settings = {
        "task": args.task,
        "method": args.method,
        "profile": args.profile,
        "device": device,
        "warm": args.warm,
        "seconds": args.seconds,
    }
    if args.seed is not None:
        return worker(seed=args.seed, **settings)
    import pandas as pd

    check_device(device)
    path = args.output / "results/bench" / f"throughput_{args.profile}_{device.replace(':', '')}"
    arguments, rows = [word for name, value in settings.items() for word in (f"--{name}", str(value))], []
    for n in args.workers:
        rows.append(measure(n, arguments, device))
        rows[-1]["times_one"] = rows[-1]["runs_per_hour"] / rows[0]["runs_per_hour"]
        print(
            "{workers} workers: {runs_per_hour:.4g} runs per hour, {times_one:.2f} times the first; {step_ms:.3g} ms "
            "per step of each".format_map(rows[-1]),
            flush=True,
        )
        write_csv(path.with_suffix(".csv"), pd.DataFrame(rows))  # each time: the next may not fit into memory or time
        about = provenance(device) | {"settings": settings, "end_utc": utc_now()}
        write_text_atomic(path.with_suffix(".json"), json.dumps(about, indent=1, sort_keys=True) + "\n")
    print(f"`run` takes {default_workers(device)} workers here unless told")


if __name__ == "__main__":
    main()
