"""One path's forward and backward, ours against scrapl-loss 0.1.0, and the memory of our full JTFS: `make bench`.

The two run in interpreters of their own (the authors' package cannot live beside kymatio) and take turns call by call,
so that whatever else the machine does falls on both; while one works the other waits for its next line. One path of each
second-order wavelet n2, granular configuration, batch 4. Prints medians and their ratios, writes
results/bench/single_path.csv and .json (summary, memory and provenance).
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from scrapl_lib.jtfs import JTFS
from scrapl_lib.records import ROOT, provenance, utc_now, write_csv, write_text_atomic

sys.path.insert(0, str(Path(__file__).parent))
from worker import BATCH, CONFIG  # noqa: E402

WORKER = str(Path(__file__).with_name("worker.py"))


def one_path_of_each_n2() -> list:
    """For each n2 one of its paths, another log-frequency wavelet from one n2 to the next."""
    by_n2: dict[int, list] = {}
    for path in JTFS(**CONFIG).paths:
        by_n2.setdefault(path.n2, []).append(path)
    return [paths[7 * i % len(paths)] for i, paths in enumerate(by_n2.values())]


def ask(worker: subprocess.Popen, index: int) -> dict:
    print(index, file=worker.stdin, flush=True)
    if not (line := worker.stdout.readline()):
        raise SystemExit(
            f"{worker.args[2]} ended with exit status {worker.wait()} at path {index}; its words are above"
        )
    return json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", default=str(ROOT / ".venv-peers/bin/python"), help="an interpreter with scrapl-loss")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=7, help="timed calls of each path on each side")
    parser.add_argument("--output", type=Path, default=ROOT)
    args = parser.parse_args()
    if not Path(args.peers).exists():
        raise SystemExit(f"no interpreter {args.peers}: run `make peers` first")
    sides = {"ours": sys.executable, "scrapl-loss": args.peers}
    workers = {
        side: subprocess.Popen(
            [python, WORKER, side, str(args.threads)], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for side, python in sides.items()
    }
    rows, names = [], list(workers)
    for path in one_path_of_each_n2():
        answers = {side: [] for side in names}
        for repetition in range(args.repetitions + 1):
            for side in names if repetition % 2 else names[::-1]:
                answers[side].append(ask(workers[side], path.index))
        ms = {side: [answer["ms"] for answer in answers[side][1:]] for side in names}  # the first call warms up
        ours, theirs = (answers[side][0]["loss"] for side in names)
        row = {"path_idx": path.index, "n2": path.n2, "n_fr": path.n_fr}
        for side in names:
            row |= {f"{side}_ms": np.median(ms[side]), f"{side}_q25_ms": np.quantile(ms[side], 0.25)}
            row |= {f"{side}_q75_ms": np.quantile(ms[side], 0.75)}
        row |= {"times_faster": row["scrapl-loss_ms"] / row["ours_ms"], "loss_difference": abs(ours - theirs) / theirs}
        rows.append(row)
        print("path {path_idx:3d} (n2 {n2:2d}, n_fr {n_fr:2d}): {ours_ms:7.1f} ms ours, {scrapl-loss_ms:7.1f} ms "
              "scrapl-loss, {times_faster:5.2f} times faster".format_map(row), flush=True)  # fmt: skip
    for worker in workers.values():
        worker.communicate()
    memory = subprocess.run(
        [sys.executable, WORKER, "memory", str(args.threads)], check=True, capture_output=True, text=True
    ).stdout
    table = pd.DataFrame(rows)
    faster = table["times_faster"]
    summary = {
        "times_faster": {"median": faster.median(), "min": faster.min(), "max": faster.max()},
        "largest_relative_loss_difference": table["loss_difference"].max(),
        "full_jtfs_forward_backward": {**json.loads(memory), "batch": BATCH},
        **{"batch": BATCH, "threads": args.threads, "repetitions": args.repetitions, "config": CONFIG},
        **{
            key: value for key, value in provenance("cpu").items() if key != "peak_memory_mb"
        },  # this process only waits
        "end_utc": utc_now(),
    }
    folder = args.output / "results/bench"
    write_csv(folder / "single_path.csv", table)
    write_text_atomic(
        folder / "single_path.json", json.dumps(summary, indent=1, sort_keys=True, allow_nan=False) + "\n"
    )
    print(f"times faster: median {faster.median():.2f}, least {faster.min():.2f}, most {faster.max():.2f}")
    print(f"losses agree within {table['loss_difference'].max():.1e} relative; {len(table)} paths, batch {BATCH}, "
          f"{args.threads} threads")  # fmt: skip
    print(f"full JTFS forward and backward: peak {json.loads(memory)['peak_mib']:.0f} MiB; written: {folder}")


if __name__ == "__main__":
    main()
