"""What a training step of SCRAPL by P-SAGA takes, part by part: with the references' coefficients from files, and anew.

Steps of one task and profile, each over a path of another second-order wavelet; a step with and one without files take
turns. Writes results/bench/training_step_<profile>_<threads>.csv, medians over steps in milliseconds, and .json
(settings, provenance). It starts itself anew with the memory settings that workers of `run` have (`jobs.KEEP_MEMORY`).

    python benchmarks/bench_training_step.py --profile paper --threads 2
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from replication.costs import spread
from replication.data import meso_seeds
from replication.files import write_csv, write_text_atomic
from replication.jobs import KEEP_MEMORY
from replication.records import ROOT, provenance, utc_now
from replication.references import drawn, kept_references
from replication.tasks import PROFILES, TASKS, make_config
from replication.trainer import Training

PARTS = ("encoder", "synthesizer", "loss", "loss_back", "synthesizer_back", "encoder_back", "update")


def step_ms(training: Training, items: torch.Tensor, path: int, from_files: bool, step: int) -> dict[str, float]:
    """One training step; milliseconds of each of `PARTS`."""
    times_s, seeds = [time.perf_counter()], meso_seeds(0, step, len(items))

    def done() -> None:
        times_s.append(time.perf_counter())

    training.optimizer.zero_grad()
    theta_hat = training.encoder(training.features[items])
    done()
    x_hat = training.synth(theta_hat, seeds)
    done()
    options = {"S": drawn(training.kept, items, [path])} if from_files else {}
    value = training.loss(x_hat, training.x[items], path_idx=path, **options)
    done()
    (of_x,) = torch.autograd.grad(training.config.gradient_scale * value, x_hat)
    done()
    (of_theta,) = torch.autograd.grad(x_hat, theta_hat, of_x)
    done()
    theta_hat.backward(of_theta)
    done()
    training.optimizer.step()
    done()
    return {part: 1e3 * (end - start) for part, start, end in zip(PARTS, times_s, times_s[1:], strict=False)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--profile", choices=PROFILES, default="quick", help="default quick")
    parser.add_argument("--task", choices=TASKS, default="chirplet_fast_moderate")
    parser.add_argument("--steps", type=int, default=21, help="of each kind, after one that does not count (21)")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch (default 2)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start_utc = utc_now()
    training = Training(make_config(args.task, "scrapl_no_theta_is", 0, args.profile))
    training.encoder.train()
    paths = spread([group[0] for group in training.loss.jtfs.groups["rate"]], args.steps)
    batches = training.data.batches("train", training.config.batch_size)
    batches = [batches[step % min(4, len(batches))] for step in range(args.steps + 1)]  # four, as files take long
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        some = torch.cat(batches).unique()
        training.kept = kept_references(training.loss.jtfs, training.x, some, Path(folder), lambda share: None)
        for step, items in enumerate(tqdm(batches, desc="steps")):
            path = paths[step % len(paths)]
            for references in ("files", "anew"):
                ms = step_ms(training, items, path, references == "files", step)
                rows.append({"references": references, "step": step, **ms, "all": sum(ms.values())})
    table = pd.DataFrame(rows)
    table = table[table["step"] > 0].drop(columns="step").groupby("references", sort=False).median().reset_index()
    name = f"training_step_{args.profile}_{args.threads}"
    about = vars(args) | {"start_utc": start_utc, "config": training.config.flat} | provenance("cpu")
    write_csv(ROOT / "results" / "bench" / f"{name}.csv", table)
    write_text_atomic(ROOT / "results" / "bench" / f"{name}.json", json.dumps(about, indent=1) + "\n")
    print(table.round(0).to_string(index=False))


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in KEEP_MEMORY.items()):  # glibc reads them at the start
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)
    main()
