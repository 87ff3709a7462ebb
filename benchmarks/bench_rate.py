"""What drawing a rate costs: all paths of a second-order wavelet n2 against one of them.

Granular configuration, noise of unit norm, forward and backward. The two take turns, path after rate, so that whatever
else the machine does falls on both; the ratio of a rate is the median over its pairs (of rounds, each with another of
the rate's paths). Writes results/bench/rate.csv, a row per rate, and rate.json (settings, provenance, means).

    python benchmarks/bench_rate.py --rounds 9 --threads 2
"""

import argparse
import json
import time

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from replication.files import write_csv, write_text_atomic
from replication.records import ROOT, provenance, utc_now
from scrapl_lib import SCRAPLLoss


def milliseconds(loss: SCRAPLLoss, draw: int, x_hat: torch.Tensor, x: torch.Tensor) -> float:
    start = time.perf_counter()
    loss(x_hat, x, path_idx=draw).backward()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--rounds", type=int, default=9, help="pairs per rate (default 9), after one that does not count"
    )
    parser.add_argument("--batch", type=int, default=4, help="sounds (default 4)")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch (default 2)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path, rate, start_utc = SCRAPLLoss(), SCRAPLLoss(draw="rate"), utc_now()
    x = torch.randn(2, args.batch, 1, path.jtfs.shape, generator=torch.Generator().manual_seed(0))
    x_hat, x = x / x.norm(dim=-1, keepdim=True)
    x_hat.requires_grad_()
    pairs: dict[int, list[tuple[float, float]]] = {draw: [] for draw in range(rate.n_paths)}
    for round_ in tqdm(range(args.rounds + 1), desc="rounds"):
        for draw, paths in enumerate(rate.draws):
            one = paths[(4 * round_ + draw) % len(paths)]  # 4 and 15 have no common divisor: another one in each round
            pairs[draw].append((milliseconds(path, one, x_hat, x), milliseconds(rate, draw, x_hat, x)))
    rows = []
    for draw, paths in enumerate(rate.draws):
        ms = np.array(pairs[draw][1:])
        first = path.jtfs.paths[paths[0]]
        row = {"n2": first.n2, "rate_hz_at_8192": 8192 * first.rate, "n_paths": len(paths)}
        row |= {"path_ms": np.median(ms[:, 0]), "rate_ms": np.median(ms[:, 1]), "paths": np.median(ms[:, 1] / ms[:, 0])}
        rows.append(row)
    table = pd.DataFrame(rows)
    means = {"mean": float(table["paths"].mean()), "largest": float(table["paths"].max())}
    about = vars(args) | {"rate_in_paths": means, "start_utc": start_utc} | provenance("cpu")
    write_csv(ROOT / "results" / "bench" / "rate.csv", table)
    write_text_atomic(ROOT / "results" / "bench" / "rate.json", json.dumps(about, indent=1) + "\n")
    print(table.round(2).to_string(index=False))
    print("a rate costs {mean:.2f} paths in the mean over rates, {largest:.2f} at most".format(**means))


if __name__ == "__main__":
    main()
